"""`tune`: the best settings in far fewer trials than a grid has combinations."""

from __future__ import annotations

import atexit
import logging
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from kitty_nb.config import ServerConfig, env_warnings
from kitty_nb.errors import ExperimentError, ResultStoreError
from kitty_nb.experiments.background import in_background
from kitty_nb.experiments.metrics import OBJECTIVE, constraints_of, metric_names, read_objective
from kitty_nb.experiments.model_files import check_models, fingerprints_here
from kitty_nb.experiments.results import Results
from kitty_nb.experiments.run_trial import row_of, this_machine
from kitty_nb.experiments.space import check_flags, digest, fill_batches
from kitty_nb.experiments.store import RowStore, earlier_store
from kitty_nb.experiments.study import Search, partial_metrics, read_space, samples
from kitty_nb.experiments.trial import (
    Outcome,
    StoreFailed,
    Trial,
    TrialEnded,
    TrialProgressed,
    TrialResult,
    TrialSeconds,
    TrialStarted,
)
from kitty_nb.experiments.workload import DEFAULT_PROMPT, Workload
from kitty_nb.isolated_server import locate_engine, this_host
from kitty_nb.manager import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import optuna

    from kitty_nb import LoadProgress
    from kitty_nb.experiments.metrics import Objective
    from kitty_nb.experiments.results import Combination
    from kitty_nb.experiments.study import Space
    from kitty_nb.experiments.trial import Execute, ModelFingerprint, SweepEvent
    from kitty_nb.experiments.workload import Perplexity, Quality

__all__ = ["TuneResult", "tune"]

_PATIENCE = 4.0  # times as long as others a trial may take
_log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class TuneResult:
    """What a search has found.

    Attributes:
        best: The best combination that keeps all constraints; see `Results.best`.
        value: Its objective: the median of its measurements.
        objective: What that is.
        results: All rows, for tables and plots.
        study: Optuna's study, for its own plots and importances.
    """

    best: Combination
    value: float
    objective: str
    results: Results
    study: optuna.Study = field(compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """The best settings by name."""
        return dict(self.best.trial.settings)

    @property
    def summary(self) -> str:
        """What was found after how many trials, in a sentence or two."""
        rows = self.results.rows
        ends = Counter(row.outcome.value for row in rows)
        told = ", ".join(f"{count} {outcome}" for outcome, count in ends.items())
        doubt = f" It is {self.best.doubt}." if self.best.doubt else ""
        return (
            f"{self.objective} {self.value:.4g} with {self.best.trial.label}. That is the best of"
            f" {len(self.results.combinations)} combinations in {len(rows)} trials ({told})."
            f"{doubt}"
        )

    def __repr__(self) -> str:
        return f"TuneResult({self.summary})"

    def env_lines(self, profile: str | None = None) -> str:
        """Return the lines to paste into `.env` so that a profile is served like the best.

        Args:
            profile: Without it that of `config`.
        """
        return self.best.env_lines(profile)


def tune(
    model: object = None,
    objective: str | Callable[[TrialResult], float] = OBJECTIVE,
    space: Mapping[str, Any] | None = None,
    constraints: Mapping[str, Any] | None = None,
    budget: int = 20,
    prompts: str | Iterable[str] = DEFAULT_PROMPT,
    *,
    seconds: float | None = None,
    seed: int = 0,
    parallel: int | Iterable[int] = 1,
    max_tokens: int = 64,
    config: ServerConfig | None = None,
    quality: Quality | Perplexity | None = None,
    chat: bool = True,
    record: bool = False,
    store: str | Path = "tune.journal",
    logs: str | Path | None = None,
    on_event: Callable[[SweepEvent], object] = lambda _: None,
) -> Operation[TuneResult]:
    """Search for the settings that are best at something, and return at once.

    Trials run here one after the other, as those of a `Sweep` do. The settings in use come first,
    then some by chance, then what Optuna expects to be better; every eighth trial measures the best
    so far again, up to three times, for medians are compared. A trial that is clearly behind the
    others is pruned. Rows are in the `store` as soon as they are there, and count: the same call
    goes on where the last one ended.

    Args:
        model: The file, absolute or in the models folder; by default the one in `config`.
        objective: A number of the table, after a minus sign one of which less is better; or a
            function of a row that is done, the higher the better.
        space: What to choose from, by name of setting as in a `Sweep`: a list of values, or the
            lowest and the highest number as a tuple. By default threads and flash attention, and
            layers on a GPU where there is one.
        constraints: Bounds to keep, of numbers or settings, by name and sign; a name alone means
            at most: `{"memory_gib": 20, "context_size>=": 16384}`. What breaks one on a setting
            is never tried.
        budget: How many trials there shall be, with those in the store.
        prompts: What to ask, one request each; 1 or more. By default a question, which is repeated
            to fill the batches where their sizes are chosen and the objective depends on them.
        seconds: After how long no further trial begins; None for no limit.
        seed: Of the search and of the server's sampling.
        parallel: Numbers of requests to have under way at once, each measured on its own.
        max_tokens: Length of an answer.
        config: What holds where the space says nothing; by default `.env`.
        quality: As for a `Sweep`.
        chat: Whether prompts go through the model's chat template.
        record: As for a `Sweep`; trials that were measured without a run record do not count.
        store: The file for the rows.
        logs: A folder in which to keep the servers' logs.
        on_event: Called on the search's thread with what happens: a trial has begun, made
            progress, ended.

    Returns:
        Cancelling it ends the search and the server under way; the rows stay in the store. It may
        end with `ExperimentError`: no trial could be measured, or none keeps the constraints.

    Raises:
        ConfigError: Listing every name and value that is wrong.
        ExperimentError: There is nothing to try, or Optuna is missing.
    """
    warnings = () if config else env_warnings(".env", "primary")
    config = config or ServerConfig.from_env()
    workload = Workload(
        prompts=(prompts,) if isinstance(prompts, str) else tuple(prompts),
        max_tokens=max_tokens,
        parallel=(parallel,) if isinstance(parallel, int) else tuple(parallel),
        seed=seed,
        chat=chat,
        record=record,
        quality=quality,
    )
    if budget < 1:
        raise ExperimentError(f"budget is {budget}, so nothing is tried. Write 1 or more.")
    names = metric_names(workload.levels)
    bounds = constraints_of(constraints)
    name, choices = read_space(model, config, space, bounds, names)
    aim = read_objective(objective, names)
    workload, useless = fill_batches(workload, _batches(choices), config, aim.name)
    path = Path(store).expanduser().absolute()
    for warning in filter(None, (*warnings, *useless, earlier_store(path))):
        _log.warning(warning)
    run = _Run(
        search=Search(name, choices, aim, bounds, config, seed),
        model=name,
        objective=aim,
        space=choices,
        budget=budget,
        seconds=seconds,
        config=config,
        workload=workload,
        store=RowStore(path, digest(config, workload)),
        logs=Path(logs).expanduser().absolute() if logs else None,
        on_event=on_event,
    )
    thread, future = in_background(run.to_the_end, "kitty_nb tune")

    def close() -> None:
        future.cancel()
        thread.join()

    atexit.register(close)
    future.add_done_callback(lambda _: atexit.unregister(close))
    return Operation(future, lambda: run.load)


@dataclass
class _Run:
    """A search under way. For one event loop."""

    search: Search
    model: str
    objective: Objective
    space: Space
    budget: int
    seconds: float | None
    config: ServerConfig
    workload: Workload
    store: RowStore
    logs: Path | None
    on_event: Callable[[SweepEvent], object]
    load: LoadProgress | None = None
    fingerprint: ModelFingerprint | None = None

    async def to_the_end(self) -> TuneResult:
        """Search until the budget is spent or everything is tried.

        Raises:
            ConfigError: The engine does not know a flag of the space, or the model is not here.
            EngineNotFoundError: There is no engine.
            ResultStoreError: The file of results cannot be used.
            ExperimentError: The user's objective failed, or nothing is best.
        """
        began = time.monotonic()
        engine = await locate_engine(self.config.binary)
        check_flags(samples(self.space), engine.dialect)
        await anyio.to_thread.run_sync(check_models, [self.model], self.config)
        here = await anyio.to_thread.run_sync(fingerprints_here, [self.model], self.config)
        self.fingerprint = here.get(self.model)
        rows = await self.store.recall()
        self.search.resume(
            row
            for row in rows
            if row.may_be_of(self.fingerprint) and self.workload.satisfied_by(row)
        )
        try:
            async with this_machine(self.config, self.workload, self.logs) as execute:
                while len(self.search.rows) < self.budget:
                    late = self.seconds is not None and time.monotonic() - began > self.seconds
                    asked = None if late and self.search.rows else self.search.ask()
                    if asked is None:
                        break
                    await self._try(*asked, execute)
        finally:
            with anyio.CancelScope(shield=True), suppress(ResultStoreError):
                await self.store.add()
        return self._result()

    def _result(self) -> TuneResult:
        found = self.search.best
        if found is None:
            raise ExperimentError(self.search.complaint)
        best, spread = found
        results = Results(self.config, tuple(self.search.rows))
        return TuneResult(best, spread.median, self.objective.name, results, self.search.study)

    async def _try(self, trial: Trial, asked: optuna.Trial, execute: Execute) -> None:
        self._publish(TrialStarted(trial))
        row = await self._measure(trial, asked, execute)
        self._publish(TrialEnded(row))
        with anyio.CancelScope(shield=True):
            try:
                await self.store.add([row])
            except ResultStoreError as error:
                self._publish(StoreFailed(str(error)))
        self.search.tell(row, asked)

    async def _measure(self, trial: Trial, asked: optuna.Trial, execute: Execute) -> TrialResult:
        """Return the trial's row; it is pruned where it cannot win any more."""
        began, usual = time.monotonic(), self.search.usual_seconds
        name, least = self.objective.name, self.workload.levels[0]
        sofar: list[float] = []
        why = ""
        row: TrialResult | None = None
        with anyio.CancelScope() as scope:

            def on_progress(event: SweepEvent) -> None:
                nonlocal why
                self._publish(event)
                found = partial_metrics(event, least).get(name)
                if found is None or trial.repeat > 1 or why:
                    return
                if isinstance(event, TrialProgressed):
                    sofar.clear()  # of a load's time so far the latest counts
                sofar.append(found)
                why = self.search.prune_reason(asked, sofar)
                if why:
                    scope.cancel()

            if self.objective.tells_speed and usual and trial.repeat == 1:
                scope.deadline = anyio.current_time() + _PATIENCE * usual
            row = await row_of(trial, execute, on_progress)
        if row:
            return row
        passed = time.monotonic() - began
        late = (
            f"{self.objective.name} cannot win: {passed:.1f} s by then, {usual or 0:.1f} s usual."
        )
        return TrialResult(
            trial,
            Outcome.PRUNED,
            f"Pruned: {why or late}",
            seconds=TrialSeconds(overall=passed),
            host=this_host(),
            at=time.time(),
            fingerprint=self.fingerprint,
        )

    def _publish(self, event: SweepEvent) -> None:
        if isinstance(event, TrialProgressed):
            self.load = event.progress
        try:
            self.on_event(event)
        except Exception:  # noqa: BLE001 (whatever a user's callback raises)
            _log.exception("on_event failed; the search goes on.")


def _batches(space: Space) -> list[tuple[tuple[str, Any], ...]]:
    """The batch sizes that may be chosen, of a range its ends."""
    names = [name for name in space if name in {"batch_size", "ubatch_size"}]
    return [*product(*([*samples({name: space[name]})] for name in names))]
