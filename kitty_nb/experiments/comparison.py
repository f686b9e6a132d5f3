"""Two sweeps side by side: two machines, or two builds of an engine. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.metrics import known, smaller_is_better, tells_speed
from kitty_nb.experiments.results import frame_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from pandas import DataFrame

    from kitty_nb.experiments.combination import Combination
    from kitty_nb.experiments.results import Results
    from kitty_nb.experiments.statistics import Difference
    from kitty_nb.experiments.trial import Trial


@dataclass(frozen=True, slots=True)
class Compared:
    """One number of one combination in both.

    Attributes:
        trial: The combination.
        metric: The number's name.
        difference: The second over the first, with its interval and verdict.
    """

    trial: Trial
    metric: str
    difference: Difference


@dataclass(frozen=True, repr=False)
class ResultsComparison:
    """Two sweeps side by side; `print` shows it as a table in Markdown.

    Attributes:
        compared: Each combination and number that both have.
        missing: Combinations that only one of them measured.
    """

    compared: tuple[Compared, ...]
    missing: tuple[Trial, ...]

    @property
    def frame(self) -> DataFrame:
        """A row for each combination and number.

        Raises:
            ExperimentError: pandas is missing.
        """
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
        lines = ["| combination | metric | second over first | verdict |", "|---|---|---:|---|"]
        lines += [
            f"| {one.trial.label} | {one.metric} | {one.difference.ratio:.3f} | {one.difference} |"
            for one in self.compared
        ]
        if self.missing:
            only = "; ".join(trial.label for trial in self.missing)
            lines += ["", f"Measured in only one of them: {only}."]
        return "\n".join(lines)

    __repr__ = __str__


def compare_results(
    first: Results, second: Results, metrics: Iterable[str] = ()
) -> ResultsComparison:
    """Compare two sweeps of the same combinations, on two machines or with two engine builds.

    Combinations are the same if the model's file name and all settings are. Their repeats are
    taken as rounds, so that a drift over the rounds that both have counts less.

    Args:
        first: What to compare with.
        second: What is judged: *faster* means that it is better.
        metrics: Numbers of the table; by default all speeds that are no percentiles.

    Raises:
        ExperimentError: They have no combination in common, or no such number.
    """
    before, after = _by_combination(first), _by_combination(second)
    common = [key for key in before if key in after]
    if not common:
        raise ExperimentError(
            "The two have no combination in common. Compare sweeps of the same models and settings."
        )
    names = {
        name for key in common for name in before[key].metrics.keys() & after[key].metrics.keys()
    }
    wanted = [known(name, names) for name in metrics] or sorted(
        name for name in names if tells_speed(name) and "_p9" not in name and "_p50" not in name
    )
    compared = []
    for key in common:
        for name in wanted:
            small = smaller_is_better(name)
            found = after[key].against(before[key], name, smaller_is_better=small)
            if found and found.rounds:
                compared.append(Compared(before[key].trial, name, found))
    only = [(before | after)[key] for key in before.keys() ^ after.keys()]
    return ResultsComparison(tuple(compared), tuple(one.trial for one in only))


def _by_combination(results: Results) -> dict[Hashable, Combination]:
    return {
        (PurePath(one.trial.model).name, frozenset(one.trial.settings)): one
        for one in results.combinations
        if one.done
    }
