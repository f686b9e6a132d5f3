"""What a sweep tells while it runs. Immutable, like all that comes up through the house."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kitty_nb.experiments.trial import Trial, TrialResult
    from kitty_nb.supervisor.events import LoadProgress


@dataclass(frozen=True, slots=True)
class TrialStarted:
    """A trial has begun."""

    trial: Trial


@dataclass(frozen=True, slots=True)
class TrialProgressed:
    """A trial's load has moved."""

    trial: Trial
    progress: LoadProgress


@dataclass(frozen=True, slots=True)
class RequestAnswered:
    """A trial has one more answer.

    Attributes:
        trial: Which.
        done: Measured requests that are answered.
        total: How many there are.
        parallel: How many are under way at once.
        tokens_per_second: At which this answer was written, as the server says.
        prompt_tokens_per_second: At which its prompt was read, as the server says.
        time_to_first_token: Seconds until its first token had arrived.
    """

    trial: Trial
    done: int
    total: int
    parallel: int
    tokens_per_second: float | None
    prompt_tokens_per_second: float | None
    time_to_first_token: float


@dataclass(frozen=True, slots=True)
class TrialEnded:
    """A trial has its row."""

    result: TrialResult


@dataclass(frozen=True, slots=True)
class SweepPaused:
    """No further trial begins until the sweep is resumed; the one under way goes on."""


@dataclass(frozen=True, slots=True)
class SweepResumed:
    """Trials begin again."""


@dataclass(frozen=True, slots=True)
class SweepEnded:
    """The run is over.

    Attributes:
        complete: Whether every trial has its row.
        problem: Why it broke off, in a sentence; empty where it did not.
    """

    complete: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """Rows could not be written; they are kept in memory and written with the next one.

    Attributes:
        problem: What is wrong and what to do, in a sentence.
    """

    problem: str


SweepEvent = (
    TrialStarted
    | TrialProgressed
    | RequestAnswered
    | TrialEnded
    | SweepPaused
    | SweepResumed
    | SweepEnded
    | StoreFailed
)
