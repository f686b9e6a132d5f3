"""Latency percentiles over many requests, and how many requests each needs. Pure."""

from __future__ import annotations

import re
from statistics import quantiles
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from kitty_nb.experiments.trial import RequestTimes

LATENCIES = ("time_to_first_token", "time_between_tokens")
PERCENTILES = (50, 90, 95, 99)
LATENCY_NAMES = tuple(f"{name}_p{percent}" for name in LATENCIES for percent in PERCENTILES)
_PERCENTILE = re.compile(rf"(?:{'|'.join(LATENCIES)})_p(\d+)(?:_\d+)?")


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile, interpolated linearly as NumPy does by default."""
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def requests_for(percent: int) -> int:
    """Return the least number of requests for which a percentile isn't just the maximum."""
    return 1 if percent <= 50 else -(-100 // (100 - percent))  # noqa: PLR2004 (the median)


def latencies(
    times: Sequence[RequestTimes], percents: Iterable[int] = PERCENTILES
) -> dict[str, float]:
    """Return, by name, the percentiles for which there are enough requests."""
    found = {}
    for name in LATENCIES:
        values = [value for one in times if (value := getattr(one, name)) is not None]
        for percent in percents:
            if len(values) >= requests_for(percent):
                found[f"{name}_p{percent}"] = percentile(values, percent)
    return found


def percent_of(name: str) -> int:
    """Return 95 for a name such as `time_to_first_token_p95`; 0 for other names."""
    match = _PERCENTILE.fullmatch(name)
    return int(match[1]) if match and int(match[1]) < 100 else 0  # noqa: PLR2004


def too_few_requests(name: str, names: Container[str]) -> str:
    """Say how many requests a percentile needs if that is all it lacks; otherwise empty.

    Any request has a median, so the level and the latency were measured if `names` has that.
    """
    percent = percent_of(name)
    if percent not in PERCENTILES or name.replace(f"_p{percent}", "_p50") not in names:
        return ""
    needed = requests_for(percent)
    return (
        f"A p{percent} needs at least {needed} requests: with fewer, it is just the slowest of"
        f" them. Set requests={needed}."
    )
