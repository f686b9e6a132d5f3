"""Guessing tokens ahead, by what the context repeats or by a smaller model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from model_files import write_model

from kitty_nb import ModelManager, write_demo_model
from kitty_nb.catalog.memory import MemorySettings
from kitty_nb.catalog.resolve import can_draft, find_drafts, resolve_model
from kitty_nb.config import Speculation
from kitty_nb.errors import ConfigError
from kitty_nb.supervisor.forecast import settings_of

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from kitty_nb import ServerConfig

_TEXT = "The cat sat on the mat, the dog lay on the rug, and the bird flew to the tree."


@pytest.fixture
def family(config: ServerConfig, tmp_path: Path) -> ServerConfig:
    """A model in a folder with smaller ones, with its vocabulary and with another one."""
    folder = tmp_path / "family"
    folder.mkdir()
    model = write_model(folder / "large.gguf", layers=60, vocabulary=9000)
    write_model(folder / "middle.gguf", layers=3, vocabulary=9000)
    write_model(folder / "small.gguf", layers=1, vocabulary=9064)  # padded a little
    write_model(folder / "other.gguf", layers=1, vocabulary=9400)
    write_demo_model(folder / "demo.gguf")
    return config.replace(models_dir=folder, model=model, speculation="draft")


@pytest.mark.parametrize(
    ("written", "read"),
    [("off", "off"), ("0", "off"), ("ngram", "ngram"), ("n-gram", "ngram"), ("Draft", "draft")],
)
def test_its_names(config: ServerConfig, written: str, read: str) -> None:
    assert config.replace(speculation=written).speculation == read


def test_models_that_can_draft_are_smaller_and_have_the_vocabulary(family: ServerConfig) -> None:
    model, folder = family.require_model(), family.models_dir

    assert [path.name for path in find_drafts(model, [folder])] == ["small.gguf", "middle.gguf"]
    assert can_draft(model, model)
    assert not can_draft(folder / "demo.gguf", model)
    assert not can_draft(folder / "missing.gguf", model)


def test_the_smallest_is_taken_unless_one_is_named(family: ServerConfig) -> None:
    assert resolve_model(family).drafter == family.models_dir / "small.gguf"
    named = family.replace(draft_model="middle.gguf")
    assert resolve_model(named).drafter == family.models_dir / "middle.gguf"
    assert resolve_model(named.replace(speculation="ngram")).drafter is None
    assert resolve_model(family).replace(speculation="off").drafter is None
    assert resolve_model(family.replace(extra_args="-md middle.gguf")).drafter is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"draft_model": "demo.gguf"},
            "not known to be that of large.gguf. Choose small.gguf or middle.gguf",
        ),
        ({"draft_model": "missing.gguf"}, "There is no such file"),
        ({"model": "small.gguf"}, "No model of half its size .* LLAMACPP_SPECULATION=ngram"),
    ],
)
def test_a_draft_model_that_does_not_fit(
    family: ServerConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_model(family.replace(**change))


def test_it_counts_in_the_memory_preview(family: ServerConfig) -> None:
    off = settings_of(resolve_model(family.replace(speculation="off")))
    ngram = settings_of(resolve_model(family.replace(speculation="ngram")))
    draft = settings_of(resolve_model(family))

    assert (off.drafted, off.draft) == (0, None)
    assert (ngram.drafted, ngram.draft) == (48, None)
    assert draft.drafted == 3
    assert draft.draft is not None
    shape, settings = draft.draft
    assert len(shape.layers) == 1
    assert isinstance(settings, MemorySettings)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("speculation", [Speculation.NGRAM, Speculation.DRAFT])
def test_a_greedy_answer_is_the_same_as_without(
    real_config: ServerConfig, speculation: Speculation
) -> None:
    plain, _ = _answer(real_config.replace(speculation=Speculation.OFF))
    # Nothing smaller has its vocabulary, so it drafts for itself.
    guessed, timings = _answer(
        real_config.replace(speculation=speculation, draft_model=real_config.model)
    )

    assert guessed == plain
    assert timings["draft_n"] >= timings["draft_n_accepted"] > 10


def _answer(config: ServerConfig) -> tuple[str, dict[str, float]]:
    """A text that repeats, and what the engine measured."""
    prompt = f"{_TEXT}\n{_TEXT}\n{_TEXT}\nThe cat"
    request = {"prompt": prompt, "n_predict": 64, "temperature": 0, "ignore_eos": True}
    with ModelManager(config=config.replace(threads=1, parallel=1)) as manager:
        manager.start().wait(timeout=120)
        answer = manager.http.post("/completion", json=request, timeout=120).json()
        manager.stop().wait(timeout=30)
    return answer["content"], answer["timings"]
