from __future__ import annotations

import gc
import json
import re
import shutil
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import ipywidgets
import platformdirs
import psutil
import pytest
from conftest import eventually
from IPython.core.formatters import DisplayFormatter
from ipywidgets.embed import embed_data

from kitty_nb import (
    ControlPanel,
    ModelManager,
    ServerConfig,
    ServerState,
    ServerStatus,
    write_demo_model,
)
from kitty_nb.catalog.memory import Memory, MemoryPool
from kitty_nb.config.profiles import save_settings
from kitty_nb.supervisor import forecast
from kitty_nb.supervisor.events import HealthCheckResult, LoadProgress, Stage
from kitty_nb.supervisor.log import previous
from kitty_nb.widgets import session
from kitty_nb.widgets.display import duration, receive_while_busy
from kitty_nb.widgets.models import ModelPicker
from kitty_nb.widgets.server_view import Choices, choices, describe_load, name_of, snippet, vitals
from kitty_nb.widgets.server_work import LINES_KEPT


@pytest.fixture
def env(tmp_path: Path, demo_model: Path, free_port: int) -> Path:
    (tmp_path / "models").mkdir()
    shutil.copy(demo_model, tmp_path / "models" / "one.gguf")
    shutil.copy(demo_model, tmp_path / "models" / "two.gguf")
    (tmp_path / "models" / "part-00001-of-00002.gguf").write_bytes(demo_model.read_bytes())
    path = tmp_path / ".env"
    path.write_text(
        f"LLAMACPP_MODELS_DIR=models\nLLAMACPP_LOG_DIR=logs\nLLAMACPP_PORT={free_port}\n"
        "LLAMACPP_HISTORY=history.sqlite3\n"
        "LLAMACPP_PRIMARY_MODEL=two.gguf\nLLAMACPP_CTX=512\nLLAMACPP_THREADS=1\n"
    )
    return path


@pytest.fixture
def panel(env: Path) -> Iterator[ControlPanel]:
    panel = ControlPanel(env)
    eventually(lambda: panel.picker.model)
    yield panel
    panel.close()


@pytest.fixture
def misbehaving_panel(
    misbehaving: Callable[..., ServerConfig],
) -> Iterator[Callable[..., ControlPanel]]:
    panels: list[tuple[ControlPanel, ModelManager]] = []

    def make(*flags: str, **changes: object) -> ControlPanel:
        manager = ModelManager(config=misbehaving(*flags, **changes))
        panel = ControlPanel(manager=manager)
        panels.append((panel, manager))
        eventually(lambda: panel.picker.model)
        return panel

    yield make
    for panel, manager in panels:
        panel.close()
        manager.close()


def wait_for(panel: ControlPanel, status: str) -> None:
    eventually(lambda: status in panel.status_line.value, why=f"never {status}")


def offered(panel: ControlPanel) -> set[str]:
    """The buttons that can be pressed, beside the model and in the notice."""
    buttons = (*panel.buttons.children, *panel.buttons.remedies.children)
    shown = (button for button in buttons if button.layout.display is None)
    return {button.description for button in shown if not button.disabled}


def listed(panel: ControlPanel) -> list[str]:
    return [label for label, _ in panel.picker.dropdown.options]


def choose(panel: ControlPanel, name: str) -> None:
    def path() -> Path | None:
        paths = [path for _, path in panel.picker.dropdown.options]
        return next((path for path in paths if path.name == name), None)

    eventually(path)
    with panel.picker.dropdown.turn:
        panel.picker.dropdown.value = path()


@pytest.mark.parametrize("again", [False, True], ids=["a new panel", "the cell is run again"])
def test_a_start_while_the_panel_is_created_is_followed(
    env: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    earlier = ControlPanel(env)
    earlier.manager.start().wait(60)
    earlier.manager.stop().wait(60)
    before, scan = len(earlier.activity_log.lines), ModelPicker.scan

    def late(picker: ModelPicker, *args: Any, **options: Any) -> None:
        config = earlier.manager.state.config.replace(model="one.gguf", context_size=1024)
        earlier.manager.start(config).wait(60)
        scan(picker, *args, **options)

    with monkeypatch.context() as changes:
        changes.setattr(ModelPicker, "scan", late)
        panel = ControlPanel(env) if again else ControlPanel(manager=earlier.manager)
    try:
        eventually(lambda: panel.picker.model and panel.picker.model.name == "one.gguf")
        eventually(lambda: panel.settings.fields["context_size"].value == "1024")
        wait_for(panel, "Ready")
        assert offered(panel) == {"Stop"}
        told = earlier.activity_log.lines[0 if again else before :]
        assert len(told) > (before if again else 0)
        assert panel.activity_log.lines[: len(told)] == told
    finally:
        panel.close()
        earlier.close()


def test_a_held_port_can_be_left_for_a_free_one(panel: ControlPanel) -> None:
    wait_for(panel, "Not running")
    held = panel.manager.state.config.port
    with socket.create_server(("127.0.0.1", held)):
        assert panel.buttons.use_port.layout.display == "none"
        panel.buttons.start.click()
        wait_for(panel, "Failed")
        assert f"Port {held}" in panel.notice.value
        eventually(lambda: panel.buttons.use_port.layout.display is None)
        port = panel.manager.state.free_port
        assert panel.buttons.use_port.description == f"Use port {port}"
        panel.buttons.use_port.click()
        wait_for(panel, "Ready")
        assert panel.manager.state.config.port == port
        eventually(lambda: panel.buttons.use_port.layout.display == "none")


def test_how_to_use_the_model_is_told_once_it_is_ready(panel: ControlPanel) -> None:
    wait_for(panel, "Not running")
    assert panel.address.endpoint == ""
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    eventually(lambda: panel.address.endpoint == panel.manager.state.endpoint)
    code = snippet(panel.manager.state, name_of(panel))
    printed: list[str] = []
    exec(code, {"panel": panel, "print": printed.append})
    assert [str(text).startswith("Hello! I am") for text in printed] == [True] * (
        3 if find_spec("openai") else 2
    )
    assert f"{panel.manager.base_url} " in code


def test_code_names_the_panel_as_the_notebook_does(
    panel: ControlPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells: dict[str, object] = {"_": panel, "_3": panel, "other": object()}
    shell = SimpleNamespace(user_ns=cells)
    monkeypatch.setattr("kitty_nb.widgets.server_view.get_ipython", lambda: shell)
    assert "print(_3.manager.chat(" in snippet(panel.manager.state, name_of(panel))
    cells["mine"] = panel
    assert "print(mine.manager.chat(" in snippet(panel.manager.state, name_of(panel))


def test_the_key_is_copied_by_a_message_that_nothing_keeps(
    sent: list[tuple[str, dict[str, object]]], env: Path
) -> None:
    env.write_text(f"{env.read_text()}LLAMACPP_API_KEY=hush-hush\n")
    panel = ControlPanel(env)
    try:
        eventually(lambda: panel.picker.model)
        panel.buttons.start.click()
        wait_for(panel, "Ready")
        assert "hush-hush" not in str(sent)
        panel.address._handle_custom_msg({"kind": "copy", "what": "key", "for": "me"}, [])
        answer = {"kind": "copy", "for": "me", "text": "hush-hush"}
        told = [data for _, data in sent if "hush-hush" in str(data)]
        assert told == [{"method": "custom", "content": answer}]
        panel.address._handle_custom_msg({"kind": "copy", "what": "openai", "for": "me"}, [])
        cell = sent[-1][1]["content"]["text"]
        assert "key = panel.manager.reveal_api_key()\nfrom openai import" in cell
        assert f'base_url="{panel.manager.base_url}"' in cell
        assert "hush-hush" not in str(embed_data([panel]))
        assert "hush-hush" not in panel._repr_html_()
        panel.manager.stop().wait(60)
        panel.address._handle_custom_msg({"kind": "copy", "what": "openai", "for": "me"}, [])
        assert "'problem': 'The server is STOPPED. Start it" in str(sent)
    finally:
        panel.close()


def test_an_exported_notebook_shows_how_it_was(panel: ControlPanel) -> None:
    data, _ = DisplayFormatter().format(panel)
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "<b>kitty_nb</b> · Not running · two.gguf<br>" in data["text/html"]
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    data, _ = DisplayFormatter().format(panel)
    assert f"Ready · two.gguf · {panel.manager.state.endpoint}<br>" in data["text/html"]


def test_a_flood_of_log_lines_grows_nothing(
    misbehaving_panel: Callable[..., ControlPanel],
) -> None:
    """A hundred thousand lines a second for five seconds: fifty megabytes."""
    panel = misbehaving_panel("--flood", "100000", log_max_mb=5, log_keep=2)
    me, log = psutil.Process(), panel.manager.state.config.log_path
    wait_for(panel, "Not running")
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    before, until = me.memory_info().rss, time.monotonic() + 5
    largest = written = last = 0
    # The later a busy machine rotates the log, the more is kept: but ever less of all of it.
    while time.monotonic() < until or written < 1.3 * largest:
        assert time.monotonic() < until + 60, f"{largest:,} of {written:,} bytes are kept"
        sizes: dict[str, int] = {}
        for file in log.parent.glob("*.log*"):
            with suppress(FileNotFoundError):  # it has just been put aside
                sizes[file.name] = file.stat().st_size
        largest = max(largest, sum(sizes.values()))
        now = sizes[log.name]
        written, last = written + (now - last if now >= last else now), now
        time.sleep(0.1)
    assert me.memory_info().rss - before < 40e6
    eventually(previous(log, 2).exists)
    assert not previous(log, 3).exists()
    assert len(panel.server_log.lines) <= LINES_KEPT
    assert len(json.dumps(embed_data([panel]), default=repr)) < 1e6
    assert panel.manager.state.status is ServerStatus.READY
    panel.buttons.stop.click()
    eventually(lambda: panel.manager.state.status is ServerStatus.STOPPED, within=10)
    assert any("flood" in line for line in panel.server_log.lines)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_server_open_to_the_network_is_marked(
    misbehaving_panel: Callable[..., ControlPanel], host: str
) -> None:
    def marked(host: str) -> bool:
        panel = misbehaving_panel(host=host)
        wait_for(panel, "Not running")
        return "open to the network" in panel.status_line.value

    assert marked(host)
    assert not marked("::1")
    assert not marked("localhost")


def test_a_model_is_picked_started_switched_and_stopped(panel: ControlPanel) -> None:
    assert repr(panel) == "ControlPanel(profile='primary')"
    wait_for(panel, "Not running")
    assert panel.picker.model
    assert panel.picker.model.name == "two.gguf"
    eventually(lambda: offered(panel) == {"Start"})
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    eventually(lambda: offered(panel) == {"Stop"})
    state = panel.manager.state
    panel.details.selected_index = 0
    eventually(lambda: f"<dd>{state.pid}</dd>" in panel.details.server.value)
    assert panel.load_bar.layout.display == "none"
    assert panel.activity_log.lines[0] == "Server starting…"
    eventually(lambda: any("model loaded" in line for line in panel.server_log.lines))
    choose(panel, "one.gguf")
    eventually(lambda: offered(panel) == {"Switch", "Stop"})
    panel.buttons.start.click()
    eventually(
        lambda: "<b>one</b>" in panel.status_line.value and "Ready" in panel.status_line.value,
        within=30,
    )
    assert panel.manager.state.restart_count == 1
    panel.buttons.stop.click()
    wait_for(panel, "Not running")
    eventually(lambda: offered(panel) == {"Start"})
    assert panel.load_bar.bar.value == 0


def test_the_choice_is_saved_as_the_defaults(panel: ControlPanel, env: Path) -> None:
    before = env.read_text()
    choose(panel, "one.gguf")
    panel.settings.fields["context_size"].value = "1024"
    panel.settings.save.click()
    eventually(lambda: any("LLAMACPP_PRIMARY_CTX" in line for line in panel.activity_log.lines))
    folder = platformdirs.user_state_path("kitty_nb") / "env-backups"
    backup = next(folder.glob(f"{env.parent.name}-*.backup-*"))
    assert backup.read_text() == before
    assert any(str(backup) in line for line in panel.activity_log.lines)
    saved = before.replace("two.gguf", "one.gguf") + "LLAMACPP_PRIMARY_CTX=1024\n"
    assert env.read_text() == saved
    assert (str(backup) in panel.saved.value, panel.saved.layout.display) == (True, None)
    panel.settings.fields["threads"].value = ""
    assert panel.saved.layout.display == "none"
    panel.settings.save.click()
    eventually(lambda: "Clear it in the file" in panel.notice.value)
    assert env.read_text() == saved
    panel.settings.fields["threads"].value = "none"
    panel.settings.save.click()
    eventually(lambda: "a number of threads" in panel.notice.value)


def test_the_fields_are_what_the_server_is_started_with(panel: ControlPanel) -> None:
    fields = panel.settings.fields
    assert (fields["context_size"].value, fields["threads"].value) == ("512", "1")
    fields["context_size"].value = "1024"
    fields["parallel"].value = "2"
    assert panel.settings.summary == "context 1024 · 1 thread · 2 slots"
    fields["threads"].value = ""
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    config = panel.manager.state.config
    assert (config.context_size, config.parallel, config.threads) == (1024, 2, None)
    panel.details.selected_index = 0
    eventually(lambda: "0 of 2 busy" in panel.details.server.value)
    assert offered(panel) == {"Stop"}
    fields["context_size"].value = "2048"
    eventually(lambda: offered(panel) == {"Restart", "Stop"})
    panel.buttons.restart.click()
    eventually(
        lambda: (
            panel.manager.state.config.context_size == 2048
            and panel.manager.state.status is ServerStatus.READY
        ),
        within=30,
    )


def test_a_wrong_field_is_explained_and_nothing_is_started(panel: ControlPanel) -> None:
    panel.settings.fields["context_size"].value = "a lot"
    panel.buttons.start.click()
    eventually(lambda: "context_size=&#x27;a lot&#x27;" in panel.notice.value)
    assert panel.manager.state.status is ServerStatus.STOPPED
    panel.settings.fields["context_size"].value = "512"
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    eventually(lambda: panel.notice.layout.display == "none")


def test_trouble_that_is_over_is_not_shown_any_more(panel: ControlPanel) -> None:
    def refused() -> None:
        panel.settings.fields["context_size"].value = "a lot"
        panel.buttons.start.click()
        eventually(lambda: "a lot" in panel.notice.value)

    def forgotten() -> bool:
        return panel.notice.layout.display == "none"

    refused()
    panel.settings.fields["context_size"].value = "512"
    eventually(forgotten)
    refused()
    choose(panel, "one.gguf")
    eventually(forgotten)
    refused()
    panel.manager.start().wait(30)
    eventually(forgotten)


def test_memory_is_previewed_and_what_will_not_fit_is_asked_for_twice(panel: ControlPanel) -> None:
    eventually(lambda: "fits" in panel.memory.value)
    panel.settings.fields["context_size"].value = "2000000000"
    eventually(lambda: "will not fit" in panel.memory.value)
    panel.buttons.start.click()
    eventually(lambda: "Start anyway" in offered(panel))
    eventually(lambda: "Not enough memory" in panel.notice.value)
    assert panel.manager.state.status is ServerStatus.STOPPED
    panel.buttons.anyway.click()
    eventually(lambda: panel.manager.state.status is not ServerStatus.STOPPED)
    panel.manager.stop(force=True).wait(10)
    panel.settings.fields["context_size"].value = "512"
    eventually(lambda: "will not fit" not in panel.memory.value)
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    panel.manager.stop().wait(10)
    panel.settings.fields["context_size"].value = "2000000000"
    panel.buttons.start.click()  # what was insisted on before is asked for again
    eventually(lambda: "Start anyway" in offered(panel))
    assert panel.manager.state.status is ServerStatus.STOPPED


def test_a_second_press_insists_once_the_refusal_has_been_seen(
    panel: ControlPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, refusals = 100.0, count(1)

    async def why_not(*_: object) -> str:
        return f"Refusal {next(refusals)}."

    monkeypatch.setattr(forecast.Forecaster, "why_not", why_not)
    monkeypatch.setattr(session, "monotonic", lambda: now)
    panel.buttons.start.click()
    eventually(lambda: "Refusal 1" in panel.notice.value)
    panel.buttons.start.click()
    eventually(lambda: "Refusal 2" in panel.notice.value)
    assert panel.manager.state.status is ServerStatus.STOPPED
    now += 10
    panel.buttons.start.click()
    wait_for(panel, "Ready")


def test_memory_is_asked_for_afresh_by_each_start(
    panel: ControlPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    eventually(lambda: "fits" in panel.memory.value)
    panel.settings.fields["context_size"].value = "2000000000"
    panel.buttons.start.click()  # before the line can say so
    eventually(lambda: "Start anyway" in offered(panel))
    panel.settings.fields["context_size"].value = "512"
    panel.buttons.start.click()  # while the line still says that it will not fit
    wait_for(panel, "Ready")
    monkeypatch.setattr(forecast, "free_memory", lambda _: Memory(MemoryPool("RAM", 1, 1, 0)))
    panel.buttons.restart.click()
    eventually(lambda: "Start anyway" in offered(panel))
    assert panel.manager.state.restart_count == 0


def test_a_stop_calls_off_a_start_that_still_asks_for_memory(
    panel: ControlPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    asked, answer = threading.Event(), threading.Event()

    def slow(*_: object) -> Memory:
        asked.set()
        assert answer.wait(10)
        return Memory(MemoryPool("RAM", 10**9, 10**9, 0))

    monkeypatch.setattr(forecast, "free_memory", slow)
    panel.buttons.restart.click()
    eventually(asked.is_set)
    panel.buttons.stop.click()
    answer.set()
    wait_for(panel, "Not running")
    panel.manager.preview_memory().wait(20)  # takes longer than what was called off
    assert panel.manager.state.status is ServerStatus.STOPPED


def test_memory_is_looked_at_again_when_the_server_is_ready_and_when_it_is_stopped(
    panel: ControlPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free_memory(pid: int | None) -> Memory:
        return Memory(MemoryPool("RAM", 10**12, 10**12, 10**9 if pid else 0))

    monkeypatch.setattr(forecast, "free_memory", free_memory)
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    eventually(lambda: "released by the running server" in panel.memory.value)
    panel.buttons.stop.click()
    wait_for(panel, "Not running")
    eventually(lambda: "fits" in panel.memory.value and "released by" not in panel.memory.value)


def test_incomplete_models_are_listed_but_not_startable(panel: ControlPanel) -> None:
    eventually(lambda: any("incomplete (1 of 2 shards missing)" in one for one in listed(panel)))
    choose(panel, "part-00001-of-00002.gguf")
    eventually(lambda: offered(panel) == set())
    eventually(lambda: "part-00002-of-00002.gguf" in panel.notice.value)


def test_models_of_one_name_are_told_apart_and_one_elsewhere_is_listed(
    env: Path, demo_model: Path
) -> None:
    (env.parent / "models" / "again").mkdir()
    shutil.copy(demo_model, env.parent / "models" / "again" / "two.gguf")
    text = env.read_text().replace("two.gguf", str(demo_model))
    env.write_text(f"{text}LLAMACPP_ALLOW_ABSOLUTE_PATHS=1\n")
    panel = ControlPanel(env)
    try:
        eventually(lambda: panel.picker.model)
        assert panel.picker.model
        assert panel.picker.model.path == demo_model

        def twos() -> list[str]:
            return [label for label in listed(panel) if label.startswith("two")]

        eventually(lambda: len(twos()) == 2)
        assert [label.rpartition(" · ")[2] for label in twos()] == ["again/two.gguf", "two.gguf"]
    finally:
        panel.close()


def test_rescan_finds_models_and_reads_the_env_again(panel: ControlPanel, env: Path) -> None:
    write_demo_model(env.parent / "models" / "three.gguf")
    env.write_text(env.read_text() + "LLAMACPP_STALL_SECONDS=7\n")
    panel.picker.rescan.click()
    eventually(lambda: any(label.startswith("three") for label in listed(panel)))
    assert panel.picker.model
    assert panel.picker.model.name == "two.gguf"
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    assert panel.manager.state.config.stall_seconds == 7


def test_what_is_corrected_in_the_env_is_used_and_what_is_edited_stays(env: Path) -> None:
    right = env.read_text() + "LLAMACPP_PARALLEL=1\n"
    wrong = right.replace("two.gguf", "tow.gguf").replace("_CTX=512", "_CTX=51z")
    env.write_text(wrong)
    panel = ControlPanel(env)
    fields = panel.settings.fields
    try:
        eventually(lambda: "LLAMACPP_CTX" in panel.notice.value)
        eventually(lambda: panel.picker.model)
        assert panel.picker.model.name == "one.gguf"
        fields["threads"].value = "2"
        env.write_text(right.replace("PARALLEL=1", "PARALLEL=3\nLLAMACPP_FLASH_ATTN=on"))
        panel.picker.rescan.click()
        eventually(lambda: panel.notice.layout.display == "none")
        values = {name: field.value for name, field in fields.items()}
        assert values == {
            "context_size": "512",
            "n_gpu_layers": "",
            "threads": "2",
            "batch_size": "",
            "parallel": "3",
            "flash_attention": "on",
            "speculation": "",
        }
        eventually(lambda: panel.picker.model and panel.picker.model.name == "two.gguf")
        choose(panel, "one.gguf")
        panel.picker.rescan.click()
        panel.settings.save.click()
        saved = ServerConfig.from_env(env)
        assert saved.model == env.parent / "models" / "one.gguf"
        assert (saved.context_size, saved.threads, saved.parallel) == (512, 2, 3)
        env.write_text(env.read_text().replace("one.gguf", "two.gguf"))
        panel.picker.rescan.click()
        eventually(lambda: panel.picker.model and panel.picker.model.name == "two.gguf")
    finally:
        panel.close()


def test_what_a_panel_is_told_to_use_stays_when_the_env_is_read_again(
    panel: ControlPanel, env: Path
) -> None:
    panel.use(model="one.gguf", context_size=1024)
    panel.picker.rescan.click()
    eventually(lambda: panel.picker.model and panel.picker.model.name == "one.gguf")
    assert panel.settings.fields["context_size"].value == "1024"
    panel.settings.fields["context_size"].value = "512"
    env.write_text("not a setting\n")
    panel.picker.rescan.click()
    eventually(lambda: "not KEY=value" in panel.notice.value)
    assert panel.settings.fields["context_size"].value == "512"


def test_a_wrong_env_is_explained_and_another_model_can_be_started(env: Path) -> None:
    env.write_text(env.read_text().replace("two.gguf", "gone.gguf") + "LLAMACPP_TOP_P=7\n")
    panel = ControlPanel(env)
    try:
        eventually(lambda: "LLAMACPP_PRIMARY_MODEL" in panel.notice.value)
        assert "LLAMACPP_TOP_P" in panel.notice.value
        choose(panel, "one.gguf")
        panel.buttons.start.click()
        wait_for(panel, "Ready")
    finally:
        panel.close()


def test_an_empty_models_folder_gets_a_demo_model(env: Path) -> None:
    shutil.rmtree(env.parent / "models")
    (env.parent / "models").mkdir()
    (env.parent / "models" / ".DS_Store").touch()
    env.write_text(env.read_text().replace("two.gguf", ""))
    panel = ControlPanel(env)
    try:
        eventually(lambda: panel.picker.model)
        assert panel.picker.model
        assert panel.picker.model.name == "kitty-demo.gguf"
        eventually(lambda: any("demo model" in line for line in panel.activity_log.lines))
    finally:
        panel.close()


def test_a_models_folder_that_is_a_file_is_explained(env: Path) -> None:
    shutil.rmtree(env.parent / "models")
    (env.parent / "models").touch()
    env.write_text(env.read_text().replace("two.gguf", ""))
    panel = ControlPanel(env)
    try:
        eventually(lambda: "(Not a directory)" in panel.notice.value)
    finally:
        panel.close()


def test_a_missing_models_folder_is_not_made_up(env: Path) -> None:
    shutil.rmtree(env.parent / "models")
    env.write_text(env.read_text().replace("two.gguf", ""))
    panel = ControlPanel(env)
    try:
        eventually(lambda: "does not exist" in panel.notice.value)
        assert not (env.parent / "models").exists()
    finally:
        panel.close()


def test_running_the_cell_again_shows_the_same_server(env: Path) -> None:
    first = ControlPanel(env)
    eventually(lambda: first.picker.model)
    first.buttons.start.click()
    wait_for(first, "Ready")
    second = ControlPanel(env)
    try:
        assert second.manager is first.manager
        wait_for(second, "Ready")
        first.close()
        assert second.manager.state.status is ServerStatus.READY
    finally:
        second.close()
    assert second.manager.state.status is ServerStatus.STOPPED


def test_what_runs_is_chosen_by_a_panel_that_finds_it(env: Path) -> None:
    """As after the kernel was restarted: `.env` names another model and context."""
    elsewhere = ModelManager(env)
    config = elsewhere.state.config.replace(model="one.gguf", context_size=768, threads=2)
    elsewhere.start(config).wait(30)
    try:
        for _ in range(2):  # and when the cell is run again
            panel = ControlPanel(env)
            wait_for(panel, "Ready")
            assert panel.picker.model
            assert panel.picker.model.name == "one.gguf"
            fields = panel.settings.fields
            assert (fields["context_size"].value, fields["threads"].value) == ("768", "2")
            eventually(lambda shown=panel: offered(shown) == {"Stop"})
        panel.buttons.restart.click()
        eventually(lambda: panel.manager.state.restart_count == 1)
        eventually(lambda: panel.manager.state.status is ServerStatus.READY)
        wait_for(panel, "Ready")
        config = panel.manager.state.config
        assert (config.model, config.context_size, config.threads) == (
            *(env.parent / "models" / "one.gguf", 768),
            2,
        )
        panel.close()
    finally:
        elsewhere.close()


def test_what_somebody_else_starts_is_chosen_unless_something_was_edited(
    panel: ControlPanel,
) -> None:
    fields, config = panel.settings.fields, panel.manager.state.config
    panel.manager.start(config.replace(model="one.gguf", context_size=768)).wait(30)
    eventually(lambda: panel.picker.model and panel.picker.model.name == "one.gguf")
    eventually(lambda: offered(panel) == {"Stop"})
    assert fields["context_size"].value == "768"
    fields["threads"].value = "2"
    panel.manager.restart(config.replace(parallel=2)).wait(30)
    wait_for(panel, "Ready")
    eventually(lambda: offered(panel) == {"Switch", "Stop"})
    assert (fields["threads"].value, fields["parallel"].value) == ("2", "")


def test_a_complaint_about_the_env_stays_where_a_server_is_found(env: Path) -> None:
    with ModelManager(env) as elsewhere:
        elsewhere.start(elsewhere.state.config.replace(model="one.gguf")).wait(30)
        env.write_text(f"{env.read_text()}LLAMACPP_TOP_P=7\n")
        panel = ControlPanel(env)
        eventually(lambda: "LLAMACPP_TOP_P" in panel.notice.value)
        assert panel.picker.model
        assert panel.picker.model.name == "one.gguf"
        panel.close()


def test_running_the_cell_again_leaves_one_panel(
    sent: list[tuple[str, dict[str, object]]], env: Path
) -> None:
    panel = ControlPanel(env)
    beside = ControlPanel(manager=panel.manager)
    before = set(ipywidgets.widgets.widget._instances)
    for _ in range(9):
        earlier, panel = panel, ControlPanel(env)
        assert earlier.comm is None
    try:
        assert len(ipywidgets.widgets.widget._instances) == len(before)
        eventually(lambda: panel.picker.model)
        panel.buttons.start.click()
        wait_for(panel, "Ready")
        wait_for(beside, "Ready")
        sent.clear()
        seconds = 2
        threading.Event().wait(seconds)  # the measured span itself, not a wait for something
        assert len(sent) <= 2 * 20 * seconds
        beside.close()
        told = panel.activity_log.lines
        assert any("Model loaded" in line for line in told)
        panel = ControlPanel(env)
        eventually(lambda: panel.activity_log.lines == told)
    finally:
        panel.close()


def test_close_leaves_no_widget_thread_or_process(env: Path) -> None:
    before = set(ipywidgets.widgets.widget._instances), set(threading.enumerate())
    panel = ControlPanel(env)
    eventually(lambda: panel.picker.model)
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    pid = panel.manager.state.pid
    assert pid
    panel.close()
    panel.close()
    assert set(ipywidgets.widgets.widget._instances) == before[0]
    assert {t for t in threading.enumerate() if t.name == "kitty_nb"} <= before[1]
    assert not psutil.pid_exists(pid)


def test_a_panel_on_a_given_manager_leaves_it_running(config: ServerConfig) -> None:
    with ModelManager(config=config) as manager:
        panel = ControlPanel(manager=manager)
        eventually(lambda: panel.picker.model)
        panel.buttons.start.click()
        wait_for(panel, "Ready")
        panel.close()
        assert manager.state.status is ServerStatus.READY


def test_a_panel_on_a_given_manager_reads_and_saves_the_managers_env(
    env: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = env.rename(env.with_name("my.env"))
    other = "LLAMACPP_THREADS=7\n"
    env.write_text(other)
    monkeypatch.chdir(env.parent)
    with ModelManager(own) as manager:
        panel = ControlPanel(manager=manager)
        own.write_text(own.read_text().replace("_CTX=512", "_CTX=768"))
        panel.picker.rescan.click()
        assert panel.settings.fields["context_size"].value == "768"
        panel.settings.fields["threads"].value = "3"
        panel.settings.save.click()
        assert "LLAMACPP_PRIMARY_THREADS=3" in own.read_text()
        assert env.read_text() == other
        panel.close()


def test_what_was_changed_in_the_env_meanwhile_stays_unless_it_is_edited_here_too(
    panel: ControlPanel, env: Path
) -> None:
    beside = ControlPanel(manager=panel.manager)
    try:
        for number, one in enumerate((panel, beside, panel), 3):
            eventually(lambda one=one: one.picker.model)
            there = ServerConfig.from_env(env).replace(context_size=256 * number, batch_size=512)
            save_settings(there, env)
            for name in ("threads", "batch_size"):
                one.settings.fields[name].value = str(number)
            one.settings.save.click()
            saved = ServerConfig.from_env(env)
            assert (saved.threads, saved.batch_size) == (number, number)
            assert saved.context_size == 256 * number
            assert one.settings.fields["context_size"].value == str(256 * number)
    finally:
        beside.close()


def test_a_panel_on_the_manager_of_another_saves_to_the_same_env(env: Path) -> None:
    panel = ControlPanel(env)
    beside = ControlPanel(manager=panel.manager)
    try:
        beside.settings.fields["threads"].value = "3"
        beside.settings.save.click()
        assert "LLAMACPP_PRIMARY_THREADS=3" in env.read_text()
    finally:
        beside.close()
        panel.close()


def test_a_panel_shows_that_its_manager_was_closed(panel: ControlPanel) -> None:
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    panel.manager.close()
    assert "Not running" in panel.status_line.value
    assert panel.address.endpoint == ""
    assert panel.activity_log.lines[-1] == "Server stopped."
    panel.buttons.start.click()
    assert "This manager is closed" in panel.notice.value


def test_a_crash_is_explained(misbehaving_panel: Callable[..., ControlPanel]) -> None:
    panel = misbehaving_panel(
        *("--never-ready", "--exit-after", "0.3", "--exit-code", "1"),
        *("--last-words", "error: <script>alert(1)</script>"),
    )
    panel.buttons.start.click()
    wait_for(panel, "Crashed")
    eventually(lambda: "ended with exit code 1" in panel.notice.value)
    assert "<script>" not in panel.notice.value
    assert panel.load_bar.bar.value == 0
    assert panel._log_fold.unfolded
    eventually(lambda: offered(panel) == {"Start"})


def test_a_crash_is_mended_with_a_countdown_that_can_be_cancelled(
    misbehaving_panel: Callable[..., ControlPanel],
) -> None:
    panel = misbehaving_panel(restart_delay_seconds=30)
    seen: list[int] = []

    def note(_change: object) -> None:
        if found := re.search(r"in (\d+) s", panel.status_line.value):
            seen.append(int(found[1]))

    panel.status_line.observe(note, names="value")
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    psutil.Process(panel.manager.state.pid).send_signal(signal.SIGSEGV)
    wait_for(panel, "Restarting")
    eventually(lambda: "in " in panel.status_line.value)
    eventually(lambda: "SIGSEGV" in panel.notice.value, why=panel.notice.value)
    assert "tart it again" not in panel.notice.value
    assert panel.load_bar.text.value == "waiting before the restart"
    assert panel.load_bar.bar.value > 0
    eventually(lambda: offered(panel) == {"Restart now", "Cancel"})
    eventually(lambda: "fits" in panel.memory.value and "released by" not in panel.memory.value)
    eventually(lambda: len(set(seen)) >= 5)
    assert seen == sorted(seen, reverse=True)
    assert max(seen) - min(seen) < 10  # a busy machine skips one
    assert panel._log_fold.unfolded
    panel.buttons.cancel.click()
    wait_for(panel, "Not running")
    eventually(lambda: not panel._log_fold.unfolded)


def test_stop_works_during_a_load(misbehaving_panel: Callable[..., ControlPanel]) -> None:
    panel = misbehaving_panel("--never-ready")
    panel.buttons.start.click()
    wait_for(panel, "Loading")
    eventually(lambda: offered(panel) == {"Stop"})
    panel.buttons.stop.click()
    wait_for(panel, "Not running")


def test_a_flood_of_log_lines_sends_few_messages(
    sent: list[tuple[str, dict[str, object]]], misbehaving_panel: Callable[..., ControlPanel]
) -> None:
    panel = misbehaving_panel("--chatter", "4000")
    saved_before = len(str(panel.get_manager_state()))
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    sent.clear()
    seconds = 3
    threading.Event().wait(seconds)  # the measured span itself, not a wait for something
    assert len(sent) <= 20 * seconds
    assert len(panel.server_log.lines) == LINES_KEPT
    lines = [
        content["lines"]
        for _, data in sent
        if isinstance(content := data.get("content"), dict) and content["kind"] == "lines"
    ]
    assert sum(len(batch) for batch in lines if isinstance(batch, list)) > 1000
    assert len(str(panel.get_manager_state())) < saved_before + 10_000


def test_a_page_that_opens_later_gets_the_log(
    sent: list[tuple[str, dict[str, object]]], misbehaving_panel: Callable[..., ControlPanel]
) -> None:
    panel = misbehaving_panel()
    panel.buttons.start.click()
    wait_for(panel, "Ready")
    eventually(lambda: any("listening" in line for line in panel.server_log.lines))
    sent.clear()
    panel.server_log._handle_custom_msg({"kind": "replay"}, [])

    def replayed() -> bool:
        return any(
            isinstance(content := data.get("content"), dict)
            and content["kind"] == "lines"
            and content["lines"] == list(panel.server_log.lines)
            for _, data in sent
        )

    eventually(replayed)


@pytest.mark.parametrize(
    ("status", "startable", "differs", "expected"),
    [
        (ServerStatus.STOPPED, True, True, Choices(True, False, False, False)),
        (ServerStatus.STOPPED, False, False, Choices(False, False, False, False)),
        (ServerStatus.LOADING, True, False, Choices(False, True, False, False)),
        (ServerStatus.READY, True, True, Choices(True, True, False, True)),
        (ServerStatus.READY, False, True, Choices(False, True, False, False)),
        (ServerStatus.STOPPING, True, True, Choices(False, False, False, False)),
        (ServerStatus.CRASHED, True, False, Choices(True, False, False, False)),
        (ServerStatus.RESTARTING, True, False, Choices(True, True, False, False)),
    ],
)
def test_buttons_are_offered_where_they_make_sense(
    status: ServerStatus, startable: bool, differs: bool, expected: Choices
) -> None:
    state = ServerState(status, ServerConfig())
    assert choices(state, startable=startable, other_model=differs) == expected


def test_a_restart_is_offered_where_it_would_change_something() -> None:
    hangs = HealthCheckResult(ServerStatus.STARTING, message="no answer")
    ready = ServerState(ServerStatus.READY, ServerConfig(), ready_since=time.monotonic())
    same = choices(ready, startable=True, other_model=False)
    assert (same.restart, same.stop) == (False, True)
    assert choices(ready, startable=True, other_model=False, other_settings=True).restart
    hanging = replace(ready, last_health_check=hangs)
    assert choices(hanging, startable=True, other_model=False).restart


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (12.3, "12 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "up 0 s"), (59, "up 59 s"), (185, "up 3 min"), (7500, "up 2 h 05 min")],
)
def test_the_first_line_rarely_moves_as_the_server_stays_up(seconds: float, text: str) -> None:
    since = time.monotonic() - seconds
    assert [*vitals(ServerState(ServerStatus.READY, ServerConfig(), ready_since=since))] == [text]


def test_the_line_beside_the_bar() -> None:
    assert describe_load(LoadProgress(Stage.LOADING, 0.431, 12.0, 16.2)) == (
        "loading weights · 43 % · 12 s · about 16 s left"
    )
    assert describe_load(LoadProgress(Stage.STARTING, 0.0, 0.0)) == "starting · 0 % · 0.0 s"
    assert describe_load(LoadProgress(Stage.READY, 1.0, 31.4, 0.0)) == "ready · loaded in 31 s"


def test_messages_stay_on_the_subshell_where_the_kernel_offers_it() -> None:
    class Routed:
        def _reply_subshell_for(self, data: object, default: str) -> str | None:
            return None

    class Widget:
        def __init__(self, comm: object) -> None:
            self.comm = comm

    routed, plain = Widget(Routed()), Widget(object())
    receive_while_busy([routed, plain])  # type: ignore[list-item]
    assert routed.comm._reply_subshell_for({}, "subshell-1") == "subshell-1"  # type: ignore[attr-defined]
    assert not hasattr(plain.comm, "_reply_subshell_for")


def test_a_closed_panel_is_freed(env: Path) -> None:
    def opened_and_closed() -> list[weakref.ref[object]]:
        panel = ControlPanel(env)
        eventually(lambda: panel.picker.model)
        panel.close()
        return [weakref.ref(one) for one in (panel, panel.manager, *panel.children)]

    left = opened_and_closed()

    def freed() -> bool:
        gc.collect()
        return not any(ref() for ref in left)

    eventually(freed, why="something holds it")


def test_a_panel_that_cannot_be_kept_current_says_so(
    panel: ControlPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a widget that is gone")

    monkeypatch.setattr(panel.load_bar, "show", fail)
    panel.manager.start().wait(30)

    eventually(lambda: "a widget that is gone" in panel.notice.value)


def test_of_two_searches_at_once_only_the_latest_goes_on() -> None:
    searches: list[threading.Event] = []  # set when they are cancelled
    second = threading.Thread(target=lambda: picker.scan(Mock()))

    def run(*_: object) -> Any:
        searches.append(cancelled := threading.Event())
        if len(searches) == 1:
            second.start()
            second.join(0.2)  # while the first is being begun
        return SimpleNamespace(cancel=cancelled.set)

    picker = ModelPicker(Mock(run=run), int, int)
    picker.scan(Mock())
    second.join()
    assert [search.is_set() for search in searches] == [True, False]
