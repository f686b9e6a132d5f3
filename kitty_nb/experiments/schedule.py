"""Handing trials out, one to each free slot: the part of a sweep that knows no machine."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

import anyio

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.trial import Outcome, TrialResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from kitty_nb.experiments.events import SweepEvent
    from kitty_nb.experiments.trial import Trial

_log = logging.getLogger(__name__)


class Execute(Protocol):
    """Runs one trial somewhere; see `run_trial`, which does so here."""

    def __call__(
        self, trial: Trial, *, tell: Callable[[SweepEvent], None], free: Callable[[], None]
    ) -> Awaitable[TrialResult]:
        """Return the trial's row. Being cancelled ends its server.

        An `ExperimentError` means that nothing can be run there any more, and ends the sweep.

        Args:
            trial: What to try.
            tell: To be called, on the event loop, with what happens meanwhile.
            free: May be called when the next trial may begin, before this one has returned.
        """


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
    trials: Iterable[Trial],
    run: Callable[[Trial, Callable[[], None]], Awaitable[None]],
    slots: int,
    gate: Gate,
) -> None:
    """Run trials in order, as many at once as there are slots.

    Args:
        trials: What to run; the next is taken when a slot is free and the gate open.
        run: Runs one and keeps its row. It may say early that its slot is free.
        slots: How many may run at once.
        gate: Where they wait while the sweep is paused.
    """
    semaphore = anyio.Semaphore(slots)

    async def one(trial: Trial) -> None:
        taken = True

        def free() -> None:
            nonlocal taken
            if taken:
                taken = False
                semaphore.release()

        try:
            await run(trial, free)
        finally:
            free()

    async with anyio.create_task_group() as tasks:
        for trial in trials:
            await semaphore.acquire()
            await gate.passed()
            tasks.start_soon(one, trial)


async def row_of(
    trial: Trial, execute: Execute, tell: Callable[[SweepEvent], None], free: Callable[[], None]
) -> TrialResult:
    """Return a trial's row, also of one that fails as nobody has foreseen: others go on.

    Args:
        trial: What to try.
        execute: Runs it.
        tell: As for `execute`.
        free: As for `execute`.

    Raises:
        ExperimentError: Nothing can be run there any more.
    """
    try:
        return await execute(trial, tell=tell, free=free)
    except ExperimentError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever it is, it has its row)
        _log.exception("Running a trial failed.")
        reason = f"kitty_nb failed to run this trial: {error!r}. Please report it."
        return TrialResult(trial, Outcome.FAILED, reason, at=time.time())
