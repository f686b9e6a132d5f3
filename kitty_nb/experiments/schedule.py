"""Handing trials out, one to each free slot: the part of a sweep that knows no machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from kitty_nb.experiments.trial import Trial


class Gate:
    """Lets trials through while it is open, on one event loop at a time.

    Attributes:
        open: Whether trials may begin.
    """

    def __init__(self) -> None:
        self.open = True
        self._opened: anyio.Event | None = None

    def close(self) -> None:
        """Let none begin from now on."""
        self.open = False

    def reopen(self) -> None:
        """Let them begin again."""
        self.open = True
        if self._opened:
            self._opened.set()

    async def passed(self) -> None:
        """Wait until it is open; one at a time."""
        try:
            while not self.open:
                self._opened = anyio.Event()
                await self._opened.wait()
        finally:
            self._opened = None


async def carry_out(
    trials: Iterable[Trial], run: Callable[[Trial], Awaitable[None]], slots: int, gate: Gate
) -> None:
    """Run trials in order, as many at once as there are slots.

    Args:
        trials: What to run; the next is taken when a slot is free and the gate open.
        run: Runs one and keeps its row.
        slots: How many may run at once.
        gate: Where they wait while the sweep is paused.
    """
    semaphore = anyio.Semaphore(slots)

    async def one(trial: Trial) -> None:
        try:
            await run(trial)
        finally:
            semaphore.release()

    async with anyio.create_task_group() as tasks:
        for trial in trials:
            await semaphore.acquire()
            await gate.passed()
            tasks.start_soon(one, trial)
