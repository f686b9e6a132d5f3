"""The programs that serve: the llama-server to run, with its flags, and llama-swap."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.to_thread
import platformdirs

from kitty_nb.config import server_environment
from kitty_nb.config.flags import spelled
from kitty_nb.engine import embedded
from kitty_nb.errors import EngineError, EngineNotFoundError
from kitty_nb.safe_files import Database, distrust, user_folder

if TYPE_CHECKING:
    import sqlite3


# Descriptions start at column 26 or later in every build, options well before it.
_OPTION_LINE = re.compile(r" {0,12}(?P<text>--?[A-Za-z].*)")
_FLAG = re.compile(r"--?[A-Za-z][\w.-]*", re.ASCII)
_CHOICES = re.compile(
    r"[\[<](?P<bars>[^|\s]+(?:\|[^|\s]+)+)[\]>]|\{(?P<commas>[^\s{}]+)\}|(?P<some>none(?:,[\w-]+)+)"
)
# `<tensor name pattern>=<buffer type>` is one word to llama-server, `FNAME SCALE` are two. In early
# 2024, a description could follow by a single space.
_VALUE = re.compile(r"(?P<first>(?:<[^<>]*>|\S)+)(?P<second> [A-Z]+$)?")

_TRACES = "- 4: trace"
_ALIKE = 0.81  # of 1; a lower one means another flag that happens to share some letters
_REMOVED = "the argument has been removed"  # listed, but ends the program when used


@dataclass(frozen=True, slots=True)
class Option:
    """One option, under all its names."""

    # Every spelling, long and short, including the negative ones (`--no-jinja`).
    flags: tuple[str, ...]
    # The number of words after the flag, 0 for a switch. Builds of early 2024 omit the value of
    # `--host` and `--n-predict`, so 0 is a hint rather than a proof.
    values: int
    # The words allowed as its value, if `--help` lists them, as in `[on|off|auto]`. `--spec-type`
    # takes several of them, separated by commas.
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dialect:
    """All options of a build."""

    options: tuple[Option, ...]  # what its `--help` lists
    # Whether verbosity 4 adds a few lines for each request; in other builds, it adds hundreds.
    traces: bool = False

    @cached_property
    def _by_flag(self) -> dict[str, Option]:
        return {flag: option for option in self.options for flag in option.flags}

    def option(self, flag: str) -> Option | None:
        """Return the option that a flag names, or None if this build does not know it."""
        return self._by_flag.get(spelled(flag))

    def nearest(self, flag: str) -> str | None:
        """Return the flag of this build that was most likely meant, if any was."""
        meant = spelled(flag)
        longer = [name for name in self._by_flag if name.startswith(f"{meant}-")]
        alike = get_close_matches(meant, self._by_flag, n=1, cutoff=_ALIKE)
        return next(iter(alike), min(longer, key=len, default=None))


def parse_help(text: str) -> Dialect:
    """Parse the options in the output of `llama-server --help`.

    Three layouts are in use: `-t N, --threads N` (until mid 2024), `-t,    --threads N` with the
    long flags indented (2024), and the same without indentation (since). A long option pushes
    its description to the next line.
    """
    options = tuple(filter(None, map(_parse_line, text.splitlines())))
    return Dialect(options, traces=_TRACES in text)


def _parse_line(line: str) -> Option | None:
    match = _OPTION_LINE.fullmatch(line)
    if not match or _REMOVED in line:
        return None
    # Two spaces end the option, except after the comma that aligns its long flags.
    head = re.split(r"(?<![,\s])\s{2,}", match["text"].rstrip(), maxsplit=1)[0]
    names = [name.partition(" ") for name in re.split(r",\s+(?=-)", head)]
    flags = tuple(flag for flag, _, _ in names)
    if not all(map(_FLAG.fullmatch, flags)):
        return None
    value = _VALUE.match(names[-1][2])
    if value is None:
        return Option(flags, 0)
    listed = _CHOICES.fullmatch(value["first"])
    choices = re.split(r"[|,]", listed[listed.lastgroup or 0]) if listed else ()
    return Option(flags, 2 if value["second"] else 1, tuple(choices))


_TABLES = ("CREATE TABLE IF NOT EXISTS answers (stamp PRIMARY KEY, help TEXT, version TEXT)",)
_FORGET = "DELETE FROM answers WHERE rowid <= (SELECT max(rowid) FROM answers) - 8"
_RECALL = "SELECT help, version FROM answers WHERE stamp = ?"
_SCRIPT = 1 << 16  # bytes; a longer file is not a script that only starts another program
_PATH = re.compile(r"/[\w./+@-]+")
_IN_FOLDER = ("llama-server", "bin/llama-server", "build/bin/llama-server")
_VERSION = re.compile(r"^version:\s*(\S.*)$", re.MULTILINE)
_ANSWER_WITHIN = 20.0  # seconds, on a busy machine
SWAP_HOME = "https://github.com/mostlygeek/llama-swap"
# The first versions that forward a client's key to the server, and that choose among several
# servers of one model by their requests.
PASSES_KEY, SPREADS = 218, 242


class EngineKind(StrEnum):
    """The origin of an engine."""

    NATIVE = "native"
    EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class Engine:
    """A program that serves models."""

    kind: EngineKind  # a standalone llama-server, or the one in the `xllamacpp` wheel
    command: tuple[str, ...]  # the words that start it; its flags follow
    version: str  # the version it reports, e.g. `11434 (abc123)`
    dialect: Dialect  # the flags that it knows


class _Candidate(NamedTuple):
    """A program that has not been asked for its flags yet."""

    kind: EngineKind  # where it comes from
    command: tuple[str, ...]  # the words that start it
    stamp: str  # changes whenever the program may print something else
    is_lasting: bool  # whether the stamp covers all of the program, also in other processes


_engines: dict[_Candidate, Engine] = {}
_log = logging.getLogger(__name__)


async def locate_engine(binary: Path | None = None, answer_within: float = 20.0) -> Engine:
    """Find the engine and its flags; a program that has not changed is asked only once.

    Args:
        binary: The program to use, or a folder that holds it (`LLAMACPP_BIN`). When None, the
            `llama-server` on `PATH` is used, else the one in the `xllamacpp` wheel.
        answer_within: Timeout of `--help`, in seconds.

    Raises:
        EngineNotFoundError: There is none.
        EngineError: There is one that can't be run; its first line of output says why.
    """
    candidate = await anyio.to_thread.run_sync(_choose, binary)
    if candidate not in _engines:
        _engines[candidate] = await _ask(candidate, answer_within)
    return _engines[candidate]


def _choose(binary: Path | None) -> _Candidate:
    if binary is not None:
        try:
            program = _program(binary)
        except OSError as error:
            raise EngineError(
                f"LLAMACPP_BIN is {binary}, which can't be accessed ({error.strerror}). Correct"
                " it, or fix the permissions of the folders above it."
            ) from None
        return _candidate(EngineKind.NATIVE, (str(program),), program)
    if found := shutil.which("llama-server"):
        return _candidate(EngineKind.NATIVE, (found,), Path(found))
    if (wheel := find_spec("xllamacpp")) and wheel.origin:
        # -P: a notebook's folder may contain a module named like one that the server imports.
        command = (sys.executable, "-P", "-m", "kitty_nb.engine.embedded")
        return _candidate(EngineKind.EMBEDDED, command, Path(wheel.origin))
    raise EngineNotFoundError(
        "There is no llama-server to run. Run `pip install 'kitty_nb[embedded]'`, put llama-server"
        " on PATH, or set LLAMACPP_BIN to its path."
    )


def _program(binary: Path) -> Path:
    places = [binary / name for name in _IN_FOLDER] if binary.is_dir() else [binary]
    program = next(filter(Path.is_file, places), None)
    if program is None:
        what = "a folder without a llama-server in it" if binary.is_dir() else "no such file"
        raise EngineError(
            f"LLAMACPP_BIN is {binary}: {what}. Correct it, or leave it empty to use the"
            " llama-server on PATH."
        )
    if not os.access(program, os.X_OK):
        raise EngineError(f"{program} (LLAMACPP_BIN) is not executable. Run: chmod +x '{program}'")
    if reason := distrust(program):
        raise EngineError(
            f"Another user can change what {program} (LLAMACPP_BIN) does: {reason} Make yourself"
            f" its only writer (chown, chmod go-w), or put {program.parent} on PATH if you trust"
            " it."
        )
    return program


def _candidate(kind: EngineKind, command: tuple[str, ...], file: Path) -> _Candidate:
    """Inspect a program; a script includes the files that it names."""
    resolved = file.resolve()
    # The folder too: a build with shared libraries may replace only those beside the program.
    files, is_lasting = [resolved, resolved.parent], True
    with suppress(OSError), resolved.open("rb") as opened:
        head = opened.read(_SCRIPT)
        if head.startswith(b"#!"):
            lines = head.decode(errors="replace").splitlines()[1:]
            named = [path for path in map(Path, _PATH.findall("\n".join(lines))) if path.is_file()]
            starts = [line for line in lines if "$@" in line]
            works_out = any(line.count("$") > 1 for line in starts)
            is_lasting = bool(named and starts) and not works_out
            files += named if is_lasting else []
    stats = [(str(path), path.stat()) for path in files]
    stamp = repr([(name, status.st_mtime_ns, status.st_size) for name, status in stats])
    return _Candidate(kind, command, stamp, is_lasting)


async def _ask(candidate: _Candidate, answer_within: float) -> Engine:
    if candidate.kind is EngineKind.EMBEDDED:  # its program would say the same, but later
        return _engine(candidate, embedded.help_text(), embedded.version_text())
    if candidate.is_lasting:
        known = await anyio.to_thread.run_sync(
            _answers().use, lambda file: file.execute(_RECALL, (candidate.stamp,)).fetchone(), None
        )
        if known:
            return _engine(candidate, *known)
    answers: dict[str, str] = {}

    async def ask(flag: str) -> None:
        answers[flag] = await output_of((*candidate.command, flag), answer_within)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, "--help")
        tasks.start_soon(ask, "--version")
    engine = _engine(candidate, answers["--help"], answers["--version"])
    if not engine.dialect.option("--model"):
        line = next(filter(None, map(str.strip, answers["--help"].splitlines())), "nothing")
        raise EngineError(
            f"{candidate.command[-1]} --help printed no flags of a llama-server: {line}"
        )
    if candidate.is_lasting and _VERSION.search(answers["--version"]):
        row = (candidate.stamp, answers["--help"], answers["--version"])

        def write(file: sqlite3.Connection) -> None:
            file.execute("REPLACE INTO answers VALUES (?, ?, ?)", row)
            file.execute(_FORGET)

        await anyio.to_thread.run_sync(_answers().use, write, None)
    return engine


def _engine(candidate: _Candidate, told_help: str, told_version: str) -> Engine:
    version = _VERSION.search(told_version)
    number = version[1].strip() if version else "unknown"
    return Engine(candidate.kind, candidate.command, number, parse_help(told_help))


def _answers() -> Database:
    """Return the answers of programs to this and other processes, by their stamp."""
    path = user_folder(platformdirs.user_cache_path) / "engines.sqlite3"
    return Database(path, "The cache", "llama-server is asked again.", _log.warning, _TABLES)


async def output_of(command: tuple[str, ...], answer_within: float) -> str:
    """Return what a command prints, or why it prints nothing."""
    try:
        with anyio.fail_after(answer_within):
            done = await anyio.run_process(
                command,
                stdin=DEVNULL,
                stderr=STDOUT,
                check=False,
                env=server_environment(api_key=None),
            )
    except TimeoutError:
        return f"nothing within {answer_within:g} s."
    except OSError as error:
        return f"{error.strerror}."
    text = done.stdout.decode(errors="replace")
    return text if text.strip() else f"nothing, and exited with code {done.returncode}."


async def why_swap_unfit(program: str, least: int, lacks: str) -> str | None:
    """Return why a llama-swap can't be used, in sentences; None if it can.

    Args:
        program: Where it is.
        least: The first version that is recent enough.
        lacks: What older ones can't do.
    """
    told = await output_of((program, "-version"), _ANSWER_WITHIN)
    if "version: " not in told:
        said = told.strip().splitlines()[0][:200]
        return (
            f"{program} -version printed no version of llama-swap: {said} Reinstall it: {SWAP_HOME}"
        )
    found = re.search(r"version: (\d+)", told)
    version = int(found[1]) if found else 0  # built by the user
    if 0 < version < least:
        return (
            f"{program} is version {version}, which can't {lacks}. Update it to version {least} or"
            f" later: {SWAP_HOME}"
        )
    return None
