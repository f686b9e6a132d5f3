"""Choosing a model: a list that fills and changes by itself, and does not move what is chosen."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import busy, eventually
from ipywidgets.embed import embed_data
from model_files import write_header, write_model

from kitty_nb import ControlPanel, ServerStatus, write_demo_model
from kitty_nb.catalog import catalog
from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.model import FileFacts, Model, ModelNote
from kitty_nb.catalog.stores import Store, StoreKind
from kitty_nb.widgets import models as picking
from kitty_nb.widgets.display import Choice
from kitty_nb.widgets.models import table_rows
from kitty_nb.widgets.server_view import model_facts


@pytest.fixture
def env(tmp_path: Path, free_port: int) -> Path:
    (tmp_path / "models").mkdir()
    for name in ("bear", "cat"):
        write_model(tmp_path / "models" / f"{name}.gguf", layers=1, vocabulary=300)
    path = tmp_path / ".env"
    path.write_text(
        "LLAMACPP_MODELS_DIR=models\nLLAMACPP_LOG_DIR=logs\nLLAMACPP_HISTORY=history.sqlite3\n"
        f"LLAMACPP_PORT={free_port}\nLLAMACPP_CTX=512\nLLAMACPP_THREADS=1\n"
    )
    return path


@pytest.fixture
def panel(env: Path) -> Iterator[ControlPanel]:
    panel = ControlPanel(env)
    yield panel
    panel.close()


def listed(panel: ControlPanel) -> list[str]:
    return [label.partition(" · ")[0] for label, _ in panel.picker.dropdown.options]


def chosen(panel: ControlPanel) -> str | None:
    return panel.picker.model.name if panel.picker.model else None


def choose(panel: ControlPanel, name: str) -> None:
    """As a page does it."""
    names = [model.name for model in panel.picker.models]
    panel.picker.dropdown.set_state({"index": names.index(name)})


def test_the_list_follows_the_folder_and_the_choice_stays(panel: ControlPanel, env: Path) -> None:
    models = env.parent / "models"
    eventually(lambda: listed(panel) == ["bear", "cat"])
    choose(panel, "cat.gguf")
    write_header(env.parent / "ant.gguf")
    (env.parent / "ant.gguf").rename(models / "ant.gguf")
    eventually(lambda: listed(panel) == ["ant", "bear", "cat"], within=60)
    eventually(lambda: chosen(panel) == "cat.gguf")
    (models / "cat.gguf").rename(env.parent / "cat.gguf")
    eventually(lambda: listed(panel) == ["ant", "bear"], within=60)
    eventually(lambda: chosen(panel) is None)
    eventually(lambda: panel.buttons.start.disabled)
    (env.parent / "cat.gguf").rename(models / "cat.gguf")
    eventually(lambda: chosen(panel) == "cat.gguf", within=60)


def test_a_long_search_goes_on_behind_the_panel(env: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picking, "_PATIENCE", 0)
    for number in range(30):
        write_header(env.parent / "models" / f"a{number:02}.gguf")
    env.write_text(env.read_text() + "LLAMACPP_PRIMARY_MODEL=cat.gguf\n")
    panel = ControlPanel(env)
    try:
        eventually(lambda: len(listed(panel)) == 32, within=30)
        eventually(lambda: chosen(panel) == "cat.gguf")
        eventually(lambda: panel.picker.scan_line.layout.display == "none")
    finally:
        panel.close()


def test_a_search_that_fails_within_says_so(env: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("<no number>")

    monkeypatch.setattr(ModelCatalog, "steps", fail)
    panel = ControlPanel(env)
    eventually(lambda: "&lt;no number&gt;" in panel.picker.scan_line.value)
    assert panel.choice.model is None  # nothing is waited for
    panel.close()


def test_of_two_panels_on_one_manager_the_later_watches(env: Path) -> None:
    first = ControlPanel(env)
    second = ControlPanel(manager=first.manager)
    try:
        write_header(env.parent / "models" / "ant.gguf")
        eventually(lambda: "ant" in listed(second), within=60)
        assert "ant" not in listed(first)
        downloaded = write_header(env.parent / "models" / "bee.gguf")
        first.picker.choose(downloaded)
        assert first.picker.dropdown.value == downloaded
        assert first.picker.stores
        first.rescan()
        eventually(lambda: "ant" in listed(first), within=30)
    finally:
        first.close()
        second.close()


def test_a_second_panel_leaves_the_first_one_its_search_and_its_watch(
    env: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picking, "_PATIENCE", 0)
    readable, read = threading.Event(), catalog.read_facts

    def slowly(path: Path) -> FileFacts:
        readable.wait(60)
        return read(path)

    monkeypatch.setattr(catalog, "read_facts", slowly)
    first = ControlPanel(env)
    second = ControlPanel(manager=first.manager)
    try:
        readable.set()
        eventually(lambda: listed(second) == ["bear", "cat"])
        eventually(lambda: listed(first) == ["bear", "cat"], within=20)
        eventually(lambda: not first.buttons.start.disabled)
        second.close()
        write_header(env.parent / "models" / "ant.gguf")
        eventually(lambda: "ant" in listed(first))
    finally:
        first.close()
        second.close()


def test_a_program_ends_that_forgot_its_panel(env: Path) -> None:
    code = f"from kitty_nb import ControlPanel; panel = ControlPanel({str(env)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_model_elsewhere_is_listed_too(env: Path, tmp_path: Path) -> None:
    elsewhere = write_demo_model(tmp_path / "elsewhere.gguf")
    env.write_text(
        f"{env.read_text()}LLAMACPP_PRIMARY_MODEL={elsewhere}\nLLAMACPP_ALLOW_ABSOLUTE_PATHS=1\n"
    )
    panel = ControlPanel(env)
    try:
        eventually(lambda: listed(panel) == ["elsewhere", "bear", "cat"])
        eventually(lambda: chosen(panel) == str(elsewhere))
    finally:
        panel.close()


def test_a_model_elsewhere_that_is_chosen_stays_when_the_folder_changes(
    env: Path, tmp_path: Path
) -> None:
    elsewhere = write_demo_model(tmp_path / "elsewhere.gguf")
    env.write_text(f"{env.read_text()}LLAMACPP_ALLOW_ABSOLUTE_PATHS=1\n")
    panel = ControlPanel(env)
    try:
        eventually(lambda: listed(panel) == ["bear", "cat"])
        panel.use(model=elsewhere)
        write_header(env.parent / "ant.gguf")
        (env.parent / "ant.gguf").rename(env.parent / "models" / "ant.gguf")
        eventually(lambda: "ant" in listed(panel), within=60)
        assert chosen(panel) == str(elsewhere)
        panel.picker.rescan.click()
        assert chosen(panel) == str(elsewhere)
    finally:
        panel.close()


class Page:
    """The messages to a page that shows the table."""

    def __init__(self, panel: ControlPanel, sent: list[tuple[str, dict[str, object]]]) -> None:
        self._sent, self._panel, self._since = sent, panel, len(sent)
        panel.browser.selected_index = 0
        self.says(kind="replay", part="table")

    def says(self, **message: object) -> None:
        self._panel.browser.table._handle_custom_msg(message, [])

    def last(self, kind: str) -> dict[str, Any]:
        contents = [data.get("content") for _, data in self._sent[self._since :]]
        found = [c for c in contents if isinstance(c, dict) and c.get("kind") == kind]
        return found[-1] if found else {}

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.last("rows").get("rows", [])}


@pytest.fixture
def page(sent: list[tuple[str, dict[str, object]]], panel: ControlPanel) -> Page:
    return Page(panel, sent)


def test_a_row_that_is_clicked_is_chosen(page: Page, panel: ControlPanel) -> None:
    eventually(lambda: page.rows().keys() == {"bear", "cat"})
    assert chosen(panel) == "bear.gguf"
    page.says(kind="choose", id=page.rows()["cat"]["id"])
    assert chosen(panel) == "cat.gguf"
    eventually(lambda: page.last("chosen")["id"] == page.rows()["cat"]["id"])
    page.says(kind="choose", id=10_000)
    page.says(kind="nonsense")
    assert chosen(panel) == "cat.gguf"


def test_each_row_tells_whether_it_fits(page: Page, panel: ControlPanel) -> None:
    eventually(lambda: set(page.last("fits").get("fits", {}).values()) == {"fits"})
    panel.settings.fields["context_size"].value = "2000000000"
    eventually(lambda: set(page.last("fits")["fits"].values()) == {"will not fit"})


def test_a_favourite_is_remembered(page: Page, panel: ControlPanel, env: Path) -> None:
    eventually(lambda: page.rows().keys() == {"bear", "cat"})
    page.says(kind="mark", id=page.rows()["cat"]["id"], favourite=True)
    eventually(lambda: [*page.rows()] == ["cat", "bear"])
    assert page.rows()["cat"]["favourite"]
    another = ControlPanel(env)
    try:
        later = Page(another, page._sent)
        eventually(lambda: [*later.rows()] == ["cat", "bear"])
        later.says(kind="mark", id=later.rows()["cat"]["id"], favourite=False)
        eventually(lambda: [*later.rows()] == ["bear", "cat"])
    finally:
        another.close()


def test_the_settings_of_last_time_are_offered(page: Page, panel: ControlPanel, env: Path) -> None:
    write_demo_model(env.parent / "models" / "demo.gguf")
    panel.rescan()
    eventually(lambda: "demo" in listed(panel), within=30)
    choose(panel, "demo.gguf")
    fields, offer = panel.settings.fields, panel.browser.last_time
    fields["context_size"].value, fields["parallel"].value = "1024", "2"
    fields["flash_attention"].value = fields["flash_attention"].options[1][1]
    panel.buttons.start.click()
    eventually(lambda: panel.manager.state.status is ServerStatus.READY, within=60)
    eventually(lambda: (row := page.rows().get("demo")) and row["used"] and row["load"], within=60)
    assert offer.layout.display == "none"
    panel.buttons.stop.click()
    eventually(lambda: panel.manager.state.status is ServerStatus.STOPPED, within=20)
    choose(panel, "cat.gguf")
    fields["context_size"].value, fields["parallel"].value = "512", ""
    fields["flash_attention"].value = fields["flash_attention"].options[0][1]
    fields["batch_size"].value = "64"
    assert offer.layout.display == "none"
    choose(panel, "demo.gguf")
    said = "Last time: Context 1024 · Batch auto · Parallel 2 · Flash attn on"
    eventually(lambda: offer.text.value == said, why=offer.text.value)
    assert fields["context_size"].value == "512"
    offer.use.click()
    texts = {name: field.value for name, field in fields.items()}
    assert texts == {
        "context_size": "1024",
        "n_gpu_layers": "",
        "threads": "1",
        "batch_size": "",
        "parallel": "2",
        "flash_attention": "on",
        "speculation": "",
    }
    eventually(lambda: offer.layout.display == "none")


def test_a_damaged_memory_is_said_once_and_done_without(env: Path) -> None:
    history = env.parent / "history.sqlite3"
    history.write_bytes(b"not a database" * 100)
    panel = ControlPanel(env)
    try:
        complaints = lambda: [a for a in panel.activity_log.lines if "is damaged" in a]  # noqa: E731
        eventually(lambda: len(complaints()) == 1)
        panel.rescan()
        eventually(lambda: chosen(panel) == "bear.gguf")
        assert len(complaints()) == 1
    finally:
        panel.close()


def test_what_is_browsed_is_not_saved_with_the_notebook(page: Page, panel: ControlPanel) -> None:
    eventually(page.rows)
    saved = json.dumps(embed_data([panel]), default=repr)
    assert '"words"' not in saved
    assert "Trained context" not in saved
    panel.details.selected_index = 0
    eventually(lambda: "Trained context" in panel.details.model.value)


def model(path: str, **facts: Any) -> Model:
    known: dict[str, Any] = {
        "name": path.rpartition("/")[2],
        "quantization": "Q8_0",
        "size": 1000,
    }
    names = {field.name for field in fields(FileFacts)} - {"problem"}
    said = {"architecture": "llama", "context_length": 4096}
    said |= {name: facts.pop(name) for name in [*facts] if name in names}
    return Model(path=Path(path), facts=FileFacts(**said), **(known | facts))


def test_rows_come_by_family_favourites_and_last_used_first() -> None:
    alone = model("/models/alone.gguf")
    plain = model("/models/x-q4.gguf", base_model="X")
    used = model("/models/x-q8.gguf", base_model="X", problem="It is damaged.")
    pulled = model("/ollama/blobs/sha256-1", known_as="y:1b", downloading=True, problem="Not yet.")
    models = [alone, plain, used, pulled]
    notes = {
        used.path: ModelNote(last_used=100.0, load_seconds=2.0),
        pulled.path: ModelNote(favourite=True),
    }
    stores = [Store(Path("/models")), Store(Path("/ollama"), StoreKind.OLLAMA)]
    ids = {found.path: number for number, found in enumerate(models)}
    rows = table_rows(models, stores, notes, ids)
    assert [(row["family"], row["name"]) for row in rows] == [
        ("", "y:1b"),
        ("X", "x-q8"),
        ("X", "x-q4"),
        ("", "alone"),
    ]
    first, second = rows[:2]
    assert (first["store"], first["favourite"], first["state"]) == ("Ollama", True, "downloading")
    assert (second["used"], second["load"], second["state"]) == (100.0, "2.0 s", "unusable")
    assert {"x", "q8_0", "llama"} <= set(second["words"].split())


def test_details_tell_what_the_header_says(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", layers=2, heads=4, vocabulary=400, context=8192)
    (found,) = ModelCatalog(tmp_path).scan()
    facts = model_facts(found)
    assert facts["Layers"] == "2"
    assert facts["Vocabulary"] == "400 tokens"
    assert facts["Trained context"] == "8,192 tokens"
    assert facts["File"] == str(tmp_path / "m.gguf")
    assert all(facts.values())
    shards = model("/m/x-00001-of-00003.gguf", missing=("x-00002-of-00003.gguf",), shard_count=3)
    facts = model_facts(shards)
    assert facts["Shards"] == "3 files, to x-00003-of-00003.gguf"
    assert facts["Missing"] == "x-00002-of-00003.gguf"


def test_a_choice_made_while_the_list_changes_counts() -> None:
    heard: list[str] = []
    choice = Choice("list", ("Model", "Models"), heard.append)
    choice.refill(("ant", "bear"), "ant")
    click = threading.Thread(target=choice.set_state, args=({"index": 1},))

    def meanwhile(_: object) -> None:
        if click.ident is None:
            click.start()
            click.join(0.2)

    choice.observe(meanwhile, names="index")
    choice.refill(("ant", "bear", "cat"), "ant")
    click.join()
    assert heard == ["bear"]
    assert choice.value == "bear"


def test_a_choice_does_not_wait_for_the_manager(panel: ControlPanel) -> None:
    eventually(lambda: chosen(panel) == "bear.gguf")
    with busy(panel.manager):
        page = threading.Thread(target=choose, args=(panel, "cat.gguf"))
        page.start()
        page.join(10)
        assert not page.is_alive()
    assert chosen(panel) == "cat.gguf"
