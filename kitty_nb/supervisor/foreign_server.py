"""A llama-server that somebody else has started: watched and used, never ended."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import psutil

from kitty_nb.errors import ServerFailedError
from kitty_nb.supervisor.events import Activity, Event, HealthCheckResult, Level, ServerStatus
from kitty_nb.supervisor.health import HealthProbe
from kitty_nb.supervisor.lifecycle import BecameReady, Exited, LoadBegan, Report
from kitty_nb.supervisor.port_holder import PortHolder, holder_of
from kitty_nb.supervisor.record import record_of
from kitty_nb.supervisor.router import RouterWatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pydantic import SecretStr

    from kitty_nb.config import ServerConfig

_LOOK_EVERY = 1.0  # seconds


async def find_foreign_server(config: ServerConfig) -> PortHolder:
    """Find the llama-server that listens where the profile's own would.

    Raises:
        ServerFailedError: Nothing listens there, or something else does.
    """
    holder = await anyio.to_thread.run_sync(holder_of, config.host, config.port)
    if holder is None:
        raise ServerFailedError(
            f"No program that this user may see listens on port {config.port}. Start a server."
        )
    if holder.engine is None:
        raise ServerFailedError(f"{holder.sentence} That is not a llama-server.")
    if holder.unspoken:
        raise ServerFailedError(
            f"{holder.sentence} It was started with {holder.unspoken}, but kitty_nb talks to a"
            " server by plain HTTP, without a prefix. Start it without, or use it as it is."
        )
    return holder


class ForeignServer:
    """Watches the server until it ends or is let go.

    Args:
        generation: The number that its reports carry.
        config: Settings of the profile whose port it has.
        holder: The server.
        report: Called with each fact that the lifecycle needs.
        publish: Called with each event for the user.
        note_health: Called with every answer to a health check.
    """

    def __init__(
        self,
        generation: int,
        config: ServerConfig,
        holder: PortHolder,
        report: Callable[[Report], None],
        publish: Callable[[Event], None],
        note_health: Callable[[HealthCheckResult], None],
    ) -> None:
        # Another profile's server has left us its key; anybody else's may have the configured one.
        record = record_of(holder.pid, config.log_dir)
        self.generation = generation
        self.holder = holder
        self.api_key: SecretStr | None = record.api_key if record else config.api_key
        self.probe = HealthProbe(config, self.api_key, trusted=True, sleeps=holder.sleeps)
        self._report, self._publish, self._note_health = report, publish, note_health
        self._router = RouterWatch(config, holder.pid, self.probe, publish, self._serves)
        self._watching = anyio.CancelScope()

    async def run(self) -> None:
        """Watch it. When it ends, or is let go, it has stopped as far as we are concerned."""
        self._say(f"Attached to {self.holder.who}, which was not started here.")
        try:
            with self._watching:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._router.run)
                    with suppress(psutil.Error):  # it has ended
                        await self._watch(psutil.Process(self.holder.pid))
                    tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self.probe.aclose()
        going = "let go; it runs on" if self._watching.cancel_called else "has ended"
        self._say(f"{self.holder.who}: {going}.")
        self._report(Exited(self.generation, going, time.monotonic(), asked=True))

    async def terminate(self, _force: bool) -> None:
        """Let it go."""
        self._watching.cancel()

    async def _watch(self, process: psutil.Process) -> None:
        status, began = ServerStatus.STARTING, process.create_time()
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            health = await self.probe.check_activity()
            self._note_health(health)
            if health.status is not status:
                status = health.status
                if status is ServerStatus.LOADING:
                    self._report(LoadBegan(self.generation))
                elif status is ServerStatus.READY:
                    since = time.monotonic() - (time.time() - began)
                    self._report(BecameReady(self.generation, since))
            await anyio.sleep(_LOOK_EVERY)

    def _serves(self, alias: str | None, model: Path | None) -> None:
        self.holder = replace(self.holder, alias=alias, model=model.name if model else None)

    def _say(self, message: str) -> None:
        self._publish(Activity(message, Level.INFO, time.time()))
