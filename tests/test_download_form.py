from __future__ import annotations

import html
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import eventually
from hub_server import MB, ONE, SPLIT, Hub, Repo
from ipywidgets import HTML, Widget

from kitty_nb import ControlPanel, ModelManager, ServerConfig
from kitty_nb.hub import Download, Plan
from kitty_nb.widgets.download_form import DownloadForm

Make = Callable[[], tuple[DownloadForm, list[Path]]]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def make(config: ServerConfig, hub: Hub, models: Path) -> Iterator[Make]:
    with ModelManager(config=config) as manager:

        def form() -> tuple[DownloadForm, list[Path]]:
            done: list[Path] = []
            return DownloadForm(manager, lambda: models, done.append), done

        yield form
        Widget.close_all()


def look(form: DownloadForm, text: str) -> None:
    form.repository.value = text
    form.show_files.click()
    eventually(lambda: not form.choice.disabled and not form.download.disabled)


def test_a_model_is_listed_chosen_and_downloaded(make: Make, models: Path) -> None:
    form, done = make()
    assert form.selected_index is None
    assert form.download.disabled
    assert form.progress.layout.display == "none"
    look(form, f"https://huggingface.co/{ONE}")
    assert [label for label, _ in form.choice.options] == ["Q4_K_M · 3.0 MB", "Q8_0 · 5.0 MB"]
    assert "tiny-Q4_K_M.gguf · 3.0 MB" in form.files.value
    assert " free" in form.files.value
    form.choice.value = form.choice.options[1][1]
    eventually(lambda: "tiny-Q8_0.gguf" in form.files.value)
    writers: set[str] = set()
    for part in (form.bar, form.text, form.files):
        part.observe(lambda _change: writers.add(threading.current_thread().name), "value")
    form.download.click()
    eventually(lambda: done == [models / ONE / "tiny-Q8_0.gguf"])
    assert done[0].stat().st_size == 5 * MB
    eventually(lambda: form.cancel.disabled)
    assert form.bar.value == form.bar.max
    assert form.bar.bar_style == "success"
    assert form.text.value == "complete · 5.0 MB"
    assert writers == {"kitty_nb"}
    assert form.progress.layout.display is None
    form.choice.value = form.choice.options[0][1]
    eventually(lambda: form.progress.layout.display == "none")


def test_a_download_is_cancelled_and_resumed(make: Make, hub: Hub) -> None:
    form, done = make()
    hub.rate = MB / 2
    look(form, f"{ONE}:Q4_K_M")
    form.download.click()
    eventually(lambda: form.bar.value > 200)  # seconds before all of it is there
    assert "downloading · " in form.text.value
    assert form.download.disabled
    assert form.show_files.disabled
    form.cancel.click()
    eventually(lambda: form.cancel.disabled)
    assert "the downloaded part is kept" in form.text.value
    eventually(lambda: form.download.description == "Resume")
    assert "already downloaded" in form.files.value
    hub.rate = None
    hub.asked.clear()
    form.download.click()
    eventually(lambda: done)
    assert [asked.first > MB // 2 for asked in hub.asked] == [True]


@pytest.fixture
def slow_plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., threading.Event]:
    """To look for a download's files takes until a part of the form says something, or 1 s.

    The event tells that it has begun.
    """
    plan, slow = Download.plan, dict[Download, tuple[threading.Event, threading.Event]]()

    def plan_slowly(download: Download) -> Plan:
        found = plan(download)
        if download in slow:
            begun, said = slow[download]
            begun.set()
            said.wait(1)
        return found

    def wait_for(download: Download, part: HTML, text: str) -> threading.Event:
        begun, said = slow[download] = threading.Event(), threading.Event()
        part.observe(lambda change: text in change["new"] and said.set(), "value")
        return begun

    monkeypatch.setattr(Download, "plan", plan_slowly)
    return wait_for


def test_what_is_said_is_about_the_model_chosen_last(
    make: Make, hub: Hub, slow_plan: Callable[..., threading.Event]
) -> None:
    hub.repos["a/b"] = Repo({f"b-{name}.gguf": b"GGUF" for name in ("Q2_K", "Q4_K_M", "Q8_0")})
    form, _done = make()
    look(form, "a/b")
    said: list[str] = []
    form.files.observe(lambda change: said.append(change["new"]), "value")
    models = {download.variant.label: download for _, download in form.choice.options}
    begun = slow_plan(models["Q2_K"], form.files, "b-Q8_0.gguf")
    form.choice.value = models["Q2_K"]
    assert begun.wait(10)
    form.choice.value = models["Q8_0"]
    eventually(lambda: len(said) == 2)
    assert "b-Q8_0.gguf" in form.files.value


def test_a_listing_begins_when_a_cancelled_download_has_ended(
    make: Make, hub: Hub, slow_plan: Callable[..., threading.Event]
) -> None:
    form, _done = make()
    hub.rate = 2 * MB
    look(form, ONE)
    form.download.click()
    eventually(lambda: form.bar.value > 0)
    slow_plan(form.choice.value, form.notice, "a/b")
    said: list[str] = []
    form.files.observe(lambda change: said.append(change["new"]), "value")
    form.repository.value = "a/b"
    form.show_files.click()  # on a page that has not yet disabled it
    eventually(lambda: "no repository a/b" in form.notice.value and len(said) == 3)
    assert form.files.value == ""
    assert form.choice.disabled
    assert form.download.disabled


def test_shards_and_projector_are_listed(make: Make) -> None:
    form, _done = make()
    look(form, SPLIT)
    for part in ("mmproj-F16", "00001-of-00002", "00002-of-00002", "<b>600.0 kB</b>"):
        assert part in form.files.value


def test_without_the_usual_quantization_the_smallest_is_preselected(make: Make, hub: Hub) -> None:
    hub.repos["a/b"] = Repo({"b-Q8_0.gguf": b"12345678", "b-Q2_K.gguf": b"12"})
    form, _done = make()
    look(form, "a/b")
    assert form.choice.value.variant.label == "Q2_K"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("qwen", "owner/name"),
        ("a/b", "no repository a/b"),
        (f"{ONE}:F32", "has no F32. Choose one of Q4_K_M, Q8_0"),
    ],
)
def test_an_error_is_shown(make: Make, text: str, said: str) -> None:
    form, _done = make()
    form.repository.value = text
    form.show_files.click()
    eventually(lambda: said in html.unescape(form.notice.value))
    assert form.download.disabled
    assert not form.show_files.disabled


def test_a_checksum_mismatch_is_shown(make: Make, hub: Hub) -> None:
    hub.wrong = {"tiny-Q4_K_M.gguf"}
    form, done = make()
    look(form, ONE)
    form.download.click()
    eventually(lambda: "Checksum mismatch" in form.notice.value)
    eventually(lambda: form.cancel.disabled)
    assert form.text.value == "incomplete"  # nothing is kept
    assert form.bar.bar_style == "danger"
    assert not done


def test_a_model_larger_than_the_disk_cannot_be_downloaded(make: Make, hub: Hub) -> None:
    hub.repos[ONE].claimed["tiny-Q4_K_M.gguf"] = 10**18
    form, _done = make()
    form.repository.value = f"{ONE}:Q4_K_M"
    form.show_files.click()
    eventually(lambda: "more disk space" in form.files.value)
    assert " of RAM" in form.files.value
    assert form.download.disabled


def test_without_the_extra_it_says_what_to_install(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    form, _done = make()
    form.repository.value = ONE
    form.show_files.click()
    eventually(lambda: "pip install 'kitty_nb[hub]'" in html.unescape(form.notice.value))


def test_the_panel_selects_a_downloaded_model(
    tmp_path: Path, hub: Hub, demo_model: Path, free_port: int
) -> None:
    hub.repos[ONE].files["tiny-F16.gguf"] = demo_model.read_bytes()
    (tmp_path / ".env").write_text(
        "LLAMACPP_MODELS_DIR=models\nLLAMACPP_LOG_DIR=logs\nLLAMACPP_HISTORY=history.sqlite3\n"
        f"LLAMACPP_PORT={free_port}\n"
    )
    (tmp_path / "models").mkdir()
    first = ControlPanel(tmp_path / ".env")
    form = first.download
    hub.rate = 0.1 * MB  # until there is another panel to hand it to
    look(form, f"{ONE}:F16")
    form.download.click()
    eventually(lambda: not form.cancel.disabled)
    panel = ControlPanel(tmp_path / ".env")  # the cell is run again
    assert panel.download is form
    first.close()
    hub.rate = 100 * MB
    eventually(lambda: panel.picker.dropdown.value == tmp_path / "models" / ONE / "tiny-F16.gguf")
    eventually(lambda: panel.picker.model is not None and panel.picker.model.startable)
    panel.close()
    assert form.comm is None
