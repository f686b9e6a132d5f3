"""Folders of model files, and the cache of what was read from them."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import platformdirs

from kitty_nb.catalog.model import FileFacts
from kitty_nb.safe_files import NO_HOME, distrust, user_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping


# What programs append to a name while they download: browsers, LM Studio, llama.cpp, the Hub's
# client, aria2.
_UNFINISHED = (
    ".part", ".partial", ".incomplete", ".downloadinprogress", ".crdownload", ".opdownload",
    ".download", ".aria2",
)  # fmt: skip
_FILLING = ".aria2"  # beside a file that has its full length from the beginning
_LM_STUDIO = "downloading_"
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system, FAT's


class Stamp(NamedTuple):
    """A file's signature: another one once the file has changed.

    Attributes:
        size: Its bytes.
        mtime_ns: When it was last written, in nanoseconds since the epoch.
        inode: Its number in the file system.
    """

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that looks like a model by its name.

    Attributes:
        path: Where it is, or will be.
        stamp: What tells whether it has changed; None when it is not there (yet).
        downloading: Bytes that have come so far, while it is on its way; None otherwise.
        known_as: What the store that has it calls it; None where the file's name says it.
        repository: The Hub repository it is from, e.g. `Qwen/Qwen2.5-7B-Instruct-GGUF`.
        projector: The projector that the store keeps for it.
        problem: What is wrong with it beyond what it says itself.
        filling: Whether what comes is written into the file itself, which has its full length.
    """

    path: Path
    stamp: Stamp | None
    downloading: int | None = None
    known_as: str | None = None
    repository: str | None = None
    projector: Path | None = None
    problem: str | None = None
    filling: bool = False


def find_files(directory: Path) -> list[FoundFile]:
    """List a folder's GGUF files and those of the folders below it, by path.

    Names that begin with a dot are passed over: they are other programs' business. So are folders
    that may not be read, and links that lead back up.
    """
    files: dict[str, Stamp | None] = {}
    unfinished: dict[str, int] = {}
    filling: set[str] = set()
    for entry in _entries(str(directory)):
        target = _target(entry.path)
        if target is not None:
            stamp = stamp_of(entry)
            unfinished[target] = unfinished.get(target, 0) + (stamp.size if stamp else 0)
            if entry.path.lower().endswith(_FILLING):
                filling.add(target)
        else:
            files[entry.path] = stamp_of(entry)
    return [
        FoundFile(Path(path), files.get(path), unfinished.get(path), filling=path in filling)
        for path in sorted(files.keys() | unfinished.keys())
    ]


def stamp_of(entry: os.DirEntry[str] | Path) -> Stamp | None:
    """Read a file's stamp; None when it is not there or may not be looked at."""
    try:
        status = entry.stat()
    except OSError:
        return None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


def is_folder(entry: os.DirEntry[str] | Path) -> bool:
    """Tell whether there is a folder that may be looked at."""
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or in a folder that may not be entered
        return False


def settled(path: Path, stamp: Stamp) -> bool:
    """Tell whether a file is as it was, and its stamp will change if the file does."""
    return stamp_of(path) == stamp and not too_young(stamp)


def too_young(stamp: Stamp) -> bool:
    """Tell whether a file could change now and its stamp stay the same."""
    return abs(time.time_ns() - stamp.mtime_ns) <= _SETTLED_NS


def _entries(directory: str) -> Iterator[os.DirEntry[str]]:
    """Walk through each folder once, by links only to what is not reached without them."""
    seen: set[tuple[int, int]] = set()
    folders, links = [directory], list[str]()
    while folders or links:
        folder = (folders or links).pop()
        try:
            status = os.stat(folder)  # noqa: PTH116 - a thousand paths need not become objects
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as scanned:
                entries = list(scanned)
        except OSError:
            continue
        for entry in entries:
            name = entry.name.lower()
            if name.startswith("."):
                continue
            if ".gguf" in name and name.endswith(_UNFINISHED):
                yield entry
            elif is_folder(entry):
                (links if entry.is_symlink() else folders).append(entry.path)
            elif name.endswith(".gguf"):
                yield entry


def _target(path: str) -> str | None:
    """Tell which file an unfinished download becomes; None when it is none."""
    stem = path
    while stem.lower().endswith(_UNFINISHED):
        stem = stem[: stem.rindex(".")]
    if stem == path:
        return None
    folder, name = os.path.split(stem)
    name = name.removeprefix(_LM_STUDIO)
    cut = name.lower().index(".gguf") + len(".gguf")  # the Hub's client puts a hash after it
    return os.path.join(folder, name[:cut])  # noqa: PTH118 - text


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
