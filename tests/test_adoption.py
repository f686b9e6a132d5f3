"""A server outlives its kernel, is found again, and there is never a second one."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import eventually, unused_port
from other_kernel import Kernel, runs
from terminal import run

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerStatus, Supervisor
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.cli.commands import read_status, stop
from kitty_nb.config import OnKernelExit
from kitty_nb.errors import KittyError, ServerFailedError
from kitty_nb.operation import Operation
from kitty_nb.supervisor.events import Activity, Ending, Event, Level, ServerState, StateChanged
from kitty_nb.supervisor.port_owner import owner_of
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.registry import (
    ServerRecord,
    find_server,
    mark_of,
    process_of,
    profile_lock,
    read_record,
    record_of,
    record_path,
    was_stopped,
    who_owns,
    withdraw_record,
    write_record,
)
from kitty_nb.supervisor.server import Server
from kitty_nb.supervisor.sidecar import has_sidecar, withdraw

LOOK_EVERY = "kitty_nb.supervisor.supervisor._LOOK_EVERY"


@pytest.fixture
def kernel(config: ServerConfig) -> Iterator[Callable[..., Kernel]]:
    kernels: list[Kernel] = []

    def start(then: str = "stay", **changes: object) -> Kernel:
        kernels.append(Kernel(config.replace(**changes), then))
        return kernels[-1]

    yield start
    for kernel in kernels:
        kernel.process.kill()
        kernel.process.communicate()
        if runs(kernel.server):
            os.kill(kernel.server, signal.SIGKILL)
            eventually(lambda k=kernel: not runs(k.server))


@pytest.mark.parametrize("slept", [0.0, 8 * 3600.0])
def test_requests_from_before_have_their_times_however_long_the_log(
    config: ServerConfig,
    kernel: Callable[..., Kernel],
    monkeypatch: pytest.MonkeyPatch,
    slept: float,
) -> None:
    first = kernel("end")
    first.end(None)
    server = ServerProcess(first.server, None)
    began = time.time() - server.age
    eventually(lambda: server.age > 2)  # much later than the lines below
    proof = (  # of another program that watched the load
        "0.00.000.100 I slot launch_slot_: id  0 | task 800 | processing task, is_child = 0",
        "0.00.000.200 I slot print_timing: id  0 | task 800 | prompt eval time = 9 ms / 9 tokens",
        "0.00.000.200 I slot print_timing: id  0 | task 800 |        eval time = 1 ms / 1 tokens",
        "0.00.000.200 I slot      release: id  0 | task 800 | stop processing: n_tokens = 9, trunc",
    )
    later = (
        "0.00.100.000 I slot launch_slot_: id  0 | task 900 | processing task, is_child = 0",
        "0.00.300.000 W srv          stop: cancel task, id_task = 900",
        "0.00.300.000 I slot      release: id  0 | task 900 | stop processing: n_tokens = 9, trunc",
    )
    with config.log_path.open("a") as log:
        long = ("x" * 1000,) * 600  # more than one read
        log.writelines(f"{line}\n" for line in long + proof + later)
    os.utime(config.log_path, (began + 0.3, began + 0.3))
    age = ServerProcess.age.fget
    monkeypatch.setattr(ServerProcess, "age", property(lambda process: age(process) + slept))
    with ModelManager(config=config) as manager:
        eventually(lambda: manager.requests and manager.requests[-1].ended is Ending.CANCELLED)
        (request,) = manager.requests
        assert request.seconds == pytest.approx(0.2)
        assert request.at == pytest.approx(began + 0.1, abs=1)  # not dated by when it was read


@pytest.mark.parametrize("ending", [None, signal.SIGKILL], ids=["ended", "killed"])
def test_a_kept_server_is_found_in_the_state_it_was_in(
    config: ServerConfig, kernel: Callable[..., Kernel], ending: int | None
) -> None:
    first = kernel("end" if ending is None else "stay", alias="kept")
    first.end(ending)
    assert runs(first.server)
    with ModelManager(config=config) as manager:
        eventually(lambda: manager.state.status is ServerStatus.READY)
        state = manager.state
        assert (state.pid, state.config.served_alias) == (first.server, "kept")
        record = read_record(config)
        assert record
        assert record.load_seconds
        assert state.uptime is not None
        assert state.uptime >= 0
        eventually(lambda: manager.progress is not None and manager.progress.fraction == 1)
        assert manager.progress
        assert manager.progress.elapsed == pytest.approx(record.load_seconds)
        eventually(lambda: any("model loaded" in line for line in manager.log_lines))
        assert manager.start(state.config).wait(10).pid == first.server
        assert manager.stop().wait(10).status is ServerStatus.STOPPED
    assert not runs(first.server)
    assert not record_path(config).exists()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_is_to_stop_does_even_when_its_kernel_is_killed(
    config: ServerConfig, kernel: Callable[..., Kernel], ending: int
) -> None:
    first = kernel(on_kernel_exit=OnKernelExit.STOP)
    first.end(ending)
    eventually(lambda: not runs(first.server), why="the server outlives its kernel")
    assert find_server(config) is None


def test_a_server_that_is_to_stop_does_though_its_kernel_died_as_it_was_spawned(
    config: ServerConfig, kernel: Callable[..., Kernel]
) -> None:
    first = kernel("die", on_kernel_exit=OnKernelExit.STOP)
    assert first.process.wait(30) == -signal.SIGKILL
    eventually(lambda: not runs(first.server), within=30, why="the server outlives its kernel")


def test_a_server_in_a_container_with_the_same_home_is_left_alone(config: ServerConfig) -> None:
    contained = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
    contained = (*contained, "--kill-child", "--")
    if subprocess.run([*contained, "true"], check=False, capture_output=True).returncode:
        pytest.skip("containers can't be made here")
    there = Kernel(config, "stay", contained)
    record, log = record_path(config), config.log_path
    try:
        eventually(lambda: has_sidecar(log), why="nothing shows here that it runs")
        os.utime(record, (0, 0))
        before = record.read_bytes(), log.stat().st_ino
        with ModelManager(config=config.replace(port=unused_port())) as manager:
            with pytest.raises(ServerFailedError, match=rf"container, {platform.node()}, .*_LOG_"):
                manager.start().wait(30)
            assert manager.stop().wait(10).status is ServerStatus.STOPPED
        assert (record.read_bytes(), log.stat().st_ino) == before
        state, _ = read_status(config)
        assert state.status is ServerStatus.STOPPED
        assert "another machine or container" in state.sentence
        env = config.log_dir.parent / "terminal.env"
        env.write_text(f"LLAMACPP_LOG_DIR={config.log_dir}\n")
        key = run("key", "--env", env)
        assert "another machine or container" in key.stderr
        assert key.exit_code == 3
        assert "another machine or container" in run("stop", "--env", env).output
    finally:
        there.end(signal.SIGKILL)
    eventually(lambda: not has_sidecar(log))
    with ModelManager(config=config) as manager:
        assert manager.start().wait(30).status is ServerStatus.READY
        manager.stop().wait(10)


def test_a_start_waits_for_the_server_that_another_kernel_is_ending(
    misbehaving: Callable[..., ServerConfig],
    config: ServerConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LOOK_EVERY, 60)  # the second is not to find the server before it starts
    stubborn = misbehaving("--ignore-sigterm", stop_grace_seconds=4)
    with ModelManager(config=stubborn) as first, ModelManager(config=config) as second:
        old = first.start().wait(30).pid
        assert old
        stopping = first.stop()
        eventually(lambda: not record_path(config).exists())
        said: list[object] = []
        second.subscribe(said.append)
        start = second.start(config.replace(port=unused_port()))
        eventually(lambda: second.state.pid not in {None, old}, within=30)
        assert not runs(old)
        assert start.wait(30).status is ServerStatus.READY
        assert any(f"previous server (PID {old}) to exit" in str(event) for event in said)
        stopping.wait(10)
        assert first.state.error is None


def test_a_server_that_became_ready_while_it_was_stopped_stays_stopped(
    misbehaving: Callable[..., ServerConfig],
    config: ServerConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(LOOK_EVERY, 0.05)  # the second is to find it while it loads
    loads = "--prepare-seconds", "60", "--hurry", str(tmp_path / "hurry")
    stubborn = misbehaving("--ignore-sigterm", *loads, stop_grace_seconds=4)
    with ModelManager(config=stubborn) as first, ModelManager(config=config) as second:
        first.start(wait_for_ready=False)
        eventually(lambda: second.state.status is ServerStatus.LOADING)
        stopping = second.stop()
        eventually(lambda: second.state.status is ServerStatus.STOPPING)
        (tmp_path / "hurry").touch()
        eventually(lambda: any("model loaded" in line for line in second.log_lines))
        stopping.wait(10)
        eventually(lambda: first.state.status is ServerStatus.STOPPED)
        assert first.state.error is None
        assert not record_path(config).exists()


def test_a_server_that_is_stopped_as_its_record_is_written_stays_stopped(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_then_write(record: ServerRecord) -> None:
        if record.ready is not None:
            withdraw(record_path(config))
        write_record(record)

    monkeypatch.setattr("kitty_nb.supervisor.registry.write_record", stop_then_write)
    with ModelManager(config=config) as manager:
        pid = manager.start().wait(30).pid
        assert pid
        assert not record_path(config).exists()
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: manager.state.status is ServerStatus.STOPPED)


def test_a_stop_as_a_server_is_found_is_a_graceful_one(config: ServerConfig) -> None:
    killed: list[int] = []

    class Process(ServerProcess):
        def kill(self) -> None:
            killed.append(self.pid)
            super().kill()

    async def find_and_stop(record: ServerRecord) -> None:
        server = Server(
            1, config, None, lambda _: None, record, clock=time.monotonic, processes=Process
        )
        server.stop(force=False)
        with anyio.fail_after(30):
            await server.run()

    with ModelManager(config=config) as manager:
        manager.start().wait(30)
        record = read_record(config)
        assert record
        anyio.run(find_and_stop, record)
        assert not runs(record.pid)
        assert not killed
        eventually(lambda: manager.state.status is ServerStatus.STOPPED)


def test_a_process_that_does_not_listen_is_no_ready_server(config: ServerConfig) -> None:
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        created = ServerProcess(process.pid, None).create_time
        loading = ServerRecord(
            pid=process.pid, create_time=created, began=time.monotonic(), config=config
        )
        config.log_dir.mkdir()
        write_record(loading)
        assert find_server(config) == loading
        write_record(loading.model_copy(update={"ready": time.monotonic()}))
        assert find_server(config) is None
        assert "is already served by" in (who_owns(config, locked=True) or "")
        process.communicate(b"\n")
    assert who_owns(config, locked=True) is None


def test_a_second_kernel_watches_and_may_stop(
    config: ServerConfig, kernel: Callable[..., Kernel]
) -> None:
    with ModelManager(config=config) as mine:
        other = kernel()
        eventually(lambda: mine.state.status is ServerStatus.READY, why="it is not found")
        assert mine.state.pid == other.server
        mine.stop().wait(10)
        assert not runs(other.server)


def test_a_stop_elsewhere_is_not_a_crash(config: ServerConfig) -> None:
    with ModelManager(config=config) as first, ModelManager(config=config) as second:
        first.start().wait(30)
        eventually(lambda: second.state.status is ServerStatus.READY)
        second.stop().wait(10)
        eventually(lambda: first.state.status is ServerStatus.STOPPED)
        assert first.state.error is None


def served_by_both(first: ModelManager, second: ModelManager, killed: int | None = None) -> int:
    """Wait until both show one server, another one than was killed; return its process."""

    def pid() -> int | None:
        states = first.state, second.state
        ready = all(state.status is ServerStatus.READY for state in states)
        return states[0].pid if ready and states[0].pid == states[1].pid != killed else None

    eventually(pid, within=30, why="not mended, or twice")
    found = pid()
    assert found
    return found


def test_a_crash_is_seen_by_all_and_mended_once_without_an_error(config: ServerConfig) -> None:
    config = config.replace(restart_delay_seconds=0.2)
    errors: list[Event] = []

    def listen(event: Event) -> None:
        if isinstance(event, Activity) and event.level is Level.ERROR:
            errors.append(event)

    with ModelManager(config=config) as first, ModelManager(config=config) as second:
        first.subscribe(listen)
        second.subscribe(listen)
        first.start().wait(30)
        pid = served_by_both(first, second)
        os.kill(pid, signal.SIGKILL)
        served_by_both(first, second, killed=pid)
        assert not errors
        first.stop().wait(10)
        eventually(lambda: second.state.status is ServerStatus.STOPPED)


def test_a_crash_loop_ends_however_many_watch(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOOK_EVERY, 0.1)
    config = config.replace(restart_delay_seconds=0.1, restart_max=2)
    with ModelManager(config=config) as first, ModelManager(config=config) as second:
        first.start().wait(30)
        pid = None
        for _ in range(config.restart_max + 1):
            pid = served_by_both(first, second, killed=pid)
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: {first.state.status, second.state.status} == {ServerStatus.CRASHED})


@pytest.mark.parametrize("where", ["panel", "terminal"])
@pytest.mark.parametrize(("look_every", "delay"), [(0.1, 60.0), (60.0, 3.0)], ids=["soon", "late"])
def test_a_stop_elsewhere_during_a_back_off_ends_it(
    config: ServerConfig,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    look_every: float,
    delay: float,
) -> None:
    monkeypatch.setattr(LOOK_EVERY, look_every)
    config = config.replace(restart_delay_seconds=delay)
    seen: list[ServerStatus] = []

    def listen(event: Event) -> None:
        if isinstance(event, StateChanged):
            seen.append(event.state.status)

    with ModelManager(config=config) as first:
        first.start().wait(30)
        with ModelManager(config=config) as second:
            pid = served_by_both(first, second)
            first.subscribe(listen)
            os.kill(pid, signal.SIGKILL)
            for manager in first, second:
                eventually(lambda m=manager: m.state.status is ServerStatus.RESTARTING)
            if where == "panel":
                second.stop().wait(10)
            else:
                said = anyio.run(stop, config, Path(".env"), False)
                assert said == "No server is running for the profile 'primary'."
            eventually(lambda: first.state.status is ServerStatus.STOPPED, within=20)
            assert ServerStatus.STARTING not in seen
            eventually(lambda: second.state.status is ServerStatus.STOPPED, within=20)
        state, _ = read_status(config)
        assert state.error is None


def test_a_restart_that_fails_elsewhere_ends_nobody_s_back_off(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOOK_EVERY, 0.02)
    config = config.replace(restart_delay_seconds=0.5)
    with ModelManager(config=config) as first, ModelManager(config=config) as second:
        first.start().wait(30)
        pid = served_by_both(first, second)
        spawn, failed = ServerProcess.spawn, threading.Event()

        def fail_once(*args: Any) -> Any:
            if not failed.is_set():
                failed.set()
                raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
            return spawn(*args)

        monkeypatch.setattr(ServerProcess, "spawn", fail_once)
        os.kill(pid, signal.SIGKILL)
        eventually(failed.is_set)
        served_by_both(first, second, killed=pid)


def test_a_start_does_not_wait_for_a_stop_that_was_killed(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOOK_EVERY, 60.0)
    config = config.replace(stop_grace_seconds=60, keep_prompts=False)
    with ModelManager(config=config) as first, ModelManager(config=config) as second:
        pid = first.start().wait(30).pid
        record = read_record(config)
        assert record
        process = process_of(record)
        assert process
        withdraw_record(config, process)
        assert second.start().wait(45).pid != pid


def test_two_that_start_at_once_are_one_server(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, both_tried = Supervisor._look_for_server, threading.Event()

    async def look_later(self: Supervisor) -> ServerRecord | None:
        return await look(self) if both_tried.is_set() else None

    # Whoever has found the other's server before it starts its own uses that.
    monkeypatch.setattr(Supervisor, "_look_for_server", look_later)
    with ModelManager(config=config) as first, ModelManager(config=config) as second:
        operations = first.start(), second.start()
        errors = []
        for operation in operations:
            try:
                operation.wait(30)
            except KittyError as error:
                errors.append(str(error))
        both_tried.set()
        assert len(errors) == 1
        assert "started elsewhere" in errors[0]
        eventually(lambda: first.state.pid == second.state.pid is not None)


@pytest.mark.parametrize("begin", [ModelManager.start, ModelManager.restart])
def test_a_start_spares_a_server_that_was_started_elsewhere_meanwhile(
    config: ServerConfig,
    monkeypatch: pytest.MonkeyPatch,
    begin: Callable[..., Operation[ServerState]],
) -> None:
    monkeypatch.setattr(LOOK_EVERY, 0.1)
    found = threading.Event()

    def resolve_later(config: ServerConfig) -> ServerConfig:
        if config.served_alias == "other":
            found.wait(30)
        return resolve_model(config)

    monkeypatch.setattr("kitty_nb.supervisor.supervisor.resolve_model", resolve_later)
    with ModelManager(config=config) as first, ModelManager(config=config) as second:
        start = begin(second, config.replace(alias="other"))
        pid = first.start().wait(30).pid
        served_by_both(first, second)
        found.set()
        with pytest.raises(ServerFailedError, match=rf"already served by .*\(PID {pid}\), started"):
            start.wait(30)
        assert served_by_both(first, second) == pid
        switched = begin(second, config.replace(alias="other")).wait(30)
        assert (switched.status, switched.alias) == (ServerStatus.READY, "other")


def test_the_record_is_private_and_whole(config: ServerConfig) -> None:
    with ModelManager(config=config) as manager:
        pid = manager.start().wait(30).pid
        path = record_path(config)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert json.loads(path.read_text())["pid"] == pid
        assert [p.name for p in config.log_dir.iterdir() if p.name.startswith(".")] == []


def told_until(config: ServerConfig, pattern: str) -> list[str]:
    """The activities shown to whoever finds the server, up to one that matches a pattern."""
    said: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Activity):
            said.append(event.message)

    async def find() -> None:
        supervisor = Supervisor(config)
        supervisor.subscribe(listen)
        async with supervisor:
            with anyio.fail_after(20):
                while not re.search(pattern, "\n".join(said)):
                    await anyio.sleep(0.01)

    anyio.run(find)
    return said


def test_a_load_that_began_long_ago_is_not_told_of_all_at_once(
    misbehaving: Callable[..., ServerConfig], kernel: Callable[..., Kernel]
) -> None:
    config = misbehaving("--never-ready")
    watch = kernel("load", binary=config.binary, extra_args=config.extra_args)
    eventually(lambda: read_record(config) and owner_of(config.host, config.port))
    watch.end(signal.SIGKILL)  # it would write the record again
    record = read_record(config)
    assert record
    write_record(record.model_copy(update={"began": record.began - 60}))
    said = told_until(config, r"\(2/120, ")
    loading = [line for line in said if line.startswith("Loading")]
    assert 1 <= len(loading) <= 2
    assert re.fullmatch(r"Loading model… \(2/120, 6\ds elapsed\)", loading[-1])


def test_a_server_that_has_long_been_ready_says_what_its_load_took(
    config: ServerConfig, kernel: Callable[..., Kernel]
) -> None:
    kernel("stay").end(signal.SIGKILL)
    record = read_record(config)
    assert record
    write_record(record.model_copy(update={"began": record.began - 10_000, "load_seconds": 7.0}))
    told = told_until(config, "Found a running server")
    assert any("whose model loaded in 7 s." in line for line in told)


def test_a_server_is_found_though_its_model_has_gone(
    config: ServerConfig, kernel: Callable[..., Kernel], tmp_path: Path
) -> None:
    assert config.model
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(config.model.read_bytes())
    other = kernel(model=copy)
    copy.unlink()
    with ModelManager(config=config) as manager:
        eventually(lambda: manager.state.status is ServerStatus.READY)
        assert manager.state.pid == other.server


def test_a_panel_shows_the_server_that_runs(
    config: ServerConfig, kernel: Callable[..., Kernel], tmp_path: Path
) -> None:
    other = kernel()
    (tmp_path / ".env").write_text(
        f"LLAMACPP_LOG_DIR={config.log_dir}\nLLAMACPP_MODELS_DIR={config.models_dir}\n"
    )
    panel = ControlPanel(tmp_path / ".env")
    try:
        eventually(lambda: panel.manager.state.pid == other.server, why=panel.status_line.value)
        eventually(lambda: any("model loaded" in line for line in panel.server_log.lines))
        panel.buttons.stop.click()
        eventually(lambda: not runs(other.server))
    finally:
        panel.close()


def test_a_server_whose_program_was_killed_before_it_could_record_it_is_found(
    config: ServerConfig,
) -> None:
    kernel = """
import os, signal, sys
from kitty_nb import ModelManager, ServerConfig
from kitty_nb.supervisor import registry
write = registry.write_record
def write_or_die(record):
    os.kill(os.getpid(), signal.SIGKILL) if record.pid else write(record)
registry.write_record = write_or_die
ModelManager(config=ServerConfig.model_validate_json(sys.argv[1])).start().wait(30)
"""
    subprocess.run([sys.executable, "-c", kernel, config.model_dump_json()], check=False)
    assert read_record(config) is None
    found = find_server(config)
    assert found
    assert found == read_record(config)
    process = ServerProcess.attach(found.pid, found.create_time)
    assert process
    with ModelManager(config=config) as manager:
        assert manager.state.pid == found.pid
    eventually(lambda: not process.runs())


@pytest.fixture
def announced(config: ServerConfig) -> Iterator[Callable[[], int]]:
    """Announce a server; the result spawns a process for it, and returns its pid."""
    record = ServerRecord(began=time.monotonic(), config=config)
    config.log_dir.mkdir(mode=0o700)
    write_record(record)
    spawned: list[subprocess.Popen[bytes]] = []

    def spawn() -> int:
        environment = os.environ | mark_of(record)
        command = [sys.executable, "-c", "input()"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, env=environment, start_new_session=True)
        spawned.append(process)
        return process.pid

    yield spawn
    for process in spawned:
        process.communicate(b"\n")


def test_a_server_that_was_only_announced_is_told_of(
    config: ServerConfig, announced: Callable[[], int]
) -> None:
    assert who_owns(config, locked=True) is None
    pid = announced()
    eventually(lambda: record_of(pid, config.log_dir))
    assert f"(PID {pid}), started elsewhere" in (who_owns(config, locked=True) or "")


def test_a_server_whose_successor_is_announced_was_stopped(
    config: ServerConfig, announced: Callable[[], int]
) -> None:
    predecessor = ServerProcess(announced(), None)
    assert was_stopped(config, predecessor)
    withdraw_record(config, predecessor)
    assert record_path(config).exists(), "another server's record is gone"


def test_a_start_waits_for_a_server_that_shows_only_in_a_moment(
    config: ServerConfig, announced: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOOK_EVERY, 60)
    just_now = time.time() + 20  # as long as it takes on a busy machine
    os.utime(record_path(config), (just_now, just_now))
    with ModelManager(config=config) as manager:
        start = manager.start()
        time.sleep(0.5)
        pid = announced()
        with pytest.raises(KittyError, match=rf"already served by .* \(PID {pid}\)"):
            start.wait(20)
    assert runs(pid)


def test_what_a_killed_program_left_unfinished_goes(config: ServerConfig) -> None:
    record = ServerRecord(began=time.monotonic(), config=config)
    config.log_dir.mkdir(mode=0o700, exist_ok=True)
    write_record(record)
    path = record_path(config)
    assert find_server(config) is None
    assert path.exists(), "a server may be about to be spawned"
    os.utime(path, (time.time() - 100, time.time() - 100))
    assert find_server(config) is None
    assert not path.exists()
    half = path.with_name(f".{path.name}.abcd1234")
    half.touch()
    with profile_lock(config) as ours:
        assert ours
    assert not half.exists()
