"""Paired comparisons and confidence intervals. Pure."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.arguments import SEEDS, positive, several, whole
from kitty_nb.experiments.extras import extra

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIDENCE = 0.98  # 95 % would name 5 winners among 100 pairs of equals, and often more
LEAST_ROUNDS = 3  # minimum for a meaningful interval
_RESAMPLES = 2000
_QUANTILE = NormalDist().inv_cdf(0.975)  # for a 95 % interval
_POWER = 0.8  # probability that the forecast number of rounds suffices
_MOST_ROUNDS = 1000  # more would not be practical


class Verdict(StrEnum):
    """The verdict of a comparison on the second of two series."""

    FASTER = "faster"
    SLOWER = "slower"
    TOO_CLOSE = "too close to tell"


@dataclass(frozen=True, slots=True)
class Difference:
    """A measured difference between two series, with its confidence interval and verdict.

    Attributes:
        ratio: The second over the first, as the geometric mean over the rounds; NaN without any.
        low: The lower end of the ratio's confidence interval.
        high: The upper end.
        rounds: The number of rounds.
        verdict: The verdict on the second.
        more_rounds: The number of further rounds that would probably decide if the ratio stays the
            same; 0 if it is decided, None if no practical number would. With fewer than three
            rounds, the number that a verdict lacks at least.
        apart: The number of rounds left out, because their two values were measured in different
            runs or on different machines.
    """

    ratio: float
    low: float
    high: float
    rounds: int
    verdict: Verdict
    more_rounds: int | None
    apart: int = 0

    def __str__(self) -> str:
        """The verdict in words, such as `faster: +10.2 % (+8.1 to +12.4 %)`."""
        if self.rounds < LEAST_ROUNDS:
            told = f"{self.verdict}, because a verdict takes {LEAST_ROUNDS} rounds"
            why = f"{self.apart} were measured in different runs or on different machines"
            return f"{told}: {why}" if self.apart else told
        ends = f"{_percent(self.low)} to {_percent(self.high)} %"
        if self.verdict is Verdict.TOO_CLOSE:
            return f"{self.verdict} ({ends}), {_more(self.more_rounds)}"
        return f"{self.verdict}: {_percent(self.ratio)} % ({ends})"


def compare_paired(
    baseline: Sequence[float],
    other: Sequence[float],
    *,
    smaller_is_better: bool,
    spread: float = 0.0,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Difference:
    """Compare two series measured in the same rounds, by their ratios per round.

    The interval is a percentile bootstrap of the mean log ratio, expanded for small samples
    (Hesterberg 2015), and never narrower than Student's t interval.

    Args:
        baseline: Positive numbers, one per round.
        other: The other series, in the same rounds.
        smaller_is_better: Whether a smaller value is better, as of seconds.
        spread: The machine's own relative variation; see `own_spread`. A difference that isn't
            larger is too close to tell.
        confidence: The confidence level. By default, about 2 in 100 comparisons of equals have a
            winner.
        seed: The seed of the bootstrap.

    Raises:
        ExperimentError: The series differ in length, or a number is out of range.
    """
    _check_confidence(confidence)
    whole("seed", seed, 0, SEEDS)
    if spread != 0:
        positive("spread", spread)
    logs = _log_ratios(baseline, other)
    rounds = len(logs)
    if rounds < LEAST_ROUNDS:
        ratio = math.exp(math.fsum(logs) / rounds) if logs else math.nan
        missing = LEAST_ROUNDS - rounds
        return Difference(ratio, 0.0, math.inf, rounds, Verdict.TOO_CLOSE, missing)
    mean = math.fsum(logs) / rounds
    low, high = _interval(logs, confidence, seed)
    if low <= 0 <= high or abs(mean) <= math.log1p(spread):
        verdict = Verdict.TOO_CLOSE
        more = _more_rounds(mean, (high - low) / 2, rounds, confidence, spread)
    else:
        verdict = Verdict.SLOWER if (mean > 0) is smaller_is_better else Verdict.FASTER
        more = 0
    return Difference(math.exp(mean), math.exp(low), math.exp(high), rounds, verdict, more)


def own_spread(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the relative difference of two series of equals: the machine's own variation."""
    logs = _log_ratios(first, second)
    return math.expm1(abs(math.fsum(logs) / len(logs))) if logs else 0.0


def proportion_interval(
    successes: int, total: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return Wilson's interval for a proportion of successes."""
    whole("successes", successes, 0, whole("total", total, 1, sys.maxsize))
    _check_confidence(confidence)
    test = extra("scipy.stats").binomtest(successes, total)
    low, high = test.proportion_ci(confidence, method="wilson")
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the bootstrap 95 % interval of a mean; None for fewer than three values."""
    return _interval(values, 0.95, seed=0) if len(values) >= LEAST_ROUNDS else None


def normal_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the mean of many values, and its 95 % interval by the standard error."""
    mean = fmean(values)
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean, (mean - _QUANTILE * error, mean + _QUANTILE * error)


def score_interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """Return the interval of a mean score: Wilson's if all scores are 0 or 1, else a bootstrap."""
    if set(scores) <= {0.0, 1.0}:
        return proportion_interval(round(sum(scores)), len(scores))
    return mean_interval(scores)


def _check_confidence(level: float) -> None:
    if positive("confidence", level) >= 1:
        raise ExperimentError(f"confidence is {level!r}. Write a number below 1.")


def _log_ratios(baseline: Sequence[float], other: Sequence[float]) -> list[float]:
    baseline, other = several(baseline), several(other)
    if len(baseline) != len(other):
        raise ExperimentError(
            f"Can't pair {len(baseline)} rounds with {len(other)}. Give both series a value for"
            " every round."
        )
    if not all(isinstance(v, Real) and 0 < float(v) < math.inf for v in (*baseline, *other)):
        raise ExperimentError("Ratios need positive numbers. Compare another metric.")
    return [math.log(after / before) for before, after in zip(baseline, other, strict=True)]


def _interval(values: Sequence[float], confidence: float, seed: int) -> tuple[float, float]:
    """Return the interval of a mean: at either end, the wider of Student's and the bootstrap's."""
    stats, rounds = extra("scipy.stats"), len(values)
    numpy = extra("numpy")
    error = stats.sem(values)
    mean, quantile = math.fsum(values) / rounds, stats.t.ppf((1 + confidence) / 2, rounds - 1)
    level = 1 - 2 * stats.norm.sf(quantile * math.sqrt(rounds / (rounds - 1)))
    found = stats.bootstrap(
        (values,),
        numpy.mean,
        n_resamples=_RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=numpy.random.default_rng(seed),
    ).confidence_interval
    half = quantile * error
    return min(float(found.low), mean - half), max(float(found.high), mean + half)


def _more_rounds(
    mean: float, half: float, rounds: int, confidence: float, spread: float
) -> int | None:
    """Return how many more rounds would decide, if mean and deviation stay the same."""
    if abs(mean) <= math.log1p(spread):
        return None
    t, level = extra("scipy.stats").t, (1 + confidence) / 2
    deviation = half * math.sqrt(rounds) / t.ppf(level, rounds - 1)
    counts = extra("numpy").arange(rounds + 1, _MOST_ROUNDS + 1)
    needed = (t.ppf(level, counts - 1) + t.ppf(_POWER, counts - 1)) * deviation
    enough = counts[needed <= abs(mean) * counts**0.5]
    return int(enough[0]) - rounds if len(enough) else None


def _percent(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.1f}"


def _more(rounds: int | None) -> str:
    if rounds is None:
        return "and more rounds would hardly tell"
    return f"{rounds} more round{'s' * (rounds != 1)} may tell"
