"""Servers that kitty_nb did not start: attached, watched, never ended."""

from __future__ import annotations

import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import psutil
from pydantic import BaseModel, Field, ValidationError

from kitty_nb.errors import ServerFailedError, StartCancelledError
from kitty_nb.supervisor.events import (
    Activity,
    Event,
    HealthCheckResult,
    Level,
    RouterLoad,
    ServerStatus,
    Stage,
)
from kitty_nb.supervisor.health import HealthProbe
from kitty_nb.supervisor.history import Outcome
from kitty_nb.supervisor.lifecycle import BecameReady, Exited, LoadBegan, Report
from kitty_nb.supervisor.load_progress import LoadMeter, LoadRecorder
from kitty_nb.supervisor.port_holder import PortHolder, holder_of, served_by
from kitty_nb.supervisor.process import ServerProcess, Usage
from kitty_nb.supervisor.registry import record_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup
    from pydantic import SecretStr

    from kitty_nb.config import ServerConfig


_LOADING, _LOADED, _UNLOADED = "loading", "loaded", "unloaded"
_NOT_THERE = {_LOADING, _UNLOADED}  # one that sleeps is loaded again by a request
# Seconds. A child that is not seen within that, the system hides.
_CHILD_WITHIN, _LOOK_AGAIN = 0.2, 0.02
_LISTEN_AGAIN, _ASK_AGAIN = 1.0, 0.1


class _Told(BaseModel):
    """How far a child says that its load is: which of its models it reads, and how much of that."""

    stages: tuple[str, ...]
    current: str
    value: float = Field(ge=0, le=1)

    @property
    def share(self) -> float:
        """Of all stages, as if all were as long; the model comes first and is the longest."""
        done = self.stages.index(self.current) if self.current in self.stages else 0
        return (done + self.value) / max(len(self.stages), 1)


class _Status(BaseModel):
    status: str
    progress: _Told | None = None


class _RouterEvent(BaseModel):
    """What `/models/sse` sends, as in llama.cpp's tools/server/README.md."""

    model: str
    data: _Status


@dataclass(slots=True)
class _Load:
    """A load under way. `loaded` is None until it has ended."""

    name: str
    began: float
    whole: bool
    meter: LoadMeter = field(default_factory=LoadMeter)
    ended: anyio.Event = field(default_factory=anyio.Event)
    loaded: bool | None = None

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def end(self, *, loaded: bool) -> None:
        self.loaded = loaded
        self.ended.set()


@dataclass(frozen=True, slots=True)
class _Child:
    """What serves one model. The port, another one each time, is not among its `arguments`."""

    process: ServerProcess
    model: Path | None
    arguments: tuple[str, ...]
    age: float


class RouterWatch:
    """Follows the loads of a router, and has it load and unload.

    A router tells of them, but of a mapped model only that nothing is there and then that all is:
    what the child has in memory and has read counts as well, and the history of loads.

    Args:
        config: The settings of the profile whose port it has.
        pid: The router.
        probe: What asks it.
        publish: Called with each event for the user.
        serves: Called with the name and the file of a model that it has loaded, None without one,
            and with the names of all that it could load.
    """

    def __init__(
        self,
        config: ServerConfig,
        pid: int,
        probe: HealthProbe,
        publish: Callable[[Event], None],
        serves: Callable[[str | None, Path | None, tuple[str, ...]], None],
    ) -> None:
        self._config = config
        self._pid = pid
        self._probe = probe
        self._publish = publish
        self._serves = serves
        self._loads: dict[str, _Load] = {}
        self._listening = False
        self._served: str | None = None
        self._names: tuple[str, ...] = ()

    async def look(self) -> dict[str, str]:
        """See which models it has, and which it serves; return how each of them is."""
        models = await self._probe.router_models()
        if not models:  # it is too busy to answer
            return models
        loaded = [name for name, status in models.items() if status not in _NOT_THERE]
        name = self._served if self._served in loaded else next(iter(loaded), None)
        self._names = tuple(models)
        child = await anyio.to_thread.run_sync(_child, self._pid, name) if name else None
        self._serve(name, child.model if child else None)
        return models

    async def load(self, name: str, *, fresh: bool) -> None:
        """Have it serve a model, and wait until it does. Called off, it is unloaded again.

        Args:
            name: Which of its models.
            fresh: Unload it before, where it is loaded.

        Raises:
            ServerFailedError: It does not.
        """
        try:
            status = await self._until(name, {_UNLOADED, _LOADING, _LOADED})
            if fresh and status != _UNLOADED:
                await self._order("unload", name)
                status = await self._until(name, {_UNLOADED})
            if status == _UNLOADED:
                await self._order("load", name)
            status = await self._until(name, {_UNLOADED, _LOADED})
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await self._probe.order("unload", name)
            raise
        if status == _UNLOADED:
            raise ServerFailedError(f"The router has not loaded {name}. Its own log says why.")
        self._served = name
        await self.look()

    async def _order(self, verb: str, name: str) -> None:
        if reason := await self._probe.order(verb, name):
            raise ServerFailedError(f"The router does not {verb} {name}: {reason}")

    async def _until(self, name: str, wanted: set[str]) -> str:
        """Wait until a model is in one of some conditions, and return it; gone, it is unloaded."""
        while True:
            models = await self._probe.router_models()
            if models or not psutil.pid_exists(self._pid):  # else it is too busy to answer
                status = models.get(name, _UNLOADED)
                if status in wanted or (status not in _NOT_THERE and _LOADED in wanted):
                    return status
            await anyio.sleep(_ASK_AGAIN)

    async def run(self) -> None:
        """Follow its loads until cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                async with aclosing(self._probe.router_events()) as events:
                    async for text in events:
                        if not self._listening:  # nothing is told twice or missed from now on
                            self._listening = True
                            await self._catch_up(tasks)
                        with suppress(ValidationError):  # of downloads and lists of models
                            self._take(_RouterEvent.model_validate_json(text), tasks)
                self._listening = False
                await self._catch_up(tasks)
                await anyio.sleep(_LISTEN_AGAIN)

    async def _catch_up(self, tasks: TaskGroup) -> None:
        """See which models it has loaded, or loads already."""
        models = await self.look()
        for name in (name for name, status in models.items() if status == _LOADING):
            self._begin(name, tasks, whole=False)

    def _serve(self, name: str | None, model: Path | None) -> None:
        self._served = name
        self._serves(name, model, self._names)

    def _take(self, event: _RouterEvent, tasks: TaskGroup) -> None:
        told, load = event.data, self._loads.get(event.model)
        if told.status == _LOADING:
            load = load or self._begin(event.model, tasks, whole=told.progress is None)
            if told.progress:
                load.meter.set_share(told.progress.share, load.elapsed())
        elif load:
            load.end(loaded=told.status == _LOADED)
        else:
            if told.status == _UNLOADED:
                self._publish(RouterLoad(event.model, None))
                self._say(f"The router has unloaded {event.model}.")
            tasks.start_soon(self._catch_up, tasks)

    def _begin(self, name: str, tasks: TaskGroup, *, whole: bool) -> _Load:
        if name not in self._loads:
            self._loads[name] = _Load(name, time.monotonic(), whole)
            tasks.start_soon(self._follow, self._loads[name])
        return self._loads[name]

    async def _follow(self, load: _Load) -> None:
        self._say(f"The router loads {load.name}.")
        child = await self._find_child(load.name)
        if child and not load.whole:
            load.began -= child.age
            load.meter.measure(Usage(0, 0), 0.0)  # what it has loaded so far counts
        load.meter.enter_stage(Stage.STARTING, 0.0)
        # What a load is known by is the child's command line.
        known_by = {"model": child.model, "extra_args": child.arguments} if child else {}
        config = self._config.model_copy(update={"model": None, **known_by})
        whole = load.whole and child is not None
        recorder = LoadRecorder(config, load.meter, self._warn, whole=whole)
        await recorder.forecast()
        while load.loaded is None:
            elapsed = load.elapsed()
            if child and (usage := child.process.usage()):
                load.meter.measure(usage, elapsed)
            pause = load.meter.pause(elapsed)
            self._show(load, elapsed, pause)
            with anyio.move_on_after(pause):
                await load.ended.wait()
            if not (load.whole and self._listening):  # its end may not be told
                models = await self._probe.router_models()
                if models and models.get(load.name) != _LOADING:
                    load.end(loaded=models.get(load.name) == _LOADED)
        del self._loads[load.name]
        elapsed = load.elapsed()
        if load.loaded:
            load.meter.enter_stage(Stage.READY, elapsed)
            self._serve(load.name, child.model if child else None)
            self._show(load, elapsed)
            self._say(f"The router has loaded {load.name} in {elapsed:.1f} s.", Level.SUCCESS)
        else:
            self._publish(RouterLoad(load.name, None))
            self._warn(f"The router has not loaded {load.name}. Its own log says why.")
        outcome = Outcome.READY if load.loaded else Outcome.CRASHED
        await recorder.record(elapsed, outcome)

    async def _find_child(self, name: str) -> _Child | None:
        with anyio.move_on_after(_CHILD_WITHIN):
            while True:
                if child := await anyio.to_thread.run_sync(_child, self._pid, name):
                    return child
                await anyio.sleep(_LOOK_AGAIN)
        return None

    def _show(self, load: _Load, elapsed: float, lasting: float = 0.0) -> None:
        if load.name == next(reversed(self._loads), load.name):
            self._publish(RouterLoad(load.name, load.meter.progress(elapsed, lasting)))

    def _say(self, message: str, level: Level = Level.INFO) -> None:
        self._publish(Activity(message, level, time.time()))

    def _warn(self, message: str) -> None:
        self._say(message, Level.WARNING)


def _child(router: int, name: str) -> _Child | None:
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
                        time.time() - process.create_time(),
                    )
    return None


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
        emit: Called with each event, report and answer to a health check.
    """

    def __init__(
        self,
        generation: int,
        config: ServerConfig,
        holder: PortHolder,
        emit: Callable[[Event | Report | HealthCheckResult], None],
    ) -> None:
        # Another profile's server has left us its key; anybody else's may have the configured one.
        record = record_of(holder.pid, config.log_dir)
        self.generation = generation
        self.holder = holder
        self.api_key: SecretStr | None = record.api_key if record else config.api_key
        self.devices = (record and record.devices) or ()
        self.probe = HealthProbe(config, self.api_key, trusted=True, sleeps=holder.sleeps)
        self._emit = emit
        self._router = RouterWatch(config, holder.pid, self.probe, emit, self._serves)
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
        self._emit(Exited(self.generation, going, time.monotonic(), asked=True))

    def stop(self, _force: bool) -> None:
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
            self._emit(health)
            if health.status is not status:
                status = health.status
                if status is ServerStatus.LOADING:
                    self._emit(LoadBegan(self.generation))
                elif status is ServerStatus.READY:
                    if self.holder.models is None and await self.probe.is_router():
                        await self._router.look()  # before it is used
                        tasks.start_soon(self._router.run)
                    since = time.monotonic() - (time.time() - began)
                    self._emit(BecameReady(self.generation, since))
            await anyio.sleep(_LOOK_EVERY)

    def _serves(self, alias: str | None, model: Path | None, models: tuple[str, ...]) -> None:
        name = model.name if model else None
        self.holder = replace(self.holder, alias=alias, model=name, models=models)

    def _say(self, message: str) -> None:
        self._emit(Activity(message, Level.INFO, time.time()))
