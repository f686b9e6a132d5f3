"""FleetPanel: all profiles in one table."""

from __future__ import annotations

import asyncio
import atexit
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

import anyio
import traitlets
from anyio.from_thread import start_blocking_portal
from anywidget import AnyWidget
from rich.filesize import decimal

from kitty_nb.catalog.resolve import load_profile
from kitty_nb.config import configured_profiles, env_warnings
from kitty_nb.errors import ConfigError, KittyError
from kitty_nb.manager import ModelManager
from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.widgets.actions import SecondAsk, explain
from kitty_nb.widgets.display import asset, receive_while_busy, still, table
from kitty_nb.widgets.kernel_managers import borrow, lent, let_go, wanted
from kitty_nb.widgets.load_bar import TONES, describe, duration
from kitty_nb.widgets.server_buttons import choices

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from pathlib import Path

    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.events import LoadProgress, MemoryUse, ServerState


_UNKNOWN = "\N{EN DASH}"
_MOVING = {ServerStatus.STARTING, ServerStatus.LOADING}


@dataclass(frozen=True, slots=True)
class Profile:
    """What there is to say of a profile.

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
    def port(self) -> int:
        """Where its server listens, or would."""
        return (self.config if self.state.status.idle else self.state.config).port


@dataclass(frozen=True, slots=True)
class FleetRow:
    """One row, in words.

    Attributes:
        profile: Its name.
        status: Its state.
        tone: How the state is coloured.
        detail: How far its load is, or since when it is ready.
        fraction: The share of its load that is done, while it loads.
        model: The model's name.
        port: Where it listens, or would.
        memory: What it holds.
        pace: How fast it answers.
        problem: What is wrong, and what to do.
        start: Whether it can be started.
        stop: Whether it can be stopped.
    """

    profile: str
    status: str
    tone: str
    detail: str
    fraction: float | None
    model: str
    port: int
    memory: str
    pace: str
    problem: str
    start: bool
    stop: bool


def fleet_rows(profiles: list[Profile]) -> list[FleetRow]:
    """Describe all profiles, and which of them want one port."""
    return [_row(profile, *_clash(profile, profiles)) for profile in profiles]


def _row(profile: Profile, clash: str, held: bool) -> FleetRow:
    state, config = profile.state, profile.config
    can = choices(state, startable=profile.startable and not held, differs=False)
    model = (config if state.status.idle else state.config).model
    moving = profile.progress if state.status in _MOVING else None
    return FleetRow(
        profile=config.profile,
        status=state.status,
        tone=TONES.get(state.status, "idle"),
        detail=_detail(state, moving),
        fraction=moving.fraction if moving else None,
        model=model.name if model else _UNKNOWN,
        port=profile.port,
        memory=_memory(profile.memory, state.devices) if state.pid else _UNKNOWN,
        pace=_pace(state),
        problem="\n".join(filter(None, (profile.problem or state.error, clash))),
        start=can.start,
        stop=can.stop,
    )


def _detail(state: ServerState, progress: LoadProgress | None) -> str:
    if progress:
        return describe(progress)
    if state.retry_in is not None:
        return f"starting again in {ceil(state.retry_in)} s"
    if state.uptime is None:
        return ""
    health = state.last_health_check
    if health and health.status is not ServerStatus.READY:
        return health.message
    asleep = " · asleep" if health and health.asleep else ""
    up = duration(state.uptime) if state.uptime >= 10 else f"{state.uptime:.0f} s"  # noqa: PLR2004
    return f"up {up}{asleep}"


def _memory(use: MemoryUse | None, devices: tuple[str, ...]) -> str:
    if use is None:
        return _UNKNOWN
    names = ", ".join(name.partition(" (")[0] for name in devices) or "GPU"
    resident = decimal(use.resident)
    if use.gpu is not None:
        return f"{resident} + {decimal(use.gpu)} {names}"
    return f"{resident} + {names}" if devices else resident


def _pace(state: ServerState) -> str:
    health = state.last_health_check
    if state.status is not ServerStatus.READY or not health or health.tokens_per_second is None:
        return _UNKNOWN
    pace = health.tokens_per_second
    return f"{pace:,.0f}" if pace >= 10 or not pace else f"{pace:.1f}"  # noqa: PLR2004


def _clash(profile: Profile, profiles: list[Profile]) -> tuple[str, bool]:
    """Say which other profile wants this port, and whether its server has it now.

    Of those that wait for a port, the first in the list may have it, so nothing is said there.
    """
    rivals = [p for p in profiles if p.port == profile.port and p is not profile]
    holder = next((p for p in rivals if not p.state.status.idle), None)
    first = next(p for p in profiles if p.port == profile.port)
    if not rivals or not profile.state.status.idle or (first is profile and not holder):
        return "", False
    rival = (holder or first).config.profile
    free = max(p.port for p in profiles) + 1
    key = f"LLAMACPP_{profile.config.profile.upper()}_PORT"
    return (
        f"Port {profile.port} is also that of {rival}, so only one of them can run. Set {key} to"
        f" another, such as {free}, and press Rescan.",
        holder is not None,
    )


# Seconds. A refresh is one message at most, whatever has changed in however many rows.
_REFRESH_EVERY = 0.25
_MEASURE_EVERY = 2.0


class FleetPanel(AnyWidget):
    """Start, watch and stop the servers of all profiles that a `.env` file names.

    Each profile has the manager that its `ControlPanel` in this kernel has too. What is shown is
    written by the panel's own thread only, so it stays live while a cell keeps the kernel busy.

    Args:
        env: The `.env` file with the settings.

    Attributes:
        rows: What is shown: a `FleetRow` as a mapping for each profile.
        notice: What is wrong with the file.

    Raises:
        ConfigError: The file cannot be read.
    """

    _esm: ClassVar[str] = asset("fleet_panel.js")
    _css: ClassVar[str] = asset("panel.css", "fleet.css")
    rows: Any = traitlets.List().tag(sync=True)
    notice: Any = traitlets.Unicode("").tag(sync=True)

    def __init__(self, env: str | Path = ".env") -> None:
        self._env = env
        try:
            self._members = self._read()
            self._problem = self._warnings()
        except ConfigError:
            let_go(self)
            raise
        super().__init__(rows=self._describe())
        self.add_class("kitty-panel")
        self.add_class("kitty-fleet")
        self.on_msg(self._receive)
        receive_while_busy([self])
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal(name="kitty_nb"))
            for task in (self._refresh_forever, self._measure_forever):
                stack.callback(self._portal.start_task_soon(self._show_failure_of, task).cancel)
            self._resources = stack.pop_all()
        atexit.register(self._resources.close)

    def __repr__(self) -> str:
        return f"FleetPanel(profiles={[*self._members]!r})"

    def _repr_html_(self) -> str:
        rows = fleet_rows([member.look() for member in self._members.values()])
        cells = [(row.profile, row.status, row.model, str(row.port), row.problem) for row in rows]
        head = "Profile", "State", "Model", "Port", ""
        return still("kitty_nb fleet", [f"{len(rows)} profiles"], table(head, cells))

    def manager(self, profile: str) -> ModelManager:
        """The manager of a profile.

        Raises:
            KittyError: There is no such row.
        """
        return self._member(profile).manager

    def start(self, profile: str) -> None:
        """Start a profile's server; what goes wrong is shown in its row."""
        self._member(profile).act(self._portal.start_task_soon, _Member.start)

    def stop(self, profile: str) -> None:
        """Stop a profile's server."""
        self._member(profile).act(self._portal.start_task_soon, _Member.stop)

    def start_all(self) -> None:
        """Start all that can be started; of those that want one port the first."""
        ports = set()
        for row in fleet_rows([member.look() for member in self._members.values()]):
            if row.start and row.port not in ports:
                self.start(row.profile)
                ports.add(row.port)

    def stop_all(self) -> None:
        """Stop all that run."""
        for row in fleet_rows([member.look() for member in self._members.values()]):
            if row.stop:
                self.stop(row.profile)

    def rescan(self) -> None:
        """Read the `.env` file again. A profile that is no longer in it stays while it runs."""
        try:
            self._members = self._read(self._members)
            self._problem = self._warnings()
        except ConfigError as error:
            self._problem = str(error)

    def close(self) -> None:
        """Remove the widget; stop the servers and end the threads of the managers it has made."""
        if self.comm is None:
            return
        atexit.unregister(self._resources.close)
        self._resources.close()
        let_go(self)
        super().close()

    def _member(self, profile: str) -> _Member:
        if profile not in self._members:
            raise KittyError(
                f"There is no profile {profile!r} here, but {', '.join(self._members)}. Name a"
                f" model for it by LLAMACPP_{profile.upper()}_MODEL and press Rescan."
            )
        return self._members[profile]

    def _read(self, known: dict[str, _Member] | None = None) -> dict[str, _Member]:
        names = dict.fromkeys(configured_profiles(self._env))
        running = {
            name: None for name, m in (known or {}).items() if not m.watched.state.status.idle
        }
        members = {}
        for name in names | running:
            if known and name in known:
                members[name] = known[name]
                members[name].read()
            else:
                members[name] = _Member(self._env, name, self)
        return members

    def _warnings(self) -> str:
        return "\n".join(env_warnings(self._env, *configured_profiles(self._env)))

    def _describe(self) -> list[dict[str, object]]:
        profiles = [member.look() for member in self._members.values()]
        return [asdict(row) for row in fleet_rows(profiles)]

    async def _show_failure_of(self, task: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await task()
        except Exception as error:  # noqa: BLE001 (raised here, nobody would see it)
            self._problem = self.notice = explain(error)

    async def _refresh_forever(self) -> None:
        while True:
            with self.hold_sync():
                self.rows = self._describe()
                self.notice = self._problem
            await anyio.sleep(_REFRESH_EVERY)

    async def _measure_forever(self) -> None:
        while True:
            for member in [*self._members.values()]:
                await member.measure()
            await anyio.sleep(_MEASURE_EVERY)

    def _receive(self, _widget: object, message: Any, _buffers: object) -> None:
        match message:
            case {"kind": "start", "profile": str(name)} if name in self._members:
                self.start(name)
            case {"kind": "stop", "profile": str(name)} if name in self._members:
                self.stop(name)
            case {"kind": "start all"}:
                self.start_all()
            case {"kind": "stop all"}:
                self.stop_all()
            case {"kind": "rescan"}:
                self.rescan()


class _Member:
    """A profile of the fleet."""

    def __init__(self, env: str | Path, profile: str, owner: FleetPanel) -> None:
        self._env, self._profile, self._owner = env, profile, owner
        self._memory: MemoryUse | None = None
        self._status = ServerStatus.STOPPED
        self._second_ask = SecondAsk("press Start again")
        self.read()
        # That of an earlier run of this cell, with its server, is this panel's to close.
        self._last = borrow(env, profile, owner, self._make, take_over=(FleetPanel,))

    @property
    def manager(self) -> ModelManager:
        """The kernel's for this profile; a new one where a panel has closed it."""
        return borrow(self._env, self._profile, self._owner, self._make)

    @property
    def watched(self) -> ModelManager:
        """The same, but looking makes no new one: the last stays, closed."""
        self._last = lent(self._env, self._profile) or self._last
        return self._last

    def read(self) -> None:
        """Read the settings again."""
        self._config, complaint = load_profile(self._env, self._profile)
        self._mishap: str | None = None
        self._complaint = "\n".join(map(str, complaint.problems)) if complaint else None

    def _make(self) -> ModelManager:
        return ModelManager(config=self._config)

    def look(self) -> Profile:
        """How it is now."""
        manager = self.watched
        state, config = manager.state, self._config
        if state.status is ServerStatus.READY is not self._status:
            self._mishap = None
        self._status = state.status
        if config.model is None and self._complaint is None:
            config = state.config  # of a model that was picked in its panel
        problem = self._mishap or self._complaint
        if config.model is None and problem is None:
            key = f"LLAMACPP_{self._profile.upper()}_MODEL"
            problem = f"No model is named. Set {key} to a .gguf file in {config.models_dir}."
        startable = config.model is not None and self._complaint is None
        return Profile(config, state, manager.progress, self._memory, problem, startable)

    async def start(self) -> None:
        """Begin a start with the settings as they are in the file now."""
        manager = self.manager
        config = wanted(self._env, self._profile) or manager.state.config
        self._second_ask.agree(config, await manager.refusal(config))
        await manager.start(config, wait_for_ready=False, anyway=True)

    async def stop(self) -> None:
        """Stop it."""
        await self.manager.stop()

    def act(self, run: Callable[..., object], action: Callable[[_Member], Awaitable[None]]) -> None:
        """Do what a click asks; whatever goes wrong is shown."""
        self._mishap = None
        run(self._follow, action)

    async def measure(self) -> None:
        """Learn what its server holds."""
        try:
            self._memory = await self.watched.memory_use()
        except KittyError:  # closed
            self._memory = None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._memory = None  # closed while it was measuring

    async def _follow(self, action: Callable[[_Member], Awaitable[None]]) -> None:
        try:
            await action(self)
        except Exception as error:  # noqa: BLE001 (raised here, nobody would see it)
            self._mishap = explain(error)
