"""A llama-server that somebody else has started: watched and used, never ended."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import psutil

from kitty_nb.errors import ServerFailedError, StartCancelledError
from kitty_nb.supervisor.events import Activity, Event, HealthCheckResult, Level, ServerStatus
from kitty_nb.supervisor.health import HealthProbe
from kitty_nb.supervisor.lifecycle import BecameReady, Exited, LoadBegan, Report
from kitty_nb.supervisor.port_holder import PortHolder, holder_of
from kitty_nb.supervisor.record import record_of
from kitty_nb.supervisor.router import RouterWatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from anyio.abc import TaskGroup
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
    if holder.user:
        raise ServerFailedError(
            f"{holder.sentence} What another user's server is asked, that user can read. Start a"
            " server of your own, on another port."
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
        self.devices = (record and record.devices) or ()
        self.probe = HealthProbe(config, self.api_key, trusted=True, sleeps=holder.sleeps)
        self._report, self._publish, self._note_health = report, publish, note_health
        self._router = RouterWatch(config, holder.pid, self.probe, publish, self._serves)
        self._watching, self._loading = anyio.CancelScope(), anyio.CancelScope()
        self._asking = anyio.Lock()
        self._over = False

    async def run(self) -> None:
        """Watch it. When it ends, or is let go, it has stopped as far as we are concerned."""
        self._say(f"Attached to {self.holder.who}, which was not started here.")
        try:
            with self._watching:
                async with anyio.create_task_group() as tasks:
                    with suppress(psutil.Error):  # it has ended
                        await self._watch(psutil.Process(self.holder.pid), tasks)
                    tasks.cancel_scope.cancel()
        finally:
            self._over = True
            self._loading.cancel()
            with anyio.CancelScope(shield=True):
                async with self._asking:
                    await self.probe.aclose()
        going = "let go; it runs on" if self._watching.cancel_called else "has ended"
        self._say(f"{self.holder.who}: {going}.")
        self._report(Exited(self.generation, going, time.monotonic(), asked=True))

    async def terminate(self, _force: bool) -> None:
        """Let it go."""
        self._watching.cancel()

    def named(self, model: str | Path | None) -> str:
        """Return a router's own name of one of its models.

        Args:
            model: That name, or a file that is called so; None for the model that it serves.

        Raises:
            ServerFailedError: The router has no such model.
        """
        models = self.holder.models or ()
        names = (self.holder.alias,) if model is None else (str(model), PurePath(model).stem)
        name = next((name for name in names if name in models), None)
        if name is None:
            what = "serves no model" if model is None else f"has no model {str(model)!r}"
            there = ", ".join(models) or "none"
            raise ServerFailedError(f"The router {self.holder.who} {what}. Its models: {there}.")
        return name

    async def load(self, name: str, *, fresh: bool) -> None:
        """Have a router serve one of its models. Called off, it is unloaded again.

        Args:
            name: Which one.
            fresh: Unload it before, where it is loaded.

        Raises:
            ServerFailedError: The router does not load it.
            StartCancelledError: It was let go, or has ended, before it had loaded it.
        """
        async with self._asking:
            self._loading = anyio.CancelScope()
            with self._loading:
                if self._over:
                    self._loading.cancel()
                await self._router.load(name, fresh=fresh)
        if self._loading.cancelled_caught:
            raise StartCancelledError(f"The router was let go before it had loaded {name}.")

    async def _watch(self, process: psutil.Process, tasks: TaskGroup) -> None:
        status, began = ServerStatus.STARTING, process.create_time()
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            health = await self.probe.check_activity()
            self._note_health(health)
            if health.status is not status:
                status = health.status
                if status is ServerStatus.LOADING:
                    self._report(LoadBegan(self.generation))
                elif status is ServerStatus.READY:
                    if self.holder.models is None and await self.probe.is_router():
                        await self._router.look()  # before it is used
                        tasks.start_soon(self._router.run)
                    since = time.monotonic() - (time.time() - began)
                    self._report(BecameReady(self.generation, since))
            await anyio.sleep(_LOOK_EVERY)

    def _serves(self, alias: str | None, model: Path | None, models: tuple[str, ...]) -> None:
        name = model.name if model else None
        self.holder = replace(self.holder, alias=alias, model=name, models=models)

    def _say(self, message: str) -> None:
        self._publish(Activity(message, Level.INFO, time.time()))
