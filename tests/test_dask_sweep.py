from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import psutil
import pytest
from conftest import MARK, eventually

from kitty_nb import ServerConfig, write_demo_model
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments import Outcome, Sweep, Trial
from kitty_nb.experiments.trial import (
    RequestAnswered,
    SweepEnded,
    SweepEvent,
    TrialEnded,
    TrialProgressed,
    TrialStarted,
    Workload,
)
from kitty_nb.supervisor.events import Stage

if TYPE_CHECKING:  # else a second's import in processes that run other tests
    from distributed import Client

WAIT = 120.0
_MACHINES = Path(__file__).parent / "dask_machines.py"
_SLOT = {"resources": {"kitty_trial": 1}}
# So that a server is there long enough to be found.
_LONG = {"prompts": ["Hi!"] * 100, "max_tokens": 8}


@contextmanager
def machines(folder: Path, **options: object) -> Iterator[subprocess.Popen[str]]:
    """Start a cluster; its first line of output is its address."""
    given = json.dumps({"local_directory": str(folder), **options})
    environ = os.environ | {
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
        # A cluster on one machine gives up a worker that was not replaced by then, in place of it.
        "DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": f"{WAIT} s",
    }
    with subprocess.Popen(
        [sys.executable, _MACHINES, given],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environ,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin
            process.stdin.close()
            process.wait(WAIT)


@contextmanager
def connected(process: subprocess.Popen[str]) -> Iterator[Client]:
    from distributed import Client  # noqa: PLC0415

    assert process.stdout
    # One that gives up a lost scheduler leaves its thread behind: it has more time than a test.
    with Client(process.stdout.readline().strip(), timeout=3 * WAIT) as client:
        yield client


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two workers, each with a slot."""
    folder = tmp_path_factory.mktemp("dask")
    with machines(folder, n_workers=2, **_SLOT) as process:
        assert process.stdout
        yield process.stdout.readline().strip()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    from distributed import Client  # noqa: PLC0415

    with Client(address) as client:
        client.wait_for_workers(2, timeout=WAIT)
        yield client


@pytest.fixture
def sweep(config: ServerConfig, tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    """Makes sweeps, and ends them."""
    made: list[Sweep] = []

    def make(**more: object) -> Sweep:
        store = tmp_path / f"{len(made)}.journal"
        given = {"config": config, "store": store}
        given |= {"prompts": "Hi!", "max_tokens": 2, "repeats": 1, "busy_repeats": 0}
        made.append(Sweep(**(given | more)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def servers() -> list[psutil.Process]:
    """The engines of trials that run, of this run of the tests alone."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--model" in words and any(word.startswith("trial_") for word in words):
            with suppress(psutil.Error):
                if process.environ().get(MARK) == os.environ[MARK]:
                    found.append(process)
    return found


def heard(sweep: Sweep) -> list[SweepEvent]:
    events: list[SweepEvent] = []
    sweep.subscribe(events.append)
    return events


def count(events: list[SweepEvent], kind: type) -> int:
    return sum(isinstance(event, kind) for event in events)


def of(trial: Trial, events: list[SweepEvent]) -> list[type]:
    """Kinds of a trial's events, without those of the same kind that follow."""
    kinds: list[type] = []
    for event in events:
        whose = event.result.trial if isinstance(event, TrialEnded) else getattr(event, "trial", 0)
        if whose == trial and [type(event)] != kinds[-1:]:
            kinds.append(type(event))
    return kinds


def test_a_cluster_gives_the_rows_that_this_machine_gives(
    sweep: Callable[..., Sweep], client: Client, tmp_path: Path
) -> None:
    given = {"grid": {"context_size": [256, 1024]}, "repeats": 2, "prompts": ["word " * 100, "Hi!"]}
    logs = tmp_path / "kept"
    here, there = sweep(**given), sweep(**given, logs=logs, record=True)
    local = here.run().wait(WAIT).rows
    events = heard(there)
    rows = there.run(client=client).wait(WAIT).rows
    by_trial = {row.trial: row for row in rows}
    assert list(by_trial.keys() - {row.trial for row in local}) == []
    for row in local:
        other = by_trial[row.trial]
        assert (other.outcome, other.reason) == (row.outcome, row.reason)
        assert (other.host, other.engine) == (row.host, row.engine)
        assert (other.measurement is None) == (row.measurement is None)
        if row.measurement and other.measurement:
            assert other.measurement.answers == row.measurement.answers
            assert other.measurement.context == row.measurement.context
            assert other.seconds.own < other.seconds.overall
            assert other.record
            assert other.record.outputs == other.measurement.answers
            whole = [TrialStarted, TrialProgressed, RequestAnswered, TrialEnded]
            assert of(row.trial, events) == whole
    assert {row.outcome for row in rows} == {Outcome.DONE, Outcome.FAILED}
    assert events[-1] == SweepEnded(complete=True)
    # Both workers are given work before either has done it, and never a second trial at once.
    kinds = [type(event) for event in events if isinstance(event, TrialStarted | TrialEnded)]
    assert kinds[:3] == [TrialStarted, TrialStarted, TrialEnded]
    running = [kinds[:n].count(TrialStarted) - kinds[:n].count(TrialEnded) for n in range(9)]
    assert max(running) == 2
    kept = {f"trial_{trial.key}.log" for trial in there.trials}
    assert {file.name for file in logs.iterdir()} == kept
    assert all(file.stat().st_size for file in logs.iterdir())
    again = sweep(**given, store=there.store, record=True)
    events = heard(again)
    assert len(again.run(client=client).wait(WAIT)) == 4
    assert events == [SweepEnded(complete=True)]


def test_cancel_ends_the_servers_of_all_workers(
    sweep: Callable[..., Sweep], client: Client
) -> None:
    one = sweep(repeats=3, prompts=["Hi!"] * 50)
    operation = one.run(client=client)
    eventually(lambda: len(servers()) == 2, within=WAIT)
    one.cancel()
    assert len(operation.wait(WAIT)) < 3
    assert not servers()
    one.pause()
    operation = one.run(client=client)
    eventually(lambda: one.running, within=WAIT)
    assert one.progress.paused
    assert not one.progress.running
    one.resume()
    assert {row.outcome for row in operation.wait(WAIT).rows} == {Outcome.DONE}


@contextmanager
def far_away(client: Client, **folders: Path) -> Iterator[list[str]]:
    """Make workers believe that they are other machines, each with a folder and `.env` there."""
    workers = sorted(client.scheduler_info()["workers"])
    here = Path.cwd()
    try:
        for worker, (name, folder) in zip(workers, folders.items(), strict=False):
            client.run(_move, folder, name, workers=[worker])
        yield workers
    finally:
        client.run(_move, here, platform.node())


def _move(folder: Path, name: str) -> None:
    os.chdir(folder)
    platform.node = lambda: name


def machine(folder: Path, demo_model: Path | None, size: int | None = None, more: str = "") -> Path:
    """A folder with an `.env` that names a models folder of its own."""
    models = folder / "models"
    models.mkdir(parents=True)
    text = f"LLAMACPP_MODELS_DIR=models\nLLAMACPP_HISTORY=loads.sqlite3\n{more}\n"
    (folder / ".env").write_text(text)
    if size:
        write_demo_model(models / "demo.gguf", size)
    elif demo_model:
        (models / "demo.gguf").symlink_to(demo_model)
    return folder


def test_trials_go_where_their_model_is(
    sweep: Callable[..., Sweep], client: Client, demo_model: Path, tmp_path: Path
) -> None:
    fit = machine(tmp_path / "fit", demo_model)
    without = machine(tmp_path / "without", None)
    another = machine(tmp_path / "another", None, size=3_000_000)
    no_engine = machine(tmp_path / "engine", demo_model, more="LLAMACPP_BIN=nowhere")
    for unfit in (without, another, no_engine):
        with far_away(client, unfit=unfit, fit=fit):
            rows = sweep(repeats=2).run(client=client).wait(WAIT).rows
            assert [row.outcome for row in rows] == [Outcome.DONE] * 2, rows
            assert {row.host.split()[0] for row in rows} == {"fit"}
    with far_away(client, first=without, second=another) as workers:
        (row,) = sweep().run(client=client).wait(WAIT).rows
        assert row.outcome is Outcome.FAILED
        assert row.reason.startswith("No worker can run this trial.")
        assert all(worker in row.reason for worker in workers)
        assert "no such file" in row.reason
        assert "file of that name is a different one" in row.reason


def test_a_worker_that_cannot_look_at_its_files_says_why(config: ServerConfig) -> None:
    from kitty_nb.experiments.cluster import Setup, look  # noqa: PLC0415

    away = config.replace(models_dir=Path("/") / ("x" * 300))
    setup = Setup("topic", away, Workload(), "elsewhere", alone=True, keep_logs=False)
    assert "File name too long" in str(anyio.run(look, setup, Trial("demo.gguf")))


@pytest.mark.slow
def test_a_model_that_only_the_workers_have(
    sweep: Callable[..., Sweep], client: Client, config: ServerConfig, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    away = config.replace(model=None, models_dir=tmp_path / "empty")
    folders = {
        "first": machine(tmp_path / "one", None, size=3_000_000),
        "second": machine(tmp_path / "two", None, size=5_000_000),
    }
    with far_away(client, **folders):
        one = sweep(config=away, models=["demo.gguf"], repeats=4)
        rows = one.run(client=client).wait(WAIT).rows
    assert [row.outcome for row in rows] == [Outcome.DONE] * 4, rows
    assert len({row.host for row in rows}) == 1  # whose file was taken for the model
    assert rows[0].fingerprint
    assert {row.fingerprint for row in rows} == {rows[0].fingerprint}


def test_a_worker_without_kitty_nb_gets_no_trial(
    sweep: Callable[..., Sweep], client: Client
) -> None:
    workers = sorted(client.scheduler_info()["workers"])
    name = "kitty_nb.experiments.cluster"
    client.run(_hide, name, workers=workers[:1])
    try:
        rows = sweep(repeats=2).run(client=client).wait(WAIT).rows
        assert [row.outcome for row in rows] == [Outcome.DONE] * 2, rows
        client.run(_hide, name)
        with pytest.raises(
            ExperimentError, match=r"No worker can run trials.*Install the same version of kitty_nb"
        ):
            sweep().run(client=client).wait(WAIT)
    finally:
        client.run(_show, name)


def _hide(name: str) -> None:
    sys.modules[name] = None  # type: ignore[assignment]


def _show(name: str) -> None:
    sys.modules.pop(name)


@pytest.mark.slow
def test_a_client_of_the_loop_that_runs(sweep: Callable[..., Sweep], address: str) -> None:
    from distributed import Client  # noqa: PLC0415

    async def script() -> None:
        async with Client(address, asynchronous=True) as client, sweep() as one:
            (row,) = (await one.run_here(client=client)).rows
            assert row.outcome is Outcome.DONE, row.reason

    anyio.run(script)


def worker_of(server: psutil.Process) -> psutil.Process:
    """The worker that has started a server."""
    parent = server.parent()
    assert parent
    return parent


@pytest.mark.slow
def test_a_worker_that_dies_gives_its_trial_away(
    sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    with machines(tmp_path, n_workers=2, **_SLOT) as process, connected(process) as client:
        one = sweep(repeats=3, **_LONG)
        events = heard(one)
        operation = one.run(client=client)
        eventually(lambda: count(events, TrialProgressed), within=WAIT)
        found: list[psutil.Process] = []
        eventually(lambda: found.extend(servers()) or found, within=WAIT)
        server = found[0]
        worker_of(server).send_signal(signal.SIGKILL)
        eventually(lambda: not server.is_running(), within=30, why="its server lives on")
        rows = operation.wait(WAIT).rows
        assert [row.outcome for row in rows] == [Outcome.DONE] * 3, rows
        assert count(events, TrialStarted) == count(events, TrialEnded) == 3


@pytest.mark.slow
def test_a_trial_that_takes_its_workers_with_it_is_a_row(
    sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    with machines(tmp_path, n_workers=2, **_SLOT) as process, connected(process) as client:
        one = sweep(**_LONG)
        one.subscribe(kill_when_ready)
        (row,) = one.run(client=client).wait(WAIT).rows
        assert row.outcome is Outcome.FAILED
        assert "Workers died or left 2 times while running this trial." in row.reason
        eventually(lambda: not servers(), within=30, why="a server outlives its worker")


@pytest.mark.slow
def test_where_the_only_able_worker_dies_the_one_in_its_place_is_asked(
    sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    with machines(tmp_path, n_workers=2, **_SLOT) as process, connected(process) as client:
        one = sweep(**_LONG)
        client.wait_for_workers(2, timeout=WAIT)
        able = sorted(client.scheduler_info()["workers"])[1]
        with far_away(client, unfit=machine(tmp_path / "unfit", None)) as workers:
            assert able in workers
            assert sweep().run(client=client).wait(WAIT).rows[0].outcome is Outcome.DONE
            kills = []

            def kill_once(event: SweepEvent) -> None:
                if not kills and kill_when_ready(event):
                    kills.append(event)

            one.subscribe(kill_once)
            (row,) = one.run(client=client).wait(WAIT).rows
            assert row.outcome is Outcome.DONE, row.reason
            assert kills
        assert able not in client.scheduler_info()["workers"]


def kill_when_ready(event: SweepEvent) -> bool:
    """Kill the worker of the one trial under way, once its load is done."""
    if isinstance(event, TrialProgressed) and event.progress.stage is Stage.READY:
        # That of an earlier worker may still be on its way out.
        server = max(servers(), key=psutil.Process.create_time)
        worker_of(server).send_signal(signal.SIGKILL)
        return True
    return False


@pytest.mark.slow
def test_a_cluster_without_slots_runs_one_trial_per_worker_until_it_is_lost(
    sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    options = {"n_workers": 1, "threads_per_worker": 2}
    with machines(tmp_path, **options) as process, connected(process) as client:
        one = sweep(repeats=30)
        events = heard(one)
        operation = one.run(client=client, slots=2)
        eventually(lambda: count(events, TrialEnded) > 1, within=WAIT)
        eventually(servers, within=WAIT)
        process.kill()
        with pytest.raises(
            ExperimentError, match=r"(?s)Can.t reach the Dask cluster.*run the sweep again"
        ):
            operation.wait(WAIT)
        # Two are handed over at once, and the one begins when the other has ended.
        begun = [event.trial for event in events if isinstance(event, TrialProgressed)]
        ended = [event.result.trial for event in events if isinstance(event, TrialEnded)]
        in_turn = list(dict.fromkeys(begun))
        assert begun == sorted(begun, key=in_turn.index)
        assert in_turn[: len(ended)] == ended
        assert 2 <= len(ended) < 30
        assert {row.outcome for row in one.results.rows} == {Outcome.DONE}
        eventually(lambda: not servers(), within=30, why="a server outlives its worker")
    with pytest.raises(ExperimentError, match="client is closed"):
        one.run(client=client).wait(WAIT)


@contextmanager
def worker(client: Client, folder: Path, *options: str) -> Iterator[None]:
    """Start a worker, which joins a cluster that has begun without it."""
    words = ("-m", "distributed.cli.dask_worker", client.scheduler.address, "--no-nanny")  # type: ignore[union-attr]
    more = ("--local-directory", str(folder), "--no-dashboard", *options)
    with subprocess.Popen([sys.executable, *words, *more], stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(WAIT)


@pytest.mark.slow
def test_workers_may_come_after_the_sweep_has_begun(
    sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    with machines(tmp_path, n_workers=0) as process, connected(process) as client:
        one = sweep(repeats=2)
        operation = one.run(client=client)
        eventually(lambda: one.running, within=WAIT)
        with worker(client, tmp_path):
            rows = operation.wait(WAIT).rows
            assert [row.outcome for row in rows] == [Outcome.DONE] * 2, rows


@pytest.mark.slow
def test_a_worker_without_a_slot_is_named_where_others_had_some(
    sweep: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machines(tmp_path, n_workers=0) as process, connected(process) as client:
        monkeypatch.setattr("kitty_nb.experiments.cluster._LOOKS", 2)
        one = sweep(repeats=2)
        events = heard(one)
        one.subscribe(lambda event: one.pause() if isinstance(event, TrialStarted) else None)
        with worker(client, tmp_path, "--resources", "kitty_trial=1"):
            operation = one.run(client=client)
            eventually(lambda: count(events, TrialEnded) == 1, within=WAIT)
        with worker(client, tmp_path):
            one.resume()
            _, row = operation.wait(WAIT).rows
        assert row.outcome is Outcome.FAILED
        assert "It has no slot: start it with --resources kitty_trial=1." in row.reason


def test_a_client_is_a_client(sweep: Callable[..., Sweep]) -> None:
    with pytest.raises(ExperimentError, match=r"'tcp://red:8786', not a dask.distributed.Client"):
        sweep().run(client="tcp://red:8786").wait(WAIT)  # type: ignore[arg-type]
