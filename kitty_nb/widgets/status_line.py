"""The state of the server in one line."""

from __future__ import annotations

from html import escape
from math import ceil
from pathlib import PurePath
from typing import TYPE_CHECKING

from ipywidgets import HTML

from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.widgets.load_bar import duration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kitty_nb.supervisor.events import ServerState

_HASH_SHOWN = 19  # sha256- and twelve digits, as Ollama shows it
TONES = {
    ServerStatus.READY: "good",
    ServerStatus.STARTING: "busy",
    ServerStatus.LOADING: "busy",
    ServerStatus.STOPPING: "busy",
    ServerStatus.RESTARTING: "busy",
    ServerStatus.FAILED: "bad",
    ServerStatus.CRASHED: "bad",
}


class StatusLine(HTML):
    """State, process, model, alias, endpoint, uptime, latency and slots."""

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-status")

    def show(self, state: ServerState) -> None:
        """Show a snapshot."""
        tone = TONES.get(state.status, "idle")
        facts = "".join(f"<span class='kitty-fact'>{fact}</span>" for fact in _facts(state))
        badge = f"<span class='kitty-badge kitty-{tone}'>{state.status}</span>"
        profile = f"<span class='kitty-heading'>{escape(state.config.profile)}</span>"
        self.value = f"{badge}{profile}{facts}"


def _shortened(name: str) -> str:
    """A file's name; of one that is called by its hash, the beginning."""
    return name if PurePath(name).suffix else f"{name[:_HASH_SHOWN]}…"


def _facts(state: ServerState) -> Iterator[str]:
    if state.retry_in is not None:
        yield f"starting again in {ceil(state.retry_in)} s"
    if not state.config.local_only:
        hint = "Set LLAMACPP_HOST=127.0.0.1 to keep it to this machine."
        host = escape(state.config.host)
        yield f"<span class='kitty-bad-text' title='{hint}'>open to the network ({host})</span>"
    if state.pid is None:
        return
    if state.model_name:
        yield escape(_shortened(state.model_name))
    if state.projector:
        yield f"with {escape(_shortened(state.projector.name))}"
    yield f"as <b>{escape(state.alias)}</b>"
    yield f"PID {state.pid}"
    if state.foreign:
        yield "not started here"
    if state.devices:
        yield f"on {escape(', '.join(state.devices))}"
    if state.uptime is None:
        return
    url = escape(state.endpoint)
    yield f"<a href='{url}' target='_blank' rel='noopener'>{url}</a>"
    yield f"up {duration(int(state.uptime) if state.uptime >= 1 else state.uptime)}"
    health = state.last_health_check
    if health and health.latency is not None:
        yield f"{health.latency * 1000:.0f} ms"
    if health and health.slots_total:
        yield f"slots {health.slots_busy}/{health.slots_total}"
    if health and health.asleep:
        yield "asleep until the next request"
    if health and health.status is not ServerStatus.READY:
        yield f"<span class='kitty-bad-text'>{escape(health.message)}</span>"
