"""The rows of one combination of model and settings, taken together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kitty_nb.config import env_lines
from kitty_nb.experiments.metrics import (
    Spread,
    batch_tokens,
    metrics_of,
)
from kitty_nb.experiments.space import changes, in_use
from kitty_nb.experiments.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.trial import Trial, TrialResult

UNKNOWN = 0.1  # share of a speed within which one measurement says nothing


@dataclass(frozen=True, repr=False)
class Combination:
    """The rows of one combination of model and settings, taken together.

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

    @classmethod
    def of(cls, rows: Sequence[TrialResult], base: ServerConfig) -> Combination:
        """Take rows of the same combination together."""
        measured = [metrics_of(row) for row in rows if row.outcome is Outcome.DONE]
        names = dict.fromkeys(name for one in measured for name in one)
        tokens = [batch_tokens(row) for row in rows]
        return cls(
            trial=rows[0].trial.combination,
            base=base,
            done=len(measured),
            reasons=tuple(dict.fromkeys(row.reason for row in rows if row.reason)),
            metrics={n: Spread.over([one[n] for one in measured if n in one]) for n in names},
            batch_tokens={n: max(one.get(n, 0) for one in tokens) for one in tokens for n in one},
        )

    def __repr__(self) -> str:
        doubt = f"; {self.doubt}" if self.doubt else ""
        return f"Combination({self.trial.label}: {self.done} measured{doubt})"

    @property
    def doubt(self) -> str:
        """The reason for doubting the choice, in words; empty if there is none."""
        others = len(self.close)
        doubts = [f"too close to tell from {others} other{'s' * (others > 1)}"] if others else []
        if self.once:
            doubts.append(f"measured once, so {UNKNOWN * 100:.0f} % either way may be chance")
        return ", ".join([*doubts, *(["nearest to the settings in use"] if others else [])])

    @property
    def changed(self) -> int:
        """The number of its settings that differ from those in use and matter."""
        given = ((name, value) for name, value in self.trial.settings if name not in self.idle)
        return sum(value != in_use(name, self.base) for name, value in given)

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
