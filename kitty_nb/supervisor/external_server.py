"""A llama-server that kitty_nb did not start: attached to, watched, never stopped."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import psutil

from kitty_nb.errors import ServerFailedError, StartCancelledError
from kitty_nb.supervisor.events import (
    Activity,
    Level,
    RouterLoad,
    ServerStatus,
    Stage,
    Working,
)
from kitty_nb.supervisor.health import HealthProbe, ModelStatus
from kitty_nb.supervisor.history import LoadRecorder, Outcome
from kitty_nb.supervisor.lifecycle import BecameReady, Exited, LoadBegan
from kitty_nb.supervisor.load_progress import LoadMeter
from kitty_nb.supervisor.port_owner import PortOwner, owner_of, served_by
from kitty_nb.supervisor.process import ServerProcess, Usage
from kitty_nb.supervisor.registry import record_of
from kitty_nb.supervisor.requests import RequestLog
from kitty_nb.supervisor.workload import WorkMeter

if TYPE_CHECKING:
    from anyio.abc import TaskGroup
    from pydantic import SecretStr

    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.server import Emit

_LOOK_EVERY = 1.0  # seconds
_ASK_ROUTER_EVERY, _SHOW_EVERY = 0.2, 0.05
_CHILD_WITHIN, _UNLOADED_WITHIN = 0.5, 5.0  # seconds
_WHOLE = 1.0  # seconds; the load of an older child was not seen from its beginning


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
    """Watches the server until it ends or is detached from.

    Args:
        generation: The number that its reports carry.
        config: Settings of the profile whose port it has.
        owner: The server.
        emit: Called with each event, report and answer to a health check.

    Attributes:
        owner: The server, with what it serves now.
    """

    def __init__(self, generation: int, config: ServerConfig, owner: PortOwner, emit: Emit) -> None:
        # The key of another profile's server is on record; any other may have the configured one.
        record = record_of(owner.pid, config.log_dir)
        self.owner = owner
        self.api_key: SecretStr | None = record.api_key if record else config.api_key
        self.devices = (record and record.devices) or ()
        self.lines: tuple[str, ...] = ()  # its log is its owner's
        self.probe = HealthProbe(config, self.api_key, trusted=True, sleeps=owner.sleeps)
        self.work = WorkMeter(RequestLog(0.0, 0.0))  # by its slots alone
        self._generation, self._config, self._emit = generation, config, emit
        self._watching, self._loading = anyio.CancelScope(), anyio.CancelScope()
        self._turn = anyio.Lock()  # one request to load at a time
        self._models: dict[str, ModelStatus] = {}  # a router's models
        self._followed: dict[str, anyio.Event] = {}  # loads under way
        self._over = False

    def stop(self, _force: bool) -> None:
        """Detach from it."""
        self._watching.cancel()

    async def run(self) -> None:
        """Watch it. Once it has ended or is detached from, it counts as stopped."""
        self._notify(f"Attached to {self.owner.who}, which kitty_nb did not start.")
        try:
            with self._watching:
                async with anyio.create_task_group() as tasks:
                    with suppress(psutil.Error, OSError):  # it has ended
                        await self._watch(ServerProcess(self.owner.pid, None), tasks)
                    tasks.cancel_scope.cancel()
        finally:
            self._over = True
            self._loading.cancel()
            with anyio.CancelScope(shield=True):
                async with self._turn:
                    await self.probe.aclose()
        going = "detached; it keeps running" if self._watching.cancel_called else "exited"
        self._notify(f"{self.owner.who}: {going}.")
        self._emit(Exited(self._generation, going, time.monotonic(), asked=True))

    async def _watch(self, process: ServerProcess, tasks: TaskGroup) -> None:
        status = ServerStatus.STARTING
        while process.runs():
            health = await self.probe.check_activity()
            self._emit(health)
            self._note_work(health.tokens_per_second)
            if health.status is not status:
                status = health.status
                if status is ServerStatus.LOADING:
                    self._emit(LoadBegan(self._generation))
                elif status is ServerStatus.READY:
                    if self.owner.models is None and await self.probe.is_router():
                        await self._look()  # before it is used
                        tasks.start_soon(self._watch_models, tasks)
                    self._emit(BecameReady(self._generation, time.monotonic() - process.age))
            await anyio.sleep(_LOOK_EVERY)

    def _note_work(self, pace: float | None) -> None:
        was_busy, now = self.work.busy, time.monotonic()
        self.work.look(self.probe.slots, pace, now)
        if was_busy or self.work.busy:
            self._emit(Working(self.work.work(now)))

    # A router: a server that loads and unloads models, each in a child of its own.

    def named(self, model: str | Path | None) -> str:
        """Return a router's own name of one of its models.

        Args:
            model: That name, or a file that is called so; None for the model that it serves.

        Raises:
            ServerFailedError: It is no router, or has no such model.
        """
        models = self.owner.models
        if models is None:
            raise ServerFailedError(
                f"kitty_nb did not start {self.owner.who}, so it can only detach from it, not"
                " restart it or switch its model."
            )
        names = (self.owner.alias,) if model is None else (str(model), PurePath(model).stem)
        name = next((name for name in names if name in models), None)
        if name is None:
            what = "serves no model" if model is None else f"has no model {str(model)!r}"
            there = ", ".join(models) or "none"
            raise ServerFailedError(f"The router {self.owner.who} {what}. Its models: {there}.")
        return name

    async def load(self, name: str, *, fresh: bool) -> None:
        """Load one of a router's models. If cancelled, it is unloaded again.

        Args:
            name: Which one.
            fresh: Unload it before, where it is loaded.

        Raises:
            ServerFailedError: The router does not load it.
            StartCancelledError: The router was detached from, or has ended, before that.
        """
        async with self._turn:
            with anyio.CancelScope() as self._loading:
                if self._over:
                    self._loading.cancel()
                await self._load(name, fresh=fresh)
        if self._loading.cancelled_caught:
            raise StartCancelledError(f"kitty_nb detached from the router before it loaded {name}.")

    async def _load(self, name: str, *, fresh: bool) -> None:
        if name in self._followed:
            await self._followed[name].wait()
        status = await self._look(name)
        if fresh and status == ModelStatus.LOADED:
            await self._unload(name)
            status = ModelStatus.UNLOADED
        if status != ModelStatus.LOADED and not await self._follow(name):
            raise ServerFailedError(f"The router failed to load {name}. See the router's log.")

    async def _unload(self, name: str) -> None:
        await self._order("unload", name)
        while await self._look(name) != ModelStatus.UNLOADED:  # noqa: ASYNC110 (nothing tells)
            await anyio.sleep(_ASK_ROUTER_EVERY)

    async def _order(self, verb: str, name: str) -> None:
        if reason := await self.probe.order(verb, name):
            raise ServerFailedError(f"The router refused to {verb} {name}: {reason}")

    async def _look(self, preferred: str | None = None) -> ModelStatus:
        """Read the status of its models, and report those that it has unloaded.

        A router that is too busy to answer has them as before.

        Args:
            preferred: The model that is in use from now on, if it is loaded.

        Returns:
            That model's status; one that is gone is unloaded.
        """
        if models := await self.probe.router_models():
            before, self._models = self._models, models
            loaded = [name for name, status in models.items() if status == ModelStatus.LOADED]
            for name, status in models.items():
                if status == ModelStatus.UNLOADED and before.get(name) == ModelStatus.LOADED:
                    self._emit(RouterLoad(name, None))
                    self._notify(f"The router unloaded {name}.")
            wanted = (preferred, self.owner.alias, *loaded)
            alias = next((name for name in wanted if name in loaded), None)
            if (alias, tuple(models)) != (self.owner.alias, self.owner.models):
                child = await anyio.to_thread.run_sync(_child, self.owner.pid, alias)
                model = child.model.name if child and child.model else None
                self.owner = replace(self.owner, alias=alias, model=model, models=tuple(models))
        return self._models.get(preferred or "", ModelStatus.UNLOADED)

    async def _watch_models(self, tasks: TaskGroup) -> None:
        """Follow the loads of a router, whoever asks for them."""
        while True:
            await self._look()
            for name, status in self._models.items():
                if status == ModelStatus.LOADING:
                    tasks.start_soon(self._follow, name)
            await anyio.sleep(_ASK_ROUTER_EVERY)

    async def _follow(self, name: str) -> bool:
        """Show one load from its beginning to its end; return whether it succeeded.

        It is requested here, unless it is under way: a short one may be over at the next poll.
        """
        if other := self._followed.get(name):
            await other.wait()
            return self._models.get(name) == ModelStatus.LOADED
        over = self._followed[name] = anyio.Event()
        asked = self._models.get(name) != ModelStatus.LOADING
        try:
            if asked:
                await self._order("load", name)
                self._models[name] = ModelStatus.LOADING
            return await self._show_load(name)
        except anyio.get_cancelled_exc_class():
            if asked:
                with anyio.move_on_after(_UNLOADED_WITHIN, shield=True):
                    with suppress(ServerFailedError):
                        await self._unload(name)
                self._emit(RouterLoad(name, None))
            raise
        finally:
            del self._followed[name]
            over.set()

    async def _show_load(self, name: str) -> bool:
        """Publish a load's progress, by its child's memory and the history of loads."""
        self._notify(f"The router is loading {name}.")
        child = await self._find_child(name)
        began = time.monotonic() - (child.process.age if child else 0.0)
        meter = LoadMeter()
        meter.measure(Usage(0, 0), 0.0)
        meter.enter_stage(Stage.STARTING, 0.0)
        # The history knows a load by the child's command line.
        known_by = {"model": child.model, "extra_args": child.arguments} if child else {}
        config = self._config.model_copy(update={"model": None, **known_by})
        whole = child is not None and child.process.age < _WHOLE
        warn = partial(self._notify, level=Level.WARNING)
        recorder = LoadRecorder(config, meter, warn, whole=whole)
        await recorder.forecast()
        status, ask_at = ModelStatus.LOADING, 0.0
        while status == ModelStatus.LOADING:
            elapsed = time.monotonic() - began
            usage = child.process.usage() if child else None
            meter.enter_stage(Stage.LOADING, elapsed)
            if usage:
                meter.measure(usage, elapsed)
            pause = min(meter.pause(elapsed), _SHOW_EVERY)
            self._show(name, meter, elapsed, pause)
            await anyio.sleep(pause)
            if elapsed >= ask_at:
                status, ask_at = await self._look(name), elapsed + _ASK_ROUTER_EVERY
        loaded, elapsed = status == ModelStatus.LOADED, time.monotonic() - began
        if loaded:
            meter.enter_stage(Stage.READY, elapsed)
            self._show(name, meter, elapsed, 0.0)
            self._notify(f"The router loaded {name} in {elapsed:.1f} s.", Level.SUCCESS)
        else:
            self._emit(RouterLoad(name, None))
            self._notify(f"The router failed to load {name}. See the router's log.", Level.WARNING)
        await recorder.record(elapsed, Outcome.READY if loaded else Outcome.CRASHED)
        return loaded

    async def _find_child(self, name: str) -> _Child | None:
        """Find the process of a model; it may start a moment after the request."""
        child: _Child | None = None
        with anyio.move_on_after(_CHILD_WITHIN):
            while child is None:
                child = await anyio.to_thread.run_sync(_child, self.owner.pid, name)
                await anyio.sleep(0.0 if child else _SHOW_EVERY)
        return child

    def _show(self, name: str, meter: LoadMeter, elapsed: float, lasting: float) -> None:
        if name == next(reversed(self._followed)):  # of several, the latest
            self._emit(RouterLoad(name, meter.progress(elapsed, lasting)))

    def _notify(self, message: str, level: Level = Level.INFO) -> None:
        self._emit(Activity.now(message, level))


@dataclass(frozen=True, slots=True)
class _Child:
    """The process of one model. The port, which changes, is not among its `arguments`."""

    process: ServerProcess
    model: Path | None
    arguments: tuple[str, ...]


def _child(router: int, name: str | None) -> _Child | None:
    """Find the process that a router has started for a model; None where the system hides it."""
    with suppress(psutil.Error):
        for process in psutil.Process(router).children():
            with suppress(psutil.Error, OSError):
                words = process.cmdline()
                model, alias = served_by(words)
                if alias and name in alias.split(","):
                    return _Child(
                        ServerProcess(process.pid, None),
                        Path(model) if model else None,
                        tuple(word for flag, word in pairwise(words) if flag != "--port"),
                    )
    return None
