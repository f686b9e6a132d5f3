"""The server's log file, read as it grows."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_BYTES_PER_READ = 1 << 18
_LONGEST_LINE = 1 << 14
_FARTHEST_BEHIND = 1 << 22


def rotate(path: Path, kept: int) -> None:
    """Make room for a log: its folder exists, and the previous one is kept as `<name>.1`.

    Args:
        path: The log.
        kept: How many previous ones are kept.

    Raises:
        OSError: When the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _shift(path, kept)
    with suppress(FileNotFoundError):
        path.replace(previous(path))


def shrink(path: Path, limit: int, kept: int) -> None:
    """Empty a log that has become too large, keeping what was in it as `<name>.1`.

    Its writer goes on in the same file: what it writes between copy and cut is lost. A copy that
    cannot be made, because the disk is full, is done without.

    Args:
        path: The log, which its writer appends to.
        limit: The size, in bytes, up to which it is left alone.
        kept: How many previous ones are kept.
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
    """Name the log before a log, or an older one."""
    return path.with_name(f"{path.name}.{age}")


def _shift(path: Path, kept: int) -> None:
    for age in range(kept - 1, 0, -1):
        with suppress(FileNotFoundError):
            previous(path, age).replace(previous(path, age + 1))


def _stamp(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


class LogTail:
    """Reads the lines that come to a log file. A context manager: it holds the file open.

    Each read is bounded, so that a flood costs the reader neither memory nor its turn: too far
    behind, it skips ahead and says so; a line without end is cut. A log that was emptied is read
    on from where it was copied to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # Made anew where somebody has deleted it: no reason to leave a server unwatched.
            self._file: BinaryIO = path.open("a+b")
        except PermissionError:
            self._file = path.open("rb")
        self._file.seek(0)
        self._rest = b""
        self._aside = _stamp(previous(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, *, to_end: bool = False) -> tuple[str, ...]:
        """Return the whole lines that have come since the last read.

        Args:
            to_end: The writer has ended: an unfinished last line counts too.
        """
        notes: list[str] = []
        position, end = self._file.tell(), self._file.seek(0, os.SEEK_END)
        if end < position:  # emptied by the keeper, or by logrotate's `copytruncate`
            missed = self._cut_off(position)
            if missed is None:
                notes.append("… the log was emptied …")
            self._rest = b"" if missed is None else self._rest + missed
            position = 0
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

    def _cut_off(self, position: int) -> bytes | None:
        """What was written behind our position before the log was emptied, if it was kept."""
        before, self._aside = self._aside, _stamp(previous(self._path))
        if self._aside == before:  # emptied by hand: what is kept is another server's
            return None
        try:
            with previous(self._path).open("rb") as file:
                if file.seek(0, os.SEEK_END) < position:
                    return None
                file.seek(position)
                return file.read(_BYTES_PER_READ)
        except OSError:
            return None
