"""What a server needs for as long as it runs, also when no notebook is open any more.

One small program beside each server keeps its log from filling the disk, and ends the server once
nobody has used it for a while, where its build cannot free an idle model by itself.
"""

from __future__ import annotations

import fcntl
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import TYPE_CHECKING, NamedTuple, TextIO

import anyio
import anyio.to_thread

from kitty_nb.supervisor.log import shrink
from kitty_nb.supervisor.process import AT_WORK, ServerProcess, Usage
from kitty_nb.supervisor.record_file import withdraw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kitty_nb.supervisor.record import ServerRecord

# Seconds.
_LOOK_EVERY = 1.0
_LOCK_EVERY, _OTHER_ENDS_WITHIN = 0.1, 2.0
# Bytes a second that it reads or takes: a load from a slow disk or drive uses little processor.
_LOADS = 1 << 14


class Duty(NamedTuple):
    """What is to be kept, as words of a command line.

    Attributes:
        pid: The server's process.
        create_time: When that began, in seconds since the epoch.
        log: Its log.
        log_bytes: The size from which the log is put aside.
        logs_kept: How many logs put aside are kept.
        idle_seconds: How long the server may be unused; 0 is for ever.
        grace: Seconds between asking it to end and forcing it.
        record: Its record, to be withdrawn before it is ended.
    """

    pid: str
    create_time: str
    log: str
    log_bytes: str
    logs_kept: str
    idle_seconds: str
    grace: str
    record: str


class Keeper:
    """The program, seen from a kernel that starts it. Where one runs already, it ends at once.

    Args:
        record: What is known of the server.
        path: Where that is written down.
    """

    def __init__(self, record: ServerRecord, path: Path) -> None:
        config = record.config
        duty = Duty(
            pid=str(record.pid),
            create_time=repr(record.create_time),
            log=str(config.log_path),
            log_bytes=str(int(config.log_max_mb * 1e6)),
            logs_kept=str(config.log_keep),
            idle_seconds=str(record.idle_seconds),
            grace=str(config.stop_grace_seconds),
            record=str(path),
        )
        command = (sys.executable, "-P", "-m", __name__, *duty)
        self._program = Popen(
            command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True
        )

    @property
    def runs(self) -> bool:
        """True until the program has ended."""
        return self._program.poll() is None

    async def ended(self) -> None:
        """Wait for it to end, as it does when its server has ended."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._program.wait)


async def keep(duty: Duty) -> None:
    """Be the program."""
    process = ServerProcess.attach(int(duty.pid), float(duty.create_time))
    if process is None:
        return
    log, idle_seconds = Path(duty.log), float(duty.idle_seconds)
    with _lock_path(log).open("a") as lock:
        if not await _lock(lock):
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_keep_log, log, int(duty.log_bytes), int(duty.logs_kept))
            if idle_seconds:
                tasks.start_soon(_end_when_idle, process, log, idle_seconds, duty)
            await process.wait()
            tasks.cancel_scope.cancel()


def has_keeper(log: Path) -> bool:
    """Tell whether the program runs for this log; True where nothing tells."""
    try:
        with _lock_path(log).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # it is held, or cannot be opened
        return True
    return False


def _lock_path(log: Path) -> Path:
    return log.with_suffix(".keeper.lock")


async def _lock(file: TextIO) -> bool:
    """Get the right to be the one keeper, as soon as that of a server before has ended."""
    with anyio.move_on_after(_OTHER_ENDS_WITHIN):
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await anyio.sleep(_LOCK_EVERY)
            else:
                return True
    return False


async def _keep_log(log: Path, limit: int, kept: int) -> None:
    while True:
        shrink(log, limit, kept)
        await anyio.sleep(_LOOK_EVERY)


async def _end_when_idle(process: ServerProcess, log: Path, seconds: float, duty: Duty) -> None:
    used_at, before = time.monotonic(), _work_of(process)
    while time.monotonic() - used_at < seconds:
        await anyio.sleep(_LOOK_EVERY)
        now = _work_of(process)
        if now - before > _LOOK_EVERY:
            used_at = time.monotonic()
        before = now
    with suppress(OSError), log.open("a", encoding="utf-8") as file:
        file.write(f"kitty_nb: not used for {seconds:.0f} s, so it is stopped\n")
    with suppress(OSError):  # a disk that is full, or gone, is no reason to hold the memory
        withdraw(Path(duty.record))
    await process.terminate(float(duty.grace))


def _work_of(process: ServerProcess) -> float:
    """What it has done so far; 1 is the least that counts as a second of work."""
    usage = process.usage() or Usage(0, 0)
    return usage.processor / AT_WORK + (usage.resident + usage.read) / _LOADS


def main(words: Sequence[str]) -> None:
    """Run the program."""
    anyio.run(keep, Duty(*words))


if __name__ == "__main__":
    main(sys.argv[1:])
