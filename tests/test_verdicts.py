from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_results import row

from kitty_nb import ServerConfig
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments import Outcome, Results, Sweep, Trial, TrialResult, Verdict
from kitty_nb.experiments.trial import Execute, OnProgress

WAIT = 120.0
NAME = "generation_tokens_per_second"


@pytest.fixture
def config(demo_model: Path) -> ServerConfig:
    return ServerConfig(
        models_dir=demo_model.parent, model=demo_model, threads=2, extra_args="-ctk q8_0"
    )


def measured(
    config: ServerConfig, factors: dict[int, float], rounds: int, **more: float
) -> Results:
    """Rounds with a drift in common, and settings with a factor each by threads."""
    random = np.random.default_rng(5)
    drift = np.linspace(1, 2, rounds)
    rows = [
        row(
            "demo.gguf",
            threads,
            number * sign,
            float(40 * drift[number - 1] * factor * np.exp(random.normal(0, 0.02))) * times,
            4,
        )
        for number in range(1, rounds + 1)
        for threads, factor in factors.items()
        for sign, times in [(1, 1.0), *([(-1, more["twin"])] if threads == 2 and more else [])]
    ]
    return Results(config, tuple(rows))


def threads_of(trial: object) -> int:
    return int(dict(trial.settings)["threads"])  # type: ignore[attr-defined]


def test_a_difference_beneath_a_drift_is_found_by_pairs(config: ServerConfig) -> None:
    results = measured(config, {2: 1.0, 4: 1.2, 8: 1.21}, 6)
    used = results.summary.set_index("threads").loc[2]
    faster = results.summary.set_index("threads").loc[4, NAME]
    assert used[f"{NAME}_low"] < faster < used[f"{NAME}_high"]  # ranges say nothing
    best = results.best()
    assert threads_of(best.trial) in {4, 8}
    assert [threads_of(trial) for trial in best.close] in ([4], [8])
    assert "too close to tell from 1 other" in best.doubt


def test_the_verdict_on_each_is_against_the_settings_in_use(config: ServerConfig) -> None:
    results = measured(config, {2: 1.0, 4: 1.2, 8: 0.8, 6: 1.001}, 6)
    table = results.verdicts().set_index("threads")
    assert table["verdict"].to_dict() == {4: "faster", 8: "slower", 6: "too close to tell"}
    assert table.loc[4, "ratio"] == pytest.approx(1.2, rel=0.03)
    assert table.loc[4, "low"] > 1 > table.loc[8, "high"]
    assert table.loc[4, "rounds"] == 6
    by_threads = {threads_of(one.trial): one for one in results.combinations}
    assert results.verdict(by_threads[4]).verdict is Verdict.FASTER
    assert results.verdict(by_threads[8], by_threads[4]).verdict is Verdict.SLOWER
    slow = results.verdict(by_threads[8], objective="memory_gib")
    assert slow.verdict is Verdict.TOO_CLOSE  # all have the same memory
    with pytest.raises(ExperimentError, match=f"threads 2, .* has no {NAME}"):
        results.verdict(by_threads[4], replace(by_threads[2], series={}))


def test_no_difference_smaller_than_the_machines_own_counts(config: ServerConfig) -> None:
    factors = {2: 1.0, 4: 1.15}
    assert threads_of(measured(config, factors, 8, twin=1.0).best().trial) == 4
    best = measured(config, factors, 8, twin=1.3).best()
    assert threads_of(best.trial) == 2
    assert [threads_of(trial) for trial in best.close] == [4]


def test_too_few_rounds_say_how_many_more_would_tell(config: ServerConfig) -> None:
    results = measured(config, {2: 1.0, 4: 1.2}, 1)
    assert results.verdicts()["more_rounds"].tolist() == [2]
    told = str(results.verdict(results.combinations[1]))
    assert told == "too close to tell, because a verdict takes 3 rounds"
    results = measured(config, {2: 1.0, 4: 1.02}, 4)
    best = results.best()
    assert best.more_rounds > 0
    assert f"{best.more_rounds} more rounds may tell" in best.doubt
    assert best.env_lines().startswith("# Too close to tell from 1 other")


def test_rounds_of_different_runs_are_not_compared(tmp_path: Path, config: ServerConfig) -> None:
    def sweep(threads: list[int], repeats: int, pace: float) -> Sweep:
        @asynccontextmanager
        async def machine() -> AsyncIterator[Execute]:
            async def execute(trial: Trial, _: OnProgress) -> TrialResult:
                rate = pace * (1 + trial.repeat % 3 / 200)
                return replace(row("demo.gguf", threads_of(trial), 1, rate, 4), trial=trial)

            yield execute

        given = {"repeats": repeats, "prompts": "Hi!", "parallel": (1, 4), "busy_repeats": 0}
        given |= {"config": config.replace(threads=4), "store": tmp_path / "sweep.journal"}
        made = Sweep(grid={"threads": threads}, **given)  # type: ignore[arg-type]
        made.run(machine()).wait(WAIT)
        return made

    sweep([4], 3, 20.0)
    results = sweep([4, 8], 3, 18.8).results
    used, other = sorted(results.combinations, key=lambda one: threads_of(one.trial))
    found = results.verdict(other, used)
    assert (found.verdict, found.rounds, found.apart) == (Verdict.TOO_CLOSE, 0, 3)
    assert "a verdict takes 3 rounds: 3 were measured in different runs" in str(found)
    assert results.best().close == (other.trial,)
    assert results.best().more_rounds == 3
    assert results.verdicts()["apart"].tolist() == [3]
    assert results.verdict(other, used, "memory_gib").rounds == 3  # it doesn't drift
    results = sweep([4, 8], 7, 18.8).results
    used, other = sorted(results.combinations, key=lambda one: threads_of(one.trial))
    found = results.verdict(other, used)
    assert (found.verdict, found.rounds, found.apart) == (Verdict.TOO_CLOSE, 4, 3)
    assert found.ratio == pytest.approx(1)


def test_without_the_settings_in_use_there_is_no_verdict(config: ServerConfig) -> None:
    results = measured(config, {4: 1.0, 8: 1.2}, 4)
    with pytest.raises(ExperimentError, match="baseline=True"):
        results.verdicts()
    failed = TrialResult(Trial("demo.gguf", (("threads", 2),)), Outcome.SKIPPED, "It will not fit.")
    with pytest.raises(ExperimentError, match=r"in use were not measured\. It will not fit\."):
        replace(results, rows=(*results.rows, failed)).verdicts()


def test_without_a_model_in_use_the_verdicts_are_against_what_the_baseline_measured(
    tmp_path: Path, config: ServerConfig
) -> None:
    bare = config.replace(model=None, extra_args=())
    given = {"config": bare, "store": tmp_path / "sweep.journal", "grid": {"threads": [2, 4]}}
    for seed in range(6):  # which model finishes first depends on it
        with Sweep(["a.gguf", "b.gguf"], baseline=True, seed=seed, **given) as one:  # type: ignore[arg-type]
            rows = [replace(row("", 0, 0, 20.0, 4), trial=trial) for trial in one.trials]
        table = Results(bare, tuple(rows)).verdicts()
        judged = {*zip(table["model"], table["threads"], strict=True)}
        assert judged == {("a.gguf", 4), ("b.gguf", 2), ("b.gguf", 4)}
        once = tuple(one for one in rows if one.trial.repeat > 0)
        with pytest.raises(ExperimentError, match="baseline=True"):
            Results(bare, once).verdicts()
        assert (
            len(Results(bare, tuple(o for o in once if o.trial.model == "b.gguf")).verdicts()) == 1
        )


def test_a_sweep_measures_the_settings_in_use_twice_in_each_round(
    tmp_path: Path, config: ServerConfig
) -> None:
    given = {"prompts": "Hi!", "max_tokens": 8, "repeats": 3, "busy_repeats": 0}
    given |= {"config": config.replace(context_size=512), "store": tmp_path / "sweep.journal"}
    with Sweep(grid={"batch_size": [64]}, baseline=True, **given) as one:  # type: ignore[arg-type]
        rounds = Counter(abs(trial.repeat) for trial in one.trials)
        assert rounds == {1: 3, 2: 3, 3: 3}
        results = one.run().wait(WAIT)
    used, other = sorted(results.combinations, key=lambda each: len(each.trial.settings))
    assert (used.done, other.done) == (6, 3)
    assert used.own_spread(NAME) > 0
    table = results.verdicts()
    assert table["batch_size"].tolist() == [64]
    assert table["rounds"].tolist() == [3]
    with Sweep(grid={"threads": [2, 1]}, baseline=True, **given) as one:  # type: ignore[arg-type]
        twins = [trial for trial in one.trials if trial.repeat < 0]
        assert [threads_of(trial) for trial in twins] == [2] * 3  # in the grid already
        assert len(one.trials) == 9
