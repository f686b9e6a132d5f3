"""How good answers are, with intervals, and how far a model is from its reference."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from threading import Event, Thread
from typing import Any

import anyio
import pytest

from kitty_nb import ServerConfig, Supervisor
from kitty_nb.client import Access
from kitty_nb.errors import ConfigError, ExperimentError
from kitty_nb.experiments import (
    Divergence,
    ExactMatch,
    Outcome,
    Perplexity,
    Results,
    Sweep,
    Workload,
)
from kitty_nb.experiments import measure as trials
from kitty_nb.experiments.likelihood import likeness, perplexity_of
from kitty_nb.experiments.quality import judge
from kitty_nb.isolated_server import isolated_server

WAIT = 120.0
SHORT = "I am a cat."
PROMPT, TEXT = "Who are you?", "Hello! I am the kitty, and not the cat."


@pytest.fixture
def measure(config: ServerConfig, tmp_path: Path) -> Iterator[Callable[..., Results]]:
    """Runs a sweep."""
    made: list[Sweep] = []

    def run(**more: Any) -> Results:
        given: dict[str, Any] = {"prompts": [PROMPT], "max_tokens": 4, "repeats": 1, "chat": False}
        given |= {"config": config, "store": tmp_path / f"{len(made)}.journal", "busy_repeats": 0}
        made.append(Sweep(**(given | more)))
        return made[-1].run().wait(WAIT)

    yield run
    for one in made:
        one.close()


def test_a_model_does_not_diverge_from_itself(
    measure: Callable[..., Results], demo_model: Path
) -> None:
    results = measure(quality=Divergence(demo_model.name, {PROMPT: TEXT}))
    (row,) = results.frame.to_dict("records")
    assert row["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert row["top_token_agreement"] == 1
    assert row["top_token_agreement_ci_low"] < 1
    assert row["kl_divergence_ci_high"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_divergence_is_that_over_the_whole_vocabulary(
    measure: Callable[..., Results], real_config: ServerConfig
) -> None:
    base = real_config.replace(flash_attention="on", threads=1, context_size=512)
    coarse = {"cache_type_k": "q4_0", "cache_type_v": "q4_0"}
    divergence = Divergence(str(real_config.model), {PROMPT: SHORT})
    results = measure(config=base, configs=[coarse], quality=divergence)
    (row,) = results.frame.to_dict("records")
    flags = ("--cache-type-k", "q4_0", "--cache-type-v", "q4_0")
    plain, other = (anyio.run(_expected, one) for one in (base, base.replace(extra_args=flags)))
    each = [
        sum(math.exp(p) * (p - q[token]) for token, p in one.items() if token in q)
        for one, q in zip(plain, other, strict=True)
    ]
    assert row["kl_divergence"] == pytest.approx(sum(each) / len(each), rel=0.04)
    tops = [[max(one, key=one.__getitem__) for one in model] for model in (plain, other)]
    assert row["top_token_agreement"] == fmean(map(operator.eq, *tops))
    assert 0 < row["kl_divergence"] < row["kl_divergence_ci_high"]
    # Under other settings, the reference expects something else.
    same = measure(config=base.replace(extra_args=flags), quality=divergence).frame.iloc[0]
    assert same["kl_divergence"] == pytest.approx(0, abs=1e-6)


def test_trials_at_once_share_one_run_of_the_reference(
    config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def counted(config: ServerConfig, *more: Any, **named: Any) -> Any:
        started.append(config.profile)
        return isolated_server(config, *more, **named)

    monkeypatch.setattr(trials, "isolated_server", counted)
    quality = Divergence(str(config.model), {PROMPT: "Once."})
    given: dict[str, Any] = {"prompts": [PROMPT], "max_tokens": 2, "repeats": 2, "chat": False}
    with Sweep(**given, config=config, quality=quality, store=tmp_path / "two.journal") as sweep:
        rows = sweep.run(slots=2).wait(WAIT).rows
    assert [row.outcome for row in rows] == [Outcome.DONE] * 2, rows
    assert len(started) == 3
    assert started.count("reference") == 1


def test_a_reference_may_be_replaced_by_that_of_a_sweep_on_another_thread(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ({1: 0.0},)

    class Replaced(dict[object, Any]):
        """One that is emptied after each look."""

        def __contains__(self, _: object) -> bool:
            return True

        def get(self, *_: object) -> Any:
            return known

    monkeypatch.setattr(trials, "_references", Replaced())
    workload = Workload((PROMPT,), quality=Divergence(str(config.model), {PROMPT: "Once."}))
    assert anyio.run(trials._reference_of, workload, config) == known


def test_what_one_of_two_lists_alone_counts_as_one() -> None:
    first = {1: math.log(0.5), 2: math.log(0.3), 3: math.log(0.1)}
    second = {1: math.log(0.25), 2: math.log(0.3), 4: math.log(0.2)}
    found = likeness([first, first], [first, second])
    apart = 0.5 * math.log(2) + 0.2 * math.log(0.2 / 0.45)
    assert found.kl_divergence == pytest.approx(apart / 2)
    assert (found.agreed, found.tokens) == (1, 2)
    with pytest.raises(ExperimentError, match="their tokenizers differ"):
        likeness([first], [first, second])


async def _expected(config: ServerConfig) -> list[dict[int, float]]:
    """Ask for the distribution of each next token of the text over the whole vocabulary."""
    async with Supervisor(config) as supervisor:
        state = await supervisor.start()
        async with Access(state.endpoint, supervisor.api_key).async_http() as http:

            async def post(path: str, **body: object) -> Any:
                return (await http.post(path, json=body)).json()

            before = (await post("/tokenize", content=PROMPT, add_special=True))["tokens"]
            whole = (await post("/tokenize", content=PROMPT + SHORT, add_special=True))["tokens"]
            found = []
            for end in range(len(before), len(whole)):
                request = {"prompt": whole[:end], "n_predict": 1, "n_probs": 50_000}
                told = await post("/completion", **request, temperature=0)
                tops = told["completion_probabilities"][0]["top_logprobs"]
                found.append({one["id"]: one["logprob"] for one in tops})
    return found


def test_a_share_of_right_answers_has_wilsons_interval(measure: Callable[..., Results]) -> None:
    prompts = ["One?", "Two?", "Three?"]
    answers = measure(prompts=prompts, quality=lambda prompt, _: float(prompt != "Two?"))
    (row,) = answers.frame.to_dict("records")
    assert row["quality"] == pytest.approx(2 / 3)
    # https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval, with z = 1.96
    assert row["quality_ci_low"] == pytest.approx(0.2077, abs=1e-3)
    assert row["quality_ci_high"] == pytest.approx(0.9385, abs=1e-3)
    none = measure(quality=ExactMatch({PROMPT: "no such answer"})).frame.to_dict("records")[0]
    assert none["quality"] == 0
    assert 0.5 < none["quality_ci_high"] < 1


def test_a_mean_of_scores_and_a_perplexity_have_intervals(measure: Callable[..., Results]) -> None:
    prompts = ["a", "bb", "ccc", "dddd"]
    row = measure(prompts=prompts, quality=lambda prompt, _: len(prompt)).frame.iloc[0]
    assert row["quality"] == 2.5
    assert row["quality_ci_low"] < 2.5 < row["quality_ci_high"]
    row = measure(quality=Perplexity({PROMPT: TEXT})).frame.iloc[0]
    assert row["perplexity_ci_low"] <= row["perplexity"] <= row["perplexity_ci_high"]
    value, ends = perplexity_of([-1.0, -2.0, -3.0])
    assert value == pytest.approx(math.exp(2))
    assert ends == pytest.approx(
        [math.exp(2 + 1.96 * sign / math.sqrt(3)) for sign in (-1, 1)], 1e-3
    )


def test_a_quality_that_is_no_number_or_exits_is_told_in_the_row(
    measure: Callable[..., Results],
) -> None:
    for quality, told in (
        (lambda *_: math.nan, "quality returned [nan]. It must return a finite number"),
        (lambda *_: sys.exit(3), "quality failed with SystemExit(3)"),
    ):
        (row,) = measure(quality=quality).rows
        assert told in row.reason
        assert row.measurement
        assert row.measurement.quality is None


@pytest.mark.parametrize("score", [1e308, 1e200])  # whose sum or variance is infinite
def test_scores_too_large_for_a_mean_are_told(score: float) -> None:
    async def ask() -> None:
        with anyio.fail_after(WAIT):
            found, problem = await judge(lambda *_: score, ["Hi!"] * 4, [""] * 4)
        assert not found
        assert "It must return a finite number" in problem

    anyio.run(ask)


def test_without_scipy_a_quality_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        with anyio.fail_after(WAIT), pytest.raises(ExperimentError, match="pip install"):
            await judge(lambda *_: 1.0, ["Hi!"], [""])

    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    anyio.run(ask)


def test_a_quality_that_never_returns_can_be_cancelled(
    config: ServerConfig, tmp_path: Path
) -> None:
    asked, ended = Event(), Event()

    def judge(*_: str) -> float:
        asked.set()
        ended.wait()
        return math.nan  # of which nobody computes an interval

    given: dict[str, Any] = {"prompts": [PROMPT], "max_tokens": 4, "quality": judge}
    with Sweep(**given, config=config, store=tmp_path / "endless.journal") as sweep:
        sweep.run()
        assert asked.wait(WAIT)
        closing = Thread(target=sweep.close, daemon=True)
        closing.start()
        closing.join(WAIT)
        closed = not closing.is_alive()
        ended.set()
    assert closed


def test_a_reference_that_is_not_there_is_a_row(measure: Callable[..., Results]) -> None:
    (row,) = measure(quality=Divergence("missing.gguf", {PROMPT: TEXT})).rows
    assert row.outcome is Outcome.FAILED
    assert "missing.gguf" in row.reason
    with pytest.raises(ConfigError, match=r"quality=.Another\?.: Divergence has a text for none"):
        measure(quality=Divergence("missing.gguf", {"Another?": TEXT}))
