"""Batch sizes are compared by prompts that they matter to, or they do not win."""

from __future__ import annotations

from pathlib import Path

import pytest

from kitty_nb import ServerConfig
from kitty_nb.experiments import Measurement, Outcome, Results, Sweep, Trial, TrialResult
from kitty_nb.experiments.trial import LoadSeconds, Speed

PROMPT = "prompt_tokens_per_second"


def row(settings: dict[str, int], repeat: int, rate: float, tokens: int) -> TrialResult:
    speed = Speed(1, 1, 1.0, 1 / rate, rate, rate, rate, prompt_tokens=tokens)
    measured = Measurement(LoadSeconds(0.1, 0.1, 0.1), (speed,), 1)
    trial = Trial("demo.gguf", tuple(settings.items()), repeat)
    return TrialResult(trial, Outcome.DONE, measurement=measured)


def results(config: ServerConfig, tokens: int, *rates: tuple[dict[str, int], float]) -> Results:
    rows = [
        row(settings, repeat, rate + repeat, tokens)
        for settings, rate in rates
        for repeat in (1, 2)
    ]
    return Results(config, tuple(rows))


def test_sizes_that_no_batch_reaches_do_not_win(config: ServerConfig) -> None:
    config = config.replace(batch_size=None, ubatch_size=None)
    rates = ({"ubatch_size": 256}, 500.0), ({"ubatch_size": 512}, 100.0)
    short = results(config, 20, *rates).best(PROMPT)
    assert dict(short.trial.settings) == {"ubatch_size": 512}  # what is in use
    assert [dict(one.settings) for one in short.close] == [{"ubatch_size": 256}]
    long = results(config, 400, *rates)
    assert dict(long.best(PROMPT).trial.settings) == {"ubatch_size": 256}
    assert not long.best(PROMPT).close
    # An answer alone is made token by token, however long its prompt.
    assert len(long.best("generation_tokens_per_second").close) == 1


def test_sizes_that_made_no_difference_are_not_written(config: ServerConfig) -> None:
    config = config.replace(batch_size=None, ubatch_size=None, threads=2)
    rates = (
        ({"ubatch_size": 256, "threads": 4}, 500.0),
        ({"ubatch_size": 1024, "threads": 4}, 100.0),
        ({"ubatch_size": 1024, "threads": 2}, 50.0),
    )
    best = results(config, 20, *rates).best(PROMPT)
    lines = best.env_lines()
    assert "THREADS=4" in lines
    assert "UBATCH_SIZE=" not in lines
    assert "# Without ubatch_size: no batch that the metric depends on was that large." in lines
    lines = results(config, 600, *rates).best(PROMPT).env_lines()
    assert "UBATCH_SIZE=256" in lines
    assert "#" not in lines


@pytest.mark.parametrize(
    ("grid", "prompts", "told"),
    [
        ({"ubatch_size": [256, 512]}, "word " * 100, "512 tokens or more"),
        ({"batch_size": [64, 4096]}, "word " * 50, "4096 tokens or more"),
        ({"ubatch_size": [16, 512]}, "word " * 50, ""),
        ({"ubatch_size": [512], "threads": [1, 2]}, "word", ""),
        ({"batch_size": [32], "ubatch_size": [64, 128]}, "word " * 200, ""),
    ],
)
def test_too_short_a_prompt_is_said_before_the_first_trial(
    config: ServerConfig, tmp_path: Path, grid: dict[str, list[int]], prompts: str, told: str
) -> None:
    with Sweep(grid=grid, prompts=prompts, config=config, store=tmp_path / "s.journal") as sweep:
        assert (told in " ".join(sweep.warnings)) if told else not sweep.warnings


def test_the_default_prompt_fills_the_batches_as_far_as_the_context_has_room(
    config: ServerConfig, engine: Path | None, tmp_path: Path
) -> None:
    # The smaller context has no room for a prompt that fills a batch.
    grid = {"ubatch_size": [32, 256], "context_size": [256, 1024]}
    base = config.replace(binary=engine, parallel=1)
    store = tmp_path / "s.journal"
    with Sweep(grid=grid, config=base, repeats=1, max_tokens=8, store=store) as sweep:
        assert not sweep.warnings
        rows = sweep.run().wait(120).rows
    assert {row.outcome for row in rows} == {Outcome.DONE}, rows
    for row in rows:
        assert row.measurement
        tokens, context = row.measurement.speeds[0].prompt_tokens, row.measurement.context
        assert context
        assert (256 <= tokens < 512) if context == 1024 else (32 < tokens <= 248)
