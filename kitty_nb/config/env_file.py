"""`.env` text to key-value pairs, with every unreadable line named."""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from dotenv import dotenv_values, find_dotenv
from dotenv.parser import parse_stream

from kitty_nb.errors import ConfigError, Problem
from kitty_nb.trust import distrust

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class EnvFile:
    """The keys and values of a `.env` file, where it stands, and its bytes; none if missing."""

    path: Path
    values: Mapping[str, str | None]
    raw: bytes = b""


def read_env(path: str | Path) -> EnvFile:
    """Read a `.env` file without touching the process environment.

    Args:
        path: The file; plain `.env` is looked for in the folders above too, and may be missing. A
            file that is found so may name a program to run, so it must be nobody else's; who names
            one vouches for it.

    Raises:
        ConfigError: When the file cannot be read, may be another user's, or a line in it cannot be
            understood.
    """
    found = Path(os.path.expanduser(path))  # noqa: PTH111 (leaves a name that nobody has as it is)
    if found == Path(".env"):
        found = Path(find_dotenv(usecwd=True) or found)
        if not found.is_file():
            return EnvFile(found.absolute(), {})
        if reason := distrust(found):
            fix = f"To use it all the same, name it: {found} in place of .env."
            raise ConfigError(str(found), (Problem("file", str(found), reason, fix),))
    try:
        raw = found.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fix = "Copy .env.example there, or name another file."
        why = getattr(error, "strerror", None) or error
        problem = Problem("file", str(found), f"It cannot be read ({why}).", fix)
        raise ConfigError(str(found), (problem,)) from None
    problems = tuple(
        Problem(
            f"line {binding.original.line}",
            _hidden(binding.original.string),
            "This is not KEY=value in plain text.",
            "Quote values with spaces or '#', and close every quote.",
        )
        for binding in parse_stream(StringIO(text))
        if binding.error or "\0" in binding.original.string
    )
    if problems:
        raise ConfigError(str(found), problems)
    # Without newline=None, the lines of a quoted value would end as those of the file do.
    values = dotenv_values(stream=StringIO(text, newline=None))
    return EnvFile(found.absolute(), values, raw)


def _hidden(line: str) -> str:
    """A line without what may be a secret."""
    key, equals, _ = line.strip().partition("=")
    return f"{key}=…" if equals else "…"
