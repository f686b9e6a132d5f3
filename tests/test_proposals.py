from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution as Values
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution as Range

from kitty_nb import ServerConfig, write_demo_model
from kitty_nb.errors import ConfigError, ExperimentError
from kitty_nb.experiments.bounds import constraints_of
from kitty_nb.experiments.metrics import (
    Objective,
    metric_names,
    metrics_of,
    partial_metrics,
    read_objective,
)
from kitty_nb.experiments.study import Search, Space, read_space
from kitty_nb.experiments.trial import (
    LoadSeconds,
    Measurement,
    Outcome,
    RequestAnswered,
    RequestTimes,
    Speed,
    Trial,
    TrialResult,
    Workload,
)

NAMES = metric_names(Workload(parallel=(1, 4)))
RATE = read_objective("generation_tokens_per_second", NAMES)
SPACE: Space = {
    "threads": Values((1, 2, 4, 8)),
    "ubatch_size": Values((32, 64, 128, 256, 512)),
    "flash_attention": Values(("on", "off")),
    "cache_type_k": Values(("f16", "q8_0", "q4_0")),
}
COMBINATIONS = 4 * 5 * 2 * 3
MODEL = "m.gguf"


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


def search_of(base: ServerConfig, space: Space = SPACE, seed: int = 0, **more: Any) -> Search:
    given = {"objective": RATE, "bounds": (), "config": base, "seed": seed}
    return Search((MODEL,), space, **(given | more))


def searched(search: Search, budget: int, measure: Callable[[Trial], TrialResult]) -> Search:
    while len(search.rows) < budget and (trial := search.ask()):
        search.tell(measure(trial))
    return search


def known(base: ServerConfig, *rows: TrialResult, **more: Any) -> Search:
    search = search_of(base, {"threads": Values((1, 2))}, **more)
    search.resume(rows)
    return search


@pytest.mark.slow
def test_a_quarter_of_the_trials_finds_nearly_the_best(base: ServerConfig) -> None:
    shares = []
    for seed in range(5):
        search = search_of(base, seed=seed)
        searched(search, COMBINATIONS // 4, lambda trial: row(trial, rate_of(trial.settings)))
        rates = [metrics_of(one)["generation_tokens_per_second"] for one in search.rows]
        shares.append(max(rates) / 100)
    assert median(shares) >= 0.95, shares


def test_the_settings_in_use_come_first(base: ServerConfig) -> None:
    trial = search_of(base).ask()
    assert trial
    assert dict(trial.settings)["threads"] == 2


@pytest.mark.parametrize(
    "space",
    [
        {"threads": Range(1, 6)},
        {"threads": Range(1, 3), "ubatch_size": Values((32, 64))},
        {"threads": Values((1, 2, 4)), "cache_type_k": Values((None, "q8_0"))},
    ],
)
def test_everything_is_tried_once_and_then_the_best_is_measured_again(
    base: ServerConfig, space: Space
) -> None:
    def measure(trial: Trial) -> TrialResult:
        return row(trial, len(str(trial.settings)))

    search = searched(search_of(base, space), 30, measure)
    first = [one.trial.settings for one in search.rows if one.trial.repeat == 1]
    assert len(set(first)) == len(first) == 6
    assert len({one.trial for one in search.rows}) == len(search.rows) == 6 * 3
    assert search.ask() is None


def test_failures_are_avoided(base: ServerConfig) -> None:
    def measure(trial: Trial) -> TrialResult:
        threads: Any = dict(trial.settings)["threads"]
        failed = TrialResult(trial, Outcome.FAILED, "It crashed.")
        return failed if threads > 500 else row(trial, 1000 - abs(threads - 200))

    search = searched(search_of(base, {"threads": Range(1, 1000)}), 40, measure)
    late = [one.outcome for one in search.rows[20:]]
    assert late.count(Outcome.DONE) >= 15


def test_optuna_is_quiet_and_its_level_left_alone(
    base: ServerConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    searched(search_of(base), 8, lambda trial: row(trial, rate_of(trial.settings)))
    assert optuna.logging.get_verbosity() == logging.INFO
    assert not capfd.readouterr().err


def test_repeats_count_by_their_median_and_the_best_is_measured_again(base: ServerConfig) -> None:
    lucky, steady = (Trial(MODEL, (("threads", n),)) for n in (1, 2))
    search = known(base, row(lucky, 30.0), row(steady, 20.0))
    again = search.ask()
    assert again == replace(lucky, repeat=2)
    search.tell(row(again, 5.0))
    search.resume([row(replace(lucky, repeat=3), 5.0)])
    assert search.results.choose(RATE, ()).trial == steady
    assert search.ask() == replace(steady, repeat=2)


def test_what_breaks_a_constraint_does_not_win(base: ServerConfig) -> None:
    rows = (
        row(Trial(MODEL, (("threads", n),)), rate, memory)
        for n, rate, memory in ((1, 10.0, 1.0), (2, 99.0, 30.0))
    )
    search = known(base, *rows, bounds=constraints_of({"memory_gib": 20}))
    assert search.results.choose(RATE, search.bounds).value(RATE.name) == 10.0
    assert search.study.best_value == 10.0
    assert search.study.best_trial.params == {"threads": 1}


def test_rows_that_are_no_part_of_the_search_do_not_count(base: ServerConfig) -> None:
    pruned = TrialResult(
        Trial(MODEL, (("threads", 1),)), Outcome.PRUNED, "Pruned: its load_seconds was 9"
    )
    search = known(
        base,
        pruned,
        row(Trial(MODEL, (("threads", 3),)), 1.0),
        row(Trial("other.gguf", (("threads", 1),)), 1.0),
        row(Trial(MODEL), 1.0),
    )
    assert not search.rows
    search.resume([replace(pruned, reason=f"Pruned: its {RATE.name} was 1")])
    assert len(search.rows) == 1


def test_less_is_better_by_name_and_by_a_minus_sign() -> None:
    assert read_objective("time_to_first_token", NAMES).smaller
    assert read_objective("-quality", NAMES).smaller
    assert not read_objective("total_tokens_per_second_4", NAMES).smaller
    with pytest.raises(ExperimentError, match="Did you mean time_to_first_token"):
        read_objective("-time_to_frist_token", NAMES)


def test_a_function_that_fails_is_named() -> None:
    objective = Objective("broken", smaller=False, function=lambda _: 1 / 0)
    with pytest.raises(ExperimentError, match="ZeroDivisionError"):
        objective.of(row(Trial("m"), 1.0))


@pytest.mark.parametrize(
    ("objective", "sofar", "behind"),
    [
        (RATE, 89.0, True),
        (RATE, 91.0, False),
        (read_objective("-generation_tokens_per_second", NAMES), 111.0, True),
        (read_objective("-generation_tokens_per_second", NAMES), 109.0, False),
    ],
)
def test_clearly_behind_is_more_than_a_tenth(
    base: ServerConfig, objective: Objective, sofar: float, behind: bool
) -> None:
    def pruned(rates: list[float], *, earlier: bool = False) -> str:
        search = search_of(base, {"threads": Range(1, 9)}, objective=objective)
        rows = (row(Trial(MODEL, (("threads", n),)), r) for n, r in enumerate(rates, 1))
        (search.resume if earlier else lambda each: [*map(search.tell, each)])(rows)
        return search.prune_reason(sofar)

    assert bool(pruned([90.0, 100.0, 100.0, 300.0])) == behind
    assert not pruned([90.0, 100.0, 100.0, 300.0], earlier=True)  # the machine may be slower today
    assert not pruned([100.0] * 3)


def test_answers_tell_of_the_number_that_they_make_up() -> None:
    event = RequestAnswered(Trial("m"), 1, 8, 4, 50.0, RequestTimes(0.0, 0.2, 0.6, 21, 100))
    assert partial_metrics(event, least=1)["generation_tokens_per_second_4"] == pytest.approx(50)
    assert partial_metrics(event, least=4)["prompt_tokens_per_second"] == pytest.approx(500)
    assert partial_metrics(event, least=4)["time_to_first_token"] == 0.2
    assert not partial_metrics(replace(event, done=8), least=1)  # nothing is spared any more


Read = Callable[..., Space]


@pytest.fixture
def read(base: ServerConfig) -> Read:
    def do(space: Any, constraints: Any = None, config: ServerConfig = base) -> Space:
        return read_space(["m.gguf"], config, space, constraints_of(constraints), NAMES)[1]

    return do


def test_lists_ranges_and_single_values(read: Read) -> None:
    space = read({"threads": [4, 1, 2], "batch_size": (64, 2048), "cache_type_k": "q8_0"})
    assert space == {
        "threads": Values((4, 1, 2)),
        "batch_size": Range(64, 2048, log=True),
        "cache_type_k": Values(("q8_0",)),
    }
    assert read({"temperature": (0.0, 1.0)}) == {"temperature": FloatDistribution(0.0, 1.0)}


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
        ({"threads": []}, None, ExperimentError, "no value of threads. Give other values"),
        ({"threads": (8, 1)}, None, ExperimentError, "no value of threads. Give other values"),
        ({"threads": [0]}, None, ConfigError, "THREADS|threads"),
        ({"port": [1, 2]}, None, ConfigError, "the space"),
        ({"threads": [1, 2]}, {"threads>": 2}, ExperimentError, "no value of threads that"),
        (
            {"threads": (1, 2)},
            {"threads>": "two"},
            ExperimentError,
            "no value of threads that",
        ),
        ({"threads": [1]}, {"memory_gb": 2}, ExperimentError, "Did you mean memory_gib"),
        (
            {"threads": [1]},
            {"context_size>": 512},
            ExperimentError,
            "no value of context_size",
        ),
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
    (name,), space = read_space([], config, None, (), NAMES)
    assert name == "demo.gguf"
    threads = space["threads"]
    assert isinstance(threads, Values)
    assert 1 in threads.choices
    assert {"threads", "flash_attention"} <= space.keys()
    assert "batch_size" not in space
