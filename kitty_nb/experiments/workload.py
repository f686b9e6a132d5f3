"""The prompts of every trial, and the quality of its answers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from types import CellType, CodeType, MethodType
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ConfigError, Problem
from kitty_nb.experiments.trial import Outcome

if TYPE_CHECKING:
    from kitty_nb.experiments.trial import TrialResult

DEFAULT_PROMPT = "Explain in a few sentences why the sky is blue, and why it is red at sunset."

Quality = Callable[[str, str], float]
# The attributes that tell functions, methods, partials, wrappers and callable objects apart.
_PARTS = (
    *("__module__", "__qualname__", "__code__", "__defaults__", "__kwdefaults__", "__closure__"),
    *("func", "args", "keywords", "__wrapped__", "__func__", "__self__", "__dict__"),
)


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
    """Perplexity of given texts as answers: lower is better, and 1 is no surprise at all.

    The server reports how likely each token of a text was, before any sampling. Tokens are those of
    the model's own tokenizer; to compare models with different ones, use the bits per character,
    which are measured too.

    Attributes:
        expected: The text for each prompt. Prompts without one do not count.
    """

    expected: Mapping[str, str]


@dataclass(frozen=True)
class Workload:
    """The requests with which a server is measured.

    Attributes:
        prompts: User messages, one request each; with `chat` off, the raw text to continue.
        max_tokens: Length of an answer, 2 or more. Without `quality`, every answer is that long
            even if the model would end it earlier, so that all are alike.
        parallel: Numbers of concurrent requests, each measured separately.
        seed: The seed of the server's sampling, which is greedy unless the trial varies a setting
            of sampling, such as the temperature.
        chat: Whether prompts go through the model's chat template.
        quality: A score for answers, or texts whose perplexity is measured.
        record: Whether each trial also makes a run record, so that it can be repeated.
        fill: Tokens to which prompts are lengthened by repetition, as far as they fit.
    """

    prompts: tuple[str, ...] = (DEFAULT_PROMPT,)
    max_tokens: int = 64
    parallel: tuple[int, ...] = (1,)
    seed: int = 0
    chat: bool = True
    quality: Quality | Perplexity | None = None
    record: bool = False
    fill: int = 0

    @classmethod
    def of(
        cls,
        prompts: str | Iterable[str],
        parallel: int | Iterable[int],
        quality: Quality | Perplexity | None,
        **more: Any,
    ) -> Workload:
        """Make a workload from one prompt or several, and one number or several."""
        several = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        levels = (parallel,) if isinstance(parallel, int) else tuple(parallel)
        return cls(prompts=several, parallel=levels, quality=quality, **more)

    def __post_init__(self) -> None:
        if problems := tuple(self._problems()):
            raise ConfigError("the sweep", problems)

    @property
    def levels(self) -> tuple[int, ...]:
        """Each number of parallel requests once, ascending."""
        return tuple(sorted(set(self.parallel)))

    def asked(self, parallel: int) -> tuple[int, ...]:
        """Return the indices of the prompts to ask: each one, repeated until all slots are busy."""
        count = ceil(len(self.prompts) / parallel) * parallel
        return tuple(index % len(self.prompts) for index in range(count))

    @property
    def requests(self) -> int:
        """The number of measured requests in a trial."""
        return sum(len(self.asked(level)) for level in self.levels)

    def satisfied_by(self, row: TrialResult) -> bool:
        """True if a row has all that is asked for, so that its trial need not be run."""
        return not self.record or bool(row.document) or row.outcome is not Outcome.DONE

    def conditions(self) -> dict[str, Any]:
        """Return what results depend on, as JSON has it."""
        same = {name: getattr(self, name) for name in ("prompts", "max_tokens", "seed", "chat")}
        more = {"parallel": self.levels, "quality": identity(self.quality), "fill": self.fill}
        return same | more

    def _problems(self) -> Iterator[Problem]:
        if not self.prompts or not all(self.prompts):
            fix = "Write prompts=[…] with at least one, none of them empty."
            yield Problem("prompts", str(self.prompts), "One of them is empty.", fix)
        if self.max_tokens < 2:  # noqa: PLR2004 (between two tokens lies the first interval)
            fix = "Write 2 or more; 64 is a good start."
            yield Problem("max_tokens", str(self.max_tokens), "A rate needs 2 tokens.", fix)
        if not self.parallel or min(self.parallel) < 1:
            fix = "Write numbers of requests, such as (1, 4)."
            yield Problem("parallel", str(self.parallel), "It must be 1 or more.", fix)
        match self.quality:
            case ExactMatch(expected):
                for prompt in (p for p in dict.fromkeys(self.prompts) if p not in expected):
                    fix = "Give ExactMatch the right answer to each prompt."
                    yield Problem("quality", prompt, "ExactMatch lacks this prompt.", fix)
            case Perplexity(expected):
                if not any(expected.get(prompt) for prompt in self.prompts):
                    fix = "Give Perplexity the text to a prompt, spelled as in prompts=[…]."
                    reason = "Perplexity has a text for none of the prompts."
                    yield Problem("quality", "", reason, fix)
            case quality if quality is not None and not callable(quality):
                fix = "Use ExactMatch({prompt: answer}), Perplexity({prompt: text}) or a function."
                yield Problem("quality", repr(quality), "It measures nothing.", fix)


def identity(quality: Quality | Perplexity | None) -> str:
    """Name a measure of quality, the same in every process.

    A function is known by its code and by the values bound to it, so that one that was edited is
    another. What it finds by a global name is not looked into.
    """
    match quality:
        case None:
            return ""
        case ExactMatch() | Perplexity():
            return repr(quality)
    text = repr(_plain(quality))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _plain(value: Any, within: tuple[object, ...] = ()) -> object:
    """Return what a value holds, in a form whose `repr` is the same in every process.

    Args:
        value: Any value.
        within: The callables that hold it; one may hold itself.
    """
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return value
        case tuple() | list():
            return [_plain(one, within) for one in value]
        case set() | frozenset():
            return sorted(repr(_plain(one, within)) for one in value)
        case dict():
            return _plain([*value.items()], within)
        case re.Pattern():
            return value.pattern, value.flags
        case CodeType():
            return value.co_code, value.co_names, _plain(value.co_consts, within)
        case CellType():
            return _plain(getattr(value, "cell_contents", None), within)
        case _ if callable(value) and not any(value is one for one in within):
            parts = [getattr(value, name, None) for name in _PARTS]
            if isinstance(call := value.__call__, MethodType):  # an object of a callable class
                parts.append(call.__func__)
            return type(value).__qualname__, _plain(parts, (*within, value))
    return type(value).__qualname__
