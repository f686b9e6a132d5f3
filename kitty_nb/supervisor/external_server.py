"""A llama-server that kitty_nb did not start: attached to, watched, never stopped."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import psutil

from kitty_nb.errors import ServerFailedError
from kitty_nb.supervisor.events import Activity, Level, ServerStatus, Working
from kitty_nb.supervisor.health import HealthProbe
from kitty_nb.supervisor.lifecycle import BecameReady, Exited, LoadBegan
from kitty_nb.supervisor.port_owner import PortOwner, owner_of
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.registry import record_of
from kitty_nb.supervisor.requests import RequestLog, WorkMeter
from kitty_nb.supervisor.router import RouterModels
from kitty_nb.supervisor.router_api import LlamaServer, RouterKind, kind_of

if TYPE_CHECKING:
    from anyio.abc import TaskGroup
    from pydantic import SecretStr

    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.lifecycle import Emit

_LOOK_EVERY = 1.0  # seconds


async def find_external_server(config: ServerConfig) -> PortOwner:
    """Find the llama-server that listens where the profile's own would.

    Raises:
        ServerFailedError: Nothing listens there, or something that cannot be used.
    """
    owner = await anyio.to_thread.run_sync(owner_of, config.host, config.port)
    if owner is None:
        raise ServerFailedError(f"Nothing you have access to is listening on port {config.port}.")
    if owner.engine is None:
        raise ServerFailedError(f"{owner.sentence} That is not a llama-server.")
    if owner.unspoken:
        raise ServerFailedError(
            f"{owner.sentence} It was started with {owner.unspoken}, but kitty_nb supports only"
            " plain HTTP without a prefix. Restart it without that flag, or use it directly."
        )
    if owner.user:
        raise ServerFailedError(
            f"{owner.sentence} Its owner could read your prompts. Start your own server on another"
            " port."
        )
    return owner


class ExternalServer:
    """Watches a server until it ends or is detached from. See `Server` for its arguments."""

    def __init__(self, generation: int, config: ServerConfig, owner: PortOwner, emit: Emit) -> None:
        # The key of another profile's server is on record; any other may have the configured one.
        record = record_of(owner.pid, config.log_dir)
        self._owner = owner
        self.router: RouterModels | None = None  # once it turns out to be one
        self.api_key: SecretStr | None = record.api_key if record else config.api_key
        self.devices = (record and record.devices) or ()
        self.lines: tuple[str, ...] = ()  # its log is its owner's
        self.probe = HealthProbe(config, self.api_key, trusted=True, sleeps=owner.sleeps)
        self.work = WorkMeter(RequestLog(0.0, 0.0))  # by its slots alone
        self._generation, self._config, self._emit = generation, config, emit
        self._watching = anyio.CancelScope()

    @property
    def owner(self) -> PortOwner:
        """The server, with what it serves now."""
        if router := self.router:
            facts = {"alias": router.alias, "model": router.model, "models": router.names}
            return replace(self._owner, **facts)  # type: ignore[arg-type]
        return self._owner

    def stop(self, _force: bool) -> None:
        """Detach from it."""
        self._watching.cancel()

    async def run(self) -> None:
        """Watch it. Once it has ended or is detached from, it counts as stopped."""
        self._notify(f"Attached to {self._owner.who}, which kitty_nb did not start.")
        try:
            with self._watching:
                async with anyio.create_task_group() as tasks:
                    with suppress(psutil.Error, OSError):  # it has ended
                        await self._watch(ServerProcess(self._owner.pid, None), tasks)
                    tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                if self.router:
                    await self.router.close()
                await self.probe.aclose()
        going = "detached; it keeps running" if self._watching.cancel_called else "exited"
        self._notify(f"{self._owner.who}: {going}.")
        self._emit(Exited(self._generation, going, time.monotonic(), asked=True))

    async def _watch(self, process: ServerProcess, tasks: TaskGroup) -> None:
        status = ServerStatus.STARTING
        while process.runs():
            health = await self.probe.check_activity()
            health = self.router.doubt(health) if self.router else health
            self._emit(health)
            self._note_work(health.tokens_per_second)
            if health.status is not status:
                status = health.status
                if status is ServerStatus.LOADING:
                    self._emit(LoadBegan(self._generation))
                elif status is ServerStatus.READY:
                    if self.router is None and await self._routes():
                        owner = self._owner
                        router = RouterModels(
                            owner.pid, owner.who, self._config, LlamaServer(self.probe), self._emit
                        )
                        await router.watch(tasks)  # before it is used
                        self.router = router
                    self._emit(BecameReady(self._generation, time.monotonic() - process.age))
            await anyio.sleep(_LOOK_EVERY)

    async def _routes(self) -> bool:
        return await kind_of(self.probe) is RouterKind.LLAMA_SERVER

    def _note_work(self, pace: float | None) -> None:
        was_busy, now = self.work.busy, time.monotonic()
        self.work.look(self.probe.slots, pace, now)
        if was_busy or self.work.busy:
            self._emit(Working(self.work.work(now)))

    def _notify(self, message: str, level: Level = Level.INFO) -> None:
        self._emit(Activity.now(message, level))
