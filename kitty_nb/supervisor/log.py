"""A server's log file: written, rotated, followed and made readable."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import anyio

from kitty_nb.errors import KittyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


_POLL = 0.1  # seconds between reads of a log that is followed
_BYTES_PER_READ = 1 << 18
_LONGEST_LINE = 1 << 14
_FARTHEST_BEHIND = 1 << 22


def rotate(path: Path, kept: int) -> None:
    """Make room for a log: create its folder, and keep the previous log as `<name>.1`.

    Raises:
        OSError: The folder can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _shift(path, kept)
    with suppress(FileNotFoundError):
        path.replace(previous(path))


def shrink(path: Path, limit: int, kept: int) -> None:
    """Empty a log that is larger than `limit` bytes, keeping what was in it as `<name>.1`.

    Its writer, which appends to it, continues in the same file: what it writes between copying and
    truncation is lost. If the disk is too full for a copy, none is kept.
    """
    with suppress(OSError):
        if path.stat().st_size <= limit:
            return
        try:
            _shift(path, kept)
            shutil.copyfile(path, previous(path))
        except OSError:
            with suppress(OSError):
                previous(path).unlink()
        os.truncate(path, 0)


def previous(path: Path, age: int = 1) -> Path:
    """Return the path of the log before a log, or of an older one."""
    return path.with_name(f"{path.name}.{age}")


def _shift(path: Path, kept: int) -> None:
    for age in range(kept - 1, 0, -1):
        with suppress(FileNotFoundError):
            previous(path, age).replace(previous(path, age + 1))


class LogTail:
    """Reads the lines that are added to a log file. A context manager: it keeps the file open.

    Each read is bounded, so that a flood costs the reader neither memory nor its turn: if too far
    behind, it skips ahead and says so; an endless line is cut.
    """

    def __init__(self, path: Path) -> None:
        try:
            # Created again if somebody deleted it: no reason to leave a server unwatched.
            self._file = path.open("a+b", buffering=0)  # a buffer's end can fail as a read can
        except PermissionError:
            self._file = path.open("rb", buffering=0)
        self._file.seek(0)
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, *, to_end: bool = False) -> tuple[str, ...]:
        """Return the whole lines added since the last read.

        Once the writer has exited, read `to_end`: an unfinished last line counts too.
        """
        notes: list[str] = []
        position, end = self._file.tell(), self._file.seek(0, os.SEEK_END)
        if end < position:  # emptied by the sidecar, or by logrotate's `copytruncate`
            notes.append("… the log was rotated …")
            position, self._rest = 0, b""
        if end - position > _FARTHEST_BEHIND:
            notes.append(f"… {end - position - _BYTES_PER_READ:,} bytes skipped …")
            position, self._rest = end - _BYTES_PER_READ, b""
        self._file.seek(position)
        data = self._rest + self._file.read(_BYTES_PER_READ)
        lines = data.split(b"\n")
        self._rest = lines.pop()
        if self._rest and (to_end or len(self._rest) > _LONGEST_LINE):
            lines.append(self._rest)
            self._rest = b""
        texts = (line[:_LONGEST_LINE].decode("utf-8", "replace").rstrip("\r") for line in lines)
        return (*notes, *texts)


_LETTERS = {"debug": "D", "info": "I", "warn": "W", "error": "E"}


def readable(line: str) -> str:
    """Return one line of a server's log in a form for people.

    A structured line becomes what llama-server writes without structured logging,
    `minutes.seconds.ms.us LEVEL message`, so that all other code knows only one format. Any other
    line is unchanged.
    """
    if not line.startswith("{"):
        return line
    try:
        entry = json.loads(line)
        match entry:
            case {"type": "log", "time": int(time), "level": level, "msg": str(message)}:
                return f"{_clock(time)} {_LETTERS.get(level, 'I')} {message.rstrip()}"
            case {"type": "fit_memory_breakdown", "data": {"unit": unit, "rows": rows}}:
                return "; ".join(_memory(row, unit) for row in rows)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # a cut line, or one that is not meant to be structured
    return line


def _clock(microseconds: int) -> str:
    seconds, rest = divmod(microseconds, 1_000_000)
    return f"{seconds // 60}.{seconds % 60:02}.{rest // 1000:03}.{rest % 1000:03}"


def _memory(row: dict[str, Any], unit: str) -> str:
    parts = ", ".join(f"{part} {row[part]}" for part in ("model", "context", "compute"))
    return f"memory on {row['name']} in {unit}: {parts}"


def has_log(path: Path) -> bool:
    """Return whether there is a log.

    Raises:
        KittyError: It can't be read.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise KittyError(
            f"Can't read the log {path} ({error.strerror}). Check LLAMACPP_LOG_DIR and the"
            " permissions of the file and its folder."
        ) from None
    return True


def log_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a log, without the beginning of a very long one.

    Raises:
        KittyError: There is none, or it can't be read.
    """
    if not has_log(path):
        raise KittyError(f"There is no log {path}: no server of this profile has been started yet.")
    with LogTail(path) as log:
        yield from _drain(log, to_end=True)


def last_written(path: Path, count: int) -> tuple[tuple[str, ...], float]:
    """Return the last lines of a log, and their age in seconds; none if it can't be read."""
    with suppress(OSError, KittyError):
        return tuple(deque(log_lines(path), maxlen=count)), time.time() - path.stat().st_mtime
    return (), 0.0


async def follow_log(path: Path, show: Callable[[str], object], last: int | None = None) -> None:
    """Show what is written to a log, and to the one that replaces it, until cancelled.

    The log need not exist yet. Its `last` lines so far are shown first; None shows all.

    Raises:
        KittyError: The log can't be read.
    """
    while True:
        if has_log(path):
            with LogTail(path) as log:
                number, replaced = _inode(path), False
                while not replaced:
                    replaced = _inode(path) != number  # checked first, so that no line is missed
                    for line in deque(_drain(log, to_end=replaced), maxlen=last):
                        show(line)
                    last = None
                    await anyio.sleep(_POLL)
        await anyio.sleep(_POLL)


def _drain(log: LogTail, *, to_end: bool) -> Iterator[str]:
    while lines := log.read():
        yield from map(readable, lines)
    if to_end:
        yield from map(readable, log.read(to_end=True))


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None
