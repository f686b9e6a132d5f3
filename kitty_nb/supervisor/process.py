"""The server's process: the one place that spawns, measures and signals it."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import TYPE_CHECKING, Self

import anyio
import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_EXIT_POLL = 0.02  # seconds, where the system has no file descriptors of processes
_SAME_TIME = 0.0 if psutil.LINUX else 1.0  # seconds; so exact are creation times elsewhere
_PROC = Path("/proc")
_HIGHEST = re.compile(rb"^VmHWM:\s+(\d+) kB", re.MULTILINE)  # proc_pid_status(5)
_START_TICKS = 19  # the place of starttime behind the name in /proc/pid/stat; proc_pid_stat(5)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process shows of its load so far, in bytes.

    Attributes:
        resident: Memory resident now; mapped weights count as they are touched.
        read: Bytes read through system calls or from disk, whichever is more; 0 where the system
            does not tell (macOS).
    """

    resident: int
    read: int


class ServerProcess:
    """A running llama-server, leader of its own process group, our child or not.

    Attributes:
        pid: The process id, which is the process group's too.
        create_time: When it began, in seconds; with the pid it names a process. On Linux since
            boot, because there the time of day at which it began changes when the clock is set.
    """

    def __init__(self, pid: int, child: Popen[bytes] | None) -> None:
        self.pid = pid
        self._child = child
        self._psutil = psutil.Process(pid)
        self.create_time = _create_time(self._psutil)

    @classmethod
    def spawn(
        cls, command: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None
    ) -> Self:
        """Start a command in a session of its own, its output going to a file.

        A file rather than a pipe, because a kernel that is busy or dead must not stall the
        server; a session of its own, because interrupting the kernel must not interrupt it. Not
        by asyncio, whose subprocesses are killed when their event loop goes.

        Raises:
            OSError: When the command cannot be run or the file not be opened.
        """
        with log_path.open("ab") as log:
            child = Popen(
                command,
                stdin=DEVNULL,
                stdout=log,
                stderr=STDOUT,
                env=environment,
                start_new_session=True,
            )
        return cls(child.pid, child)

    @classmethod
    def attach(cls, pid: int, create_time: float) -> Self | None:
        """Return the process that began then, if it still runs; never another of the same pid."""
        try:
            process = cls(pid, None)
            same = abs(process.create_time - create_time) <= _SAME_TIME
            alive = process._psutil.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return None
        return process if same and alive and _leads_group(pid) else None

    async def wait(self) -> int | None:
        """Wait for the process to end, and end what it leaves behind in its group.

        Returns:
            The exit code; a signal's number, negated, when a signal ended it; None when it was
            not our child, whose end only its parent learns.
        """
        await self._ended()
        self._signal_group(signal.SIGKILL)  # a wrapper script may die before its llama-server
        return self._child.wait() if self._child else None

    async def terminate(self, grace: float) -> None:
        """Ask the process group to end, and force it when `grace` seconds were not enough."""
        self._signal_group(signal.SIGTERM)
        with anyio.move_on_after(grace):
            await self._ended()
            return
        self.kill()

    def kill(self) -> None:
        """End the process group at once."""
        self._signal_group(signal.SIGKILL)

    def usage(self) -> Usage | None:
        """Measure memory and bytes read, or return None when the process has just ended."""
        try:
            with self._psutil.oneshot():
                resident = self._psutil.memory_info().rss
                if not hasattr(self._psutil, "io_counters"):
                    return Usage(resident, 0)
                counters = self._psutil.io_counters()
        except psutil.AccessDenied:
            return Usage(resident, 0)
        except psutil.Error:
            return None
        return Usage(resident, max(counters.read_bytes, counters.read_chars))

    def processor_seconds(self) -> float:
        """The processor time that the process and its children have used so far; 0 once ended."""
        try:
            family = (self._psutil, *self._psutil.children(recursive=True))
            return sum(sum(process.cpu_times()[:2]) for process in family)
        except psutil.Error:
            return 0.0

    def listens_on(self, port: int) -> bool | None:
        """Whether the process or a child of it listens on a TCP port. Takes some milliseconds.

        Returns:
            None where the system does not tell.
        """
        try:
            return _listens(self._psutil, port) or any(
                _listens(child, port) for child in self._psutil.children(recursive=True)
            )
        except psutil.AccessDenied:
            return None
        except psutil.Error:  # it has just ended
            return False

    async def _ended(self) -> None:
        descriptor = _exit_descriptor(self.pid)
        if descriptor is None:
            while self.runs():  # noqa: ASYNC110 (there is nothing to wait for)
                await anyio.sleep(_EXIT_POLL)
            return
        try:
            if self.runs():
                await anyio.wait_readable(descriptor)
        finally:
            os.close(descriptor)

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        try:
            return self._psutil.is_running() and self._psutil.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def _signal_group(self, number: signal.Signals) -> None:
        # The pid is ours to signal while our child is not waited for, or the process runs; after
        # that it may be anybody's. On macOS a group of zombies answers EPERM rather than ESRCH.
        if (self._child and self._child.returncode is None) or self.runs():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)


def peak_memory(pid: int) -> int:
    """Return the most memory that a process and its children have had, in bytes; 0 once ended.

    Linux remembers the highest; elsewhere it is what they have now, so ask often.
    """
    try:
        process = psutil.Process(pid)
        return sum(map(_peak, (process, *process.children(recursive=True))))
    except psutil.Error:
        return 0


def _peak(process: psutil.Process) -> int:
    try:
        now = process.memory_info().rss
        status = (_PROC / str(process.pid) / "status").read_bytes() if psutil.LINUX else b""
    except (psutil.Error, OSError):
        return 0
    highest = _HIGHEST.search(status)
    return int(highest[1]) << 10 if highest else now


def _exit_descriptor(pid: int) -> int | None:
    """What becomes readable when a process ends; macOS, old kernels and some sandboxes lack it."""
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):
            return os.pidfd_open(pid)
    return None


def _listens(process: psutil.Process, port: int) -> bool:
    return any(
        one.status == psutil.CONN_LISTEN and one.laddr.port == port
        for one in process.net_connections("tcp")
    )


def _create_time(process: psutil.Process) -> float:
    if not psutil.LINUX:
        return process.create_time()
    behind_name = (_PROC / str(process.pid) / "stat").read_bytes().rpartition(b")")[2]
    return int(behind_name.split()[_START_TICKS]) / os.sysconf("SC_CLK_TCK")


def _leads_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except OSError:
        return False
