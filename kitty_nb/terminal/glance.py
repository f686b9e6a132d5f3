"""How a server is, without watching it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kitty_nb.supervisor.diagnosis import diagnose
from kitty_nb.supervisor.events import ServerState, ServerStatus
from kitty_nb.supervisor.health import HealthProbe
from kitty_nb.supervisor.record import find_server, read_record
from kitty_nb.terminal.logs import log_lines

if TYPE_CHECKING:
    from kitty_nb.config import ServerConfig


async def glance(config: ServerConfig) -> ServerState:
    """Say how a profile's server is; CRASHED when it has died by itself with nobody watching."""
    record = read_record(config)
    if record is None:
        return ServerState(ServerStatus.STOPPED, config)
    if not find_server(config):
        path = config.log_path
        lines = [*log_lines(path)] if path.exists() else []
        error = str(diagnose(None, lines))
        return ServerState(ServerStatus.CRASHED, record.config, error=error)
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
