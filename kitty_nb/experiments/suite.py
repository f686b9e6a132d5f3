"""A small suite of tasks with known answers, generated from a seed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.arguments import texts, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_SANDBOX = Path(__file__).with_name("sandbox.py")
_SECONDS = 5.0  # wall-clock limit for running a model's code; its processor time is limited, too
_NUMBER = re.compile(r"-?\d[\d,]*")
_OBJECT = re.compile(r"\{[^{}]*\}")
_CODE = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)
_NAMES = ("Ada", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jamal")
_CITIES = ("Lisbon", "Oslo", "Kyoto", "Quito", "Accra", "Perth", "Hanoi", "Turin", "Izmir", "Lima")
_THINGS = ("lamps", "chairs", "bicycles", "kettles", "umbrellas", "violins", "ladders", "clocks")
_DEPTHS = (0.1, 0.5, 0.9)  # positions of the needle, as fractions of the text
_FILLER = 40  # sentences around the needle
_MOST = 10_000  # tasks of a kind; of sums, some 60,000 differ
_FACTORS, _LEAST = range(2, 10), range(10, 100)  # in tasks of code, of which fewer differ


class Kind(StrEnum):
    """The kinds of tasks."""

    ARITHMETIC = "arithmetic"
    EXTRACTION = "extraction"
    CODE = "code"
    NEEDLE = "needle"

    def __repr__(self) -> str:
        return repr(self.value)  # which is code, unlike an enum's own


@dataclass(frozen=True)
class Task:
    """A task with its expected answer, which for code is test cases as JSON."""

    kind: Kind
    prompt: str
    expected: str

    def solved_by(self, answer: str) -> bool:
        """Return whether an answer is correct. Blocking, because code runs in a subprocess."""
        match self.kind:
            case Kind.ARITHMETIC:
                numbers = _NUMBER.findall(answer)
                return bool(numbers) and numbers[-1].replace(",", "") == self.expected
            case Kind.EXTRACTION:
                return json.loads(self.expected) in map(_parsed, _OBJECT.findall(answer))
            case Kind.CODE:
                code = _CODE.search(answer)
                return _runs(code[1] if code else answer, json.loads(self.expected))
            case Kind.NEEDLE:
                return self.expected in answer


@dataclass(frozen=True)
class Suite:
    """Tasks that provide a sweep's prompts and its quality: the fraction solved.

    `Sweep(prompts=suite.prompts, quality=suite, max_tokens=256)`
    """

    tasks: tuple[Task, ...]

    @classmethod
    def standard(
        cls, seed: int = 0, each: int = 5, kinds: str | Iterable[str] = tuple(Kind)
    ) -> Suite:
        """Generate tasks of several kinds, reproducibly.

        Args:
            seed: The seed.
            each: The number of tasks per kind: at most 720 with code, else 10,000.
            kinds: The kinds: arithmetic, extraction, code, needle.

        Raises:
            ExperimentError: A kind is unknown, or the number is out of range.
        """
        kinds = texts("kinds", kinds)
        whole("each", each, 1, len(_FACTORS) * len(_LEAST) if Kind.CODE in kinds else _MOST)
        made: list[Task] = []
        for kind in kinds:
            if kind not in set(Kind):
                raise ExperimentError(f"No kind is {kind!r}. Write {', '.join(Kind)}.")
            tasks = _MAKERS[Kind(kind)](Random(f"{kind} {seed}"))  # noqa: S311 (no secret)
            distinct: dict[str, Task] = {}
            while len(distinct) < each:
                task = next(tasks)
                distinct.setdefault(task.prompt, task)
            made += distinct.values()
        return cls(tuple(made))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The questions, as prompts of a sweep."""
        return tuple(task.prompt for task in self.tasks)

    def __call__(self, prompt: str, answer: str) -> float:
        """Score an answer: 1 if it is correct, else 0."""
        for task in self.tasks:
            if task.prompt == prompt:
                return float(task.solved_by(answer))
        raise ExperimentError(f"The suite has no task {prompt!r}. Use prompts=suite.prompts.")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a model that repeats itself nests without end
        return None


def _runs(code: str, cases: list[Any]) -> bool:
    """Run code in a sandboxed subprocess, and return whether it passes all test cases."""
    with TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", _SANDBOX],
                input=json.dumps([code, cases]).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def _arithmetic(chance: Random) -> Iterator[Task]:
    while True:
        a, b, c = chance.randint(12, 99), chance.randint(12, 99), chance.randint(2, 9)
        prompt = f"What is {a} + {b} * {c}? Answer with the number only."
        yield Task(Kind.ARITHMETIC, prompt, str(a + b * c))


def _extraction(chance: Random) -> Iterator[Task]:
    while True:
        facts = {
            "name": chance.choice(_NAMES),
            "city": chance.choice(_CITIES),
            "amount": chance.randint(100, 999),
            "item": chance.choice(_THINGS),
        }
        prompt = (
            f"Yesterday {facts['name']} from {facts['city']} ordered {facts['amount']}"
            f" {facts['item']}, and asked for an invoice. Answer only with a JSON object that has"
            " the keys name, city, amount (a number) and item."
        )
        yield Task(Kind.EXTRACTION, prompt, json.dumps(facts))


def _code(chance: Random) -> Iterator[Task]:
    while True:
        factor, least = chance.choice(_FACTORS), chance.choice(_LEAST)
        prompt = (
            f"Write a Python function f(numbers) that returns the sum of those numbers in a list"
            f" that are divisible by {factor} and greater than {least}. Answer with the code only."
        )
        lists = [[chance.randint(0, 200) for _ in range(8)] for _ in range(4)]
        cases = [
            [[one], sum(n for n in one if n % factor == 0 and n > least)] for one in [[], *lists]
        ]
        yield Task(Kind.CODE, prompt, json.dumps(cases))


def _needle(chance: Random) -> Iterator[Task]:
    while True:
        for depth in _DEPTHS:
            city, code = chance.choice(_CITIES), str(chance.randint(10_000, 99_999))
            lines = [
                f"{chance.choice(_NAMES)} sold {chance.randint(2, 90)} {chance.choice(_THINGS)} in"
                f" {chance.choice(_CITIES)}."
                for _ in range(_FILLER)
            ]
            lines.insert(round(depth * _FILLER), f"The code of the depot in {city} is {code}.")
            question = f"What is the code of the depot in {city}? Answer with the number only."
            yield Task(Kind.NEEDLE, f"{' '.join(lines)}\n\n{question}", code)


_MAKERS: dict[Kind, Callable[[Random], Iterator[Task]]] = {
    Kind.ARITHMETIC: _arithmetic,
    Kind.EXTRACTION: _extraction,
    Kind.CODE: _code,
    Kind.NEEDLE: _needle,
}
