"""The facts that a supervisor publishes, and how they reach subscribers."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar
from urllib.parse import urlsplit

import anyio

from kitty_nb.catalog.model import name_some
from kitty_nb.config import ServerConfig, Task

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
    OUT_OF_REACH = "OUT OF REACH"  # elsewhere; what it does there is not known

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
    """The stages of a load, in order; the value is the name that is shown."""

    STARTING = "starting"
    LOADING = "loading weights"
    PREPARING = "preparing"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """The progress of a load.

    Attributes:
        stage: Which part of the load is under way.
        fraction: 0 to 1, the share of the load's time that has passed; 1 only when the server is
            ready.
        elapsed: Seconds since the start was asked for.
        eta: Seconds left. It grows by no more than time passes; None while nothing is known, or
            while a load falls behind its past so far that a truer number would leap.
        overdue: Whether it takes longer than loads of the past suggest.
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
        message: What was answered, in words.
        slots_busy: Requests being worked on, where the build tells.
        slots_total: Requests that can be worked on at once, where the build tells.
        asleep: Whether it has freed its model until the next request.
        tokens_per_second: How fast it answers now, all requests together, where the build tells.
        silent_for: Seconds that it has worked on requests without a first token.
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

    total: int  # tokens of the prompt; 0 until it can be told how many of them are read
    cached: int  # tokens that were in its cache
    done: int  # tokens that are read, with those of the cache
    seconds: float  # the time that reading has taken so far

    @property
    def fraction(self) -> float:
        """The share of the tokens to read that are read, 0 to 1."""
        return (self.done - self.cached) / max(self.total - self.cached, 1)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the first token, at the present pace; None before the first tokens."""
        read = self.done - self.cached
        return self.seconds / read * (self.total - self.done) if read > 0 else None


@dataclass(frozen=True, slots=True)
class Restored:
    """A kept prompt that a server has restored."""

    tokens: int  # its length
    seconds: float  # seconds that it took
    reading: float | None  # seconds that reading it takes; None where that is not known

    def __str__(self) -> str:
        """For example `12,410 tokens restored in 0.4 s instead of 58 s`."""
        slow = self.reading is not None and self.reading >= 1
        instead = f" instead of {self.reading:.0f} s" if slow else ""
        return f"{self.tokens:,} tokens restored in {self.seconds:.1f} s{instead}"


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a ready server now.

    Attributes:
        busy: Requests being worked on.
        slots: Requests that can be worked on at once; None where the build does not tell.
        reading: The prompt that has been read for the longest time; None while none is.
        tokens_per_second: The speed of all answers together; None where the build does not tell.
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
    ended: Ending  # how it ended: LENGTH where its limit of tokens cut the answer, as far as known
    # Tokens of the prompt, with the cached ones; None where the log does not say.
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
    error: str = ""  # what the server said went wrong, if anything


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The memory that a server holds."""

    resident: int  # bytes in RAM, with what is mapped from the model's file
    gpu: int | None = None  # bytes on GPUs, or None where nobody tells


@dataclass(frozen=True, slots=True)
class RoutedModel:
    """One of the models of a router."""

    status: str  # in the router's words: unloaded, loading, loaded or sleeping
    progress: LoadProgress | None = None  # how far its load is; None without one


@dataclass(frozen=True, slots=True)
class RouterState:
    """The models of a router that was started here."""

    models: dict[str, RoutedModel]  # its models, by the names that clients ask for
    alias: str | None  # the model in use, of those that are loaded; None where none is
    model: str | None  # the file name of that model, where that is known


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server at a URL."""

    url: str  # its address
    models: tuple[str, ...] = ()  # the names of its models
    alias: str | None = None  # the one to ask; None where it lists none and the settings name none

    model: ClassVar[None] = None
    task: ClassVar[Task] = Task.CHAT

    @property
    def name(self) -> str:
        """Its host."""
        return urlsplit(self.url).netloc

    @property
    def who(self) -> str:
        """It in words."""
        return f"the server at {self.url}"

    def doubt(self, profile: str) -> str:
        """Say that it lists no such model as a profile asks for; empty if it does."""
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
        status: Where it is in its life.
        config: What it was, or would be, started with.
        pid: Its process, while there is one.
        ready_since: When it became ready, in seconds of the monotonic clock.
        restart_count: How often it was restarted or switched since the supervisor began.
        last_health_check: The latest answer, or None before the first.
        retry_at: When it is started again, in seconds of the monotonic clock, after a crash.
        error: Why it failed or crashed, in a sentence to show.
        free_port: A port to take instead, when its own was in use by another program.
        attachable: Whether that program is a llama-server, to be watched and used as it is.
        external: The server, where it is one that was attached to or is at a URL, not started.
        devices: What it has put the model on beside the processor, as its engine names them.
        address: Where it is reached from here, if it runs on another machine.
        router: Its models, where it is a router that was started, not attached to.
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
        """The file name of its model, where that is known."""
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
        """Seconds since it became ready, or None when it is not."""
        return None if self.ready_since is None else time.monotonic() - self.ready_since

    @property
    def projector(self) -> Path | None:
        """The file by which the model takes in images and sound; None where it takes text only."""
        return None if self.external else self.config.projector

    @property
    def to_choose(self) -> tuple[str, ...]:
        """The models of a router that has loaded none of them."""
        router = self.external or self.router
        return tuple(router.models or ()) if router and not router.alias else ()

    @property
    def sees(self) -> bool:
        """False if it is known not to take pictures."""
        return bool(self.external or self.router or self.projector)

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
        """Seconds until it is started again after a crash, or None when it is not."""
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
    attempt: int  # which check of this start it is, from 1; checks in between are not counted
    max_attempts: int  # the number at which the count stands; a load that moves goes on


@dataclass(frozen=True, slots=True)
class ProgressMade:
    """The progress of a load."""

    progress: LoadProgress


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """The load of a model in a router."""

    model: str  # the name that clients ask for
    # How far it is; None once it has been unloaded, or the load has failed.
    progress: LoadProgress | None


@dataclass(frozen=True, slots=True)
class Activity:
    """Something the manager did or found, as one line for a person."""

    message: str  # the line
    level: Level  # how to read it
    at: float  # seconds since the epoch

    @classmethod
    def now(cls, message: str, level: Level = Level.INFO) -> Self:
        """Make one that happens now."""
        return cls(message, level, time.time())


@dataclass(frozen=True, slots=True)
class LogLines:
    """Lines that the server has written to its log."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Working:
    """The work of a ready server, several times a second while it has some."""

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
        """Call back with each event until the result is called."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def publish(self, event: E) -> None:
        """Call the subscribers. What one of them raises is logged."""
        for callback in tuple(self._subscribers):
            try:
                callback(event)
            except Exception:  # noqa: BLE001 (whatever a user's callback raises)
                _log.exception("An event subscriber failed.")

    async def stream(self) -> AsyncGenerator[E, None]:
        """Yield what is published from now on. A reader too far behind loses the newest events."""
        send, receive = anyio.create_memory_object_stream[E](_HELD)

        def offer(event: E) -> None:
            try:
                send.send_nowait(event)
            except anyio.WouldBlock:
                _log.warning("Dropped an event: a subscriber reads too slowly.")

        with send, receive, ExitStack() as stack:
            stack.callback(self.subscribe(offer))
            async for event in receive:
                yield event
