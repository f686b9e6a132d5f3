"""What a search knows by its rows: which combination is best, and which to look at again. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from kitty_nb.experiments.results import Results, choose
from kitty_nb.experiments.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.metrics import Constraint, Spread
    from kitty_nb.experiments.objective import Objective
    from kitty_nb.experiments.results import Combination
    from kitty_nb.experiments.trial import Trial, TrialResult

__all__ = ["Known", "Standing"]

_SURE = 3  # measurements after which the median of a combination is believed
_SHOWN = 3  # reasons in a message
_LENGTH = 300  # characters of one


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a combination.

    Attributes:
        combination: It.
        spread: The objective; None where it could not be had, or was not worth waiting for.
        excess: How far it breaks each constraint, by the constraint's words; 0 where it does not.
    """

    combination: Combination
    spread: Spread | None
    excess: Mapping[str, float]

    @property
    def value(self) -> float | None:
        """The objective's median."""
        return self.spread.median if self.spread else None

    @property
    def counts(self) -> bool:
        """Whether it was measured and keeps all constraints."""
        return self.value is not None and not any(self.excess.values())


@dataclass(frozen=True)
class Standing:
    """How a search stands.

    Attributes:
        rows: Of its trials.
        config: What they change.
        objective: What should be best.
        bounds: The constraints.
    """

    rows: tuple[TrialResult, ...]
    config: ServerConfig
    objective: Objective
    bounds: Sequence[Constraint]

    @cached_property
    def known(self) -> tuple[Known, ...]:
        """All combinations tried, in that order.

        Raises:
            ExperimentError: The user's objective failed.
        """
        return tuple(self._judged())

    @property
    def peers(self) -> tuple[Known, ...]:
        """What another combination has to compare with."""
        return tuple(one for one in self.known if one.counts)

    @property
    def best(self) -> tuple[Combination, Spread] | None:
        """The best by `choose`, with its objective; None as long as nothing counts."""
        found = [(one.combination, one.spread) for one in self.peers if one.spread]
        smaller, speed = self.objective.smaller, self.objective.tells_speed
        name = self.objective.name
        return choose(found, name, smaller=smaller, speed=speed) if found else None

    @property
    def unsure(self) -> Trial | None:
        """Another measurement of the best among those that were measured too seldom."""
        times = Counter(row.trial.combination for row in self.rows)
        doubtful = {
            one.combination.trial: one.value
            for one in self.peers
            if one.value is not None and times[one.combination.trial] < _SURE
        }
        if not doubtful:
            return None
        trial = (min if self.objective.smaller else max)(doubtful, key=doubtful.__getitem__)
        return replace(trial, repeat=times[trial] + 1)

    @property
    def complaint(self) -> str:
        """Why nothing is best, and what to do, in a sentence or two."""
        measured = [one for one in self.known if one.combination.done]
        if not measured:
            reasons = Counter(row.reason for row in self.rows).most_common(_SHOWN)
            told = "\n".join(f"- {count} of them: {_short(reason)}" for reason, count in reasons)
            return f"None of {len(self.rows)} trials could be measured:\n{told}"
        if all(one.value is None for one in measured):
            return (
                f"No trial has {self.objective.name}. Choose another objective, or have it measured"
                " (quality=…, parallel=…)."
            )
        bounds = " and ".join(map(str, self.bounds))
        near = min(measured, key=lambda one: sum(one.excess.values()))
        have = ", ".join(f"{b.name} {near.combination.value(b.name)}" for b in self.bounds)
        return (
            f"None of {len(measured)} combinations keeps {bounds}. The nearest is"
            f" {near.combination.trial.label}, with {have}. Loosen a constraint, or give other"
            " settings."
        )

    def _judged(self) -> Iterator[Known]:
        done: dict[Trial, list[TrialResult]] = {}
        for row in self.rows:
            if row.outcome is Outcome.DONE:
                done.setdefault(row.trial.combination, []).append(row)
        for one in Results(self.config, self.rows).combinations:
            excess = {str(bound): bound.excess(one.value(bound.name)) for bound in self.bounds}
            spread = self.objective.of(done.get(one.trial, ()))
            yield Known(one, spread, excess if one.done else {})


def _short(reason: str) -> str:
    return reason if len(reason) <= _LENGTH else f"{reason[:_LENGTH]}…"
