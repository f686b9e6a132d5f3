"""How good answers are: a function of prompt and answer, or the perplexity of expected texts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Collection

Quality = Callable[[str, str], float]


@dataclass(frozen=True)
class ExactMatch:
    """1 where an answer is the expected one but for space around it, else 0.

    Attributes:
        expected: The right answer to each prompt.
    """

    expected: Mapping[str, str]

    def __call__(self, prompt: str, answer: str) -> float:
        """Compare one answer."""
        return float(answer.strip() == self.expected[prompt].strip())


@dataclass(frozen=True)
class Perplexity:
    """How much a model is surprised by given texts as answers; lower is better, 1 is not at all.

    The server says how likely it held every token of a text, before any sampling. The tokens are
    those of the model's own tokenizer, so models with different ones compare by the bits per
    character that are measured along with it.

    Attributes:
        expected: The text to each prompt. Prompts without one do not count.
    """

    expected: Mapping[str, str]


def check_quality(
    quality: Quality | Perplexity | None, prompts: Collection[str]
) -> Iterator[Problem]:
    """Yield what is wrong with a measure of quality for these prompts."""
    match quality:
        case ExactMatch(expected):
            for prompt in dict.fromkeys(prompts):
                if prompt not in expected:
                    fix = "Give ExactMatch the right answer to each prompt."
                    yield Problem("quality", prompt, "ExactMatch lacks this prompt.", fix)
        case Perplexity(expected):
            if not any(expected.get(prompt) for prompt in prompts):
                fix = "Give Perplexity the text to a prompt, spelled as in prompts=[…]."
                yield Problem("quality", "", "Perplexity has a text for none of the prompts.", fix)
        case _ if quality is not None and not callable(quality):
            fix = "Write ExactMatch({prompt: answer}), Perplexity({prompt: text}) or a function."
            yield Problem("quality", repr(quality), "It measures nothing.", fix)


def identity(quality: Quality | Perplexity | None) -> str:
    """Name a measure of quality, the same in every process.

    A function is known by its code and by the values bound to it, so that one that was edited is
    another. What it finds by a global name is not looked into.
    """
    if quality is None:
        return ""
    if isinstance(quality, Perplexity):
        return f"by token {quality!r}"
    if isinstance(quality, ExactMatch):
        return repr(quality)
    text = repr([_plain(part) for part in _parts(quality)])
    return f"{_name(quality)} {hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"


def _name(call: Callable[..., object]) -> str:
    module = getattr(call, "__module__", None)
    return f"{module}.{getattr(call, '__qualname__', type(call).__qualname__)}"


def _parts(call: Any) -> Iterator[object]:
    """Yield what makes a callable the one it is."""
    yield _name(call)
    match call:
        case partial():
            yield from _parts(call.func)
            yield from (call.args, call.keywords)
        case FunctionType():
            yield from (call.__code__, call.__defaults__, call.__kwdefaults__)
            for cell in call.__closure__ or ():
                with suppress(ValueError):  # nothing is in it yet
                    yield cell.cell_contents
        case MethodType():
            yield from _parts(call.__func__)
            yield getattr(call.__self__, "__dict__", None)
        case object(__wrapped__=inner):  # as functools.cache keeps it
            yield from _parts(inner)
        case _ if isinstance(call.__call__, MethodType):  # an object whose class can be called
            yield from _parts(call.__call__)


def _plain(value: object, within: tuple[object, ...] = ()) -> object:
    """Return what a value holds, in a form whose `repr` is the same in every process.

    Args:
        value: It.
        within: The callables that it is bound to, for one may be bound to itself.
    """
    match value:
        case CodeType():
            return value.co_code, value.co_names, _plain(value.co_consts)
        case tuple() | list():
            return [_plain(one, within) for one in value]
        case set() | frozenset():
            return sorted(repr(_plain(one, within)) for one in value)
        case dict():
            return [(_plain(name), _plain(one, within)) for name, one in value.items()]
        case re.Pattern():
            return value.pattern, value.flags
        case None | bool() | int() | float() | complex() | str() | bytes():
            return value
    if callable(value) and not any(value is one for one in within):
        return [_plain(part, (*within, value)) for part in _parts(value)]
    return type(value).__qualname__
