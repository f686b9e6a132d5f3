"""The numbers of a row by name, objectives to choose by, and bounds to keep. Pure."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from difflib import get_close_matches
from statistics import median
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.latency import LATENCY_NAMES, latencies, too_few_requests
from kitty_nb.experiments.noise import Noise
from kitty_nb.experiments.trial import (
    Measurement,
    Outcome,
    RequestAnswered,
    RequestTimes,
    Speed,
    Trial,
    TrialProgressed,
    TrialResult,
)
from kitty_nb.isolated_server import LoadSeconds

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from kitty_nb.experiments.trial import SweepEvent, Workload

_GIB = 1 << 30
OBJECTIVE = "generation_tokens_per_second"
_SPECULATED = 64  # tokens that are processed together for one answer, at most
_SPEEDS = (
    OBJECTIVE,
    "prompt_tokens_per_second",
    "total_tokens_per_second",
    "time_to_first_token",
)
_AS_MEASURED = (
    *("context", "slots", "machine_load", "quality", "perplexity", "bits_per_character"),
    *("kl_divergence", "top_token_agreement"),
)
_ENDS = ("low", "high")
_LEAST = 1e-9  # excess over a bound that is not allowed itself
_SMALL = re.compile(
    r"time_(to_first|between)_tokens?\w*|\w*seconds|(gpu_)?memory_gib(_\d+)?|ram_gib|bits_per_character"
    r"|(perplexity|kl_divergence)(_ci_low|_ci_high)?"
    r"|machine_load|load_during|other_processes|temperature_celsius"
)
_SPEED = re.compile(r"\w*_per_second(_\d+)?|time_(to_first|between)_tokens?\w*|\w*seconds")
_CONSTRAINT = re.compile(r"(?P<name>\w+)\s*(?P<sign><=|>=|==|<|>|)")
_SIGNS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


def metrics_of(result: TrialResult) -> dict[str, float]:
    """Return the numbers of a row that is done; none of others.

    Those of requests are at the least number in parallel; with each other number behind the name,
    as in `total_tokens_per_second_4`, at that one. `memory_gib` is RAM and GPUs together, the most
    of the whole trial; where there are several such numbers, `memory_gib_1` is the most up to then.
    Not every device reports what a server holds of it: then there is only `ram_gib`.
    """
    measured = result.measurement
    if measured is None:
        return {}
    numbers: dict[str, float | None] = {}
    for number, speed in enumerate(measured.speeds):
        end = f"_{speed.parallel}" if number else ""
        numbers |= {name + end: getattr(speed, name) for name in _SPEEDS}
        numbers |= {name + end: value for name, value in latencies(speed.each).items()}
        if speed.memory and len(measured.speeds) > 1:
            numbers[f"memory_gib_{speed.parallel}"] = _gib(speed.memory, speed.gpu_memory)
    load, longest = measured.load, max((one.prompt_tokens for one in measured.speeds), default=0)
    numbers |= {
        "prompt_tokens": longest or None,
        "load_seconds": load.total,
        "starting_seconds": load.starting,
        "loading_seconds": load.loading,
        "preparing_seconds": load.preparing,
        "ram_gib": _gib(measured.memory),
        "memory_gib": _gib(measured.memory, measured.gpu_memory),
        "gpu_memory_gib": _gib(0, measured.gpu_memory),
        **{name: getattr(measured, name) for name in _AS_MEASURED},
        "seconds": result.seconds.overall,
    }
    for name, ends in measured.intervals.items():
        numbers |= {f"{name}_ci_{end}": value for end, value in zip(_ENDS, ends, strict=True)}
    if noise := measured.noise:
        numbers |= {
            "load_during": noise.load,
            "other_processes": noise.others,
            "clock_ghz": noise.clock_ghz,
            "temperature_celsius": noise.temperature_celsius,
        }
    return {name: value for name, value in numbers.items() if value is not None}


def partial_metrics(event: SweepEvent, least: int) -> dict[str, float]:
    """Return the metrics of a trial under way that one of its events shows already, by name.

    Args:
        event: The event.
        least: The least number of requests in parallel, whose metrics have plain names.
    """
    match event:
        case TrialProgressed(progress=progress):
            return {"load_seconds": progress.elapsed}
        case RequestAnswered(done=done, total=total) if done < total:
            end = "" if event.parallel == least else f"_{event.parallel}"
            found = {
                f"time_to_first_token{end}": event.time_to_first_token,
                f"generation_tokens_per_second{end}": event.tokens_per_second,
                f"prompt_tokens_per_second{end}": event.prompt_tokens_per_second,
            }
            return {name: value for name, value in found.items() if value is not None}
    return {}


def batch_tokens(result: TrialResult) -> dict[str, int]:
    """Return the most tokens that a batch may have had, by name of the speed that rests on it."""
    speeds = result.measurement.speeds if result.measurement else ()
    return {
        f"{name}_{speed.parallel}" if number else name: (
            min(speed.prompt_tokens, _SPECULATED)
            if name == OBJECTIVE and speed.parallel == 1
            else speed.prompt_tokens * speed.parallel
        )
        for number, speed in enumerate(speeds)
        for name in (*_SPEEDS, *LATENCY_NAMES)
        if speed.prompt_tokens
    }


def smaller_is_better(name: str) -> bool:
    """True if less of it is better: seconds, memory, perplexity."""
    return bool(_SMALL.fullmatch(name))


def tells_speed(name: str) -> bool:
    """True if it worsens as a trial takes longer."""
    return bool(_SPEED.fullmatch(name))


def metric_names(workload: Workload) -> frozenset[str]:
    """Return the names of all numbers that a row can have, before there is one."""
    each = RequestTimes(0.0, 1.0, 2.0, 2)
    speeds = tuple(
        Speed(n, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 1, 1, (each,) * len(workload.asked(n)))
        for n in workload.levels
    )
    load = LoadSeconds(1.0, 1.0, 1.0)
    noise = Noise(1.0, 1.0, 1.0, 1.0)
    scores = ("quality", "perplexity", "kl_divergence", "top_token_agreement")
    intervals = dict.fromkeys(scores, (1.0, 1.0))
    full = Measurement(load, speeds, 1, 1, 1, (), 1.0, 1.0, 1.0, 1, 1.0, noise, 1.0, 1.0, intervals)
    return frozenset(metrics_of(TrialResult(Trial(""), Outcome.DONE, measurement=full)))


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over the repeats: its median, least and greatest value."""

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one value or more."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Objective:
    """The number that a search makes best: one of the table, or what a function makes of a row."""

    name: str
    smaller: bool
    function: Callable[[TrialResult], float] | None = None

    @property
    def tells_speed(self) -> bool:
        """True if it worsens as a trial takes longer."""
        return self.function is None and tells_speed(self.name)

    def of(self, row: TrialResult) -> float | None:
        """Return its value in a row; None where the row has none.

        Raises:
            ExperimentError: The user's function failed.
        """
        if row.outcome is not Outcome.DONE:
            return None
        if self.function is None:
            return metrics_of(row).get(self.name)
        try:
            value = float(self.function(row))
        except Exception as error:
            raise ExperimentError(
                f"objective failed with {error!r} for {row.trial.label}. It receives the row of a"
                " finished trial and must return a number; higher is better."
            ) from error
        return value if math.isfinite(value) else None


def read_objective(
    given: str | Callable[[TrialResult], float], names: Collection[str]
) -> Objective:
    """Read an objective as a person writes it: a name, `-name` where less is better, a function.

    Args:
        given: What the person wrote.
        names: The numbers that rows will have.

    Raises:
        ExperimentError: There is no such number.
    """
    if callable(given):
        return Objective(getattr(given, "__name__", "objective"), smaller=False, function=given)
    name = known(given.removeprefix("-"), names)
    return Objective(name, smaller=given.startswith("-") or smaller_is_better(name))


@dataclass(frozen=True, slots=True)
class Constraint:
    """A bound that a result must keep.

    Attributes:
        name: The name of a metric or a setting.
        sign: The comparison, such as `<=`.
        bound: The number, or the word for `==`.
    """

    name: str
    sign: str
    bound: Any

    def allows(self, value: Any) -> bool:
        """True if a value keeps it; an unknown value does not."""
        try:
            return value is not None and bool(_SIGNS[self.sign](value, self.bound))
        except TypeError:
            return False

    def excess(self, value: Any) -> float:
        """Return the violation by a value as a share of the bound; 0 where the bound is kept."""
        if self.allows(value):
            return 0.0
        try:
            return max(_LEAST, float(abs(value - self.bound) / (abs(self.bound) or 1)))
        except TypeError:
            return 1.0

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.bound}"


def constraints_of(written: Mapping[str, Any] | None) -> tuple[Constraint, ...]:
    """Read constraints as a person writes them: `{"memory_gib": 20, "context_size>=": 16384}`.

    A name alone means at most.

    Raises:
        ExperimentError: One cannot be understood.
    """
    found = []
    for text, bound in (written or {}).items():
        match = _CONSTRAINT.fullmatch(text.strip())
        if match is None:
            raise ExperimentError(
                f"Can't parse the constraint {text!r}. Write a name and one of <=, >=, <, >, ==,"
                ' such as "context_size>=".'
            )
        found.append(Constraint(match["name"], match["sign"] or "<=", bound))
    return tuple(found)


def known(name: str, names: Collection[str]) -> str:
    """Return a name that is one of those given.

    Raises:
        ExperimentError: It is not; the nearest is named.
    """
    if name not in names:
        near = get_close_matches(name, names, n=1)
        advice = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(names))}."
        raise ExperimentError(f"No result has {name!r}. {too_few_requests(name) or advice}")
    return name


def _gib(ram: int, gpus: int | None = 0) -> float | None:
    return None if gpus is None else (ram + gpus) / _GIB
