from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import eventually

from kitty_nb import ModelManager, ServerConfig, ServerStatus
from kitty_nb.errors import (
    ConfigError,
    KittyError,
    ServerCrashedError,
    StartCancelledError,
    WaitTimeoutError,
)
from kitty_nb.supervisor.events import Event, StateChanged


@pytest.fixture
def manager(config: ServerConfig) -> Iterator[ModelManager]:
    with ModelManager(config=config) as manager:
        yield manager


def test_closing_ends_what_still_runs(config: ServerConfig) -> None:
    ended = threading.Event()

    async def for_ever() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    with ModelManager(config=config) as manager:
        operation = manager.run(for_ever)
        manager.check_health().wait(60)
    assert ended.is_set()
    assert operation.done


@pytest.fixture
def endless(misbehaving: Callable[..., ServerConfig]) -> Iterator[ModelManager]:
    """A manager whose server loads for ever."""
    with ModelManager(config=misbehaving("--never-ready")) as manager:
        yield manager


def test_a_script_waits(manager: ModelManager) -> None:
    operation = manager.start()
    state = operation.wait(30)
    assert state.status is ServerStatus.READY
    assert operation.done
    assert operation.progress is not None
    assert operation.progress.fraction == 1
    assert manager.check_health().wait(60).status is ServerStatus.READY
    restarted = manager.restart().wait(30)
    assert restarted.pid != state.pid
    assert manager.stop().wait(60).status is ServerStatus.STOPPED


def test_a_coroutine_awaits(manager: ModelManager) -> None:
    async def cell() -> None:
        assert (await manager.start()).status is ServerStatus.READY
        operation = manager.stop()
        assert (await operation).status is ServerStatus.STOPPED
        assert (await operation).status is ServerStatus.STOPPED

    asyncio.run(cell())


def test_a_wait_inside_a_running_loop_lets_its_other_tasks_go_on(
    misbehaving: Callable[..., ServerConfig], tmp_path: Path
) -> None:
    config = misbehaving()
    (tmp_path / ".env").write_text(
        f"LLAMACPP_BIN={config.binary}\nLLAMACPP_PORT={config.port}\n"
        f"LLAMACPP_MODELS_DIR={config.models_dir}\nLLAMACPP_PRIMARY_MODEL={config.model}\n"
        f"LLAMACPP_LOG_DIR={config.log_dir}\n"
        f"LLAMACPP_HISTORY={config.history}\n"
        "LLAMACPP_EXTRA_ARGS='--prepare-seconds 0.5'\n"
    )
    code = """
import asyncio
from kitty_nb import ModelManager

async def cell():
    ticks = []
    async def tick():
        while True:
            ticks.append(None)
            await asyncio.sleep(0.01)
    ticking = asyncio.create_task(tick())
    with ModelManager() as manager:
        state = manager.start().wait(timeout=30)
        print(state.status, len(ticks) > 10)
    ticking.cancel()

asyncio.run(cell())
"""
    # In a process of its own: nesting changes asyncio for good.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "READY True", done.stderr


def test_an_error_seen_by_a_wait_is_not_printed_once_more(tmp_path: Path) -> None:
    (tmp_path / ".env").touch()
    code = """
import asyncio, gc
from kitty_nb import ModelManager
from kitty_nb.errors import ConfigError

async def cell():
    with ModelManager() as manager:
        try:
            manager.start().wait(timeout=30)
        except ConfigError:
            print("seen")
    gc.collect()

asyncio.run(cell())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("seen", "")


def test_a_wrong_model_is_told_before_there_is_a_process(config: ServerConfig) -> None:
    wrong = config.replace(model="nowhere.gguf")
    with ModelManager(config=wrong) as manager:
        with pytest.raises(ConfigError, match=r"model='nowhere.gguf': There is no such file"):
            manager.start().wait(30)
        with pytest.raises(ConfigError, match="does not end in"):
            manager.switch_model("nothing").wait(30)
        assert manager.state.status is ServerStatus.STOPPED


def test_a_wait_ends_in_time_and_the_work_goes_on(endless: ModelManager) -> None:
    operation = endless.start()
    with pytest.raises(WaitTimeoutError, match="continues"):
        operation.wait(0.3)
    assert not operation.done
    eventually(lambda: endless.state.status is ServerStatus.LOADING)
    endless.stop().wait(60)
    with pytest.raises(StartCancelledError):
        operation.wait(60)


def test_cancel_stops_the_load(endless: ModelManager) -> None:
    operation = endless.start()
    eventually(lambda: endless.state.status is ServerStatus.LOADING)
    operation.cancel()
    eventually(lambda: endless.state.status is ServerStatus.STOPPED)
    assert operation.done


def test_an_error_reaches_whoever_waits(misbehaving: Callable[..., ServerConfig]) -> None:
    config = misbehaving("--never-ready", "--exit-after", "0.1", "--exit-code", "5")
    with ModelManager(config=config) as manager:
        operation = manager.start()
        with pytest.raises(ServerCrashedError, match="exit code 5"):
            operation.wait(60)
        assert "exit code 5" in (manager.state.error or "")


def test_commands_take_effect_in_the_order_they_come_in(endless: ModelManager) -> None:
    for _ in range(3):
        operations = endless.start(), endless.restart(), endless.stop()
        assert operations[-1].wait(60).status is ServerStatus.STOPPED
        for called_off in operations[:-1]:
            with pytest.raises(StartCancelledError, match="stopped before it was ready"):
                called_off.wait(60)
        assert endless.state.status is ServerStatus.STOPPED


def test_ending_a_wait_does_not_end_the_work(endless: ModelManager) -> None:
    async def impatient() -> None:
        operation = endless.start()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_awaited(operation), 0.3)
        assert not operation.done

    asyncio.run(impatient())


async def _awaited(operation: object) -> object:
    return await operation  # type: ignore[misc]


def test_subscribers_hear_of_changes_on_the_managers_thread(manager: ModelManager) -> None:
    heard: list[tuple[str, Event]] = []
    unsubscribe = manager.subscribe(
        lambda event: heard.append((threading.current_thread().name, event))
    )
    manager.start().wait(30)
    assert {name for name, _ in heard} == {"kitty_nb"}
    assert any(
        isinstance(event, StateChanged) and event.state.status is ServerStatus.READY
        for _, event in heard
    )
    unsubscribe()
    count = len(heard)
    manager.stop().wait(60)
    assert len(heard) == count


def test_close_stops_the_server_and_ends_the_thread(config: ServerConfig) -> None:
    manager = ModelManager(config=config)
    pid = manager.start().wait(30).pid
    assert pid
    manager.close()
    manager.close()
    assert not psutil.pid_exists(pid)
    assert "kitty_nb" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(KittyError, match="closed"):
        manager.start()


def test_many_threads_may_ask(manager: ModelManager) -> None:
    pids: list[int | None] = []

    def ask() -> None:
        pids.append(manager.start().wait(30).pid)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pids)) == 1


def test_what_a_blocked_main_thread_cannot_see_still_happens(manager: ModelManager) -> None:
    manager.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and manager.state.status is not ServerStatus.READY:
        pass  # holds the thread as a busy cell does
    assert manager.state.status is ServerStatus.READY


_FORKS = """
import os, sys
from kitty_nb import ModelManager
from kitty_nb.errors import KittyError

manager = ModelManager(sys.argv[1])
child = os.fork()
if child == 0:
    try:
        manager.stop().wait(60)
    except KittyError as error:
        print(error, flush=True)
    if sys.argv[2] == "close":
        manager.close()
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(manager.stop().wait(60).status)
"""


@pytest.mark.parametrize("how", ["close", "exit"])
def test_a_child_that_is_forked_leaves_the_manager_to_its_parent(tmp_path: Path, how: str) -> None:
    env = tmp_path / "x.env"
    env.write_text(f"LLAMACPP_LOG_DIR={tmp_path}/logs\n")
    command = [sys.executable, "-W", "ignore", "-c", _FORKS, str(env), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    said, code, status = done.stdout.splitlines()
    assert "parent process" in said
    assert (code, status) == ("7", "STOPPED")


def test_a_server_does_not_wait_for_our_own_question_before_it_ends(
    config: ServerConfig, native_engine: Path
) -> None:
    """Builds of 2025 end only when everybody who asked has an answer or has hung up."""
    with ModelManager(config=config.replace(binary=native_engine)) as manager:
        for _ in range(4):
            manager.start().wait(30)
            manager.stop().wait(4)
