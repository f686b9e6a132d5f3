from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitty_nb import ServerConfig
from kitty_nb.engine.locate import Dialect, locate_engine, parse_help
from kitty_nb.errors import ConfigError, ExperimentError
from kitty_nb.experiments.space import changes, combine, digest, in_order
from kitty_nb.experiments.space import check_flags as check_settings
from kitty_nb.experiments.trial import Trial, Workload


@pytest.fixture(scope="module")
def base() -> ServerConfig:
    return ServerConfig(models_dir="/models", threads=2)


@pytest.fixture(scope="module")
def dialect() -> Dialect:
    return anyio.run(locate_engine).dialect


def check_flags(trials: Iterable[Trial], dialect: Dialect) -> None:
    check_settings((one for trial in trials for one in trial.settings), dialect)


def chosen(trials: tuple[Trial, ...]) -> list[dict[str, object]]:
    return [dict(trial.settings) for trial in trials]


def test_every_combination_is_there_once(base: ServerConfig) -> None:
    grid = {"context_size": [512, 1024], "threads": [1, 2, 2]}
    trials = combine(base, ["a.gguf", Path("/models/b.gguf"), "/elsewhere/c.gguf"], grid)
    assert len(trials) == 3 * 2 * 2
    assert {trial.model for trial in trials} == {"a.gguf", "b.gguf", "/elsewhere/c.gguf"}
    assert trials[0].settings == (("context_size", 512), ("threads", 1))


def test_configs_are_combined_with_the_grid(base: ServerConfig) -> None:
    configs = [base.replace(threads=8), {"parallel": 2, "model": "b.gguf"}, {}]
    trials = combine(base, ["a.gguf"], {"batch_size": range(1, 3)}, configs)
    assert [(trial.model, dict(trial.settings)) for trial in trials] == [
        ("a.gguf", {"threads": 8, "batch_size": 1}),
        ("a.gguf", {"threads": 8, "batch_size": 2}),
        ("b.gguf", {"parallel": 2, "batch_size": 1}),
        ("b.gguf", {"parallel": 2, "batch_size": 2}),
        ("a.gguf", {"batch_size": 1}),
        ("a.gguf", {"batch_size": 2}),
    ]


def test_skip_leaves_combinations_out(base: ServerConfig) -> None:
    grid = {"context_size": [512, 1024], "threads": [1, 2]}
    trials = combine(
        base, ["a.gguf"], grid, skip=lambda one: one["context_size"] * one["threads"] > 1000
    )
    assert chosen(trials) == [{"context_size": 512, "threads": 1}]
    with pytest.raises(ExperimentError, match="skip excludes all"):
        combine(base, ["a.gguf"], grid, skip=lambda _: True)
    with pytest.raises(ExperimentError, match="KeyError"):
        combine(base, ["a.gguf"], grid, skip=lambda one: one["contxt"])


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"contxt_size": [1]}, "Did you mean context_size?"),
        ({"thread": [1]}, "Did you mean threads?"),
        ({"port": [8000]}, "The sweep sets it itself"),
        ({"model": ["a.gguf"]}, "Name models in their own argument"),
        ({"n_predict": [1]}, "max_tokens"),
        ({"cache type": [1]}, "the name of a setting"),
        ({"threads": "12"}, "one value, not a list"),
        ({"threads": 12}, "threads=\\[…\\]"),
        ({"threads": [object()]}, "can't be the value"),
        ({"threads": [0]}, "1 or more"),
        ({"flash_attention": ["maybe"]}, "on, off or auto"),
    ],
)
def test_wrong_names_and_values_are_told(
    base: ServerConfig, grid: dict[str, list[object]], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        combine(base, ["a.gguf"], grid)


@pytest.mark.parametrize(
    "tried",
    [
        {"grid": {"hf_token": ["hush"]}},
        {"grid": {"api-key": "hush"}},
        {"grid": {"extra_args": [["--hf-token", "hush"]]}},
        {"configs": [{"extra_args": ["--metrics", "-hft", "hush"]}]},
        {"configs": [ServerConfig(models_dir="/models", extra_args="--hf_token hush")]},
    ],
)
def test_a_secret_is_not_tried_for_results_show_what_is(
    base: ServerConfig, tried: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="a secret") as refused:
        combine(base, ["a.gguf"], **tried)
    assert "hush" not in str(refused.value)


def test_everything_wrong_is_told_at_once(base: ServerConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        combine(base, ["a.gguf"], {"threads": [-1, 0], "batch_size": [0, 1]})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"grid": {"threads": []}}, "no values are given for threads"),
        ({"configs": []}, "configs is empty"),
        ({"models": []}, "No model is chosen"),
    ],
)
def test_nothing_to_try_is_an_error(base: ServerConfig, more: dict[str, object], told: str) -> None:
    with pytest.raises(ExperimentError, match=told):
        combine(base, **({"models": ["a.gguf"]} | more))


def test_names_without_a_field_are_flags_of_the_engine(
    base: ServerConfig, dialect: Dialect
) -> None:
    base = base.replace(extra_args=("--metrics",))
    grid = {
        "cache_type_k": ["q8_0"],
        "mlock": [True],
        "kv_unified": [False],
        "swa_full": [False],
        "keep": [None],
        "threads": [3],
    }
    (trial,) = combine(base, ["a.gguf"], grid)
    check_flags([trial], dialect)
    assert changes(trial, base, dialect) == {
        "model": "a.gguf",
        "threads": 3,
        "extra_args": ("--metrics", "--cache-type-k", "q8_0", "--mlock", "--no-kv-unified"),
    }


def test_flags_are_checked_against_the_engine(base: ServerConfig, dialect: Dialect) -> None:
    trials = combine(base, ["a.gguf"], {"cache_typ_k": ["f16"], "cache_type_v": ["f16", "q9"]})
    with pytest.raises(ConfigError) as caught:
        check_flags(trials, dialect)
    unknown, refused = caught.value.problems
    assert "cache_type_k" in unknown.fix
    assert refused.value == "q9"
    assert "q8_0" in refused.fix


def test_every_flag_of_the_help_can_be_tried(base: ServerConfig, engine: Path | None) -> None:
    dialect = anyio.run(locate_engine, engine).dialect
    names = {
        flag.removeprefix("--").replace("-", "_")
        for option in dialect.options
        for flag in option.flags
        if flag.startswith("--")
    }
    assert {"top_k", "context_shift", "gpu_layers", "flash_attn"} <= names
    decided = {"temp", "temperature", "seed", "predict", "n_predict", "ignore_eos", "cache_prompt"}
    decided |= {"no_cache_prompt", "model", "host", "port", "alias", "api_key", "model_url"}
    decided |= {"hf_token", "mcp_servers_json"}  # secrets
    for name in names - set(ServerConfig.model_fields) - decided:
        check_flags(combine(base, ["a.gguf"], {name: [None]}), dialect)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"temp": [0.0, 1.0]}, "Write temperature instead"),
        ({"repeat-penalty": [1.1]}, r"Did you mean repeat_penalty\?"),
        ({"seed": [1, 2]}, "Write seed=… as an argument"),
        ({"predict": [9]}, "Write max_tokens=… as an argument"),
        ({"no_cache_prompt": [True]}, "prompts always start from scratch"),
        ({"extra_args": [("--mlock", "--seed", "7")]}, "Write seed=… as an argument"),
        ({"ctk": ["q8_0"]}, r"Did you mean cache_type_k\?"),
        ({"fa": ["on"]}, r"Did you mean flash_attn\?"),
        ({"np": [2]}, r"Did you mean parallel\?"),
        ({"cache_typ_k": ["q8_0"]}, r"Did you mean cache_type_k\?"),
        ({"batchsize": [64]}, r"Did you mean batch_size\?"),
    ],
)
def test_what_a_trial_cannot_decide_is_refused_with_where_to_say_it(
    base: ServerConfig, engine: Path | None, grid: dict[str, list[object]], told: str
) -> None:
    dialect = anyio.run(locate_engine, engine).dialect
    with pytest.raises(ConfigError, match=told):
        check_flags(combine(base, ["a.gguf"], grid), dialect)


def test_a_build_without_the_flag_refuses_it(base: ServerConfig) -> None:
    trials = combine(base, ["a.gguf"], {"cache_type_k": ["f16"]})
    with pytest.raises(ConfigError, match="cache_type_k"):
        check_flags(trials, parse_help("-m,    --model FNAME    model path\n"))


@settings(deadline=None)  # a busy machine stops for longer than any of this takes
@given(combinations=st.integers(1, 12), repeats=st.integers(1, 5), seed=st.integers(0, 99))
def test_repeats_are_interleaved(combinations: int, repeats: int, seed: int) -> None:
    tried = [Trial("a.gguf", (("threads", n),)) for n in range(1, combinations + 1)]
    trials = in_order(tried, repeats, seed)
    assert trials == in_order(tried, repeats, seed)
    rounds = [trials[n : n + combinations] for n in range(0, len(trials), combinations)]
    assert [{trial.repeat for trial in one} for one in rounds] == [
        {n} for n in range(1, repeats + 1)
    ]
    assert Counter(trial.combination for trial in trials) == dict.fromkeys(tried, repeats)


def test_every_round_is_shuffled_its_own_way() -> None:
    tried = [Trial("a.gguf", (("threads", n),)) for n in range(1, 30)]
    first, second = in_order(tried, 1, 0), in_order(tried, 1, 1)
    assert first != second
    one, other = (in_order(tried, 2, 0)[n : n + 29] for n in (0, 29))
    assert [trial.settings for trial in one] != [trial.settings for trial in other]


def test_the_key_names_a_trial_in_every_process() -> None:
    pairs = [("threads", 2), ("cache_type_k", "q8_0"), ("extra_args", ("--mlock",))]
    trial = Trial("a.gguf", tuple(pairs), 2)
    random.Random(1).shuffle(pairs)
    assert Trial("a.gguf", tuple(pairs), 2).key == trial.key
    others = {
        Trial("a.gguf", tuple(pairs), 1).key,
        Trial("b.gguf", tuple(pairs), 2).key,
        Trial("a.gguf", tuple(pairs[1:]), 2).key,
    }
    assert trial.key not in others
    code = f"from kitty_nb.experiments import Trial; print({trial!r}.key)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == trial.key


def test_rows_of_earlier_versions_stay_valid() -> None:
    """The digest by which a store finds its rows is that of the version that wrote them."""
    config = ServerConfig(model=None)
    assert digest(config, Workload(("Hi",), 8)) == "3febc7dfc0d1dc669581dbb9"
    assert digest(config.replace(rpc_hosts="red"), Workload(("Hi",), 8)) != digest(
        config, Workload(("Hi",), 8)
    )
