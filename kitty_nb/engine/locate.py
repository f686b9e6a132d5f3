"""Which llama-server to run: the user's own, the one on `PATH`, or the one inside a wheel."""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, STDOUT

import anyio
import anyio.to_thread

from kitty_nb.config import server_environment
from kitty_nb.engine import embedded, help_cache
from kitty_nb.engine.dialect import Dialect, parse_help
from kitty_nb.errors import EngineError, EngineNotFoundError
from kitty_nb.trust import distrust

_IN_FOLDER = ("llama-server", "bin/llama-server", "build/bin/llama-server")
_VERSION = re.compile(r"^version:\s*(\S.*)$", re.MULTILINE)


class EngineKind(StrEnum):
    """Where an engine comes from."""

    NATIVE = "native"
    EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class Engine:
    """A program that serves models.

    Attributes:
        kind: A llama-server of its own, or the one inside the `xllamacpp` wheel.
        command: The words that start it; its flags follow.
        version: What it calls itself, e.g. `11434 (abc123)`.
        dialect: The flags that it knows.
    """

    kind: EngineKind
    command: tuple[str, ...]
    version: str
    dialect: Dialect


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A program not yet asked; `stamp` is another one when the program has changed."""

    kind: EngineKind
    command: tuple[str, ...]
    stamp: tuple[object, ...]


_engines: dict[_Candidate, Engine] = {}


async def locate_engine(binary: Path | None = None, answer_within: float = 20.0) -> Engine:
    """Find the engine and learn its flags; a program that has not changed is asked only once.

    Args:
        binary: The program to use, or a folder that holds it (`LLAMACPP_BIN`). When None, the
            `llama-server` on `PATH` is used, else the one inside the `xllamacpp` wheel.
        answer_within: Seconds that the program has to answer `--help`.

    Raises:
        EngineNotFoundError: When there is none.
        EngineError: When there is one that cannot be run; its first line of output says why.
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
                f"LLAMACPP_BIN is {binary}, which cannot be looked at ({error.strerror}). Correct"
                " it, or the rights of the folders above it."
            ) from None
        return _candidate(EngineKind.NATIVE, (str(program),), program)
    if found := shutil.which("llama-server"):
        return _candidate(EngineKind.NATIVE, (found,), Path(found))
    if (wheel := find_spec("xllamacpp")) and wheel.origin:
        # -P: a notebook's folder may hold a module with the name of one that the server imports.
        command = (sys.executable, "-P", "-m", "kitty_nb.engine.embedded")
        return _candidate(EngineKind.EMBEDDED, command, Path(wheel.origin))
    raise EngineNotFoundError(
        "There is no llama-server to run. Do one of these: pip install 'kitty_nb[embedded]';"
        " put llama-server on PATH; or set LLAMACPP_BIN to its path."
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
        raise EngineError(f"{program} (LLAMACPP_BIN) may not be run. Try: chmod +x '{program}'")
    if reason := distrust(program):
        raise EngineError(
            f"Another user can change what {program} (LLAMACPP_BIN) does: {reason} Give it to"
            f" yourself alone (chown, chmod go-w), or put {program.parent} on PATH if you trust it."
        )
    return program


def _candidate(kind: EngineKind, command: tuple[str, ...], file: Path) -> _Candidate:
    resolved = file.resolve()
    status = resolved.stat()
    # The folder too: a build with shared libraries may replace only those beside the program.
    folder = resolved.parent.stat()
    stamp = (resolved, status.st_mtime_ns, status.st_size, folder.st_mtime_ns)
    return _Candidate(kind, command, stamp)


async def _ask(candidate: _Candidate, answer_within: float) -> Engine:
    if candidate.kind is EngineKind.EMBEDDED:  # its program would say the same, later
        dialect, version = parse_help(embedded.help_text()), embedded.version_text()
        return Engine(candidate.kind, candidate.command, _numbered(version), dialect)
    program, key = Path(candidate.command[0]), None
    with suppress(OSError):
        key = await anyio.to_thread.run_sync(help_cache.key_of, program, candidate.stamp)
    if key and (known := await anyio.to_thread.run_sync(help_cache.load, key)):
        dialect, version = parse_help(known["--help"]), known["--version"]
        return Engine(candidate.kind, candidate.command, _numbered(version), dialect)
    answers: dict[str, str] = {}

    async def ask(flag: str) -> None:
        answers[flag] = await output_of((*candidate.command, flag), answer_within)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, "--help")
        tasks.start_soon(ask, "--version")
    dialect = parse_help(answers["--help"])
    if not dialect.option("--model"):
        line = next(filter(None, map(str.strip, answers["--help"].splitlines())), "nothing")
        raise EngineError(
            f"{candidate.command[-1]} is not a llama-server that runs here. Asked for --help, it"
            f" said: {line}"
        )
    if key and _VERSION.search(answers["--version"]):
        await anyio.to_thread.run_sync(help_cache.store, key, answers)
    return Engine(candidate.kind, candidate.command, _numbered(answers["--version"]), dialect)


def _numbered(text: str) -> str:
    version = _VERSION.search(text)
    return version[1].strip() if version else "unknown"


async def output_of(command: tuple[str, ...], answer_within: float) -> str:
    """What a command prints, or why it prints nothing."""
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
    return text if text.strip() else f"nothing, and ended with exit code {done.returncode}."
