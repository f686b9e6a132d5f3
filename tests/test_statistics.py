from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np
import pytest

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments import (
    Difference,
    Verdict,
    compare_paired,
    own_spread,
    proportion_interval,
)

pytestmark = pytest.mark.skipif(find_spec("scipy") is None, reason="needs SciPy")
NOISE = 0.03  # of each measurement


def series(seed: int, rounds: int, factor: float = 1.0, noise: float = NOISE) -> list[float]:
    drawn = np.random.default_rng(seed).normal(0, noise, rounds)
    return [float(value) for value in 40 * factor * np.exp(drawn)]


def verdicts(rounds: int, factor: float, tries: int = 150, **more: float) -> list[Difference]:
    return [
        compare_paired(
            series(2 * seed, rounds),
            series(2 * seed + 1, rounds, factor),
            smaller_is_better=False,
            **more,
        )
        for seed in range(tries)
    ]


@pytest.mark.parametrize("rounds", [3, 5, 12])
def test_the_same_settings_seldom_have_a_winner(rounds: int) -> None:
    told = [one for one in verdicts(rounds, 1.0, 200) if one.verdict is not Verdict.TOO_CLOSE]
    assert len(told) <= 0.05 * 200


def test_a_burst_of_load_makes_no_winner() -> None:
    winners = 0
    for seed in range(150):
        busy = np.random.default_rng(seed).random((2, 8)) < 0.15  # half the speed for a while
        one, other = (
            [v / (1 + slow) for v, slow in zip(series(9 * seed + n, 8), busy[n], strict=True)]
            for n in (0, 1)
        )
        winners += compare_paired(one, other, smaller_is_better=False).verdict != Verdict.TOO_CLOSE
    assert winners <= 0.05 * 150


def test_ten_percent_are_found_in_six_rounds() -> None:
    found = verdicts(6, 1.1)
    assert sum(one.verdict is Verdict.FASTER for one in found) >= 0.9 * 150
    assert sum(one.low <= 1.1 <= one.high for one in found) >= 0.93 * 150
    slower = verdicts(6, 1 / 1.1)
    assert sum(one.verdict is Verdict.SLOWER for one in slower) >= 0.9 * 150


def test_the_ratio_and_its_interval_are_those_of_the_paired_t_test() -> None:
    from scipy import stats  # noqa: PLC0415 - takes a second

    before, after = series(1, 40), series(2, 40, 1.02)
    one = compare_paired(before, after, smaller_is_better=False)
    logs = np.log(after) - np.log(before)
    assert one.ratio == pytest.approx(stats.gmean(np.array(after) / np.array(before)))
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.98)
    # The wider of two methods, which agree where there is enough to go by.
    assert math.log(one.low) == pytest.approx(low, abs=0.1 * (high - low))
    assert math.log(one.high) == pytest.approx(high, abs=0.1 * (high - low))
    assert one.low <= math.exp(low) < math.exp(high) <= one.high


def test_less_is_better_where_it_is_said() -> None:
    before, after = series(1, 8), series(2, 8, 1.3)
    assert compare_paired(before, after, smaller_is_better=True).verdict is Verdict.SLOWER
    assert compare_paired(after, before, smaller_is_better=True).verdict is Verdict.FASTER
    told = compare_paired(before, after, smaller_is_better=False)
    assert str(told).startswith("faster: +")
    assert told.more_rounds == 0


def test_it_says_how_many_rounds_would_tell() -> None:
    from scipy import stats  # noqa: PLC0415 - takes a second

    # Independently, by the noncentral t distribution: from when on a test has 80 % power.
    effect, deviation = math.log(1.02), NOISE * math.sqrt(2)
    needed = next(
        n
        for n in range(3, 1000)
        if stats.nct.sf(stats.t.ppf(0.99, n - 1), n - 1, effect / deviation * math.sqrt(n)) >= 0.8
    )
    told = [
        one.rounds + one.more_rounds
        for one in verdicts(12, 1.02)
        if one.more_rounds and one.ratio == pytest.approx(1.02, rel=0.003)
    ]
    assert np.median(told) == pytest.approx(needed, rel=0.25)
    at_last = verdicts(round(np.median(told)), 1.02)
    assert sum(one.verdict is Verdict.FASTER for one in at_last) >= 0.7 * 150


def test_few_rounds_tell_nothing_and_say_how_many_are_missing() -> None:
    one = compare_paired([10.0], [20.0], smaller_is_better=False)
    assert (one.verdict, one.more_rounds, one.low, one.high) == (Verdict.TOO_CLOSE, 2, 0, math.inf)
    assert str(one) == "too close to tell, because a verdict takes 3 rounds"
    three = compare_paired([10.0, 10.1, 9.9], [20.0, 20.3, 19.9], smaller_is_better=False)
    assert three.verdict is Verdict.FASTER
    assert three.low < 2.0  # wider than the three ratios themselves
    assert three.high > 2.0101


def test_what_the_machine_itself_differs_by_is_no_difference() -> None:
    spread = own_spread([10.0, 10.0, 10.0], [10.4, 10.3, 10.5])
    assert spread == pytest.approx(0.04, abs=1e-3)
    before, after = [10.0, 10.0, 10.0, 10.0], [10.3, 10.31, 10.29, 10.3]
    assert compare_paired(before, after, smaller_is_better=False).verdict is Verdict.FASTER
    one = compare_paired(before, after, smaller_is_better=False, spread=spread)
    assert (one.verdict, one.more_rounds) == (Verdict.TOO_CLOSE, None)
    assert str(one).endswith("and more rounds would hardly tell")


def test_numbers_without_noise_are_told_apart_and_equal_ones_are_not() -> None:
    same = compare_paired([2.0] * 3, [2.0] * 3, smaller_is_better=True)
    assert (same.verdict, same.ratio, same.more_rounds) == (Verdict.TOO_CLOSE, 1.0, None)
    less = compare_paired([2.0] * 3, [1.9] * 3, smaller_is_better=True)
    assert less.verdict is Verdict.FASTER
    assert less.low == pytest.approx(less.high)


@pytest.mark.parametrize(
    ("baseline", "other"), [([1.0], [1.0, 2.0]), ([1.0, 0.0, 1.0], [1.0] * 3), ([-1.0], [1.0])]
)
def test_what_has_no_ratio_is_refused(baseline: list[float], other: list[float]) -> None:
    with pytest.raises(ExperimentError, match=r"rounds with|positive numbers"):
        compare_paired(baseline, other, smaller_is_better=False)


def test_the_same_numbers_have_the_same_interval() -> None:
    one, two = verdicts(5, 1.05, 2), verdicts(5, 1.05, 2)
    assert one == two


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (7, 10), (10, 10), (93, 100)])
def test_a_share_has_wilsons_interval(successes: int, total: int) -> None:
    z, share = 1.959964, successes / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = (
        z
        / (1 + z * z / total)
        * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    )
    expected = (middle - half, middle + half)
    assert proportion_interval(successes, total) == pytest.approx(expected, abs=1e-6)
