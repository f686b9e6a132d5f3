"""One server's life as a pure function: requests and reports in, actions out.

There is no I/O, clock or asyncio here: `supervisor.py` feeds the stimuli and carries out the
actions, and tests replay histories of stimuli. A generation numbers each process that is or will
be started; reports of older processes are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kitty_nb.supervisor.events import Event, HealthCheckResult, ServerState, ServerStatus
from kitty_nb.supervisor.port_owner import PortOwner

if TYPE_CHECKING:
    from collections.abc import Callable

    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.registry import ServerRecord

    # Receives everything from a server: events, reports, and answers to health checks.
    Emit = Callable[["Event | Report | HealthCheckResult"], None]

_LOADABLE = {ServerStatus.STARTING, ServerStatus.LOADING}
_LIVE = {*_LOADABLE, ServerStatus.READY, ServerStatus.OUT_OF_REACH}


@dataclass(frozen=True, slots=True)
class Begin:
    """Action: start a server process as this generation, or watch the one that was found."""

    generation: int
    config: ServerConfig
    found: ServerRecord | PortOwner | None = None
    crashes: int = 0  # how many crashes in a row it follows


@dataclass(frozen=True, slots=True)
class Terminate:
    """Action: stop that generation's process, gracefully unless forced."""

    generation: int
    force: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Action: report the end of that generation's back-off."""

    generation: int
    seconds: float


Action = Begin | Terminate | Wait


@dataclass(frozen=True, slots=True)
class StartAsked:
    """Stimulus: somebody wants a server with these settings.

    A running one that has them will do, unless a fresh process is requested.
    """

    config: ServerConfig
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Stimulus: somebody wants no server."""

    force: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """Stimulus: a server runs, started by another program or kernel.

    It is the profile's own if it has a record, else an external one on the profile's port.
    """

    server: ServerRecord | PortOwner


@dataclass(frozen=True, slots=True)
class Spawned:
    """Stimulus: the process has been spawned."""

    generation: int
    pid: int


@dataclass(frozen=True, slots=True)
class LoadBegan:
    """Stimulus: the server answers that it is loading."""

    generation: int


@dataclass(frozen=True, slots=True)
class BecameReady:
    """Stimulus: our own process serves our model."""

    generation: int
    at: float


@dataclass(frozen=True, slots=True)
class OutOfReach:
    """Stimulus: a server elsewhere does not answer; it may still be running."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class GaveUp:
    """Stimulus: the process has stalled, or will never be ready."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Stimulus: no process was started, for a reason that won't go away by itself."""

    generation: int
    reason: str
    free_port: int | None = None
    attachable: bool = False
    elsewhere_at: float | None = None  # when, if another program starts or serves the profile


@dataclass(frozen=True, slots=True)
class Exited:
    """Stimulus: the process has exited, or its launch was cancelled."""

    generation: int  # which process it was
    reason: str  # why, in a sentence to show
    at: float  # when, in seconds of the monotonic clock
    repeats: bool = False  # whether starting it again would end the same way
    asked: bool = False  # whether somebody stopped it on purpose
    broken: bool = False  # whether kitty_nb itself failed to supervise it


@dataclass(frozen=True, slots=True)
class WaitOver:
    """Stimulus: the back-off of that generation is over."""

    generation: int


Report = Spawned | LoadBegan | BecameReady | OutOfReach | GaveUp | Refused | Exited | WaitOver
Stimulus = StartAsked | StopAsked | Found | Report


@dataclass(frozen=True, slots=True)
class Lifecycle(ServerState):
    """The state of a server: the published snapshot, and what decides the next steps."""

    generation: int = 0  # the current process, or the last one
    issued: int = 0  # the highest generation issued so far; none is issued twice
    pending: Begin | None = None  # what to start once the current process has exited
    # Whether this start was ever READY; only then are crashes retried.
    served: bool = False
    crashes: int = 0  # how many crashes in a row were retried

    @property
    def latest(self) -> int:
        """The generation of the last request to start."""
        return self.pending.generation if self.pending else self.generation

    @property
    def wanted(self) -> ServerConfig:
        """The settings of the last request to start."""
        return self.pending.config if self.pending else self.config

    def superseded(self, generation: int) -> bool:
        """Return whether a later request replaced this generation."""
        return generation not in {self.generation, self.latest}


def step(now: Lifecycle, stimulus: Stimulus) -> tuple[Lifecycle, tuple[Action, ...]]:
    """Return what follows from a stimulus: the next state and the actions to take."""
    match stimulus:
        case StartAsked(config, fresh):
            coming = now.status in _LIVE or now.pending is not None
            there = coming and now.wanted == config and not fresh
            return (now, ()) if there else _start(now, config)
        case StopAsked(force):
            return _stop(now, force)
        case Found() if not now.status.absent:
            return now, ()
        case Found(server):
            config = now.config if isinstance(server, PortOwner) else server.config
            crashes = 0 if isinstance(server, PortOwner) else server.crashes
            return _begin(now, Begin(now.issued + 1, config, server, crashes))
        case _ if stimulus.generation != now.generation:
            return now, ()
        case _:
            return _report(now, stimulus)


def _start(now: Lifecycle, config: ServerConfig) -> tuple[Lifecycle, tuple[Action, ...]]:
    coming = Begin(now.issued + 1, config)
    now = replace(now, issued=coming.generation)
    if now.status.absent:
        return _begin(now, coming)
    stopping = replace(now, status=ServerStatus.STOPPING, pending=coming, error=None)
    if now.status is ServerStatus.STOPPING:
        return stopping, ()
    return stopping, (Terminate(now.generation),)


def _begin(now: Lifecycle, coming: Begin) -> tuple[Lifecycle, tuple[Action, ...]]:
    begun = Lifecycle(
        ServerStatus.STARTING,
        coming.config,
        pid=coming.found.pid if coming.found else None,
        generation=coming.generation,
        issued=max(now.issued, coming.generation),
        restart_count=now.restart_count + (1 if now.pending else 0),
        crashes=coming.crashes,
    )
    return begun, (coming,)


def _stop(now: Lifecycle, force: bool) -> tuple[Lifecycle, tuple[Action, ...]]:
    if now.status.absent:
        stopped = replace(now, status=ServerStatus.STOPPED, error=None, retry_at=None)
        return replace(stopped, free_port=None, attachable=False), ()
    stopping = replace(now, status=ServerStatus.STOPPING, pending=None, error=None)
    if now.status is ServerStatus.STOPPING and not force:
        return stopping, ()
    return stopping, (Terminate(now.generation, force),)


def _report(now: Lifecycle, report: Report) -> tuple[Lifecycle, tuple[Action, ...]]:
    match report:
        case Spawned(_, pid):
            return replace(now, pid=pid), ()
        case LoadBegan() if now.status in {ServerStatus.STARTING, ServerStatus.OUT_OF_REACH}:
            return replace(now, status=ServerStatus.LOADING, error=None), ()
        case BecameReady(_, at) if now.status in {*_LOADABLE, ServerStatus.OUT_OF_REACH}:
            ready = replace(now, status=ServerStatus.READY, ready_since=at, error=None)
            return replace(ready, served=True), ()
        case OutOfReach(_, reason) if now.status in _LIVE:
            gone = replace(now, status=ServerStatus.OUT_OF_REACH, ready_since=None)
            return replace(gone, error=reason), ()
        case GaveUp(_, reason) if now.status in _LOADABLE:
            given_up = replace(now, status=ServerStatus.STOPPING, error=reason)
            return given_up, (Terminate(now.generation),)
        case Refused() | Exited() if not now.status.absent:  # it may be reported twice
            return _gone(now, report)
        case WaitOver() if now.status is ServerStatus.RESTARTING:
            begun, actions = _begin(now, Begin(now.issued + 1, now.config, crashes=now.crashes))
            return replace(begun, restart_count=now.restart_count + 1, served=True), actions
        case _:
            return now, ()


def _gone(now: Lifecycle, report: Refused | Exited) -> tuple[Lifecycle, tuple[Action, ...]]:
    gone = replace(now, pid=None, ready_since=None)
    if now.pending:
        return _begin(gone, now.pending)
    stopped = isinstance(report, Exited) and report.asked
    broken = isinstance(report, Exited) and report.broken
    if stopped or (now.status is ServerStatus.STOPPING and not broken):
        status = ServerStatus.FAILED if now.error else ServerStatus.STOPPED
        return replace(gone, status=status), ()
    if isinstance(report, Refused):
        failed = replace(gone, status=ServerStatus.FAILED, error=report.reason)
        if now.served and report.elsewhere_at is not None:
            return _back_off(failed, report.elsewhere_at)
        return replace(failed, free_port=report.free_port, attachable=report.attachable), ()
    config = now.config
    stable = (
        now.ready_since is not None and report.at - now.ready_since >= config.restart_stable_seconds
    )
    crashes = 0 if stable else now.crashes
    crashed = replace(gone, status=ServerStatus.CRASHED, error=report.reason, crashes=crashes)
    if not now.served or report.repeats or crashes >= config.restart_max:
        return crashed, ()
    return _back_off(replace(crashed, crashes=crashes + 1), report.at)


def _back_off(crashed: Lifecycle, at: float) -> tuple[Lifecycle, tuple[Action, ...]]:
    doublings = min(crashed.crashes - 1, 1_000)  # any more overflows
    doubled = crashed.config.restart_delay_seconds * 2.0**doublings
    delay = min(doubled, crashed.config.restart_delay_max_seconds)
    waiting = replace(crashed, status=ServerStatus.RESTARTING, retry_at=at + delay)
    return waiting, (Wait(crashed.generation, delay),)
