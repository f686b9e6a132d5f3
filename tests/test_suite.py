"""The suite of tasks: what it takes for right, on answers of all kinds and on a real model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kitty_nb import ServerConfig
from kitty_nb.experiments import Suite, Sweep
from kitty_nb.experiments.suite import Kind, Task

SUITE = Suite.standard(each=3)


def first(kind: Kind) -> Task:
    return next(task for task in SUITE.tasks if task.kind is kind)


def test_a_seed_makes_the_same_tasks_and_another_one_others() -> None:
    assert Suite.standard(each=3) == SUITE
    assert len({*SUITE.prompts, *Suite.standard(1, each=3).prompts}) == 24
    assert [task.kind for task in Suite.standard(each=1, kinds=["needle"]).tasks] == ["needle"]
    with pytest.raises(ValueError, match="'riddle' is not a valid Kind"):
        Suite.standard(kinds=["riddle"])


@pytest.mark.parametrize("kind", [Kind.ARITHMETIC, Kind.EXTRACTION, Kind.NEEDLE])
def test_the_right_answer_is_found_in_words_and_a_wrong_one_is_not(kind: Kind) -> None:
    task = first(kind)
    for answer in (task.expected, f"Sure!\n```json\n{task.expected}\n```"):
        assert SUITE(task.prompt, answer) == 1
    for answer in ("", "12345678", '{"name": "nobody"}', "{'name': 3"):
        assert SUITE(task.prompt, answer) == 0


def test_arithmetic_keeps_the_order_of_operations() -> None:
    for task in Suite.standard(7, each=20, kinds=["arithmetic"]).tasks:
        question = task.prompt.removeprefix("What is ").partition("?")[0]
        assert task.expected == str(eval(question))


def solution(task: Task) -> str:
    factor, least = re.findall(r"\d+", task.prompt)
    return (
        f"def f(numbers):\n    return sum(n for n in numbers if n % {factor} == 0 and n > {least})"
    )


def test_code_is_right_if_it_satisfies_the_cases() -> None:
    for task in Suite.standard(3, each=4, kinds=["code"]).tasks:
        right = solution(task)
        assert task.solved_by(right)
        assert task.solved_by(f"Here it is:\n```python\n{right}\n```\nIt sums them.")
        assert not task.solved_by(right.replace(" > ", " < "))
        assert not task.solved_by("I cannot program.")


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "while True: pass",
        "x = [0] * (1 << 40)",
        "open('stolen', 'w')",
        "().__class__.__base__.__subclasses__()",
        "'{0.__class__}'.format(f)",
        "g = (g.gi_frame.f_back.f_globals for x in [0])",
        "__import__('os').abort()",
        "raise ValueError",
    ],
)
def test_code_that_does_more_than_compute_is_not_right(line: str) -> None:
    task = first(Kind.CODE)
    right = solution(task)
    assert task.solved_by(right)
    assert not task.solved_by(f"{right}\n{line}\n")


@pytest.mark.slow
def test_a_real_models_share_of_right_answers_is_measured(
    real_config: ServerConfig, tmp_path: Path
) -> None:
    suite = Suite.standard(each=1)
    with Sweep(
        prompts=suite.prompts,
        quality=suite,
        max_tokens=32,
        repeats=1,
        config=real_config.replace(context_size=4096),
        store=tmp_path / "suite.journal",
    ) as sweep:
        results = sweep.run().wait(240)
    (row,) = results.rows
    assert row.measurement
    judged = [suite(*pair) for pair in zip(suite.prompts, row.measurement.answers, strict=True)]
    assert row.measurement.quality == sum(judged) / len(judged)
    low, high = row.measurement.intervals["quality"]
    assert 0 <= low <= row.measurement.quality <= high <= 1
