from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import psutil
import pytest
from conftest import eventually
from other_kernel import runs

from kitty_nb import ModelManager, ServerConfig, ServerStatus
from kitty_nb.supervisor.log import LogTail, previous, rotate, shrink
from kitty_nb.supervisor.registry import find_server, read_record, record_path
from kitty_nb.supervisor.sidecar import Sidecar, has_sidecar, withdraw

KERNEL = """
import sys, time
from kitty_nb import ModelManager, ServerConfig
config = ServerConfig.model_validate_json(sys.argv[1])
manager = ModelManager(config=config)
print(manager.start().wait(60).pid, flush=True)
time.sleep(600)
"""


def sidecars(config: ServerConfig) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "kitty_nb.supervisor.sidecar" in words and str(config.log_path) in words:
            found.append(process)
    return found


def without_kernel(config: ServerConfig) -> int:
    """Start a server from a kernel that is then killed; return the server's pid."""
    command = [sys.executable, "-c", KERNEL, config.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as kernel:
        assert kernel.stdout
        pid = int(kernel.stdout.readline())
        eventually(lambda: has_sidecar(config.log_path))
        kernel.kill()
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not runs(pid))


def test_a_log_is_put_aside_while_no_notebook_is_open(
    misbehaving: Callable[..., ServerConfig],
) -> None:
    config = misbehaving("--flood", "20000", log_max_mb=0.5, log_keep=2)
    pid = without_kernel(config)
    try:
        assert len(sidecars(config)) == 1
        eventually(lambda: previous(config.log_path, 2).exists())
        eventually(lambda: config.log_path.stat().st_size < 500_000)
        assert not previous(config.log_path, 3).exists()
        assert runs(pid)
    finally:
        end(pid)
    eventually(lambda: not sidecars(config), why="the sidecar outlives its server")


def test_there_is_one_sidecar_however_many_watch(config: ServerConfig) -> None:
    with ModelManager(config=config) as one, ModelManager(config=config) as other:
        pid = one.start().wait(30).pid
        eventually(lambda: other.state.pid == pid)
        eventually(lambda: len(sidecars(config)) == 1)
        one.stop().wait(60)
        eventually(lambda: other.state.status is ServerStatus.STOPPED)
    assert sidecars(config) == []


@pytest.mark.parametrize("exits", ["keep", "stop"])
def test_a_sidecar_that_is_killed_is_replaced(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch, exits: str
) -> None:
    monkeypatch.setattr("kitty_nb.supervisor.server._SIDECAR_THERE_WITHIN", 0.2)
    with ModelManager(config=config.replace(on_kernel_exit=exits)) as manager:
        manager.start().wait(30)
        eventually(lambda: has_sidecar(config.log_path))
        first = sidecars(config)
        assert len(first) == 1
        first[0].kill()
        eventually(lambda: has_sidecar(config.log_path) and sidecars(config) not in ([], first))
    assert sidecars(config) == []


def test_a_missing_sidecar_is_noticed_on_nfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def strict(file: TextIO, operation: int) -> None:
        """As on NFS, see flock(2): a shared lock needs a file that can be read."""
        if operation & fcntl.LOCK_SH and not file.readable():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", strict)
    assert not has_sidecar(tmp_path / "x.log")


GUARDED = """
import subprocess, sys, time
from pathlib import Path
from kitty_nb import ServerConfig
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.sidecar import Sidecar
config = ServerConfig(log_dir=sys.argv[1])
sidecar = Sidecar(config, Path(sys.argv[1]) / "server.json", guards=True)
server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                          stdout=subprocess.DEVNULL, start_new_session=True)
process = ServerProcess(server.pid, None)
sidecar.watch(process, 0)
print(server.pid, flush=True)
time.sleep(600)
"""


def test_a_sidecar_whose_folder_is_gone_still_ends_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", GUARDED, str(tmp_path / "gone")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as kernel:
        assert kernel.stdout
        pid = int(kernel.stdout.readline())
        kernel.kill()
    eventually(lambda: not runs(pid))


def test_a_sidecar_leaves_the_record_of_another_server(tmp_path: Path) -> None:
    record = tmp_path / "server.json"
    record.write_text('{"pid": 1, "create_time": 2.0}')
    with subprocess.Popen(
        [sys.executable, "-c", GUARDED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as kernel:
        assert kernel.stdout
        pid = int(kernel.stdout.readline())
        kernel.kill()
    eventually(lambda: not runs(pid))
    assert record.exists()


def test_a_sidecar_ends_a_server_that_shows_only_after_its_kernel_is_gone(tmp_path: Path) -> None:
    sidecar = Sidecar(ServerConfig(log_dir=tmp_path), tmp_path / "server.json", guards=True)
    environment = os.environ | sidecar.environment
    sidecar.close()
    time.sleep(0.5)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(command, env=environment, start_new_session=True) as server:
        assert server.wait(60) == -signal.SIGTERM
    eventually(lambda: not sidecar.runs)


def test_a_server_whose_kernel_was_killed_as_it_stopped_it_ends(config: ServerConfig) -> None:
    config = config.replace(stop_grace_seconds=0.2)
    pid = without_kernel(config)
    withdraw(record_path(config))
    eventually(lambda: not runs(pid), why="it is neither recorded nor ended")


def test_an_unused_server_is_stopped_without_a_notebook(
    misbehaving: Callable[..., ServerConfig],
) -> None:
    config = misbehaving(idle_shutdown_seconds=3)
    pid = without_kernel(config)
    record = read_record(config)
    assert record
    assert record.idle_seconds == 3
    eventually(lambda: not runs(pid), why="it is not stopped")
    assert find_server(config) is None
    assert config.log_path.read_text().endswith("stopped after 3 s idle\n")


def test_a_server_at_work_is_not_idle(misbehaving: Callable[..., ServerConfig]) -> None:
    config = misbehaving("--work", "4", idle_shutdown_seconds=2)
    with ModelManager(config=config) as manager:
        manager.start().wait(30)
        assert manager.state.ready_since is not None
        eventually(lambda: manager.state.status is ServerStatus.STOPPED)
        assert manager.state.error is None
        assert not any("crash" in line for line in manager.log_lines)


def test_a_slow_load_is_no_rest(misbehaving: Callable[..., ServerConfig]) -> None:
    with ModelManager(
        config=misbehaving("--load-seconds", "5", idle_shutdown_seconds=2)
    ) as manager:
        assert manager.start().wait(30).status is ServerStatus.READY


@pytest.mark.parametrize(
    "said", [{"idle_shutdown_seconds": 2}, {"extra_args": ("--sleep_idle_seconds", "2")}]
)
def test_an_idle_model_sleeps_though_a_panel_looks_on(
    config: ServerConfig, said: dict[str, object]
) -> None:
    with ModelManager(config=config.replace(**said)) as manager:
        manager.start().wait(30)

        def asleep() -> bool:
            health = manager.state.last_health_check
            return health is not None and health.asleep

        eventually(asleep, why="watching keeps it awake")
        assert manager.state.status is ServerStatus.READY
        request = {"messages": [{"role": "user", "content": "Hi"}]}

        def wakes() -> bool:
            assert manager.http.post("/v1/chat/completions", json=request).status_code == 200
            return not manager.check_health().wait(60).asleep  # which it is again 2 s later

        eventually(wakes)


def test_a_tail_goes_on_where_the_log_was_cut(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"one\ntwo\nthr")
    with LogTail(log) as tail, log.open("ab") as writer:
        assert tail.read() == ("one", "two")
        shrink(log, limit=5, kept=2)
        writer.write(b"five\n")
        writer.flush()
        assert log.read_bytes() == b"five\n"
        assert tail.read() == ("… the log was rotated …", "five")
        shrink(log, limit=4, kept=2)
        assert log.exists()
        assert tail.read() == ("… the log was rotated …",)


def test_old_logs_move_up_and_the_oldest_goes(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    for number in range(5):
        rotate(log, kept=3)
        log.write_text(str(number))
    assert [previous(log, age).read_text() for age in (1, 2, 3)] == ["3", "2", "1"]
    assert not previous(log, 4).exists()
    shrink(log, limit=0, kept=3)
    assert log.read_text() == ""
    assert [previous(log, age).read_text() for age in (1, 2, 3)] == ["4", "3", "2"]
    shrink(log, limit=0, kept=3)
    assert previous(log).read_text() == "4"
    shrink(tmp_path / "gone", limit=0, kept=3)


def test_a_full_disk_costs_the_old_log_and_not_the_server(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"x" * 100_000)
    # A file larger than the limit cannot be written: like a full disk, for this process alone.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        shrink(log, limit=1000, kept=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert log.stat().st_size == 0
    assert not previous(log).exists()


@pytest.mark.parametrize("seconds", ["0", "-5", "soon"])
def test_a_wrong_time_is_refused(tmp_path: Path, seconds: str) -> None:
    env = tmp_path / "x.env"
    env.write_text(f"LLAMACPP_IDLE_SHUTDOWN_SECONDS={seconds}\n")
    with pytest.raises(Exception, match="LLAMACPP_IDLE_SHUTDOWN_SECONDS"):
        ServerConfig.from_env(env)
