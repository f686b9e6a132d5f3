"""A router that kitty_nb starts: one address for several profiles, within a memory limit."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import psutil
import pytest
from conftest import eventually, unused_port
from terminal import run

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerStatus, write_demo_model
from kitty_nb.config import configured_profiles
from kitty_nb.errors import ServerFailedError
from kitty_nb.supervisor.events import Event, RoutedModel, RouterLoad, RouterState, ServerState
from kitty_nb.supervisor.registry import find_server
from kitty_nb.supervisor.routing import most_together
from kitty_nb.widgets.fleet_panel import Profile, fleet_rows

NAMES = ("one", "two", "three", "four")


@pytest.fixture
def env(tmp_path: Path) -> Path:
    """Four profiles, the first pinned, behind a router."""
    lines = [
        "LLAMACPP_MODELS_DIR=models",
        "LLAMACPP_LOG_DIR=logs",
        "LLAMACPP_HISTORY=history.sqlite3",
        "LLAMACPP_CTX=512",
        "LLAMACPP_PARALLEL=1",
        "LLAMACPP_THREADS=1",
        "LLAMACPP_ROUTER_MODELS=all",
        f"LLAMACPP_ROUTER_PORT={unused_port()}",
        "LLAMACPP_ONE_PINNED=1",
    ]
    for name in NAMES:
        write_demo_model(tmp_path / "models" / f"{name}.gguf", size=20_000_000)
        lines.append(f"LLAMACPP_{name.upper()}_MODEL={name}.gguf")
    (tmp_path / ".env").write_text("\n".join(lines) + "\n")
    return tmp_path / ".env"


@pytest.fixture
def native(env: Path, native_engine: Path) -> Path:
    """The same, with an engine that has a router, and memory for two models and a half."""
    with env.open("a") as file:
        file.write(f"LLAMACPP_BIN={native_engine}\nLLAMACPP_ROUTER_MEMORY_GB=0.075\n")
    return env


@pytest.fixture
def manager(native: Path) -> Iterator[ModelManager]:
    with ModelManager(native, "router") as manager:
        yield manager


def loaded(manager: ModelManager) -> set[str]:
    router = manager.state.router
    return {n for n, m in (router.models if router else {}).items() if m.status == "loaded"}


def test_any_so_many_models_fit_together() -> None:
    for seed in range(200):
        dice = random.Random(seed)
        pools = dice.randint(1, 2)
        pinned = [[dice.randint(0, 9) for _ in range(pools)] for _ in range(dice.randint(0, 2))]
        others = [[dice.randint(0, 9) for _ in range(pools)] for _ in range(dice.randint(0, 5))]
        free = [dice.randint(0, 40) for _ in range(pools)]

        def fits(count: int) -> bool:
            return all(
                sum(one[pool] for one in (*pinned, *some)) <= free[pool]  # noqa: B023
                for some in combinations(others, count)  # noqa: B023
                for pool in range(pools)  # noqa: B023
            )

        most = most_together(pinned, others, free)
        count = most - len(pinned)
        assert 0 <= count <= len(others)
        assert fits(count) or count == 0
        assert count == len(others) or not fits(count + 1)


def test_a_router_is_a_profile_without_a_model(env: Path) -> None:
    assert configured_profiles(env) == ("router", *NAMES)
    config = ServerConfig.from_env(env, "router")
    assert (config.models, config.env, config.model) == (("all",), env, None)


def test_an_engine_without_a_router_says_what_to_do(env: Path) -> None:
    pytest.importorskip("xllamacpp")
    with (
        ModelManager(env, "router") as manager,
        pytest.raises(ServerFailedError, match=r"no router.*LLAMACPP_BIN.*export llama-swap"),
    ):
        manager.start().wait(60)


def test_what_is_wrong_with_its_profiles_is_told_at_once(native: Path) -> None:
    with native.open("a") as file:
        file.write("LLAMACPP_TWO_MODEL=gone.gguf\nLLAMACPP_THREE_CTX=x\n")
    with (
        ModelManager(native, "router") as manager,
        pytest.raises(ServerFailedError, match=r"(?s)gone.*LLAMACPP_THREE_CTX"),
    ):
        manager.start().wait(60)


def test_one_address_serves_all_within_the_limit(manager: ModelManager, native: Path) -> None:
    told: list[Event] = []
    manager.subscribe(told.append)
    state = manager.start().wait(60)
    assert state.status is ServerStatus.READY
    eventually(lambda: loaded(manager) == {"one"})  # it is pinned
    dice = random.Random(0)
    for name in (*NAMES[1:], *dice.choices(NAMES, k=12)):
        answer = manager.chat("Who are you?", model=name, max_tokens=3).wait(60)
        assert answer.text
        children = psutil.Process(manager.state.pid).children()
        assert len(children) <= 2
    eventually(lambda: "one" in loaded(manager))
    loads = [event for event in told if isinstance(event, RouterLoad) and event.progress]
    assert len({event.model for event in loads}) > 1
    assert manager.switch_model("four").wait(60).alias == "four"
    assert manager.chat("Who are you?", max_tokens=3).wait(60).text
    with pytest.raises(ServerFailedError, match="no model 'five'"):
        manager.switch_model("five").wait(60)
    # Another kernel finds it as it is, and the terminal, too.
    with ModelManager(native, "router") as other:
        assert other.state.pid == manager.state.pid
        eventually(lambda: "four" in loaded(other))
        other.stop().wait(60)
    eventually(lambda: manager.state.status is ServerStatus.STOPPED)


def test_the_terminal_starts_and_stops_it(native: Path) -> None:
    options = ("--env", native, "--profile", "router")
    assert "--models-max 2" in run("start", "--print-command", *options).stdout
    try:
        done = run("start", *options)
        # The pinned model may be loaded by then, or not yet.
        assert re.search(r"READY: (router|one) at", done.stdout), done.output
        assert run("status", *options).exit_code == 0
        connected = run("connect", "openai", *options)
        assert 'model="one"' in connected.stdout
        config = ServerConfig.from_env(native, "router")
        before = find_server(config)
        assert run("switch", "two", *options).exit_code == 0
        assert before is not None
        assert find_server(config).pid == before.pid
    finally:
        assert "Stopped" in run("stop", *options).stdout


def test_its_panel_offers_its_models_in_place_of_files(native: Path) -> None:
    panel = ControlPanel(native, "router")
    try:
        hidden = panel.picker, panel.memory
        eventually(lambda: {one.layout.display for one in hidden} == {"none"})
        eventually(lambda: not panel.buttons.start.disabled)
        panel.buttons.start.click()
        eventually(lambda: set(panel.served.options) == set(NAMES))
        panel.served.value = "two"
        eventually(lambda: "<b>two</b>" in panel.status_line.value)
        panel.ask.ask("Who are you?")
        eventually(lambda: panel.ask.turns and panel.ask.turns[0].text)
        assert panel.choice.model is None
        assert panel.buttons.start.layout.display == "none"
        panel.buttons.stop.click()
        eventually(lambda: panel.manager.state.status is ServerStatus.STOPPED)
        eventually(lambda: panel.buttons.start.layout.display != "none")
    finally:
        panel.close()


def test_the_fleet_has_a_row_for_each_model(config: ServerConfig) -> None:
    routed = config.replace(profile="router", model=None, models=["one", "two"])
    models = {"one": RoutedModel("loaded"), "two": RoutedModel("unloaded")}
    state = ServerState(ServerStatus.READY, routed, 1, router=RouterState(models, "one", None))
    rows = fleet_rows([Profile(routed, state)])
    assert [(row["profile"], row["status"], row["model"]) for row in rows] == [
        ("router", "Ready", "one, two"),
        ("router: one", "Loaded", "one"),
        ("router: two", "Unloaded", "two"),
    ]
    assert [row["start"] or row["stop"] for row in rows] == [True, False, False]
