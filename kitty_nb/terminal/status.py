"""The status of a server, and its log, without supervising it."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from kitty_nb.errors import KittyError
from kitty_nb.supervisor.events import ServerState, ServerStatus
from kitty_nb.supervisor.health_answer import ask_once
from kitty_nb.supervisor.log import FileChanges, LogTail, readable
from kitty_nb.supervisor.registry import find_server, last_failure, read_record, refuse_open_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.events import MemoryUse


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


_PACE_OVER = 0.5  # seconds


def glance(config: ServerConfig) -> ServerState:
    """Say how a profile's server is; of one that has ended by itself, why."""
    refuse_open_folder(config)
    record = find_server(config)
    if record is None:
        return _after_the_end(config)
    health = ask_once(record.config)
    return ServerState(
        health.status if record.ready is None else ServerStatus.READY,
        record.config,
        record.pid,
        record.ready,
        last_health_check=health,
        devices=record.devices or (),
    )


async def measure(state: ServerState) -> tuple[MemoryUse | None, float | None]:
    """Measure what a server holds, and how many tokens a second it answers with now.

    Args:
        state: As `glance` has found it.

    Returns:
        None for what there is not, or what its build does not tell.
    """
    # Imported here, so that a look alone does not wait for them.
    from kitty_nb.supervisor.free_memory import memory_use  # noqa: PLC0415
    from kitty_nb.supervisor.health import HealthProbe  # noqa: PLC0415

    record = find_server(state.config)
    if record is None or record.pid != state.pid:
        return None, None
    use = await anyio.to_thread.run_sync(memory_use, record.pid)
    if record.ready is None:
        return use, None
    probe = HealthProbe(record.config, record.api_key, trusted=True)
    try:
        health = await probe.check_activity()
        if health.slots_busy:
            await anyio.sleep(_PACE_OVER)
            health = await probe.check_activity()
    finally:
        await probe.aclose()
    return use, 0.0 if health.slots_busy == 0 else health.tokens_per_second


def _after_the_end(config: ServerConfig) -> ServerState:
    record, failure = read_record(config), last_failure(config)
    if record is None:
        status = ServerStatus.FAILED if failure else ServerStatus.STOPPED
        return ServerState(status, config, error=failure)
    if failure is None:  # nobody watched it
        from kitty_nb.supervisor.diagnosis import diagnose  # noqa: PLC0415

        path = config.log_path
        failure = str(diagnose(None, [*log_lines(path)] if path.exists() else []))
    return ServerState(ServerStatus.CRASHED, record.config, error=failure)
