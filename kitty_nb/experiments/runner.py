"""`TrialRunner`: runs the trials of a sweep or search on an event loop in a background thread."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Self, TypedDict, TypeVar

import anyio
import anyio.to_thread

from kitty_nb.errors import ExperimentError, KittyError, ResultStoreError, first_of
from kitty_nb.experiments.arguments import path_of
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.measure import fingerprints_here
from kitty_nb.experiments.quality import Divergence
from kitty_nb.experiments.space import check_flags, digest
from kitty_nb.experiments.trial import (
    Outcome,
    StoreFailed,
    SweepEnded,
    SweepPaused,
    SweepResumed,
    TrialEnded,
    TrialProgressed,
    TrialResult,
    TrialStarted,
)
from kitty_nb.isolated_server import Broadcast, in_background, locate_engine, this_host
from kitty_nb.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from concurrent.futures import Future
    from pathlib import Path
    from threading import Thread

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.results import Results
    from kitty_nb.experiments.space import Settings
    from kitty_nb.experiments.trial import Execute, OnProgress, SweepEvent, Trial, Workload
    from kitty_nb.isolated_server import LoadProgress

    T = TypeVar("T")


_RUNNING = "This sweep is already running. Wait for it, or cancel it first."
_log = logging.getLogger(__name__)


class RunnerOptions(TypedDict):
    """The arguments of every runner of trials."""

    config: ServerConfig
    workload: Workload
    store: str | Path
    logs: str | Path | None
    warnings: Iterable[str]
    busy_repeats: int


class TrialRunner:
    """Runs trials in a background thread, one or several at a time; can be paused and cancelled.

    Attributes:
        config: The base settings.
        workload: The requests of each trial.
        store: The results file.
        busy_repeats: How many times a trial is repeated because the machine was busy.
        warnings: Warnings about settings without effect, in sentences.
        trials: All trials, if known in advance.
        store_problem: Why rows are only in memory; empty when all are saved.
    """

    def __init__(
        self,
        config: ServerConfig,
        workload: Workload,
        store: str | Path,
        logs: str | Path | None,
        warnings: Iterable[str],
        trials: tuple[Trial, ...] = (),
        busy_repeats: int = 1,
    ) -> None:
        extra("optuna")
        extra("pyarrow")  # fails now rather than when there are results to lose
        from kitty_nb.experiments.store import RowStore, earlier_store  # noqa: PLC0415 (of an extra)

        self.config = config
        self.workload = workload
        self.store = path_of("store", store)
        self.warnings = tuple(filter(None, (*warnings, earlier_store(self.store))))
        self.trials = trials
        self.busy_repeats = busy_repeats
        self._logs = path_of("logs", logs) if logs else None
        quality = workload.quality
        needed = [quality.reference] if isinstance(quality, Divergence) else []
        files = fingerprints_here(needed, config)
        self._kept = RowStore(self.store, digest(config, workload, files))
        self._rows: dict[str, TrialResult] = {}
        self._broadcast: Broadcast[SweepEvent] = Broadcast()
        self._running: dict[Trial, float] = {}
        self._load: LoadProgress | None = None
        self._slots = 1
        self._paused = False
        self._run_id = ""
        self._resumed: anyio.Event | None = None
        self._control: tuple[asyncio.AbstractEventLoop, anyio.CancelScope] | None = None
        self._thread: Thread | None = None
        self._ended: Callable[[], bool] = lambda: True
        self.store_problem = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.close)

    @property
    def running(self) -> bool:
        """True while the run is in progress."""
        return self._control is not None

    def pause(self) -> None:
        """Start no further trials; those in progress finish."""
        self._on_loop(partial(self._set_paused, True))

    def resume(self) -> None:
        """Continue a paused run."""
        self._on_loop(partial(self._set_paused, False))

    def cancel(self) -> None:
        """Stop the run and its server. Finished trials are kept; `run` continues with the rest."""
        if control := self._control:
            self._on_loop(control[1].cancel)

    def close(self) -> None:
        """Cancel the run, and wait until its server and thread have ended."""
        self.cancel()
        if self._thread:
            self._thread.join()

    def subscribe(self, callback: Callable[[SweepEvent], object]) -> Callable[[], None]:
        """Call back with each event on the run's thread; return a function that unsubscribes."""
        return self._broadcast.subscribe(callback)

    def _start(self, work: Callable[[], Awaitable[T]], name: str) -> Operation[T]:
        """Start the work in a background thread."""
        if self.running or not self._ended():
            raise ExperimentError(_RUNNING)
        if self._thread:
            self._thread.join()  # it briefly outlives its result
        future: Future[T]
        self._thread, future = in_background(work, name)
        self._ended = future.done
        return Operation(future, lambda: self._load)

    async def _controlled(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work so that `cancel` stops it; raise its first error."""
        if self.running:
            raise ExperimentError(_RUNNING)
        problem = ""
        try:
            with anyio.CancelScope() as scope:
                self._control = asyncio.get_running_loop(), scope
                self._run_id = uuid.uuid4().hex
                for warning in self.warnings:
                    _log.warning(warning)
                await work()
        except Exception as failure:  # noqa: BLE001 (raised again below)
            error = first_of(failure)
            known = isinstance(error, KittyError)
            problem = str(error) if known else f"Internal error: {error!r}. Please report it."
            raise error from None
        finally:
            self._control = self._resumed = None
            self._running.clear()
            with anyio.CancelScope(shield=True):
                await self._write()
            complete = all(trial.key in self._rows for trial in self.trials)
            self._publish(SweepEnded(complete, problem))

    async def _check_flags(self, settings: Iterable[Settings]) -> str:
        """Check that the engine here supports the flags of the trials; return its version."""
        engine = await locate_engine(self.config.binary)
        check_flags((one for several in settings for one in several), engine.dialect)
        return engine.version

    def _warn_of_engines(self, kept: Iterable[TrialResult], now: str) -> None:
        """Warn if rows to which others are added were measured here with another engine."""
        here = (row for row in kept if row.host == this_host() and row.engine not in {"", now})
        if other := {row.engine for row in here if "binary" not in dict(row.trial.settings)}:
            _log.warning(
                "%s has results of engine %s, and this machine has %s now: their speeds differ. To"
                " measure all of them with it, name another store.",
                self.store,
                ", ".join(sorted(other)),
                now,
            )

    def _rows_of(self, models: Iterable[str]) -> list[TrialResult]:
        """Read the stored rows that apply to these models as they are on this machine."""
        here = fingerprints_here(models, self.config)
        return [
            row
            for row in self._kept.read()
            if self.workload.satisfied_by(row) and row.may_be_of(here.get(row.trial.model))
        ]

    async def _carry_out(self, trials: Iterable[Trial], execute: Execute) -> None:
        """Run trials in order, one per slot at a time, except while paused."""
        plan = iter(trials)

        async def carry_on() -> None:
            for trial in plan:
                while self._paused:
                    self._resumed = self._resumed or anyio.Event()
                    await self._resumed.wait()
                await self._try(trial, execute)

        async with anyio.create_task_group() as tasks:
            for _ in range(self._slots):
                tasks.start_soon(carry_on)

    async def _try(self, trial: Trial, execute: Execute) -> None:
        self._running[trial] = time.monotonic()
        self._publish(TrialStarted(trial))
        try:
            row = replace(await self._undisturbed(trial, execute), run=self._run_id)
        finally:
            self._running.pop(trial, None)
        self._rows[trial.key] = row
        self._publish(TrialEnded(row))
        with anyio.CancelScope(shield=True):
            await self._write(row)

    async def _undisturbed(self, trial: Trial, execute: Execute) -> TrialResult:
        """Run a trial; repeat it a few times if other processes keep the machine busy.

        Return the row with the least interference. Concurrent trials always interfere with each
        other, so they are not repeated.
        """
        row = await self._measure(trial, execute, self._publish)
        for _ in range(self.busy_repeats if self._slots == 1 else 0):
            if not row.busy:
                break
            _log.info(  # the row says so, too
                "Other work used %.0f %% of the processors during %s. Repeating the trial.",
                others(row) * 100,
                trial.label,
            )
            row = min(row, await self._measure(trial, execute, self._publish), key=others)
        return row

    async def _measure(
        self, trial: Trial, execute: Execute, on_progress: OnProgress
    ) -> TrialResult:
        """Run a trial, and return a row even after an unexpected failure: other trials continue.

        An ExperimentError means that they can't.
        """
        try:
            return await execute(trial, on_progress)
        except ExperimentError:
            raise
        except Exception as error:  # noqa: BLE001 (becomes a row)
            _log.exception("Running a trial failed.")
            reason = f"Internal error: {error!r}. Please report it."
            return TrialResult(trial, Outcome.FAILED, reason, at=time.time())

    async def _write_requests(self, results: Results) -> None:
        """Export the times of all requests to a file beside the store."""
        if not any(row.measurement for row in results.rows):
            return
        path = self.store.with_suffix(".requests.parquet")
        try:
            await anyio.to_thread.run_sync(partial(results.to_parquet, path, requests=True))
        except ExperimentError as error:
            _log.warning(error)

    async def _write(self, *rows: TrialResult) -> None:
        try:
            await self._kept.add(rows)
        except ResultStoreError as error:
            if not self.store_problem:
                self._publish(StoreFailed(str(error)))
            self.store_problem = str(error)
        else:
            self.store_problem = ""

    def _set_paused(self, paused: bool) -> None:
        self._paused = paused
        if self._resumed and not paused:
            self._resumed.set()
            self._resumed = None
        self._publish(SweepPaused() if paused else SweepResumed())

    def _on_loop(self, act: Callable[[], None]) -> None:
        """Act on the run's event loop, from any thread; immediately if there is no run."""
        control = self._control
        if control is None:
            act()
            return
        with suppress(RuntimeError):  # the loop has just ended
            control[0].call_soon_threadsafe(act)

    def _publish(self, event: SweepEvent) -> None:
        if isinstance(event, TrialStarted | TrialProgressed):
            self._load = event.progress if isinstance(event, TrialProgressed) else None
        self._broadcast.publish(event)


def others(row: TrialResult) -> float:
    """Return the fraction of processor time used by other processes; infinity if unknown."""
    noise = row.measurement and row.measurement.noise
    return noise.others if noise else math.inf
