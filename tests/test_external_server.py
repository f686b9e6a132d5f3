from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import psutil
import pytest
from conftest import eventually

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerStatus
from kitty_nb.engine.command_line import build_command
from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import PortBusyError, ServerFailedError, StartCancelledError
from kitty_nb.supervisor.events import Activity, Event
from kitty_nb.supervisor.port_owner import owner_of


@contextmanager
def another_profile(config: ServerConfig) -> Iterator[ModelManager]:
    """The same port, in the hands of another profile; a stranger to ours."""
    with ModelManager(config=config.replace(profile="coder", alias="kitty-coder")) as other:
        other.start().wait(60)
        yield other


def pid_of(manager: ModelManager) -> int:
    assert manager.state.pid
    return manager.state.pid


def test_a_server_that_holds_the_port_is_attached_to_and_let_go(config: ServerConfig) -> None:
    told: list[Event] = []
    with another_profile(config) as other, ModelManager(config=config) as manager:
        manager.subscribe(told.append)
        with pytest.raises(PortBusyError, match="serves the profile 'coder'") as busy:
            manager.start().wait(60)
        assert busy.value.attachable
        assert manager.state.attachable
        state = manager.attach().wait(60)
        assert (state.status, state.pid) == (ServerStatus.READY, other.state.pid)
        assert (state.alias, state.model_name) == ("kitty-coder", "demo.gguf")
        assert state.uptime
        # The key of another profile's server is known, so it can be used at once.
        assert manager.http.get("/v1/models").json()["data"][0]["id"] == "kitty-coder"
        stopped = manager.stop().wait(60)
        assert (stopped.status, stopped.external, stopped.error) == (
            ServerStatus.STOPPED,
            None,
            None,
        )
        assert other.check_health().wait(60).status is ServerStatus.READY
    said = [event.message for event in told if isinstance(event, Activity)]
    assert any(message.startswith("Attached to ") for message in said)
    assert any(message.endswith("detached; it keeps running.") for message in said)


def test_closing_the_manager_leaves_it_alone(config: ServerConfig) -> None:
    with another_profile(config) as other:
        with ModelManager(config=config) as manager:
            called_off, stopped = manager.attach(), manager.stop()
            assert stopped.wait(60).status is ServerStatus.STOPPED
            with pytest.raises(StartCancelledError):
                called_off.wait(60)
            assert manager.state.status is ServerStatus.STOPPED
            manager.attach().wait(60)
        assert psutil.pid_exists(pid_of(other))
        assert other.check_health().wait(60).status is ServerStatus.READY


def test_its_end_is_a_stop_and_no_crash(config: ServerConfig) -> None:
    with another_profile(config) as other, ModelManager(config=config) as manager:
        manager.attach().wait(60)
        other.stop().wait(60)
        eventually(lambda: manager.state.status is ServerStatus.STOPPED)
        assert manager.state.error is None
        # And the port is free for a server of our own.
        assert manager.start().wait(60).external is None


def test_its_end_is_noticed_though_nobody_has_waited_for_it(config: ServerConfig) -> None:
    """As of a server that a notebook has started by hand."""
    engine = anyio.run(locate_engine, config.binary)
    with subprocess.Popen(build_command(engine, config)) as server:
        try:
            with ModelManager(config=config.replace(profile="other")) as manager:
                eventually(lambda: owner_of(config.host, config.port) is not None)
                manager.attach().wait(60)
                server.kill()
                eventually(lambda: manager.state.status is ServerStatus.STOPPED)
        finally:
            server.kill()


def test_a_server_that_sleeps_by_its_own_flags_is_let_sleep(config: ServerConfig) -> None:
    engine = anyio.run(locate_engine, config.binary)
    command = build_command(engine, config.replace(extra_args=("--sleep_idle_seconds", "2")))
    with (
        subprocess.Popen(command) as server,
        ModelManager(config=config.replace(profile="other")) as manager,
    ):
        try:
            eventually(lambda: owner_of(config.host, config.port) is not None)
            manager.attach().wait(60)

            def asleep() -> bool:
                health = manager.state.last_health_check
                return health is not None and health.asleep

            eventually(asleep, within=20, why="watching keeps it awake")
        finally:
            server.kill()


def test_only_a_llama_server_can_be_attached_to(config: ServerConfig) -> None:
    with ModelManager(config=config) as manager:
        with pytest.raises(ServerFailedError, match="is listening on port"):
            manager.attach().wait(60)
        manager.start().wait(60)
        with pytest.raises(ServerFailedError, match="Stop it first"):
            manager.attach().wait(60)


def test_the_panel_offers_it(config: ServerConfig) -> None:
    with another_profile(config) as other, ModelManager(config=config) as manager:
        panel = ControlPanel(manager=manager)
        try:
            eventually(lambda: "Not running" in panel.status_line.value)
            assert panel.buttons.attach.layout.display == "none"
            panel.buttons.start.click()
            eventually(lambda: panel.buttons.attach.layout.display is None)
            panel.buttons.attach.click()
            eventually(lambda: "not started by kitty_nb" in panel.status_line.value)
            assert "kitty-coder" in panel.status_line.value
            assert panel.buttons.stop.description == "Detach"
            assert panel.buttons.restart.layout.display == "none"
            assert panel.buttons.start.layout.display == "none"
            assert panel.load_bar.text.value == ""
            unknown = panel.requests, panel.server_log  # its owner has them
            assert {part.layout.display for part in unknown} == {"none"}
            panel.details.selected_index = 0
            eventually(lambda: "not started by kitty_nb" in panel.details.server.value)
            assert "Log file" not in panel.details.server.value
            panel.buttons.stop.click()
            eventually(lambda: "Not running" in panel.status_line.value)
            assert psutil.pid_exists(pid_of(other))
        finally:
            panel.close()


def test_a_server_that_refuses_its_key_is_not_waited_for(
    config: ServerConfig, tmp_path: Path, misbehaving: Callable[..., ServerConfig]
) -> None:
    """As when a script around llama-server sets a key of its own."""
    assert config.model
    script = tmp_path / "own-key" / "llama-server"
    script.parent.mkdir()
    engine = misbehaving().binary
    script.write_text(f'#!/bin/sh\nLLAMA_API_KEY=another exec "{engine}" "$@"\n')
    script.chmod(0o755)
    with (
        ModelManager(config=config.replace(binary=script)) as manager,
        pytest.raises(ServerFailedError, match="set LLAMACPP_API_KEY"),
    ):
        manager.start().wait(60)
