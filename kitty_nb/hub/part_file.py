"""A file that is on its way: kept for resuming, checked, and only then put in place."""

from __future__ import annotations

import fcntl
import glob
import os
from typing import TYPE_CHECKING, Self

from kitty_nb.errors import ChecksumError, HubError
from kitty_nb.hub.checksums import begin

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

__all__ = ["PartFile"]

_READ_BACK = 16 << 20  # bytes


class PartFile:
    """Beside `model.gguf`, `model.gguf.<checksum>.incomplete`, which the catalog knows.

    One program at a time writes it. All methods block; a context manager.

    Args:
        target: The file that it becomes.
        size: Bytes of the whole file.
        checksum: As `HubFile.checksum`.

    Attributes:
        there: Bytes that are there and have been counted into the checksum.
    """

    def __init__(self, target: Path, size: int, checksum: str) -> None:
        self.path = target.with_name(f"{target.name}.{checksum[:12]}.incomplete")
        self.target, self.size, self.checksum = target, size, checksum
        self.there = 0

    def __enter__(self) -> Self:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            self._lock()
        except BaseException:
            self._file.close()
            raise
        for stale in self._parts():
            if stale != self.path:
                stale.unlink(missing_ok=True)
        self._file.seek(0)
        self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()

    def read_back(self) -> int:
        """Count the next piece of what was there; return its bytes, 0 in the end."""
        data = self._file.read(_READ_BACK)
        self._count(data)
        return len(data)

    def append(self, data: bytes) -> None:
        """Write what comes next."""
        self._file.write(data)
        self._file.flush()
        self._count(data)

    def restart(self) -> None:
        """Forget what is there."""
        self._file.seek(0)
        self._file.truncate()
        self._begin()

    def finish(self) -> None:
        """Put the file in place.

        Raises:
            ChecksumError: It is not what the Hub says; it is deleted.
        """
        if self.there != self.size or self._hash.hexdigest() != self.checksum:
            self.path.unlink(missing_ok=True)
            raise ChecksumError(
                f"What came as {self.target.name} is not what the Hub says it is: the checksum is"
                " another one. It was deleted; try again. Should it happen again, something"
                " between here and the Hub changes what it passes on."
            )
        os.fsync(self._file.fileno())
        self.path.replace(self.target)

    def discard(self) -> None:
        """Delete what is left of downloads of a file that is in place; it is not entered for that.

        Raises:
            HubError: Another program is at it.
        """
        if any(self._parts()):
            with self:
                self.path.unlink()

    def _parts(self) -> list[Path]:
        return [*self.target.parent.glob(f"{glob.escape(self.target.name)}.*.incomplete")]

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = self.path.exists() and os.path.samestat(
                os.fstat(self._file.fileno()), self.path.stat()
            )
        except BlockingIOError:
            ours = False
        if not ours:
            raise HubError(
                f"{self.target.name} is being downloaded already, by another panel or program."
                " Wait for it, or cancel it there."
            )

    def _begin(self) -> None:
        self.there = 0
        self._hash = begin(self.checksum, self.size)

    def _count(self, data: bytes) -> None:
        self._hash.update(data)
        self.there += len(data)
