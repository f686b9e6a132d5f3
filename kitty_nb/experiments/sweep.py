"""`Sweep`: measure every combination of settings."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from kitty_nb.config.profiles import env_warnings
from kitty_nb.errors import EngineError, ExperimentError, ResultStoreError
from kitty_nb.experiments.arguments import config_to_start, several, whole
from kitty_nb.experiments.batches import fill_batches
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.measure import fingerprints_here, this_machine
from kitty_nb.experiments.results import Results
from kitty_nb.experiments.runner import TrialRunner
from kitty_nb.experiments.space import baseline_of, combine, in_order
from kitty_nb.experiments.trial import DEFAULT_PROMPT, Outcome, Workload

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence
    from pathlib import Path

    from distributed import Client

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.quality import Quality
    from kitty_nb.experiments.space import Skip
    from kitty_nb.experiments.trial import Execute, Trial, TrialResult
    from kitty_nb.isolated_server import LoadProgress
    from kitty_nb.operation import Operation


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """The progress of a sweep in trials; `eta` is in seconds, or None if unknown."""

    done: int
    total: int
    running: tuple[Trial, ...] = ()
    load: LoadProgress | None = None
    eta: float | None = None
    paused: bool = False


class Sweep(TrialRunner):
    """Measures every combination of models and settings several times, and stores the results.

    Each trial runs its own server on its own port. The panel's server isn't touched, but stop it
    first: it would skew the measurements. Results are saved in the `store` immediately: to
    continue, create the same sweep and run it, also with more values in the grid or more repeats.
    Speeds are compared only where the same run measured both: after adding values, add repeats.

    Args:
        models: Files, absolute or in the models folder, or models of a `ModelCatalog`; by default
            the one in `config`.
        grid: Values to try, by name: a field of `ServerConfig` (`context_size`), or a flag of
            llama-server (`cache_type_k` for `--cache-type-k`).
        prompts: One or more prompts, one request each. By default a question, repeated to fill the
            batches if their sizes vary.
        repeats: The number of measurements per combination.
        seed: The seed of the order of trials and of the server's sampling.
        parallel: Numbers of concurrent requests, each measured separately.
        max_tokens: Length of an answer, in tokens.
        config: The base settings; by default those of `.env`.
        configs: Individual combinations, instead of a grid or combined with it.
        skip: Called with each combination, as a mapping that includes `model`; returns true to skip
            it.
        quality: `ExactMatch`, `Perplexity`, `Divergence`, a `HarnessTask`, or a function of prompt
            and answer that returns a number (higher is better). Scored answers may end before
            `max_tokens`.
        chat: Whether prompts go through the model's chat template.
        record: Whether to make a run record of each trial, to replay with `row.record`. Each model
            is hashed once. Trials measured without a record run again.
        requests: The minimum number of requests at each concurrency; prompts are repeated to reach
            it. A p90 needs 10, a p95 20, and a p99 100.
        store: The results file. At the end of a run, the times of each request are written beside
            it, e.g. to `sweep.requests.parquet`.
        logs: A folder for the servers' logs.
        baseline: Whether to measure the settings in use as well, twice per round: the difference
            between the two is the machine's own variation, and no smaller difference counts.
        busy_repeats: How many times to repeat a trial because other processes kept the machine
            busy, unless trials run side by side. The row with the least interference counts.

    Attributes:
        config: The base settings.
        warnings: Settings of `.env`, the environment or the grid without effect, in sentences.
        workload: The requests of each trial.
        trials: All trials, in order.
        store: The results file.

    Raises:
        ConfigError: Some names or values are invalid; the error lists all of them.
        ExperimentError: A number is wrong, or there is nothing to try.
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
        begins = "A sweep starts a server for each trial"
        base = config_to_start(config, models or configs, begins)
        asked = {"max_tokens": max_tokens, "seed": seed, "chat": chat, "record": record}
        workload = Workload.of(prompts, parallel, quality, **asked, at_least=requests)
        combinations = combine(base, several(models), grid, configs, skip)
        whole("repeats", repeats, 1)
        whole("busy_repeats", busy_repeats)
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
        """The results so far, including earlier runs."""
        self._read_rows()
        return Results(self.config, tuple(self._rows.values()), self.workload)

    @property
    def progress(self) -> SweepProgress:
        """The progress so far, including earlier runs."""
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
        """Run the remaining trials in the background.

        Args:
            where: Provides the callable that runs a trial; by default on this machine.
            slots: The number of concurrent trials; by default 1, or what a cluster's workers take.
            client: A `dask.distributed.Client`, to run trials on its cluster.
            retry: Whether to run trials again that failed or were skipped.

        Returns:
            The sweep in progress, with the results; after `cancel`, those so far.

        Raises:
            ExperimentError: The sweep is already running.
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
        """Run the remaining trials on the running event loop; see `run`.

        Raises:
            ConfigError: The engine lacks a flag of the grid, or a model is missing.
            ResultStoreError: The results file can't be used.
            ExperimentError: The sweep is already running, or a cluster can't run it or is lost.
        """
        if slots is not None:
            whole("slots", slots, 1)
        provides = isinstance(where, AbstractAsyncContextManager)
        if where is not None and (not provides or hasattr(where, "submit")):  # a Dask client has it
            raise ExperimentError(
                f"where is {where!r}. Write an asynchronous context manager that provides what runs"
                " a trial; for a Dask cluster, write client=…; to follow the sweep, subscribe(…)"
                " first."
            )

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
        engine = ""
        with suppress(EngineError):  # other machines may have an engine; if not, each row says so
            engine = await self._check_flags(trial.settings for trial in self.trials)
        await self._kept.add()  # creates the file, so that an unusable one fails early
        await anyio.to_thread.run_sync(self._read_rows, True)
        done = {key: row for key, row in self._rows.items() if row.outcome is Outcome.DONE}
        kept = done if retry else self._rows
        left = [trial for trial in self.trials if trial.key not in kept]
        if where is None:
            models = [trial.model for trial in left]
            await anyio.to_thread.run_sync(
                partial(fingerprints_here, models, self.config, must_exist=True)
            )
        if engine and left:
            self._warn_of_engines(kept.values(), engine)
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
        """Read the rows of earlier runs, unless done already."""
        if self._rows_read and not again:
            return
        rows = self._rows_of(trial.model for trial in self.trials)
        own = {trial.key: trial for trial in self.trials}  # settings may be in another order there
        if self._rows_read and not again:  # a run has started meanwhile
            return
        found = {row.trial.key: row for row in rows if row.outcome is not Outcome.PRUNED}
        self._rows = {
            key: replace(row, trial=own[key]) for key, row in found.items() if key in own
        } | (self._rows if self._kept.unwritten else {})
        self._rows_read = True


def seconds_left(
    results: Sequence[TrialResult], left: Sequence[Trial], passed: float = 0.0
) -> float | None:
    """Estimate the seconds that trials take, one after the other; None if unknown. Pure.

    A trial is expected to take the median of its combination, or else of its model, or of all;
    those `left` have been running for some seconds that `passed`.
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
