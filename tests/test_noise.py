from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from kitty_nb import ServerConfig
from kitty_nb.experiments import (
    Measurement,
    Outcome,
    Results,
    Sweep,
    Trial,
    TrialResult,
    load_test,
)
from kitty_nb.experiments.noise import Noise, noise_between, usage_of
from kitty_nb.experiments.trial import Execute, LoadSeconds, OnProgress, TrialEnded, TrialStarted

WAIT = 120.0
LINUX = {"user": 50.0, "system": 10.0, "idle": 130.0, "iowait": 10.0, "guest": 5.0}


def later(**more: float) -> dict[str, float]:
    return {name: seconds + more.get(name, 0.0) for name, seconds in LINUX.items()}


@pytest.mark.parametrize(
    ("change", "own", "load", "others", "busy"),
    [
        # Ten seconds of two processors.
        ({"user": 10.0, "idle": 10.0}, 9.5, 0.5, 0.025, False),
        ({"user": 20.0}, 10.0, 1.0, 0.5, True),
        ({"user": 10.0, "guest": 10.0, "idle": 10.0}, 10.0, 0.5, 0.0, False),
        ({"iowait": 20.0}, 0.0, 0.0, 0.0, False),
        ({"user": 9.0, "idle": 11.0}, 9.4, 0.45, 0.0, False),  # clocks are read one after another
    ],
)
def test_what_others_used_is_what_the_server_and_its_client_did_not(
    change: dict[str, float], own: float, load: float, others: float, busy: bool
) -> None:
    found = noise_between(usage_of(LINUX, 3.0, 2), usage_of(later(**change), 3.0 + own, 2))
    assert found
    assert (found.load, found.others) == (pytest.approx(load), pytest.approx(others))
    assert found.busy is busy


def test_clock_and_temperature_are_noted_where_they_are_known() -> None:
    moments = usage_of(LINUX, 0.0, 2), usage_of(later(idle=2.0), 0.0, 2)
    found = noise_between(*moments, 1996.2, {"coretemp": [41.0, 58.5]})
    assert found
    assert (found.clock_ghz, found.temperature_celsius) == (pytest.approx(1.9962), 58.5)
    found = noise_between(*moments, 0.0, {})
    assert found
    assert (found.clock_ghz, found.temperature_celsius) == (None, None)


def test_too_short_a_time_tells_nothing() -> None:
    assert noise_between(usage_of(LINUX, 0.0, 2), usage_of(later(user=0.3), 0.0, 2)) is None


def measured(trial: Trial, others: float) -> TrialResult:
    load = LoadSeconds(0.1, 0.1, 0.1)
    return TrialResult(
        trial, Outcome.DONE, measurement=Measurement(load, (), 1, noise=Noise(0.9, others))
    )


@pytest.mark.parametrize(
    ("repeats", "others", "left"),
    [
        (1, [0.5, 0.02], 0.02),
        (1, [0.5, 0.6, 0.0], 0.5),
        (2, [0.5, 0.4, 0.6, 0.0], 0.4),
        (0, [0.5, 0.0], 0.5),
        (1, [0.05, 0.0], 0.05),
    ],
)
def test_a_trial_on_a_busy_machine_is_measured_again_a_few_times(
    config: ServerConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    repeats: int,
    others: list[float],
    left: float,
) -> None:
    shares = iter(others)

    @asynccontextmanager
    async def where() -> AsyncIterator[Execute]:
        async def execute(trial: Trial, on_progress: OnProgress) -> TrialResult:
            return measured(trial, next(shares))

        yield execute

    caplog.set_level("INFO", "kitty_nb.experiments")
    events: list[object] = []
    store = tmp_path / "sweep.journal"
    with Sweep(config=config, store=store, repeats=1, busy_repeats=repeats) as one:
        one.subscribe(events.append)
        results = one.run(where()).wait(WAIT)
    assert results.frame["other_processes"].tolist() == [left]
    assert results.frame["busy"].tolist() == [left > 0.1]
    kinds = [type(event) for event in events]
    assert kinds.count(TrialStarted) == kinds.count(TrialEnded) == 1
    again = [text for text in caplog.messages if "Repeating the trial" in text]
    assert len(again) == (repeats if others[0] > 0.1 else 0)
    with Sweep(config=config, store=store, repeats=1) as one:
        assert one.results.rows == results.rows  # what the store keeps, too


def test_the_best_says_that_it_was_measured_on_a_busy_machine(config: ServerConfig) -> None:
    trial = Trial("m.gguf")
    rows = measured(trial, 0.5), measured(replace(trial, repeat=2), 0.0)
    best = Results(config, rows).best("load_seconds")
    assert "1 of 2 measured while other processes were busy" in best.doubt


@pytest.fixture
def spinning() -> Iterator[None]:
    """As many processes as there are processors, which do nothing else."""
    code = "while True: pass"
    count = psutil.cpu_count() or 1
    several = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    yield
    for one in several:
        one.kill()
        one.wait()


@pytest.mark.usefixtures("spinning")
def test_a_busy_machine_is_noted_with_the_real_engine(config: ServerConfig, tmp_path: Path) -> None:
    config = config.replace(context_size=512, threads=1)
    test = load_test(config=config, concurrency=1, requests=60, max_tokens=100).wait(WAIT)
    assert test.frame["busy"].tolist() == [True], test
    with Sweep(
        prompts=["Hi!"] * 60,  # a fast machine answers fewer in a moment, too short to measure
        max_tokens=100,
        config=config,
        store=tmp_path / "sweep.journal",
        repeats=1,
        busy_repeats=0,
    ) as one:
        (row,) = one.run().wait(WAIT).rows
    assert row.outcome is Outcome.DONE, row.reason
    assert row.busy
    noise = row.measurement and row.measurement.noise
    assert noise
    assert 0.1 < noise.others < noise.load <= 1
