"""The files of a load: their sizes, and how much of them is in memory."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kitty_nb.catalog.gguf import read_header, read_layout
from kitty_nb.catalog.model import shard_paths
from kitty_nb.config import PROJECTOR, value_of
from kitty_nb.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kitty_nb.config import ServerConfig

    Mincore = Callable[[int, int, ctypes.Array[ctypes.c_char]], int]


# So many windows, spread evenly over all files, are looked at and not every page: a model of
# 400 GB has a hundred million. Files are read and dropped in long runs, so that is exact enough.
_WINDOWS = 24
_WINDOW = 1 << 19  # bytes; whole pages on every system
_NOT_RESIDENT = bytes(range(0, 256, 2))  # the lowest bit tells; macOS sets others too


def cached_share(paths: Sequence[Path]) -> float | None:
    """Measure the share of the files' bytes that are in the page cache, 0 to 1.

    It reads nothing, yet blocks for some milliseconds: call it in a worker thread.

    Returns:
        None where it cannot be told: a file cannot be opened, all are empty, the system has no
        `mincore`, or that would not be honest. Linux says "all of it" of a file that one neither
        owns nor may write (`can_do_mincore` in its mm/mincore.c).
    """
    mincore = _mincore()
    if mincore is None or not paths:
        return None
    total, cached = 0, 0.0
    for path in paths:
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() and not os.access(path, os.W_OK):
                    return None
                share = _share(mincore, file.fileno(), status.st_size, _WINDOWS // len(paths))
        except (OSError, ValueError):  # mmap calls it a ValueError when the file became shorter
            return None
        total += status.st_size
        cached += status.st_size * share
    return cached / total if total else None


def _share(mincore: Mincore, file: int, size: int, windows: int) -> float:
    starts = range(0, size, max(_WINDOW, size // max(windows, 1) // _WINDOW * _WINDOW))
    looked, resident = 0, 0
    for start in starts:
        length = min(_WINDOW, size - start)
        # A private copy, because ctypes takes the address of writable memory only; none is written.
        with mmap.mmap(file, length, offset=start, access=mmap.ACCESS_COPY) as window:
            pages = (ctypes.c_char * -(-length // mmap.PAGESIZE))()
            address = ctypes.c_char.from_buffer(window)
            failed = mincore(ctypes.addressof(address), length, pages)
            del address  # a window that is still pointed to cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed")
        looked += len(pages)
        resident += len(pages.raw.translate(None, _NOT_RESIDENT))
    return resident / looked if looked else 0.0


def _mincore() -> Mincore | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    return function


_DIGESTED = 1 << 18  # bytes of the header; two models that differ do so in there
_SETTINGS = {
    "context_size",
    "n_gpu_layers",
    "threads",
    "batch_size",
    "ubatch_size",
    "parallel",
    "flash_attention",
}


@dataclass(frozen=True, slots=True)
class LoadFacts:
    """A load, before it begins.

    Attributes:
        path: The model's file; of a split model the first.
        size: Bytes of all its files, a projector for images included.
        mtime_ns: When the first file was last changed, in nanoseconds since the epoch.
        digest: Hash of the first file's beginning.
        engine: Where the engine comes from; empty while it is not known.
        version: What the engine calls itself; empty while it is not known.
        host: The machine.
        settings: Those that make a load longer or shorter, as one comparable text.
        cached: Share of the bytes that are in the page cache, or None where it cannot be told.
    """

    path: str
    size: int
    mtime_ns: int
    digest: str
    engine: str
    version: str
    host: str
    settings: str
    cached: float | None


def gather_facts(config: ServerConfig) -> LoadFacts:
    """Look at the files of a load. It blocks: call it in a worker thread.

    Files that are not there, or cannot be read, count for nothing: the engine will say so.
    """
    sizes = {file: size for file in _files(config) if (size := _size(file))}
    files = tuple(sizes)
    cached = cached_share(files)  # first: reading the header changes it
    mtime_ns, digest = _fingerprint(files[0]) if files else (0, "")
    return LoadFacts(
        path=path_text(config.model),
        size=sum(sizes.values()),
        mtime_ns=mtime_ns,
        digest=digest,
        engine="",
        version="",
        host=this_host(),
        settings=_settings(config),
        cached=cached,
    )


def this_host() -> str:
    """Name the machine."""
    return f"{platform.node()} {platform.machine()}"


def path_text(model: Path | None) -> str:
    """Write a model's path as text; file names need not be text."""
    return os.fsencode(model).decode(errors="backslashreplace") if model else ""


def active_share(model: Path) -> float:
    """Return the share of the weights that a token passes through, by the model's header.

    Less than 1 for a mixture of experts; what all tokens share is left out of account.
    """
    try:
        header = read_header(model)
    except ModelFileError:
        return 1.0
    used, count = (
        header.metadata.get(f"{header.architecture}.{key}")
        for key in ("expert_used_count", "expert_count")
    )
    return used / count if isinstance(used, int) and isinstance(count, int) and count else 1.0


def header_bytes(model: Path) -> int:
    """Return the bytes before the weights; 0 where the file cannot be read."""
    try:
        return read_layout(model).data_at
    except ModelFileError:
        return 0


def _files(config: ServerConfig) -> Iterator[Path]:
    if config.model:
        yield from shard_paths(config.model)
    if config.projector:
        yield config.projector
    if named := value_of(config.extra_args, PROJECTOR):
        yield Path(named)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:
        return 0


def _fingerprint(file: Path) -> tuple[int, str]:
    try:
        with file.open("rb") as opened:
            digest = hashlib.blake2b(opened.read(_DIGESTED), digest_size=16).hexdigest()
        return file.stat().st_mtime_ns, digest
    except OSError:
        return 0, ""


def _settings(config: ServerConfig) -> str:
    settings = config.model_dump(mode="json", include=_SETTINGS, exclude_none=True)
    if config.extra_args:
        # Only a short hash, because an API key may be among them.
        words = hashlib.blake2b("\0".join(config.extra_args).encode(), digest_size=4)
        settings["extra_args"] = words.hexdigest()
    return json.dumps(settings, sort_keys=True)
