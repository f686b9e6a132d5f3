"""The helper process of one server: it rotates the log, and stops an idle or orphaned server.

It runs as long as its server, even when no notebook is open any more, and one is started for each
server, so it stays light: it imports neither pydantic nor httpx, and runs no event loop until it
has to stop the server. Its kernel tells it through a pipe which server to watch. If the settings
say that the server stops with the kernel, the pipe stays open: when the kernel is gone, for
whatever reason, the system closes its end of the pipe, and the sidecar stops the server. If the
kernel was killed before it could name the server, the sidecar finds it by a mark in its
environment.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import select
import sys
import time
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import TYPE_CHECKING, NamedTuple, TextIO

import anyio
import anyio.to_thread
import psutil

from kitty_nb.supervisor.log import shrink
from kitty_nb.supervisor.process import AT_WORK, ServerProcess, Usage, leave_child

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kitty_nb.config import ServerConfig

RECORD = ".server.json"
_WITHDRAWN = ".leaving.json"
_FAILURE = ".failure.txt"
MARK = "KITTY_NB_SIDECAR"
# Seconds.
_LOOK_EVERY = 1.0
_LOCK_EVERY, _OTHER_ENDS_WITHIN = 0.1, 2.0
_MARKED_WITHIN = 3.0  # a process shows its mark a moment after it was spawned
# Bytes per second that a server reads or maps: a load from a slow disk uses little CPU time.
_LOADS = 1 << 14


def withdrawn_path(record: Path) -> Path:
    """Return the path of a record while its server is being stopped."""
    return record.with_name(record.name.removesuffix(RECORD) + _WITHDRAWN)


def failure_path(record: Path) -> Path:
    """Return the path of the last failure's reason, kept until the next start or stop."""
    return record.with_name(record.name.removesuffix(RECORD) + _FAILURE)


def withdraw(record: Path) -> None:
    """Mark a server as being stopped. Until it has exited, nobody may start another one.

    Raises:
        OSError: There is no record, or its folder can't be written to.
    """
    record.replace(withdrawn_path(record))
    failure_path(record).unlink(missing_ok=True)


class SidecarArgs(NamedTuple):
    """The sidecar's command line."""

    record: str  # the server's record, to be withdrawn before the server is stopped
    log: str  # the server's log
    log_bytes: str  # the size from which the log is rotated
    logs_kept: str  # the number of rotated logs that are kept
    grace: str  # seconds from asking the server to exit until it is killed
    mark: str  # what the server's environment contains; empty if the server outlives its kernel


class Sidecar:
    """The process as seen by the kernel that starts it.

    A sidecar that guards is started before its server, so that a kernel which is killed just then
    leaves no server behind. If another sidecar has the log already, it only guards, or exits.
    """

    def __init__(self, config: ServerConfig, record: Path, *, guards: bool) -> None:
        self._mark = os.urandom(32).hex() if guards else ""
        args = SidecarArgs(
            record=str(record),
            log=str(config.log_path),
            log_bytes=str(int(config.log_max_mb * 1e6)),
            logs_kept=str(config.log_keep),
            grace=str(config.stop_grace_seconds),
            mark=self._mark,
        )
        command = (sys.executable, "-P", "-m", __name__, *args)
        self._told = False
        self._program = Popen(
            command, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True
        )

    @property
    def environment(self) -> dict[str, str]:
        """The variables that the server's environment must contain."""
        return {MARK: self._mark} if self._mark else {}

    @property
    def runs(self) -> bool:
        """True until the process has ended."""
        return self._program.poll() is None

    def watch(self, process: ServerProcess, idle_seconds: int) -> None:
        """Tell it which server to watch, and how long that may be unused; 0 for no limit."""
        assert self._program.stdin  # noqa: S101 (it was asked for)
        self._told = True
        with suppress(BrokenPipeError):  # killed already; another one is started
            line = f"{process.pid} {process.create_time!r} {idle_seconds}\n"
            self._program.stdin.write(line.encode())
            self._program.stdin.flush()
            if not self._mark:
                self._program.stdin.close()

    def close(self) -> None:
        """Close the pipe to a process that has ended."""
        assert self._program.stdin  # noqa: S101 (it was asked for)
        with suppress(BrokenPipeError):
            self._program.stdin.close()

    def leave(self) -> None:
        """Leave it running with its server."""
        leave_child(self._program)

    async def ended(self) -> None:
        """Wait for its exit, which follows that of its server; without one, it exits at once."""
        with anyio.CancelScope(shield=True):
            no_server = None if self._told else b"\n"
            await anyio.to_thread.run_sync(self._program.communicate, no_server)


def has_sidecar(log: Path) -> bool:
    """Return whether a sidecar has this log; True if the system doesn't tell."""
    try:
        # NFS gives no shared lock on a file that can't be read.
        with _lock_path(log).open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # it is held, or cannot be opened
        return True
    return False


def attend(args: SidecarArgs, process: ServerProcess, idle_seconds: float) -> None:
    """Attend to a server until it has exited."""
    guarded = [sys.stdin.fileno()] if args.mark else []
    keeping = _keep(args, process, idle_seconds)
    pause = 0.0
    while not process.ends_within(pause, guarded):
        if select.select(guarded, (), (), 0)[0]:  # at its end: nothing more is written
            return _end(args, process)
        try:
            pause = next(keeping)
        except StopIteration:  # another sidecar has the log, or the server has been stopped
            return None
        except OSError:  # its folder is gone; the guard continues alone
            keeping = repeat(math.inf)
    if not process.alone:
        anyio.run(process.wait)  # which kills what it leaves behind
    return None


def _keep(args: SidecarArgs, process: ServerProcess, idle_seconds: float) -> Iterator[float]:
    """Rotate the log and stop an idle server; yield the seconds until this should continue.

    It returns if another sidecar does that, or when the server has been stopped.
    """
    log, used_at, before = Path(args.log), time.monotonic(), _work_of(process)
    kept_at = time.monotonic()
    with _lock_path(log).open("a") as lock:
        while not _is_locked(lock):
            if not args.mark and time.monotonic() - used_at > _OTHER_ENDS_WITHIN:
                return
            yield _LOCK_EVERY
        while not idle_seconds or time.monotonic() - used_at < idle_seconds:
            shrink(log, int(args.log_bytes), int(args.logs_kept))
            yield _LOOK_EVERY
            now = _work_of(process)
            if now - before > _LOOK_EVERY:
                used_at = time.monotonic()
            before = now
            if not _is_withdrawn(Path(args.record), process):
                kept_at = time.monotonic()
            elif time.monotonic() - kept_at > 2 * float(args.grace) + _OTHER_ENDS_WITHIN:
                _end(args, process)  # whoever was stopping it was killed
                return
        _note(log, f"kitty_nb: stopped after {idle_seconds:.0f} s idle")
        _end(args, process)


def _end(args: SidecarArgs, process: ServerProcess) -> None:
    record = Path(args.record)
    with suppress(OSError):  # a folder that is full, or gone, is no reason to let the server live
        if _named_by(record) in {None, (process.pid, process.create_time)}:
            withdraw(record)

    async def end() -> None:
        await process.terminate(float(args.grace))
        await process.wait()

    anyio.run(end)


def _is_withdrawn(record: Path, process: ServerProcess) -> bool:
    """Return whether the record of a process has been withdrawn: somebody means to stop it."""
    with suppress(OSError):
        named = _named_by(withdrawn_path(record))
        return not record.exists() and named == (process.pid, process.create_time)
    return False


def _named_by(record: Path) -> tuple[int, float] | None:
    """Return the process of a record, as its PID and creation time; None if it is damaged."""
    try:
        found = json.loads(record.read_bytes())
        return found["pid"], found["create_time"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _note(log: Path, line: str) -> None:
    with suppress(OSError), log.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _lock_path(log: Path) -> Path:
    return log.with_suffix(".sidecar.lock")


def _is_locked(file: TextIO) -> bool:
    """Become the only sidecar of this log, unless an earlier one has not exited yet."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _work_of(process: ServerProcess) -> float:
    """Return the work done so far, in units of what counts as a second of work."""
    usage = process.usage() or Usage(0, 0)
    return usage.processor / AT_WORK + (usage.resident + usage.read) / _LOADS


def find_marked(mark: str) -> ServerProcess | None:
    """Find the server with this mark: the first of its processes, which leads their group."""
    for process in psutil.process_iter(["environ"]):
        if mark and (process.info["environ"] or {}).get(MARK) == mark:
            with suppress(psutil.Error, OSError):
                return ServerProcess(os.getpgid(process.pid), None)
    return None


def main(words: Sequence[str]) -> None:
    """Run the sidecar."""
    args = SidecarArgs(*words)
    line = sys.stdin.buffer.readline()
    if told := line.split():
        process = ServerProcess.attach(int(told[0]), float(told[1]))
        if process:
            attend(args, process, float(told[2]))
    elif not line and args.mark and (process := _find_spawned(args.mark)):
        _end(args, process)


def _find_spawned(mark: str) -> ServerProcess | None:
    """Find the server of a kernel that was killed; its mark may only appear in a moment."""
    began = time.monotonic()
    while not (process := find_marked(mark)) and time.monotonic() - began < _MARKED_WITHIN:
        select.select((), (), (), _LOCK_EVERY)
    return process


if __name__ == "__main__":
    main(sys.argv[1:])
