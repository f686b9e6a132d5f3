"""Loads that take visible time, on the real engine, and files that change under them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import anyio
import pytest

from kitty_nb import ServerConfig, ServerStatus, Supervisor, write_demo_model
from kitty_nb.supervisor.events import LoadProgress, ProgressMade, Stage


def load(
    config: ServerConfig, during: Callable[[LoadProgress], object] | None = None
) -> list[LoadProgress]:
    """Start and stop a server; return all progress, and call back with each while it loads."""
    seen: list[LoadProgress] = []

    async def run() -> None:
        with anyio.fail_after(120):
            async with Supervisor(config) as supervisor:

                def note(event: object) -> None:
                    if isinstance(event, ProgressMade):
                        assert event.progress.fraction < 1 or (
                            supervisor.state.status is ServerStatus.READY
                        )
                        seen.append(event.progress)
                        if during:
                            during(event.progress)

                supervisor.subscribe(note)
                await supervisor.start()

    anyio.run(run)
    return seen


def is_true(progress: list[LoadProgress]) -> None:
    assert all(one.fraction <= other.fraction for one, other in pairwise(progress))
    assert progress[-1].stage is Stage.READY
    assert [p.fraction for p in progress].count(1.0) == 1


@pytest.mark.slow
def test_a_cold_load_of_a_real_model_is_followed_and_the_next_is_foreseen(
    config: ServerConfig, tmp_path: Path
) -> None:
    model = write_demo_model(tmp_path / "large.gguf", size=1_600_000_000)
    try:
        config = config.replace(model=model)
        for known in (False, True):
            if hasattr(os, "posix_fadvise"):
                with model.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            progress = load(config)
            is_true(progress)
            assert len({p.fraction for p in progress}) >= 5  # a fast disk leaves time for few
            assert Stage.LOADING in {p.stage for p in progress}
            foreseen = [p.eta for p in progress if p.fraction < 0.2 and p.eta is not None]
            assert bool(foreseen) or not known
    finally:
        model.unlink()


@pytest.mark.parametrize("change", ["vanishes", "grows", "shrinks"])
def test_a_file_that_changes_during_its_load_gives_no_false_end(
    misbehaving: Callable[..., ServerConfig], tmp_path: Path, change: str
) -> None:
    model = write_demo_model(tmp_path / "changing.gguf", size=100_000_000)
    changed: list[float] = []

    def spoil(progress: LoadProgress) -> None:
        if progress.stage is Stage.LOADING and not changed:
            changed.append(progress.fraction)
            if change == "vanishes":
                model.unlink()
            else:
                size = model.stat().st_size
                os.truncate(model, size * 2 if change == "grows" else size // 2)

    progress = load(misbehaving("--load-seconds", "2", model=model), spoil)
    assert changed
    is_true(progress)


def test_a_sparse_file_gives_no_false_end(
    misbehaving: Callable[..., ServerConfig], demo_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "sparse.gguf"
    shutil.copy(demo_model, model)
    os.truncate(model, 300_000_000)
    is_true(load(misbehaving("--load-seconds", "0.5", model=model)))
