"""`Sweep`: which settings are best? Every combination is tried, and its row kept."""

from __future__ import annotations

import asyncio
import atexit
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.to_thread

from kitty_nb.config import ServerConfig, env_warnings
from kitty_nb.errors import EngineError, ExperimentError, KittyError, ResultStoreError, first_of
from kitty_nb.experiments.background import in_background
from kitty_nb.experiments.model_files import check_models, fingerprints_here
from kitty_nb.experiments.results import Results, extra
from kitty_nb.experiments.run_trial import row_of, this_machine
from kitty_nb.experiments.space import check_flags, combine, digest, fill_batches, in_order
from kitty_nb.experiments.store import RowStore, earlier_store
from kitty_nb.experiments.trial import (
    Outcome,
    StoreFailed,
    SweepEnded,
    SweepPaused,
    SweepResumed,
    TrialEnded,
    TrialProgressed,
    TrialStarted,
)
from kitty_nb.experiments.workload import DEFAULT_PROMPT, Workload
from kitty_nb.isolated_server import locate_engine
from kitty_nb.manager import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
    from concurrent.futures import Future
    from contextlib import AbstractAsyncContextManager
    from threading import Thread

    from distributed import Client

    from kitty_nb import LoadProgress
    from kitty_nb.experiments.space import Skip
    from kitty_nb.experiments.trial import Execute, SweepEvent, Trial, TrialResult
    from kitty_nb.experiments.workload import Perplexity, Quality

__all__ = ["Sweep", "SweepProgress", "seconds_left"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """How far a sweep is.

    Attributes:
        done: Trials that have their row.
        total: All trials.
        running: Those under way.
        load: How far the load under way is; None when there is none.
        eta: Seconds left, or None while nothing is known.
        paused: Whether no further trial begins.
    """

    done: int
    total: int
    running: tuple[Trial, ...] = ()
    load: LoadProgress | None = None
    eta: float | None = None
    paused: bool = False


class Sweep:
    """Tries every combination of models and settings, several times, and keeps what was measured.

    Each trial has a server of its own, on a port of its own; the panel's server goes on, but should
    rest meanwhile. Rows are in the `store` as soon as they are there: making the same sweep again
    and running it does what is left. More values in the grid, or more repeats, leave done what is.

    Args:
        models: Files, absolute or in the models folder, or models of a `ModelCatalog`. Without any
            the one in `config`.
        grid: Values to try by name: a field of `ServerConfig` (`context_size`), or a flag of
            llama-server (`cache_type_k` for `--cache-type-k`).
        prompts: What to ask, one request each; 1 or more. By default a question, which is repeated
            to fill the batches where their sizes are varied.
        repeats: How often each combination is measured.
        seed: Of the order of trials and of the server's sampling.
        parallel: Numbers of requests to have under way at once, each measured on its own.
        max_tokens: Length of an answer.
        config: What holds where the grid says nothing; by default `.env`.
        configs: Combinations one by one, instead of a grid or to be combined with it.
        skip: Called with each combination, as a mapping with `model` in it; what it returns true
            for is left out.
        quality: `ExactMatch`, a function of prompt and answer that returns a number (higher is
            better), or `Perplexity`. Answers then end where the model ends them.
        chat: Whether prompts go through the model's chat template.
        record: Whether to make each trial's run record, too; `row.record` can be replayed. Each
            model is hashed for that, once. Trials that were measured without one are run again.
        store: The file for the rows.
        logs: A folder in which to keep the servers' logs.

    Attributes:
        config: What holds where the grid says nothing.
        warnings: Settings of `.env`, the environment or the grid that change nothing, in sentences.
        workload: What is asked.
        trials: In the order in which they are run.
        store: The file for the rows.

    Raises:
        ConfigError: Listing every name and value that is wrong.
        ExperimentError: There is nothing to try.
    """

    def __init__(
        self,
        models: Sequence[object] = (),
        grid: Mapping[str, Iterable[Any]] | None = None,
        prompts: str | Iterable[str] = DEFAULT_PROMPT,
        *,
        repeats: int = 3,
        seed: int = 0,
        parallel: int | Iterable[int] = 1,
        max_tokens: int = 64,
        config: ServerConfig | None = None,
        configs: Iterable[ServerConfig | Mapping[str, Any]] | None = None,
        skip: Skip | None = None,
        quality: Quality | Perplexity | None = None,
        chat: bool = True,
        record: bool = False,
        store: str | Path = "sweep.journal",
        logs: str | Path | None = None,
    ) -> None:
        self.config = config or ServerConfig.from_env()
        workload = Workload(
            prompts=(prompts,) if isinstance(prompts, str) else tuple(prompts),
            max_tokens=max_tokens,
            parallel=(parallel,) if isinstance(parallel, int) else tuple(parallel),
            seed=seed,
            chat=chat,
            record=record,
            quality=quality,
        )
        named = [models] if isinstance(models, str | Path) else models
        combinations = combine(self.config, named, grid, configs, skip)
        if repeats < 1:
            raise ExperimentError(f"repeats is {repeats}, so nothing is tried. Write 1 or more.")
        self.trials = in_order(combinations, repeats, seed)
        tried = [trial.settings for trial in combinations]
        self.workload, useless = fill_batches(workload, tried, self.config)
        self.store = Path(store).expanduser().absolute()
        self.warnings = (
            *(() if config else env_warnings(".env", self.config.profile)),
            *useless,
            *filter(None, [earlier_store(self.store)]),
        )
        self._logs = Path(logs).expanduser().absolute() if logs else None
        self._kept = RowStore(self.store, digest(self.config, self.workload))
        self._rows: dict[str, TrialResult] = {}
        self._rows_read = False
        self._subscribers: list[Callable[[SweepEvent], object]] = []
        self._running: dict[Trial, float] = {}
        self._load: LoadProgress | None = None
        self._slots = 1
        self._paused = False
        self._resumed: anyio.Event | None = None
        self._control: tuple[asyncio.AbstractEventLoop, anyio.CancelScope] | None = None
        self._thread: Thread | None = None
        self._future: Future[Results] | None = None
        self._store_problem = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.close)

    def __repr__(self) -> str:
        return f"Sweep({len(self.trials)} trials)"

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self._control is not None

    @property
    def results(self) -> Results:
        """The rows there are by now, from this run and those before.

        Raises:
            ResultStoreError: The file of results cannot be read.
        """
        self._read_rows()
        return Results(self.config, tuple(self._rows.values()))

    @property
    def store_problem(self) -> str:
        """Why rows are in memory alone, in a sentence; empty when all are in the file."""
        return self._store_problem

    @property
    def progress(self) -> SweepProgress:
        """How far it is, by this run and those before."""
        with suppress(ResultStoreError):  # `results` and `run` tell it
            self._read_rows()
        rows, running = dict(self._rows), dict(self._running)
        left = [trial for trial in self.trials if trial.key not in rows]
        now = time.monotonic()
        passed = sum(now - began for began in running.values())
        eta = seconds_left(tuple(rows.values()), left, passed)
        return SweepProgress(
            done=len(self.trials) - len(left),
            total=len(self.trials),
            running=tuple(running),
            load=self._load if running else None,
            eta=None if eta is None else eta / self._slots,
            paused=self._paused,
        )

    def run(
        self,
        where: AbstractAsyncContextManager[Execute] | None = None,
        slots: int | None = None,
        *,
        client: Client | None = None,
        retry: bool = False,
    ) -> Operation[Results]:
        """Run what is left, on an event loop in a thread of its own, and return at once.

        Args:
            where: Gives the callable that runs a trial; by default this machine, one at a time.
            slots: How many run at once there; 1, or as many as the workers of a cluster take.
            client: A `dask.distributed.Client`, to run trials on its cluster.
            retry: Whether trials that failed or were skipped are tried again.

        Returns:
            Its result are the rows, after `cancel` those so far.

        Raises:
            ExperimentError: It runs already.
        """
        ended = not self.running and self._future is not None and self._future.done()
        if self._thread and ended:
            self._thread.join()  # it outlives its result by a moment
        if self.running or (self._thread and self._thread.is_alive()):
            raise ExperimentError("This sweep is running. Wait for it, or cancel it first.")
        self._thread, self._future = in_background(
            lambda: self.run_here(where, slots, client=client, retry=retry), "kitty_nb sweep"
        )
        atexit.register(self.close)
        self._future.add_done_callback(lambda _: atexit.unregister(self.close))
        return Operation(self._future, lambda: self._load)

    async def run_here(
        self,
        where: AbstractAsyncContextManager[Execute] | None = None,
        slots: int | None = None,
        *,
        client: Client | None = None,
        retry: bool = False,
    ) -> Results:
        """Like `run`, on the event loop that runs now, until it is over.

        Raises:
            ConfigError: The engine does not know a flag of the grid, or a model is not here.
            ResultStoreError: The file of results cannot be used.
            ExperimentError: It runs already, or a cluster cannot run it or is lost.
        """
        if self.running:
            raise ExperimentError("This sweep is running. Wait for it, or cancel it first.")
        problem = ""
        try:
            with anyio.CancelScope() as scope:
                self._control = asyncio.get_running_loop(), scope
                if client is not None:
                    where, slots = await self._cluster(client, slots)
                self._slots = slots or 1
                await self._run(where, retry)
        except Exception as failure:  # noqa: BLE001 (raised again below)
            # That nothing can be run there is told in the words of one trial.
            error = first_of(failure)
            known = isinstance(error, KittyError)
            problem = str(error) if known else f"kitty_nb failed to run the sweep: {error!r}."
            raise error from None
        finally:
            self._control = None
            self._running.clear()
            with anyio.CancelScope(shield=True):
                await self._write()
            complete = all(trial.key in self._rows for trial in self.trials)
            self._publish(SweepEnded(complete, problem))
        return self.results

    def pause(self) -> None:
        """Let no further trial begin; the one under way goes on to its row."""

        def pause() -> None:
            self._paused = True
            self._publish(SweepPaused())

        self._on_loop(pause)

    def resume(self) -> None:
        """Let trials begin again."""

        def resume() -> None:
            self._paused = False
            if self._resumed:
                self._resumed.set()
            self._publish(SweepResumed())

        self._on_loop(resume)

    def cancel(self) -> None:
        """End the run and the server under way. What is done is kept; `run` goes on from there."""
        if control := self._control:
            self._on_loop(control[1].cancel)

    def close(self) -> None:
        """Cancel the run and wait until its server and thread have ended."""
        self.cancel()
        if self._thread:
            self._thread.join()

    def subscribe(self, callback: Callable[[SweepEvent], object]) -> Callable[[], None]:
        """Call back with each event, on the sweep's thread, until the result is called."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    async def _run(self, where: AbstractAsyncContextManager[Execute] | None, retry: bool) -> None:
        for warning in self.warnings:
            _log.warning(warning)
        with suppress(EngineError):  # another machine may have one; else the trials say so
            engine = await locate_engine(self.config.binary)
            check_flags((one for t in self.trials for one in t.settings), engine.dialect)
        await self._kept.recall()  # creates the file, so that a wrong one is told first
        await anyio.to_thread.run_sync(self._read_rows, True)
        failed = [key for key, row in self._rows.items() if row.outcome is not Outcome.DONE]
        again = set(failed if retry else [])
        left = [t for t in self.trials if t.key in again or t.key not in self._rows]
        if where is None:
            models = [trial.model for trial in left]
            await anyio.to_thread.run_sync(check_models, models, self.config)
        await self._kept.add(dropped=again)
        self._rows = {key: row for key, row in self._rows.items() if key not in again}
        async with where or this_machine(self.config, self.workload, self._logs) as execute:
            await self._carry_out(left, execute)

    async def _carry_out(self, trials: Iterable[Trial], execute: Execute) -> None:
        """Run trials in order, as many at once as there are slots, while it is not paused."""
        slots = anyio.Semaphore(self._slots)

        async def run(trial: Trial) -> None:
            try:
                await self._try(trial, execute)
            finally:
                slots.release()

        async with anyio.create_task_group() as tasks:
            for trial in trials:
                await slots.acquire()
                while self._paused:
                    self._resumed = anyio.Event()
                    await self._resumed.wait()
                tasks.start_soon(run, trial)

    async def _try(self, trial: Trial, execute: Execute) -> None:
        self._running[trial] = time.monotonic()
        self._publish(TrialStarted(trial))
        try:
            result = await row_of(trial, execute, self._publish)
        finally:
            self._running.pop(trial, None)
        self._rows[trial.key] = result
        self._publish(TrialEnded(result))
        with anyio.CancelScope(shield=True):
            await self._write(result)

    async def _write(self, *results: TrialResult) -> None:
        try:
            await self._kept.add(results)
        except ResultStoreError as error:
            if not self._store_problem:
                self._publish(StoreFailed(str(error)))
            self._store_problem = str(error)
        else:
            self._store_problem = ""

    async def _cluster(
        self, client: Client, slots: int | None
    ) -> tuple[AbstractAsyncContextManager[Execute], int]:
        if not isinstance(client, extra("distributed", "dask").Client):
            raise ExperimentError(
                f"client is {client!r}, not a dask.distributed.Client. Make one of a cluster, or of"
                " a scheduler's address: Client('tcp://…:8786')."
            )
        from kitty_nb.experiments.cluster import count_slots, dask_cluster  # noqa: PLC0415 (of an extra)

        slots = slots or await count_slots(client)
        return dask_cluster(client, self.config, self.workload, self._logs), slots

    def _read_rows(self, again: bool = False) -> None:
        """Read the rows of earlier runs that are of these trials, unless that is done."""
        if self._rows_read and not again:
            return
        rows = self._kept.read()
        here = fingerprints_here((trial.model for trial in self.trials), self.config)
        own = {trial.key: trial for trial in self.trials}  # names may be in another order there
        if self._rows_read and not again:  # a run has begun meanwhile
            return
        self._rows = {
            key: replace(row, trial=own[key])
            for row in (*rows, *self._rows.values())
            if (key := row.trial.key) in own
            and row.outcome is not Outcome.PRUNED
            and self.workload.satisfied_by(row)
            and row.may_be_of(here.get(row.trial.model))
        }
        self._rows_read = True

    def _on_loop(self, act: Callable[[], None]) -> None:
        """Act on the loop of the run, from whatever thread; at once when there is no run."""
        control = self._control
        if control is None:
            act()
            return
        with suppress(RuntimeError):  # it has just ended
            control[0].call_soon_threadsafe(act)

    def _publish(self, event: SweepEvent) -> None:
        if isinstance(event, TrialStarted | TrialProgressed):
            self._load = event.progress if isinstance(event, TrialProgressed) else None
        for callback in tuple(self._subscribers):
            try:
                callback(event)
            except Exception:  # noqa: BLE001 (whatever a user's callback raises)
                _log.exception("A subscriber failed; the sweep goes on.")


def seconds_left(
    results: Sequence[TrialResult], left: Sequence[Trial], passed: float = 0.0
) -> float | None:
    """Forecast how long trials take one after the other; None while nothing is known. Pure.

    The best that there is for each: the same combination, else the same model, else all trials.

    Args:
        results: Trials that have ended.
        left: Those that have not.
        passed: Seconds for which trials of `left` have been under way already.
    """
    if not left:
        return 0.0
    taken: dict[Hashable, list[float]] = {}
    for row in results:
        taken.setdefault(row.trial.combination, []).append(row.seconds.overall)
        if row.outcome is Outcome.DONE:
            for group in (row.trial.model, None):
                taken.setdefault(group, []).append(row.seconds.overall)
    if None not in taken:
        return None
    expected = (
        next(median(taken[key]) for key in (t.combination, t.model, None) if key in taken)
        for t in left
    )
    return max(0.0, sum(expected) - passed)
