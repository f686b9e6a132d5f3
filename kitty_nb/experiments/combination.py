"""The repeats of a combination taken together: medians, and how far they lie apart. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from kitty_nb.config import env_lines
from kitty_nb.experiments.metrics import metrics_of
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
    """

    trial: Trial
    base: ServerConfig
    done: int
    reasons: tuple[str, ...]
    metrics: Mapping[str, Spread]
    close: tuple[Trial, ...] = ()

    def __repr__(self) -> str:
        told = f"; {self.doubt}" if self.close else ""
        return f"Combination({self.trial.label}: {self.done} measured{told})"

    @property
    def doubt(self) -> str:
        """The number of others it cannot be told apart from, in words; empty if there are none."""
        others = len(self.close)
        return f"too close to tell from {others} other{'s' * (others > 1)}" if others else ""

    @property
    def changed(self) -> int:
        """The number of its settings that are not those in use."""
        return sum(value != in_use(name, self.base) for name, value in self.trial.settings)

    @property
    def config(self) -> ServerConfig:
        """Its settings, to start a server with.

        Raises:
            ConfigError: The model is not there any more.
        """
        return self.base.replace(**changes(self.trial, self.base))

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
        names = changes(self.trial, self.base)
        told = [f"# {self.doubt.capitalize()}; these settings are nearest to those in use."]
        return "\n".join([*(told if self.close else ()), *env_lines(config, names)])


def choose(
    found: Iterable[tuple[Combination, Spread]], *, smaller: bool, speed: bool
) -> tuple[Combination, Spread]:
    """Return the best median; of those too close to it to tell, the nearest to the settings in use.

    Two are too close where their ranges overlap. What was measured once has no range, so of a speed
    some is assumed.

    Args:
        found: Each combination with the number that is compared; one at least.
        smaller: Whether less of it is better.
        speed: Whether it varies from one measurement to the next.
    """
    sign = 1 if smaller else -1
    ranked = []
    for one, spread in found:
        unknown = _UNKNOWN * abs(spread.median) if speed and spread.low == spread.high else 0.0
        ends = sorted((sign * spread.low, sign * spread.high))
        ranked.append((sign * spread.median, ends[0] - unknown, ends[1] + unknown, one, spread))
    worst = min(ranked, key=lambda entry: entry[0])[2]
    close = sorted(
        (entry for entry in ranked if entry[1] <= worst), key=lambda e: (e[3].changed, e[0])
    )
    (*_, best, spread), *others = close
    return replace(best, close=tuple(one.trial for *_, one, _ in others)), spread


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
    return Combination(
        trial=trial,
        base=base,
        done=len(measured),
        reasons=tuple(dict.fromkeys(row.reason for row in rows if row.reason)),
        metrics={name: Spread(median(v), min(v), max(v)) for name, v in values.items()},
    )
