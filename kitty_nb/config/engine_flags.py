"""The flags of a command line of llama-server, as all who read one take them. Pure."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_SECRET = re.compile(r"-hft|--?[\w-]*(?:key|token|password|secret)")
PROJECTOR = frozenset({"-mm", "--mmproj"})


def spelled(word: str) -> str:
    """Write a long flag with hyphens: llama-server reads `--ctx_size` as `--ctx-size`."""
    return word.replace("_", "-") if word.startswith("--") else word


def takes_secret(word: str) -> bool:
    """Tell whether a word is a flag whose value is a secret itself, rather than in a file."""
    return _SECRET.fullmatch(spelled(word)) is not None


def value_of(words: Sequence[str], flags: Collection[str]) -> str | None:
    """Return what follows the last of some flags, which is what llama-server takes."""
    values = [value for flag, value in pairwise(words) if spelled(flag) in flags]
    return values[-1] if values else None
