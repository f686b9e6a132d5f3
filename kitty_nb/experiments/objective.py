"""What a search should make best, and when a trial is so far behind that it may end. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.metrics import Spread, known, metrics_of, smaller_is_better, tells_speed
from kitty_nb.experiments.trial import RequestAnswered, TrialProgressed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from kitty_nb.experiments.trial import SweepEvent, TrialResult

__all__ = ["Objective", "glimpses", "read_objective", "why_behind"]

_PEERS = 4  # combinations from which on their median says what is usual
_CLEARLY = 0.1  # share by which a trial must be worse than its peers' median, beyond usual noise


@dataclass(frozen=True)
class Objective:
    """A number of a row.

    Attributes:
        name: What it is called.
        smaller: Whether less of it is better.
        function: What works it out; None for a number of the table.
    """

    name: str
    smaller: bool
    function: Callable[[TrialResult], float] | None = None

    def of(self, rows: Iterable[TrialResult]) -> Spread | None:
        """Return its median and spread over rows that are done; None where no row has it.

        Raises:
            ExperimentError: The user's function failed.
        """
        values = [value for row in rows if (value := self._value(row)) is not None]
        return Spread(median(values), min(values), max(values)) if values else None

    def better(self, one: float, other: float) -> bool:
        """Whether one value beats another."""
        return one < other if self.smaller else one > other

    @property
    def tells_speed(self) -> bool:
        """Whether a trial that takes long is a bad one."""
        return self.function is None and tells_speed(self.name)

    def _value(self, row: TrialResult) -> float | None:
        if self.function is None:
            return metrics_of(row).get(self.name)
        try:
            value = float(self.function(row))
        except Exception as error:
            raise ExperimentError(
                f"objective failed with {error!r} for {row.trial.label}. It is called with the"
                " row of a trial that is done, and returns a number, the higher the better."
            ) from error
        return value if math.isfinite(value) else None


def read_objective(
    given: str | Callable[[TrialResult], float], names: Collection[str]
) -> Objective:
    """Read an objective as a person writes it.

    Args:
        given: A number of the table, after a minus sign one of which less is better; or a
            function of a row.
        names: The numbers that there will be.

    Raises:
        ExperimentError: The name is not known.
    """
    if callable(given):
        return Objective(getattr(given, "__name__", "objective"), smaller=False, function=given)
    name = known(given.removeprefix("-"), names)
    return Objective(name, smaller=given.startswith("-") or smaller_is_better(name))


def glimpses(event: SweepEvent, least: int) -> Iterator[tuple[str, float]]:
    """Yield what an event tells of numbers that a trial will have, by their names in the table.

    Args:
        event: Of a trial under way.
        least: The least number of requests in parallel, whose names are plain.
    """
    match event:
        case TrialProgressed(progress=progress):
            yield "load_seconds", progress.elapsed
        case RequestAnswered(done=done, total=total) if done < total:
            end = "" if event.parallel == least else f"_{event.parallel}"
            yield f"time_to_first_token{end}", event.time_to_first_token
            if event.tokens_per_second is not None:
                yield f"generation_tokens_per_second{end}", event.tokens_per_second
            if event.prompt_tokens_per_second is not None:
                yield f"prompt_tokens_per_second{end}", event.prompt_tokens_per_second


def why_behind(objective: Objective, sofar: float, peers: Sequence[float]) -> str:
    """Say why a trial cannot win any more; empty while it may, or its peers are too few.

    Args:
        objective: What is compared.
        sofar: Its value in this trial by now.
        peers: Its values in those combinations that are done and allowed.
    """
    if len(peers) < _PEERS:
        return ""
    usual = median(peers)
    bound = usual * (1 + _CLEARLY if objective.smaller else 1 - _CLEARLY)
    if not objective.better(bound, sofar):
        return ""
    return f"its {objective.name} was {sofar:.4g} by then, and {usual:.4g} is usual."
