"""The repeats of a combination taken together: medians, and how far they lie apart. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from kitty_nb.config import env_lines
from kitty_nb.experiments.metrics import metrics_of
from kitty_nb.experiments.settings import changes
from kitty_nb.experiments.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.trial import Trial, TrialResult


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
    """

    trial: Trial
    base: ServerConfig
    done: int
    reasons: tuple[str, ...]
    metrics: Mapping[str, Spread]

    def __repr__(self) -> str:
        return f"Combination({self.trial.label}: {self.done} measured)"

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
        return "\n".join(env_lines(config, names))


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
