"""A server's status, progress, activity and log."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from html import escape
from math import ceil
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar

from anywidget import AnyWidget
from ipywidgets import HTML, HBox, IntProgress, Output

from kitty_nb.supervisor.events import Level, ServerStatus, Stage
from kitty_nb.widgets.display import asset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kitty_nb.supervisor.events import Activity, LoadProgress, RouterLoad, ServerState


_STEPS = 1000  # finer than percent, so that a long load is seen to move


class LoadBar(HBox):
    """Shows the present or the last load."""

    def __init__(self) -> None:
        self.bar = IntProgress(min=0, max=_STEPS, value=0)
        self.text = HTML("")
        self.bar.add_class("kitty-bar")
        self.text.add_class("kitty-bar-text")
        super().__init__([self.bar, self.text])
        self.add_class("kitty-load")

    def show(self, status: ServerStatus, progress: LoadProgress | None) -> None:
        """Show how far the load is, coloured by what became of it."""
        if status in {ServerStatus.STOPPED, ServerStatus.STOPPING, ServerStatus.RESTARTING}:
            progress = None
        elif progress and status in {ServerStatus.FAILED, ServerStatus.CRASHED}:
            progress = replace(progress, eta=None)
        # Empty, it would look like a scrollbar.
        self.bar.layout.visibility = "visible" if progress else "hidden"
        with self.bar.hold_sync():
            self.bar.value = int(progress.fraction * _STEPS) if progress else 0
            self.bar.bar_style = {
                ServerStatus.READY: "success",
                ServerStatus.FAILED: "danger",
                ServerStatus.CRASHED: "danger",
            }.get(status, "")
        self.text.value = describe(progress) if progress else ""

    def show_router(self, load: RouterLoad | None) -> None:
        """Show the load of one of a router's models, by name; the router itself is ready."""
        progress = load.progress if load else None
        loading = progress and progress.stage is not Stage.READY
        self.show(ServerStatus.LOADING if loading else ServerStatus.READY, progress)
        if load and progress:
            self.text.value = f"{escape(load.model)} · {describe(progress)}"


def describe(progress: LoadProgress) -> str:
    """The line beside the bar, e.g. `loading weights · 43 % · 12 s · about 16 s left`."""
    if progress.stage is Stage.READY:
        return f"ready · loaded in {duration(progress.elapsed)}"
    parts = [progress.stage.label, f"{int(progress.fraction * 100)} %", duration(progress.elapsed)]
    if progress.eta is not None:
        parts.append(f"about {duration(max(progress.eta, 1))} left")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """A time span as a person says it: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 05 min`."""
    if seconds < 9.95:  # noqa: PLR2004 (what rounds to 10 has no decimal)
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02} min" if hours else f"{minutes} min {rest:02} s"


_LINES_KEPT = 200
_COLOURS = {Level.SUCCESS: "\x1b[32m", Level.WARNING: "\x1b[33m", Level.ERROR: "\x1b[31m"}


class ActivityLog(Output):
    """Shows the newest activities.

    The text is assigned whole: capturing prints with `with output:` is unreliable off the main
    thread, and appending sends a message whose size grows with all that came before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-activity")
        self._kept: deque[Activity] = deque(maxlen=_LINES_KEPT)

    @property
    def lines(self) -> tuple[str, ...]:
        """The messages shown, oldest first."""
        return tuple(activity.message for activity in self._kept)

    @property
    def activities(self) -> tuple[Activity, ...]:
        """The activities shown, oldest first."""
        return tuple(self._kept)

    def show(self, activities: list[Activity]) -> None:
        """Add activities, as one message."""
        if activities:
            self._kept.extend(activities)
            text = "".join(_line(activity) for activity in self._kept)
            self.outputs = ({"output_type": "stream", "name": "stdout", "text": text},)


def _line(activity: Activity) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(activity.at))
    message = activity.message.replace("\n", "\n          ")
    colour = _COLOURS.get(activity.level)
    return f"{clock}  {colour}{message}\x1b[0m\n" if colour else f"{clock}  {message}\n"


LINES_KEPT = 2000


class ServerLog(AnyWidget):
    """Shows log lines; follows or pauses, filters and copies.

    Lines travel as messages, new ones only, so neither the widget's state nor a saved notebook
    grows with the log. Messages number their lines: a page that opens later, or misses some, asks
    for a replay.

    Args:
        on_replay_asked: Called, on the front end's thread, when `flush` has something to do
            because a page asks for all the lines there are.
    """

    _esm: ClassVar[str] = asset("clipboard.js", "server_log.js")
    # The style of the whole panel, here alone: each that carries it adds it to saved notebooks.
    _css: ClassVar[str] = asset("panel.css")

    def __init__(self, on_replay_asked: Callable[[], object]) -> None:
        super().__init__()
        self.add_class("kitty-log-box")
        self._kept: deque[str] = deque(maxlen=LINES_KEPT)
        self._count = 0
        self._sent = 0
        self._on_replay_asked = on_replay_asked
        self.on_msg(self._receive)

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines that a page opened now would show."""
        return tuple(self._kept)

    def append(self, lines: Iterable[str]) -> None:
        """Add lines; they are shown by the next `flush`."""
        for line in lines:
            self._kept.append(line)
            self._count += 1

    def clear(self) -> None:
        """Forget all lines: another server's log begins."""
        self._kept.clear()
        self._sent = self._count
        self.send({"kind": "clear", "next": self._count})

    def flush(self) -> None:
        """Send what has not been sent yet, as one message."""
        fresh = min(self._count - self._sent, len(self._kept))
        self._sent = self._count  # before it is sent: a page may ask for a replay meanwhile
        if fresh:
            lines = list(self._kept)[-fresh:]
            self.send({"kind": "lines", "first": self._count - fresh, "lines": lines})

    def _receive(self, _widget: object, message: Any, _buffers: object) -> None:
        if isinstance(message, dict) and message.get("kind") == "replay":
            self._sent = 0
            self._on_replay_asked()


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
    if state.external:
        yield "not started by kitty_nb"
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
