"""The rows of a sweep: as a table, as medians with their spread, and the best of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kitty_nb.config import env_lines
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.metrics import (
    OBJECTIVE,
    Spread,
    batch_tokens,
    constraints_of,
    known,
    metrics_of,
    read_objective,
)
from kitty_nb.experiments.space import batch_effect, changes, idle_batches, in_use
from kitty_nb.experiments.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import ModuleType

    from matplotlib.figure import Figure
    from pandas import DataFrame

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.metrics import Constraint, Objective
    from kitty_nb.experiments.trial import Trial, TrialResult

_UNKNOWN = 0.1  # share of a speed within which one measurement says nothing
_SHOWN = 3  # reasons in a message
_LENGTH = 300  # characters of one


@dataclass(frozen=True, repr=False)
class Combination:
    """The rows of one combination of model and settings, taken together.

    Attributes:
        trial: The combination; its first repeat stands for all.
        base: The settings that it changes.
        outcomes: The number of repeats with each outcome.
        reasons: The reasons that repeats were not measured, each sentence once.
        metrics: The numbers of those measured, by name.
        close: Others that were about as good when this one was chosen: too close to tell.
        batch_tokens: The most tokens that a batch may have had, by name of the speed.
        idle: Batch sizes that made no difference when it was chosen: no batch was as large.
        once: Whether it was chosen by a speed that was measured once.
    """

    trial: Trial
    base: ServerConfig
    outcomes: Mapping[Outcome, int] = field(default_factory=Counter)
    reasons: tuple[str, ...] = ()
    metrics: Mapping[str, Spread] = field(default_factory=dict)
    close: tuple[Trial, ...] = ()
    batch_tokens: Mapping[str, int] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    once: bool = False

    @classmethod
    def of(cls, rows: Sequence[TrialResult], base: ServerConfig) -> Combination:
        """Take rows of the same combination together."""
        measured = [metrics_of(row) for row in rows if row.outcome is Outcome.DONE]
        names = dict.fromkeys(name for one in measured for name in one)
        tokens = [batch_tokens(row) for row in rows]
        return cls(
            trial=rows[0].trial.combination,
            base=base,
            outcomes=Counter(row.outcome for row in rows),
            reasons=tuple(dict.fromkeys(row.reason for row in rows if row.reason)),
            metrics={n: Spread.over([one[n] for one in measured if n in one]) for n in names},
            batch_tokens={n: max(one.get(n, 0) for one in tokens) for one in tokens for n in one},
        )

    def __repr__(self) -> str:
        doubt = f"; {self.doubt}" if self.doubt else ""
        return f"Combination({self.trial.label}: {self.done} measured{doubt})"

    @property
    def done(self) -> int:
        """The number of repeats that were measured."""
        return self.outcomes.get(Outcome.DONE, 0)

    @property
    def doubt(self) -> str:
        """The reason for doubting the choice, in words; empty if there is none."""
        others = len(self.close)
        doubts = [f"too close to tell from {others} other{'s' * (others > 1)}"] if others else []
        if self.once:
            doubts.append(f"measured once, so {_UNKNOWN * 100:.0f} % either way may be chance")
        return ", ".join([*doubts, *(["nearest to the settings in use"] if others else [])])

    @property
    def config(self) -> ServerConfig:
        """Its settings, to start a server with; those that made no difference are as in use.

        Raises:
            ConfigError: The model is gone.
        """
        return self.base.replace(**self._changes)

    @property
    def _changes(self) -> dict[str, Any]:
        made = changes(self.trial, self.base)
        return {name: value for name, value in made.items() if name not in self.idle}

    def value(self, name: str) -> Any:
        """Return a setting or the median of a metric, None where it has none.

        A `context_size` that was left to the engine is what a request had of it.
        """
        if name in self.metrics:
            return self.metrics[name].median
        given = {"model": self.trial.model, **dict(self.trial.settings)}
        value = given[name] if name in given else getattr(self.base, name, None)
        if name == "context_size" and not value and "context" in self.metrics:
            return int(self.metrics["context"].median)
        return value

    def keeps(self, bounds: Iterable[Constraint]) -> bool:
        """True if it keeps all bounds."""
        return all(bound.allows(self.value(bound.name)) for bound in bounds)

    def env_lines(self, profile: str | None = None) -> str:
        """Return the lines to paste into `.env` so that a profile is served like this.

        Args:
            profile: Without it that of the sweep's own settings.
        """
        config = self.config.replace(profile=profile) if profile else self.config
        notes = [f"# {self.doubt.capitalize()}."] if self.doubt else []
        if self.idle:
            notes.append(f"# Without {' and '.join(self.idle)}: no batch measured was so large.")
        return "\n".join([*notes, *env_lines(config, self._changes)])


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
        settings = {name for one in measured for name, _ in one.trial.settings}
        aim, bounds = read_objective(objective, names), constraints_of(constraints)
        for bound in bounds:
            known(bound.name, names | settings | set(type(self.config).model_fields))
        return self.choose(aim, bounds)

    def choose(self, objective: Objective, bounds: Sequence[Constraint]) -> Combination:
        """Return the best by an objective that keeps all bounds, with its value in `metrics`.

        Raises:
            ExperimentError: There is none; the message names what comes nearest.
        """
        if fitting := self.fitting(objective, bounds):
            return _choose(fitting, objective)
        measured = self._measured("there is no best")
        if all(objective.of(row) is None for row in self.rows):
            raise ExperimentError(
                f"No trial has {objective.name}. Choose another objective, or have it measured"
                " (quality=…, parallel=…)."
            )
        near = min(measured, key=lambda one: sum(b.excess(one.value(b.name)) for b in bounds))
        have = ", ".join(f"{bound.name} {near.value(bound.name)}" for bound in bounds)
        raise ExperimentError(
            f"None of {len(measured)} combinations keeps {' and '.join(map(str, bounds))}. The"
            f" nearest is {near.trial.label}, with {have}. Loosen a constraint, or try other"
            " settings."
        )

    def fitting(self, objective: Objective, bounds: Sequence[Constraint]) -> list[Combination]:
        """Return the combinations that keep all bounds, with the objective's value in `metrics`."""
        values: dict[Trial, list[float]] = {}
        for row in self.rows:
            if (value := objective.of(row)) is not None:
                values.setdefault(row.trial.combination, []).append(value)
        return [
            replace(one, metrics={**one.metrics, objective.name: Spread.over(values[one.trial])})
            for one in self.combinations
            if one.trial in values and one.keeps(bounds)
        ]

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
            reasons = Counter(row.reason[:_LENGTH] for row in self.rows).most_common(_SHOWN)
            told = "".join(f"\n- {count} of them: {reason}" for reason, count in reasons)
            raise ExperimentError(f"None of {len(self.rows)} trials was measured, so {so}.{told}")
        return measured


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


def _choose(fitting: Sequence[Combination], objective: Objective) -> Combination:
    """The best median; of those too close to it to tell, the nearest to the settings in use.

    Two are too close where their ranges overlap, or where they differ only in batch sizes that no
    batch was large enough for. What was measured once has no range, so of a speed some is assumed.
    """
    name, sign = objective.name, 1 if objective.smaller else -1

    def cost(one: Combination) -> float:
        return sign * one.metrics[name].median

    def ends(one: Combination) -> tuple[float, float]:
        unknown = _UNKNOWN * abs(cost(one)) if one.once else 0.0
        least, most = sorted((sign * one.metrics[name].low, sign * one.metrics[name].high))
        return least - unknown, most + unknown

    def effect(one: Combination, tokens: int) -> object:
        return one.trial.model, batch_effect(one.trial.settings, one.base, tokens)

    def alike(one: Combination) -> bool:
        tokens = max(each.batch_tokens.get(name, 0) for each in (one, first))
        return tokens > 0 and effect(one, tokens) == effect(first, tokens)

    def distance(one: Combination) -> tuple[int, int, float]:
        given = (
            (setting, value) for setting, value in one.trial.settings if setting not in one.idle
        )
        changed = sum(value != in_use(setting, one.base) for setting, value in given)
        return changed, len(one.idle), cost(one)

    judged = [_judged(one, name) for one in fitting] if objective.tells_speed else fitting
    first = min(judged, key=cost)
    worst = ends(first)[1]
    close = (one for one in judged if ends(one)[0] <= worst or alike(one))
    best, *others = sorted(close, key=distance)
    return replace(best, close=tuple(one.trial for one in others))


def _judged(one: Combination, speed: str) -> Combination:
    """The combination with what makes its speed doubtful."""
    tokens = one.batch_tokens.get(speed)
    idle = idle_batches(one.trial.settings, one.base, tokens) if tokens else ()
    return replace(one, idle=idle, once=one.done == 1)


def _frame(rows: Iterable[dict[str, Any]]) -> DataFrame:
    frame: DataFrame = extra("pandas").DataFrame(list(rows))
    return frame
