"""The files in a folder that are GGUF by name, those that are still on their way included."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FoundFile", "find_files", "is_folder"]

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
