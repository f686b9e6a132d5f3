"""The flags that one build of llama-server understands, read from its `--help`. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

from kitty_nb.config import spelled

# Descriptions start at column 26 or later in every build, options well before it.
_OPTION_LINE = re.compile(r" {0,12}(?P<text>--?[A-Za-z].*)")
_FLAG = re.compile(r"--?[A-Za-z][\w.-]*", re.ASCII)
_CHOICES = re.compile(r"[\[<](?P<bars>[^|\s]+(?:\|[^|\s]+)+)[\]>]|\{(?P<commas>[^\s{}]+)\}")
# `<tensor name pattern>=<buffer type>` is one word to llama-server, `FNAME SCALE` are two. In early
# 2024, a description could follow by a single space.
_VALUE = re.compile(r"(?P<first>(?:<[^<>]*>|\S)+)(?P<second> [A-Z]+$)?")

_ALIKE = 0.81  # of 1; less is another flag that happens to share some letters
_REMOVED = "the argument has been removed"  # it is listed, and ends the program when it is used


@dataclass(frozen=True, slots=True)
class Option:
    """One option, under all its names.

    Attributes:
        flags: Every spelling, long and short, including the negative ones (`--no-jinja`).
        values: How many words follow the flag, 0 for a switch. Builds of early 2024 leave the
            value of `--host` and `--n-predict` out, so 0 is a hint rather than a proof.
        choices: The words allowed as its value, where `--help` lists them, as in `[on|off|auto]`.
    """

    flags: tuple[str, ...]
    values: int
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dialect:
    """All options of a build."""

    options: tuple[Option, ...]

    @cached_property
    def _by_flag(self) -> dict[str, Option]:
        return {flag: option for option in self.options for flag in option.flags}

    def option(self, flag: str) -> Option | None:
        """Return the option that a flag names, or None where this build does not know it."""
        return self._by_flag.get(spelled(flag))

    def nearest(self, flag: str) -> str | None:
        """Return the flag of this build that was most likely meant, if any was."""
        meant = spelled(flag)
        longer = [name for name in self._by_flag if name.startswith(f"{meant}-")]
        alike = get_close_matches(meant, self._by_flag, n=1, cutoff=_ALIKE)
        return next(iter(alike), min(longer, key=len, default=None))


def parse_help(text: str) -> Dialect:
    """Read the options from what `llama-server --help` prints.

    Three layouts are in use: `-t N, --threads N` (until mid 2024), `-t,    --threads N` with the
    long flags indented (2024), and the same without indentation (since). A long option pushes
    its description to the next line.
    """
    return Dialect(tuple(filter(None, map(_parse_line, text.splitlines()))))


def _parse_line(line: str) -> Option | None:
    match = _OPTION_LINE.fullmatch(line)
    if not match or _REMOVED in line:
        return None
    # Two spaces end the option, except behind the comma that aligns its long flags.
    head = re.split(r"(?<![,\s])\s{2,}", match["text"].rstrip(), maxsplit=1)[0]
    names = [name.partition(" ") for name in re.split(r",\s+(?=-)", head)]
    flags = tuple(flag for flag, _, _ in names)
    if not all(map(_FLAG.fullmatch, flags)):
        return None
    value = _VALUE.match(names[-1][2])
    if value is None:
        return Option(flags, 0)
    listed = _CHOICES.fullmatch(value["first"])
    choices = re.split(r"[|,]", listed["bars"] or listed["commas"]) if listed else ()
    return Option(flags, 2 if value["second"] else 1, tuple(choices))
