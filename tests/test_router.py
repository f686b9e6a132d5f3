"""Attaching to a router: a llama-server that starts a child for each model that it serves."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path

import anyio
import anyio.to_thread
import httpx
import psutil
import pytest
from conftest import LOCAL, eventually, words_of

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerStatus, write_demo_model
from kitty_nb.errors import ExperimentError, KittyError, ServerFailedError, StartCancelledError
from kitty_nb.experiments import record_run
from kitty_nb.supervisor.events import Activity, Event, LoadProgress, RouterLoad, Stage
from kitty_nb.supervisor.health import HealthProbe
from kitty_nb.supervisor.router import RouterModels
from kitty_nb.supervisor.router_program import LlamaServer, ModelStatus

STAND_IN = Path(__file__).with_name("stand_in_router.py")


class Router:
    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, verb: str, model: str = "large") -> None:
        httpx.post(f"{self._url}/models/{verb}", json={"model": model}, **LOCAL)

    def status(self) -> str:
        models = httpx.get(f"{self._url}/v1/models", **LOCAL).json()["data"]
        return next(str(one["status"]["value"]) for one in models if one["id"] == "large")

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self._url}/health", **LOCAL).is_success
        except httpx.HTTPError:
            return False


Start = AbstractContextManager[Router]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_model(tmp_path_factory.mktemp("large") / "large.gguf", size=100_000_000)


@pytest.fixture
def router(config: ServerConfig, tmp_path: Path, large: Path) -> Iterator[Callable[..., Start]]:
    """Starts a router for a folder with a model of 100 MB and a small one, by their names."""
    folder = tmp_path / "router"
    folder.mkdir()
    (folder / "large.gguf").hardlink_to(large)
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


def child_of(manager: ModelManager, model: str) -> int:
    """The process that a router has started for a model; 0 where there is none."""
    children = psutil.Process(manager.state.pid).children()
    return next((child.pid for child in children if model in words_of(child)), 0)


def loads(told: list[Event]) -> list[LoadProgress | None]:
    return [event.progress for event in told if isinstance(event, RouterLoad)]


def said(told: list[Event]) -> str:
    return " ".join(event.message for event in told if isinstance(event, Activity))


def loads_kept(history: Path) -> int:
    with closing(sqlite3.connect(history)) as kept, suppress(sqlite3.OperationalError):
        return int(kept.execute("SELECT count(*) FROM loads").fetchone()[0])
    return 0  # nothing is written yet


def test_its_loads_move_by_what_the_child_shows(
    config: ServerConfig, router: Callable[..., Start]
) -> None:
    told: list[Event] = []
    with (
        router("--load-seconds", "2", "--prepare-seconds", "0.2") as there,
        ModelManager(config=config) as manager,
    ):
        manager.subscribe(told.append)
        state = manager.attach().wait(60)
        assert (state.status, state.alias) == (ServerStatus.READY, "llama-server")
        there.ask("load")
        eventually(lambda: "loaded large" in said(told))
        assert (manager.state.alias, manager.state.model_name) == ("large", "large.gguf")
        progress = loads(told)
        fractions = [one.fraction for one in progress if one]
        # The router itself tells of none and of all only.
        assert len([one for one in fractions if 0.1 < one < 0.9]) > 5
        assert fractions == sorted(fractions)
        assert progress[-1]
        assert progress[-1].stage is Stage.READY
        there.ask("unload")
        eventually(lambda: "unloaded large" in said(told))
        eventually(lambda: manager.state.alias == "llama-server")
        assert loads(told)[-1] is None
        # The next load is expected to be like the last one.
        eventually(lambda: loads_kept(config.history))
        told.clear()
        there.ask("load")
        eventually(lambda: "loaded large" in said(told))
        first = loads(told)[0]
        assert first
        assert first.eta is not None
        assert first.elapsed + first.eta == pytest.approx(progress[-1].elapsed, rel=0.5)


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
        eventually(lambda: "loaded large" in said(told))


def test_a_router_that_tells_nothing_is_asked(
    config: ServerConfig, router: Callable[..., Start]
) -> None:
    """As those of the first builds; one that is busy has no answer for a while."""
    told: list[Event] = []
    with (
        router("--load-seconds", "4", silent=True) as there,
        ModelManager(config=config) as manager,
    ):
        manager.subscribe(told.append)
        manager.attach().wait(60)
        there.ask("load")
        eventually(lambda: "loaded large" in said(told))
        assert "has not loaded" not in said(told)
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
        eventually(lambda: "failed to load large. See the router's log." in said(told))
        eventually(lambda: loads(told)[-1] is None)  # told after the sentence
        assert manager.state.status is ServerStatus.READY
        told.clear()
        manager.switch_model("large", wait_for_ready=False).wait(20)
        eventually(lambda: "failed to load large" in said(told))
        manager.check_health().wait(20)
        assert said(told).count("failed to load large") == 1


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
            eventually(lambda: child_of(manager, "large"))
            child = psutil.Process(child_of(manager, "large"))
            child.suspend()  # it loads for as long as it takes to show that
            try:
                eventually(lambda: "large · loading weights" in panel.load_bar.text.value)
                assert panel.load_bar.bar.bar_style == ""
            finally:
                child.resume()
            eventually(lambda: "large · ready" in panel.load_bar.text.value)
            assert panel.load_bar.bar.bar_style == "success"
            eventually(lambda: "<b>large</b>" in panel.status_line.value)
            there.ask("unload", "small")
            gone = "The router unloaded small."
            eventually(lambda: gone in panel.activity_log.lines)  # shown after the bar
            assert "large · ready" in panel.load_bar.text.value
            there.ask("unload")
            eventually(lambda: panel.load_bar.text.value == "")
        finally:
            panel.close()


def test_the_panel_switches_there(
    config: ServerConfig, router: Callable[..., Start], tmp_path: Path
) -> None:
    config = config.replace(models_dir=tmp_path / "router", model=None, alias=None)
    with router(), ModelManager(config=config) as manager:
        panel = ControlPanel(manager=manager)
        try:
            manager.attach().wait(60)
            eventually(lambda: panel.picker.dropdown.options)
            for name in ("small", "large"):
                panel.picker.choose(tmp_path / "router" / f"{name}.gguf")
                eventually(lambda: panel.buttons.start.description == "Switch")
                assert not panel.buttons.start.disabled
                panel.buttons.start.click()
                eventually(lambda: manager.state.alias == name)  # noqa: B023 - within the loop
                eventually(lambda: panel.buttons.start.layout.display == "none")
            assert panel.buttons.stop.description == "Detach"
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


def test_its_models_are_loaded_there(config: ServerConfig, router: Callable[..., Start]) -> None:
    with router("--load-seconds", "0.3") as there, ModelManager(config=config) as manager:
        manager.attach().wait(60)
        with pytest.raises(KittyError, match=r"not loaded a model yet.*switch_model.*large, small"):
            manager.chat("Who are you?")
        with pytest.raises(ServerFailedError, match="serves no model"):
            manager.restart().wait(60)
        switching = manager.switch_model("large")
        state = switching.wait(60)
        assert (state.status, state.alias, there.status()) == (
            ServerStatus.READY,
            "large",
            "loaded",
        )
        assert switching.progress
        first = child_of(manager, "large")
        assert manager.switch_model("large").wait(60).alias == "large"
        assert child_of(manager, "large") == first  # it is there already
        assert manager.restart().wait(60).alias == "large"
        assert child_of(manager, "large") != first
        assert manager.switch_model("somewhere/small.gguf").wait(60).alias == "small"
        with pytest.raises(ServerFailedError, match=r"no model 'huge'. Its models: large, small"):
            manager.switch_model("huge").wait(60)
        assert manager.state.alias == "small"
        assert there.status() == "loaded"  # others may use it


def test_a_load_shorter_than_a_look_is_told(
    config: ServerConfig, router: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_away(*_: object) -> None:
        pass

    monkeypatch.setattr(RouterModels, "_watch_models", look_away)
    told: list[Event] = []
    with router(), ModelManager(config=config) as manager:
        manager.subscribe(told.append)
        manager.attach().wait(60)
        for name in ("small", "large"):
            assert manager.switch_model(name).wait(20).alias == name
            assert f"The router loaded {name} in" in said(told)
            assert [one.stage for one in loads(told) if one][-1] is Stage.READY


def test_a_load_there_that_fails_or_is_called_off(
    config: ServerConfig, router: Callable[..., Start]
) -> None:
    with router("--never-ready") as there, ModelManager(config=config) as manager:
        manager.attach().wait(60)
        loading = manager.switch_model("small")
        eventually(lambda: child_of(manager, "small"))
        psutil.Process(child_of(manager, "small")).kill()
        with pytest.raises(ServerFailedError, match="failed to load small"):
            loading.wait(60)
        loading = manager.switch_model("large")
        eventually(lambda: there.status() == "loading")
        loading.cancel()
        eventually(lambda: there.status() == "unloaded")
        loading = manager.switch_model("large")
        eventually(lambda: there.status() == "loading")
        manager.stop().wait(60)
        with pytest.raises(
            StartCancelledError, match="detached from the router before it loaded large"
        ):
            loading.wait(60)


def test_a_client_that_loads_it_again_does_not_fail_a_restart(
    config: ServerConfig, router: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = LlamaServer.order

    def load_at_once() -> None:
        eventually(lambda: there.status() == "unloaded")
        there.ask("load")
        eventually(lambda: there.status() == "loaded")

    async def unload(api: LlamaServer, verb: str, model: str) -> str:
        refusal = await order(api, verb, model)
        if verb == "unload":
            await anyio.to_thread.run_sync(load_at_once)
        return refusal

    with router() as there, ModelManager(config=config) as manager:
        manager.attach().wait(60)
        manager.switch_model("large").wait(60)
        first = child_of(manager, "large")
        monkeypatch.setattr(LlamaServer, "order", unload)
        assert manager.restart().wait(60).alias == "large"
        assert child_of(manager, "large") != first


def test_a_client_that_loads_it_first_does_not_fail_a_switch(
    config: ServerConfig, router: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(api: LlamaServer, verb: str, model: str) -> str:
        there.ask(verb, model)
        return "model is already running"

    told: list[Event] = []
    with router() as there, ModelManager(config=config) as manager:
        manager.subscribe(told.append)
        manager.attach().wait(60)
        monkeypatch.setattr(LlamaServer, "order", refuse)
        assert manager.switch_model("large").wait(60).alias == "large"
        assert "refused" not in said(told)


def test_of_two_looks_at_once_the_later_one_counts(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is gone; before that is noted, another one is loaded to be used."""
    status = {"a": ModelStatus.LOADED, "b": ModelStatus.UNLOADED, "c": ModelStatus.LOADED}
    seeking, told = threading.Event(), list[tuple[str, str | None]]()

    class Api(LlamaServer):
        async def models(self) -> dict[str, ModelStatus]:
            return dict(status)

    def find(_: int, name: str | None) -> None:
        if name == "c":
            seeking.set()
            time.sleep(0.3)

    async def look() -> str | None:
        def note(event: Event) -> None:
            if isinstance(event, Activity):
                told.append((event.message, models.alias))

        models = RouterModels(1, "", config, Api(HealthProbe(config)), note)
        await models._look("a")
        status["a"] = ModelStatus.UNLOADED
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(models._look)
            assert await anyio.to_thread.run_sync(seeking.wait, 10)
            status["b"] = ModelStatus.LOADED
            await models._look("b")
        await models._look()
        return models.alias

    monkeypatch.setattr("kitty_nb.supervisor.router._child", find)
    assert anyio.run(look) == "b"
    assert told == [("The router unloaded a.", "c")]


@pytest.mark.slow
def test_a_child_that_hangs_is_not_waited_for_for_ever(
    config: ServerConfig, router: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.supervisor.router._ENDS_WITHIN", 0.3)
    told: list[Event] = []
    hanging: list[psutil.Process] = []

    def stop(model: str) -> None:
        eventually(lambda: child_of(manager, model))
        hanging.append(psutil.Process(child_of(manager, model)))
        hanging[-1].suspend()

    patient = config.replace(stall_seconds=4.0)
    with (
        router("--load-seconds", "3") as there,
        ModelManager(config=patient) as manager,
    ):
        manager.subscribe(told.append)
        manager.attach().wait(60)
        try:
            manager.switch_model("small").wait(60)
            stop("small")
            with pytest.raises(ServerFailedError, match=r"did not unload small within .* Restart"):
                manager.restart().wait(60)
            loading = manager.switch_model("large")
            eventually(lambda: there.status() == "loading")
            stop("large")
            with pytest.raises(ServerFailedError, match="did not unload large within"):
                loading.wait(60)
            assert "The load of large stalled: for 4 s" in said(told)
        finally:
            for one in hanging:
                one.kill()
        eventually(lambda: there.status() == "unloaded")
        assert manager.switch_model("large").wait(60).alias == "large"


def test_a_real_router_is_used(
    config: ServerConfig, native_engine: Path, demo_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "router"
    folder.mkdir()
    (folder / "one.gguf").symlink_to(demo_model)
    (folder / "two\u2028.gguf").symlink_to(demo_model)
    command = [native_engine, "--models-dir", folder, "--port", str(config.port), "-c", "512"]
    told: list[Event] = []
    with (
        subprocess.Popen([*command, "-ngl", "0"]) as process,
        ModelManager(config=config) as manager,
    ):
        manager.subscribe(told.append)
        try:
            eventually(Router(config.endpoint).answers, within=30)
            manager.attach().wait(60)
            for name in ("one", "two\u2028"):
                assert manager.switch_model(name).wait(60).alias == name
                assert manager.chat("Who are you?").wait(60).text.startswith("Hello! I am")
            eventually(lambda: "loaded two\u2028 in" in said(told))
            assert manager.restart().wait(60).alias == "two\u2028"
            assert manager.chat("Who are you?", model="one").wait(60).text.startswith("Hello! I am")
        finally:
            process.terminate()


def test_another_server_that_was_attached_to_is_kept(config: ServerConfig) -> None:
    with (
        ModelManager(config=config.replace(profile="coder")) as other,
        ModelManager(config=config) as manager,
    ):
        other.start().wait(60)
        manager.attach().wait(60)
        with pytest.raises(ExperimentError, match="model and settings"):
            record_run(manager, "Who are you?")
        for ask in (manager.restart, lambda: manager.switch_model("demo.gguf")):
            with pytest.raises(ServerFailedError, match="This profile did not start"):
                ask().wait(60)
        assert manager.start().wait(60).pid == other.state.pid
