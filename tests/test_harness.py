"""Tasks of lm-evaluation-harness on a server, against the same questions asked by hand."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import anyio
import pytest

from kitty_nb import ServerConfig, Supervisor
from kitty_nb.client import Access
from kitty_nb.errors import ConfigError, ExperimentError
from kitty_nb.experiments import (
    HarnessTask,
    Sweep,
    Workload,
    proportion_interval,
)

Ask = Callable[..., Awaitable[Any]]
QUESTIONS = (
    {"country": "France", "cities": ["Paris", "Rome"]},
    {"country": "Italy", "cities": ["Naples", "Rome"]},
    {"country": "Spain", "cities": ["Madrid", "Lima"]},
    {"country": "Germany", "cities": ["Berlin", "Oslo"]},
    {"country": "Nowhere", "cities": ["Atlantis", "Utopia"]},
)
LIMIT = 4
SHOTS = "Japan: Tokyo\nEgypt: Cairo\nGreece: Athens\n"
DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{cities}}"
doc_to_target: 0
"""
METRIC = "metric_list: [{{metric: {0}, aggregation: {1}, higher_is_better: {2}}}]\n"
TASKS = {
    "choice": CHOICE,
    "margin": CHOICE
    + "process_results: !function margin.margin\n"
    + METRIC.format("margin", "mean", "true"),
    "surprise": CHOICE + METRIC.format("brier_score", "brier_score", "false"),
    "written": f"""
output_type: generate_until
doc_to_text: {json.dumps(SHOTS + "{{country}}:")}
doc_to_target: "{{{{cities[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
filter_list: [{{name: bare, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
{METRIC.format("exact_match", "mean", "true")}""",
    "documents": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{country}}"
""",
}
MARGIN = """
def margin(doc, results):
    (right, _), (wrong, _) = results
    return {"margin": right - wrong}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tasks."""
    made = tmp_path / "tasks"
    made.mkdir()
    lines = (json.dumps(question) for question in QUESTIONS)
    (made / "questions.jsonl").write_text("\n".join(lines))
    (made / "margin.py").write_text(MARGIN)
    for name, text in TASKS.items():
        (made / f"{name}.yaml").write_text(f"task: {name}{DATA.format(folder=made)}{text}")
    return made


def test_a_task_that_cannot_be_meant_is_refused_and_an_edited_one_is_another(folder: Path) -> None:
    with pytest.raises(ConfigError, match="quality"):
        Workload(quality=HarnessTask("choice", include_path="/missing"))
    known = Workload(quality=HarnessTask("choice", include_path=str(folder)))
    before = known.conditions()
    assert known.conditions() == before
    (folder / "choice.yaml").write_text("task: other")
    assert known.conditions() != before


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the lm-eval extra")
@pytest.mark.filterwarnings("default")  # of the packages that the harness loads
def test_a_real_models_scores_are_those_of_questions_asked_by_hand(
    real_config: ServerConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # no thread that outlives the harness
    config = real_config.replace(context_size=512)
    task = HarnessTask("choice", limit=LIMIT, include_path=str(folder))
    expected = anyio.run(_compared, config, task)
    right = sum(expected)
    assert 0 < right < LIMIT
    with Sweep(
        quality=task,
        max_tokens=2,
        repeats=1,
        busy_repeats=0,
        config=config,
        store=tmp_path / "choice.journal",
    ) as sweep:
        (row,) = sweep.run().wait(240).rows
    assert row.measurement
    assert row.measurement.quality == right / LIMIT
    assert row.measurement.intervals["quality"] == proportion_interval(right, LIMIT)


async def _compared(config: ServerConfig, choice: HarnessTask) -> list[bool]:
    """Compare scores with those of questions asked by hand, and return the choices' own."""
    chosen, margins, written, chatted = [], [], [], []
    async with Supervisor(config) as supervisor:
        state = await supervisor.start()
        async with Access(state.endpoint, supervisor.api_key).async_http() as http:

            async def ask(path: str, **body: object) -> Any:
                return (await http.post(path, json=body)).json()

            async def answer(text: str) -> str:
                request = {"prompt": text, "n_predict": 8, "temperature": 0}
                line = (await ask("/completion", **request))["content"].lstrip()
                return str(line.partition("\n")[0])

            async def score(name: str, **more: Any) -> tuple[float, tuple[float, float] | None]:
                task = replace(choice, name=name, **more)
                return await harness.run_harness_task(task, http, slots=2, seed=0)

            from kitty_nb.experiments import harness  # noqa: PLC0415 - takes seconds

            for question in QUESTIONS[:LIMIT]:
                country, cities = question["country"], question["cities"]
                prompt = f"The capital of {country} is"
                right, wrong = [await _likelihood(ask, prompt, f" {city}") for city in cities]
                chosen.append(right > wrong)
                margins.append(right - wrong)
                prompt = f"{SHOTS}{country}:"
                chat = await ask("/apply-template", messages=[{"role": "user", "content": prompt}])
                written.append(await answer(prompt) == cities[0])
                chatted.append(await answer(chat["prompt"]) == cities[0])

            found, interval = await score("margin")
            assert found == pytest.approx(fmean(margins), rel=1e-3)
            assert interval
            assert interval[0] < found < interval[1]
            assert await score("written") == (
                sum(written) / LIMIT,
                proportion_interval(sum(written), LIMIT),
            )
            assert any(written)
            assert (await score("written", chat=True))[0] == sum(chatted) / LIMIT
            for name, metric, reason in (
                ("documents", "", "Use quality=Perplexity"),
                ("surprise", "", "brier_score is better when lower"),
                ("choice", "acc_nrom", "Did you mean acc"),
                ("riddles", "", "The task 'riddles' of lm-evaluation-harness failed: .*riddles"),
            ):
                with pytest.raises(ExperimentError, match=reason):
                    await score(name, metric=metric, limit=1)
    return chosen


async def _likelihood(ask: Ask, prompt: str, text: str) -> float:
    """Sum the log-probabilities of a text's tokens, looked up among the likeliest ones."""
    before = (await ask("/tokenize", content=prompt, add_special=True))["tokens"]
    whole = (await ask("/tokenize", content=prompt + text, add_special=True))["tokens"]
    total = 0.0
    for end in range(len(before), len(whole)):
        request = {"prompt": whole[:end], "n_predict": 1, "n_probs": 5_000, "temperature": 0}
        told = await ask("/completion", **request)
        tops = told["completion_probabilities"][0]["top_logprobs"]
        total += next(one["logprob"] for one in tops if one["id"] == whole[end])
    return total
