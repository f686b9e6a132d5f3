"""How a server is, without watching it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kitty_nb.supervisor.diagnosis import diagnose
from kitty_nb.supervisor.events import ServerState, ServerStatus
from kitty_nb.supervisor.health import HealthProbe
from kitty_nb.supervisor.last_failure import last_failure
from kitty_nb.supervisor.record import find_server, read_record
from kitty_nb.terminal.logs import log_lines

if TYPE_CHECKING:
    from kitty_nb.config import ServerConfig


async def glance(config: ServerConfig) -> ServerState:
    """Say how a profile's server is; of one that has ended by itself, why."""
    record = find_server(config)
    if record is None:
        return _after_the_end(config)
    probe = HealthProbe(record.config)
    try:
        health = await probe.check()
    finally:
        await probe.aclose()
    return ServerState(
        health.status if record.ready is None else ServerStatus.READY,
        record.config,
        record.pid,
        record.ready,
        last_health_check=health,
    )


def _after_the_end(config: ServerConfig) -> ServerState:
    record, failure = read_record(config), last_failure(config)
    if record is None:
        status = ServerStatus.FAILED if failure else ServerStatus.STOPPED
        return ServerState(status, config, error=failure)
    if failure is None:  # nobody watched it
        path = config.log_path
        failure = str(diagnose(None, [*log_lines(path)] if path.exists() else []))
    return ServerState(ServerStatus.CRASHED, record.config, error=failure)
