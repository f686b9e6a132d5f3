"""Failures inside kitty_nb: each ends in a state and a sentence, and nothing waits for ever."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import eventually
from other_kernel import runs

from kitty_nb import ModelManager, ServerConfig, ServerStatus
from kitty_nb.supervisor import process
from kitty_nb.supervisor.health import HealthProbe
from kitty_nb.supervisor.process import ServerProcess

# A program that runs out of file descriptors while its server is ready, and what it does then.
_STARVED = """
import os, resource, sys
from kitty_nb import ModelManager, ServerConfig
from kitty_nb.errors import KittyError

config = ServerConfig.model_validate_json(sys.argv[1])
manager = ModelManager(config=config)
print(manager.start().wait(30).pid, flush=True)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
held = []
def starve():
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
starve()
try:
    if sys.argv[2] != "exit":
        print(getattr(manager, sys.argv[2])().wait(30).status, flush=True)
except KittyError as error:
    print(manager.state.status, error, flush=True)
if sys.argv[2] == "stop":
    starve()
    try:
        manager.start().wait(30)
    except KittyError as error:
        print(manager.state.status, error, flush=True)
    for one in held:
        os.close(one)
    print(manager.start().wait(30).status, flush=True)
"""

# A program that has no file descriptors left for an event loop.
_WORKLESS = """
import resource
import anyio._backends._asyncio
from kitty_nb.isolated_server import in_background
resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    in_background(lambda: None, "test")
except OSError as error:
    print(error.strerror, flush=True)
"""

# A program that ends while its work, which may have been cancelled, still tidies up.
_ENDING = """
import sys
import anyio
from kitty_nb.isolated_server import in_background

async def work():
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.5)
        print("tidy", flush=True)

thread, future = in_background(work, "test")
if sys.argv[1:]:
    future.cancel()
"""


@pytest.mark.parametrize("words", [(), ("cancel",)])
def test_a_program_ends_after_the_servers_of_its_measurements(words: tuple[str, ...]) -> None:
    """Else the same command, repeated after Ctrl-C, would find their memory still in use."""
    done = subprocess.run(
        [sys.executable, "-c", _ENDING, *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("tidy\n", "")


def test_a_process_that_cant_be_looked_at_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)

    def spawn_and_starve(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        spawned.append(subprocess.Popen(*words, **options))
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        return spawned[0]

    monkeypatch.setattr(process, "Popen", spawn_and_starve)
    try:
        with pytest.raises(OSError, match="Too many open files"):
            ServerProcess.spawn([sys.executable, "-c", "input()"], tmp_path / "log")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        left = runs(spawned[0].pid)
        spawned[0].kill()
        spawned[0].wait()
    assert not left


def test_work_in_the_background_that_cant_begin_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WORKLESS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "Too many open files\n", done.stderr


@pytest.mark.parametrize("verb", ["stop", "restart", "exit"])
def test_a_program_out_of_file_descriptors_still_stops_its_server_and_ends(
    misbehaving: Callable[..., ServerConfig], verb: str
) -> None:
    config = misbehaving(on_kernel_exit="stop")
    command = [sys.executable, "-c", _STARVED, config.model_dump_json(), verb]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    pid, *said = done.stdout.splitlines()
    eventually(lambda: not runs(int(pid)), why=f"its server outlives it: {done.stderr}")
    assert done.returncode == 0, done.stderr
    if verb == "stop":
        assert said[0] == "STOPPED"
        assert said[1].startswith("FAILED ")
        assert "Too many open files" in said[1]
        assert said[2] == "READY"
    elif verb == "restart":
        # The server that ends gives some back, which may just do for the next.
        assert said[0] == "READY" or "Too many open files" in said[0]


def test_a_watch_that_fails_leaves_no_process(
    misbehaving: Callable[..., ServerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise MemoryError("no memory is left")

    before = {*psutil.Process().children()}
    with ModelManager(config=misbehaving(on_kernel_exit="stop")) as manager:
        manager.start().wait(30)
        monkeypatch.setattr(HealthProbe, "check_activity", fail)
        eventually(lambda: manager.state.status is ServerStatus.CRASHED)
        error = "Internal error while supervising the server: MemoryError('no memory is left')."
        assert (manager.state.error or "").startswith(error)
        eventually(lambda: before.issuperset(psutil.Process().children()))


def test_an_ending_that_fails_is_told_and_leaves_no_server(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise MemoryError("no memory is left")

    with ModelManager(config=config) as manager:
        pid = manager.start().wait(30).pid
        assert pid
        with monkeypatch.context() as patch:
            patch.setattr(ServerProcess, "terminate", fail)
            state = manager.stop().wait(20)
            assert state.status is ServerStatus.CRASHED
            assert "no memory is left" in (state.error or "")
            eventually(lambda: not runs(pid))
            second = manager.start().wait(30).pid
            assert second
            assert manager.restart().wait(30).status is ServerStatus.READY
            assert not runs(second)
        assert manager.stop().wait(10).status is ServerStatus.STOPPED
