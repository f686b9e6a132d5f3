from __future__ import annotations

from dataclasses import replace

import pytest
from test_history import RECORD

from kitty_nb.supervisor.history import estimate_load
from kitty_nb.supervisor.load_progress import Basis


def test_the_same_load_is_foreseen_by_the_median_of_its_past() -> None:
    past = [replace(RECORD, loading=seconds) for seconds in (2.0, 2.2, 9.0)]
    estimate = estimate_load(past, RECORD)
    assert estimate.basis is Basis.SAME_LOAD
    assert (estimate.starting, estimate.loading, estimate.preparing) == pytest.approx(
        (0.1, 2.2, 0.5)
    )


def test_cold_and_hot_are_kept_apart_and_between_them_is_between() -> None:
    cold, hot = RECORD, replace(RECORD, cached=1.0, loading=0.2)
    assert estimate_load([cold, hot], RECORD).loading == pytest.approx(2.0)
    assert estimate_load([cold, hot], replace(RECORD, cached=1.0)).loading == pytest.approx(0.2)
    assert estimate_load([cold, hot], replace(RECORD, cached=0.5)).loading == pytest.approx(1.1)


def test_other_settings_speak_for_the_model_and_other_models_for_the_machine() -> None:
    settings = replace(RECORD, settings='{"context_size": 1}')
    assert estimate_load([settings], RECORD).basis is Basis.SAME_MODEL
    other = replace(RECORD, path="/other.gguf", size=2000, loading=8.0)
    estimate = estimate_load([other], RECORD)
    assert estimate.basis is Basis.HOST
    assert estimate.loading == pytest.approx(4.0)  # by bytes


def test_a_replaced_model_is_not_the_same() -> None:
    for change in ({"digest": "x"}, {"mtime_ns": 2}, {"size": 1001}):
        assert estimate_load([RECORD], replace(RECORD, **change)).basis is Basis.HOST


def test_without_a_past_there_is_no_number() -> None:
    assert estimate_load([], RECORD).basis is Basis.NOTHING
    far = replace(RECORD, path="/huge.gguf", size=10**6)
    assert estimate_load([far], RECORD).basis is Basis.NOTHING
    assert estimate_load([], replace(RECORD, size=0)).basis is Basis.NOTHING


def test_what_a_stage_takes_is_known_though_its_rate_is_not() -> None:
    """A model loaded off the disk before is now in the page cache, as none was before."""
    estimate = estimate_load([RECORD], replace(RECORD, cached=1.0))
    assert estimate.basis is Basis.NOTHING
    assert (estimate.starting, estimate.preparing) == (RECORD.starting, RECORD.preparing)
    assert estimate.loading < RECORD.loading


def test_where_the_cache_cannot_be_seen_loads_are_compared_all_the_same() -> None:
    unseen = replace(RECORD, cached=None)
    assert estimate_load([unseen], unseen).basis is Basis.SAME_LOAD
    assert estimate_load([RECORD], unseen).basis is Basis.NOTHING


def test_the_last_few_loads_count() -> None:
    before = [replace(RECORD, loading=60.0)] * 20
    assert estimate_load([RECORD] * 5 + before, RECORD).loading == pytest.approx(2.0)


def test_another_engine_starts_in_another_time_and_speaks_for_this_model_only() -> None:
    native = replace(RECORD, engine="native")
    assert estimate_load([native], RECORD).basis is Basis.SAME_MODEL
    other = replace(native, path="/other.gguf")
    assert estimate_load([other], RECORD).basis is Basis.NOTHING


def test_another_machine_says_nothing() -> None:
    assert estimate_load([replace(RECORD, host="there")], RECORD).basis is Basis.NOTHING


def test_the_nearest_in_size_speaks_for_the_machine() -> None:
    small = [replace(RECORD, path=f"/{n}.gguf", size=110, loading=11.0) for n in range(5)]
    large = [replace(RECORD, path=f"/{n}.gguf", size=2000, loading=2.0) for n in range(5)]
    assert estimate_load([*small, *large], RECORD).loading == pytest.approx(1.0)


def test_a_mixture_of_experts_is_thought_to_warm_up_faster() -> None:
    large = replace(RECORD, size=10**10)
    assert estimate_load([], large, 0.01).preparing < estimate_load([], large).preparing / 10
