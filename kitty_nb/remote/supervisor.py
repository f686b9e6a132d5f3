"""`RemoteSupervisor`: a supervisor on another machine, with the methods of a local one."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import partial, partialmethod
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
from anyio.to_thread import run_sync
from pydantic import SecretStr

from kitty_nb.catalog.catalog import ScanStep
from kitty_nb.catalog.memory import MemoryPreview
from kitty_nb.errors import (
    ConfigError,
    KittyError,
    OutOfReachError,
    ServerError,
    WaitTimeoutError,
    another_machine,
)
from kitty_nb.network import LOOPBACK
from kitty_nb.remote.connection import FORWARDING_REFUSED, Connection, connect
from kitty_nb.remote.protocol import (
    ANSWERS,
    EVENTS,
    OF_THIS_MACHINE,
    Command,
    Failure,
    Snapshot,
    Verb,
    dump,
    line,
    load,
)
from kitty_nb.supervisor.events import (
    Activity,
    Broadcast,
    Event,
    HealthChecked,
    HealthCheckResult,
    Level,
    LogLines,
    ProgressMade,
    RequestFinished,
    ServerState,
    ServerStatus,
    StateChanged,
    Work,
    Working,
)
from kitty_nb.supervisor.registry import this_boot
from kitty_nb.supervisor.requests import KEPT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence

    from anyio.abc import TaskGroup

    from kitty_nb.catalog.memory import Verdict
    from kitty_nb.catalog.model import Model, ModelNote
    from kitty_nb.catalog.stores import Store
    from kitty_nb.config import ServerConfig
    from kitty_nb.config.profiles import Places
    from kitty_nb.supervisor.events import MemoryUse, Request
    from kitty_nb.supervisor.prompt_keeper import Pin
    from kitty_nb.supervisor.supervisor import OnPreview, OnProgress


_log = logging.getLogger(__name__)
_LINES_KEPT = 2_000
# Seconds.
_ENTERED_WITHIN = 5.0
_TRIED_WITHIN = 9.0  # for an attempt to connect, which continues afterwards
_ANSWERED_WITHIN = 60.0  # for an answer of a machine that is alive; a dead one is noticed sooner
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 15.0
_PAUSE_SHARE = 0.05  # of the time that it has been out of reach


class _Call:
    """A call to the other machine, until it is answered."""

    def __init__(self, verb: Verb, on_step: Callable[[Any], object] | None) -> None:
        self.verb, self.on_step = verb, on_step
        self.done = anyio.Event()
        self.answer: Any = None
        self.error: KittyError | None = None

    def fail(self, error: KittyError) -> None:
        self.error = error
        self.done.set()


class RemoteSupervisor:
    """Starts, watches and stops one llama-server on another machine. An async context manager.

    Its methods are those of `Supervisor`. It connects by itself, and reconnects if the connection
    breaks; meanwhile the server there keeps running, and its state is OUT_OF_REACH.

    Args:
        config: What `start` serves by default; `config.ssh` is the machine.
        patient: Whether entering the context waits for the outcome of the first attempt to connect,
            on a slow machine, too. Else it continues after a few seconds.
    """

    def __init__(self, config: ServerConfig, *, patient: bool = False) -> None:
        assert config.ssh  # noqa: S101 (callers check this)
        self._patient = patient
        self._config, self._host = config, config.ssh
        self._places: Places | None = None
        self._state = ServerState(
            ServerStatus.OUT_OF_REACH, config, error=f"Connecting to {self._host}…"
        )
        self.api_key: SecretStr | None = None
        self.stores: tuple[Store, ...] = ()
        self.stats = self  # it asks there for all that is known of models, as for anything else
        self.work = Work()
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._requests: deque[Request] = deque(maxlen=KEPT)
        self._broadcast: Broadcast[Event] = Broadcast()
        self._connection: Connection | None = None
        self._offset = 0.0  # from the other machine's clock to this one's
        self._ports: dict[tuple[str, int], int] = {}
        self._calls: dict[int, _Call] = {}
        self._numbers = count(1)
        self._tried, self._now = anyio.Event(), anyio.Event()
        self._leaving = False
        self._tasks: TaskGroup

    async def __aenter__(self) -> Self:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._keep_connected)
        try:
            with anyio.move_on_after(_ANSWERED_WITHIN if self._patient else _ENTERED_WITHIN):
                await self._tried.wait()
        except BaseException:
            self.detach()
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._connection and not (self._leaving or self._state.status.idle):
            with anyio.CancelScope(shield=True), suppress(KittyError):
                await self.stop()
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)

    def detach(self) -> None:
        """Let the server keep running when this context ends."""
        self._leaving = True

    @property
    def state(self) -> ServerState:
        """A snapshot of the server's last known state."""
        return self._state

    @property
    def reached(self) -> bool:
        """True while there is a connection."""
        return self._connection is not None

    @property
    def requests(self) -> tuple[Request, ...]:
        """The newest requests that the server has finished since its start, oldest first."""
        return tuple(self._requests)

    @property
    def log_lines(self) -> tuple[str, ...]:
        """The newest lines of the server's log."""
        return tuple(self._lines)

    def catalog(self, config: ServerConfig) -> RemoteCatalog:
        """Return the models of the other machine."""
        return RemoteCatalog(self, config)

    def settled(self, config: ServerConfig) -> ServerConfig:
        """Return settings with the paths that they mean there; unchanged if those are unknown."""
        return self._places.settle(config) if self._places else config

    async def switch_model(
        self, model: str | Path, alias: str | None = None, *waiting: Any, **options: Any
    ) -> ServerState:
        """See `Supervisor.switch_model`; the file is on the other machine."""
        options |= {"model": Path(model), "name": alias}
        return await self._begin(Verb.SWITCH, None, *waiting, **options)

    async def stop(self, force: bool = False) -> ServerState:
        """See `Supervisor.stop`."""
        within = 2 * self._state.config.stop_grace_seconds + _ANSWERED_WITHIN
        return self._near(await self.call(Verb.STOP, within=within, force=force))

    async def attach(self) -> ServerState:
        """See `Supervisor.attach`."""
        return self._near(await self.call(Verb.ATTACH))

    async def check_health(self) -> HealthCheckResult:
        """Check the server's health now."""
        if self._connection is None:
            return HealthCheckResult(ServerStatus.OUT_OF_REACH, message=self._state.error or "")
        try:
            found: HealthCheckResult = await self.call(Verb.CHECK)
        except OutOfReachError as error:
            return HealthCheckResult(ServerStatus.OUT_OF_REACH, message=str(error))
        return found

    async def memory_use(self) -> MemoryUse | None:
        """Measure the server's memory; None without one, or while it is out of reach."""
        found: MemoryUse | None = await self.look_up(Verb.MEMORY)
        return found

    def history(self, config: ServerConfig, _warn: object) -> RemoteHistory:
        """Return the history of loads and favourites there."""
        return RemoteHistory(self, config)

    async def fits(self, models: Sequence[Path], config: ServerConfig) -> dict[Path, Verdict]:
        """Judge which models would fit into the memory that is free there now."""
        return await self.look_up(Verb.FITS, models=(*models,), config=config) or {}

    async def preview_memory(
        self, config: ServerConfig | None = None, on_preview: OnPreview | None = None
    ) -> MemoryPreview:
        """See `Supervisor.preview_memory`; the memory is that of the other machine."""
        try:
            found: MemoryPreview = await self.call(Verb.PREVIEW, on_preview, config=config)
        except OutOfReachError as error:
            return MemoryPreview(problem=str(error))
        return found

    async def pin(self, name: str, text: str) -> Pin:
        """See `Supervisor.pin`."""
        if not (isinstance(name, str) and name.strip() and text):
            raise ServerError("A pinned prompt needs a name and a text.")
        found: Pin = await self.call(Verb.PIN, within=None, name=name, text=text)
        return found

    def events(self) -> AsyncGenerator[Event, None]:
        """Yield events from now on. A reader that is too far behind loses the newest ones."""
        return self._broadcast.stream()

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call back with each event on the supervisor's loop; calling the result unsubscribes."""
        return self._broadcast.subscribe(callback)

    async def call(
        self,
        verb: Verb,
        on_step: Callable[[Any], object] | None = None,
        *,
        within: float | None = _ANSWERED_WITHIN,
        **takes: Any,
    ) -> Any:
        """Have the other machine do something, and return its answer.

        If this is cancelled, it is cancelled there, too.

        Args:
            verb: What to do.
            on_step: Called with each result before the last.
            within: Seconds to wait for the answer; None for as long as it takes.
            **takes: Fields of `Command`.

        Raises:
            OutOfReachError: There is no connection, or it broke.
            WaitTimeoutError: The other machine took longer.
            KittyError: The error that was raised there.
        """
        connection = await self._reached()
        if takes.get("config"):
            takes["config"] = self.settled(takes["config"])
        number, call = next(self._numbers), _Call(verb, on_step)
        self._calls[number] = call
        try:
            await connection.send(line("do", number, dump(Command(verb=verb, **takes), Command)))
            with anyio.move_on_after(within):
                await call.done.wait()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True), suppress(OutOfReachError):
                await connection.send(line("cancel", number))
            raise
        finally:
            self._calls.pop(number, None)
        if not call.done.is_set():
            raise WaitTimeoutError(f"{self._host} did not finish within {within:.0f} s.")
        if call.error:
            raise call.error
        return call.answer

    async def look_up(self, verb: Verb, **takes: Any) -> Any:
        """Ask, but not by a new attempt to connect: it is for drawing, and will be asked again.

        Returns:
            The answer; None while the machine is out of reach, or too slow.
        """
        try:
            return await self.call(verb, **takes) if self.reached else None
        except (OutOfReachError, WaitTimeoutError):
            return None

    async def _begin(
        self,
        verb: Verb,
        config: ServerConfig | None = None,
        wait_for_ready: bool = True,
        on_progress: OnProgress | None = None,
        **takes: Any,
    ) -> ServerState:
        """See `Supervisor.start` and `restart`. A call continues there if the connection breaks."""

        def relay(event: Event) -> None:
            if on_progress and isinstance(event, HealthChecked):
                on_progress(event.result, event.attempt, event.max_attempts)

        if config and config.ssh != self._host:
            raise another_machine(config.ssh, self._host)
        self._config = config or self._config
        unsubscribe = self.subscribe(relay)
        try:
            await self.call(verb, within=None, config=config, wait=wait_for_ready, **takes)
        finally:
            unsubscribe()
        return self._state

    start = partialmethod(_begin, Verb.START)
    restart = partialmethod(_begin, Verb.RESTART)

    async def _reached(self) -> Connection:
        """Return the connection, if necessary after another attempt to connect.

        Raises:
            OutOfReachError: The machine can't be reached.
        """
        if self._connection is None:
            self._now.set()  # without the rest of the pause
            with anyio.move_on_after(_TRIED_WITHIN):
                await self._tried.wait()
        if self._connection is None:
            raise OutOfReachError(self._state.error or f"{self._host} is out of reach.")
        return self._connection

    def host(self, work: Callable[[], Awaitable[object]]) -> anyio.CancelScope:
        """Run something beside the connection, until it is cancelled or the context ends."""
        scope = anyio.CancelScope()

        async def scoped() -> None:
            with scope:
                await work()

        self._tasks.start_soon(scoped)
        return scope

    async def connected(self) -> None:
        """Wait until the machine is reached."""
        while self._connection is None:
            await self._tried.wait()
            await anyio.lowlevel.checkpoint()

    async def _keep_connected(self) -> None:
        """Connect, and reconnect if the connection breaks: soon at first, more rarely later on."""
        lost_at = time.monotonic()
        while True:
            try:
                async with connect(self._config, self._hear_ssh) as connection:
                    await self._attend(connection)
                    reason = await connection.why_ended()
            except OutOfReachError as error:
                reason = str(error)
            except OSError as error:  # such as a full disk
                reason = f"This machine can't connect to {self._host}: {error}."
            except (ValueError, TypeError, LookupError, ConfigError):
                _log.info("Can't parse a line from the other machine.", exc_info=True)
                reason = (
                    f"{self._host} sent a message that this version of kitty_nb can't parse."
                    " Install the same version on both."
                )
            worked = self._connection is not None
            self._now = anyio.Event()
            self._lose(reason)
            if worked:  # another attempt at once: usually only the connection is gone
                lost_at = time.monotonic()
                continue
            pause = (time.monotonic() - lost_at) * _PAUSE_SHARE
            with anyio.move_on_after(min(max(pause, _FIRST_PAUSE), _LONGEST_PAUSE)):
                await self._now.wait()

    def _lose(self, reason: str) -> None:
        lost, self._connection = self._connection is not None, None
        for call in self._calls.values():
            call.fail(OutOfReachError(reason))
        self.work = Work()
        kept = " The lost connection does not stop the server there." if self._state.pid else ""
        before, self._state = (
            self._state,
            replace(
                self._state,
                status=ServerStatus.OUT_OF_REACH,
                ready_since=None,
                retry_at=None,
                error=f"{reason}{kept}" if lost else reason,
            ),
        )
        if self._state != before:
            self._broadcast.publish(StateChanged(self._state))
            self._notify(self._state.error or "", Level.WARNING if lost else Level.ERROR)
        tried, self._tried = self._tried, anyio.Event()
        tried.set()

    async def _attend(self, connection: Connection) -> None:
        """Open the profile there, and handle its lines until the connection ends.

        Raises:
            OutOfReachError: The profile can't run there.
        """
        if connection.hello.problem:
            raise OutOfReachError(f"{self._host}: {connection.hello.problem}")
        self._offset = time.monotonic() - connection.hello.now
        self._places, self.api_key = connection.hello.places, None  # sent before the answer, if any
        command = Command(verb=Verb.OPEN, config=self.settled(self._config))
        await connection.send(line("do", 0, dump(command, Command)))
        while (found := await connection.line()) is not None:
            match found:
                case "told", number, _:
                    await connection.send(line("heard", number))
                case "key", _, key:
                    self.api_key = key and SecretStr(key)
                case "event", name, data:
                    await self._note(connection, load(data, EVENTS[name]))
                case "answer", 0, data:
                    await self._opened(connection, load(data, Snapshot))
                case "failed", 0, data:
                    raise OutOfReachError(f"{self._host}: {load(data, Failure).error()}")
                case kind, int(number), data if call := self._calls.get(number):
                    self._take(call, kind, data)

    def _take(self, call: _Call, kind: str, data: Any) -> None:
        if kind == "failed":
            call.fail(load(data, Failure).error())
        elif kind == "answer":
            call.answer = load(data, ANSWERS[call.verb]) if data is not None else None
            call.done.set()
        elif call.on_step:
            step = load(data, ANSWERS[call.verb])
            try:
                call.on_step(step)
            except Exception:  # noqa: BLE001 (whatever a user's callback raises)
                _log.exception("A callback failed.")

    async def _opened(self, connection: Connection, found: Snapshot) -> None:
        again, self.stores, pid = bool(self.stores), found.stores, self._state.pid
        self._lines = deque(found.lines, maxlen=_LINES_KEPT)
        self._requests = deque(found.requests, maxlen=KEPT)
        self.work = found.work
        if found.progress:
            self._broadcast.publish(ProgressMade(found.progress))
        state = await self._tunnelled(connection, found.state)
        self._connection, self._state = connection, state
        self._broadcast.publish(StateChanged(state))
        if found.lines:
            self._broadcast.publish(LogLines(found.lines))
        if again:
            self._notify(f"Reached {self._host} again.", Level.SUCCESS)
            if pid and state.status.idle:
                reason = f"The server on {self._host} exited meanwhile. {found.failure}"
                self._notify(reason.rstrip(), Level.ERROR)
        else:
            for activity in found.activities:
                self._broadcast.publish(activity)
        self._tried.set()

    async def _note(self, connection: Connection, event: Event) -> None:
        match event:
            case StateChanged(state):
                before, self._state = self._state, await self._tunnelled(connection, state)
                if state.status is ServerStatus.STARTING is not before.status:
                    self._lines.clear()
                    self._requests.clear()
                event = StateChanged(self._state)
            case LogLines(lines):
                self._lines.extend(lines)
            case RequestFinished(request):
                self._requests.append(request)
            case Working(work):
                self.work = work
        self._broadcast.publish(event)

    async def _tunnelled(self, connection: Connection, state: ServerState) -> ServerState:
        """Return a state of the other machine as seen from here, with a tunnel to its server."""
        there = urlsplit(state.config.endpoint)
        way = there.hostname or LOOPBACK, state.config.port
        if state.pid is not None:
            # If both are one machine, the tunnel must not take the port that the server will use.
            same = connection.hello.boot == this_boot()
            here = self._ports.get(way, 0 if same else state.config.port)
            self._ports[way] = await connection.forward(*way, here)
        return self._near(state)

    def _near(self, state: ServerState) -> ServerState:
        own = self._config
        mine = {name: getattr(own, name) for name in (*OF_THIS_MACHINE, "api_key")}
        there = urlsplit(state.config.endpoint)
        port = self._ports.get((there.hostname or LOOPBACK, state.config.port))
        return replace(
            state,
            config=state.config.model_copy(update=mine),
            ready_since=state.ready_since and state.ready_since + self._offset,
            retry_at=state.retry_at and state.retry_at + self._offset,
            address=f"http://{LOOPBACK}:{port}" if port else None,
        )

    def _hear_ssh(self, words: str) -> None:
        if FORWARDING_REFUSED.search(words):
            self._notify(
                f"sshd on {self._host} forwards no ports, so the server there can't be reached"
                " from here. Set AllowTcpForwarding to yes or local in its sshd_config.",
                Level.ERROR,
            )

    def _notify(self, message: str, level: Level) -> None:
        self._broadcast.publish(Activity.now(message, level))


class RemoteCatalog:
    """The list of another machine's models, with the part of `ModelCatalog` that a picker uses.

    Args:
        supervisor: The connection to that machine.
        config: The settings that locate the models.
    """

    def __init__(self, supervisor: RemoteSupervisor, config: ServerConfig) -> None:
        self._supervisor, self._config = supervisor, config

    @property
    def stores(self) -> tuple[Store, ...]:
        """The folders there."""
        return self._supervisor.stores

    def describe(self, _path: Path) -> Model | None:
        """Return None: a new model there is soon listed by its own machine."""
        return None

    async def watch(self, *, on_step: Callable[[ScanStep], object]) -> AsyncGenerator[list[Model]]:
        """Yield the list, and again whenever it has changed or the machine is reached again.

        Args:
            on_step: Called, in a worker thread, with each step of each scan.
        """
        send, receive = anyio.create_memory_object_stream[ScanStep](math.inf)
        refusal: KittyError | None = None

        async def ask() -> None:
            nonlocal refusal
            while refusal is None:
                await self._supervisor.connected()
                try:
                    await self._supervisor.call(
                        Verb.SCAN, send.send_nowait, within=None, config=self._config
                    )
                except OutOfReachError:
                    continue
                except KittyError as error:
                    refusal = error
            send.close()

        scope = self._supervisor.host(ask)
        try:
            with send, receive:
                async for step in receive:
                    await run_sync(on_step, step)
                    if step.done == step.total:
                        yield list(step.models)
            if refusal:
                raise refusal
        finally:
            scope.cancel()


class RemoteHistory:
    """See `LoadHistory`.

    Args:
        supervisor: The connection to that machine.
        config: The settings that name the history.
    """

    def __init__(self, supervisor: RemoteSupervisor, config: ServerConfig) -> None:
        self._ask = partial(supervisor.look_up, config=config)

    async def notes(self, models: Iterable[Path]) -> dict[Path, ModelNote]:
        """Return the usage of those models that were loaded there or are favourites."""
        return await self._ask(Verb.NOTES, models=(*models,)) or {}

    async def set_favorite(self, model: Path, favorite: bool) -> None:
        """Store there whether a model is a favourite."""
        await self._ask(Verb.FAVORITE, models=(model,), favorite=favorite)
