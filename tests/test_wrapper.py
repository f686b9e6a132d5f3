"""A llama-server that is a script which runs the program as a child, without `exec`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from conftest import STAND_IN, eventually
from other_kernel import Kernel, runs

from kitty_nb import ModelManager, ServerConfig, ServerStatus, Supervisor, write_demo_model
from kitty_nb.config import OnKernelExit
from kitty_nb.supervisor.events import ProgressMade, Stage
from kitty_nb.supervisor.history import LoadHistory, path_text, this_host
from kitty_nb.supervisor.port_owner import owner_of
from kitty_nb.supervisor.registry import record_of

Wrapped = Callable[..., ServerConfig]


def script(path: Path, run: str) -> Path:
    path.write_text(f'#!/bin/sh\n{run} "$@"\nstatus=$?\nexit $status\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def wrapped(config: ServerConfig, tmp_path: Path) -> Wrapped:
    program = script(tmp_path / "llama-server", f'"{sys.executable}" -P "{STAND_IN}"')

    def configure(*flags: str, **changes: object) -> ServerConfig:
        return config.replace(binary=program, extra_args=flags, restart_max=0, **changes)

    return configure


def server_of(config: ServerConfig) -> int:
    holder = owner_of(config.host, config.port)
    assert holder
    return holder.pid


def test_the_bar_counts_the_bytes_of_the_child(wrapped: Wrapped, tmp_path: Path) -> None:
    model = write_demo_model(tmp_path / "large.gguf", size=100_000_000)
    config = wrapped("--load-seconds", "2", model=model)
    loading: list[float] = []

    async def scenario() -> None:
        async with Supervisor(config) as supervisor:
            supervisor.subscribe(
                lambda event: (
                    loading.append(event.progress.fraction)
                    if isinstance(event, ProgressMade) and event.progress.stage is Stage.LOADING
                    else None
                )
            )
            with anyio.fail_after(30):
                await supervisor.start()
        (row,) = await LoadHistory(config.history, print).recall(this_host(), path_text(model))
        assert row.loaded >= 90_000_000  # less what it read before its log could be read
        assert 1.3 < row.loading < 10  # two seconds, on a machine with nothing else to do

    anyio.run(scenario)
    assert max(loading) > 0.5


@pytest.mark.parametrize("force", [False, True])
def test_stop_ends_the_child(wrapped: Wrapped, force: bool) -> None:
    config = wrapped("--ignore-sigterm", stop_grace_seconds=0.5)
    with ModelManager(config=config) as manager:
        pid = manager.start().wait(30).pid
        server = server_of(config)
        assert server != pid
        assert manager.stop(force=force).wait(60).status is ServerStatus.STOPPED
        assert not runs(server)


def test_a_child_has_its_time_to_end(wrapped: Wrapped, tmp_path: Path) -> None:
    done = tmp_path / "done"
    config = wrapped("--tidy-up", str(done), stop_grace_seconds=10)
    with ModelManager(config=config) as manager:
        manager.start().wait(30)
        manager.stop().wait(60)
        assert done.exists()


def test_the_death_of_either_is_the_end_of_both(wrapped: Wrapped) -> None:
    config = wrapped()
    with ModelManager(config=config) as manager:
        pid = manager.start().wait(30).pid
        server = server_of(config)
        assert pid
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: manager.state.status is ServerStatus.CRASHED)
        assert not runs(server)
        manager.start().wait(30)
        os.kill(server_of(config), signal.SIGKILL)
        eventually(lambda: manager.state.status is ServerStatus.CRASHED)
        assert "SIGKILL" in (manager.state.error or "")


def test_it_ends_with_its_kernel(wrapped: Wrapped) -> None:
    config = wrapped("--ignore-sigterm", on_kernel_exit=OnKernelExit.STOP, stop_grace_seconds=0.5)
    kernel = Kernel(config, "stay")
    server = server_of(config)
    kernel.end(signal.SIGKILL)
    eventually(lambda: not runs(server))


def test_another_kernel_finds_it_and_ends_it(wrapped: Wrapped) -> None:
    config = wrapped("--ignore-sigterm", stop_grace_seconds=0.5)
    kernel = Kernel(config, "stay")
    kernel.end(signal.SIGKILL)
    server = server_of(config)
    with ModelManager(config=config) as manager:
        eventually(lambda: manager.state.status is ServerStatus.READY)
        assert manager.state.pid == kernel.server != server
        use = manager.memory_use().wait(60)
        assert use
        assert use.resident > 10_000_000  # of a Python, which the shell is not
        assert manager.stop().wait(60).status is ServerStatus.STOPPED
        assert not runs(server)


def test_an_unused_one_is_stopped_and_its_child_with_it(wrapped: Wrapped) -> None:
    config = wrapped("--ignore-sigterm", idle_shutdown_seconds=3, stop_grace_seconds=0.5)
    with ModelManager(config=config) as manager:
        manager.start().wait(30)
        server = server_of(config)
        eventually(lambda: manager.state.status is ServerStatus.STOPPED)
        eventually(lambda: not runs(server))  # its sidecar kills it after its wrapper


def test_the_key_of_another_profiles_server_is_found_by_its_child(wrapped: Wrapped) -> None:
    config = wrapped()
    with ModelManager(config=config) as manager:
        manager.start().wait(30)
        record = record_of(server_of(config), config.log_dir)
        assert record
        assert record.api_key
        assert record.api_key.get_secret_value() == manager.reveal_api_key()
