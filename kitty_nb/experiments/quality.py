"""How good answers are: a function of prompt and answer, or the perplexity of expected texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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

    The server is made to write each text and says how likely it held every token of it, before
    any sampling. It spells a text in the tokens it likes best, which nearly always are those that
    the tokenizer would choose.

    Attributes:
        expected: The text to each prompt. Prompts without one do not count.
    """

    expected: Mapping[str, str]


def identity(quality: Quality | Perplexity | None) -> str:
    """Name a measure of quality, the same in every process."""
    if quality is None:
        return ""
    if isinstance(quality, ExactMatch | Perplexity):
        return repr(quality)
    name = getattr(quality, "__qualname__", type(quality).__qualname__)
    return f"{quality.__module__}.{name}"
