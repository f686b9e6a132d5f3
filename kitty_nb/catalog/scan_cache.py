"""What was read of files, kept in a SQLite file, so that no unchanged one is read twice.

The file is a convenience: whatever is wrong with it costs the time to read again, and nothing else.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Generic, TypeVar

import platformdirs

from kitty_nb.catalog.file_facts import FileFacts
from kitty_nb.catalog.folder import Stamp
from kitty_nb.trust import distrust
from kitty_nb.user_folders import NO_HOME, user_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

__all__ = ["DigestCache", "FileCache", "ScanCache", "Stamp"]

T = TypeVar("T")

# One higher whenever `FileFacts` changes or is worked out otherwise: older rows are read again.
_FACTS_VERSION = 4
_DIGESTS_VERSION = 1
_BUSY_SECONDS = 0.2
_ROWS_KEPT = 20_000
_DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}
_CREATE = """
    CREATE TABLE files (
        path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, facts TEXT
    )
"""
_FORGET = "DELETE FROM files WHERE rowid <= (SELECT max(rowid) FROM files) - ?"

_log = logging.getLogger(__name__)


class FileCache(Generic[T]):
    """Remembers something about files by path, size, time of change and inode. It never raises.

    Args:
        path: The SQLite file; it and its folder are made when first needed.
        version: One higher whenever what is remembered changes or is worked out otherwise.
        load: Reads from text what is remembered; its ValueError and TypeError mean damage.
        dump: Writes it as text.
    """

    def __init__(
        self, path: Path, version: int, load: Callable[[str], T], dump: Callable[[T], str]
    ) -> None:
        self._path = path
        self._version = version
        self._load = load
        self._dump = dump

    def recall(self, stamps: Mapping[str, Stamp]) -> dict[str, T]:
        """Return what is known of those files that have not changed since."""
        if not self._path.exists():
            return {}
        known: dict[str, T] = {}
        try:
            with closing(self._connect()) as files:
                for path, *stamp, facts in files.execute(
                    "SELECT path, size, mtime_ns, inode, facts FROM files"
                ):
                    name = os.fsdecode(path)
                    if stamps.get(name) == tuple(stamp):
                        known[name] = self._load(facts)
        except (sqlite3.Error, OSError, TypeError, ValueError) as error:
            self._complain(error)
        return known

    def keep(
        self, read: Mapping[str, tuple[Stamp, T]], gone_from: Iterable[str], there: set[str]
    ) -> None:
        """Write what was read, and forget files that are gone.

        Args:
            read: Facts by path.
            gone_from: Folders of which all files are known: others in them are forgotten.
            there: Paths of the files that are there.
        """
        if self._path.is_relative_to(NO_HOME):
            return
        folders = tuple(os.path.join(folder, "") for folder in gone_from)  # noqa: PTH118 - text
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as files, files:
                paths = (os.fsdecode(path) for (path,) in files.execute("SELECT path FROM files"))
                gone = [path for path in paths if path.startswith(folders) and path not in there]
                files.executemany(
                    "DELETE FROM files WHERE path = ?", ((os.fsencode(path),) for path in gone)
                )
                files.executemany(
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
                    (
                        (os.fsencode(path), *stamp, self._dump(facts))
                        for path, (stamp, facts) in read.items()
                    ),
                )
                files.execute(_FORGET, (_ROWS_KEPT,))
        except (sqlite3.Error, OSError, TypeError, ValueError) as error:
            self._complain(error)

    def _connect(self) -> sqlite3.Connection:
        if reason := distrust(self._path, folders=False):
            raise PermissionError(reason.rstrip("."))
        files = sqlite3.connect(self._path, timeout=_BUSY_SECONDS)
        try:
            (version,) = files.execute("PRAGMA user_version").fetchone()
            if version > self._version:
                raise sqlite3.NotSupportedError("a newer version of kitty_nb has written it")
            if version < self._version:
                with files:
                    files.execute("DROP TABLE IF EXISTS files")
                    files.execute(_CREATE)
                    files.execute(f"PRAGMA user_version = {self._version}")
            files.execute("PRAGMA synchronous = OFF")  # what a power cut costs is read again
        except BaseException:
            files.close()
            raise
        return files

    def _complain(self, error: Exception) -> None:
        """Say what is wrong; what is damaged is removed, so that it is begun anew."""
        code = getattr(error, "sqlite_errorcode", 0)
        damaged = code & 0xFF in _DAMAGED or not isinstance(error, sqlite3.Error | OSError)
        fate = "It is begun anew." if damaged else "All goes on without it, more slowly."
        _log.warning("The cache %s is not used: %s. %s", self._path, error, fate)
        if damaged:
            try:
                self._path.unlink(missing_ok=True)
            except OSError as failure:
                _log.warning("%s cannot be removed: %s. Delete it.", self._path, failure)


class ScanCache(FileCache[FileFacts]):
    """Remembers what models say about themselves."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _FACTS_VERSION, FileFacts.from_json, FileFacts.to_json)


class DigestCache(FileCache[str]):
    """Remembers the SHA-256 of whole files, in hexadecimal digits."""

    def __init__(self) -> None:
        path = user_folder(platformdirs.user_cache_path) / "digests.sqlite3"
        super().__init__(path, _DIGESTS_VERSION, str, str)
