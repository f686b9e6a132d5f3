"""What one profile's row of the fleet says. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from rich.filesize import decimal

from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.widgets.load_bar import describe, duration
from kitty_nb.widgets.server_buttons import choices
from kitty_nb.widgets.status_line import TONES

if TYPE_CHECKING:
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
