"""A server that ends with its kernel, however that ends: killed, crashed or shut down.

The kernel holds one end of a pipe and a small program of its own holds the other. When the kernel
is gone the system closes its end, and the program ends the server. It is told which that is; of a
kernel that was killed before it could, the server is known by a mark in its environment.
"""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import psutil

from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.record_file import withdraw

if TYPE_CHECKING:
    from collections.abc import Sequence

_MARK = "KITTY_NB_LEASH"


class Leash:
    """The kernel's end.

    It is made before the server, so that a kernel which is killed just then leaves none behind.

    Args:
        record: The record of the server, to be withdrawn before that is ended.
        grace: Seconds between asking it to end and forcing it.

    Attributes:
        environment: What to add to the environment of a server that is to be on it.
    """

    def __init__(self, record: Path, grace: float) -> None:
        mark = secrets.token_hex()
        self.environment = {_MARK: mark}
        command = (sys.executable, "-P", "-m", __name__, str(record), str(grace), mark)
        self._holder = Popen(command, stdin=PIPE, start_new_session=True)

    def hold(self, process: ServerProcess) -> None:
        """Put a server on it, which then does not outlive this kernel."""
        assert self._holder.stdin  # noqa: S101 (it was asked for)
        self._holder.stdin.write(f"{process.pid} {process.create_time!r}\n".encode())
        self._holder.stdin.flush()

    async def let_go(self) -> None:
        """Take it off, once the server has ended."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._holder.communicate)


async def hold(words: Sequence[str]) -> None:
    """Be the other end: wait for the kernel to let go, then end the server if it still runs."""
    record, grace, mark = words
    told = sys.stdin.buffer.read().split()
    process = ServerProcess.attach(int(told[0]), float(told[1])) if told else _marked(mark)
    if process:
        with suppress(OSError):  # its folder may have gone: no reason to let the server live
            withdraw(Path(record))
        await process.terminate(float(grace))


def _marked(mark: str) -> ServerProcess | None:
    """Find the server with this mark: the first of its processes, whose group the others are in."""
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(_MARK) == mark:
            with suppress(psutil.Error, OSError):
                return ServerProcess(os.getpgid(process.pid), None)
    return None


if __name__ == "__main__":
    anyio.run(hold, sys.argv[1:])
