"""Comparison of two sweeps: two machines, or two engine builds. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.arguments import require, texts
from kitty_nb.experiments.metrics import in_words, is_speed, known, smaller_is_better
from kitty_nb.experiments.output import frame_of, markdown_table
from kitty_nb.experiments.results import Results

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from pandas import DataFrame

    from kitty_nb.experiments.combination import Combination
    from kitty_nb.experiments.statistics import Difference
    from kitty_nb.experiments.trial import Trial


@dataclass(frozen=True, slots=True)
class Compared:
    """A metric of a combination that both sweeps measured: the second over the first."""

    trial: Trial
    metric: str
    difference: Difference


@dataclass(frozen=True, repr=False)
class ResultsComparison:
    """Two sweeps compared; `print` shows a Markdown table.

    Attributes:
        compared: Every combination and metric that both sweeps have.
        missing: Combinations that only one sweep measured.
        notes: Metrics left out of a sweep and trials that failed, in sentences.
    """

    compared: tuple[Compared, ...]
    missing: tuple[Trial, ...]
    notes: tuple[str, ...] = ()

    @property
    def frame(self) -> DataFrame:
        """The comparison as a data frame, with a row per combination and metric."""
        return frame_of(
            {
                **one.trial.columns,
                "metric": one.metric,
                **asdict(one.difference),
                "verdict": one.difference.verdict.value,
            }
            for one in self.compared
        )

    def __str__(self) -> str:
        rows = (
            (
                one.trial.label,
                one.metric,
                f"{one.difference.ratio:.3f}",
                in_words(one.metric, one.difference),
            )
            for one in self.compared
        )
        lines = markdown_table(("combination", "metric", "second / first", "verdict"), rows, "llrl")
        if self.missing:
            only = "; ".join(trial.label for trial in self.missing)
            lines += ["", f"Measured in only one sweep: {only}."]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)

    __repr__ = _repr_markdown_ = __str__


def compare_results(
    first: Results, second: Results, metrics: str | Iterable[str] = ()
) -> ResultsComparison:
    """Compare two sweeps of the same combinations, on two machines or with two engine builds.

    Combinations match if their model file names and all settings are equal; where a sweep has two
    files of one name, if their paths are. Repeats are paired as rounds, which reduces the effect of
    a drift that both sweeps share.

    Args:
        first: The baseline.
        second: The sweep to judge: *faster* means that it is better.
        metrics: Names of metrics; by default all speeds except percentiles.

    Raises:
        ExperimentError: Nothing was measured, the sweeps have no combination in common, differ in
            their requests or measured different files of one name, or a metric is unknown.
    """
    for argument, sweep in (("first", first), ("second", second)):
        require(argument, sweep, Results, "the results of a sweep")
        sweep.measured("there is nothing to compare")
    _check_conditions(first, second)
    before, after = _by_combination(first, second)
    common = [key for key in before if key in after]
    if not common:
        raise ExperimentError(
            "The sweeps have no combination in common. Compare sweeps of the same models and"
            " settings."
        )
    names = {
        name for key in common for name in before[key].metrics.keys() & after[key].metrics.keys()
    }
    asked, rows = texts("metrics", metrics), (*first.rows, *second.rows)
    either = {n for one in (*first.combinations, *second.combinations) for n in one.metrics}
    if lone := sorted(either.intersection(asked) - names):
        raise ExperimentError(
            f"No combination has {' and '.join(lone)} in both sweeps. Compare another metric."
        )
    wanted = [known(name, names, rows) for name in asked] or sorted(
        name for name in names if is_speed(name) and "_p9" not in name and "_p50" not in name
    )
    compared = []
    for key in common:
        for name in wanted:
            small = smaller_is_better(name)
            found = after[key].against(before[key], name, smaller_is_better=small, across_runs=True)
            if found and found.rounds:
                compared.append(Compared(before[key].trial, name, found))
    only = [(before | after)[key] for key in before.keys() ^ after.keys()]
    notes = (
        f"{one.trial.label}, {which} sweep: {reason}"
        for key in common
        for which, one in (("first", before[key]), ("second", after[key]))
        for reason in one.reasons
    )
    return ResultsComparison(tuple(compared), tuple(one.trial for one in only), tuple(notes))


def _check_conditions(first: Results, second: Results) -> None:
    """Reject sweeps whose requests differ in what speeds depend on."""
    given = [dict(one.workload.conditions()) for one in (first, second) if one.workload]
    for one in given:
        one["quality"] = bool(one["quality"])  # then answers end where the model ends them
    names = ("prompts", "max_tokens", "chat", "parallel", "quality", "fill")
    differing = [name for name in names if len({one[name] for one in given}) > 1]
    if differing:
        raise ExperimentError(
            f"The sweeps differ in {' and '.join(differing)}, so their speeds can't be compared."
            " Run one of them again with those of the other."
        )


def _by_combination(*sweeps: Results) -> list[dict[Hashable, Combination]]:
    """Return each sweep's measured combinations by model and settings."""
    models = [{row.trial.model for row in sweep.rows} for sweep in sweeps]
    named = [Counter(PurePath(model).name for model in each) for each in models]

    def name(model: str) -> str:
        short = PurePath(model).name
        return model if any(count[short] > 1 for count in named) else short

    rows = [row for sweep in sweeps for row in sweep.rows if row.fingerprint]
    files = Counter(name for name, _ in {(name(row.trial.model), row.fingerprint) for row in rows})
    if different := sorted(name for name, count in files.items() if count > 1):
        raise ExperimentError(
            f"The sweeps measured different files named {' and '.join(different)}. Compare sweeps"
            " of the same models."
        )
    return [
        {
            (name(one.trial.model), frozenset(one.trial.settings)): one
            for one in sweep.combinations
            if one.done
        }
        for sweep in sweeps
    ]
