"""`Sweep`: try every combination of settings, and keep the rows."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from kitty_nb.config import ServerConfig, env_warnings
from kitty_nb.errors import EngineError, ExperimentError, ResultStoreError
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.measure import fingerprints_here, this_machine
from kitty_nb.experiments.results import Results
from kitty_nb.experiments.runner import TrialRunner
from kitty_nb.experiments.space import baseline_of, combine, fill_batches, in_order
from kitty_nb.experiments.trial import DEFAULT_PROMPT, Outcome, Workload

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from distributed import Client

    from kitty_nb.experiments.space import Skip
    from kitty_nb.experiments.trial import Execute, Quality, Trial, TrialResult
    from kitty_nb.isolated_server import LoadProgress
    from kitty_nb.operation import Operation


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """The progress of a sweep.

    Attributes:
        done: Trials that have their row.
        total: All trials.
        running: Trials under way.
        load: The load under way; None when there is none.
        eta: Seconds left, or None while nothing is known.
        paused: Whether no further trial begins.
    """

    done: int
    total: int
    running: tuple[Trial, ...] = ()
    load: LoadProgress | None = None
    eta: float | None = None
    paused: bool = False


class Sweep(TrialRunner):
    """Tries every combination of models and settings, several times, and keeps what was measured.

    Each trial has a server of its own, on a port of its own. The panel's server isn't touched, but
    stop it first: it would skew the measurements. Rows are in the `store` as soon as they exist:
    make the same sweep again and run it, and it does the rest, also with more values in the grid
    or more repeats.

    Args:
        models: Files, absolute or in the models folder, or models of a `ModelCatalog`. Without any
            the one in `config`.
        grid: Values to try by name: a field of `ServerConfig` (`context_size`), or a flag of
            llama-server (`cache_type_k` for `--cache-type-k`).
        prompts: One request each; 1 or more. By default a question, which is repeated to fill
            the batches where their sizes vary.
        repeats: The number of measurements of each combination.
        seed: Of the order of trials and of the server's sampling.
        parallel: Numbers of requests to have under way at once, each measured on its own.
        max_tokens: Length of an answer.
        config: The settings that the grid changes; by default those of `.env`.
        configs: Combinations one by one, instead of a grid or to be combined with it.
        skip: Called with each combination, as a mapping with `model` in it; those for which it
            returns true are left out.
        quality: `ExactMatch`, a function of prompt and answer that returns a number (higher is
            better), `Perplexity`, `Divergence` or a `HarnessTask`. Answers that are scored end
            where the model ends them.
        chat: Whether prompts go through the model's chat template.
        record: Whether to make each trial's run record, too; `row.record` can be replayed. Each
            model is hashed for that, once. Trials that were measured without one are run again.
        requests: Requests at each number in `parallel`, at the least; prompts are repeated to reach
            it. A p90 needs 10, a p95 20, and a p99 100.
        store: The file for the rows. The times of each request go beside it at the end of a run,
            e.g. `sweep.requests.parquet`.
        logs: A folder in which to keep the servers' logs.
        baseline: Whether to measure the settings in use, too, twice in each round: what differs
            between the two is the machine's own spread, and no smaller difference counts.
        busy_repeats: How often a trial is measured again because other processes kept the machine
            busy. The least disturbed row counts, and says whether it was `busy`.

    Attributes:
        config: The settings that the grid changes.
        warnings: Settings of `.env`, the environment or the grid that change nothing, in sentences.
        workload: The requests of each trial.
        trials: All trials, in the order in which they run.
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
        quality: Quality | None = None,
        chat: bool = True,
        record: bool = False,
        requests: int = 0,
        store: str | Path = "sweep.journal",
        logs: str | Path | None = None,
        baseline: bool = False,
        busy_repeats: int = 1,
    ) -> None:
        base = config or ServerConfig.from_env()
        asked = {"max_tokens": max_tokens, "seed": seed, "chat": chat, "record": record}
        workload = Workload.of(prompts, parallel, quality, **asked, at_least=requests)
        named = [models] if isinstance(models, str | Path) else models
        combinations = combine(base, named, grid, configs, skip)
        if repeats < 1:
            raise ExperimentError(
                f"repeats is {repeats}, so nothing would be tried. Write 1 or more."
            )
        tried = [trial.settings for trial in combinations]
        workload, useless = fill_batches(workload, tried, base)
        warnings = (*(() if config else env_warnings(".env", base.profile)), *useless)
        in_use = baseline_of(combinations, base) if baseline else None
        trials = in_order(combinations, repeats, seed, in_use)
        super().__init__(base, workload, store, logs, warnings, trials, busy_repeats)
        self._rows_read = False

    def __repr__(self) -> str:
        return f"Sweep({len(self.trials)} trials)"

    @property
    def results(self) -> Results:
        """The rows so far, from this run and those before.

        Raises:
            ResultStoreError: The file of results cannot be read.
        """
        self._read_rows()
        return Results(self.config, tuple(self._rows.values()), self.workload)

    @property
    def progress(self) -> SweepProgress:
        """The progress over this run and those before."""
        with suppress(ResultStoreError):  # `results` and `run` raise it
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
            where: Provides the callable that runs a trial; by default this machine, one at a time.
            slots: The number of trials at once; by default 1, or as many as a cluster's workers
                take.
            client: A `dask.distributed.Client`, to run trials on its cluster.
            retry: Whether trials that failed or were skipped are tried again.

        Returns:
            An operation whose result is the rows; after `cancel`, those so far.

        Raises:
            ExperimentError: It runs already.
        """
        return self._start(
            lambda: self.run_here(where, slots, client=client, retry=retry), "kitty_nb sweep"
        )

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

        async def work() -> None:
            at, self._slots = where, slots or 1
            if client is not None:
                at, self._slots = await self._cluster(client, slots)
            await self._run(at, retry)

        await self._controlled(work)
        results = self.results
        await self._write_requests(results)
        return results

    async def _run(self, where: AbstractAsyncContextManager[Execute] | None, retry: bool) -> None:
        with suppress(EngineError):  # another machine may have one; else each row says so
            await self._check_flags(trial.settings for trial in self.trials)
        await self._kept.add()  # creates the file, so that an unusable one shows first
        await anyio.to_thread.run_sync(self._read_rows, True)
        done = {key: row for key, row in self._rows.items() if row.outcome is Outcome.DONE}
        kept = done if retry else self._rows
        left = [trial for trial in self.trials if trial.key not in kept]
        if where is None:
            models = [trial.model for trial in left]
            await anyio.to_thread.run_sync(
                partial(fingerprints_here, models, self.config, must_exist=True)
            )
        await self._kept.add(dropped=self._rows.keys() - kept)
        self._rows = kept
        async with where or this_machine(self.config, self.workload, self._logs) as execute:
            await self._carry_out(left, execute)

    async def _cluster(
        self, client: Client, slots: int | None
    ) -> tuple[AbstractAsyncContextManager[Execute], int]:
        if not isinstance(client, extra("distributed", "dask").Client):
            raise ExperimentError(
                f"client is {client!r}, not a dask.distributed.Client. Create one from a cluster or"
                " a scheduler's address: Client('tcp://…:8786')."
            )
        from kitty_nb.experiments.cluster import count_slots, dask_cluster  # noqa: PLC0415 (of an extra)

        slots = slots or await count_slots(client)
        return dask_cluster(client, self.config, self.workload, self._logs), slots

    def _read_rows(self, again: bool = False) -> None:
        """Read the rows of earlier runs of these trials, unless that is done."""
        if self._rows_read and not again:
            return
        rows = self._rows_of(trial.model for trial in self.trials)
        own = {trial.key: trial for trial in self.trials}  # names may be in another order there
        if self._rows_read and not again:  # a run has begun meanwhile
            return
        found = {row.trial.key: row for row in rows if row.outcome is not Outcome.PRUNED}
        self._rows = {
            key: replace(row, trial=own[key]) for key, row in found.items() if key in own
        } | (self._rows if self._kept.unwritten else {})
        self._rows_read = True


def seconds_left(
    results: Sequence[TrialResult], left: Sequence[Trial], passed: float = 0.0
) -> float | None:
    """Forecast the seconds that trials take one after the other; None while nothing is known. Pure.

    Each is expected to take the median of its combination, else of its model, else of all trials.

    Args:
        results: Trials that have ended.
        left: Those that have not.
        passed: The seconds for which trials of `left` have been under way already.
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
