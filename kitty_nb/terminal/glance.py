"""How a server is, without watching it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from kitty_nb.supervisor.events import ServerState, ServerStatus
from kitty_nb.supervisor.health_answer import ask_once
from kitty_nb.supervisor.last_failure import last_failure
from kitty_nb.supervisor.record import find_server, read_record, refuse_open_folder
from kitty_nb.terminal.logs import log_lines

if TYPE_CHECKING:
    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.events import MemoryUse

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
