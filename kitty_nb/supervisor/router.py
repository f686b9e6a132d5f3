"""The loads of a router: a llama-server that serves many models, each by a child of its own."""

from __future__ import annotations

import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import psutil
from pydantic import BaseModel, Field, ValidationError

from kitty_nb.supervisor.events import Activity, Event, Level, RouterLoad, Stage
from kitty_nb.supervisor.history import Outcome
from kitty_nb.supervisor.load_journal import LoadJournal
from kitty_nb.supervisor.load_progress import LoadMeter
from kitty_nb.supervisor.port_holder import served_by
from kitty_nb.supervisor.process import ServerProcess, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup

    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.health import HealthProbe

_LOADING, _LOADED, _UNLOADED = "loading", "loaded", "unloaded"
# Seconds. A child that is not seen within that, the system hides.
_CHILD_WITHIN, _LOOK_AGAIN = 0.2, 0.02
_LISTEN_AGAIN = 1.0


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
    """Follows the loads of a router, where the server is one.

    A router tells of them, but of a mapped model only that nothing is there and then that all is:
    what the child has in memory and has read counts as well, and the history of loads.

    Args:
        config: The settings of the profile whose port it has.
        pid: The router.
        probe: What asks it.
        publish: Called with each event for the user.
        serves: Called with the name and the file of a model that it has loaded; None without one.
    """

    def __init__(
        self,
        config: ServerConfig,
        pid: int,
        probe: HealthProbe,
        publish: Callable[[Event], None],
        serves: Callable[[str | None, Path | None], None],
    ) -> None:
        self._config = config
        self._pid = pid
        self._probe = probe
        self._publish = publish
        self._serves = serves
        self._loads: dict[str, _Load] = {}
        self._listening = False

    async def run(self) -> None:
        """Follow its loads until cancelled; return at once where the server is no router."""
        if not await self._probe.is_router():
            return
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
        models = await self._probe.router_models()
        for name in (name for name, status in models.items() if status == _LOADING):
            self._begin(name, tasks, whole=False)
        served = next((name for name, status in models.items() if status == _LOADED), None)
        child = await anyio.to_thread.run_sync(_child, self._pid, served) if served else None
        self._serves(served, child.model if child else None)

    def _take(self, event: _RouterEvent, tasks: TaskGroup) -> None:
        told, load = event.data, self._loads.get(event.model)
        if told.status == _LOADING:
            load = load or self._begin(event.model, tasks, whole=told.progress is None)
            if told.progress:
                load.meter.hear(told.progress.share, load.elapsed())
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
        load.meter.reach(Stage.STARTING, 0.0)
        # What a load is known by is the child's command line.
        known_by = {"model": child.model, "extra_args": child.arguments} if child else {}
        config = self._config.model_copy(update={"model": None, **known_by})
        journal = LoadJournal(config, self._warn, whole=load.whole and child is not None)
        await journal.look(load.meter)
        while load.loaded is None:
            elapsed = load.elapsed()
            if child and (usage := child.process.usage()):
                load.meter.measure(usage, elapsed)
            pause = load.meter.pause(elapsed)
            self._show(load, elapsed, pause)
            with anyio.move_on_after(pause):
                await load.ended.wait()
            if not (load.whole and self._listening):  # its end may not be told
                status = (await self._probe.router_models()).get(load.name)
                if status != _LOADING:
                    load.end(loaded=status == _LOADED)
        del self._loads[load.name]
        elapsed = load.elapsed()
        if load.loaded:
            load.meter.reach(Stage.READY, elapsed)
            self._serves(load.name, child.model if child else None)
            self._show(load, elapsed)
            self._say(f"The router has loaded {load.name} in {elapsed:.1f} s.", Level.SUCCESS)
        else:
            self._publish(RouterLoad(load.name, None))
            self._warn(f"The router has not loaded {load.name}. Its own log says why.")
        outcome = Outcome.READY if load.loaded else Outcome.CRASHED
        await journal.close(load.meter, elapsed, outcome)

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
