"""A router that kitty_nb starts: one address for several profiles, within a memory limit."""

from __future__ import annotations

import os
import pwd
import random
import re
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import eventually, unused_port, words_of
from terminal import run
from traitlets import TraitError

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerStatus, write_demo_model
from kitty_nb.catalog.resolve import routed_profiles
from kitty_nb.cli.doctor import examine
from kitty_nb.config.profiles import configured_profiles
from kitty_nb.engine.embedded import help_text
from kitty_nb.engine.locate import Engine, EngineKind, parse_help
from kitty_nb.errors import ExperimentError, ServerFailedError
from kitty_nb.experiments import load_test
from kitty_nb.formats.exports import export_router
from kitty_nb.supervisor.events import (
    Activity,
    Event,
    RoutedModel,
    RouterLoad,
    RouterState,
    ServerState,
)
from kitty_nb.supervisor.registry import find_server
from kitty_nb.supervisor.router_program import most_together
from kitty_nb.widgets.fleet_panel import Profile, fleet_rows
from kitty_nb.widgets.server_view import ServedModels

STAND_IN = Path(__file__).with_name("stand_in_swap.py")
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
        "LLAMACPP_RESTART_DELAY_SECONDS=0.1",
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


@pytest.fixture(params=["llama-server", "llama-swap", "like llama-swap"])
def routed(
    request: pytest.FixtureRequest, env: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The same with a router, and memory for two models and a half.

    The router is a compiled engine's own, or llama-swap in front of the embedded engine.
    """
    lines = ["LLAMACPP_ROUTER_MEMORY_GB=0.075"]
    if request.param == "llama-server":
        lines.append(f"LLAMACPP_BIN={request.getfixturevalue('native_engine')}")
    else:
        pytest.importorskip("xllamacpp")
    if request.param == "llama-swap" and not shutil.which("llama-swap"):
        pytest.skip("no llama-swap on PATH")
    if request.param == "like llama-swap":
        _install(tmp_path / "bin", f'exec {sys.executable} -P {STAND_IN} "$@"')
        monkeypatch.setenv("PYTHONPATH", str(STAND_IN.parent))
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with env.open("a") as file:
        file.write("\n".join(lines) + "\n")
    return env


def _install(folder: Path, line: str) -> None:
    """Make a llama-swap of one line of shell."""
    folder.mkdir()
    program = folder / "llama-swap"
    program.write_text(f"#!/bin/sh\n{line}\n")
    program.chmod(0o755)


@pytest.fixture
def manager(routed: Path) -> Iterator[ModelManager]:
    with ModelManager(routed, "router") as manager:
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


@pytest.mark.parametrize(
    ("swap", "said"),
    [
        (None, r"no router.*LLAMACPP_BIN.*install llama-swap"),
        ('echo "version: 217 (abc), built at noon"', "version 217, .*Update it to version 218"),
        ("echo boom", "printed no version of llama-swap: boom"),
    ],
)
def test_an_engine_without_a_router_says_what_to_do(
    env: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: str | None, said: str
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if swap:
        _install(tmp_path / "bin", swap)
    with (
        ModelManager(env, "router") as manager,
        pytest.raises(ServerFailedError, match=said),
    ):
        manager.start().wait(60)
    found = {one.what: one for one in examine(env, "router")}
    assert re.search(said, found["Model"].advice)


@pytest.mark.parametrize(("asks", "keys"), [(True, ("none", "own")), (False, ("", "none"))])
def test_the_key_is_the_routers_own(env: Path, asks: bool, keys: tuple[str, str]) -> None:
    with env.open("a") as file:
        file.write("LLAMACPP_API_KEY={}\nLLAMACPP_ROUTER_API_KEY={}\n".format(*keys))
    profiles = routed_profiles(ServerConfig.from_env(env, "router")).profiles
    engine = Engine(EngineKind.EMBEDDED, ("engine",), "1", parse_help(help_text()))
    text = export_router(profiles, engine, 2, 20_000).text
    assert ("LLAMA_API_KEY" in text) is asks


def test_what_is_wrong_with_profiles_that_it_names_is_told_at_once(routed: Path) -> None:
    with routed.open("a") as file:
        file.write("LLAMACPP_ONE_MODEL=gone.gguf\nLLAMACPP_THREE_CTX=x\n")
        file.write("LLAMACPP_ROUTER_MODELS=one,two,three\n")
    with (
        ModelManager(routed, "router") as manager,
        pytest.raises(ServerFailedError, match=r"(?s)gone.*LLAMACPP_THREE_CTX"),
    ):
        manager.start().wait(60)


def test_of_all_profiles_it_leaves_out_those_that_cannot_be_served(
    manager: ModelManager, routed: Path
) -> None:
    told: list[Event] = []
    manager.subscribe(told.append)
    models = routed.parent / "models"
    manager.start().wait(60)
    assert set(manager.state.router.models) == set(NAMES)
    (models / "two.gguf").unlink()
    (models / "three.gguf").write_bytes(b"GGUF, once")
    psutil.Process(manager.state.pid).kill()
    eventually(lambda: manager.state.restart_count)
    eventually(lambda: manager.state.status is ServerStatus.READY)
    assert manager.chat("Who are you?", model="four", max_tokens=3).wait(60).text
    assert set(manager.state.router.models) == {"one", "four"}
    said = [one.message for one in told if isinstance(one, Activity) and "left out" in one.message]
    assert re.search(r"^The profile two is left out. .*two\.gguf.* no such file", said[0])
    assert re.search(r"^The profile three is left out. LLAMACPP_THREE_MODEL=", said[1])
    manager.stop().wait(60)
    for name in ("one", "four"):
        (models / f"{name}.gguf").unlink()
    with pytest.raises(ServerFailedError, match=r"(?s)4 settings are wrong.*one.*four"):
        manager.start().wait(60)


def test_a_load_test_measures_the_model_that_it_names(manager: ModelManager) -> None:
    manager.start().wait(60)
    with pytest.raises(ExperimentError, match=r"has several models: .*\. Name one"):
        load_test(access=manager.access).wait(60)
    test = load_test("two", access=manager.access, concurrency=2, requests=4, max_tokens=3)
    assert len(test.wait(60).requests) == 4
    eventually(lambda: "two" in loaded(manager))


def test_its_requests_are_told_by_model(manager: ModelManager, routed: Path) -> None:
    manager.start().wait(60)
    if (routed.parent / "logs" / "router.llama-swap.yaml").exists():
        pytest.skip("a line of llama-swap's log does not say whose it is")
    asked = [
        (name, manager.chat("Who are you?", model=name, max_tokens=3 * number))
        for number in range(1, 8)
        for name in ("one", "two")
    ]
    answered = Counter((name, answer.wait(60).usage.answer) for name, answer in asked)
    eventually(lambda: len(manager.requests) == len(asked))
    assert Counter((one.model, one.answer_tokens) for one in manager.requests) == answered


def test_one_address_serves_all_within_the_limit(
    manager: ModelManager, routed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # These loads may be as short as the pause between two looks, and go unseen.
    monkeypatch.setattr("kitty_nb.supervisor.router._ASK_ROUTER_EVERY", 0.02)
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

    def loads_were_shown() -> bool:
        """If not, use another model: a load may be over before it is looked at."""
        loads = [event for event in told if isinstance(event, RouterLoad) and event.progress]
        if len({event.model for event in loads}) > 1:
            return True
        manager.chat("Who are you?", model=dice.choice(NAMES[1:]), max_tokens=3).wait(60)
        return False

    eventually(loads_were_shown)
    eventually(lambda: "one" in loaded(manager))
    sentences = [event.message for event in told if isinstance(event, Activity)]
    assert not [one for one in sentences if re.search("failed|model is loaded|Model loaded", one)]
    assert manager.switch_model("four").wait(60).alias == "four"
    assert manager.chat("Who are you?", max_tokens=3).wait(60).text
    with pytest.raises(ServerFailedError, match="no model 'five'"):
        manager.switch_model("five").wait(60)
    # Another kernel finds it as it is, and the terminal, too.
    with ModelManager(routed, "router") as other:
        assert other.state.pid == manager.state.pid
        eventually(lambda: "four" in loaded(other))
        other.stop().wait(60)
    eventually(lambda: manager.state.status is ServerStatus.STOPPED)


def test_a_model_that_hangs_is_told(manager: ModelManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitty_nb.supervisor.health._ANSWER_WITHIN", 0.5)
    monkeypatch.setattr("kitty_nb.supervisor.router._ASK_CHILD_EVERY", 0.2)
    monkeypatch.setattr("kitty_nb.supervisor.server._ASK_READY", 0.2)
    told: list[Event] = []
    manager.subscribe(told.append)
    manager.start().wait(60)
    eventually(lambda: loaded(manager) == {"one"})
    child = psutil.Process(child_of(manager.state.pid, "one"))
    child.suspend()
    try:
        chat = manager.chat("Who are you?", model="one", max_tokens=3)
        eventually(lambda: "not responding: one: no answer" in manager.state.sentence, within=20)
        assert not chat.done
    finally:
        child.resume()
    assert chat.wait(60).text
    eventually(lambda: "not responding" not in manager.state.sentence)
    said = " ".join(one.message for one in told if isinstance(one, Activity))
    assert "not responding (one: no answer in time): it hangs or is paused. Restart it" in said
    manager.stop().wait(60)


def test_other_users_are_kept_from_the_ports_of_its_models(
    manager: ModelManager, routed: Path, second_user: pwd.struct_passwd
) -> None:
    manager.start().wait(60)
    settings = routed.parent / "logs" / "router.llama-swap.yaml"
    if not settings.exists():
        pytest.skip("llama-server's own router chooses a port at each load")
    first = int(yaml.safe_load(settings.read_text())["startPort"])
    for port in range(first, first + len(NAMES)):
        os.seteuid(second_user.pw_uid)
        try:
            stranger = socket.socket()  # whose it is decides
        finally:
            os.seteuid(0)
        with stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with pytest.raises(OSError, match="in use"):
                stranger.bind(("127.0.0.1", port))
    assert manager.switch_model("two").wait(60).alias == "two"


def test_a_load_that_fails_or_is_called_off(manager: ModelManager, routed: Path) -> None:
    manager.start().wait(60)
    eventually(lambda: loaded(manager) == {"one"})
    pid = manager.state.pid
    (routed.parent / "models" / "three.gguf").write_bytes(b"GGUF")  # damaged meanwhile
    with pytest.raises(ServerFailedError, match="failed to load three"):
        manager.switch_model("three").wait(60)
    loading = manager.switch_model("two")
    eventually(lambda: child_of(pid, "two"))
    loading.cancel()
    # On a busy machine, it may have been loaded before that.
    eventually(lambda: child_of(pid, "two") == 0 or "two" in loaded(manager))
    assert manager.switch_model("two").wait(60).alias == "two"
    children = psutil.Process(pid).children()
    psutil.Process(pid).kill()
    eventually(lambda: not any(one.is_running() for one in children))
    manager.stop().wait(60)


def chosen(widget: ServedModels, model: str) -> bool:
    """Choose a model between changes of the list, as a page does; False if it is not listed."""
    with widget.turn, suppress(TraitError):
        widget.value = model
        return True
    return False


def child_of(router: int | None, model: str) -> int:
    """The process of a model; 0 where there is none."""
    for child in psutil.Process(router).children():
        if f"{model}.gguf" in {Path(word).name for word in words_of(child)}:
            return child.pid
    return 0


def test_the_terminal_starts_and_stops_it(routed: Path) -> None:
    options = ("--env", routed, "--profile", "router")
    printed = run("start", "--print-command", *options).stdout
    assert "--models-max 2" in printed or "llama-swap" in printed
    try:
        done = run("start", *options)
        # The pinned model may be loaded by then, or not yet.
        assert re.search(r"READY: (router|one) at", done.stdout), done.output
        assert run("status", *options).exit_code == 0
        connected = run("connect", "openai", *options)
        assert 'model="one"' in connected.stdout
        config = ServerConfig.from_env(routed, "router")
        before = find_server(config)
        assert run("switch", "two", *options).exit_code == 0
        assert before is not None
        assert find_server(config).pid == before.pid
    finally:
        assert "Stopped" in run("stop", *options).stdout


def test_its_panel_offers_its_models_in_place_of_files(routed: Path) -> None:
    panel = ControlPanel(routed, "router")
    try:
        hidden = panel.picker, panel.memory, panel.browser
        eventually(lambda: {one.layout.display for one in hidden} == {"none"})
        eventually(lambda: not panel.buttons.start.disabled)
        panel.buttons.start.click()
        eventually(lambda: set(panel.served.options) == set(NAMES))
        eventually(lambda: chosen(panel.served, "two"))
        eventually(lambda: "<b>two</b>" in panel.status_line.value)
        panel.ask.ask("Who are you?")
        eventually(lambda: panel.ask.turns and panel.ask.turns[0].text)
        assert panel.choice.model is None
        panel.details.selected_index = 0
        eventually(lambda: "a router" in panel.details.server.value)
        assert not panel.details.model.value
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
    assert [(row.profile, row.status, row.model) for row in rows] == [
        ("router", "Ready", "one, two"),
        ("router: one", "Loaded", "one"),
        ("router: two", "Unloaded", "two"),
    ]
    assert [row.start or row.stop for row in rows] == [True, False, False]
    assert [row.routed for row in rows] == [False, True, True]
