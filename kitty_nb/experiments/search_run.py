"""`Tuning`: runs a search trial by trial; `TuneResult`: its outcome."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, Unpack

import anyio
import anyio.to_thread

from kitty_nb.experiments.measure import fingerprints_here, this_machine
from kitty_nb.experiments.metrics import partial_metrics
from kitty_nb.experiments.runner import RunnerOptions, TrialRunner
from kitty_nb.experiments.trial import Outcome, TrialProgressed, TrialResult, TrialSeconds
from kitty_nb.isolated_server import this_host

if TYPE_CHECKING:
    from collections.abc import Iterator

    import optuna

    from kitty_nb.experiments.combination import Combination
    from kitty_nb.experiments.proof import Proof
    from kitty_nb.experiments.results import Results
    from kitty_nb.experiments.study import Search
    from kitty_nb.experiments.trial import Execute, OnProgress, SweepEvent, Trial
    from kitty_nb.operation import Operation

_PATIENCE = 4.0  # multiple of the usual duration after which a trial is pruned


@dataclass(frozen=True, repr=False)
class TuneResult:
    """The outcome of a search.

    Attributes:
        best: The best combination that satisfies all constraints; see `Results.best`.
        value: The median of its objective.
        objective: The objective's name.
        results: All results, for tables and plots.
        study: The Optuna study, for Optuna's plots and importances.
        proof: The comparison by repeated measurements, if there was a target.
        left_out: The rows whose objective is no finite number, in a sentence; empty without any.
    """

    best: Combination
    value: float
    objective: str
    results: Results
    study: optuna.Study = field(compare=False)
    proof: Proof | None = None
    left_out: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The best settings, by name."""
        return dict(self.best.trial.settings)

    @property
    def summary(self) -> str:
        """The result and the number of trials, in sentences."""
        rows = self.results.rows
        ends = Counter(row.outcome.value for row in rows)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in ends.items())
        doubt = f" It is {self.best.doubt}." if self.best.doubt else ""
        return (
            f"{self.objective} {self.value:.4g} with {self.best.trial.label}. That is the best of"
            f" {len(self.results.combinations)} combinations in {len(rows)} trials ({counts})."
            f"{doubt}{f' {self.proof}' if self.proof else ''} {self.left_out}".rstrip()
        )

    def __repr__(self) -> str:
        return f"TuneResult({self.summary})"

    def env_lines(self, profile: str | None = None) -> str:
        """Return the `.env` lines of the best settings for a profile, by default that in use."""
        return self.best.env_lines(profile)


class TuningOptions(RunnerOptions):
    """The arguments of every search."""

    search: Search
    budget: int
    seconds: float | None


class Tuning(TrialRunner):
    """Runs a search, which chooses each trial from the results so far."""

    def __init__(
        self,
        *,
        search: Search,
        budget: int,
        seconds: float | None,
        **options: Unpack[RunnerOptions],
    ) -> None:
        super().__init__(**options)
        self._search = search
        self._budget = budget
        self._seconds = seconds

    def start(self) -> Operation[TuneResult]:
        """Search in a background thread."""
        return self._start(self._find, "kitty_nb tune")

    async def _find(self) -> TuneResult:
        await self._controlled(self._run)
        search, results = self._search, self._search.results
        results = replace(results, workload=self.workload)
        await self._write_requests(results)
        best, name = results.choose(search.objective, search.bounds), search.objective.name
        best = replace(best, more_rounds=0)  # a search has no rounds to add
        value, odd = best.metrics[name].median, search.objective.why_none(results.rows)
        return TuneResult(best, value, name, results, search.study, left_out=odd)

    async def _run(self) -> None:
        models = self._search.models
        engine = await self._check_flags(map(self._search.samples, self._search.space))
        await anyio.to_thread.run_sync(
            partial(fingerprints_here, models, self.config, must_exist=True)
        )
        await self._kept.add()  # creates the file, so that an unusable one fails early
        rows = await anyio.to_thread.run_sync(self._rows_of, models)
        self._warn_of_engines(rows, engine)
        # Failures are tried again: whoever calls again has freed some memory, or mended a setting.
        self._resume([row for row in rows if row.outcome in {Outcome.DONE, Outcome.PRUNED}])
        async with this_machine(self.config, self.workload, self._logs) as execute:
            await self._carry_out(self._plan(), execute)

    def _resume(self, rows: list[TrialResult]) -> None:
        self._search.resume(rows)

    def _plan(self) -> Iterator[Trial]:
        began, search = time.monotonic(), self._search
        while len(search.rows) < self._budget:
            late = self._seconds is not None and time.monotonic() - began > self._seconds
            last = len(search.rows) + 1 == self._budget
            trial = None if late and search.rows else search.ask(last=last)
            if trial is None:
                return
            yield trial
            search.tell(self._rows[trial.key])

    async def _measure(
        self, trial: Trial, execute: Execute, on_progress: OnProgress
    ) -> TrialResult:
        """Run a trial; prune it once it can no longer win."""
        if trial.repeat > 1:
            return await super()._measure(trial, execute, on_progress)
        name, usual = self._search.objective.name, self._search.usual_seconds
        sofar: list[float] = []
        why = ""

        def watch(event: SweepEvent) -> None:
            nonlocal why
            on_progress(event)
            found = partial_metrics(event, self.workload.levels[0])
            if name not in found or why:
                return
            if load := isinstance(event, TrialProgressed):
                sofar.clear()  # only the latest value of a load's elapsed time counts
            sofar.append(found[name])
            why = self._search.prune_reason(median(sofar), 0 if load else len(sofar))
            if why:
                scope.cancel()

        began = time.monotonic()
        row: TrialResult | None = None
        with anyio.CancelScope() as scope:
            if self._search.objective.is_speed and usual:
                scope.deadline = anyio.current_time() + _PATIENCE * usual
            row = await super()._measure(trial, execute, watch)
        if row:
            return row
        passed = time.monotonic() - began
        here = await anyio.to_thread.run_sync(fingerprints_here, [trial.model], self.config)
        late = f"its {name} was not complete after {passed:.1f} s, far longer than usual."
        return TrialResult(
            trial,
            Outcome.PRUNED,
            f"Pruned: {why or late}",
            seconds=TrialSeconds(overall=passed),
            host=this_host(),
            at=time.time(),
            fingerprint=here.get(trial.model),
        )
