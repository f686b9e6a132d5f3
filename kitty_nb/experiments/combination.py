"""The repeats of a combination taken together: medians, and how far they lie apart. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from kitty_nb.config import env_lines
from kitty_nb.experiments import batches
from kitty_nb.experiments.metrics import batch_tokens, metrics_of
from kitty_nb.experiments.settings import changes, in_use
from kitty_nb.experiments.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.trial import Trial, TrialResult

_UNKNOWN = 0.1  # share of a speed within which one measurement says nothing


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over the repeats.

    Attributes:
        median: The middle one.
        low: The least.
        high: The greatest.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True, repr=False)
class Combination:
    """What is known of one combination of model and settings.

    Attributes:
        trial: The combination; its first repeat stands for all.
        base: The settings that it changes.
        done: How many repeats were measured.
        reasons: Why others were not, each sentence once.
        metrics: The numbers of those measured, by name.
        close: Others that were about as good when this one was chosen: too close to tell.
        batch_tokens: The most tokens that a batch may have had, by name of the speed.
        idle: Batch sizes that made no difference when it was chosen: no batch was as large.
        once: Whether it was chosen by a speed that was measured once.
    """

    trial: Trial
    base: ServerConfig
    done: int
    reasons: tuple[str, ...]
    metrics: Mapping[str, Spread]
    close: tuple[Trial, ...] = ()
    batch_tokens: Mapping[str, int] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    once: bool = False

    def __repr__(self) -> str:
        told = f"; {self.doubt}" if self.doubt else ""
        return f"Combination({self.trial.label}: {self.done} measured{told})"

    @property
    def doubt(self) -> str:
        """Why the choice is not sure, in words; empty if nothing speaks against it."""
        others, told = len(self.close), []
        if others:
            told.append(f"too close to tell from {others} other{'s' * (others > 1)}")
        if self.once:
            told.append(f"measured once, so {_UNKNOWN * 100:.0f} % either way may be chance")
        if others:
            told.append("nearest to the settings in use")
        return ", ".join(told)

    @property
    def changed(self) -> int:
        """How many of its settings are not those in use, and make a difference."""
        given = ((name, value) for name, value in self.trial.settings if name not in self.idle)
        return sum(value != in_use(name, self.base) for name, value in given)

    @property
    def config(self) -> ServerConfig:
        """Its settings, to start a server with; those that made no difference are as in use.

        Raises:
            ConfigError: The model is not there any more.
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
        settings = dict(self.trial.settings)
        if name in self.metrics:
            return self.metrics[name].median
        if name == "model":
            return self.trial.model
        value = settings[name] if name in settings else getattr(self.base, name, None)
        if name == "context_size" and not value and "context" in self.metrics:
            return int(self.metrics["context"].median)
        return value

    def env_lines(self, profile: str | None = None) -> str:
        """Return the lines to paste into `.env` so that a profile is served like this.

        Args:
            profile: Without it that of the sweep's own settings.
        """
        config = self.config
        if profile:
            config = config.replace(profile=profile)
        told = [f"# {self.doubt.capitalize()}."] if self.doubt else []
        if self.idle:
            told.append(f"# Without {' and '.join(self.idle)}: no batch measured was so large.")
        return "\n".join([*told, *env_lines(config, self._changes)])


def choose(
    found: Iterable[tuple[Combination, Spread]], metric: str, *, smaller: bool, speed: bool
) -> tuple[Combination, Spread]:
    """Return the best median; of those too close to it to tell, the nearest to the settings in use.

    Two are too close where their ranges overlap, or where they differ in batch sizes alone that no
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
        unknown = _UNKNOWN * abs(spread.median) if once else 0.0
        ends = sorted((sign * spread.low, sign * spread.high))
        tokens = one.batch_tokens.get(metric) if speed else None
        idle = batches.idle(one.trial.settings, one.base, tokens) if tokens else ()
        judged = replace(one, idle=idle, once=once)
        ranked.append((sign * spread.median, ends[0] - unknown, ends[1] + unknown, judged, spread))
    _, _, worst, first, _ = min(ranked, key=lambda entry: entry[0])
    close = sorted(
        (entry for entry in ranked if entry[1] <= worst or _same(entry[3], first, metric)),
        key=lambda entry: (entry[3].changed, len(entry[3].idle), entry[0]),
    )
    (*_, best, spread), *others = close
    return replace(best, close=tuple(one.trial for *_, one, _ in others)), spread


def _same(one: Combination, other: Combination, metric: str) -> bool:
    """Whether two differ in nothing that a speed can show."""
    tokens = max(each.batch_tokens.get(metric, 0) for each in (one, other))
    settings = one.trial.settings, other.trial.settings
    same = tokens > 0 and batches.alike(*settings, one.base, tokens)
    return same and one.trial.model == other.trial.model


def combine_repeats(results: Iterable[TrialResult], base: ServerConfig) -> tuple[Combination, ...]:
    """Take the rows of each combination together, in the order in which they first ended."""
    groups: dict[Trial, list[TrialResult]] = {}
    for result in results:
        groups.setdefault(result.trial.combination, []).append(result)
    return tuple(_combined(trial, rows, base) for trial, rows in groups.items())


def _combined(trial: Trial, rows: list[TrialResult], base: ServerConfig) -> Combination:
    measured = [metrics_of(row) for row in rows if row.outcome is Outcome.DONE]
    names = dict.fromkeys(name for one in measured for name in one)
    values = {name: [one[name] for one in measured if name in one] for name in names}
    tokens = [batch_tokens(row) for row in rows]
    return Combination(
        trial=trial,
        base=base,
        done=len(measured),
        reasons=tuple(dict.fromkeys(row.reason for row in rows if row.reason)),
        metrics={name: Spread(median(v), min(v), max(v)) for name, v in values.items()},
        batch_tokens={n: max(one.get(n, 0) for one in tokens) for one in tokens for n in one},
    )
