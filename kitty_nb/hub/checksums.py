"""Whether files in place are what the Hub says: each is read once for as long as it stays."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from anyio.to_thread import run_sync

from kitty_nb.catalog.folder import settled, stamp_of
from kitty_nb.catalog.scan_cache import DigestCache

if TYPE_CHECKING:
    from collections.abc import Callable
    from hashlib import _Hash

    from kitty_nb.catalog.scan_cache import Stamp
    from kitty_nb.hub.offers import HubFile

__all__ = ["Checksums", "begin"]

_SHA256_DIGITS = 64
_PIECE = 16 << 20  # bytes


def begin(checksum: str, size: int) -> _Hash:
    """Return what works out such a checksum, of a file of this size.

    Args:
        checksum: As `HubFile.checksum`.
        size: Bytes.
    """
    if len(checksum) == _SHA256_DIGITS:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


class Checksums:
    """What is known of files in place, and what one download finds out."""

    def __init__(self) -> None:
        self._cache = DigestCache()
        self._found: dict[str, tuple[Stamp, str]] = {}

    async def match(self, path: Path, file: HubFile, tell: Callable[[int], object]) -> bool:
        """Whether a file in place is the one in the repository.

        Args:
            path: Where it is.
            file: What it should be.
            tell: Called with the bytes of each piece that is there, and with a minus where they do
                not count after all.
        """
        stamp = await run_sync(stamp_of, path)
        if stamp is None:
            return False
        name = _name(path)
        known = (await run_sync(self._cache.recall, {name: stamp})).get(name)
        if known and len(known) == len(file.checksum):
            tell(file.size if known == file.checksum else 0)
            return known == file.checksum
        hashed, count = begin(file.checksum, file.size), 0
        async with await anyio.open_file(path, "rb") as opened:
            while data := await opened.read(_PIECE):
                await run_sync(hashed.update, data)
                tell(len(data))
                count += len(data)
        self._note(name, stamp, hashed.hexdigest())
        if hashed.hexdigest() == file.checksum:
            return True
        tell(-count)
        return False

    def came(self, path: Path, file: HubFile) -> None:
        """Note a file that was put in place just now. It blocks."""
        if stamp := stamp_of(path):
            self._note(_name(path), stamp, file.checksum)

    def keep(self) -> None:
        """Remember what was found, but for files that could change unnoticed yet. It blocks."""
        found = {
            name: (stamp, checksum)
            for name, (stamp, checksum) in self._found.items()
            if settled(Path(name), stamp)
        }
        if found:
            self._cache.keep(found, (), set())

    def _note(self, name: str, stamp: Stamp, checksum: str) -> None:
        if len(checksum) == _SHA256_DIGITS:
            self._found[name] = stamp, checksum


def _name(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - links stay links
