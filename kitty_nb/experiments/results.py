"""The rows of a sweep: as a table, as medians with their spread, and the best of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.combination import UNKNOWN, Combination
from kitty_nb.experiments.metrics import (
    OBJECTIVE,
    Spread,
    constraints_of,
    known,
    metrics_of,
    smaller_is_better,
    tells_speed,
)
from kitty_nb.experiments.space import alike, idle_batches

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import ModuleType

    from matplotlib.figure import Figure
    from pandas import DataFrame

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.trial import Trial, TrialResult


@dataclass(frozen=True)
class Results:
    """The measurements of a sweep so far. It does not change while the sweep goes on.

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
        """The rows of each combination taken together, in the order in which they first ended."""
        groups: dict[Trial, list[TrialResult]] = {}
        for row in self.rows:
            groups.setdefault(row.trial.combination, []).append(row)
        return tuple(Combination.of(rows, self.config) for rows in groups.values())

    @property
    def frame(self) -> DataFrame:
        """A row for each trial: its settings, how it ended, and all that was measured.

        Raises:
            ExperimentError: pandas is missing.
        """
        return _frame(
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
        )

    @property
    def summary(self) -> DataFrame:
        """A row for each combination: medians, and as `…_low` and `…_high` how far they spread.

        Raises:
            ExperimentError: pandas is missing.
        """
        return _frame(
            {
                "model": one.trial.model,
                **dict(one.trial.settings),
                "trials": one.done,
                "reason": " ".join(one.reasons),
                **{name: spread.median for name, spread in one.metrics.items()},
                **{f"{name}_low": spread.low for name, spread in one.metrics.items()},
                **{f"{name}_high": spread.high for name, spread in one.metrics.items()},
            }
            for one in self.combinations
        )

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
        measured = self._measured("there is no best")
        names = {name for one in measured for name in one.metrics}
        known(objective, names)
        settings = {name for one in measured for name, _ in one.trial.settings}
        bounds = constraints_of(constraints)
        for bound in bounds:
            known(bound.name, names | settings | set(type(self.config).model_fields))
        fitting = [
            (one, one.metrics[objective])
            for one in measured
            if objective in one.metrics
            and all(bound.allows(one.value(bound.name)) for bound in bounds)
        ]
        if not fitting:
            raise ExperimentError(
                f"None of {len(measured)} combinations keeps {' and '.join(map(str, bounds))}."
                " Loosen a constraint, or try other settings."
            )
        smaller, speed = smaller_is_better(objective), tells_speed(objective)
        return choose(fitting, objective, smaller=smaller, speed=speed)[0]

    def env_lines(
        self,
        objective: str = OBJECTIVE,
        constraints: Mapping[str, Any] | None = None,
        profile: str | None = None,
    ) -> str:
        """Return the `.env` lines of the best combination; see `best`."""
        return self.best(objective, constraints).env_lines(profile)

    def plot(self, kind: str = "bars", y: str = OBJECTIVE, x: str = "memory_gib") -> Figure:
        """Draw what was measured; a notebook shows the figure.

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
        from kitty_nb.experiments.plots import KINDS  # noqa: PLC0415 (of an extra)

        if kind not in KINDS:
            raise ExperimentError(f"There is no plot {kind!r}. There are {', '.join(KINDS)}.")
        measured = self._measured("there is nothing to draw")
        names = {name for one in measured for name in one.metrics}
        wanted = {known(name, names) for name in ((y, x) if kind == "pareto" else (y,))}
        return KINDS[kind]([one for one in measured if wanted <= one.metrics.keys()], y, x)

    def _measured(self, so: str) -> list[Combination]:
        measured = [one for one in self.combinations if one.done]
        if not measured:
            raise ExperimentError(
                f"None of {len(self.rows)} trials was measured, so {so}. The rows say why."
            )
        return measured


def choose(
    found: Iterable[tuple[Combination, Spread]], metric: str, *, smaller: bool, speed: bool
) -> tuple[Combination, Spread]:
    """Return the best median; of those too close to it to tell, the nearest to the settings in use.

    Two are too close where their ranges overlap, or where they differ only in batch sizes that no
    batch was large enough for. What was measured once has no range, so of a speed some is assumed.

    Args:
        found: Each combination with the number that is compared; one at least.
        metric: Its name.
        smaller: Whether less of it is better.
        speed: Whether it varies from one measurement to the next.
    """
    sign = 1 if smaller else -1
    ranked = []
    for one, spread in found:
        once = speed and one.done == 1
        unknown = UNKNOWN * abs(spread.median) if once else 0.0
        ends = sorted((sign * spread.low, sign * spread.high))
        tokens = one.batch_tokens.get(metric) if speed else None
        idle = idle_batches(one.trial.settings, one.base, tokens) if tokens else ()
        judged = replace(one, idle=idle, once=once)
        ranked.append((sign * spread.median, ends[0] - unknown, ends[1] + unknown, judged, spread))
    _, _, worst, first, _ = min(ranked, key=lambda entry: entry[0])
    close = sorted(
        (entry for entry in ranked if entry[1] <= worst or _same(entry[3], first, metric)),
        key=lambda entry: (entry[3].changed, len(entry[3].idle), entry[0]),
    )
    (*_, best, spread), *others = close
    return replace(best, close=tuple(one.trial for *_, one, _ in others)), spread


def extra(name: str, of: str = "experiments") -> ModuleType:
    """Import a package of an extra of this one.

    Raises:
        ExperimentError: It is missing.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ExperimentError(
            f"This needs {name}, which cannot be imported: {error}. Install it:"
            f" pip install 'kitty_nb[{of}]'"
        ) from error


def _same(one: Combination, other: Combination, metric: str) -> bool:
    """True if two differ in nothing that a speed can show."""
    tokens = max(each.batch_tokens.get(metric, 0) for each in (one, other))
    settings = one.trial.settings, other.trial.settings
    same = tokens > 0 and alike(*settings, one.base, tokens)
    return same and one.trial.model == other.trial.model


def _frame(rows: Iterable[dict[str, Any]]) -> DataFrame:
    frame: DataFrame = extra("pandas").DataFrame(list(rows))
    return frame
