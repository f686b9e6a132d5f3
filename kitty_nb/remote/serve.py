"""The far end: `kitty-nb serve --stdio` supervises a profile's server for another machine.

Standard input and output are the connection. However it ends, the server keeps running, as it does
when a kernel ends, and the next connection finds it.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from anyio.from_thread import run_sync as run_on_loop
from anyio.to_thread import run_sync

from kitty_nb.catalog.catalog import ModelCatalog, ScanStep
from kitty_nb.catalog.stores import model_stores
from kitty_nb.config.profiles import Places
from kitty_nb.errors import KittyError, first_of
from kitty_nb.remote.protocol import (
    ANSWERS,
    LONELY_FOR,
    LONGEST,
    PROTOCOL,
    TELL_EVERY,
    WINDOW,
    Command,
    Failure,
    Hello,
    Snapshot,
    Verb,
    dump,
    line,
    load,
    parse,
)
from kitty_nb.supervisor.events import (
    Activity,
    Event,
    HealthChecked,
    Level,
    LoadProgress,
    LogLines,
    ProgressMade,
    RouterLoad,
    StateChanged,
    Working,
)
from kitty_nb.supervisor.history import LoadHistory
from kitty_nb.supervisor.log import follow_log, log_lines
from kitty_nb.supervisor.registry import last_failure, refuse_open_folder, this_boot
from kitty_nb.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from anyio.abc import TaskGroup
    from pydantic import SecretStr

    from kitty_nb.catalog.model import Model
    from kitty_nb.config import ServerConfig

_log = logging.getLogger(__name__)
_SOON = 0.04  # seconds that facts about progress wait for others
_LINES, _NEWS = 10_000, 1_000  # kept for a slow line
_LIST_EVERY = 1.0  # seconds between two lists of models while they are read
_CHUNK = 1 << 16
_STARTS = {Verb.START, Verb.RESTART, Verb.SWITCH}


async def serve(profile: str, receive: int, send: int) -> None:
    """Serve one connection until it ends.

    Args:
        profile: The profile.
        receive: The descriptor to read from.
        send: The descriptor to write to.
    """
    for descriptor in (receive, send):
        os.set_blocking(descriptor, False)
    with suppress(OSError, RuntimeError):
        os.chdir(Path.home())  # its `.env` has the settings
    outbox = Outbox(send)
    hello = Hello(version=version("kitty_nb"), now=time.monotonic(), boot=this_boot())
    try:
        hello = hello.model_copy(update={"places": Places.of_this_machine(profile)})
    except KittyError as error:
        hello = hello.model_copy(update={"problem": str(error)})
    outbox.put(line("hello", PROTOCOL, dump(hello, Hello)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_write, outbox)
        await _Session(outbox).run(_lines(receive))
        tasks.cancel_scope.cancel()


async def _write(outbox: Outbox) -> None:
    try:
        await outbox.run()
    except OSError:  # the connection has ended; reading notices that, too
        _log.info("The connection has ended.")


async def _lines(descriptor: int) -> AsyncGenerator[bytes]:
    """Yield lines until the other end closes, or is silent for too long."""
    held = bytearray()
    while True:
        with anyio.move_on_after(LONELY_FOR) as waiting:
            await anyio.wait_readable(descriptor)
        if waiting.cancelled_caught:
            return
        try:
            read = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            continue
        except OSError:
            return
        if not read or len(held) > LONGEST:
            return
        *whole, rest = (held + read).split(b"\n")
        held = bytearray(rest)
        for one in whole:
            yield bytes(one)


class Outbox:
    """The queue of what to send. A newer fact replaces an older one of its kind.

    Args:
        descriptor: The descriptor to write to, which must not block.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting: dict[object, Event | bytes | Callable[[], bytes]] = {}
        self._count = self._lines_put = self._told = self._heard = 0
        self._wake, self._hurry, self._room = anyio.Event(), anyio.Event(), anyio.Event()

    def put(self, ready: bytes, key: object = None) -> None:
        """Queue a line at the end; it replaces an earlier one with its key."""
        self._lines_put += 1
        self._add(ready, key)
        self._hurry.set()

    def put_later(self, key: object, make: Callable[[], bytes]) -> None:
        """Queue a line that is made when there is room for it, once for all calls until then."""
        self._add(make, key)

    def put_event(self, event: Event) -> None:
        """Queue an event, to go with others that follow soon unless it is important."""
        key: object = None
        match event:
            case LogLines(lines):
                key = LogLines
                before = self._waiting.get(key)
                earlier = before.lines if isinstance(before, LogLines) else ()
                event = LogLines((*earlier, *lines)[-_LINES:])
            case ProgressMade() | Working() | HealthChecked():
                key = type(event)
            case RouterLoad(model):
                key = RouterLoad, model
            case StateChanged(state):  # an answer must not come before the state that it is about
                key = StateChanged, state.status, state.pid, self._lines_put
        if len(self._waiting) >= _NEWS:
            waiting = (one for one, it in self._waiting.items() if isinstance(it, Event))
            self._waiting.pop(next(waiting, None), None)
        self._add(event, key)
        match event:
            case StateChanged() | Activity() | ProgressMade(LoadProgress(fraction=1.0)):
                self._hurry.set()

    def _add(self, what: Event | bytes | Callable[[], bytes], key: object) -> None:
        self._count += 1
        self._waiting.pop(key, None)
        self._waiting[key or self._count] = what
        self._wake.set()

    def heard(self, batch: int) -> None:
        """Note that the other end has read a batch."""
        self._heard = batch
        self._room.set()

    async def run(self) -> None:
        """Write until cancelled.

        Raises:
            OSError: The connection has ended.
        """
        while True:
            with anyio.move_on_after(TELL_EVERY):
                await self._wake.wait()
                with anyio.move_on_after(_SOON):
                    await self._hurry.wait()
            while self._told - self._heard >= WINDOW:
                self._room = anyio.Event()
                await self._room.wait()
            self._wake, self._hurry = anyio.Event(), anyio.Event()
            waiting, self._waiting = self._waiting, {}
            self._told += 1
            lines = [_encoded(one) for one in waiting.values()]
            await self._send(b"".join([*lines, line("told", self._told)]))

    async def _send(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            try:
                left = left[os.write(self._descriptor, left[:_CHUNK]) :]
            except BlockingIOError:
                await anyio.wait_writable(self._descriptor)


def _encoded(one: Event | bytes | Callable[[], bytes]) -> bytes:
    if isinstance(one, bytes):
        return one
    if not isinstance(one, Event):
        return one()
    return line("event", type(one).__name__, dump(one, type(one)))


class _Session:
    """One connection's calls, and the supervisor that its first one opens."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._calls: dict[int, anyio.CancelScope] = {}
        self._key: SecretStr | None = None
        self._progress: LoadProgress | None = None
        self._activities: deque[Activity] = deque(maxlen=50)
        self._supervisor: Supervisor
        self._quick: TaskGroup
        self._starts: TaskGroup

    async def run(self, lines: AsyncGenerator[bytes]) -> None:
        """Answer until the lines end."""
        async with aclosing(lines):
            async for text in lines:
                kind, number, data = parse(text)
                if kind == "heard":
                    self._outbox.heard(number)
                elif kind == "do" and data["verb"] == Verb.OPEN:
                    await self._open(number, data, lines)

    async def _open(self, number: int, data: Any, lines: AsyncGenerator[bytes]) -> None:
        try:
            config = load(data, Command).config
            assert config is not None  # noqa: S101 (the protocol)
            await run_sync(refuse_open_folder, config)
        except (KittyError, ValueError) as error:
            self._fail(number, error)
            return
        self._supervisor = supervisor = Supervisor(config)
        supervisor.detach()  # the end of a connection must not end the server
        supervisor.subscribe(self._remember)
        async with anyio.create_task_group() as self._quick, anyio.create_task_group() as starts:
            self._starts = starts
            async with supervisor:
                self._tell_key()
                self._outbox.put(line("answer", number, dump(self._snapshot(), Snapshot)))
                supervisor.subscribe(self._tell)
                async for text in lines:
                    self._take(*parse(text))
            # Cancelling a start would stop its server, so starts that wait end by themselves.
            self._quick.cancel_scope.cancel()

    def _remember(self, event: Event) -> None:
        match event:
            case ProgressMade(progress):
                self._progress = progress
            case Activity():
                self._activities.append(event)

    def _snapshot(self) -> Snapshot:
        now = self._supervisor
        return Snapshot(
            now.state,
            self._progress,
            now.work,
            now.requests,
            now.log_lines,
            tuple(self._activities),
            model_stores(now.state.config),
            last_failure(now.state.config) or "",
        )

    def _tell(self, event: Event) -> None:
        self._tell_key()
        self._outbox.put_event(event)

    def _tell_key(self) -> None:
        """Send the key before the first state in which it is needed."""
        if self._supervisor.api_key != self._key:
            self._key = self._supervisor.api_key
            self._outbox.put(line("key", None, self._key and self._key.get_secret_value()))

    def _take(self, kind: str, number: int, data: Any) -> None:
        match kind:
            case "heard":
                self._outbox.heard(number)
            case "cancel" if number in self._calls:
                self._calls[number].cancel()
            case "do":
                tasks = self._starts if data["verb"] in _STARTS else self._quick
                scope = self._calls[number] = anyio.CancelScope()
                tasks.start_soon(self._do, number, data, scope)

    async def _do(self, number: int, data: Any, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                command = load(data, Command)
                said = await self._carry_out(command, number)
                self._answer("answer", number, command.verb, said)
        except Exception as error:  # noqa: BLE001 (the caller gets it)
            self._fail(number, first_of(error))
        finally:
            del self._calls[number]

    def _fail(self, number: int, error: Exception) -> None:
        self._outbox.put(line("failed", number, dump(Failure.of(error), Failure)))

    def _answer(self, kind: str, number: int, verb: Verb, said: object) -> None:
        self._outbox.put(line(kind, number, dump(said, ANSWERS[verb])))

    async def _carry_out(self, command: Command, number: int) -> object:
        supervisor, anyway, models = self._supervisor, command.anyway, command.models
        config = command.config or supervisor.state.config
        match command.verb:
            case Verb.START | Verb.RESTART as verb:
                begin = getattr(supervisor, verb)
                return await begin(command.config, command.wait, anyway=anyway)
            case Verb.SWITCH:
                model, begin = command.model or "", supervisor.switch_model
                return await begin(model, command.name, command.wait, anyway=anyway)
            case Verb.STOP:
                return await supervisor.stop(command.force)
            case Verb.ATTACH | Verb.CHECK | Verb.MEMORY as verb:
                return await getattr(supervisor, verb)()
            case Verb.PREVIEW:
                step = partial(self._answer, "step", number, Verb.PREVIEW)
                return await supervisor.preview_memory(command.config, step)
            case Verb.PIN:
                return await supervisor.pin(command.name or "", command.text)
            case Verb.LOG if command.follow:
                await self._follow(config.log_path, number, command.last)
                return ()
            case Verb.LOG:
                last = command.last or _LINES
                return await run_sync(lambda: tuple(deque(log_lines(config.log_path), last)))
            case Verb.SCAN:
                await self._scan(config, number)
                return None
            case Verb.NOTES:
                return await self._history(config).notes(models)
            case Verb.FAVORITE:
                await self._history(config).set_favorite(models[0], command.favorite)
                return None
            case Verb.FITS:
                return await supervisor.stats.fits(models, config)
        raise KittyError(f"There is no verb {command.verb}.")

    def _history(self, config: ServerConfig) -> LoadHistory:
        put = self._outbox.put_event
        return LoadHistory(config.history, lambda it: put(Activity.now(it, Level.WARNING)))

    async def _follow(self, path: Path, number: int, last: int | None) -> None:
        """Send what is written to a log, until cancelled."""
        unsent: deque[str] = deque(maxlen=_LINES)

        def step() -> bytes:
            lines = dump(tuple(unsent), ANSWERS[Verb.LOG])
            unsent.clear()
            return line("step", number, lines)

        def show(words: str) -> None:
            unsent.append(words)
            self._outbox.put_later(("log", number), step)

        await follow_log(path, show, last)

    async def _scan(self, config: ServerConfig, number: int) -> None:
        """Send the list of models, and again whenever it has changed, until cancelled."""
        catalog, due = ModelCatalog(model_stores(config)), 0.0
        sent: tuple[Model, ...] | None = None

        def step(step: ScanStep) -> None:
            nonlocal sent, due
            models = tuple(model for model in step.models if _is_text(model))
            chosen = config.model
            there = chosen and os.path.isfile(chosen)  # noqa: PTH113 (never raises)
            if chosen and there and all(model.path != chosen for model in models):
                models += tuple(filter(None, [catalog.describe(chosen)]))  # it is elsewhere
            last = step.done == step.total
            if (last and models != sent) or (not last and time.monotonic() >= due):
                sent, due = models if last else None, time.monotonic() + _LIST_EVERY
                shown = dump(replace(step, models=models), ScanStep)
                run_on_loop(self._outbox.put, line("step", number, shown), ("scan", number))

        async with aclosing(catalog.watch(on_step=step)) as lists:
            async for _ in lists:
                await anyio.sleep(_LIST_EVERY)  # a download changes its folder all the time


def _is_text(model: Model) -> bool:
    """Return whether a model's path can be sent; a start would refuse any other."""
    try:
        return bool(str(model.path).encode())
    except UnicodeEncodeError:
        return False
