"""The rows of a sweep: as a table, as medians with their spread, and the best of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.combination import choose, combine_repeats
from kitty_nb.experiments.metrics import (
    OBJECTIVE,
    constraints_of,
    known,
    metrics_of,
    smaller_is_better,
    tells_speed,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from matplotlib.figure import Figure
    from pandas import DataFrame

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.combination import Combination
    from kitty_nb.experiments.trial import TrialResult

__all__ = ["OBJECTIVE", "Results", "extra"]


@dataclass(frozen=True)
class Results:
    """What is known of a sweep by now. It does not change while the sweep goes on.

    Attributes:
        config: The settings that the trials change.
        rows: One for each trial that has ended, in that order.
    """

    config: ServerConfig
    rows: tuple[TrialResult, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Results({len(self.rows)} trials of {len(self.combinations)} combinations)"

    def _repr_html_(self) -> str:
        return str(self.frame.to_html())

    @cached_property
    def combinations(self) -> tuple[Combination, ...]:
        """The rows, those of the same model and settings taken together."""
        return combine_repeats(self.rows, self.config)

    @property
    def frame(self) -> DataFrame:
        """A row for each trial: model, settings, outcome, reason and what was measured.

        Raises:
            ExperimentError: pandas is missing.
        """
        rows = [
            {
                "model": row.trial.model,
                **dict(row.trial.settings),
                "repeat": row.trial.repeat,
                "outcome": row.outcome.value,
                "reason": row.reason,
                **metrics_of(row),
                "host": row.host,
                "engine": row.engine,
            }
            for row in self.rows
        ]
        frame: DataFrame = extra("pandas").DataFrame(rows)
        return frame

    @property
    def summary(self) -> DataFrame:
        """A row for each combination: medians, and as `…_low` and `…_high` how far they spread.

        Raises:
            ExperimentError: pandas is missing.
        """
        rows = [
            {
                "model": one.trial.model,
                **dict(one.trial.settings),
                "trials": one.done,
                "reason": " ".join(one.reasons),
                **{
                    name + end: value
                    for name, spread in one.metrics.items()
                    for end, value in (
                        ("", spread.median),
                        ("_low", spread.low),
                        ("_high", spread.high),
                    )
                },
            }
            for one in self.combinations
        ]
        frame: DataFrame = extra("pandas").DataFrame(rows)
        return frame

    def best(
        self, objective: str = OBJECTIVE, constraints: Mapping[str, Any] | None = None
    ) -> Combination:
        """Return the combination with the best median.

        Where others are too close to tell, it is the one nearest to the settings in use, and has
        the others as `close`.

        Args:
            objective: A number of the table. Of seconds, memory and perplexity less is better.
            constraints: Bounds to keep, of numbers or settings, by name and sign; a name alone
                means at most: `{"memory_gib": 20, "context_size>=": 16384}`.

        Raises:
            ExperimentError: No combination keeps them, or a name is not known.
        """
        measured = [one for one in self.combinations if one.done]
        if not measured:
            raise ExperimentError(
                f"None of {len(self.rows)} trials was measured, so there is no best. The rows say"
                " why."
            )
        names = {name for one in measured for name in one.metrics}
        known(objective, names)
        settings = {name for one in measured for name, _ in one.trial.settings}
        settings |= set(type(self.config).model_fields)
        bounds = constraints_of(constraints)
        for bound in bounds:
            known(bound.name, names | settings)
        fitting = [
            one
            for one in measured
            if objective in one.metrics
            and all(bound.allows(one.value(bound.name)) for bound in bounds)
        ]
        if not fitting:
            raise ExperimentError(
                f"None of {len(measured)} combinations keeps {' and '.join(map(str, bounds))}."
                " Loosen a constraint, or try other settings."
            )
        found = ((one, one.metrics[objective]) for one in fitting)
        smaller, speed = smaller_is_better(objective), tells_speed(objective)
        return choose(found, objective, smaller=smaller, speed=speed)[0]

    def env_lines(
        self,
        objective: str = OBJECTIVE,
        constraints: Mapping[str, Any] | None = None,
        profile: str | None = None,
    ) -> str:
        """Return the `.env` lines of the best combination; see `best`."""
        return self.best(objective, constraints).env_lines(profile)

    def plot(self, kind: str = "bars", y: str = OBJECTIVE, x: str = "memory_gib") -> Figure:
        """Draw what was measured; a notebook shows what this returns.

        Args:
            kind: `bars` of medians with their spread; `parallel` coordinates, one line for each
                combination through all that varies; or `pareto`, what is best at one number for
                each amount of another.
            y: The number that matters.
            x: The number that it costs, for `pareto`: memory, perplexity, or also quality.

        Raises:
            ExperimentError: Matplotlib is missing, nothing was measured, or a name is not known.
        """
        extra("matplotlib")
        figure: Figure = import_module("kitty_nb.experiments.plots").draw(self, kind, y, x)
        return figure


def extra(name: str, of: str = "experiments") -> ModuleType:
    """Import a package of an extra.

    Args:
        name: Of the package.
        of: The extra's name.

    Raises:
        ExperimentError: It is missing.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ExperimentError(
            f"{name} is needed for this and cannot be imported: {error}. Install it:"
            f" pip install 'kitty_nb[{of}]'"
        ) from error
