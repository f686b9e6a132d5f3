"""The models of a router: a server that loads and unloads them, each in a child process."""

from __future__ import annotations

import re
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

from kitty_nb.config.flags import value_of
from kitty_nb.errors import ServerFailedError, StartCancelledError
from kitty_nb.network import LOOPBACK
from kitty_nb.supervisor.events import (
    Activity,
    Event,
    HealthCheckResult,
    Level,
    LoadProgress,
    RoutedModel,
    RouterLoad,
    ServerStatus,
    Stage,
)
from kitty_nb.supervisor.health import NOT_IN_TIME, NOT_YET, ask_once
from kitty_nb.supervisor.history import LoadRecorder, Outcome
from kitty_nb.supervisor.load_progress import LoadMeter
from kitty_nb.supervisor.port_owner import own_words, served_by
from kitty_nb.supervisor.process import ServerProcess, Usage
from kitty_nb.supervisor.router_program import ModelStatus, RouterApi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from anyio.abc import TaskGroup

    from kitty_nb.config import ServerConfig


_ASK_ROUTER_EVERY, _ASK_CHILD_EVERY, _SHOW_EVERY = 0.2, 2.0, 0.05  # seconds
_CHILD_WITHIN, _UNLOADED_WITHIN = 0.5, 5.0  # seconds
_ENDS_WITHIN = 30.0  # seconds; routers kill a child that has not ended after 10
_WHOLE = 1.0  # seconds; the load of an older child was not seen from its beginning
_USED = re.compile(r"proxying request to model (?P<model>.+) on port \d+")
_SPAWNED = re.compile(r"spawning server instance with name=(?P<model>.+) on port \d+")
_LISTENS = re.compile(r"listening on \S+:(?P<port>\d+)")
_LOG_WITHIN = 1.0  # seconds; a router has written the lines of its child by then
_TOUCH_PAUSE, _QUIET = 0.02, 1.0  # seconds
_FAILED = "The router failed to load {}. See the router's log."
_STALLED = (
    "The load of {} stalled: for {:.0f} s its process used no CPU time and read nothing. If it was"
    " only slow, raise LLAMACPP_STALL_SECONDS."
)


class RouterModels:
    """Follows the models of one router, and has it load and unload them.

    Args:
        pid: The router's process.
        who: The router, in words.
        config: The settings of its profile.
        api: Sends it requests.
        emit: Called with each event.
        pinned: The models that are to stay loaded.
        look_at_log: Reads on in its log, if there is one.

    Attributes:
        alias: The loaded model that is in use; None if none is loaded.
        model: The file name of that model, if known.
        names: All its models.
        pinned: Those that are to stay loaded.
    """

    def __init__(
        self,
        pid: int,
        who: str,
        config: ServerConfig,
        api: RouterApi,
        emit: Callable[[Event], object],
        pinned: Iterable[str] = (),
        look_at_log: Callable[[], object] = lambda: None,
    ) -> None:
        self.alias: str | None = None
        self.model: str | None = None
        self.names: tuple[str, ...] = ()
        self._pid, self._who, self._config, self._emit = pid, who, config, emit
        self._api, self.pinned, self._look_at_log = api, tuple(pinned), look_at_log
        self._loading = anyio.CancelScope()
        self._turn = anyio.Lock()  # one request to load at a time
        self._looking = anyio.Lock()  # the answer of an older look must not replace a newer one's
        self._models: dict[str, ModelStatus] = {}
        self._followed: dict[str, anyio.Event] = {}  # loads under way
        self._progress: dict[str, LoadProgress] = {}  # of loads under way
        self._listens: dict[str, float] = {}  # by port, when the log said so
        self._children: dict[str, tuple[_Child, HealthCheckResult]] = {}  # with their last answers
        self._used = anyio.Event()  # set when a model that is not pinned was used
        self._tasks: TaskGroup | None = None
        self._over = False

    @property
    def models(self) -> dict[str, RoutedModel]:
        """Each model, and the progress of its load."""
        return {
            name: RoutedModel(status.value, self._progress.get(name))
            for name, status in self._models.items()
        }

    def doubt(self, health: HealthCheckResult) -> HealthCheckResult:
        """Return the router's own health, or that of a loaded model that does not answer."""
        for name, (_, answer) in self._children.items():
            if answer is NOT_IN_TIME and self._models.get(name) == ModelStatus.LOADED:
                message = f"{name}: {answer.message}"
                return replace(health, status=ServerStatus.STARTING, message=message)
        return health

    async def watch(self, tasks: TaskGroup) -> None:
        """Begin to follow its models, once they are known."""
        await self._look()
        self._tasks = tasks
        tasks.start_soon(self._watch_models, tasks)
        tasks.start_soon(self._watch_health)
        if self.pinned:
            tasks.start_soon(self._touch_pinned)

    async def close(self) -> None:
        """Cancel a load that was requested here."""
        self._over = True
        self._loading.cancel()
        async with self._turn:
            pass

    def read_log(self, lines: Iterable[str]) -> None:
        """Process lines of its log, which report each request, and loads too short to be seen."""
        for line in lines:
            if (used := _USED.search(line)) and used["model"] not in self.pinned:
                self._used.set()
            if listens := _LISTENS.search(line):
                self._listens[listens["port"]] = time.monotonic()
            if (began := _SPAWNED.search(line)) and self._tasks:
                self._tasks.start_soon(self._follow_child, began["model"])

    async def _follow_child(self, name: str) -> None:
        child = await self._find_child(name)
        if child and child.process.age < _WHOLE and name not in self._followed:
            self._models[name] = ModelStatus.LOADING
            await self._follow(name, order=False)

    async def _touch_pinned(self) -> None:
        """Use the pinned models whenever another was, so that they are not the least recently used.

        The least recently used model is what a router unloads to make room. A pinned one that was
        unloaded nevertheless is loaded again when there are no requests, because two loads at once
        may get in each other's way.
        """
        while True:
            await self._used.wait()
            self._used = anyio.Event()
            for name in self.pinned:
                await self._api.touch(name)
            await anyio.sleep(_TOUCH_PAUSE)
            with anyio.move_on_after(_QUIET) as quiet:
                await self._used.wait()
            for name in self.pinned if quiet.cancelled_caught else ():
                if self._models.get(name) == ModelStatus.UNLOADED:
                    with suppress(ServerFailedError):
                        await self._order("load", name)

    def named(self, model: str | Path | None) -> str:
        """Return the router's own name for one of its models.

        Args:
            model: That name, or a file of that name; None for the model in use.

        Raises:
            ServerFailedError: It has no such model.
        """
        names = (self.alias,) if model is None else (str(model), PurePath(model).stem)
        name = next((name for name in names if name in self.names), None)
        if name is None:
            what = "serves no model" if model is None else f"has no model {str(model)!r}"
            there = ", ".join(self.names) or "none"
            raise ServerFailedError(f"The router {self._who} {what}. Its models: {there}.")
        return name

    async def load(self, name: str, *, fresh: bool) -> None:
        """Load one of the router's models, and report its progress. If cancelled, unload it again.

        Args:
            name: The model.
            fresh: Whether to unload it first, if it is loaded.

        Raises:
            ServerFailedError: The router did not load it.
            StartCancelledError: The router was detached from, or exited, before that.
        """
        loaded = False
        async with self._turn:
            with anyio.CancelScope() as self._loading:
                if self._over:
                    self._loading.cancel()
                try:
                    loaded = await self._load(name, fresh=fresh)
                except ServerFailedError as refusal:
                    self._notify(str(refusal), Level.ERROR)
                    raise
        if self._loading.cancelled_caught:
            raise StartCancelledError(f"kitty_nb detached from the router before it loaded {name}.")
        if not loaded:
            raise ServerFailedError(_FAILED.format(name))

    async def _load(self, name: str, *, fresh: bool) -> bool:
        if name in self._followed:
            await self._followed[name].wait()
        status = await self._look(name)
        if fresh and status == ModelStatus.LOADED:
            await self._unload(name)
            status = await self._look(name)  # a client's request may have loaded it again
        return status == ModelStatus.LOADED or await self._follow(name)

    async def _unload(self, name: str) -> None:
        """Unload a model, and wait until its process has exited.

        Raises:
            ServerFailedError: The router refuses, or the model's process does not exit.
        """
        child = await self._child_now(name)
        with anyio.move_on_after(_ENDS_WITHIN):
            await self._order("unload", name)
            while await self._look(name) != ModelStatus.UNLOADED:
                other = await self._child_now(name) if child else None
                if child and other and other.process.pid != child.process.pid:
                    return  # a client's request has loaded it again
                await anyio.sleep(_ASK_ROUTER_EVERY)
            return
        raise ServerFailedError(
            f"The router did not unload {name} within {_ENDS_WITHIN:.0f} s: its process does not"
            " end. Restart the router."
        )

    async def _order(self, verb: str, name: str) -> None:
        if reason := await self._api.order(verb, name):
            raise ServerFailedError(f"The router refused to {verb} {name}: {reason}")

    async def _look(self, preferred: str | None = None) -> ModelStatus:
        """Read the status of its models, and report those that it has unloaded.

        If the router is too busy to answer, they stay as before.

        Args:
            preferred: The model to use from now on, if it is loaded.

        Returns:
            That model's status; UNLOADED if it is gone.
        """
        async with self._looking:
            if models := await self._api.models():
                await self._note(models, preferred)
        return self._models.get(preferred or "", ModelStatus.UNLOADED)

    async def _note(self, models: dict[str, ModelStatus], preferred: str | None) -> None:
        loaded = [name for name, status in models.items() if status == ModelStatus.LOADED]
        wanted = (preferred, self.alias, *loaded)
        alias = next((name for name in wanted if name in loaded), None)
        if (alias, tuple(models)) != (self.alias, self.names):
            child = await self._child_now(alias)
            self.model = child.model.name if child and child.model else None
        before, self._models = self._models, models
        self.alias, self.names = alias, tuple(models)
        for name, status in models.items():
            if status != ModelStatus.LOADED:
                self._children.pop(name, None)
            if status == ModelStatus.UNLOADED and before.get(name) == ModelStatus.LOADED:
                self._emit(RouterLoad(name, None))
                self._notify(f"The router unloaded {name}.")

    async def _watch_models(self, tasks: TaskGroup) -> None:
        """Follow the loads of a router, whoever requests them."""
        while True:
            await self._look()
            for name, status in self._models.items():
                if status == ModelStatus.LOADING and name not in self._followed:
                    tasks.start_soon(partial(self._follow, name, order=False))
            await anyio.sleep(_ASK_ROUTER_EVERY)

    async def _watch_health(self) -> None:
        """Check the health of loaded models' processes; the router reports only its own."""
        while True:
            await anyio.sleep(_ASK_CHILD_EVERY)
            for name in [n for n, one in self._models.items() if one == ModelStatus.LOADED]:
                known, _ = self._children.get(name, (None, None))
                child = known or await self._child_now(name)
                if child is None or not child.port.isdecimal():
                    continue
                there = f"http://{LOOPBACK}:{child.port}"
                answer = await anyio.to_thread.run_sync(ask_once, there, abandon_on_cancel=True)
                self._children[name] = child, answer
                if answer is NOT_YET:  # it has ended
                    del self._children[name]

    async def _follow(self, name: str, *, order: bool = True) -> bool:
        """Show one load from its beginning to its end; return whether it succeeded.

        With `order`, it is also requested here, unless it is under way: a short one may be over at
        the next poll.
        """
        if other := self._followed.get(name):
            await other.wait()
            return self._models.get(name) == ModelStatus.LOADED
        over = self._followed[name] = anyio.Event()
        asked = order and self._models.get(name) != ModelStatus.LOADING
        try:
            if asked:
                try:
                    await self._order("load", name)
                    self._models[name] = ModelStatus.LOADING
                except ServerFailedError:
                    # A client's request may have begun to load it.
                    if await self._look(name) not in {ModelStatus.LOADING, ModelStatus.LOADED}:
                        raise
                    asked = False
            return await self._show_load(name, asked=asked)
        except anyio.get_cancelled_exc_class():
            if asked:
                with anyio.move_on_after(_UNLOADED_WITHIN, shield=True):
                    with suppress(ServerFailedError):
                        await self._unload(name)
                self._emit(RouterLoad(name, None))
            raise
        finally:
            del self._followed[name]
            self._progress.pop(name, None)
            over.set()

    async def _show_load(self, name: str, *, asked: bool) -> bool:
        """Publish a load's progress, by its child's memory and the history of loads.

        A load that stalls is cancelled, if it was requested here.
        """
        self._notify(f"The router is loading {name}.")
        child = await self._find_child(name)
        while child is None and self._api.queues and await self._look(name) == ModelStatus.LOADING:
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
        status, ask_at, stalled = ModelStatus.LOADING, 0.0, False
        while status == ModelStatus.LOADING and not stalled:
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
            stalled = child is not None and elapsed - meter.moved_at > self._config.stall_seconds
        loaded, elapsed = status == ModelStatus.LOADED, time.monotonic() - began
        if child and status == ModelStatus.UNLOADED and (at := await self._loaded_at(child, began)):
            loaded, elapsed = True, at - began  # and it has made room for another since
        if loaded:
            meter.enter_stage(Stage.READY, elapsed)
            self._show(name, meter, elapsed, 0.0)
            self._notify(f"The router loaded {name} in {elapsed:.1f} s.", Level.SUCCESS)
        elif asked or child or not self._api.queues:  # else it has come and gone unseen
            why = _STALLED.format(name, self._config.stall_seconds) if stalled else None
            self._notify(why or _FAILED.format(name), Level.WARNING)
        if status != ModelStatus.LOADED:
            self._emit(RouterLoad(name, None))
        await recorder.record(elapsed, Outcome.READY if loaded else Outcome.CRASHED)
        if stalled and asked and not loaded:
            await self._unload(name)
        return loaded

    async def _loaded_at(self, child: _Child, began: float) -> float | None:
        """Return when the log said that a server listens, which it does once it has loaded."""
        with anyio.move_on_after(_LOG_WITHIN):
            while (at := self._listens.get(child.port, began)) <= began:
                self._look_at_log()
                await anyio.sleep(_SHOW_EVERY)
            return at
        return None

    async def _child_now(self, name: str | None) -> _Child | None:
        return await anyio.to_thread.run_sync(_child, self._pid, name)

    async def _find_child(self, name: str) -> _Child | None:
        """Find the process of a model; it may start a moment after the request."""
        child: _Child | None = None
        with anyio.move_on_after(_CHILD_WITHIN):
            while child is None:
                child = await self._child_now(name)
                await anyio.sleep(0.0 if child else _SHOW_EVERY)
        return child

    def _show(self, name: str, meter: LoadMeter, elapsed: float, lasting: float) -> None:
        self._progress[name] = meter.progress(elapsed, lasting)
        if name == next(reversed(self._followed)):  # of several, the latest
            self._emit(RouterLoad(name, self._progress[name]))

    def _notify(self, message: str, level: Level = Level.INFO) -> None:
        self._emit(Activity.now(message, level))


@dataclass(frozen=True, slots=True)
class _Child:
    """The process of one model. Its port, which changes, is not among its `arguments`."""

    process: ServerProcess
    model: Path | None
    arguments: tuple[str, ...]
    port: str


def _child(router: int, name: str | None) -> _Child | None:
    """Find the process that a router has started for a model; None if the system hides it."""
    with suppress(psutil.Error):
        for process in psutil.Process(router).children():
            with suppress(psutil.Error, OSError):
                words = own_words(process.cmdline())
                model, alias = served_by(words)
                if alias and name in alias.split(","):
                    return _Child(
                        ServerProcess(process.pid, None),
                        Path(model) if model else None,
                        tuple(word for flag, word in pairwise(words) if flag != "--port"),
                        value_of(words, {"--port"}) or "",
                    )
    return None
