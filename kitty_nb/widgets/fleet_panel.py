"""The panels that show servers in a table: all profiles of a file, or the replicas of a `Fleet`."""

from __future__ import annotations

import atexit
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import anyio
import traitlets
from anyio.from_thread import start_blocking_portal
from rich.filesize import decimal

from kitty_nb.catalog.resolve import load_profile
from kitty_nb.config.profiles import configured_profiles, env_warnings
from kitty_nb.errors import ConfigError, KittyError
from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.widgets import session
from kitty_nb.widgets.display import LiveView, Page, asset, receive_while_busy, still, table
from kitty_nb.widgets.server_view import (
    TONES,
    choices,
    describe_load,
    describe_uptime,
    unanswered,
    vitals,
    word,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anyio.from_thread import BlockingPortal

    from kitty_nb.config import ServerConfig
    from kitty_nb.fleet import Fleet
    from kitty_nb.fleet.placement import Replica
    from kitty_nb.manager import ModelManager
    from kitty_nb.supervisor.events import LoadProgress, MemoryUse, ServerState


UNKNOWN = "\N{EN DASH}"
# The server state whose colour a state of a router's model has.
_AS_SERVER = {"loading": ServerStatus.LOADING, "loaded": ServerStatus.READY}
_MEASURE_EVERY = 2.0  # seconds
_CLOCK = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Profile:
    """The facts about a profile."""

    config: ServerConfig  # what it would be started with: the file's settings, or the last start's
    state: ServerState  # its server
    progress: LoadProgress | None = None  # how far its load is
    memory: MemoryUse | None = None  # what its server holds, where that is known
    problem: str | None = None  # what is wrong with its settings, or went wrong with a click
    startable: bool = True  # whether its settings are right

    @property
    def served(self) -> ServerConfig:
        """The settings of its server, running or not."""
        return self.config if self.state.status.idle else self.state.config


@dataclass(frozen=True, slots=True)
class FleetRow:
    """One row, in words."""

    profile: str  # its name
    status: str  # its state
    tone: str  # how the state is coloured
    model: str  # the model's name
    port: int | None  # where it listens, or would; None for one at a URL
    detail: str = ""  # how far its load is, or since when it is ready
    fraction: float | None = None  # the share of its load that is done, while it loads
    memory: str = UNKNOWN  # what it holds
    pace: str = UNKNOWN  # how fast it answers
    problem: str = ""  # what is wrong, and what to do
    start: bool = False  # whether it can be started
    stop: bool = False  # whether it can be stopped, or detached from
    attached: bool = False  # whether it was not started by kitty_nb
    routed: bool = False  # whether it is a router's model, which has no buttons


def fleet_rows(profiles: list[Profile]) -> list[FleetRow]:
    """Describe all profiles, with each router's models below it, and which share a port."""
    return [row for one in profiles for row in (_row(one, profiles), *_routed(one))]


def startable(profiles: list[Profile]) -> list[str]:
    """Return the profiles that can be started together: of those that share a port, the first."""
    first: dict[tuple[str | None, int], str] = {}
    for one in profiles:
        if _row(one, profiles).start:
            first.setdefault((one.served.ssh, one.served.port), one.config.profile)
    return [*first.values()]


def _routed(profile: Profile) -> Iterator[FleetRow]:
    """Return a row for each model of a router."""
    router, port = profile.state.router, profile.served.port
    for name, model in (router.models if router else {}).items():
        yield FleetRow(
            profile=f"{profile.config.profile}: {name}",
            status=model.status.capitalize(),
            tone=TONES[_AS_SERVER.get(model.status, ServerStatus.STOPPED)],
            model=name,
            port=port,
            detail=describe_load(model.progress) if model.progress else "",
            fraction=model.progress.fraction if model.progress else None,
            routed=True,
        )


def _row(profile: Profile, profiles: list[Profile]) -> FleetRow:
    state, served = profile.state, profile.served
    clash, held = _clash(profile, profiles)
    can = choices(state, startable=profile.startable and not held, other_model=False)
    loading = state.status in {ServerStatus.STARTING, ServerStatus.LOADING}
    load = profile.progress if loading else None
    facts = [describe_load(load)] if load else [*vitals(state), unanswered(state)]
    health = state.last_health_check if state.status is ServerStatus.READY else None
    return FleetRow(
        profile=profile.config.profile,
        status=word(state.status),
        tone=TONES[state.status],
        model=_model(profile),
        port=None if served.url else served.port,
        detail=" · ".join(filter(None, facts)),
        fraction=load.fraction if load else None,
        memory=describe_memory(profile.memory, state.devices) if state.pid else UNKNOWN,
        pace=describe_pace(health.tokens_per_second if health else None),
        problem="\n".join(filter(None, (profile.problem or state.error or state.doubt, clash))),
        start=can.start,
        stop=can.stop,
        attached=state.external is not None,
    )


def _model(profile: Profile) -> str:
    served = profile.served
    if profile.state.external:  # it may serve another model than the profile's
        return profile.state.model_name or profile.state.alias
    if served.models is not None:  # of a router, which serves no model of its own
        return ", ".join(served.models)
    return served.model.name if served.model else UNKNOWN


def describe_memory(use: MemoryUse | None, devices: tuple[str, ...]) -> str:
    """Describe a server's memory, e.g. `1.2 GB + 3.4 GB CUDA0`."""
    if use is None:
        return UNKNOWN
    names = ", ".join(name.partition(" (")[0] for name in devices) or "GPU"
    resident = decimal(use.resident)
    if use.gpu is not None:
        return f"{resident} + {decimal(use.gpu)} {names}"
    return f"{resident} + {names}" if devices else resident


def describe_pace(pace: float | None) -> str:
    """Format a number of tokens per second."""
    if pace is None:
        return UNKNOWN
    return f"{pace:,.0f}" if pace >= 10 or not pace else f"{pace:.1f}"  # noqa: PLR2004


def _clash(profile: Profile, profiles: list[Profile]) -> tuple[str, bool]:
    """Describe which other profile has this port set, and whether its server has it now.

    Of stopped profiles with the same port, the first in the list may have it, so it gets no
    description.
    """
    port, machine = profile.served.port, profile.served.ssh
    here = [one for one in profiles if one.served.ssh == machine and not one.served.url]
    takers = [one for one in here if one.served.port == port]
    if profile not in takers or not profile.state.status.idle:
        return "", False
    holder = next((one for one in takers if not one.state.status.idle), None)
    rival = holder or takers[0]
    if rival is profile:
        return "", False
    free = max(one.served.port for one in profiles) + 1
    key = f"LLAMACPP_{profile.config.profile.upper()}_PORT"
    return (
        f"Port {port} is also set for {rival.config.profile}, so only one of them can run. Set"
        f" {key} to another port, such as {free}, and press Rescan.",
        holder is not None,
    )


def replica_row(replica: Replica, alias: str) -> FleetRow:
    """Describe a replica of a fleet that serves a model by this name."""
    status = replica.status
    gone = status.idle or status is ServerStatus.OUT_OF_REACH  # its last report is history
    report = None if gone else replica.report
    load = report.progress if report else None
    facts = [describe_load(load)] if load else []
    if replica.uptime is not None:
        facts.append(f"up {describe_uptime(replica.uptime)}")
    if report and report.restarts:
        facts.append(f"restarted {report.restarts} times")
    if replica.worker and not status.idle:
        facts.append(f"on {urlsplit(replica.worker).hostname}")
    ready = status is ServerStatus.READY
    return FleetRow(
        profile=f"replica {replica.number}",
        status=word(status),
        tone=TONES[status],
        model=report.alias if report else alias,
        port=urlsplit(replica.url).port if replica.url and not status.idle else None,
        detail=" · ".join(facts),
        fraction=load.fraction if load else None,
        memory=describe_memory(report.memory, ()) if report and report.pid else UNKNOWN,
        pace=describe_pace(report.tokens_per_second if report and ready else None),
        problem=replica.problem or "",
        start=status.idle,
        stop=not status.idle,
    )


class _Table(Page):
    """A table of servers, each with its buttons.

    Attributes:
        rows: The fields of a `FleetRow` for each.
        notice: What is wrong with all of them.
        each: What a row is.
        rescans: What *Rescan* does.
    """

    _esm: ClassVar[str] = asset("page.js", "fleet_panel.js")
    _css: ClassVar[str] = asset("panel.css", "fleet.css")
    rows: Any = traitlets.List().tag(sync=True)
    notice: Any = traitlets.Unicode("").tag(sync=True)
    each: Any = traitlets.Unicode("Profile").tag(sync=True)
    rescans: Any = traitlets.Unicode("Reload the .env file").tag(sync=True)
    _problem = ""

    def __init__(self) -> None:
        super().__init__("kitty-panel", rows=[*map(asdict, self._look())])
        self.add_class("kitty-fleet")
        receive_while_busy([self])

    def _look(self) -> Sequence[FleetRow]:
        raise NotImplementedError

    def _summary(self) -> str:
        raise NotImplementedError

    def _hint(self) -> str:
        """Return what the notice says where nothing is wrong."""
        return ""

    def _repr_html_(self) -> str:
        cells = [
            (row.profile, row.status, row.model, str(row.port or ""), row.problem)
            for row in self._look()
        ]
        head = self.each, "State", "Model", "Port", ""
        return still("kitty_nb fleet", [self._summary()], table(head, cells))

    def _draw(self) -> None:
        with self.hold_sync():
            self.rows, self.notice = [*map(asdict, self._look())], self._problem or self._hint()

    def _show_error(self, message: str | None) -> None:
        self._problem = self.notice = message or ""


class FleetPanel(_Table):
    """Start, watch and stop the servers of all profiles that a `.env` file names.

    Each profile has the same manager as its `ControlPanel` in this kernel. A panel replaces an
    earlier one of its file, as when its cell is run again.

    Args:
        env: The `.env` file with the settings.

    Attributes:
        rows: A row for each profile.
        notice: What is wrong with the file.

    Raises:
        ConfigError: The file can't be read.
    """

    def __init__(self, env: str | Path = ".env") -> None:
        self._env = env
        self._members: dict[str, _Member] = {}
        with ExitStack() as stack:
            stack.callback(session.release, self)
            self._portal = stack.enter_context(start_blocking_portal(name="kitty_nb"))
            self._read()
            super().__init__()
            # At once: a drawing is one message at most, whatever has changed.
            self._view = LiveView(self._draw, self._show_error, lambda: 0.0)
            self._view.start(self._portal.start_task_soon)
            stack.callback(self._view.stop)
            stack.callback(self._portal.start_task_soon(self._measure_forever).cancel)
            self._resources = stack.pop_all()
        atexit.register(self._resources.close)
        if earlier := session.succeed(self, Path(env).absolute()):
            earlier.close()

    def __repr__(self) -> str:
        return f"FleetPanel(profiles={[*self._members]!r})"

    def manager(self, profile: str) -> ModelManager:
        """Return the manager of a profile.

        Raises:
            KittyError: There is no such profile.
        """
        return self._member(profile).manager

    def start(self, profile: str) -> None:
        """Start a profile's server; a failure is shown in its row."""
        self._member(profile).start()

    def stop(self, profile: str) -> None:
        """Stop a profile's server."""
        self._member(profile).stop()

    def start_all(self) -> None:
        """Start all profiles that can be started together."""
        for name in startable(self._profiles()):
            self.start(name)

    def stop_all(self) -> None:
        """Stop all servers that run."""
        for row in self._look():
            if row.stop:
                self.stop(row.profile)

    def rescan(self) -> None:
        """Reload the `.env` file. A profile that is no longer in it stays while it runs."""
        try:
            self._read()
        except ConfigError as error:
            self._problem = str(error)

    def close(self) -> None:
        """Remove the widget; stop the servers that no other panel or magic uses."""
        if self.comm is None:
            return
        atexit.unregister(self._resources.close)
        self._resources.close()
        super().close()

    def _member(self, profile: str) -> _Member:
        if profile not in self._members:
            raise KittyError(
                f"No profile {profile!r}; the profiles are {', '.join(self._members)}. To add it,"
                f" set LLAMACPP_{profile.upper()}_MODEL and press Rescan."
            )
        return self._members[profile]

    def _read(self) -> None:
        named, known = configured_profiles(self._env), self._members
        running = [name for name, m in known.items() if not m.watched.state.status.idle]
        members = {}
        for name in dict.fromkeys([*named, *running]):
            members[name] = known.get(name) or _Member(self._env, name, self, self._portal)
            members[name].read()
        self._members = members
        self._problem = "\n".join(env_warnings(self._env, *named))

    def _profiles(self) -> list[Profile]:
        return [member.look() for member in self._members.values()]

    def _look(self) -> list[FleetRow]:
        return fleet_rows(self._profiles())

    def _summary(self) -> str:
        count = len(self._members)
        return f"{count} profile{'s' * (count != 1)}"

    async def _measure_forever(self) -> None:
        while True:
            async with anyio.create_task_group() as measuring:
                for member in self._members.values():
                    measuring.start_soon(member.measure)
            await anyio.sleep(_MEASURE_EVERY)

    def receive(self, message: Any) -> None:
        """Handle a message from a page."""
        match message:
            case {"kind": "start" | "stop" as verb, "profile": str(name)} if name in self._members:
                getattr(self, verb)(name)
            case {"kind": "start_all" | "stop_all" | "rescan" as verb}:
                getattr(self, verb)()


class _Member:
    """A profile of the fleet."""

    def __init__(
        self, env: str | Path, profile: str, owner: FleetPanel, portal: BlockingPortal
    ) -> None:
        self._env, self._profile, self._owner = env, profile, owner
        self._memory: MemoryUse | None = None
        self._status = ServerStatus.STOPPED
        self._failure: str | None = None
        self._actions = session.ActionRunner(portal.start_task_soon, self._show_failure)
        self._last = self.manager

    @property
    def manager(self) -> ModelManager:
        """The kernel's manager of this profile; a new one if it has been closed."""
        return session.acquire(self._env, self._profile, self._owner)

    @property
    def watched(self) -> ModelManager:
        """The same, without creating a new one: the last one stays, closed."""
        self._last = session.get(self._env, self._profile) or self._last
        return self._last

    def read(self) -> None:
        """Reload the settings."""
        self._config, complaint = load_profile(self._env, self._profile)
        self._failure = None
        self._complaint = "\n".join(map(str, complaint.problems)) if complaint else None

    def look(self) -> Profile:
        """Take a snapshot."""
        manager = self.watched
        state, config = manager.state, self._config
        if state.status is ServerStatus.READY is not self._status:
            self._failure = None
        self._status = state.status
        if not _serves(config) and self._complaint is None:
            config = state.config  # of a model that was chosen in its panel
        problem = self._failure or self._complaint
        if not _serves(config) and config.url is None and problem is None:
            key = f"LLAMACPP_{self._profile.upper()}_MODEL"
            problem = f"No model set. Set {key} to a .gguf file in {config.models_dir}."
        right = _serves(config) and self._complaint is None
        return Profile(config, state, manager.progress, self._memory, problem, right)

    def start(self) -> None:
        """Start its server with the settings that the file has now."""
        manager = self.manager
        wanted = partial(session.config_to_start, manager, self._env, self._profile)
        self._actions.run(manager.start, wanted)

    def stop(self) -> None:
        """Stop its server."""
        self._actions.run(self.manager.stop)

    async def measure(self) -> None:
        """Measure the memory that its server holds."""
        memory = None
        try:
            with suppress(KittyError):  # its manager is closed
                memory = await self.watched.memory_use()
        finally:  # even if that is closed meanwhile, which cancels this
            self._memory = memory

    def _show_failure(self, failure: str | None) -> None:
        self._failure = failure


def _serves(config: ServerConfig) -> bool:
    return config.model is not None or config.models is not None


class ReplicaPanel(_Table):
    """Watch the replicas of a fleet, and stop or start each.

    A notebook shows one for a cell whose value is a `Fleet`.

    Args:
        fleet: The fleet. Closing the panel leaves it alone.

    Attributes:
        rows: A row for each replica.
        notice: Why replicas can't be placed.
    """

    each = traitlets.Unicode("Replica").tag(sync=True)
    rescans = traitlets.Unicode("Ask all workers again").tag(sync=True)

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        super().__init__()
        self._view = LiveView(
            self._draw,
            self._show_error,
            lambda: _CLOCK,
            subscribe=lambda: fleet.subscribe(lambda _: self._view.wake()),
        )
        self._view.start(fleet.begin)
        self._actions = session.ActionRunner(fleet.begin, self._show_error)

    def __repr__(self) -> str:
        return f"ReplicaPanel({self._fleet!r})"

    def close(self) -> None:
        """Remove the widget; the replicas keep running."""
        if self.comm is not None:
            self._view.stop()
            super().close()

    def _look(self) -> list[FleetRow]:
        return [replica_row(replica, self._fleet.alias) for replica in self._fleet.replicas]

    def _summary(self) -> str:
        return repr(self._fleet)

    def _hint(self) -> str:
        return self._fleet.problem or ""

    def receive(self, message: Any) -> None:
        """Handle a message from a page."""
        match message:
            case {"kind": "start" | "stop" as verb, "profile": str(name)}:
                rows = enumerate(self.rows)
                self._order(verb, [n for n, row in rows if row[verb] and row["profile"] == name])
            case {"kind": "start_all" | "stop_all" as verb}:  # those that wait for a worker, too
                self._order(verb.removesuffix("_all"), range(len(self.rows)))
            case {"kind": "rescan"}:
                self._actions.run(self._fleet.rescan)

    def _order(self, verb: str, numbers: Sequence[int]) -> None:
        if numbers:
            self._actions.run(partial(getattr(self._fleet, verb), *numbers))


def bundle(fleet: Fleet) -> dict[str, Any]:
    """Return a notebook's display of a fleet: its panel, created if none is open."""
    panel = session.newest(ReplicaPanel, fleet)
    if panel is None or panel.comm is None:
        panel = ReplicaPanel(fleet)
        session.succeed(panel, fleet)
    still_picture = {"text/html": panel._repr_html_(), "text/plain": repr(fleet)}
    drawn, _ = panel._repr_mimebundle_() or ({}, {})
    return {**drawn, **still_picture}
