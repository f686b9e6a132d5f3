"""A server's process: started, watched, signalled and measured."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import TYPE_CHECKING, Self

import anyio
import psutil

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


_KILLED_WITHIN = 1.0  # seconds; a process held by a driver may take forever
_EXIT_POLL = 0.02  # seconds, if the system has no file descriptors for processes
# Seconds that a wrapper's server has to exit after it, if somebody else stops the two.
_OTHERS_END_WITHIN = 10.0
# The share of a core above which a process counts as working; health checks take far less.
AT_WORK = 0.05
_SAME_TIME = 0.0 if psutil.LINUX else 1.0  # seconds; the precision of creation times elsewhere
_PROC = Path("/proc")
_HIGHEST = re.compile(rb"^VmHWM:\s+(\d+) kB", re.MULTILINE)  # proc_pid_status(5)
_LISTENING = "0A"  # a socket's state in /proc/net/tcp
_START_TICKS = 19  # the position of starttime after the name in /proc/pid/stat; proc_pid_stat(5)


@dataclass(frozen=True, slots=True)
class Usage:
    """The signs of a load's progress that a server's processes show."""

    # Bytes of mapped files resident now, as weights are once they are touched; of all memory if the
    # system doesn't tell (macOS).
    resident: int
    # Bytes read through system calls or from disk, whichever is more; 0 if the system doesn't tell
    # (macOS).
    read: int
    processor: float = 0.0  # seconds of CPU time

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.resident + other.resident, self.read + other.read, self.processor + other.processor
        )


class ServerProcess:
    """A running llama-server, leader of its own session and process group, our child or not.

    The server may be its child: many a llama-server is a script that runs the program. So all
    processes of its session are measured, checked for the port, and stopped.
    """

    def __init__(self, pid: int, child: Popen[bytes] | None) -> None:
        self.pid = pid  # the process id, which is the process group's too
        self._child = child
        self._psutil = psutil.Process(pid)
        # When it began, in seconds; with the pid, it identifies a process. On Linux it counts from
        # boot, because there the time of day of the beginning changes when the clock is set.
        self.create_time = _create_time(self._psutil)
        self._others: dict[int, psutil.Process] = {}
        self._others_end_within = 0.0 if child else _OTHERS_END_WITHIN

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        descriptors: Collection[int] = (),
    ) -> Self:
        """Start a command in a session of its own, with its output going to a file.

        It is a file rather than a pipe, because a kernel that is busy or dead must not stall the
        server; a session of its own, because interrupting the kernel must not interrupt it. asyncio
        is not used, because it kills its subprocesses when their event loop ends. The process
        inherits the descriptors.

        Raises:
            OSError: The command can't be run, or the file can't be opened.
        """
        with log_path.open("ab") as log:
            child = Popen(
                command,
                stdin=DEVNULL,
                stdout=log,
                stderr=STDOUT,
                env=environment,
                pass_fds=descriptors,
                start_new_session=True,
            )
        try:
            return cls(child.pid, child)
        except BaseException:  # out of file descriptors, for one; nobody else knows of the process
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise

    @classmethod
    def attach(cls, pid: int, create_time: float) -> Self | None:
        """Return this user's process that began then, if it still runs; never another user's."""
        try:
            process = cls(pid, None)
            same = abs(process.create_time - create_time) <= _SAME_TIME
            alive = process._psutil.status() != psutil.STATUS_ZOMBIE
            ours = is_ours(pid)
        except (psutil.Error, OSError):
            return None
        return process if same and alive and ours and _in_group(pid, pid) else None

    @property
    def age(self) -> float:
        """Seconds since it began."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME) if psutil.LINUX else time.time()
        return now - self.create_time

    async def wait(self) -> int | None:
        """Wait for the process to exit, and kill what it leaves behind.

        Returns:
            The exit code; a signal's number, negated, if a signal killed it; None if it was not our
            child, because only its parent learns the code.
        """
        self._family()
        await self._ended()
        with anyio.move_on_after(self._others_end_within):
            await self._others_ended()
        self._signal(signal.SIGKILL)  # a wrapper script may die before its llama-server
        with anyio.move_on_after(_KILLED_WITHIN):
            await self._others_ended()
        return self._child.wait() if self._child else None

    def ends_within(self, seconds: float, readable: Sequence[int] = ()) -> bool:
        """Wait for the process to exit, without an event loop, and return whether it has.

        It returns at once when one of the `readable` descriptors can be read.
        """
        deadline, watched, longest = time.monotonic() + seconds, [*readable], math.inf
        with ExitStack() as stack:
            try:
                watched.append(os.pidfd_open(self.pid))
                stack.callback(os.close, watched[-1])
            except (OSError, AttributeError):  # as in `_ended`
                longest = _EXIT_POLL
            while self.runs() and (left := deadline - time.monotonic()) > 0:
                pause = min(left, longest)
                ready = select.select(watched, (), (), None if math.isinf(pause) else pause)[0]
                if not set(readable).isdisjoint(ready):
                    break
        return not self.runs()

    async def exited(self, within: float) -> bool:
        """Wait for the processes to exit; return whether they have within so many seconds."""
        self._family()
        with anyio.move_on_after(within):
            await self._ended()
            await self._others_ended()
            return True
        return False

    async def terminate(self, grace: float) -> None:
        """Ask the processes to exit, and kill them if `grace` seconds were not enough."""
        self._others_end_within = grace
        self._signal(signal.SIGTERM)
        if not await self.exited(grace):
            self.kill()

    def kill(self) -> None:
        """Kill the processes at once."""
        self._others_end_within = 0.0
        self._signal(signal.SIGKILL)

    def leave(self) -> None:
        """Leave it running unwatched."""
        if self._child:
            leave_child(self._child)

    def usage(self) -> Usage | None:
        """Measure memory, bytes read and work; return None if the process has just exited."""
        first, *others = map(_usage, self._family())
        return sum(filter(None, others), first) if first else None

    @property
    def alone(self) -> bool:
        """True if no other process of its session has been seen so far."""
        return len(self._family()) == 1

    def includes(self, pid: int) -> bool:
        """Return whether a process is this one, or another of its session."""
        return any(pid == process.pid for process in self._family())

    def listens_on(self, port: int) -> bool | None:
        """Return whether the process or another of its session listens on a TCP port.

        It takes some milliseconds.

        Returns:
            None if the system doesn't tell.
        """
        try:
            return any(_listens(process, port) for process in self._family())
        except psutil.AccessDenied:  # as of a program with more privileges than ours
            return _user_listens(port) if psutil.LINUX else None

    async def _ended(self) -> None:
        try:
            descriptor = os.pidfd_open(self.pid)
        except (OSError, AttributeError):  # old kernels and some sandboxes lack it; macOS too
            while self.runs():  # noqa: ASYNC110 (there is nothing to wait for)
                await anyio.sleep(_EXIT_POLL)
            return
        try:
            if self.runs():
                await anyio.wait_readable(descriptor)
        finally:
            os.close(descriptor)

    def runs(self) -> bool:
        """True if it has not ended yet."""
        return _runs(self._psutil)

    def _family(self) -> list[psutil.Process]:
        """Return the process, and the others of its session that have been seen so far."""
        # Once it has ended, and is no zombie of ours, its number may become another session's.
        if self._is_known():
            for pid in _pids():
                with suppress(psutil.Error, OSError):
                    if pid not in self._others and os.getsid(pid) == self.pid != pid:
                        self._others[pid] = psutil.Process(pid)
        return [self._psutil, *self._others.values()]

    def _is_known(self) -> bool:
        return bool(self._child and self._child.returncode is None) or self.runs()

    async def _others_ended(self) -> None:
        while any(map(_runs, self._family()[1:])):  # noqa: ASYNC110 (nothing tells)
            await anyio.sleep(_EXIT_POLL)

    def _signal(self, number: signal.Signals) -> None:
        _, *others = self._family()
        if self._is_known():
            # On macOS a group of zombies answers EPERM rather than ESRCH.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
            others = [one for one in others if not _in_group(one.pid, self.pid)]
        for one in others:
            with suppress(psutil.Error, OSError):
                one.send_signal(number)  # never another process of the same number


_left: list[Popen[bytes]] = []


def leave_child(child: Popen[bytes]) -> None:
    """Keep a child that nobody watches any more, and reap those that have exited.

    Python complains about one that is dropped while it runs, and closes the pipe to it.
    """
    _left[:] = [one for one in (*_left, child) if one.poll() is None]


def _usage(process: psutil.Process) -> Usage | None:
    read = 0
    try:
        with process.oneshot():
            # All memory would include the vocabulary, up to a quarter of a small model.
            memory = process.memory_info()
            resident = getattr(memory, "shared", memory.rss)
            processor = sum(process.cpu_times()[:2])
            with suppress(psutil.AccessDenied, AttributeError):  # macOS does not count them
                counters = process.io_counters()
                read = max(counters.read_bytes, counters.read_chars)
    except (psutil.Error, OSError):
        return None
    return Usage(resident, read, processor)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
    except OSError:  # out of file descriptors, /proc cannot be read
        with suppress(ChildProcessError, AttributeError):  # not our child, or macOS
            return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        return True


def _pids() -> list[int]:
    """Return all PIDs; none if there are no file descriptors left to ask the system."""
    try:
        return psutil.pids()
    except OSError:
        return []


def peak_memory(pid: int) -> int:
    """Return the peak memory of a process and its children, in bytes; 0 once it has exited.

    Linux remembers the peak; elsewhere it is what they have now, so call this often.
    """
    return sum(map(_peak, family(pid)))


def family(pid: int) -> list[psutil.Process]:
    """Return a process and its children; none once it has exited."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _peak(process: psutil.Process) -> int:
    try:
        now = process.memory_info().rss
        status = (_PROC / str(process.pid) / "status").read_bytes() if psutil.LINUX else b""
    except (psutil.Error, OSError):
        return 0
    highest = _HIGHEST.search(status)
    return int(highest[1]) << 10 if highest else now


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        return any(
            one.status == psutil.CONN_LISTEN and one.laddr.port == port
            for one in process.net_connections("tcp")
        )
    except (psutil.NoSuchProcess, OSError):
        return False


def is_ours(pid: int) -> bool:
    """Return whether a process belongs to this user."""
    return psutil.Process(pid).uids().real == os.getuid()


def _user_listens(port: int) -> bool:
    """Return whether only this user listens on a port; see proc_net_tcp in Linux's sources."""
    tables = (_PROC / "net" / "tcp", _PROC / "net" / "tcp6")  # without IPv6, only the first
    lines = (line for table in tables if table.exists() for line in table.read_text().splitlines())
    rows = (line.split() for line in lines if not line.lstrip().startswith("sl"))
    users = {
        row[7]
        for row in rows
        if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port
    }
    return users == {str(os.getuid())}


def _create_time(process: psutil.Process) -> float:
    if not psutil.LINUX:
        return process.create_time()
    behind_name = (_PROC / str(process.pid) / "stat").read_bytes().rpartition(b")")[2]
    return int(behind_name.split()[_START_TICKS]) / os.sysconf("SC_CLK_TCK")


def _in_group(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except OSError:
        return False


_COUNTERS = Path("/proc/vmstat")


def oom_kills(counters: Path = _COUNTERS) -> int | None:
    """Count the processes that Linux (since 4.13) has killed for lack of memory since boot.

    This includes those in control groups, such as containers', and needs no privileges. A server
    that was killed by SIGKILL while the count rose was most likely one of them.

    Returns:
        None if the system doesn't tell.
    """
    try:
        lines = counters.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
