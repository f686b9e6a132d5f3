"""Keeping a list of models current while files come and go."""

from __future__ import annotations

import math
import threading
import time
from contextlib import aclosing, closing
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from kitty_nb.catalog.folder import is_folder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Sequence
    from pathlib import Path

    from kitty_nb.catalog.catalog import ScanStep
    from kitty_nb.catalog.model import Model

__all__ = ["watch"]

_TOGETHER_MS = 500  # changes within this are one
_LOOK_MS = 30_000  # network disks do not tell, and folders can appear
_FIRST_LOOK_MS = 1_000  # what happens before the watch has begun is not told either
_POLLING_MS = 5_000  # between looks, where the system has no more watches to give


async def watch(
    folders: Sequence[Path],
    scan: Callable[[], Generator[ScanStep]],
    on_step: Callable[[ScanStep], object],
) -> AsyncGenerator[list[Model]]:
    """Yield the models at once and whenever they have changed.

    Args:
        folders: What to watch; those that do not exist are waited for.
        scan: Lists the models; run in a worker thread.
        on_step: Called there with each step.
    """
    listed = await _scanned(scan, on_step)
    yield listed
    polling: bool | None = None
    while True:
        there = [folder for folder in folders if is_folder(folder)]
        try:
            async with aclosing(_changes(there, polling=polling)) as changes:
                async for _ in changes:
                    before, listed = listed, await _scanned(scan, on_step)
                    if listed != before:
                        yield listed
                    if there != [folder for folder in folders if is_folder(folder)]:
                        break
        except FileNotFoundError:  # a folder has gone since it was looked for
            continue
        except OSError:  # the system's limit on watches; looking takes longer, but always works
            if polling:
                raise
            polling = True


async def _changes(folders: Sequence[Path], *, polling: bool | None) -> AsyncGenerator[object]:
    """Yield whenever something has changed, and now and then in any case."""
    from watchfiles import awatch  # noqa: PLC0415 - slow to import, and not always needed

    if not folders:
        await anyio.sleep(_LOOK_MS / 1000)
        yield None
        return
    watcher = awatch(
        *folders,
        watch_filter=None,
        debounce=_TOGETHER_MS,
        rust_timeout=min(_FIRST_LOOK_MS, _LOOK_MS),
        yield_on_timeout=True,
        force_polling=polling,
        poll_delay_ms=_POLLING_MS,
        ignore_permission_denied=True,
    )
    async with aclosing(watcher):
        looked = -math.inf
        async for changes in watcher:
            if changes or time.monotonic() - looked >= _LOOK_MS / 1000:
                looked = time.monotonic()
                yield changes


async def _scanned(
    scan: Callable[[], Generator[ScanStep]], on_step: Callable[[ScanStep], object]
) -> list[Model]:
    """Scan in a worker thread, which ends soon after this is cancelled."""
    left = threading.Event()

    def last() -> list[Model]:
        models: list[Model] = []
        with closing(scan()) as steps:
            for step in steps:
                if left.is_set():
                    break
                models = list(step.models)
                on_step(step)
        return models

    try:
        return await anyio.to_thread.run_sync(last, abandon_on_cancel=True)
    finally:
        left.set()
