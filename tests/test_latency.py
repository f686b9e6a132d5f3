from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitty_nb import ServerConfig
from kitty_nb.errors import ConfigError, ExperimentError
from kitty_nb.experiments import RequestTimes, Sweep, tune
from kitty_nb.experiments.latency import latencies, percentile, requests_for

WAIT = 120.0


@pytest.fixture
def sweep(config: ServerConfig, tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    made: list[Sweep] = []

    def make(**more: object) -> Sweep:
        given = {"config": config.replace(context_size=1024), "store": tmp_path / "one.journal"}
        given |= {"prompts": ["Hi!", "Who are you?"], "max_tokens": 4, "repeats": 1}
        given["busy_repeats"] = 0
        made.append(Sweep(**(given | more)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


@settings(deadline=None)  # a busy machine stops for longer than any of this takes
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=300),
    st.sampled_from([1, 50, 90, 95, 99]),
)
def test_percentiles_are_those_of_numpy(values: list[float], percent: int) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_times_between_tokens_are_over_the_tokens_after_the_first() -> None:
    assert RequestTimes(0.0, 0.5, 2.5, 5).time_between_tokens == 0.5
    alone = RequestTimes(0.0, 0.5, 0.5, 1)
    assert alone.time_between_tokens is None
    assert latencies([alone]) == {"time_to_first_token_p50": 0.5}


def test_a_percentile_needs_as_many_requests_as_lie_beyond_it() -> None:
    assert [requests_for(percent) for percent in (50, 90, 95, 99)] == [1, 10, 20, 100]
    times = [RequestTimes(0.0, 1.0 * n, 2.0 * n, 2) for n in range(1, 20)]
    named = {name.removeprefix("time_to_first_token_") for name in latencies(times)}
    assert {"p50", "p90"} <= named
    assert not {"p95", "p99"} & named


def test_each_request_of_a_sweep_is_kept_and_told_in_percentiles(
    sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    results = sweep(grid={"threads": [1, 2]}, parallel=(1, 4), requests=10).run().wait(WAIT)
    requests = results.requests
    assert requests.groupby(["threads", "concurrency"]).size().tolist() == [10, 12, 10, 12]
    assert (requests["time_to_first_token"] > 0).all()
    assert (requests["tokens"] == 4).all()
    assert (requests["prompt_tokens"] > 0).all()
    between = requests["time_to_first_token"] + 3 * requests["time_between_tokens"]
    assert between.to_numpy() == pytest.approx(requests["seconds"].to_numpy())
    assert requests["sent"].between(results.rows[0].at - WAIT, results.rows[-1].at).all()

    row = results.frame.set_index("threads").loc[2]
    of = requests[(requests["threads"] == 2) & (requests["concurrency"] == 4)]
    for name in ("time_to_first_token", "time_between_tokens"):
        for percent in (50, 90):
            assert row[f"{name}_p{percent}_4"] == pytest.approx(np.percentile(of[name], percent))
    assert row["time_to_first_token_p50"] == pytest.approx(row["time_to_first_token"])
    assert results.best("time_between_tokens_p90_4", {"time_to_first_token_p90": WAIT})
    with pytest.raises(ExperimentError, match="A p99 needs at least 100 requests"):
        results.best("time_to_first_token_p99")
    for name in ("time_to_first_token_p80", "time_to_first_token_p99_8"):  # no number would do
        with pytest.raises(ExperimentError, match=f"{name}'. Did you mean"):
            results.best(name)

    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "one.requests.parquet"), requests)


def test_requests_at_least_are_other_conditions_and_earlier_rows_count(
    sweep: Callable[..., Sweep],
) -> None:
    one = sweep(grid={"threads": [1]})
    one.run().wait(WAIT)
    text = one.store.read_text()
    assert re.search(r',"each":\[', text)
    one.store.write_text(re.sub(r',"each":\[[^\]]*\]', "", text))  # as an earlier version did
    (row,) = sweep(grid={"threads": [1]}).results.rows
    assert row.measurement
    assert row.measurement.speeds[0].time_to_first_token > 0
    assert sweep(grid={"threads": [1]}).results.requests.empty
    assert sweep(grid={"threads": [1]}, requests=3).progress.done == 0


def test_values_of_several_types_are_written_as_text(
    sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    results = sweep(grid={"cache_reuse": [256, "0"]}).run().wait(WAIT)
    path = results.to_parquet(tmp_path / "new" / "trials.parquet")
    assert sorted(pd.read_parquet(path)["cache_reuse"]) == ["0", "256"]
    (tmp_path / "file").touch()
    with pytest.raises(ExperimentError, match="Can't write"):
        results.to_parquet(tmp_path / "file" / "trials.parquet")


def test_a_percentile_of_too_few_requests_is_no_objective(config: ServerConfig) -> None:
    with pytest.raises(ExperimentError, match="Set requests=100"):
        tune(objective="time_to_first_token_p99", config=config)
    with pytest.raises(ExperimentError, match="Set requests=20"):
        tune(constraints={"time_to_first_token_p95": 2}, requests=19, config=config)
    with pytest.raises(ConfigError, match="requests"):
        tune(requests=-1, config=config)
