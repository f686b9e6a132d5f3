"""The status of a server and its log, read without supervising it."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from kitty_nb.errors import KittyError
from kitty_nb.supervisor.events import ServerState, ServerStatus
from kitty_nb.supervisor.health import ask_once
from kitty_nb.supervisor.log import LogTail, readable
from kitty_nb.supervisor.registry import find_server, last_failure, read_record, refuse_open_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.registry import ServerRecord

_POLL = 0.1  # seconds between looks at a log that is followed
_MEASURED_OVER = 0.5  # seconds


def read_status(config: ServerConfig) -> ServerState:
    """Read the state of a profile's server, and why it ended if it ended by itself."""
    refuse_open_folder(config)
    if running := find_server(config):
        health = ask_once(running.config)
        return ServerState(
            health.status if running.ready is None else ServerStatus.READY,
            running.config,
            running.pid,
            running.ready,
            last_health_check=health,
            devices=running.devices or (),
        )
    record, failure = read_record(config), last_failure(config)
    if record is None:
        status = ServerStatus.FAILED if failure else ServerStatus.STOPPED
        return ServerState(status, config, error=failure)
    if failure is None:  # nobody watched it end
        from kitty_nb.supervisor.diagnosis import diagnose

        path = config.log_path
        failure = str(diagnose(None, [*log_lines(path)] if has_log(path) else []))
    return ServerState(ServerStatus.CRASHED, record.config, error=failure)


async def status_facts(state: ServerState) -> dict[str, Any]:
    """Return a state as JSON, with what the server holds in memory and its present speed.

    `memory` is None without a server, and so is what its build does not tell.
    """
    from kitty_nb.supervisor.free_memory import memory_use

    record = find_server(state.config)
    memory = speed = None
    if record and record.pid == state.pid:
        memory = await anyio.to_thread.run_sync(memory_use, record.pid)
        speed = None if record.ready is None else await _tokens_per_second(record)
    return {
        "profile": state.config.profile,
        "status": state.status.value,
        "model": str(state.config.model) if state.config.model else None,
        "projector": str(state.projector) if state.projector else None,
        "alias": state.config.served_alias or None,
        "endpoint": state.endpoint,
        "pid": state.pid,
        "uptime_seconds": state.uptime,
        "devices": list(state.devices),
        "error": state.error,
        "log": str(state.config.log_path),
        "memory": memory and {"ram": memory.resident, "gpu": memory.gpu},
        "tokens_per_second": speed,
    }


async def _tokens_per_second(record: ServerRecord) -> float | None:
    from kitty_nb.supervisor.health import HealthProbe

    probe = HealthProbe(record.config, record.api_key, trusted=True)
    try:
        health = await probe.check_activity()
        if health.slots_busy:
            await anyio.sleep(_MEASURED_OVER)
            health = await probe.check_activity()
    finally:
        await probe.aclose()
    return 0.0 if health.slots_busy == 0 else health.tokens_per_second


def has_log(path: Path) -> bool:
    """Tell whether there is a log.

    Raises:
        KittyError: It can't be read.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise KittyError(
            f"Can't read the log {path} ({error.strerror}). Check LLAMACPP_LOG_DIR and the"
            " permissions of the file and its folder."
        ) from None
    return True


def log_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a log, without the beginning of a very long one.

    Raises:
        KittyError: There is none, or it can't be read.
    """
    if not has_log(path):
        raise KittyError(f"There is no log {path}: no server of this profile has been started yet.")
    with LogTail(path) as log:
        yield from _drain(log, to_end=True)


async def follow_log(path: Path, show: Callable[[str], object], last: int | None = None) -> None:
    """Show what is written to a log, and to the one that replaces it, until cancelled.

    Args:
        path: The log; it need not exist yet.
        show: Called with each line.
        last: How many of the lines that are there already to begin with; None for all.

    Raises:
        KittyError: The log can't be read.
    """
    while True:
        if has_log(path):
            with LogTail(path) as log:
                number, replaced = _inode(path), False
                while not replaced:
                    replaced = _inode(path) != number  # asked first, so that no line is missed
                    for line in deque(_drain(log, to_end=replaced), maxlen=last):
                        show(line)
                    last = None
                    await anyio.sleep(_POLL)
        await anyio.sleep(_POLL)


def _drain(log: LogTail, *, to_end: bool) -> Iterator[str]:
    while lines := log.read():
        yield from map(readable, lines)
    if to_end:
        yield from map(readable, log.read(to_end=True))


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None
