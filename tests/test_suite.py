"""The suite of tasks: what it takes for right, on answers of all kinds and on a real model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kitty_nb import ServerConfig
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments import Suite, Sweep, suite
from kitty_nb.experiments.suite import Kind, Task

SUITE = Suite.standard(each=3)


def first(kind: Kind) -> Task:
    return next(task for task in SUITE.tasks if task.kind is kind)


def test_a_seed_makes_the_same_tasks_and_another_one_others() -> None:
    assert Suite.standard(each=3) == SUITE
    assert len({*SUITE.prompts, *Suite.standard(1, each=3).prompts}) == 24
    assert [task.kind for task in Suite.standard(each=1, kinds=["needle"]).tasks] == ["needle"]
    assert Suite.standard(each=1, kinds="needle").tasks == SUITE.tasks[-3:-2]


def test_no_task_is_asked_twice() -> None:
    for kind, each in (("code", 720), ("extraction", 2000), ("needle", 300), ("arithmetic", 2000)):
        assert len({*Suite.standard(each=each, kinds=kind).prompts}) == each


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"kinds": ["riddle"]}, "No kind is 'riddle'. Write arithmetic,"),
        ({"each": 0}, "each is 0. Write a whole number from 1 to 720."),
        ({"each": 721}, "each is 721. Write a whole number from 1 to 720."),
        ({"each": 10_001, "kinds": "needle"}, "Write a whole number from 1 to 10,000."),
        ({"each": 10**9}, "each is 1000000000."),
        ({"each": 1.5}, "each is 1.5."),
    ],
)
def test_a_suite_that_cannot_be_made_is_refused_at_once(asked: Any, said: str) -> None:
    with pytest.raises(ExperimentError, match=re.escape(said)):
        Suite.standard(**asked)


def test_a_prompt_of_another_sweep_is_named() -> None:
    with pytest.raises(ExperimentError, match=r"no task 'Hello'\. Use prompts=suite"):
        SUITE("Hello", "1")


def test_an_answer_that_nests_without_end_is_wrong() -> None:
    assert not first(Kind.EXTRACTION).solved_by('{"name": ' + "[" * 100_000 + "}")


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
        "match 1:\n    case int(__reduce_ex__=reduce): reduce(0)",
        "int.mro()",
        "raise ValueError",
    ],
)
def test_code_that_does_more_than_compute_is_not_right(line: str) -> None:
    task = first(Kind.CODE)
    right = solution(task)
    assert task.solved_by(right)
    assert not task.solved_by(f"{right}\n{line}\n")


def test_code_may_use_patterns_and_throw_names_away() -> None:
    task = first(Kind.CODE)
    patterns = "for _ in range(2):\n    match 1:\n        case int(real=x): x"
    assert task.solved_by(f"{patterns}\n{solution(task)}")


_ESCAPE = """
def f(numbers):
    for one in object.__subclasses__():
        if one.__name__ == "_wrap_close":
            one.__init__.__globals__["unlink"]({path!r})
"""


def test_what_reaches_beyond_the_process_ends_it(tmp_path: Path) -> None:
    (victim := tmp_path / "victim").touch()
    sandbox = Path(suite.__file__).with_name("sandbox.py").read_text()
    gate = "allows(code) and "
    assert gate in sandbox
    (open_gate := tmp_path / "sandbox.py").write_text(
        sandbox.replace(gate, "").replace('"zip", ', '"zip", "object", ')
    )
    answer = json.dumps([_ESCAPE.format(path=str(victim)), [[[[]], None]]])
    done = subprocess.run(
        [sys.executable, "-I", "-S", open_gate], input=answer.encode(), check=False
    )
    assert done.returncode == 1
    assert victim.exists()


@pytest.mark.slow
def test_a_real_models_share_of_right_answers_is_measured(
    real_config: ServerConfig, tmp_path: Path
) -> None:
    tasks = Suite.standard(each=1)
    with Sweep(
        prompts=tasks.prompts,
        quality=tasks,
        max_tokens=32,
        repeats=1,
        config=real_config.replace(context_size=4096),
        store=tmp_path / "suite.journal",
    ) as sweep:
        results = sweep.run().wait(240)
    (row,) = results.rows
    assert row.measurement
    judged = [tasks(*pair) for pair in zip(tasks.prompts, row.measurement.answers, strict=True)]
    assert row.measurement.quality == sum(judged) / len(judged)
    low, high = row.measurement.intervals["quality"]
    assert 0 <= low <= row.measurement.quality <= high <= 1
