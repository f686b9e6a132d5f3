"""A cache of facts about files, valid until the files change: header facts and SHA-256."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import platformdirs
from anyio.from_thread import check_cancelled

from kitty_nb.errors import ModelFileError
from kitty_nb.safe_files import Database, user_folder

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping

T = TypeVar("T")

_FRESH_NS = 2_000_000_000  # the coarsest clock of a file system, FAT's
_LARGEST = (1 << 63) - 1  # SQLite's; inode numbers of some file systems, such as CIFS, exceed it
_MAX_ROWS = 20_000
_TABLES = (
    "DROP TABLE IF EXISTS files",
    """CREATE TABLE files (
        kind TEXT, path BLOB, size INTEGER, mtime_ns INTEGER, inode INTEGER, facts TEXT,
        PRIMARY KEY (kind, path)
    )""",
)
_RECALL = "SELECT path, size, mtime_ns, inode, facts FROM files WHERE kind = ?"
_FORGET = "DELETE FROM files WHERE rowid <= (SELECT max(rowid) FROM files) - ?"
_STEP = 1 << 24  # bytes, about a hundredth of a second of hashing

_log = logging.getLogger(__name__)


class FileSignature(NamedTuple):
    """The parts of a file's status that change with it."""

    size: int
    mtime_ns: int  # when it was last written, in nanoseconds since the epoch
    inode: int  # its number in the file system

    def lasting(self, path: Path) -> bool:
        """Tell whether a file still has this signature, and gets another when it changes."""
        # Written a moment ago, it could change now without changing its signature.
        fresh = abs(time.time_ns() - self.mtime_ns) <= _FRESH_NS
        return not fresh and signature_of(path) == self


def signature_of(path: Path) -> FileSignature | None:
    """Return a file's signature; None if the file is missing or inaccessible."""
    try:
        status = path.stat()
    except OSError:
        return None
    return FileSignature(
        status.st_size, min(status.st_mtime_ns, _LARGEST), status.st_ino & _LARGEST
    )


class FileCache(Generic[T]):
    """A cache of one kind of facts about files, by path and signature. It never raises.

    Args:
        kind: The name and version of the facts, e.g. `facts 6`; change it whenever they, or the way
            they are computed, change.
        load: Parses the output of `dump`; ValueError and TypeError mean that it is damaged.
        dump: Writes a fact as text.
        path: The SQLite file, created on first use; None for one in the user's cache folder.
    """

    def __init__(
        self,
        kind: str,
        load: Callable[[str], T],
        dump: Callable[[T], str],
        path: Path | None = None,
    ) -> None:
        self._kind, self._load, self._dump = kind, load, dump
        self._files = Database(
            path or user_folder(platformdirs.user_cache_path) / "files.sqlite3",
            "The cache",
            "Everything works without it, but slower.",
            _log.warning,
            _TABLES,
        )

    def recall(self, signatures: Mapping[str, FileSignature]) -> dict[str, T]:
        """Return the cached facts of the files that have not changed since."""

        def read(files: sqlite3.Connection) -> dict[str, T]:
            known: dict[str, T] = {}
            for path, *signature, facts in files.execute(_RECALL, (self._kind,)):
                with suppress(TypeError, ValueError):  # damaged: read and written again
                    name = os.fsdecode(path)
                    if signatures.get(name) == tuple(signature):
                        known[name] = self._load(facts)
            return known

        return self._files.use(read, {})

    def keep(self, read: Mapping[str, tuple[FileSignature, T]]) -> None:
        """Write what was read, by path, of files that have not changed meanwhile.

        What was written longest ago makes room.
        """
        rows = [
            (self._kind, os.fsencode(path), *signature, self._dump(facts))
            for path, (signature, facts) in read.items()
            if signature.lasting(Path(path))
        ]

        def write(files: sqlite3.Connection) -> None:
            files.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", rows)
            files.execute(_FORGET, (_MAX_ROWS,))

        if rows:
            self._files.use(write, None)


def digest_cache() -> FileCache[str]:
    """Return the cache of the SHA-256 of whole files, in hexadecimal digits."""
    return FileCache("sha256 1", str, str)


@dataclass(frozen=True, slots=True)
class FileDigest:
    """The identity of a file, whatever its folder."""

    name: str
    size: int
    sha256: str  # of the whole file, in hexadecimal digits, as the Hugging Face Hub shows it


def digest_files(
    paths: tuple[Path, ...], on_progress: Callable[[int, int], object]
) -> tuple[FileDigest, ...]:
    """Compute the digests of files, in a worker thread of anyio.

    Files that have not changed since are not read again. When cancelled, it ends within hundredths
    of a second, and the digests of completely read files are cached. `on_progress` is called with
    the bytes read so far, and those to read in total.

    Raises:
        ModelFileError: A file is missing, can't be read, or changes meanwhile.
    """
    cache = digest_cache()
    names = [os.path.abspath(path) for path in paths]  # noqa: PTH100 - links stay links
    signatures: dict[str, FileSignature] = {}
    for name in names:
        if (signature := signature_of(Path(name))) is None:
            raise ModelFileError(
                f"{name} is missing, or its folder can't be read, so the model cannot be"
                " identified. Restore it, or check the permissions."
            )
        signatures[name] = signature
    known = cache.recall(signatures)
    total = sum(one.size for name, one in signatures.items() if name not in known)
    done = 0

    def read(count: int) -> None:
        nonlocal done
        check_cancelled()
        done += count
        on_progress(done, total)

    for name in [name for name in signatures if name not in known]:
        path, signature = Path(name), signatures[name]
        known[name] = _sha256(path, signature.size, read)
        if signature_of(path) != signature:
            raise ModelFileError(
                f"{path} changed while it was read. Wait until it is complete, and try again."
            )
        cache.keep({name: (signature, known[name])})
    return tuple(FileDigest(Path(name).name, signatures[name].size, known[name]) for name in names)


def _sha256(path: Path, size: int, on_read: Callable[[int], object]) -> str:
    digest, left = hashlib.sha256(), size
    try:
        with path.open("rb") as file:
            while data := file.read(min(_STEP, left)):
                digest.update(data)
                left -= len(data)
                on_read(len(data))
    except OSError as error:
        raise ModelFileError(
            f"Can't read {path}: {error.strerror or error}. Check the file's permissions and the"
            " disk."
        ) from error
    return digest.hexdigest()
