from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually

from kitty_nb import ModelManager, ServerConfig
from kitty_nb.catalog.memory import (
    Allocation,
    MemoryPool,
    MemoryPreview,
    MemorySettings,
    Requirement,
    Verdict,
)
from kitty_nb.engine.locate import Engine
from kitty_nb.errors import ConfigError, KittyError
from kitty_nb.supervisor import forecast
from kitty_nb.widgets.settings_form import MemoryLine, memory_sentence

GB = 10**9


def part(
    name: str = "RAM", free: int = 24 * GB, returned: int = 0, **needs: float | None
) -> Allocation:
    sizes = {"weights": 18.9, "cache": 2.1, "compute": 0.4} | needs
    given = {key: None if size is None else int(size * GB) for key, size in sizes.items()}
    return Allocation(MemoryPool(name, free, free, returned), Requirement(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preview", "sentence"),
    [
        (
            MemoryPreview((part(),), 32768, 24576),
            "Memory: needs about <b>21.4 GB</b> of 24.0 GB free for a context of 32,768 · weights"
            " 18.9 GB · KV cache 2.1 GB · compute 400 MB — <b class='kitty-good'>fits</b>; largest"
            " context that fits: 24,576",
        ),
        (
            MemoryPreview((part(weights=21.2, compute=0.0004),), 4096, 2048),
            "Memory: needs about <b>23.3 GB</b> of 24.0 GB free for a context of 4,096 · weights"
            " 21.2 GB · KV cache 2.1 GB · compute 0 MB — <b class='kitty-warn'>tight</b>; largest"
            " context that fits: 2,048",
        ),
        (
            MemoryPreview((part(free=5 * GB, returned=3 * GB),), 4096, 0),
            "Memory: needs about <b>21.4 GB</b> of 5.0 GB free (with 3.0 GB released by the"
            " running server) for a context of 4,096 · weights 18.9 GB · KV cache 2.1 GB · compute"
            " 400 MB — <b class='kitty-bad'>will not fit</b>; no context size fits",
        ),
        (
            MemoryPreview((part(cache=None, compute=None),), 4096),
            "Memory: weights <b>18.9 GB</b> of 24.0 GB free · KV cache and compute unknown — <b"
            " class='kitty-idle'>unknown</b>",
        ),
        (
            MemoryPreview(
                (part(weights=1, cache=0, compute=0.1), part("RTX <4090>", 30 * GB)), 512, 512
            ),
            "Memory: needs about <b>22.5 GB</b> for a context of 512 · weights 19.9 GB · KV cache"
            " 2.1 GB · compute 500 MB — <b class='kitty-good'>fits</b>; largest context that fits:"
            " 512<br><span class='kitty-fact'>RAM 1.1 GB of 24.0 GB free · RTX &lt;4090&gt; 21.4"
            " GB of 30.0 GB free</span>",
        ),
        (
            MemoryPreview((part("RAM (limit of this container or job: 2.0 GB)", GB),), 512, 0),
            "Memory: needs about <b>21.4 GB</b> for a context of 512 · weights 18.9 GB · KV cache"
            " 2.1 GB · compute 400 MB — <b class='kitty-bad'>will not fit</b>; no context size"
            " fits<br><span class='kitty-fact'>RAM (limit of this container or job: 2.0 GB) 21.4 GB"
            " of 1.0 GB free</span>",
        ),
        (
            MemoryPreview(problem="<b>.gguf is not there."),
            "Memory: <span class='kitty-idle'>unknown</span>. &lt;b&gt;.gguf is not there.",
        ),
    ],
    ids=["fits", "tight", "will not fit", "unknown cache", "gpu", "limit", "problem"],
)
def test_a_preview_is_one_sentence(preview: MemoryPreview, sentence: str) -> None:
    assert memory_sentence(preview) == sentence


@pytest.mark.parametrize(("count", "text"), [(0.9994, "999 MB"), (0.9996, "1.0 GB")])
def test_sizes_change_unit_without_a_gap(count: float, text: str) -> None:
    shown = MemoryPreview((part(weights=count, cache=0, compute=0),), 1, None)
    assert f"weights {text}" in memory_sentence(shown)


class Wanted:
    """The settings that the widget is to preview, or what stands in their way."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.error: KittyError | None = None

    def __call__(self) -> ServerConfig:
        if self.error:
            raise self.error
        return self.config


@pytest.fixture
def wanted(config: ServerConfig) -> Wanted:
    return Wanted(config)


@pytest.fixture
def line(wanted: Wanted) -> Iterator[MemoryLine]:
    with ModelManager(config=wanted.config) as manager:
        line = MemoryLine(manager, wanted)
        yield line
        line.stop()


def written(line: MemoryLine) -> list[tuple[Any, str]]:
    """The writes to the widget from now on, each with its thread."""
    seen: list[tuple[Any, str]] = []
    line.observe(
        lambda change: seen.append((change["new"], threading.current_thread().name)), "value"
    )
    return seen


def test_it_shows_the_chosen_model_and_hides_without_one(line: MemoryLine, wanted: Wanted) -> None:
    assert (line.value, line.layout.display, line.preview) == ("", "none", None)
    line.refresh()
    eventually(lambda: line.preview is not None)
    assert line.layout.display is None
    assert line.preview
    assert line.preview.verdict is Verdict.FITS
    assert "for a context of 512" in line.value
    assert "the model's maximum context fits: 4,096" in line.value
    wanted.error = KittyError("no")
    line.refresh()
    eventually(lambda: line.preview is None)
    eventually(lambda: line.layout.display == "none")  # written after that


def test_a_wrong_setting_is_said_where_its_memory_would_be(
    line: MemoryLine, wanted: Wanted
) -> None:
    with pytest.raises(ConfigError) as wrong:
        wanted.config.replace(context_size="lots <of>")
    wanted.error = wrong.value
    line.refresh()
    eventually(lambda: "Context “lots &lt;of&gt;”: It is not valid. Write a number" in line.value)
    assert (line.layout.display, line.preview) == (None, None)
    wanted.error = None
    line.refresh()
    eventually(lambda: "for a context of 512" in line.value)


def test_the_latest_setting_wins_and_the_managers_thread_writes(
    line: MemoryLine, wanted: Wanted
) -> None:
    seen = written(line)
    for context in (256, 512, 768, 1024):
        wanted.config = wanted.config.replace(context_size=context)
        line.refresh()
    eventually(lambda: line.preview is not None and line.preview.context == 1024)
    assert {thread for _, thread in seen} == {"kitty_nb"}


def test_a_setting_that_is_no_longer_wanted_is_not_shown_late(
    line: MemoryLine, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, settings_of = threading.Event(), threading.Event(), forecast.settings_of

    def slowly(config: ServerConfig, *engine: Engine | None) -> MemorySettings:
        if config.context_size == 256:
            begun.set()
            go_on.wait(60)
        return settings_of(config, *engine)

    monkeypatch.setattr(forecast, "settings_of", slowly)
    seen = written(line)

    def show(context: int) -> None:
        wanted.config = wanted.config.replace(context_size=context)
        line.refresh()

    show(256)
    assert begun.wait(60)
    show(512)
    eventually(lambda: line.preview is not None and line.preview.context == 512)
    go_on.set()
    show(768)
    eventually(lambda: line.preview is not None and line.preview.context == 768)
    assert not [html for html, _ in seen if "for a context of 256" in html]


def test_nothing_is_sent_when_nothing_has_changed(line: MemoryLine) -> None:
    preview = MemoryPreview((part(),), 512, 1024)
    line._show(preview)
    seen = written(line)
    line._show(MemoryPreview((part(),), 512, 1024))
    assert not seen


def test_a_closed_manager_is_no_error(wanted: Wanted) -> None:
    with ModelManager(config=wanted.config) as manager:
        line = MemoryLine(manager, wanted)
    line.refresh()
    wanted.error = KittyError("no")
    line.refresh()
    assert line.value == ""


def test_a_model_that_vanishes_is_said_in_words(
    line: MemoryLine, wanted: Wanted, tmp_path: Path
) -> None:
    wanted.config = wanted.config.model_copy(update={"model": tmp_path / "gone.gguf"})
    line.refresh()
    eventually(lambda: "gone.gguf does not exist" in line.value)
