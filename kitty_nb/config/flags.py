"""The flags in a llama-server command line: their spelling, their values, and which are secret."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

FLAG_PREFIX = "LLAMA_ARG_"  # llama-server reads flags that are not given from such variables
# The JSON of MCP servers has the environments that they start with, keys included.
_SECRET = re.compile(
    r"--?hft|--?mcp-servers-json|--?[\w-]*(?:key|token|password|secret)", re.IGNORECASE
)
PROJECTOR = frozenset({"-mm", "--mmproj"})
PROJECTOR_URL = frozenset({"-mmu", "--mmproj-url"})


def spelled(word: str) -> str:
    """Write a long flag with hyphens: llama-server reads `--ctx_size` as `--ctx-size`."""
    return word.replace("_", "-") if word.startswith("--") else word


def takes_secret(word: str) -> bool:
    """Return whether a word is a flag whose value is a secret, rather than a file with one."""
    return _SECRET.fullmatch(spelled(word).partition("=")[0]) is not None


def without_secrets(words: Sequence[str]) -> tuple[str, ...]:
    """Return the words of a command line without the flags that take secrets, and their values."""
    return tuple(
        word
        for before, word in pairwise(("", *words))
        if not takes_secret(before) and not takes_secret(word)
    )


def value_of(words: Sequence[str], flags: Collection[str]) -> str | None:
    """Return the value of the last of some flags, which is the one that llama-server uses."""
    values = [value for flag, value in pairwise(words) if spelled(flag) in flags]
    return values[-1] if values else None
