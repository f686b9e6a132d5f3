"""Who has the right to start a profile's server: one program at a time."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager, suppress
from threading import Event
from typing import TYPE_CHECKING

import psutil

from kitty_nb.supervisor.record import process_of, read_record, refuse_open_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kitty_nb.config import ServerConfig


# Who has just got the lock writes down who that is in a moment.
_LOOKS, _PAUSE = 5, 0.02  # seconds


@contextmanager
def profile_lock(config: ServerConfig) -> Iterator[bool]:
    """Hold the right to start this profile's server; yields False where another has it.

    The system frees it when its holder ends, in whatever way, so it cannot become stale. The file
    holds the process id of who had it last.

    Raises:
        ServerFailedError: When others can write to the folder.
        OSError: When it cannot be written.
    """
    config.log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_open_folder(config)
    with _lock_path(config).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield True


def who_owns(config: ServerConfig, locked: bool) -> str | None:
    """Say who keeps a profile's server from being started; None where nobody does.

    Run it in a worker thread.

    Args:
        config: Settings of the profile.
        locked: Whether we hold the profile's lock ourselves.
    """
    profile = f"the server of the profile {config.profile!r}"
    record = read_record(config)
    if record and process_of(record):
        server = _name(record.pid) or "it"
        return f"Another program has started {profile}: {server} (PID {record.pid}) runs"
    if locked:
        return None
    pid = _last_holder(config)
    if pid == os.getpid():
        return f"Another panel or manager of this program (PID {pid}) is starting {profile}"
    starter = _name(pid) if pid else None
    who = f"Another program, {starter} (PID {pid})," if starter else "Another program"
    return f"{who} is starting {profile}"


def _lock_path(config: ServerConfig) -> Path:
    return config.log_dir / f"{config.profile}.lock"


def _last_holder(config: ServerConfig) -> int | None:
    for _ in range(_LOOKS):
        with suppress(OSError, ValueError):
            return int(_lock_path(config).read_text())
        Event().wait(_PAUSE)
    return None


def _name(pid: int) -> str | None:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return None
