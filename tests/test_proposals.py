from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import pytest

from kitty_nb import ServerConfig, write_demo_model
from kitty_nb.errors import ConfigError, ExperimentError
from kitty_nb.experiments.metrics import constraints_of, metric_names
from kitty_nb.experiments.objective import Objective, glimpses, read_objective, why_behind
from kitty_nb.experiments.propose import make_study, propose
from kitty_nb.experiments.space import Range, Space, Values, read_space
from kitty_nb.experiments.standing import Standing
from kitty_nb.experiments.trial import (
    LoadSeconds,
    Measurement,
    Outcome,
    RequestAnswered,
    Speed,
    Trial,
    TrialResult,
)

NAMES = metric_names((1, 4))
RATE = read_objective("generation_tokens_per_second", NAMES)
SPACE: Space = {
    "threads": Values((1, 2, 4, 8)),
    "ubatch_size": Values((32, 64, 128, 256, 512)),
    "flash_attention": Values(("on", "off")),
    "cache_type_k": Values(("f16", "q8_0", "q4_0")),
}
COMBINATIONS = 4 * 5 * 2 * 3


@pytest.fixture(scope="module")
def base() -> ServerConfig:
    return ServerConfig(models_dir="/models", threads=2)


def row(trial: Trial, rate: float, memory_gib: float = 1.0) -> TrialResult:
    speed = Speed(1, 1, 1.0, 1 / rate, rate, rate, rate)
    measured = Measurement(LoadSeconds(0.1, 0.1, 0.1), (speed,), int(memory_gib * (1 << 30)))
    return TrialResult(trial, Outcome.DONE, measurement=measured)


def rate_of(settings: tuple[tuple[str, Any], ...]) -> float:
    """A landscape as engines have it: each setting has its best value, and they multiply."""
    given = dict(settings)
    speed = {1: 0.5, 2: 0.8, 4: 1.0, 8: 0.7}[given["threads"]]
    speed *= {32: 0.5, 64: 0.7, 128: 0.9, 256: 1.0, 512: 0.85}[given["ubatch_size"]]
    speed *= {"on": 1.0, "off": 0.8}[given["flash_attention"]]
    return 100 * speed * {"f16": 0.9, "q8_0": 1.0, "q4_0": 0.8}[given["cache_type_k"]]


def searched(
    base: ServerConfig,
    budget: int,
    seed: int,
    rows: tuple[TrialResult, ...] = (),
    space: Space = SPACE,
    rate: Callable[[tuple[tuple[str, Any], ...]], float] = rate_of,
) -> Any:
    while len(rows) < budget:
        known = Standing(rows, base, RATE, ()).known
        settings = propose(space, known, {"threads": 2}, smaller=False, seed=seed)
        if settings is None:
            break
        rows += (row(Trial("m.gguf", settings), rate(settings)),)
    return rows


def test_a_quarter_of_the_trials_finds_nearly_the_best(base: ServerConfig) -> None:
    shares = []
    for seed in range(12):
        known = Standing(searched(base, COMBINATIONS // 4, seed), base, RATE, ()).known
        shares.append(max(one.value or 0 for one in known) / 100)
    assert median(shares) >= 0.95, shares


def test_proposals_depend_on_rows_and_seed_alone(base: ServerConfig) -> None:
    whole = searched(base, 12, seed=3)
    assert searched(base, 12, seed=3) == whole
    assert searched(base, 12, seed=3, rows=whole[:5]) == whole
    assert searched(base, 12, seed=4) != whole
    assert dict(whole[0].trial.settings)["threads"] == 2  # the settings in use come first


def test_nothing_is_proposed_twice_and_everything_once(base: ServerConfig) -> None:
    rows = searched(base, 1000, seed=0)
    assert len({one.trial for one in rows}) == len(rows) == COMBINATIONS


@pytest.mark.parametrize(
    "space",
    [
        {"threads": Range(1, 6)},
        {"threads": Range(1, 3), "ubatch_size": Values((32, 64))},
        {"threads": Values((1, 2, 4)), "cache_type_k": Values((None, "q8_0"))},
    ],
)
def test_a_small_range_is_tried_whole_and_nothing_is_a_value(
    base: ServerConfig, space: Space
) -> None:
    rows = searched(base, 20, 3, space=space, rate=lambda settings: len(str(settings)))
    assert len({one.trial.settings for one in rows}) == len(rows) == 6


def test_failures_are_avoided(base: ServerConfig) -> None:
    space: Space = {"threads": Range(1, 1000)}
    rows: tuple[TrialResult, ...] = ()
    for _ in range(40):
        settings = propose(space, Standing(rows, base, RATE, ()).known, {}, smaller=False, seed=0)
        assert settings
        trial = Trial("m.gguf", settings)
        threads: Any = dict(settings)["threads"]
        failed = TrialResult(trial, Outcome.FAILED, "It crashed.")
        rows += (failed if threads > 500 else row(trial, 1000 - abs(threads - 200)),)
    late = [one.outcome for one in rows[20:]]
    assert late.count(Outcome.DONE) >= 15


def test_optuna_is_quiet_and_its_level_left_alone(
    base: ServerConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    make_study(SPACE, Standing(searched(base, 8, 0), base, RATE, ()).known, smaller=False)
    assert optuna.logging.get_verbosity() == logging.INFO
    assert not capfd.readouterr().err


def test_repeats_count_by_their_median_and_the_best_is_measured_again(base: ServerConfig) -> None:
    lucky, steady = (Trial("m.gguf", (("threads", n),)) for n in (1, 2))
    rows = (row(lucky, 30.0), row(steady, 20.0))
    assert Standing(rows, base, RATE, ()).unsure == replace(lucky, repeat=2)
    rows += (row(replace(lucky, repeat=2), 5.0), row(replace(lucky, repeat=3), 5.0))
    standing = Standing(rows, base, RATE, ())
    assert standing.best
    assert standing.best[0].trial == steady
    assert standing.unsure == replace(steady, repeat=2)


def test_what_breaks_a_constraint_is_no_peer(base: ServerConfig) -> None:
    rows = tuple(
        row(Trial("m.gguf", (("threads", n),)), rate, memory)
        for n, rate, memory in ((1, 10.0, 1.0), (2, 99.0, 30.0))
    )
    bounds = constraints_of({"memory_gib": 20})
    standing = Standing(rows, base, RATE, bounds)
    assert standing.best
    assert standing.best[1].median == 10.0
    assert len(standing.peers) == 1
    study = make_study({"threads": Values((1, 2))}, standing.known, smaller=False)
    assert study.best_value == 10.0
    assert study.best_trial.user_attrs == {"threads": 1}


def test_less_is_better_by_name_and_by_a_minus_sign() -> None:
    assert read_objective("time_to_first_token", NAMES).smaller
    assert read_objective("-quality", NAMES).smaller
    assert not read_objective("total_tokens_per_second_4", NAMES).smaller
    with pytest.raises(ExperimentError, match="Did you mean time_to_first_token"):
        read_objective("-time_to_frist_token", NAMES)


def test_a_function_that_fails_is_named(base: ServerConfig) -> None:
    objective = Objective("broken", smaller=False, function=lambda _: 1 / 0)
    with pytest.raises(ExperimentError, match="ZeroDivisionError"):
        assert Standing((row(Trial("m"), 1.0),), base, objective, ()).known


@pytest.mark.parametrize(
    ("smaller", "sofar", "behind"),
    [(False, 89.0, True), (False, 91.0, False), (True, 111.0, True), (True, 109.0, False)],
)
def test_clearly_behind_is_more_than_a_tenth(smaller: bool, sofar: float, behind: bool) -> None:
    objective = Objective("load_seconds", smaller)
    assert bool(why_behind(objective, sofar, [90.0, 100.0, 100.0, 300.0])) == behind
    assert not why_behind(objective, sofar, [100.0] * 3)


def test_answers_tell_of_the_number_that_they_make_up() -> None:
    event = RequestAnswered(Trial("m"), 1, 8, 4, 50.0, 500.0, 0.2)
    assert dict(glimpses(event, least=1))["generation_tokens_per_second_4"] == 50.0
    assert dict(glimpses(event, least=4))["time_to_first_token"] == 0.2
    assert not dict(glimpses(replace(event, done=8), least=1))  # nothing is spared any more


Read = Callable[..., Space]


@pytest.fixture
def read(base: ServerConfig) -> Read:
    def do(space: Any, constraints: Any = None, config: ServerConfig = base) -> Space:
        return read_space("m.gguf", config, space, constraints_of(constraints), NAMES)[1]

    return do


def test_lists_ranges_and_single_values(read: Read) -> None:
    space = read({"threads": [4, 1, 2], "batch_size": (64, 2048), "cache_type_k": "q8_0"})
    assert space == {
        "threads": Values((1, 2, 4)),
        "batch_size": Range(64, 2048),
        "cache_type_k": Values(("q8_0",)),
    }
    assert read({"temperature": (0.0, 1.0)}) == {"temperature": Range(0.0, 1.0)}


@pytest.mark.parametrize(
    ("sign", "bound", "left"),
    [
        ("", 4, Range(2, 4)),
        ("<", 4, Range(2, 3)),
        (">=", 3.5, Range(4, 8)),
        (">", 4, Range(5, 8)),
        ("==", 5, Range(5, 5)),
    ],
)
def test_bounds_cut_ranges(read: Read, sign: str, bound: float, left: Range) -> None:
    assert read({"threads": (2, 8)}, {f"threads{sign}": bound}) == {"threads": left}


def test_bounds_cut_lists_and_fix_what_is_left_open(read: Read, base: ServerConfig) -> None:
    bounds = {"context_size>=": 16384, "threads<": 4, "memory_gib": 20}
    wanted = {"threads": Values((1, 2)), "context_size": Values((16384,))}
    assert read({"threads": [1, 2, 4]}, bounds) == wanted
    kept = base.replace(context_size=32768)
    assert read({"threads": [1, 2, 4]}, bounds, kept) == {"threads": Values((1, 2))}


@pytest.mark.parametrize(
    ("space", "constraints", "error", "words"),
    [
        ({}, None, ExperimentError, "space is empty"),
        ({"threads": []}, None, ConfigError, "threads"),
        ({"threads": (8, 1)}, None, ConfigError, "threads"),
        ({"threads": [0]}, None, ConfigError, "THREADS|threads"),
        ({"port": [1, 2]}, None, ConfigError, "the space"),
        ({"threads": [1, 2]}, {"threads>": 2}, ExperimentError, "no threads that keeps"),
        ({"threads": (1, 2)}, {"threads>": "two"}, ExperimentError, "no threads that keeps"),
        ({"threads": [1]}, {"memory_gb": 2}, ExperimentError, "nothing that is chosen or measured"),
        ({"threads": [1]}, {"context_size>": 512}, ExperimentError, "context_size is not set"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    read: Read, space: Any, constraints: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        read(space, constraints)


def test_the_usual_space_has_the_threads_of_this_machine(tmp_path: Path) -> None:
    model = write_demo_model(tmp_path / "demo.gguf")
    config = ServerConfig(models_dir=tmp_path, model=model)
    name, space = read_space(None, config, None, (), NAMES)
    assert name == "demo.gguf"
    assert 1 in space["threads"]
    assert {"threads", "flash_attention"} <= space.keys()
    assert "batch_size" not in space
