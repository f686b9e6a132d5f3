"""Metrics of a row by name, and objectives to optimize. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from statistics import median
from typing import TYPE_CHECKING

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.arguments import require
from kitty_nb.experiments.latency import latencies, too_few_requests
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
    from collections.abc import Callable, Collection, Iterable, Sequence

    from kitty_nb.experiments.statistics import Difference
    from kitty_nb.experiments.trial import SweepEvent, Workload

_GIB = 1 << 30
_SHOWN = 3  # rows named in a message
OBJECTIVE = "generation_tokens_per_second"
SPEEDS = (OBJECTIVE, "prompt_tokens_per_second", "total_tokens_per_second", "time_to_first_token")
_AS_MEASURED = (
    *("context", "slots", "machine_load", "quality", "perplexity", "bits_per_character"),
    *("kl_divergence", "top_token_agreement"),
)
_ENDS = ("low", "high")
_SMALL = re.compile(
    r"time_(to_first|between)_tokens?\w*|\w*seconds|(gpu_)?memory_gib(_\d+)?|ram_gib|bits_per_character"
    r"|(perplexity|kl_divergence)(_ci_low|_ci_high)?"
    r"|machine_load|load_during|other_processes|temperature_celsius"
)
_SPEED = re.compile(r"\w*_per_second(_\d+)?|time_(to_first|between)_tokens?\w*|\w*seconds")
_SHARE = re.compile(
    r"(quality|top_token_agreement)(_ci_\w+)?|machine_load|load_during|other_processes"
)


def metrics_of(result: TrialResult) -> dict[str, float]:
    """Return the finite metrics of a measured row by name; none for other rows.

    Metrics of requests are those at the lowest concurrency; at other levels, the level is appended,
    as in `total_tokens_per_second_4`. `memory_gib` is the peak of RAM and GPU memory together over
    the trial; with several levels, `memory_gib_1` is the peak up to level 1. If a device doesn't
    report a server's memory, only `ram_gib` exists.
    """
    return {name: value for name, value in _metrics(result).items() if math.isfinite(value)}


def left_out(result: TrialResult) -> dict[str, float]:
    """Return the metrics of a row that don't count, because they are infinite or not a number."""
    return {name: value for name, value in _metrics(result).items() if not math.isfinite(value)}


def _metrics(result: TrialResult) -> dict[str, float]:
    measured = result.measurement
    if measured is None:
        return {}
    numbers: dict[str, float | None] = {}
    for number, speed in enumerate(measured.speeds):
        end = f"_{speed.parallel}" if number else ""
        numbers |= {name + end: getattr(speed, name) for name in SPEEDS}
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
    """Return the metrics of a running trial that an event reveals, by name.

    Those at the lowest concurrency, `least`, have plain names.
    """
    match event:
        case TrialProgressed(progress=progress):
            return {"load_seconds": progress.elapsed}
        case RequestAnswered(done=done, total=total) if done < total:
            return _of_answer(event.times, "" if event.parallel == least else f"_{event.parallel}")
    return {}


def first_answers(row: TrialResult, name: str, answers: int) -> float | None:
    """Return the median of what `partial_metrics` revealed of a finished trial's first answers.

    With no answers, it is the metric of the finished trial.
    """
    if not answers:
        return metrics_of(row).get(name)
    speeds = row.measurement.speeds if row.measurement else ()
    for number, speed in enumerate(speeds):
        each = (_of_answer(one, f"_{speed.parallel}" if number else "") for one in speed.each)
        if found := [one[name] for one in each if name in one][:answers]:
            return median(found)
    return None


def _of_answer(times: RequestTimes, end: str) -> dict[str, float]:
    """Return the metrics of one answer by the client's clock, which rows have of each answer."""
    first, between = times.time_to_first_token, times.time_between_tokens
    found = {"time_to_first_token": first}
    found |= {"prompt_tokens_per_second": times.prompt_tokens / first} if first else {}
    found |= {"generation_tokens_per_second": 1 / between} if between else {}
    return {name + end: value for name, value in found.items()}


def smaller_is_better(name: str) -> bool:
    """Return whether a smaller value is better, as of seconds, memory and perplexity."""
    return bool(_SMALL.fullmatch(name))


def is_share(name: str) -> bool:
    """Return whether the metric is a fraction of 1, which people also write in percent."""
    return bool(_SHARE.fullmatch(name))


def is_speed(name: str) -> bool:
    """Return whether the metric gets worse the longer a trial takes."""
    return bool(_SPEED.fullmatch(name))


def metric_names(workload: Workload) -> frozenset[str]:
    """Return the names of all metrics that a workload can produce."""
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


def in_words(name: str, difference: Difference) -> str:
    """Return a verdict in words; what is no speed is better or worse, not faster or slower."""
    told = str(difference)
    return told if is_speed(name) else told.replace("faster", "better").replace("slower", "worse")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, minimum and maximum of a metric over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Spread:
        """Compute the spread of one or more values."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Objective:
    """The objective of a search: a metric, or a function of a row."""

    name: str
    smaller: bool
    function: Callable[[TrialResult], float] | None = None

    @property
    def is_speed(self) -> bool:
        """True if the objective gets worse the longer a trial takes."""
        return self.function is None and is_speed(self.name)

    def of(self, row: TrialResult) -> float | None:
        """Return the objective's value for a row; None if the row has none."""
        value = self._value(row)
        return value if value is not None and math.isfinite(value) else None

    def why_none(self, rows: Iterable[TrialResult]) -> str:
        """Say which rows have an infinite value, or one that is not a number; empty if none has."""
        return _not_finite(self.name, [(row, self._value(row)) for row in rows])

    def _value(self, row: TrialResult) -> float | None:
        if row.outcome is not Outcome.DONE:
            return None
        if self.function is None:
            return _metrics(row).get(self.name)
        try:
            return float(self.function(row))
        except Exception as error:
            raise ExperimentError(
                f"objective failed with {error!r} for {row.trial.label}. It receives the row of a"
                " finished trial, and must return a number (higher is better)."
            ) from error


def read_objective(
    given: str | Callable[[TrialResult], float],
    names: Collection[str],
    rows: Iterable[TrialResult] = (),
) -> Objective:
    """Parse an objective: a metric's name, `-name` to minimize it, or a function to maximize."""
    if callable(given):
        return Objective(getattr(given, "__name__", "objective"), smaller=False, function=given)
    require("objective", given, str, "a metric or a function")
    name = known(given.removeprefix("-"), names, rows)
    return Objective(name, smaller=given.startswith("-") or smaller_is_better(name))


def known(name: str, names: Collection[str], rows: Iterable[TrialResult] = ()) -> str:
    """Return a name if it is one of those given; otherwise the error suggests the closest.

    Of a metric that is no finite number in some rows, it names these.
    """
    if name not in names:
        if odd := _not_finite(name, [(row, _metrics(row).get(name)) for row in rows]):
            raise ExperimentError(odd)
        near = get_close_matches(str(name), names, n=1)
        advice = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(names))}."
        advice = too_few_requests(str(name), names) or advice
        raise ExperimentError(f"No result has {name!r}. {advice}")
    return name


def _not_finite(name: str, values: Iterable[tuple[TrialResult, float | None]]) -> str:
    odd = [
        f"{value} for {row.trial.label} (repeat {row.trial.repeat})"
        for row, value in values
        if value is not None and not math.isfinite(value)
    ]
    if not odd:
        return ""
    more = f"; and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
    return (
        f"{name} is no finite number: {'; '.join(odd[:_SHOWN])}{more}. Correct what returns it, or"
        " choose another metric."
    )


def _gib(ram: int, gpus: int | None = 0) -> float | None:
    return None if gpus is None else (ram + gpus) / _GIB
