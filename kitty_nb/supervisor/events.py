"""The facts that a supervisor publishes, and how they reach subscribers."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar
from urllib.parse import urlsplit
from weakref import finalize

import anyio

from kitty_nb.catalog.model import name_some
from kitty_nb.config import ServerConfig, Task
from kitty_nb.config.flags import PROJECTOR, PROJECTOR_URL, value_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from kitty_nb.supervisor.port_owner import PortOwner


class ServerStatus(StrEnum):
    """The status of a server."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    LOADING = "LOADING"
    READY = "READY"
    STOPPING = "STOPPING"
    RESTARTING = "RESTARTING"
    FAILED = "FAILED"
    CRASHED = "CRASHED"
    OUT_OF_REACH = "OUT OF REACH"  # elsewhere; its status there is unknown

    @property
    def settled(self) -> bool:
        """True if nothing more happens unless somebody asks, or the process dies."""
        return self in {self.STOPPED, self.READY, self.FAILED, self.CRASHED}

    @property
    def idle(self) -> bool:
        """True if there is no process and none is on its way."""
        return self in {self.STOPPED, self.FAILED, self.CRASHED}

    @property
    def absent(self) -> bool:
        """True if there is no process now."""
        return self.idle or self is self.RESTARTING


class Stage(StrEnum):
    """The stages of a load, in order; the value is the displayed name."""

    STARTING = "starting"
    LOADING = "loading weights"
    PREPARING = "preparing"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """The progress of a load.

    Attributes:
        stage: The current stage.
        fraction: 0 to 1, the share of the load's time that has passed; 1 only when the server is
            ready.
        elapsed: Seconds since the start was requested.
        eta: Seconds left. It grows no faster than time passes; None while nothing is known, or
            while a load falls so far behind earlier ones that a truer number would jump.
        overdue: Whether it takes longer than earlier loads suggest.
    """

    stage: Stage
    fraction: float
    elapsed: float
    eta: float | None = None
    overdue: bool = False


@dataclass(frozen=True, slots=True)
class HealthCheckResult:
    """One answer, or none, from the server's `/health`.

    Attributes:
        status: STARTING (no answer), LOADING (it answers that it loads) or READY.
        latency: Seconds the answer took, or None without one.
        message: The answer in words.
        slots_busy: Requests being processed, if the build reports them.
        slots_total: Requests that can be processed at once, if the build reports that.
        asleep: Whether it has freed its model until the next request.
        tokens_per_second: The speed of all answers together, if the build reports it.
        silent_for: Seconds that its longest request has waited, while none has a first token.
    """

    status: ServerStatus
    latency: float | None = None
    message: str = ""
    slots_busy: int | None = None
    slots_total: int | None = None
    asleep: bool = False
    tokens_per_second: float | None = None
    silent_for: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """The part of a prompt that the server has read."""

    total: int  # tokens of the prompt; 0 until it is known how many of them are read
    cached: int  # tokens that were in its cache
    done: int  # tokens that are read, including the cached ones
    seconds: float  # the time that reading has taken so far

    @property
    def fraction(self) -> float:
        """The share of the uncached tokens that have been read, 0 to 1."""
        return (self.done - self.cached) / max(self.total - self.cached, 1)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the first token, at the current pace; None before any tokens are read."""
        read = self.done - self.cached
        return self.seconds / read * (self.total - self.done) if read > 0 else None


@dataclass(frozen=True, slots=True)
class Restored:
    """A kept prompt that a server has restored."""

    tokens: int  # its length
    seconds: float  # seconds that it took
    reading: float | None  # seconds that reading it takes; None if unknown

    def __str__(self) -> str:
        """Return, for example, `12,410 tokens restored in 0.4 s instead of 58 s`."""
        slow = self.reading is not None and self.reading >= 1
        instead = f" instead of {self.reading:.0f} s" if slow else ""
        return f"{self.tokens:,} tokens restored in {self.seconds:.1f} s{instead}"


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a ready server now.

    Attributes:
        busy: Requests being processed.
        slots: Requests that can be processed at once; None if the build doesn't report that.
        reading: The prompt that has been read for the longest time; None while none is being read.
        tokens_per_second: The speed of all answers together; None if the build doesn't report it.
        cached: The share of the latest prompts that came from the cache, 0 to 1; None if unknown.
        accepted: The share of drafted tokens that were accepted; None without drafts.
        restored: The kept prompt that was restored last, until the next request.
    """

    busy: int = 0
    slots: int | None = None
    reading: PromptProgress | None = None
    tokens_per_second: float | None = None
    cached: float | None = None
    accepted: float | None = None
    restored: Restored | None = None


class Ending(StrEnum):
    """The outcome of a request."""

    FINISHED = "finished"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Request:
    """One request that a server has finished, without its contents."""

    at: float  # when the server began to work on it, in seconds since the epoch
    # How it ended: LENGTH if its token limit or the context's end cut the answer, as far as known.
    ended: Ending
    # Tokens of the prompt, including cached ones; None if the log doesn't say.
    prompt_tokens: int | None = None
    answer_tokens: int | None = None  # tokens of the answer; likewise
    first_token: float | None = None  # seconds from its beginning to the first token; likewise
    seconds: float | None = None  # seconds that it took
    # The speed of the answer; None if it has fewer than two tokens.
    tokens_per_second: float | None = None
    # The share of the prompt that came from the cache, 0 to 1; None if not known.
    cached: float | None = None
    # The share of drafted tokens that were accepted; None without drafts.
    accepted: float | None = None
    error: str = ""  # the error that the server reported, if any
    model: str = ""  # the model that a router had answer it, as far as known


def answer_speed(tokens: int, milliseconds: float) -> float | None:
    """Return an answer's tokens per second; None if it has fewer than two tokens.

    The first token comes with the prompt, so a server's time is that of the others. Builds of
    llama-server differ in whether their own speed counts it.
    """
    return (tokens - 1) * 1000 / milliseconds if tokens > 1 and milliseconds > 0 else None


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The memory that a server holds."""

    resident: int  # bytes in RAM, including what is mapped from the model's file
    gpu: int | None = None  # bytes on GPUs; None if unknown


@dataclass(frozen=True, slots=True)
class RoutedModel:
    """One of the models of a router."""

    status: str  # in the router's words: unloaded, loading, loaded or sleeping
    progress: LoadProgress | None = None  # the progress of its load; None without one


@dataclass(frozen=True, slots=True)
class RouterState:
    """The models of a router that was started here."""

    models: dict[str, RoutedModel]  # its models, by the names that clients ask for
    alias: str | None  # the loaded model that is in use; None if none is loaded
    model: str | None  # the file name of that model, if known


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server at a URL."""

    url: str  # its address
    models: tuple[str, ...] = ()  # the names of its models
    alias: str | None = None  # the one to ask; None if neither it nor the settings name one

    model: ClassVar[None] = None
    task: ClassVar[Task] = Task.CHAT

    @property
    def name(self) -> str:
        """Its host."""
        return urlsplit(self.url).netloc

    @property
    def who(self) -> str:
        """A description of it."""
        return f"the server at {self.url}"

    def doubt(self, profile: str) -> str:
        """Return a warning if it doesn't list a profile's model; empty if it does."""
        listed_as = {self.alias, f"{self.alias}:latest"}  # Ollama adds the tag by itself
        if self.alias is None or listed_as.intersection(self.models):
            return ""
        if not self.models:
            return f"It lists no models. Load {self.alias!r} there."
        key = f"LLAMACPP_{profile.upper()}_ALIAS"
        there = name_some(self.models, _SHOWN)
        return f"It lists no model {self.alias!r}. Set {key} to one that it lists: {there}."


@dataclass(frozen=True, slots=True)
class ServerState:
    """A snapshot of one server.

    Attributes:
        status: Its status.
        config: The settings that it was, or would be, started with.
        pid: Its process, while there is one.
        ready_since: When it became ready, in seconds of the monotonic clock.
        restart_count: How often it was restarted or switched since the supervisor began.
        last_health_check: The latest answer, or None before the first.
        retry_at: When it will be restarted after a crash, in seconds of the monotonic clock.
        error: Why it failed or crashed, in a sentence to show.
        free_port: A port to use instead, if another program was using its own.
        attachable: Whether that program is a llama-server that can be watched and used as it is.
        external: The server, if it was attached to or is at a URL rather than started.
        devices: The devices other than the CPU that hold the model, as its engine names them.
        address: Its address from here, if it runs on another machine.
        router: Its models, if it is a router that was started rather than attached to.
    """

    status: ServerStatus
    config: ServerConfig
    pid: int | None = None
    ready_since: float | None = None
    restart_count: int = 0
    last_health_check: HealthCheckResult | None = None
    retry_at: float | None = None
    error: str | None = None
    free_port: int | None = None
    attachable: bool = False
    external: PortOwner | Endpoint | None = None
    devices: tuple[str, ...] = ()
    address: str | None = None
    router: RouterState | None = None

    @property
    def alias(self) -> str:
        """The name that the server answers to."""
        if self.external:
            return self.external.alias or self.external.model or self.external.name
        if self.config.models is not None:
            return (self.router and self.router.alias) or "router"
        return self.config.served_alias

    @property
    def model_name(self) -> str | None:
        """The file name of its model, if known."""
        if self.external:
            return self.external.model
        if self.router:
            return self.router.model
        return self.config.model.name if self.config.model else None

    @property
    def endpoint(self) -> str:
        """The server's base URL."""
        return self.address or self.config.endpoint

    @property
    def uptime(self) -> float | None:
        """Seconds since it became ready; None if it is not."""
        return None if self.ready_since is None else time.monotonic() - self.ready_since

    @property
    def projector(self) -> Path | None:
        """The file that lets the model accept images and audio; None if it accepts only text."""
        return None if self.external else self.config.projector

    @property
    def to_choose(self) -> tuple[str, ...]:
        """The models of a router that has loaded none of them."""
        router = self.external or self.router
        return tuple(router.models or ()) if router and not router.alias else ()

    @property
    def sees(self) -> bool:
        """False if it is known not to take pictures."""
        by_flag = value_of(self.config.extra_args, PROJECTOR | PROJECTOR_URL)
        return bool(self.external or self.router or self.projector or by_flag)

    @property
    def task(self) -> Task:
        """The use of its model."""
        return self.external.task if self.external else self.config.task

    @property
    def doubt(self) -> str:
        """Why a ready server at a URL may refuse requests, in sentences; empty if unknown."""
        asked = self.external if self.status is ServerStatus.READY else None
        return asked.doubt(self.config.profile) if isinstance(asked, Endpoint) else ""

    @property
    def sentence(self) -> str:
        """The state, in a sentence to print."""
        if self.error:
            return f"{self.status}: {self.error}"
        machine = f" on {self.config.ssh}" if self.config.ssh else ""
        if self.status.idle:
            return f"No server is running for the profile {self.config.profile!r}{machine}."
        sight = f" with {self.projector.name}" if self.projector else ""
        model = f"{self.alias}{sight} at {self.endpoint}{machine}"
        uptime = "" if self.uptime is None else f", ready for {self.uptime:.0f} s"
        if self.config.url:
            return f"{self.status}: {model} (not started by kitty_nb). {self.doubt}".rstrip()
        health = self.last_health_check
        silent = health and self.status is ServerStatus.READY is not health.status
        doubt = f" But it is not responding: {health.message}." if health and silent else ""
        where = f" on {', '.join(self.devices)}" if self.devices else ""
        return f"{self.status}: {model} (PID {self.pid}{uptime}){where}.{doubt}"

    @property
    def retry_in(self) -> float | None:
        """Seconds until it is restarted after a crash; None if it will not be."""
        return None if self.retry_at is None else max(0.0, self.retry_at - time.monotonic())


class Level(StrEnum):
    """The severity of an activity."""

    INFO = "info"
    SUCCESS = "success"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The server's state has changed."""

    state: ServerState


@dataclass(frozen=True, slots=True)
class HealthChecked:
    """The once-a-second health check of a start."""

    result: HealthCheckResult  # what the server answered
    attempt: int  # the number of the check in this start, from 1; checks in between are not counted
    max_attempts: int  # the number at which the count stops; a load that progresses continues


@dataclass(frozen=True, slots=True)
class ProgressMade:
    """The progress of a load."""

    progress: LoadProgress


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """The load of a model in a router."""

    model: str  # the name that clients ask for
    # Its progress; None once the model has been unloaded, or the load has failed.
    progress: LoadProgress | None


@dataclass(frozen=True, slots=True)
class Activity:
    """Something the manager did or found, in one line for people."""

    message: str  # the line
    level: Level  # its severity
    at: float  # seconds since the epoch

    @classmethod
    def now(cls, message: str, level: Level = Level.INFO) -> Self:
        """Create one that happens now."""
        return cls(message, level, time.time())


@dataclass(frozen=True, slots=True)
class LogLines:
    """Lines that the server has written to its log."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Working:
    """The work of a ready server, published several times a second while it has any."""

    work: Work


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """A server has finished a request."""

    request: Request


Event = (
    StateChanged
    | HealthChecked
    | ProgressMade
    | RouterLoad
    | Activity
    | LogLines
    | Working
    | RequestFinished
)


E = TypeVar("E")

_HELD = 10_000
_SHOWN = 8  # models
_log = logging.getLogger(__name__)


class Broadcast(Generic[E]):
    """Calls all subscribers with each event, on the thread that publishes it."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[E], object]] = []

    def subscribe(self, callback: Callable[[E], object]) -> Callable[[], None]:
        """Call back with each event; calling the result unsubscribes."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def publish(self, event: E) -> None:
        """Call the subscribers, and log what any of them raises."""
        for callback in tuple(self._subscribers):
            try:
                callback(event)
            except Exception:  # noqa: BLE001 (whatever a user's callback raises)
                _log.exception("An event subscriber failed.")

    def stream(self) -> AsyncGenerator[E, None]:
        """Yield events from now on. A reader that is too far behind loses the newest ones."""
        send, receive = anyio.create_memory_object_stream[E](_HELD)

        def offer(event: E) -> None:
            try:
                send.send_nowait(event)
            except anyio.WouldBlock:
                _log.warning("Dropped an event: a subscriber reads too slowly.")

        stack = ExitStack()
        for undo in (send.close, receive.close, self.subscribe(offer)):
            stack.callback(undo)

        async def read() -> AsyncGenerator[E, None]:
            with stack:
                async for event in receive:
                    yield event

        events = read()
        finalize(events, stack.close).atexit = False  # `read` may never begin
        return events
