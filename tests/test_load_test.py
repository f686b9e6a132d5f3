from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import anyio
import pandas as pd
import pytest
from anyio import to_thread
from terminal import run
from test_cli import write_env

from kitty_nb import ServerConfig, ServerStatus, Supervisor
from kitty_nb.client import Access
from kitty_nb.errors import ConfigError, ExperimentError
from kitty_nb.experiments import Load, LoadTest, RequestTimes, load_test
from kitty_nb.experiments.load_test import Arrivals, arrival_times, next_rate
from kitty_nb.experiments.measure import BenchmarkClient
from kitty_nb.experiments.noise import Noise
from kitty_nb.isolated_server import pid_at

WAIT = 120.0


@pytest.fixture
def base(config: ServerConfig) -> ServerConfig:
    return config.replace(context_size=1024, parallel=2)


def test_constant_arrivals_have_even_gaps() -> None:
    assert list(arrival_times(4.0, 3, Arrivals.CONSTANT, 0)) == [0.0, 0.25, 0.5]


def test_poisson_arrivals_are_seeded_and_scale_with_the_rate() -> None:
    slow, fast, other = (
        list(arrival_times(rate, 2000, Arrivals.POISSON, seed))
        for rate, seed in ((1.0, 7), (10.0, 7), (1.0, 8))
    )
    assert fast == pytest.approx([at / 10 for at in slow])
    assert slow != other
    assert slow[-1] / 2000 == pytest.approx(1.0, rel=0.1)
    gaps = sorted(after - before for before, after in pairwise(slow))
    assert gaps[len(gaps) // 2] == pytest.approx(0.693, rel=0.1)  # the median of e^-x


def test_the_rate_is_found_by_halves() -> None:
    def find(true: float, most: float, steps: int) -> tuple[float, float | None]:
        kept, broken = 0.0, None
        for _ in range(steps):
            rate = next_rate(kept, broken, most)
            if rate <= true:
                kept = rate
                if broken is None:
                    break
            else:
                broken = rate
        return kept, broken

    kept, broken = find(3.0, 8.0, 8)
    assert kept <= 3.0 < (broken or 0)
    assert (broken or 0) - kept == pytest.approx(8.0 / 2**7)
    assert find(9.0, 8.0, 8) == (8.0, None)


def test_closed_and_open_loads_on_a_server_of_its_own(base: ServerConfig) -> None:
    heard: list[Load] = []
    heard_at: list[float] = []

    def hear(load: Load) -> None:
        heard.append(load)
        heard_at.append(time.time())

    test = load_test(
        config=base,
        concurrency=(1, 3),
        rate=50,
        arrivals="constant",
        requests=12,
        max_tokens=4,
        on_load=hear,
    ).wait(WAIT)
    assert test.loads == tuple(heard)
    assert [(one.concurrency, one.rate) for one in heard] == [(1, None), (3, None), (None, 50)]
    assert [len(one.requests) for one in heard] == [12, 12, 12]
    frame = test.frame
    assert (frame["time_to_first_token_p90"] >= frame["time_to_first_token_p50"]).all()
    assert "time_to_first_token_p95" not in frame
    requests = test.requests
    assert len(requests) == 36
    # A busy machine sends any of them later, the first as well, but none sooner.
    assert max(requests[requests["rate"] == 50]["sent"]) - heard_at[1] > 0.9 * 11 / 50
    assert "e+0" not in str(replace(test, loads=(replace(heard[1], seconds=1e-3),)))
    shown = re.sub(" +", " ", str(test))
    assert "| 3 at once | 12 |" in shown
    assert "| 50 a second | 12 |" in shown


def test_waiting_for_a_slot_counts_in_the_time_to_first_token(base: ServerConfig) -> None:
    config = base.replace(parallel=1)
    test = load_test(config=config, concurrency=(1, 4), requests=12, max_tokens=64).wait(WAIT)
    # One of four has the slot: the answers to three others end before the first token of its own.
    waited = [
        median(
            sum(
                one.sent < other.sent + other.seconds < one.sent + one.time_to_first_token
                for other in load.requests
            )
            for one in load.requests
        )
        for load in test.loads
    ]
    alone, queued = waited
    assert alone == 0
    assert queued >= 1  # three, unless the machine is so busy that the askers wait for each other


def test_the_highest_rate_that_keeps_a_limit(base: ServerConfig) -> None:
    ask = {"config": base, "requests": 10, "max_tokens": 8, "steps": 3}
    easy = load_test(limit="time_to_first_token_p90 <= 60", **ask).wait(WAIT)  # type: ignore[arg-type]
    full, held = easy.loads
    assert full.concurrency == 2
    assert easy.highest_rate == held.rate == pytest.approx(full.metrics()["requests_per_second"])
    assert "the most that the server can answer" in easy.summary
    never = load_test(limit="time_to_first_token_p90 < 0", **ask).wait(WAIT)  # type: ignore[arg-type]
    assert [load.rate for load in never.loads[1:]] == pytest.approx(
        [(never.loads[1].rate or 0) / 2**n for n in range(3)]
    )
    assert never.highest_rate is None
    assert str(never).endswith("requests a second.")


def test_a_limit_between_two_rates_is_bracketed() -> None:
    loads = (Load(None, 2.0, 1.0, (RequestTimes(0.0, 0.1, 0.2, 3),)),)
    test = LoadTest(loads, "time_to_first_token_p50 <= 1", 2.0, 2.5)
    assert test.summary == (
        "time_to_first_token_p50 <= 1 holds up to 2 requests a second, but not at 2.5."
    )


def test_a_busy_machine_is_told_below_the_table() -> None:
    times = (RequestTimes(0.0, 0.1, 0.2, 3),)
    test = LoadTest((Load(2, None, 1.0, times), Load(4, None, 1.0, times, Noise(0.9, 0.4))))
    assert test.frame["busy"].tolist() == [False, True]
    assert test.frame["other_processes"].tolist()[1] == 0.4
    note = str(test).partition("\n\n")[2]
    assert note.startswith("- 4 at once: Other work, in this process or others, used 40 %")


def test_a_plot_has_a_curve_for_each_percentile_against_the_rate() -> None:
    times = [RequestTimes(0.0, 0.1 * n, 0.2 * n, 2) for n in range(1, 11)]
    loads = tuple(Load(None, rate, 5.0, (*times,)) for rate in (1.0, 2.0))
    (axes,) = LoadTest((Load(2, None, 5.0, (*times,)), *loads)).plot().axes
    assert [axes.get_xlabel(), axes.get_ylabel()] == [
        "requests per second",
        "time to first token, s",
    ]
    lines = {bars.get_label(): tuple(bars.lines[0].get_ydata()) for bars in axes.containers}  # type: ignore[attr-defined]
    assert lines == {
        "p50": (pytest.approx(0.55),) * 2,
        "p90": (pytest.approx(0.91),) * 2,
    }
    (axes,) = LoadTest((Load(2, None, 5.0, (*times,)),)).plot("time_between_tokens").axes
    assert axes.get_xlabel() == "requests at once"


def test_a_server_that_runs_already_is_asked_and_left_running(
    base: ServerConfig, demo_model: Path
) -> None:
    async def main() -> None:
        async with Supervisor(base) as supervisor:
            state = await supervisor.start()
            access = Access(state.endpoint, supervisor.api_key)
            assert await to_thread.run_sync(pid_at, access) == state.pid
            test = await load_test(access=access, concurrency=2, requests=2, max_tokens=2)
            assert len(test.requests) == 2
            named = await load_test(state.alias, access=access, requests=2, max_tokens=2)
            assert {one.tokens for one in named.loads[0].requests} <= {1, 2}
            with pytest.raises(ExperimentError, match=f"no model 'other': {state.alias}"):
                await load_test("other", access=access)
            assert (await supervisor.check_health()).status is ServerStatus.READY

    anyio.run(main)


def table(output: str) -> list[list[str]]:
    """The first two cells of each row; below a busy machine's table are notes."""
    rows = [line for line in output.splitlines() if line.startswith("|")][2:]
    return [re.split(" *[|] *", line)[1:3] for line in rows]


def test_a_load_test_in_a_terminal(config: ServerConfig, tmp_path: Path) -> None:
    env = write_env(tmp_path, config)
    words = ("load-test", "--env", env, "--requests", "4", "--max-tokens", "4")
    saved = tmp_path / "load.parquet"
    done = run(*words, "--concurrency", "2", "--rate", "20", "--save", saved)
    assert done.exit_code == 0, done.stderr
    assert table(done.stdout) == [["2 at once", "4"], ["20 a second", "4"]]
    assert "20 a second: done in" in done.stderr
    assert len(pd.read_parquet(saved)) == 8
    assert run(*words, "--running").exit_code == 3
    refused = run(*words, "--limit", "time_to_first_token_p90 <= 2")
    assert (refused.exit_code, refused.stderr.count("Set requests=10.")) == (1, 1)


@pytest.mark.parametrize("code", [130, 1])
def test_ctrl_c_or_a_dead_server_keeps_the_loads_so_far(
    config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    async def fail(*_: object) -> None:
        if code == 1:
            raise ExperimentError("The server died.")
        os.kill(os.getpid(), signal.SIGINT)
        await anyio.sleep(WAIT)

    monkeypatch.setattr(BenchmarkClient, "arrive", fail)
    words = ("--requests", "4", "--max-tokens", "4", "--concurrency", "1", "--rate", "1")
    saved = tmp_path / "load.parquet"
    done = run("load-test", *words, "--save", saved, "--env", write_env(tmp_path, config))
    assert done.exit_code == code
    assert table(done.stdout) == [["1 at once", "4"]]
    assert len(pd.read_parquet(saved)) == 4


def test_a_server_that_ends_meanwhile_is_told_in_a_sentence(base: ServerConfig) -> None:
    async def main() -> None:
        async with Supervisor(base) as supervisor:
            state = await supervisor.start()
            access = Access(state.endpoint, supervisor.api_key)
            first = anyio.Event()
            loop = asyncio.get_running_loop()
            test = load_test(
                access=access,
                concurrency=(1, 2),
                requests=40,
                max_tokens=64,
                on_load=lambda _: loop.call_soon_threadsafe(first.set),
            )
            with anyio.fail_after(WAIT):
                await first.wait()
            await supervisor.stop(force=True)
            with pytest.raises(ExperimentError, match="ended early"):
                await test

    anyio.run(main)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"limit": "fast"}, "Can't parse 'fast'. Write it like 'time_to_first_token_p95 <= 2'"),
        ({"limit": "time_to_first_token_p99 <= 2", "requests": 10}, "Set requests=100"),
        ({"limit": "time_to_frist_token_p90 <= 2"}, "Did you mean time_to_first_token_p90"),
        *(({"rate": one}, "Write a number") for one in (0, float("inf"), "2", [None])),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"limit": 5}, "Can't parse 5"),
        ({"prompts": [5]}, "prompts has 5"),
        ({"concurrency": "4"}, "concurrency is '4'"),
        ({"rate": 1, "arrivals": "bursts"}, "poisson or constant"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(
    config: ServerConfig, asked: dict[str, object], told: str
) -> None:
    with pytest.raises(ExperimentError, match=told):
        load_test(config=config, **asked)  # type: ignore[arg-type]


def test_a_router_has_no_model_of_its_own_to_measure(config: ServerConfig, tmp_path: Path) -> None:
    env = write_env(tmp_path, config, "LLAMACPP_CODER_CTX=512", "LLAMACPP_FRONT_MODELS=all")
    told = "front is a router.* Choose the profile of one: primary"
    assert re.search(told, run("load-test", "--env", env, "--profile", "front").stderr)
    front = ServerConfig.from_env(env, "front")
    with pytest.raises(ExperimentError, match=told):
        load_test(config=front, access=Access(front.endpoint, None))


def test_a_wrong_number_of_requests_at_once_is_refused(config: ServerConfig) -> None:
    for wrong in (0, 10**9, [1.5], [float("nan")], [True]):
        with pytest.raises(ExperimentError, match=r"concurrency is .*whole number from 1"):
            load_test(config=config, concurrency=wrong)
    for name in ("max_tokens", "requests", "seed"):
        for number in (float("nan"), 1.5, "64", None, 10**30, True):
            with pytest.raises(ConfigError, match=f"{name}.*must be a whole number"):
                load_test(config=config, **{name: number})
