"""FleetPanel: all profiles in one table."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import anyio
import traitlets
from anyio.from_thread import start_blocking_portal
from rich.filesize import decimal

from kitty_nb.catalog.resolve import load_profile
from kitty_nb.config import configured_profiles, env_warnings
from kitty_nb.errors import ConfigError, KittyError
from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.widgets import session
from kitty_nb.widgets.display import LiveView, Page, asset, receive_while_busy, still, table
from kitty_nb.widgets.server_view import TONES, choices, describe_load, unanswered, vitals, word

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import ModelManager
    from kitty_nb.supervisor.events import LoadProgress, MemoryUse, ServerState


UNKNOWN = "\N{EN DASH}"
# The state of a server that is coloured like one of a router's models.
_AS_SERVER = {"loading": ServerStatus.LOADING, "loaded": ServerStatus.READY}


@dataclass(frozen=True, slots=True)
class Profile:
    """The facts about a profile.

    Attributes:
        config: What it would be started with: the file's settings, or those of the last start.
        state: Its server.
        progress: How far its load is.
        memory: What its server holds, where that is known.
        problem: What is wrong with its settings, or went wrong with a click.
        startable: Whether its settings are right.
    """

    config: ServerConfig
    state: ServerState
    progress: LoadProgress | None = None
    memory: MemoryUse | None = None
    problem: str | None = None
    startable: bool = True

    @property
    def served(self) -> ServerConfig:
        """The settings of its server, running or not."""
        return self.config if self.state.status.idle else self.state.config


class FleetRow(TypedDict):
    """One row, in words.

    Attributes:
        profile: Its name.
        status: Its state.
        tone: How the state is coloured.
        detail: How far its load is, or since when it is ready.
        fraction: The share of its load that is done, while it loads.
        model: The model's name.
        port: Where it listens, or would; None for one at a URL.
        memory: What it holds.
        pace: How fast it answers.
        problem: What is wrong, and what to do.
        start: Whether it can be started.
        stop: Whether it can be stopped.
        routed: Whether it is a router's model, which has no buttons.
    """

    profile: str
    status: str
    tone: str
    detail: str
    fraction: float | None
    model: str
    port: int | None
    memory: str
    pace: str
    problem: str
    start: bool
    stop: bool
    routed: bool


def fleet_rows(profiles: list[Profile]) -> list[FleetRow]:
    """Describe all profiles, each router's models below it, and which of them want one port."""
    return [
        row
        for profile in profiles
        for row in (_row(profile, *_clash(profile, profiles)), *_routed(profile))
    ]


def startable(profiles: list[Profile]) -> list[str]:
    """Return the profiles that can be started together: of those with one port, the first."""
    first: dict[tuple[str | None, int], str] = {}
    for profile in profiles:
        if _row(profile, *_clash(profile, profiles))["start"]:
            place = profile.served.ssh, profile.served.port
            first.setdefault(place, profile.config.profile)
    return [*first.values()]


def _routed(profile: Profile) -> list[FleetRow]:
    """A row for each model of a router."""
    router = profile.state.router
    return [
        FleetRow(
            profile=f"{profile.config.profile}: {name}",
            status=model.status.capitalize(),
            tone=TONES[_AS_SERVER.get(model.status, ServerStatus.STOPPED)],
            detail=describe_load(model.progress) if model.progress else "",
            fraction=model.progress.fraction if model.progress else None,
            model=name,
            port=profile.served.port,
            memory=UNKNOWN,
            pace=UNKNOWN,
            problem="",
            start=False,
            stop=False,
            routed=True,
        )
        for name, model in (router.models if router else {}).items()
    ]


def _row(profile: Profile, clash: str, held: bool) -> FleetRow:
    state, served = profile.state, profile.served
    can = choices(state, startable=profile.startable and not held, other_model=False)
    loading = state.status in {ServerStatus.STARTING, ServerStatus.LOADING}
    load = profile.progress if loading else None
    facts = [describe_load(load)] if load else [*vitals(state), unanswered(state)]
    return FleetRow(
        profile=profile.config.profile,
        status=word(state.status),
        tone=TONES[state.status],
        detail=" · ".join(filter(None, facts)),
        fraction=load.fraction if load else None,
        model=_model(profile),
        port=None if served.url else served.port,
        memory=describe_memory(profile.memory, state.devices) if state.pid else UNKNOWN,
        pace=_pace(state),
        problem="\n".join(filter(None, (profile.problem or state.error or state.doubt, clash))),
        start=can.start,
        stop=can.stop,
        routed=False,
    )


def _model(profile: Profile) -> str:
    if profile.state.external and profile.served.url:
        return profile.state.alias
    served = profile.served
    if served.models is not None:  # of a router, which serves no model of its own
        return ", ".join(served.models)
    return served.model.name if served.model else UNKNOWN


def describe_memory(use: MemoryUse | None, devices: tuple[str, ...]) -> str:
    """Describe what a server holds, e.g. `1.2 GB + 3.4 GB CUDA0`."""
    if use is None:
        return UNKNOWN
    names = ", ".join(name.partition(" (")[0] for name in devices) or "GPU"
    resident = decimal(use.resident)
    if use.gpu is not None:
        return f"{resident} + {decimal(use.gpu)} {names}"
    return f"{resident} + {names}" if devices else resident


def _pace(state: ServerState) -> str:
    health = state.last_health_check
    known = state.status is ServerStatus.READY and health
    return describe_pace(health.tokens_per_second if known and health else None)


def describe_pace(pace: float | None) -> str:
    """Describe tokens a second."""
    if pace is None:
        return UNKNOWN
    return f"{pace:,.0f}" if pace >= 10 or not pace else f"{pace:.1f}"  # noqa: PLR2004


def _clash(profile: Profile, profiles: list[Profile]) -> tuple[str, bool]:
    """Say which other profile wants this port, and whether its server has it now.

    Of those that wait for a port, the first in the list may have it, so nothing is said there.
    """
    port, machine = profile.served.port, profile.served.ssh
    here = [one for one in profiles if one.served.ssh == machine and not one.served.url]
    takers = [one for one in here if one.served.port == port]
    if profile not in takers:
        return "", False
    holder = next((p for p in takers if p is not profile and not p.state.status.idle), None)
    rival = holder or takers[0]
    if rival is profile or not profile.state.status.idle:
        return "", False
    free = max(one.served.port for one in profiles) + 1
    key = f"LLAMACPP_{profile.config.profile.upper()}_PORT"
    return (
        f"Port {port} is also set for {rival.config.profile}, so only one of them can run. Set"
        f" {key} to another port, such as {free}, and press Rescan.",
        holder is not None,
    )


_MEASURE_EVERY = 2.0


class FleetPanel(Page):
    """Start, watch and stop the servers of all profiles that a `.env` file names.

    Each profile has the manager that its `ControlPanel` in this kernel has too. A panel takes the
    place of an earlier one of its file, as the cell is run again.

    Args:
        env: The `.env` file with the settings.

    Attributes:
        rows: A `FleetRow` for each profile.
        notice: What is wrong with the file.

    Raises:
        ConfigError: The file cannot be read.
    """

    _esm: ClassVar[str] = asset("page.js", "fleet_panel.js")
    _css: ClassVar[str] = asset("panel.css", "fleet.css")
    rows: Any = traitlets.List().tag(sync=True)
    notice: Any = traitlets.Unicode("").tag(sync=True)

    def __init__(self, env: str | Path = ".env") -> None:
        self._env = env
        self._members: dict[str, _Member] = {}
        with ExitStack() as stack:
            stack.callback(session.release, self)
            self._portal = stack.enter_context(start_blocking_portal(name="kitty_nb"))
            self._read()
            super().__init__("kitty-panel", rows=self._look())
            # At once: a drawing is one message at most, whatever has changed.
            self._view = LiveView(self._draw, self._show_error, lambda: 0.0)
            self._view.start(self._portal.start_task_soon)
            stack.callback(self._view.stop)
            stack.callback(self._portal.start_task_soon(self._measure_forever).cancel)
            self._resources = stack.pop_all()
        atexit.register(self._resources.close)
        self.add_class("kitty-fleet")
        receive_while_busy([self])
        if earlier := session.succeed(self, Path(env).absolute()):
            earlier.close()

    def __repr__(self) -> str:
        return f"FleetPanel(profiles={[*self._members]!r})"

    def _repr_html_(self) -> str:
        rows = self._look()
        cells = [
            (row["profile"], row["status"], row["model"], str(row["port"] or ""), row["problem"])
            for row in rows
        ]
        head = "Profile", "State", "Model", "Port", ""
        return still("kitty_nb fleet", [f"{len(rows)} profiles"], table(head, cells))

    def manager(self, profile: str) -> ModelManager:
        """Return the manager of a profile.

        Raises:
            KittyError: There is no such row.
        """
        return self._member(profile).manager

    def start(self, profile: str) -> None:
        """Start a profile's server; what goes wrong is shown in its row."""
        self._member(profile).start()

    def stop(self, profile: str) -> None:
        """Stop a profile's server."""
        self._member(profile).stop()

    def start_all(self) -> None:
        """Start all that can be started together."""
        for name in startable(self._profiles()):
            self.start(name)

    def stop_all(self) -> None:
        """Stop all that run."""
        for row in self._look():
            if row["stop"]:
                self.stop(row["profile"])

    def rescan(self) -> None:
        """Read the `.env` file again. A profile that is no longer in it stays while it runs."""
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

    def _draw(self) -> None:
        with self.hold_sync():
            self.rows = self._look()
            self.notice = self._problem

    def _show_error(self, message: str) -> None:
        self._problem = self.notice = message

    async def _measure_forever(self) -> None:
        while True:
            async with anyio.create_task_group() as measuring:
                for member in self._members.values():
                    measuring.start_soon(member.measure)
            await anyio.sleep(_MEASURE_EVERY)

    def receive(self, message: Any) -> None:
        """Take a message of a page."""
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
        """The kernel's for this profile; a new one where somebody has closed it."""
        return session.acquire(self._env, self._profile, self._owner)

    @property
    def watched(self) -> ModelManager:
        """The same, but looking makes no new one: the last stays, closed."""
        self._last = session.get(self._env, self._profile) or self._last
        return self._last

    def read(self) -> None:
        """Read the settings again."""
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
        serves = config.model is not None or config.models is not None
        if not serves and self._complaint is None:
            config = state.config  # of a model that was chosen in its panel
        problem = self._failure or self._complaint
        serves = config.model is not None or config.models is not None
        if not serves and config.url is None and problem is None:
            key = f"LLAMACPP_{self._profile.upper()}_MODEL"
            problem = f"No model set. Set {key} to a .gguf file in {config.models_dir}."
        startable = serves and self._complaint is None
        return Profile(config, state, manager.progress, self._memory, problem, startable)

    def start(self) -> None:
        """Begin a start with the settings as they are in the file now."""
        manager = self.manager
        env, profile = self._env, self._profile
        self._actions.run(manager.start, lambda: session.config_to_start(manager, env, profile))

    def stop(self) -> None:
        """Stop its server."""
        self._actions.run(self.manager.stop)

    async def measure(self) -> None:
        """Measure the memory that its server holds."""
        memory = None
        try:
            memory = await self.watched.memory_use()
        except KittyError:  # its manager is closed
            pass
        finally:  # also where that is closed meanwhile, which cancels this
            self._memory = memory

    def _show_failure(self, failure: str | None) -> None:
        self._failure = failure
