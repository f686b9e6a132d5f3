"""Waking when a file is written to, without asking again and again."""

from __future__ import annotations

import ctypes
import os
import select
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    # A file descriptor that becomes readable, and what empties it again.
    Notifier = tuple[int, Callable[[], object]]

_IN_MODIFY = 0x2  # inotify(7)
_POLL = 0.05  # seconds, where the system has nothing better or no more of it


class FileChanges:
    """Waits for writes to one file. A context manager: it holds file descriptors.

    Linux tells by inotify and macOS by kqueue; elsewhere, and where their limits are reached, a
    wait ends after a moment whether or not there was a write.
    """

    def __init__(self, path: Path) -> None:
        with ExitStack() as resources:
            self._notifier = _notifier(path, resources)
            self._resources = resources.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._resources.close()

    async def wait(self) -> None:
        """Return when the file has been written to since the last wait."""
        if self._notifier is None:
            await anyio.sleep(_POLL)
            return
        descriptor, drain = self._notifier
        await anyio.wait_readable(descriptor)
        drain()


def _notifier(path: Path, resources: ExitStack) -> Notifier | None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        descriptor: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:
            return None
        resources.callback(os.close, descriptor)
        if libc.inotify_add_watch(descriptor, os.fsencode(path), _IN_MODIFY) < 0:
            return None
        return descriptor, lambda: os.read(descriptor, 1 << 16)
    if sys.platform == "darwin":
        queue = select.kqueue()
        resources.callback(queue.close)
        file = os.open(path, os.O_EVTONLY)
        resources.callback(os.close, file)
        flags = select.KQ_EV_ADD | select.KQ_EV_CLEAR
        write = select.kevent(file, select.KQ_FILTER_VNODE, flags, select.KQ_NOTE_WRITE)
        queue.control([write], 0)
        return queue.fileno(), lambda: queue.control(None, 8, 0)
    return None
