"""Attaching to a router: a llama-server that starts a child for each model that it serves."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import eventually

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerStatus, write_demo_model
from kitty_nb.supervisor.events import Activity, Event, LoadProgress, RouterLoad, Stage

STAND_IN = Path(__file__).with_name("stand_in_router.py")


class Router:
    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, verb: str, model: str = "large") -> None:
        httpx.post(f"{self._url}/models/{verb}", json={"model": model}, trust_env=False)

    def status(self) -> str:
        models = httpx.get(f"{self._url}/v1/models", trust_env=False).json()["data"]
        return next(str(one["status"]["value"]) for one in models if one["id"] == "large")

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self._url}/health", trust_env=False).is_success
        except httpx.HTTPError:
            return False


Start = AbstractContextManager[Router]


@pytest.fixture
def router(config: ServerConfig, tmp_path: Path) -> Iterator[Callable[..., Start]]:
    """Starts a router for a folder with a model of 100 MB and a small one, by their names."""
    folder = tmp_path / "router"
    folder.mkdir()
    write_demo_model(folder / "large.gguf", size=100_000_000)
    write_demo_model(folder / "small.gguf")
    program = folder / "llama-server"
    program.symlink_to(sys.executable)

    @contextmanager
    def start(*flags: str, silent: bool = False) -> Iterator[Router]:
        command = [program, "-P", STAND_IN, "--models-dir", folder, "--port", str(config.port)]
        command += ["--silent"] if silent else []
        with subprocess.Popen([*command, "--", *flags]) as process:
            try:
                router = Router(config.endpoint)
                eventually(router.answers)
                yield router
            finally:
                process.send_signal(signal.SIGINT)

    return start


def loads(told: list[Event]) -> list[LoadProgress | None]:
    return [event.progress for event in told if isinstance(event, RouterLoad)]


def said(told: list[Event]) -> str:
    return " ".join(event.message for event in told if isinstance(event, Activity))


def loads_kept(history: Path) -> int:
    with closing(sqlite3.connect(history)) as kept:
        return int(kept.execute("SELECT count(*) FROM loads").fetchone()[0])


def test_its_loads_move_by_what_the_child_shows(
    config: ServerConfig, router: Callable[..., Start]
) -> None:
    told: list[Event] = []
    with (
        router("--load-seconds", "1", "--prepare-seconds", "0.2") as there,
        ModelManager(config=config) as manager,
    ):
        manager.subscribe(told.append)
        state = manager.attach().wait(60)
        assert (state.status, state.alias) == (ServerStatus.READY, "llama-server")
        there.ask("load")
        eventually(lambda: "has loaded large" in said(told))
        assert (manager.state.alias, manager.state.model_name) == ("large", "large.gguf")
        progress = loads(told)
        fractions = [one.fraction for one in progress if one]
        # The router itself tells of none and of all only.
        assert len([one for one in fractions if 0.1 < one < 0.9]) > 5
        assert fractions == sorted(fractions)
        assert progress[-1]
        assert progress[-1].stage is Stage.READY
        there.ask("unload")
        eventually(lambda: "has unloaded large" in said(told))
        eventually(lambda: manager.state.alias == "llama-server")
        assert loads(told)[-1] is None
        # The next load is expected to be like the last one.
        eventually(lambda: loads_kept(config.history))
        told.clear()
        there.ask("load")
        eventually(lambda: "has loaded large" in said(told))
        first = loads(told)[0]
        assert first
        assert first.eta == pytest.approx(progress[-1].elapsed, rel=0.5)


def test_a_load_that_was_under_way_is_taken_up(
    config: ServerConfig, router: Callable[..., Start]
) -> None:
    told: list[Event] = []
    with router("--load-seconds", "6") as there, ModelManager(config=config) as manager:
        manager.subscribe(told.append)
        there.ask("load")
        eventually(lambda: there.status() == "loading")
        manager.attach().wait(60)
        eventually(lambda: any(loads(told)))
        assert there.status() == "loading"
        eventually(lambda: "has loaded large" in said(told))


def test_a_router_that_tells_nothing_is_asked(
    config: ServerConfig, router: Callable[..., Start]
) -> None:
    """As those of the first builds."""
    told: list[Event] = []
    with (
        router("--load-seconds", "4", silent=True) as there,
        ModelManager(config=config) as manager,
    ):
        manager.subscribe(told.append)
        manager.attach().wait(60)
        there.ask("load")
        eventually(lambda: "has loaded large" in said(told))
        assert len([one for one in loads(told) if one and 0.1 < one.fraction < 0.9]) > 2


def test_a_load_that_fails_is_told(config: ServerConfig, router: Callable[..., Start]) -> None:
    told: list[Event] = []
    with (
        router("--never-ready", "--exit-after", "0.2", "--exit-code", "1") as there,
        ModelManager(config=config) as manager,
    ):
        manager.subscribe(told.append)
        manager.attach().wait(60)
        there.ask("load")
        eventually(lambda: "has not loaded large. Its own log says why." in said(told))
        assert loads(told)[-1] is None
        assert manager.state.status is ServerStatus.READY


def test_a_model_that_it_has_already_is_known(
    config: ServerConfig, router: Callable[..., Start]
) -> None:
    with router() as there, ModelManager(config=config) as manager:
        there.ask("load")
        eventually(lambda: there.status() == "loaded")
        manager.attach().wait(60)
        eventually(lambda: manager.state.alias == "large")


def test_the_panel_shows_whose_load_it_is(
    config: ServerConfig, router: Callable[..., Start]
) -> None:
    with router("--load-seconds", "1") as there, ModelManager(config=config) as manager:
        panel = ControlPanel(manager=manager)
        try:
            manager.attach().wait(60)
            there.ask("load", "small")
            eventually(lambda: "small · ready" in panel.load_bar.text.value)
            there.ask("load")
            eventually(lambda: "large · loading weights" in panel.load_bar.text.value)
            assert panel.load_bar.bar.bar_style == ""
            eventually(lambda: "large · ready" in panel.load_bar.text.value)
            assert panel.load_bar.bar.bar_style == "success"
            eventually(lambda: "as <b>large</b>" in panel.status_line.value)
            there.ask("unload", "small")
            gone = "The router has unloaded small."
            eventually(lambda: gone in panel.activity_log.lines)  # shown after the bar
            assert "large · ready" in panel.load_bar.text.value
            there.ask("unload")
            eventually(lambda: panel.load_bar.text.value == "")
        finally:
            panel.close()


def test_a_router_that_ends_amid_a_load_is_a_stop(
    config: ServerConfig, router: Callable[..., Start]
) -> None:
    told: list[Event] = []
    with ModelManager(config=config) as manager:
        manager.subscribe(told.append)
        with router("--load-seconds", "30") as there:
            manager.attach().wait(60)
            there.ask("load")
            eventually(lambda: any(loads(told)))
        eventually(lambda: manager.state.status is ServerStatus.STOPPED)
        assert manager.state.error is None
