"""`Combination`: the repeated trials of a model and settings; `choose` picks the best one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from kitty_nb.config.profiles import env_lines
from kitty_nb.experiments.batches import batch_effect, batch_tokens, idle_batches
from kitty_nb.experiments.metrics import Spread, is_speed, left_out, metrics_of
from kitty_nb.experiments.space import changes, in_use
from kitty_nb.experiments.statistics import LEAST_ROUNDS, Verdict, compare_paired, own_spread
from kitty_nb.experiments.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.bounds import Constraint
    from kitty_nb.experiments.metrics import Objective
    from kitty_nb.experiments.statistics import Difference
    from kitty_nb.experiments.trial import Trial, TrialResult

_UNKNOWN = 0.1  # relative uncertainty assumed for a speed measured once


@dataclass(frozen=True, repr=False)
class Combination:
    """A combination of model and settings, with the results of its repeats.

    Attributes:
        trial: The combination, as its first repeat.
        base: The base settings.
        outcomes: The number of repeats by outcome.
        reasons: Why repeats were not measured or metrics left out, each sentence once.
        series: The metrics by name and round.
        close: Other combinations that were too close to tell when this one was chosen.
        more_rounds: The number of further rounds that may decide; 0 if unknown.
        batch_tokens: The maximum number of tokens in a batch, by name of the speed.
        idle: Batch sizes without effect when this was chosen, because no batch that the objective
            depends on was as large.
        once: Whether the choice rests on a speed that was measured once.
        busy: The number of repeats measured on a busy machine.
        left_out: The number of values left out because they are infinite or not a number.
        runs: The run and machine by round; of rows of older versions, their engine and machine.
    """

    trial: Trial
    base: ServerConfig
    outcomes: Mapping[Outcome, int] = field(default_factory=Counter)
    reasons: tuple[str, ...] = ()
    series: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    close: tuple[Trial, ...] = ()
    more_rounds: int = 0
    batch_tokens: Mapping[str, int] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    once: bool = False
    busy: int = 0
    left_out: int = 0
    runs: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[TrialResult], base: ServerConfig) -> Combination:
        """Aggregate the rows of a combination."""
        measured = {r.trial.repeat: metrics_of(r) for r in rows if r.outcome is Outcome.DONE}
        series: dict[str, dict[int, float]] = {}
        for repeat, numbers in measured.items():
            for name, value in numbers.items():
                series.setdefault(name, {})[repeat] = value
        tokens = [batch_tokens(row) for row in rows]
        odd = [
            f"{name} of repeat {row.trial.repeat} is left out: it is {value}."
            for row in rows
            for name, value in left_out(row).items()
        ]
        return cls(
            trial=rows[0].trial.combination,
            base=base,
            outcomes=Counter(row.outcome for row in rows),
            reasons=(*dict.fromkeys(row.reason for row in rows if row.reason), *odd),
            left_out=len(odd),
            series=series,
            runs={row.trial.repeat: (row.run or row.engine, row.host) for row in rows},
            busy=sum(row.busy for row in rows),
            batch_tokens={n: max(one.get(n, 0) for one in tokens) for one in tokens for n in one},
        )

    def __repr__(self) -> str:
        doubt = f"; {self.doubt}" if self.doubt else ""
        return f"Combination({self.trial.label}: {self.done} measured{doubt})"

    @cached_property
    def metrics(self) -> Mapping[str, Spread]:
        """The metrics over the repeats, by name."""
        return {name: Spread.over([*values.values()]) for name, values in self.series.items()}

    @property
    def done(self) -> int:
        """The number of repeats measured."""
        return self.outcomes.get(Outcome.DONE, 0)

    @property
    def doubt(self) -> str:
        """The reasons to doubt the choice, in words; empty if there are none."""
        others = len(self.close)
        doubts = [f"too close to tell from {others} other{'s' * (others > 1)}"] if others else []
        if self.more_rounds:
            doubts.append(f"{self.more_rounds} more round{'s' * (self.more_rounds > 1)} may tell")
        if self.once:
            doubts.append(f"measured once, so {_UNKNOWN * 100:.0f} % either way may be chance")
        if self.busy:
            doubts.append(f"{self.busy} of {self.done} measured while other processes were busy")
        if self.left_out:
            count = f"{self.left_out} value{'s' * (self.left_out > 1)}"
            doubts.append(f"without {count} that can't be a measurement")
        return ", ".join([*doubts, *(["nearest to the settings in use"] if others else [])])

    @property
    def config(self) -> ServerConfig:
        """The settings to start a server with; settings without effect stay as in use."""
        return self.base.replace(**self._changes)

    @property
    def _changes(self) -> dict[str, Any]:
        made = changes(self.trial, self.base)
        return {name: value for name, value in made.items() if name not in self.idle}

    def value(self, name: str) -> Any:
        """Return a setting, or the median of a metric; None if there is none.

        If `context_size` was left to the engine, it is the context that a request had.
        """
        if name in self.metrics:
            return self.metrics[name].median
        given = {"model": self.trial.model, **dict(self.trial.settings)}
        value = given[name] if name in given else getattr(self.base, name, None)
        if name == "context_size" and not value and "context" in self.metrics:
            return int(self.metrics["context"].median)
        return value

    def against(
        self,
        baseline: Combination,
        name: str,
        *,
        smaller_is_better: bool,
        spread: float = 0.0,
        across_runs: bool = False,
    ) -> Difference | None:
        """Compare a metric with a baseline's, over the rounds in which both were measured.

        Unless compared `across_runs`, a round of a speed counts only if the same run measured both
        on the same machine, because machines and engines change from day to day. None if a value
        isn't positive, because then there is no ratio; see `compare_paired`.
        """
        theirs, ours = baseline.series.get(name, {}), self.series.get(name, {})
        both = [number for number in theirs if number > 0 and number in ours]
        anywhere = across_runs or not is_speed(name)
        rounds = [n for n in both if anywhere or self.runs.get(n) == baseline.runs.get(n)]
        pair = tuple(theirs[n] for n in rounds), tuple(ours[n] for n in rounds)
        if any(value <= 0 for values in pair for value in values):
            return None
        found = _compared(*pair, smaller_is_better=smaller_is_better, spread=spread)
        return replace(found, apart=len(both) - len(rounds))

    def own_spread(self, name: str) -> float:
        """Return the relative difference to itself, if it was measured twice per round; else 0."""
        series = self.series.get(name, {})
        twice = [number for number in series if number > 0 and -number in series]
        rounds = [n for n in twice if self.runs.get(n) == self.runs.get(-n)]
        if len(rounds) < LEAST_ROUNDS or any(value <= 0 for value in series.values()):
            return 0.0
        return own_spread([series[n] for n in rounds], [series[-n] for n in rounds])

    def keeps(self, bounds: Iterable[Constraint]) -> bool:
        """Return whether all bounds are satisfied."""
        return all(bound.allows(self.value(bound.name)) for bound in bounds)

    def env_lines(self, profile: str | None = None) -> str:
        """Return the `.env` lines for a profile, by default that of the base settings."""
        config = self.config.replace(profile=profile) if profile else self.config
        notes = [f"# {self.doubt.capitalize()}."] if self.doubt else []
        if self.idle:
            idle = " and ".join(self.idle)
            notes.append(f"# Without {idle}: no batch that the metric depends on was that large.")
        return "\n".join([*notes, *env_lines(config, self._changes)])


_compared = lru_cache(maxsize=4096)(compare_paired)  # a panel repeats them for each row


def choose(
    fitting: Sequence[Combination], objective: Objective, spread: float = 0.0
) -> Combination:
    """Return the combination with the best median; among ties, the closest to the settings in use.

    With three rounds or more, a tie is a paired comparison that is too close to tell. With fewer,
    it is an overlap of ranges, where a speed measured once, or in another run, has an assumed
    range. Combinations that differ only in batch sizes that no batch filled are always tied. No
    difference within `spread`, the machine's own relative variation, counts.
    """
    name, sign = objective.name, 1 if objective.smaller else -1

    def cost(one: Combination) -> float:
        return sign * one.metrics[name].median

    def ends(one: Combination, unsure: bool = False) -> tuple[float, float]:
        unknown = _UNKNOWN * abs(cost(one)) if one.once or unsure else 0.0
        least, most = sorted((sign * one.metrics[name].low, sign * one.metrics[name].high))
        return least - unknown, most + unknown

    def effect(one: Combination, tokens: int) -> object:
        return one.trial.model, batch_effect(one.trial.settings, one.base, tokens)

    def alike(one: Combination) -> bool:
        tokens = max(each.batch_tokens.get(name, 0) for each in (one, first))
        return tokens > 0 and effect(one, tokens) == effect(first, tokens)

    def compared(one: Combination) -> Difference | None:
        found = one.against(first, name, smaller_is_better=objective.smaller, spread=spread)
        return found if found and (found.rounds >= LEAST_ROUNDS or found.apart) else None

    def distance(one: Combination) -> tuple[int, int, float]:
        given = (
            (setting, value) for setting, value in one.trial.settings if setting not in one.idle
        )
        changed = sum(value != in_use(setting, one.base) for setting, value in given)
        return changed, len(one.idle), cost(one)

    judged = [_judged(one, name) for one in fitting] if objective.is_speed else fitting
    first = min(judged, key=cost)
    worst = ends(first)[1]
    told = {one.trial: compared(one) for one in judged if one is not first}

    def near(one: Combination) -> bool:
        difference = told.get(one.trial)
        if difference and difference.rounds >= LEAST_ROUNDS:
            return difference.verdict is not Verdict.SLOWER
        return ends(one, unsure=difference is not None)[0] <= worst

    best, *others = sorted((o for o in judged if near(o) or alike(o)), key=distance)
    missing = [told[one.trial] for one in (best, *others) if told.get(one.trial)]
    rounds = [one.more_rounds for one in missing if one]
    more = 0 if None in rounds else max(filter(None, rounds), default=0)
    return replace(best, close=tuple(one.trial for one in others), more_rounds=more)


def _judged(one: Combination, speed: str) -> Combination:
    """Return the combination with the reasons to doubt its speed."""
    tokens = one.batch_tokens.get(speed)
    idle = idle_batches(one.trial.settings, one.base, tokens) if tokens else ()
    return replace(one, idle=idle, once=one.done == 1)
