"""Replicas of a model on the workers of a Dask cluster."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock

import anyio
import httpx
import psutil
import pytest
import yaml
from conftest import eventually, unused_port, words_of
from IPython.core.formatters import DisplayFormatter
from pydantic import SecretStr
from test_dask_sweep import connected, machines

from kitty_nb import Fleet, ServerConfig, ServerStatus, show_sweeps
from kitty_nb.errors import ExperimentError, KittyError, ServerFailedError, WaitTimeoutError
from kitty_nb.fleet.balancing import LeastBusyTransport, Target
from kitty_nb.fleet.front import FRONTS, Front
from kitty_nb.fleet.hosts import rpc_hosts
from kitty_nb.fleet.placement import Placement
from kitty_nb.fleet.replica import Report, reachable_host
from kitty_nb.widgets import ReplicaPanel
from kitty_nb.widgets.fleet_panel import UNKNOWN
from kitty_nb.widgets.session import newest

if TYPE_CHECKING:  # else a second's import in processes that run other tests
    from distributed import Client

WAIT = 120.0


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with machines(tmp_path_factory.mktemp("dask"), n_workers=2) as process:
        assert process.stdout
        yield process.stdout.readline().strip()


@pytest.fixture
def two(address: str) -> Iterator[Client]:
    """A cluster of two workers."""
    from distributed import Client  # noqa: PLC0415

    with Client(address) as client:
        client.wait_for_workers(2, timeout=WAIT)
        yield client


def servers(fleet: Fleet) -> list[int]:
    return [one.report.pid for one in fleet.replicas if one.report and one.report.pid]


def ready(fleet: Fleet) -> int:
    return sum(one.status is ServerStatus.READY for one in fleet.replicas)


def test_each_worker_has_a_server_and_requests_are_spread(
    two: Client, config: ServerConfig
) -> None:
    config = config.replace(context_size=1024)
    with Fleet.run(client=two, replicas=2, config=config) as fleet:
        fleet.wait_ready(timeout=WAIT)
        assert len({one.worker for one in fleet.replicas}) == 2
        pids = servers(fleet)
        assert len({one.url for one in fleet.replicas}) == 2
        answer = fleet.chat("Hello", max_tokens=3).wait(WAIT)
        assert answer.usage.answer == 3
        made = fleet.client.chat.completions.create(
            model=fleet.alias, messages=[{"role": "user", "content": "Hello"}], max_tokens=3
        )
        assert made.usage.completion_tokens == 3
        streamed = fleet.client.chat.completions.create(
            model=fleet.alias,
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=3,
            stream=True,
        )
        assert list(streamed)
        # Several at once go to both.
        with ThreadPoolExecutor(6) as pool:
            answers = pool.map(lambda _: fleet.chat("Hi", max_tokens=40).wait(WAIT), range(6))
            assert len([*answers]) == 6
        key = {"Authorization": f"Bearer {fleet.reveal_api_key()}"}
        asked = {
            one.url: httpx.get(f"{one.url}/slots", headers=key).json()[0]["id_task"]
            for one in fleet.replicas
        }
        assert min(asked.values()) > 0, asked
        for one in fleet.replicas:
            assert httpx.get(f"{one.url}/v1/models").status_code == 401
        secret = fleet.reveal_api_key() or ""
        assert secret not in str(two.get_events())
        assert secret not in repr(fleet.replicas)
        assert secret not in str(two.run(lambda dask_worker: [*dask_worker.state.tasks]))
    assert not any(map(psutil.pid_exists, pids))
    # The cluster is as before: its workers take other tasks.
    assert two.submit(sum, [1, 2]).result(WAIT) == 3


@pytest.mark.slow
def test_a_killed_worker_takes_its_server_along_and_another_takes_its_place(
    tmp_path: Path, config: ServerConfig
) -> None:
    with (
        machines(tmp_path, n_workers=2) as process,
        connected(process) as client,
        Fleet.run(client=client, replicas=2, config=config) as fleet,
    ):
        fleet.wait_ready(timeout=WAIT)
        before = fleet.replicas[0]
        pids = client.run(os.getpid)
        assert before.worker
        assert before.report
        os.kill(pids[before.worker], signal.SIGKILL)
        eventually(lambda: not psutil.pid_exists(before.report.pid or 0), within=WAIT)
        assert fleet.chat("Hello", max_tokens=3).wait(WAIT).text is not None
        eventually(
            lambda: (
                fleet.replicas[0].status is ServerStatus.READY
                and fleet.replicas[0].url != before.url
            ),
            within=WAIT,
        )
        fleet.wait_ready(timeout=WAIT)


def test_a_model_that_no_worker_has_is_a_sentence(two: Client, config: ServerConfig) -> None:
    missing = config.replace(model="/nowhere/missing.gguf")
    with Fleet.run(client=two, replicas=2, config=missing) as fleet:
        eventually(lambda: fleet.problem)
        assert "missing.gguf" in str(fleet.problem)
        with pytest.raises(WaitTimeoutError, match=r"missing\.gguf"):
            fleet.wait_ready(timeout=0.1)
        with pytest.raises(ServerFailedError, match="No replica is ready"):
            fleet.chat("Hello").wait(WAIT)


@pytest.mark.slow
def test_a_worker_that_hangs_holds_nobody_up(
    two: Client, config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.experiments.cluster._ALIVE_WITHIN", 5.0)
    monkeypatch.setattr("kitty_nb.fleet.placement._STOP_WITHIN", 1.0)
    hanging, pid = next(iter(two.run(os.getpid).items()))
    os.kill(pid, signal.SIGSTOP)
    try:
        with Fleet.run(client=two, replicas=2, config=config) as fleet:
            fleet.wait_ready(1, timeout=WAIT)
            assert f"{hanging}: It has not answered for 5 s" in str(fleet.problem)
            assert fleet.chat("Hello", max_tokens=3).wait(WAIT).text
    finally:
        os.kill(pid, signal.SIGCONT)


def test_what_is_no_client_is_refused(config: ServerConfig) -> None:
    with pytest.raises(ExperimentError, match="not a dask"):
        Fleet.run(client="tcp://nowhere", config=config)  # type: ignore[arg-type]


def test_whatever_ends_the_placing_is_heard(
    two: Client, config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def odd(_: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr("kitty_nb.fleet.placement.workers_of", odd)
    with (
        Fleet.run(client=two, config=config) as fleet,
        pytest.raises(ServerFailedError, match=r"RuntimeError\('odd'\)"),
    ):
        fleet.wait_ready(timeout=WAIT)


def test_machines_of_a_cluster_can_lend_their_devices(two: Client, config: ServerConfig) -> None:
    assert config.replace(rpc_hosts=rpc_hosts(two)).rpc_hosts == (socket.gethostname(),)


def test_a_replica_more_than_workers_waits_and_the_panel_shows_all(
    two: Client, config: ServerConfig
) -> None:
    with Fleet.run(client=two, replicas=3, config=config) as fleet:
        notebook = DisplayFormatter()
        show_sweeps(notebook.mimebundle_formatter)
        shown, _ = notebook.format(fleet)  # what a cell shows that ends in the fleet
        panel = newest(ReplicaPanel, fleet)
        assert panel
        try:
            view = shown["application/vnd.jupyter.widget-view+json"]
            assert view["model_id"] == panel.model_id
            fleet.wait_ready(2, timeout=WAIT)
            eventually(lambda: [row["status"] for row in panel.rows].count("Ready") == 2)
            (waiting,) = (row for row in panel.rows if row["status"] != "Ready")
            assert "waits for a worker" in waiting["problem"]
            up = next(row for row in panel.rows if row["status"] == "Ready")
            eventually(lambda: any(row["memory"] != UNKNOWN for row in panel.rows))
            panel.receive({"kind": "stop", "profile": up["profile"]})
            number = int(up["profile"].split()[1])
            eventually(lambda: fleet.replicas[number].status is ServerStatus.STOPPED)
            # The one that waited takes its place.
            eventually(lambda: ready(fleet) == 2, within=WAIT)
            name, dash = up["profile"], UNKNOWN  # without what it held
            gone = {"profile": name, "detail": "", "memory": dash, "pace": dash, "start": True}
            eventually(lambda: any(gone.items() <= row.items() for row in panel.rows))
            panel.receive({"kind": "start", "profile": up["profile"]})
            eventually(lambda: fleet.replicas[number].problem)  # now this one waits
            panel.receive({"kind": "stop_all"})
            eventually(lambda: {one.status for one in fleet.replicas} == {ServerStatus.STOPPED})
            eventually(lambda: not any(row["problem"] for row in panel.rows))
            panel.receive({"kind": "start", "profile": up["profile"]})
            eventually(lambda: fleet.replicas[number].status is ServerStatus.READY, within=WAIT)
        finally:
            fleet.close()
            panel.receive({"kind": "rescan"})
            assert "This fleet is closed" in panel.notice
            panel.close()


def test_nginx_balances_them(two: Client, config: ServerConfig) -> None:
    if not FRONTS["nginx"].find():
        pytest.skip("needs nginx")
    with Fleet.run(client=two, replicas=2, config=config) as fleet:
        front = fleet.balance("nginx", unused_port())
        fleet.wait_ready(timeout=WAIT)
        key = {"Authorization": f"Bearer {fleet.reveal_api_key()}"}

        def serves() -> bool:
            with suppress(httpx.HTTPError):
                return httpx.get(f"{front.url}/health").status_code == 200
            return False

        eventually(serves, why=front.problem or "")
        asked = {"model": fleet.alias, "messages": [{"role": "user", "content": "Hi"}]}
        path = f"{front.url}/v1/chat/completions"
        request = {**asked, "max_tokens": 3}
        assert httpx.post(path, json=request).status_code == 401
        for _ in range(6):
            assert httpx.post(path, json=request, headers=key, timeout=60).status_code == 200
        tasks = [
            httpx.get(f"{one.url}/slots", headers=key).json()[0]["id_task"]
            for one in fleet.replicas
        ]
        assert min(tasks) > 0, tasks
        (process,) = (
            one for one in psutil.Process().children() if "nginx: master" in " ".join(words_of(one))
        )
        secret = fleet.reveal_api_key() or ""
        for child in (process, *process.children()):
            assert secret not in " ".join(words_of(child))
        fleet.stop(0).wait(WAIT)
        for _ in range(4):  # it has read its configuration again, or tries the other
            assert httpx.post(path, json=request, headers=key, timeout=60).status_code == 200
        process.kill()
        eventually(lambda: front.restarts == 1)
        eventually(serves)
    with pytest.raises(httpx.HTTPError):
        httpx.get(front.url)


def test_its_configuration_is_accepted_and_private(tmp_path: Path) -> None:
    if not (nginx := FRONTS["nginx"].find()):
        pytest.skip("needs nginx")
    targets = [Target("http://127.0.0.1:9001", 4), Target("http://[::1]:9002", 4)]
    folder = tmp_path / "a folder; with signs"
    folder.mkdir()
    file = folder / "nginx.conf"
    file.write_text(FRONTS["nginx"].text(targets, "demo", unused_port(), folder))
    done = subprocess.run(
        [nginx, "-t", "-e", "stderr", "-c", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sesame" not in file.read_text()
    with socket.create_server(("127.0.0.1", 0)) as other:  # who would get the clients' keys
        for port in (other.getsockname()[1], 0, 65536, "80"):
            with pytest.raises(ServerFailedError, match="Choose another port"):
                FRONTS["nginx"](SecretStr("sesame"), "demo", port)


def test_a_balancer_has_its_port_before_a_replica_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Front, "find", lambda *_: "/bin/true")
    for kind in FRONTS.values():
        monkeypatch.setattr(kind, "_examine", AsyncMock(return_value=None))

    async def work() -> None:
        first = FRONTS["llama-swap"](SecretStr("sesame"), "demo")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first.run)
            await anyio.sleep(0)
            second = FRONTS["nginx"](SecretStr("sesame"), "demo")
            assert second.port != first.port
            with pytest.raises(ServerFailedError, match="that does not listen yet"):
                FRONTS["nginx"](SecretStr("sesame"), "demo", first.port)
            tasks.start_soon(second.run)
            await anyio.sleep(0)
            tasks.cancel_scope.cancel()
        assert first._reserved.fileno() == second._reserved.fileno() == -1  # closed

    anyio.run(work)


def test_llama_swap_balances_them(two: Client, config: ServerConfig) -> None:
    program = FRONTS["llama-swap"].find()
    if not program:
        pytest.skip("needs llama-swap")
    with Fleet.run(client=two, replicas=2, config=config.replace(parallel=1)) as fleet:
        front = fleet.balance("llama-swap", unused_port())
        fleet.wait_ready(timeout=WAIT)
        key = {"Authorization": f"Bearer {fleet.reveal_api_key()}"}
        asked = {"model": fleet.alias, "messages": [{"role": "user", "content": "Hi"}]}
        path = f"{front.url}/v1/chat/completions"

        def answer(tokens: int, headers: dict[str, str] = key) -> int:
            with suppress(httpx.HTTPError):
                request = {**asked, "max_tokens": tokens, "ignore_eos": True}
                return httpx.post(path, json=request, headers=headers, timeout=60).status_code
            return 0

        eventually(lambda: answer(3) == 200, why=front.problem or "")
        assert answer(3, {}) == 401

        def both_work() -> bool:
            with ThreadPoolExecutor(4) as pool:
                assert {*pool.map(lambda _: answer(100), range(8))} == {200}
            slots = (httpx.get(f"{one.url}/slots", headers=key).json() for one in fleet.replicas)
            return all(slot["id_task"] > 0 for (slot,) in slots)

        eventually(both_work, within=WAIT)  # it looks at its configuration from time to time
        fleet.stop(0).wait(WAIT)
        eventually(lambda: all(answer(3) == 200 for _ in range(4)))


# A llama-swap that reads its configuration when it starts, and from then on if its time changes.
_SWAP = """#!{python}
import os, pathlib, socket, sys, time
if sys.argv[1] == "-version":
    sys.exit(print("version: 242"))
file, folder = sys.argv[2], pathlib.Path({folder!r})
port = int(sys.argv[4].split(":")[1])
def read():
    (folder / "read").write_bytes(pathlib.Path(file).read_bytes())
read()
while not (folder / "go").exists():
    time.sleep(0.01)
noted = os.stat(file).st_mtime_ns
server = socket.create_server(("127.0.0.1", port))
while True:
    time.sleep(0.05)
    if noted != (noted := os.stat(file).st_mtime_ns):
        read()
"""


def test_llama_swap_learns_of_a_replica_that_is_ready_while_it_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "llama-swap"
    program.write_text(_SWAP.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(Front, "find", lambda *_: str(program))
    front = FRONTS["llama-swap"](SecretStr("sesame"), "demo")
    targets = [Target(f"http://10.0.0.{number}:9001", 1) for number in (1, 2)]
    read = tmp_path / "read"

    async def until(number: int) -> None:
        with anyio.fail_after(30):
            while not read.exists() or f"10.0.0.{number}" not in read.read_text():
                await anyio.sleep(0.05)

    async def work() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(front.run)
            front.use(targets[:1])
            await until(1)
            front.use(targets)
            await anyio.sleep(0.3)
            (tmp_path / "go").touch()
            await until(2)
            tasks.cancel_scope.cancel()

    anyio.run(work)


def test_llama_swap_gets_a_peer_for_each_and_a_selector_over_all() -> None:
    targets = [Target("http://10.0.0.1:9001", 4), Target("http://10.0.0.2:9001", 2)]
    said = yaml.safe_load(FRONTS["llama-swap"].text(targets, "gemma", 8100, Path()))
    assert said["apiKeys"] == ["${env.KITTY_FLEET_KEY}"]
    assert said["peers"]["replica-1"] == {
        "proxy": "http://10.0.0.2:9001",
        "apiKey": "${env.KITTY_FLEET_KEY}",
        "models": ["gemma"],
    }
    assert said["selectors"]["gemma"] == {
        "strategy": "spillover",
        "targets": ["replica-0/gemma", "replica-1/gemma"],
        "settings": {"spillover": 2},
    }


def test_a_balancer_that_is_not_there_is_a_sentence(
    two: Client, config: ServerConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with Fleet.run(client=two, config=config) as fleet:
        with pytest.raises(ServerFailedError, match="llama-swap is not installed"):
            fleet.balance("llama-swap")
        with pytest.raises(KittyError, match="There is no balancer"):
            fleet.balance("haproxy")
        program = tmp_path / "llama-swap"  # tells its words and environment
        program.write_text(
            f'#!/bin/sh\n[ "$1" = -version ] && echo version: 242 && exit\n'
            f'echo "$@" > {tmp_path}/words\n'
            f"echo $KITTY_FLEET_KEY > {tmp_path}/key\nexec /bin/sleep 600\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        front = fleet.balance("llama-swap")
        fleet.wait_ready(timeout=WAIT)
        eventually((tmp_path / "key").exists)
        eventually((tmp_path / "key").read_text)
        words = (tmp_path / "words").read_text().split()
        assert words[2:] == ["--listen", f"127.0.0.1:{front.port}", "--watch-config"]
        file = Path(words[1])
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert (tmp_path / "key").read_text().strip() == fleet.reveal_api_key()
        assert str(fleet.reveal_api_key()) not in file.read_text()


@pytest.mark.parametrize(
    ("worker", "host"),
    [
        ("tcp://127.0.0.1:40000", "127.0.0.1"),
        ("tls://10.0.0.7:40000", "10.0.0.7"),
        ("tcp://[::1]:40000", "127.0.0.1"),
        ("tcp://[fd00::7]:40000", "fd00::7"),
        ("inproc://10.0.0.7/12/3", "127.0.0.1"),
        ("tcp://node7:40000", "node7"),
    ],
)
def test_a_server_listens_where_its_worker_is_reached(worker: str, host: str) -> None:
    assert reachable_host(worker) == host


class Cluster:
    """A client of a cluster that runs nothing; tests report for its workers."""

    status = "running"
    hangs = False  # whether one of its workers does

    def __init__(self, *workers: str) -> None:
        self.scheduler = self
        self.workers = set(workers)
        self.submitted: list[str] = []  # the names of runs
        self.told: list[tuple[str, str]] = []  # workers, and the runs that they were told to stop

    async def identity(self) -> dict[str, Any]:
        return {"workers": {worker: {} for worker in self.workers}}

    def submit(self, _serve: object, _setup: object, _number: int, run: str, **_: object) -> Any:
        self.submitted.append(run)
        return SimpleNamespace(status="pending", release=lambda: None)

    async def run(
        self, _: object, run: str, workers: list[str] | None = None, **__: object
    ) -> None:
        self.told += [(worker, run) for worker in workers or sorted(self.workers)]
        if self.hangs:
            await anyio.sleep_forever()


async def placed_on(cluster: Cluster, config: ServerConfig) -> Placement:
    """A replica that waits for one of the workers, all of which have been asked."""
    placement = Placement(cluster, config, 1, lambda: None)  # type: ignore[arg-type]
    placement._own, placement._tasks = cluster, SimpleNamespace(start_soon=lambda *_: None)  # type: ignore[assignment]
    admits(placement, fresh=False)
    await placement._look()
    return placement


def admits(placement: Placement, *, fresh: bool, meanwhile: Callable[[], object] = int) -> None:
    """Have new workers answer at once, after something has happened."""

    async def admit(new: list[str]) -> bool:
        placement._workers |= dict.fromkeys(new, "")
        meanwhile()
        return fresh

    placement._admit = admit  # type: ignore[method-assign]


def reports(placement: Placement, run: str, worker: str) -> None:
    report = Report(0, run, worker, ServerStatus.READY, f"http://{worker}:1", "demo")
    placement._on_event((0.0, pickle.dumps(report)))


@pytest.mark.parametrize("fresh", [False, True])
def test_a_worker_that_joins_while_another_is_asked_keeps_its_replica(
    config: ServerConfig, fresh: bool
) -> None:
    async def work() -> None:
        cluster = Cluster("a")
        placement = await placed_on(cluster, config)
        (run,) = cluster.submitted

        def join() -> None:
            cluster.workers.add("b")
            reports(placement, run, "b")

        admits(placement, fresh=fresh, meanwhile=join)
        await placement._look()
        (replica,) = placement.replicas
        assert (replica.status, replica.problem) == (ServerStatus.READY, None)
        assert cluster.submitted == [run]
        admits(placement, fresh=False)
        cluster.workers.remove("b")
        await placement._look()
        (replica,) = placement.replicas
        assert replica.status is ServerStatus.OUT_OF_REACH

    anyio.run(work)


def test_a_replica_is_stopped_when_the_scheduler_can_be_asked_again(config: ServerConfig) -> None:
    async def work() -> None:
        cluster = Cluster("a")
        placement = await placed_on(cluster, config)
        cluster.status = "connecting"
        await placement.stop(0)
        assert not cluster.told
        cluster.status = "running"
        async with anyio.create_task_group() as placement._tasks:
            await placement._look()
        assert cluster.told == [("a", run) for run in cluster.submitted]

    anyio.run(work)


def test_a_worker_that_hangs_delays_no_other_replica(config: ServerConfig) -> None:
    async def work() -> None:
        cluster = Cluster("a")
        placement = await placed_on(cluster, config)
        cluster.hangs = True
        reports(placement, "a former run", "a")
        async with anyio.create_task_group() as placement._tasks:
            with anyio.fail_after(1):
                await placement._look()
            await anyio.wait_all_tasks_blocked()
            assert cluster.told == [("a", "a former run")]
            placement._tasks.cancel_scope.cancel()

    anyio.run(work)


def test_a_replica_that_moves_is_stopped_wherever_it_is(config: ServerConfig) -> None:
    async def work() -> None:
        cluster = Cluster("a", "b")
        placement = await placed_on(cluster, config)
        (run,) = cluster.submitted
        reports(placement, run, "a")
        cluster.workers.remove("a")  # Dask restarts it on b, which has not reported yet
        await placement.stop(0)
        assert ("b", run) in cluster.told

    anyio.run(work)


def test_a_run_that_was_replaced_before_it_reported_is_stopped_too(config: ServerConfig) -> None:
    async def work() -> None:
        cluster = Cluster("a")
        placement = await placed_on(cluster, config)
        cluster.workers.add("b")  # before a, where it has begun, reports
        admits(placement, fresh=True)
        await placement._look()
        assert len(cluster.submitted) == 2
        await placement.stop(0)
        assert {("a", run) for run in cluster.submitted} <= {*cluster.told}

    anyio.run(work)


Answering = Callable[[list[bytes], bool], httpx.AsyncBaseTransport]


class Pool(httpx.AsyncBaseTransport):
    """Replicas by their host: how many slots are busy, and what they send before they break off."""

    def __init__(self, busy: dict[str, int], parts: dict[str, list[bytes | None]]) -> None:
        self.busy, self.parts, self.asked = busy, parts, Counter[str]()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        if request.url.path == "/slots":
            slots = [{"is_processing": number < self.busy[host]} for number in range(4)]
            return httpx.Response(200, json=slots, request=request)
        self.asked[host] += 1
        if (parts := self.parts.get(host)) is None:
            raise httpx.ConnectError("refused")
        head = {"Content-Type": "text/event-stream"}
        return httpx.Response(200, headers=head, stream=Parts(parts), request=request)


class Parts(httpx.AsyncByteStream):
    def __init__(self, parts: list[bytes | None]) -> None:
        self.parts = parts

    async def __aiter__(self):  # type: ignore[no-untyped-def]
        for part in self.parts:
            if part is None:
                raise httpx.ReadError("killed")
            yield part


def event(text: str) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"' + text.encode() + b'"}}]}\n\n'


def ask(pool: Pool, hosts: str = "ab", times: int = 1) -> bytes:
    async def work() -> bytes:
        targets = [Target(f"http://{host}:1", 4) for host in hosts]
        transport = LeastBusyTransport(lambda: targets, None)
        transport._pool = pool  # type: ignore[assignment]
        said = b""
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as http:
            for _ in range(times):
                said = (await http.post("/v1/chat/completions", json={})).content
        assert not any(transport._under_way.values())
        return said

    return anyio.run(work)


def test_the_one_with_the_most_free_slots_is_asked() -> None:
    pool = Pool({"a": 3, "b": 1, "c": 2}, {host: [event(host)] for host in "abc"})
    assert ask(pool, "abc", times=5) == event("b")
    assert pool.asked == {"b": 5}


def test_one_that_dies_before_a_word_is_replaced_and_leaves_nothing_half() -> None:
    begun = [b'data: {"prompt_progress":{}}\n\n', b'data: {"choices":[{"del', None]
    pool = Pool({"a": 0, "b": 1}, {"a": begun, "b": [event("Hi")]})
    assert ask(pool) == b'data: {"prompt_progress":{}}\n\n' + event("Hi")


def test_one_that_dies_after_a_word_is_not() -> None:
    pool = Pool({"a": 0, "b": 1}, {"a": [event("Hi"), None], "b": [event("Hi")]})
    with pytest.raises(httpx.ReadError):
        ask(pool)
    assert pool.asked == {"a": 1}


def test_when_all_refuse_there_is_a_sentence() -> None:
    with pytest.raises(ServerFailedError, match="All 2 replicas"):
        ask(Pool({"a": 0, "b": 0}, {}))
