"""Latency over many requests: percentiles, and how many requests one needs. Pure."""

from __future__ import annotations

import re
from statistics import quantiles
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kitty_nb.experiments.trial import RequestTimes

LATENCIES = ("time_to_first_token", "time_between_tokens")
PERCENTILES = (50, 90, 95, 99)
LATENCY_NAMES = tuple(f"{name}_p{percent}" for name in LATENCIES for percent in PERCENTILES)
_PERCENTILE = re.compile(rf"(?:{'|'.join(LATENCIES)})_p(\d+)(?:_\d+)?")


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile between the values around it, as NumPy's `linear` does."""
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def requests_for(percent: int) -> int:
    """Return the requests below which a percentile says no more than the slowest of them."""
    return 1 if percent <= 50 else -(-100 // (100 - percent))  # noqa: PLR2004 (the median)


def latencies(
    times: Sequence[RequestTimes], percents: Iterable[int] = PERCENTILES
) -> dict[str, float]:
    """Return the percentiles by name for which there are enough requests."""
    found = {}
    for name in LATENCIES:
        values = [value for one in times if (value := getattr(one, name)) is not None]
        for percent in percents:
            if len(values) >= requests_for(percent):
                found[f"{name}_p{percent}"] = percentile(values, percent)
    return found


def percent_of(name: str) -> int:
    """Return the percent of a percentile by its name; 0 where it is none."""
    match = _PERCENTILE.fullmatch(name)
    return int(match[1]) if match and int(match[1]) < 100 else 0  # noqa: PLR2004


def too_few_requests(name: str) -> str:
    """Say how many requests a percentile needs; empty where the name is not one."""
    if not (percent := percent_of(name)):
        return ""
    needed = requests_for(percent)
    return (
        f"A p{percent} needs {needed} requests or more: fewer say no more than the slowest of"
        f" them. Write requests={needed}."
    )
