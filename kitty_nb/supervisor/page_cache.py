"""How much of some files the system already holds in memory, by `mincore`.

A load whose pages are cached is ten times as fast as one from disk, so an estimate needs to know.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

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
