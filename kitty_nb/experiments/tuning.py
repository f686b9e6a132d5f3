"""`tune`: the best settings in far fewer trials than a grid has combinations."""

from __future__ import annotations

import atexit
import logging
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitty_nb.config import ServerConfig, env_warnings
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments import batches
from kitty_nb.experiments.background import in_background
from kitty_nb.experiments.metrics import OBJECTIVE, constraints_of, metric_names
from kitty_nb.experiments.objective import read_objective
from kitty_nb.experiments.results import Results, extra
from kitty_nb.experiments.settings import digest
from kitty_nb.experiments.space import read_space
from kitty_nb.experiments.store import ResultStore
from kitty_nb.experiments.workload import DEFAULT_PROMPT, Workload
from kitty_nb.manager import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from optuna import Study

    from kitty_nb.experiments.quality import Perplexity, Quality
    from kitty_nb.experiments.results import Combination
    from kitty_nb.experiments.search import Search
    from kitty_nb.experiments.trial import SweepEvent, TrialResult

__all__ = ["TuneResult", "tune"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class TuneResult:
    """What a search has found.

    Attributes:
        best: The best combination that keeps all constraints; see `Results.best`.
        value: Its objective: the median of its measurements.
        objective: What that is.
        results: All rows, for tables and plots.
        study: What Optuna knows of them, for its own plots and importances. Ordered values are
            there by their place; the settings themselves are each trial's `user_attrs`.
    """

    best: Combination
    value: float
    objective: str
    results: Results
    study: Study = field(compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """The best settings by name."""
        return dict(self.best.trial.settings)

    @property
    def summary(self) -> str:
        """What was done, and what came of it, in a sentence or two."""
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
    store: str | Path = "tune.sqlite3",
    logs: str | Path | None = None,
    on_event: Callable[[SweepEvent], None] = lambda _: None,
) -> Operation[TuneResult]:
    """Search for the settings that are best at something, and return at once.

    Trials run here one after the other, as those of a `Sweep` do. The settings in use come first,
    then some by chance, then what Optuna expects to be better; every eighth trial measures the best
    so far again, up to three times, for medians are compared. A trial that is clearly behind the
    others is broken off. Rows are in the `store` as soon as they are there, and count: the same
    call goes on where the last one ended.

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
        store: The SQLite file for the rows.
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
    extra("optuna")
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
    tried = [*batches.of_space(choices)]
    workload = batches.filled(workload, tried, config, aim.name)
    for warning in (*warnings, *batches.warn(tried, config, workload, aim.name)):
        _log.warning(warning)
    search: Search = import_module("kitty_nb.experiments.search").Search(
        model=name,
        space=choices,
        objective=aim,
        bounds=bounds,
        budget=budget,
        seconds=seconds,
        seed=seed,
        config=config,
        workload=workload,
        kept=ResultStore(
            Path(store).expanduser().absolute(), digest(config, workload.conditions())
        ),
        logs=Path(logs).expanduser().absolute() if logs else None,
        on_event=on_event,
    )
    thread, future = in_background(lambda: _find(search), "kitty_nb tune")

    def close() -> None:
        future.cancel()
        thread.join()

    atexit.register(close)
    future.add_done_callback(lambda _: atexit.unregister(close))
    return Operation(future, lambda: search.load)


async def _find(search: Search) -> TuneResult:
    await search.run()
    standing = search.standing
    if standing.best is None:
        raise ExperimentError(standing.complaint)
    best, spread = standing.best
    return TuneResult(
        best=best,
        value=spread.median,
        objective=search.objective.name,
        results=Results(search.config, standing.rows),
        study=import_module("kitty_nb.experiments.propose").make_study(
            search.space, standing.known, search.objective.smaller
        ),
    )
