"""A server that ends with its kernel, however that ends: killed, crashed or shut down.

The kernel holds one end of a pipe and a small program of its own holds the other. When the kernel
is gone the system closes its end, and the program ends the server.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from kitty_nb.supervisor.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Sequence


class Leash:
    """The kernel's end.

    It is made before the server, so that a kernel which is killed just then leaves none behind.

    Args:
        record: The record of the server, to be removed before that is ended.
        grace: Seconds between asking it to end and forcing it.
    """

    def __init__(self, record: Path, grace: float) -> None:
        command = (sys.executable, "-P", "-m", __name__, str(record), str(grace))
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
    record, grace = words
    told = sys.stdin.buffer.read().split()
    process = ServerProcess.attach(int(told[0]), float(told[1])) if told else None
    if process:
        with suppress(OSError):  # its folder may have gone: no reason to let the server live
            Path(record).unlink()  # noqa: ASYNC240 (there is nobody else to hold up)
        await process.terminate(float(grace))


if __name__ == "__main__":
    anyio.run(hold, sys.argv[1:])
