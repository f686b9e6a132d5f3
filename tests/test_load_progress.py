from __future__ import annotations

import random
from itertools import pairwise

import pytest

from kitty_nb.supervisor.events import LoadProgress, Stage
from kitty_nb.supervisor.load_progress import Basis, LoadEstimate, LoadMeter
from kitty_nb.supervisor.process import Usage

GB = 10**9
BASE = 50_000_000


def loading(total: int = 10 * GB, expected: LoadEstimate | None = None) -> LoadMeter:
    meter = LoadMeter(total)
    if expected:
        meter.expected = expected
    meter.enter_stage(Stage.STARTING, 0.0)
    meter.measure(Usage(BASE, BASE), 0.1)
    meter.enter_stage(Stage.LOADING, 0.2)
    return meter


def even_load(meter: LoadMeter, seconds: int, total: int) -> list[float]:
    """Feed an even load of so many seconds, and return the fraction at each."""
    fractions = []
    for second in range(1, seconds + 1):
        meter.measure(Usage(BASE + total * second // seconds, 0), second)
        fractions.append(meter.progress(second).fraction)
    return fractions


def test_the_fraction_never_falls_though_memory_does() -> None:
    meter, seen = loading(), []
    for second, resident in enumerate([1, 4, 8, 3, 0.2, 8.5], start=1):  # a GPU load lets go of it
        meter.measure(Usage(BASE + int(resident * GB), 0), second)
        seen.append(meter.progress(second).fraction)
    assert seen == sorted(seen)
    assert meter.loaded == 8.5 * GB


def test_bytes_read_count_where_memory_does_not_show() -> None:
    meter = loading()
    meter.measure(Usage(BASE, BASE + 5 * GB), 5)
    assert meter.progress(5).stage is Stage.LOADING
    assert meter.loaded == 5 * GB


def test_an_even_load_moves_the_bar_evenly() -> None:
    fractions = even_load(loading(), 50, 10 * GB)
    assert fractions[9] == pytest.approx(0.2, abs=0.08)
    assert fractions[24] == pytest.approx(0.5, abs=0.08)


def test_a_known_load_is_foreseen_and_kept_to() -> None:
    expected = LoadEstimate(Basis.SAME_LOAD, 0.2, 50.0, 10.0)
    meter = loading(expected=expected)
    first = meter.progress(0.2)
    assert first.eta == pytest.approx(60.0, rel=0.02)
    fractions = even_load(meter, 50, 10 * GB)
    assert fractions[14] == pytest.approx(15 / 60.2, abs=0.03)
    assert fractions[-1] == pytest.approx(50 / 60.2, abs=0.03)
    quarter = meter.progress(50)
    assert quarter.eta == pytest.approx(10, rel=0.1)


def test_all_bytes_there_is_preparing_and_never_complete() -> None:
    meter = loading()
    meter.measure(Usage(11 * GB, 0), 10)
    fractions = [meter.progress(at).fraction for at in (10, 11, 20, 100, 10_000)]
    assert meter.progress(10_000).stage is Stage.PREPARING
    assert fractions == sorted(fractions)
    assert max(fractions) < 1


def test_only_ready_is_complete() -> None:
    meter = loading()
    assert meter.progress(5).fraction < 1
    meter.enter_stage(Stage.READY, 6)
    assert meter.progress(6).fraction == 1
    assert meter.progress(6).eta == 0


def test_a_stage_is_not_left_backwards() -> None:
    meter = loading()
    meter.measure(Usage(11 * GB, 0), 10)
    meter.enter_stage(Stage.LOADING, 11)
    assert meter.stage is Stage.PREPARING


def test_time_moves_the_bar_where_nothing_can_be_counted() -> None:
    meter = loading(expected=LoadEstimate(Basis.HOST, 1.0, 60.0, 10.0))
    fractions = [meter.progress(at).fraction for at in (1, 2, 3, 30, 90, 200)]
    assert fractions == sorted(set(fractions))
    assert max(fractions) < 1


def test_a_model_too_small_to_count_moves_the_bar_at_whatever_pace_it_loads() -> None:
    meter = loading(total=0, expected=LoadEstimate(Basis.NOTHING, 0.1, 0.001, 0.02))
    meter.measure(Usage(BASE + 1_000_000, 0), 0.3)
    fractions = [meter.progress(float(second)).fraction for second in range(1, 40)]
    assert min(later - now for now, later in pairwise(fractions)) > 0.001
    assert max(fractions) < 0.9


def test_no_eta_before_anything_is_known() -> None:
    meter = LoadMeter(GB)
    meter.enter_stage(Stage.STARTING, 0.0)
    assert meter.progress(3).eta is None


@pytest.mark.parametrize("total", [0, 1])
def test_a_model_without_size_does_not_divide_by_zero(total: int) -> None:
    meter = loading(total=total)
    meter.measure(Usage(0, 0), 1)
    assert 0 <= meter.progress(1).fraction < 1


def test_signs_of_life_are_remembered() -> None:
    meter = loading()
    meter.measure(Usage(GB, 0), 3)
    assert meter.moved_at == 3
    meter.measure(Usage(GB, 0), 9)
    assert meter.moved_at == 3
    meter.heartbeat(10)
    assert meter.moved_at == 10


def played(
    meter: LoadMeter,
    starting: float,
    loading: float,
    preparing: float,
    *,
    size: int = 10 * GB,
    step: float = 0.05,
    burst: float = 0.0,
) -> tuple[list[LoadProgress], float]:
    """Play a load of so many seconds a stage; return all progress, and the bar's mean error.

    Args:
        burst: Share of the bytes that is there at once.
    """
    meter.total = size
    meter.enter_stage(Stage.STARTING, 0.0)
    total = starting + loading + preparing
    shown, error = [], 0.0
    for number in range(int(total / step)):
        at = number * step
        if at >= starting:
            meter.enter_stage(Stage.LOADING, at)
        share = 0.0 if at < starting else min(1.0, burst + (at - starting) / loading)
        meter.measure(Usage(BASE + int(share * size), 0), at)
        shown.append(meter.progress(at))
        error += abs(shown[-1].fraction - at / total) * step / total
    return shown, error


def meter_for(basis: Basis, *seconds: float) -> LoadMeter:
    return LoadMeter(expected=LoadEstimate(basis, *seconds))


@pytest.mark.parametrize(
    ("stages", "guess"),
    [
        ((0.2, 10, 1), (0.1, 5.0, 0.1)),
        ((0.2, 10, 1), (0.05, 0.01, 0.05)),  # taken for cached, and is not
        ((1, 20, 3), (0.1, 10.0, 1.0)),
        ((0.2, 5, 0), (0.1, 3.0, 0.5)),
    ],
)
def test_the_bar_of_a_first_load_is_near_the_truth(
    stages: tuple[float, float, float], guess: tuple[float, float, float]
) -> None:
    shown, error = played(meter_for(Basis.NOTHING, *guess), *stages)
    assert error <= 0.08
    assert all(progress.eta is None for progress in shown if progress.stage is Stage.STARTING)


@pytest.mark.parametrize("stages", [(0.2, 10, 1), (3, 10, 5), (0.1, 0.4, 2), (2, 0.1, 0.1)])
def test_the_bar_of_a_known_load_is_nearer(stages: tuple[float, float, float]) -> None:
    shown, error = played(meter_for(Basis.SAME_LOAD, *stages), *stages, step=0.02)
    assert error <= 0.02
    total = sum(stages)
    quarter = shown[len(shown) // 4]
    assert quarter.eta == pytest.approx(total - quarter.elapsed, rel=0.05)
    assert shown[0].eta == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("factor", [0.1, 0.5, 2, 10])
def test_a_load_at_another_rate_than_known_is_found_out(factor: float) -> None:
    shown, error = played(meter_for(Basis.SAME_LOAD, 0.2, 10 * factor, 1), 0.2, 10, 1)
    assert error <= 0.08
    half = shown[len(shown) // 2]
    assert half.eta == pytest.approx(11.2 - half.elapsed, rel=0.25)


@pytest.mark.parametrize("loading", [0.5, 2.0, 6.0])
def test_the_eta_of_a_slower_load_never_leaps_and_is_true_or_not_shown(loading: float) -> None:
    shown, _ = played(meter_for(Basis.SAME_LOAD, 0.2, loading, 1), 0.2, 10, 1)
    etas = [(one.elapsed, one.eta) for one in shown if one.eta is not None]
    for (before, eta), (now, later) in pairwise(etas):
        assert later - eta <= now - before + 1e-9
    late = [eta == pytest.approx(11.2 - at, rel=0.3, abs=0.5) for at, eta in etas if at > loading]
    assert all(late)
    assert late
    assert all(one.overdue for one in shown if one.elapsed > (loading + 1.2) * 1.1)
    assert not shown[0].overdue


@pytest.mark.parametrize("factor", [0.4, 2.5, 5])
@pytest.mark.parametrize("known", [(0.5, 8, 1.5), (0.5, 3, 6.5)])
def test_a_machine_that_is_faster_or_slower_than_it_was_is_found_out(
    known: tuple[float, float, float], factor: float
) -> None:
    starting, loading, preparing = (factor * seconds for seconds in known)
    shown, _ = played(meter_for(Basis.SAME_LOAD, *known), starting, loading, preparing)
    total = factor * sum(known)
    for one in shown[len(shown) // 2 : len(shown) * 9 // 10]:
        assert one.eta == pytest.approx(total - one.elapsed, rel=0.2)


def test_the_time_left_of_a_guess_ends_and_does_not_grow() -> None:
    shown, _ = played(meter_for(Basis.NOTHING, 0.1, 5.0, 0.5), 0.2, 10, 20)
    etas = [one.eta for one in shown if one.stage is Stage.PREPARING]
    known = [eta for eta in etas if eta is not None]
    assert known
    assert etas == known + [None] * (len(etas) - len(known))
    assert max(known) <= 1.0 + 1e-9  # the rule of thumb, and a twentieth of the weights' time


def test_a_load_as_usual_is_not_overdue() -> None:
    shown, _ = played(meter_for(Basis.SAME_LOAD, 0.2, 10, 1), 0.2, 10, 1)
    assert not any(one.overdue or one.eta is None for one in shown)


def test_bytes_that_come_at_once_do_not_fill_the_bar() -> None:
    """As when part of the file was cached, or the first measurement comes late."""
    shown, _ = played(meter_for(Basis.NOTHING, 0.05, 0.01, 0.05), 0.2, 10, 1, burst=0.05)
    early = [progress.fraction for progress in shown if progress.elapsed < 1]
    assert max(early) < 0.35


def test_a_cached_load_jumps_and_is_soon_ready() -> None:
    meter = meter_for(Basis.SAME_LOAD, 0.1, 0.03, 0.1)
    meter.enter_stage(Stage.STARTING, 0.0)
    meter.measure(Usage(BASE, 0), 0.09)
    before = meter.progress(0.1)
    meter.total = 10 * GB
    meter.enter_stage(Stage.LOADING, 0.1)
    meter.measure(Usage(BASE + 10 * GB, 0), 0.13)
    after = meter.progress(0.13)
    assert after.stage is Stage.PREPARING
    assert before.fraction < after.fraction == pytest.approx(0.13 / 0.23, abs=0.05)


def test_whatever_is_measured_the_bar_rises_and_stays_below_its_end() -> None:
    chance = random.Random(1)
    for _ in range(200):
        bases = [*Basis]
        seconds = [chance.choice([0.0, 0.01, 1, 100]) for _ in range(3)]
        meter = meter_for(chance.choice(bases), *seconds)
        meter.total = chance.choice([0, 1, GB])
        at, last = 0.0, -1.0
        for stage in (Stage.STARTING, Stage.LOADING):
            meter.enter_stage(stage, at)
            for _ in range(30):
                at += chance.choice([0.001, 0.1, 5])
                seen = Usage(chance.choice([0, BASE, GB]), chance.choice([0, GB // 3, 4 * GB]))
                meter.measure(seen, at)
                progress = meter.progress(at)
                assert last < progress.fraction < 1
                assert progress.eta is None or progress.eta >= 0
                last = progress.fraction


def test_a_clock_that_stands_or_falls_back_does_no_harm() -> None:
    meter = loading()
    meter.measure(Usage(BASE + 5 * GB, 0), 5)
    reached = meter.progress(5).fraction
    for at in (5, 4, -100, 5):
        assert meter.progress(at).fraction == pytest.approx(reached, abs=0.01)
    assert reached <= meter.progress(6).fraction < 1


def test_the_stages_are_timed() -> None:
    meter = LoadMeter(GB)
    assert meter.seconds(Stage.STARTING, 1) == 0
    meter.enter_stage(Stage.STARTING, 1)
    meter.enter_stage(Stage.LOADING, 3)
    assert meter.seconds(Stage.LOADING, 7) == 4
    meter.measure(Usage(BASE, 0), 3)
    meter.measure(Usage(BASE + GB, 0), 8)
    meter.enter_stage(Stage.READY, 8.5)
    stages = (Stage.STARTING, Stage.LOADING, Stage.PREPARING)
    assert [meter.seconds(stage, 99) for stage in stages] == [2, 5, 0.5]


def test_a_stage_that_was_not_seen_took_no_time() -> None:
    meter = LoadMeter(GB)
    meter.enter_stage(Stage.STARTING, 1)
    meter.enter_stage(Stage.READY, 3)
    assert [meter.seconds(stage, 3) for stage in Stage] == [2, 0, 0, 0]


def test_work_is_a_sign_of_life_and_answering_health_checks_is_none() -> None:
    meter = loading()
    for second in range(1, 61):
        meter.measure(Usage(BASE, BASE, processor=second * 0.9), second)
    assert meter.moved_at == 60
    for second in range(61, 121):
        meter.measure(Usage(BASE, BASE, processor=54 + (second - 60) * 0.002), second)
    assert meter.moved_at == 60


def test_reading_a_large_vocabulary_is_no_flow_of_weights() -> None:
    """As a small model with 262,144 tokens: a second of vocabulary, then all weights at once."""
    size, header = 241_000_000, 7_000_000
    expected = LoadEstimate(Basis.SAME_LOAD, 0.1, 1.0, 0.2)
    meter = LoadMeter(size, header, expected)
    meter.enter_stage(Stage.STARTING, 0.0)
    meter.measure(Usage(BASE, 0), 0.05)
    meter.enter_stage(Stage.LOADING, 0.1)
    for at, read in ((0.2, header), (0.4, header), (0.6, 2 * header), (0.9, 2 * header)):
        meter.measure(Usage(BASE, read), at)
        assert meter.progress(at).fraction == pytest.approx(at / 1.3, abs=0.05)
    meter.measure(Usage(BASE + size, 2 * header), 1.1)
    assert meter.progress(1.1).stage is Stage.PREPARING


def test_a_large_vocabulary_is_foreseen_where_nothing_else_is_known() -> None:
    size, header = 241_000_000, 7_000_000
    meter = LoadMeter(size, header, LoadEstimate(Basis.NOTHING, 0.05, 0.02, 0.1))
    meter.enter_stage(Stage.STARTING, 0.0)
    meter.measure(Usage(BASE, 0), 0.05)
    meter.enter_stage(Stage.LOADING, 0.1)
    for at in (0.25, 0.5, 0.75, 1.0):
        meter.measure(Usage(BASE, header), at)
        progress = meter.progress(at)
        assert progress.fraction == pytest.approx(at / 1.25, abs=0.1)
        assert progress.eta is None
