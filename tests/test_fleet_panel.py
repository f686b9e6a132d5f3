from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import eventually, unused_port
from IPython.core.formatters import DisplayFormatter

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerState, ServerStatus
from kitty_nb.errors import ConfigError, KittyError
from kitty_nb.widgets import FleetPanel, session
from kitty_nb.widgets.fleet_panel import Profile, startable

UNKNOWN = "\N{EN DASH}"


def write_env(folder: Path, config: ServerConfig, *lines: str) -> Path:
    text = (
        f"LLAMACPP_MODELS_DIR={config.models_dir}\nLLAMACPP_LOG_DIR={config.log_dir}\n"
        f"LLAMACPP_HISTORY={config.history}\nLLAMACPP_CTX=512\nLLAMACPP_THREADS=1\n"
        f"LLAMACPP_PARALLEL=1\nLLAMACPP_PRIMARY_MODEL={config.model}\n"
        f"LLAMACPP_PRIMARY_PORT={config.port}\n"
    )
    path = folder / "my.env"
    path.write_text(text + "".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def env(tmp_path: Path, config: ServerConfig) -> Path:
    """Two profiles, both the real engine on the demo model."""
    coder = (f"LLAMACPP_CODER_MODEL={config.model}", f"LLAMACPP_CODER_PORT={unused_port()}")
    return write_env(tmp_path, config, *coder)


Open = Callable[[Path], FleetPanel]


@pytest.fixture
def open_() -> Iterator[Open]:
    panels: list[FleetPanel] = []

    def make(env: Path) -> FleetPanel:
        panels.append(FleetPanel(env))
        return panels[-1]

    yield make
    for panel in panels:
        panel.close()


def row(panel: FleetPanel, profile: str) -> dict[str, object]:
    return next(row for row in panel.rows if row["profile"] == profile)


def wait_for(panel: FleetPanel, **statuses: str) -> None:
    for profile, status in statuses.items():
        eventually(
            lambda p=profile, s=status: row(panel, p)["status"] == s,
            within=30,
            why=f"{profile} is never {status}: {panel.rows}",
        )


def click(panel: FleetPanel, kind: str, profile: str | None = None) -> None:
    """Send what the page sends."""
    panel._handle_custom_msg({"kind": kind} | ({"profile": profile} if profile else {}), [])


def test_two_profiles_run_at_once(open_: Open, env: Path) -> None:
    panel = open_(env)
    assert repr(panel) == "FleetPanel(profiles=['primary', 'coder'])"
    assert {r["status"] for r in panel.rows} == {"Not running"}
    click(panel, "start", "primary")
    wait_for(panel, primary="Ready", coder="Not running")
    assert (row(panel, "primary")["start"], row(panel, "primary")["stop"]) == (False, True)
    click(panel, "start", "coder")
    wait_for(panel, primary="Ready", coder="Ready")
    for profile in ("primary", "coder"):
        eventually(lambda p=profile: str(row(panel, p)["memory"]).endswith("B"), within=20)
        answer = panel.manager(profile).chat("Who are you?").wait(30)
        assert answer.text.startswith("Hello! I am")
        assert row(panel, profile)["model"] == "demo.gguf"
    data, _ = DisplayFormatter().format(panel)
    assert "<tr><td>coder</td><td>Ready</td><td>demo.gguf</td>" in data["text/html"]
    click(panel, "stop_all")
    wait_for(panel, primary="Not running", coder="Not running")
    click(panel, "start_all")
    wait_for(panel, primary="Ready", coder="Ready")


def test_how_fast_it_answers_is_shown(open_: Open, env: Path) -> None:
    env.write_text(f"{env.read_text()}LLAMACPP_EXTRA_ARGS='--context-shift'\n")
    panel = open_(env)
    panel.start("primary")
    wait_for(panel, primary="Ready")
    eventually(lambda: row(panel, "primary")["pace"] == "0")
    endless = panel.manager("primary").chat("Who are you?", ignore_eos=True)
    eventually(lambda: row(panel, "primary")["pace"] not in {"0", UNKNOWN})
    endless.cancel()
    eventually(lambda: row(panel, "primary")["pace"] == "0")


def test_profiles_that_want_one_port_are_told_before_they_start(
    open_: Open, tmp_path: Path, config: ServerConfig
) -> None:
    same = (f"LLAMACPP_MINE_MODEL={config.model}", f"LLAMACPP_MINE_PORT={config.port}")
    panel = open_(write_env(tmp_path, config, *same))
    assert row(panel, "primary")["problem"] == ""
    assert f"Port {config.port} is also set for primary" in str(row(panel, "mine")["problem"])
    assert f"LLAMACPP_MINE_PORT to another port, such as {config.port + 1}" in str(
        row(panel, "mine")["problem"]
    )
    click(panel, "start_all")
    wait_for(panel, primary="Ready", mine="Not running")
    assert not row(panel, "mine")["start"]
    click(panel, "stop", "primary")
    wait_for(panel, primary="Not running")
    click(panel, "start", "mine")
    wait_for(panel, mine="Ready")
    eventually(lambda: "set for mine" in str(row(panel, "primary")["problem"]))


def test_all_start_but_those_that_want_one_port_of_one_machine(config: ServerConfig) -> None:
    profiles = [
        Profile(one, ServerState(ServerStatus.STOPPED, one))
        for name, machine in {"here": None, "there": "red", "too": "blue", "again": "red"}.items()
        for one in [config.replace(profile=name, ssh=machine)]
    ]
    assert startable(profiles) == ["here", "there", "too"]


def test_a_wrong_setting_is_shown_in_its_row_and_can_be_mended(
    open_: Open, tmp_path: Path, config: ServerConfig
) -> None:
    env = write_env(tmp_path, config, "LLAMACPP_CODER_MODEL=missing.gguf", "LLAMACPP_Q4_CTX=512")
    panel = open_(env)
    assert [r["profile"] for r in panel.rows] == ["primary", "coder", "q4"]
    assert "LLAMACPP_CODER_MODEL='missing.gguf'" in str(row(panel, "coder")["problem"])
    assert "Set LLAMACPP_Q4_MODEL" in str(row(panel, "q4")["problem"])
    assert not row(panel, "coder")["start"]
    assert not row(panel, "q4")["start"]
    assert row(panel, "primary")["start"]
    env.write_text(env.read_text().replace("missing.gguf", str(config.model)))
    click(panel, "rescan")
    eventually(lambda: row(panel, "coder")["start"])
    env.write_text("not a setting\n")
    click(panel, "rescan")
    eventually(lambda: "not KEY=value" in panel.notice)
    with pytest.raises(ConfigError):
        FleetPanel(env)
    with pytest.raises(KittyError, match="LLAMACPP_VISION_MODEL"):
        panel.start("vision")


def test_what_has_no_effect_is_told_until_it_is_corrected(open_: Open, env: Path) -> None:
    right = env.read_text()
    env.write_text(f"{right}LLAMACPP_CONTEXT=1024\n")
    panel = open_(env)
    eventually(lambda: "Did you mean LLAMACPP_CTX?" in panel.notice)
    env.write_text(right)
    click(panel, "rescan")
    eventually(lambda: not panel.notice)


def test_a_start_that_fails_says_why(
    open_: Open, tmp_path: Path, misbehaving: Callable[..., ServerConfig]
) -> None:
    config = misbehaving()
    flags = "'--never-ready --exit-after 0.3 --exit-code 1 --last-words ended-by-a-test'"
    env = write_env(
        tmp_path, config, f"LLAMACPP_BIN={config.binary}", f"LLAMACPP_EXTRA_ARGS={flags}"
    )
    panel = open_(env)
    click(panel, "start", "primary")
    wait_for(panel, primary="Crashed")
    eventually(lambda: "ended with exit code 1" in str(row(panel, "primary")["problem"]))
    env.write_text(f"{env.read_text()}LLAMACPP_CTX=many\n")
    click(panel, "start", "primary")
    eventually(lambda: "LLAMACPP_CTX='many'" in str(row(panel, "primary")["problem"]))


def test_trouble_that_is_over_is_not_shown_any_more(open_: Open, env: Path) -> None:
    panel = open_(env)
    right = env.read_text()
    env.write_text(f"{right}LLAMACPP_CTX=many\n")
    click(panel, "start", "primary")
    eventually(lambda: "LLAMACPP_CTX='many'" in str(row(panel, "primary")["problem"]))
    panel.manager("primary").start().wait(30)
    eventually(lambda: row(panel, "primary")["problem"] == "")


def test_what_will_not_fit_is_asked_for_twice(
    open_: Open,
    tmp_path: Path,
    misbehaving: Callable[..., ServerConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(session, "monotonic", lambda: now)
    config = misbehaving()
    large = (f"LLAMACPP_BIN={config.binary}", "LLAMACPP_PRIMARY_CTX=2000000000")
    panel = open_(write_env(tmp_path, config, *large))
    click(panel, "start_all")
    eventually(lambda: "Press the button again" in str(row(panel, "primary")["problem"]))
    assert row(panel, "primary")["status"] == "Not running"
    now += 10
    click(panel, "start", "primary")
    wait_for(panel, primary="Ready")


def test_the_table_goes_on_while_another_manager_connects(
    open_: Open, env: Path, config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = open_(env)
    manager = panel.manager("primary")
    begun, go_on = threading.Event(), threading.Event()

    def slowly(**options: Any) -> ModelManager:
        begun.set()
        go_on.wait(60)
        return ModelManager(**options)

    monkeypatch.setattr(session, "ModelManager", slowly)
    other = threading.Thread(target=session.acquire, args=("other", "primary", "user", config))
    other.start()
    try:
        assert begun.wait(60)
        manager.start()
        eventually(lambda: row(panel, "primary")["status"] == "Ready", within=20)
    finally:
        go_on.set()
        other.join()
        session.release("user")


def test_a_panel_and_the_fleet_have_one_server(open_: Open, env: Path) -> None:
    fleet = open_(env)
    fleet.start("primary")
    wait_for(fleet, primary="Ready")
    panel = ControlPanel(env)
    assert panel.manager is fleet.manager("primary")
    panel.close()
    assert fleet.manager("primary").state.status == "READY"  # the fleet uses it still
    panel.manager.close()
    wait_for(fleet, primary="Not running")
    fleet.start("primary")
    wait_for(fleet, primary="Ready")


def test_running_the_cell_again_shows_the_same_servers(open_: Open, env: Path) -> None:
    first = open_(env)
    first.start("coder")
    wait_for(first, coder="Ready")
    second = open_(env)
    wait_for(second, coder="Ready")
    first.close()
    assert row(second, "coder")["status"] == "Ready"
    pid = second.manager("coder").state.pid
    second.close()
    assert pid
    assert not psutil.pid_exists(pid)
    assert "kitty_nb" not in {thread.name for thread in threading.enumerate()}


def test_running_the_cell_again_leaves_one_panel(open_: Open, env: Path) -> None:
    first = open_(env)
    first.start("primary")
    wait_for(first, primary="Ready")
    second = open_(env)
    assert first.comm is None
    wait_for(second, primary="Ready")
    panels_and_managers = 3
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("kitty_nb") == panels_and_managers


def test_a_manager_that_was_closed_is_replaced_when_it_is_needed(open_: Open, env: Path) -> None:
    panel = open_(env)
    panel.start("primary")
    wait_for(panel, primary="Ready")
    panel.manager("primary").close()
    wait_for(panel, primary="Not running")
    panel.start("primary")
    wait_for(panel, primary="Ready")


def test_a_fleet_sends_few_messages(
    open_: Open, env: Path, sent: list[tuple[str, dict[str, object]]]
) -> None:
    panel = open_(env)
    sent.clear()
    click(panel, "start_all")
    seconds = 3
    threading.Event().wait(seconds)  # the measured span itself, not a wait for something
    assert 1 <= len(sent) <= 20 * seconds
    wait_for(panel, primary="Ready", coder="Ready")


def test_a_fleet_that_cannot_be_kept_current_says_so(
    open_: Open, env: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a row that is gone")

    fleet = open_(env)
    monkeypatch.setattr(fleet, "_look", fail)

    eventually(lambda: "a row that is gone" in fleet.notice)
