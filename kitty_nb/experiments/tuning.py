"""`tune`: the best settings in far fewer trials than a grid has combinations."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from kitty_nb.config import ServerConfig, env_warnings
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.measure import fingerprints_here, this_machine
from kitty_nb.experiments.metrics import (
    OBJECTIVE,
    constraints_of,
    metric_names,
    partial_metrics,
    read_objective,
)
from kitty_nb.experiments.runner import TrialRunner
from kitty_nb.experiments.space import BATCHES, fill_batches
from kitty_nb.experiments.trial import (
    DEFAULT_PROMPT,
    Outcome,
    Perplexity,
    TrialProgressed,
    TrialResult,
    TrialSeconds,
    Workload,
)
from kitty_nb.isolated_server import this_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import optuna

    from kitty_nb.experiments.combination import Combination
    from kitty_nb.experiments.results import Results
    from kitty_nb.experiments.study import Search
    from kitty_nb.experiments.target import Proof
    from kitty_nb.experiments.trial import (
        Execute,
        OnProgress,
        Quality,
        SweepEvent,
        Trial,
    )
    from kitty_nb.operation import Operation

_PATIENCE = 4.0  # times as long as others a trial may take


@dataclass(frozen=True, repr=False)
class TuneResult:
    """The outcome of a search.

    Attributes:
        best: The best combination that keeps all constraints; see `Results.best`.
        value: Its objective: the median of its measurements.
        objective: The objective's name.
        results: All rows, for tables and plots.
        study: Optuna's study, for its own plots and importances.
        proof: What repeated measurements say, where there was a target.
    """

    best: Combination
    value: float
    objective: str
    results: Results
    study: optuna.Study = field(compare=False)
    proof: Proof | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The best settings by name."""
        return dict(self.best.trial.settings)

    @property
    def summary(self) -> str:
        """The result and the number of trials, in a sentence or two."""
        rows = self.results.rows
        ends = Counter(row.outcome.value for row in rows)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in ends.items())
        doubt = f" It is {self.best.doubt}." if self.best.doubt else ""
        return (
            f"{self.objective} {self.value:.4g} with {self.best.trial.label}. That is the best of"
            f" {len(self.results.combinations)} combinations in {len(rows)} trials ({counts})."
            f"{doubt}{f' {self.proof}' if self.proof else ''}"
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
    target: str | None = None,
    quality_loss: str | None = None,
    memory: str | None = None,
    text: str = "",
    proof_rounds: int = 5,
    seconds: float | None = None,
    seed: int = 0,
    parallel: int | Iterable[int] = 1,
    max_tokens: int = 64,
    config: ServerConfig | None = None,
    quality: Quality | None = None,
    chat: bool = True,
    record: bool = False,
    requests: int = 0,
    store: str | Path = "tune.journal",
    logs: str | Path | None = None,
    busy_repeats: int = 1,
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
        budget: The number of trials, with those in the store.
        prompts: One request each; 1 or more. By default a question, which is repeated
            to fill the batches where their sizes are chosen and the objective depends on them.
        target: A bound to reach, such as `"generation_tokens_per_second >= 30"`. The search is then
            for the least memory that reaches it, over all quants of the model on disk, and the
            `proof` compares it with the settings in use and the runner-up.
        quality_loss: How much worse the perplexity of `text` may be than that of the largest
            quant, such as `"<= 2 %"`; only with a target.
        memory: The most memory, such as `"<= 20 GB"`; only with a target.
        text: The text for `quality_loss`, as an answer to the first prompt; a short one is built
            in.
        proof_rounds: The rounds of the proof.
        seconds: After how long no further trial begins; None for no limit.
        seed: Of the search and of the server's sampling.
        parallel: Numbers of requests to have under way at once, each measured on its own.
        max_tokens: Length of an answer.
        config: The settings that the space changes; by default those of `.env`.
        quality: As for a `Sweep`.
        chat: Whether prompts go through the model's chat template.
        requests: As for a `Sweep`.
        record: As for a `Sweep`; trials that were measured without a run record do not count.
        store: The file for the rows.
        logs: A folder in which to keep the servers' logs.
        busy_repeats: As for a `Sweep`.
        on_event: Called on the search's thread when a trial begins, makes progress or ends.

    Returns:
        Cancelling it ends the search and the server under way; the rows stay in the store. It may
        end with `ExperimentError`: no trial could be measured, or none keeps the constraints.

    Raises:
        ConfigError: Listing every name and value that is wrong.
        ExperimentError: There is nothing to try, or Optuna is missing.
    """
    extra("optuna")
    from kitty_nb.experiments import target as targets  # noqa: PLC0415 (it imports this)
    from kitty_nb.experiments.study import Search, default_space, read_space  # noqa: PLC0415 (of an extra)

    warnings = () if config else env_warnings(".env", "primary")
    config = config or ServerConfig.from_env()
    models: Sequence[object] = [] if model is None else [model]
    goal = None
    if target:
        goal = targets.Goal.of(target, quality_loss, memory, text, proof_rounds)
        models, largest = targets.family_of(model, config)
        objective, constraints = targets.COST, {**goal.limits, **(constraints or {})}
        space = {**default_space(config), **targets.COSTS} if space is None else space
        prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if goal.loss and quality is None:
            quality = Perplexity(dict.fromkeys(prompts[:1], goal.text))
    elif quality_loss or memory:
        raise ExperimentError("quality_loss and memory go with a target. Give one, or constraints.")
    asked = {"max_tokens": max_tokens, "seed": seed, "chat": chat, "record": record}
    workload = Workload.of(prompts, parallel, quality, **asked, at_least=requests)
    if budget < 1:
        raise ExperimentError(f"budget is {budget}, so nothing would be tried. Write 1 or more.")
    names = metric_names(workload)
    bounds = constraints_of(constraints)
    aim = read_objective(objective, names)
    search = Search(*read_space(models, config, space, bounds, names), aim, bounds, config, seed)
    batches = [search.samples(name) for name in search.space if name in BATCHES and not goal]
    workload, useless = fill_batches(workload, [*product(*batches)], config, aim.name)
    common: dict[str, Any] = {
        "config": config,
        "workload": workload,
        "store": store,
        "logs": logs,
        "busy_repeats": busy_repeats,
        "warnings": (*warnings, *useless),
        "search": search,
        "budget": budget,
        "seconds": seconds,
    }
    run = Tuning(**common)
    if goal:
        reference = search.models[models.index(largest)]
        run = targets.TargetTuning(goal=goal, reference=reference, **common)
    run.subscribe(on_event)
    return run.start()


class Tuning(TrialRunner):
    """A search under way: each trial is asked for when the one before it has its row."""

    def __init__(
        self, *, search: Search, budget: int, seconds: float | None, **common: Any
    ) -> None:
        super().__init__(**common)
        self._search = search
        self._budget = budget
        self._seconds = seconds

    def start(self) -> Operation[TuneResult]:
        """Search in a thread of its own."""
        return self._start(self._find, "kitty_nb tune")

    async def _find(self) -> TuneResult:
        await self._controlled(self._run)
        search, results = self._search, self._search.results
        results = replace(results, workload=self.workload)
        await self._write_requests(results)
        best, name = results.choose(search.objective, search.bounds), search.objective.name
        return TuneResult(best, best.metrics[name].median, name, results, search.study)

    async def _run(self) -> None:
        models = self._search.models
        await self._check_flags(map(self._search.samples, self._search.space))
        await anyio.to_thread.run_sync(
            partial(fingerprints_here, models, self.config, must_exist=True)
        )
        await self._kept.add()  # creates the file, so that an unusable one shows first
        self._resume(await anyio.to_thread.run_sync(self._rows_of, models))
        async with this_machine(self.config, self.workload, self._logs) as execute:
            await self._carry_out(self._plan(), execute)

    def _resume(self, rows: list[TrialResult]) -> None:
        self._search.resume(rows)

    def _plan(self) -> Iterator[Trial]:
        began, search = time.monotonic(), self._search
        while len(search.rows) < self._budget:
            late = self._seconds is not None and time.monotonic() - began > self._seconds
            trial = None if late and search.rows else search.ask()
            if trial is None:
                return
            yield trial
            search.tell(self._rows[trial.key])

    async def _measure(
        self, trial: Trial, execute: Execute, on_progress: OnProgress
    ) -> TrialResult:
        """Return the trial's row; it is pruned where it cannot win any more."""
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
            if isinstance(event, TrialProgressed):
                sofar.clear()  # of a load's time so far the latest counts
            sofar.append(found[name])
            why = self._search.prune_reason(median(sofar))
            if why:
                scope.cancel()

        began = time.monotonic()
        row: TrialResult | None = None
        with anyio.CancelScope() as scope:
            if self._search.objective.tells_speed and usual:
                scope.deadline = anyio.current_time() + _PATIENCE * usual
            row = await super()._measure(trial, execute, watch)
        if row:
            return row
        passed = time.monotonic() - began
        here = await anyio.to_thread.run_sync(fingerprints_here, [trial.model], self.config)
        late = f"its {name} was still missing after {passed:.1f} s, far longer than usual."
        return TrialResult(
            trial,
            Outcome.PRUNED,
            f"Pruned: {why or late}",
            seconds=TrialSeconds(overall=passed),
            host=this_host(),
            at=time.time(),
            fingerprint=here.get(trial.model),
        )
