"""`Combination`: the repeats of one model with its settings, and the choice of the best of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kitty_nb.config import env_lines
from kitty_nb.experiments.metrics import Spread, batch_tokens, metrics_of
from kitty_nb.experiments.space import batch_effect, changes, idle_batches, in_use
from kitty_nb.experiments.statistics import LEAST_ROUNDS, Verdict, compare_paired, own_spread
from kitty_nb.experiments.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.metrics import Constraint, Objective
    from kitty_nb.experiments.statistics import Difference
    from kitty_nb.experiments.trial import Trial, TrialResult

_UNKNOWN = 0.1  # share of a speed within which one measurement says nothing


@dataclass(frozen=True, repr=False)
class Combination:
    """The rows of one combination of model and settings, taken together.

    Attributes:
        trial: The combination; its first repeat stands for all.
        base: The settings that it changes.
        outcomes: The number of repeats with each outcome.
        reasons: The reasons that repeats were not measured, each sentence once.
        metrics: The numbers of those measured, by name.
        series: The same by name and round.
        close: Others that were about as good when this one was chosen: too close to tell.
        more_rounds: How many more rounds would probably tell it from those; 0 where not known.
        batch_tokens: The most tokens that a batch may have had, by name of the speed.
        idle: Batch sizes that made no difference when it was chosen: no batch was as large.
        once: Whether it was chosen by a speed that was measured once.
        busy: Of those measured, the number on a busy machine.
    """

    trial: Trial
    base: ServerConfig
    outcomes: Mapping[Outcome, int] = field(default_factory=Counter)
    reasons: tuple[str, ...] = ()
    metrics: Mapping[str, Spread] = field(default_factory=dict)
    series: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    close: tuple[Trial, ...] = ()
    more_rounds: int = 0
    batch_tokens: Mapping[str, int] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    once: bool = False
    busy: int = 0

    @classmethod
    def of(cls, rows: Sequence[TrialResult], base: ServerConfig) -> Combination:
        """Take rows of the same combination together."""
        measured = {r.trial.repeat: metrics_of(r) for r in rows if r.outcome is Outcome.DONE}
        series: dict[str, dict[int, float]] = {}
        for repeat, numbers in measured.items():
            for name, value in numbers.items():
                series.setdefault(name, {})[repeat] = value
        tokens = [batch_tokens(row) for row in rows]
        return cls(
            trial=rows[0].trial.combination,
            base=base,
            outcomes=Counter(row.outcome for row in rows),
            reasons=tuple(dict.fromkeys(row.reason for row in rows if row.reason)),
            metrics={name: Spread.over([*values.values()]) for name, values in series.items()},
            series=series,
            busy=sum(row.busy for row in rows),
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
        if self.more_rounds:
            doubts.append(f"{self.more_rounds} more round{'s' * (self.more_rounds > 1)} would tell")
        if self.once:
            doubts.append(f"measured once, so {_UNKNOWN * 100:.0f} % either way may be chance")
        if self.busy:
            doubts.append(f"{self.busy} of {self.done} measured while other processes were busy")
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

    def against(
        self, baseline: Combination, name: str, *, smaller_is_better: bool, spread: float = 0.0
    ) -> Difference | None:
        """Compare it with another one, by the rounds in which both were measured.

        Args:
            baseline: The other.
            name: The number to compare by.
            smaller_is_better: Whether less of it is better.
            spread: See `compare_paired`.

        Returns:
            None where numbers are not positive, so that they have no ratio.
        """
        theirs, ours = baseline.series.get(name, {}), self.series.get(name, {})
        rounds = [number for number in theirs if number > 0 and number in ours]
        pair = tuple(theirs[n] for n in rounds), tuple(ours[n] for n in rounds)
        if any(value <= 0 for values in pair for value in values):
            return None
        return _compared(*pair, smaller_is_better=smaller_is_better, spread=spread)

    def own_spread(self, name: str) -> float:
        """Return by which share it differs from itself, where it was measured twice in rounds."""
        series = self.series.get(name, {})
        rounds = [number for number in series if number > 0 and -number in series]
        if len(rounds) < LEAST_ROUNDS or any(value <= 0 for value in series.values()):
            return 0.0
        return own_spread([series[n] for n in rounds], [series[-n] for n in rounds])

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


_compared = lru_cache(maxsize=4096)(compare_paired)  # a panel asks again with each row


def choose(
    fitting: Sequence[Combination], objective: Objective, spread: float = 0.0
) -> Combination:
    """Return the best median; of those too close to it to tell, the nearest to the settings in use.

    Two are too close where a paired comparison of three rounds or more says so. With fewer, they
    are where their ranges overlap; what was measured once has no range, so of a speed some is
    assumed. They are in any case where they differ only in batch sizes that no batch was large
    enough for.

    Args:
        fitting: The combinations.
        objective: What to choose by.
        spread: The share by which the same settings differ on this machine.
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

    def compared(one: Combination) -> Difference | None:
        found = one.against(first, name, smaller_is_better=objective.smaller, spread=spread)
        return found if found and found.rounds >= LEAST_ROUNDS else None

    def distance(one: Combination) -> tuple[int, int, float]:
        given = (
            (setting, value) for setting, value in one.trial.settings if setting not in one.idle
        )
        changed = sum(value != in_use(setting, one.base) for setting, value in given)
        return changed, len(one.idle), cost(one)

    judged = [_judged(one, name) for one in fitting] if objective.tells_speed else fitting
    first = min(judged, key=cost)
    worst = ends(first)[1]
    told = {one.trial: compared(one) for one in judged if one is not first}

    def near(one: Combination) -> bool:
        if difference := told.get(one.trial):
            return difference.verdict is not Verdict.SLOWER
        return ends(one)[0] <= worst

    best, *others = sorted((o for o in judged if near(o) or alike(o)), key=distance)
    missing = [told[one.trial] for one in (best, *others) if told.get(one.trial)]
    rounds = [one.more_rounds for one in missing if one]
    more = 0 if None in rounds else max(filter(None, rounds), default=0)
    return replace(best, close=tuple(one.trial for one in others), more_rounds=more)


def _judged(one: Combination, speed: str) -> Combination:
    """The combination with what makes its speed doubtful."""
    tokens = one.batch_tokens.get(speed)
    idle = idle_batches(one.trial.settings, one.base, tokens) if tokens else ()
    return replace(one, idle=idle, once=one.done == 1)
