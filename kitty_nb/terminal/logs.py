"""A server's log, printed."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio

from kitty_nb.errors import KittyError
from kitty_nb.supervisor.file_changes import FileChanges
from kitty_nb.supervisor.log_file import LogTail
from kitty_nb.supervisor.log_text import readable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_ROTATION = 0.5  # seconds until a log that was replaced is noticed


def has_log(path: Path) -> bool:
    """Say whether there is a log.

    Raises:
        KittyError: It may not be read.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise KittyError(
            f"The log {path} cannot be read ({error.strerror}). Correct LLAMACPP_LOG_DIR, or its"
            " rights and those of the folders above it."
        ) from None
    return True


def log_lines(path: Path) -> Iterator[str]:
    """Yield what a log holds; the beginning of a very long one is left out.

    Raises:
        OSError: It cannot be read.
    """
    with LogTail(path) as log:
        yield from _drain(log, to_end=True)


async def follow_log(path: Path, show: Callable[[str], object], last: int | None = None) -> None:
    """Show what comes to a log, and to the one that replaces it, until cancelled.

    Args:
        path: The log; it need not exist yet.
        show: Called with each line.
        last: How many lines of what is there already to begin with; None for all.
    """
    while True:
        with suppress(FileNotFoundError), LogTail(path) as log, FileChanges(path) as changes:
            number = _inode(path)
            replaced = False
            while not replaced:
                replaced = _inode(path) != number  # asked first, so that no last line is missed
                for line in deque(_drain(log, to_end=replaced), maxlen=last):
                    show(line)
                last = None
                with anyio.move_on_after(_ROTATION):
                    await changes.wait()
        await anyio.sleep(_ROTATION)


def _drain(log: LogTail, *, to_end: bool) -> Iterator[str]:
    while lines := log.read():
        yield from map(readable, lines)
    if to_end:
        yield from map(readable, log.read(to_end=True))


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
