"""Diagnosis of a server's exit from its exit code and log, by the tables of `signatures.toml`."""

from __future__ import annotations

import errno
import os
import re
import signal
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Row = str | dict[str, Any]  # of a table of `signatures.toml`, or the name of one in `ending`

_LINES = 5
_LENGTH = 300
_LOOKED_AT = 500  # characters of a line: an endless one must not hold up the loop
_CLOCK = re.compile(r"^[\d.]+ (?P<level>[DIWE]) ")
_LOADED = re.compile(r"\bmodel loaded\b")
_ERROR = re.compile(r"\berror\b|\bfailed\b|^\w*(?:Error|Exception)\b", re.IGNORECASE)
_OF_CHILD = re.compile(r"\[ *\d+\] ")  # what a router's models say explains only their ends
_LAST = 300  # lines that may tell why a server that has loaded its model ended
# Logged at every early exit, or harmless: a failed trial fit of the parameters, and a build for
# GPUs on a machine without one.
_GENERIC = re.compile(
    r"exiting due to|the lines above say why|trying to fit params"
    r"|failed to (?:load model|create.context with model|initialize (?:CUDA|ROCm))"
)
# Not a lack of memory, nor a disk that fails.
_OF_MODEL = re.compile(
    r"error loading model(?!: (?:unable to allocate|mmap failed|std::bad_alloc|read error))"
    r"|\bllama-model\.cpp\b"
)
_SHELL_SIGNALLED = 128
# By whether the system killed a process for lack of memory meanwhile.
_ENDINGS_BY_KILL = {None: "killed", True: "killed_for_memory", False: "killed_by_hand"}

# Sent from outside, so the log doesn't explain them.
FROM_OUTSIDE = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}
_FILE = Path(__file__).with_name("signatures.toml")


@cache
def read_signatures() -> dict[str, Any]:
    """Read the tables, once an exit has to be diagnosed."""
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The cause of a server's exit, and the remedy; `str` returns all of it in one line."""

    ending: str  # how it ended, e.g. `ended with exit code 1` or `was killed by SIGKILL`
    cause: str  # what that means, in a sentence
    remedy: str  # what to do, in a sentence
    # The lines of the log that prove it, without the engine's timestamps; at most 5.
    evidence: tuple[str, ...]
    # Whether starting again would end the same way: yes for a bad file or flag; no for a crash, a
    # kill, a lack of memory or an unknown ending.
    repeats: bool = False
    of_port: bool = False  # whether another program, which the log doesn't name, may have its port

    def __str__(self) -> str:
        proof = f": {_sentence(self.evidence[0])}" if self.evidence else "."
        return f"The server {self.ending}{proof} {self.cause} {self.remedy}".rstrip()

    @property
    def blames_model(self) -> bool:
        """True if it was the model that llama.cpp could not load."""
        return any(_OF_MODEL.search(line) for line in self.evidence)


def diagnose(
    exit_code: int | None, log: Sequence[str], *, out_of_memory: bool | None = None
) -> Diagnosis:
    """Diagnose why a server exited, and what to do.

    Args:
        exit_code: As a subprocess reports it, negative for a signal; None for an adopted server,
            whose exit code the system reports only to its parent.
        log: The last lines that the server wrote.
        out_of_memory: Whether the system killed a process for lack of memory meanwhile, see
            `kitty_nb.supervisor.process`; None if it doesn't report that.
    """
    number = _signal(exit_code)
    ending = _ending(exit_code, number)
    log = [line for line in log if not _OF_CHILD.match(line)]
    loaded = max((at for at, line in enumerate(log) if _LOADED.search(line)), default=-1)
    if number is signal.SIGKILL:
        return _diagnosis(ending, _ENDINGS_BY_KILL[out_of_memory])
    if number in FROM_OUTSIDE:
        return _diagnosis(ending, "stopped")
    # A script around the server may exit with 0 whatever happened.
    if not exit_code and not any("exiting due to" in line for line in log):
        if any("cleaning up before exit" in line for line in log):
            return _diagnosis(ending, "stopped")
        if exit_code == 0:
            served = loaded >= 0 or any(map(_CLOCK.match, log))
            return _diagnosis(ending, "stopped" if served else "no_server")
    near = log[max(loaded + 1, len(log) - _LAST) :] if loaded >= 0 else log
    lines = [line for line in near if _may_tell(line)]
    if known := _known(ending, lines):
        return known
    signals = read_signatures()["signal"]
    if number and number.name in signals:
        return _diagnosis(ending, signals[number.name])
    if exit_code is None and out_of_memory:
        return _diagnosis(ending, "killed_for_memory")
    return _diagnosis(ending, "unknown", _errors(lines, last=loaded >= 0))


def failed_by_itself(exit_code: int | None) -> bool:
    """Return whether a server exited for no reason from outside; False if nobody knows its code."""
    number = _signal(exit_code)
    return exit_code is not None and number not in FROM_OUTSIDE | {signal.SIGKILL}


def diagnose_first_answer(said: str, log: Sequence[str]) -> Diagnosis:
    """Diagnose why a server that has loaded its model fails its first request, and what to do."""
    ending = "loaded the model but failed its first request"
    lines = [said, *filter(_may_tell, log)]
    return _known(ending, lines) or _diagnosis(ending, "no_answer", (said,))


def diagnose_launch(error: OSError, log_dir: Path) -> Diagnosis:
    """Diagnose why a server's process could not even be started, and what to do.

    Args:
        error: The system's error. If it names no file, it is about one that was being written.
        log_dir: The folder of the server's log and record.
    """
    said = error.strerror or str(error)
    path = Path(os.fsdecode(error.filename2 or error.filename or log_dir))
    name, tables = errno.errorcode.get(error.errno or 0, ""), read_signatures()
    row, file = tables["launch"].get(name, tables["ending"]["unknown_refusal"]), str(path)
    near_logs = path.is_relative_to(log_dir) or log_dir.is_relative_to(path)
    if near_logs and name in tables["log_folder"]:
        row, file = tables["log_folder"][name], str(log_dir)
    return _diagnosis("could not be started", row, (f"{said}: {file}",), file=file)


def _known(ending: str, lines: Sequence[str]) -> Diagnosis | None:
    """Return what the lines prove, if one of them matches a signature."""
    bare = [_CLOCK.sub("", line[:_LOOKED_AT]).rstrip() for line in lines]
    for row in read_signatures()["signature"]:
        pattern = re.compile("|".join(row["patterns"]))
        if found := [match for line in bare if (match := pattern.search(line))]:
            groups = {name: value or "" for name, value in found[0].groupdict().items()}
            return _diagnosis(ending, row, (match.string for match in found), **groups)
    return None


def _diagnosis(ending: str, row: Row, evidence: Iterable[str] = (), **found: str) -> Diagnosis:
    """Return the diagnosis in a row; `found` fills the braces in its cause."""
    told = dict(read_signatures()["ending"][row] if isinstance(row, str) else row)
    told.pop("patterns", None)
    # The trial fit logs the same lines as the load, once more.
    lines = (re.sub(r"\s*\n\s*", " ", line)[:_LENGTH] for line in evidence)
    distinct = tuple(dict.fromkeys(lines))[:_LINES]
    if found:
        told["cause"] = told["cause"].format_map(found)
    return Diagnosis(ending, evidence=distinct, **told)


def _signal(exit_code: int | None) -> signal.Signals | None:
    """Return the signal that ended it, even if a script around the server passed that on."""
    code = exit_code or 0
    try:
        return signal.Signals(code - _SHELL_SIGNALLED if code > _SHELL_SIGNALLED else -code)
    except ValueError:
        return None


def _ending(exit_code: int | None, number: signal.Signals | None) -> str:
    if exit_code is None:
        return "ended"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}" + (f" ({number.name})" if number else "")
    return f"was killed by {number.name if number else f'signal {-exit_code}'}"


def _may_tell(line: str) -> bool:
    """Return whether the engine itself calls a line neither a warning nor information."""
    clock = _CLOCK.match(line)
    return clock is None or clock["level"] == "E"


def _errors(lines: Sequence[str], *, last: bool) -> list[str]:
    """Return the lines that mention errors: all of them while loading, only the last one after."""
    errors = [line for line in lines if _CLOCK.match(line) or _ERROR.search(line)]
    telling = [line for line in errors if not _GENERIC.search(line)] or errors
    return [_CLOCK.sub("", line).strip() for line in (telling[-1:] if last else telling)]


def _sentence(line: str) -> str:
    text = " ".join(line.split())  # the engine aligns its words in columns
    return text if text.endswith((".", "!", "?")) else f"{text}."
