"""A server on screen: its status, load, logs, buttons, and the ways to use it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from html import escape
from importlib.util import find_spec
from math import ceil
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar

import traitlets
from IPython import get_ipython
from ipywidgets import HBox, Output

from kitty_nb.supervisor.events import Level, ServerStatus, Stage
from kitty_nb.widgets.display import Meter, Page, asset, button, duration, show_if

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kitty_nb.supervisor.events import Activity, LoadProgress, RouterLoad, ServerState

TONES = dict.fromkeys(ServerStatus, "busy") | {
    ServerStatus.STOPPED: "idle",
    ServerStatus.READY: "good",
    ServerStatus.FAILED: "bad",
    ServerStatus.CRASHED: "bad",
}
_HASH_SHOWN = 19  # sha256- and twelve digits, as Ollama shows it
_SECONDS_ONLY = 10  # below it, a clock that ticks has no decimals


def vitals(state: ServerState) -> Iterator[str]:
    """Yield what a server is doing now, each in a few words."""
    if state.retry_in is not None:
        yield f"starting again in {ceil(state.retry_in)} s"
    if state.uptime is not None:
        long = state.uptime >= _SECONDS_ONLY
        yield f"up {duration(state.uptime)}" if long else f"up {int(state.uptime)} s"
        if state.last_health_check and state.last_health_check.asleep:
            yield "asleep until the next request"


def unanswered(state: ServerState) -> str:
    """Return what is wrong with the answers of a server that was ready; empty if nothing is."""
    health = state.last_health_check
    silent = health and state.uptime is not None and health.status is not ServerStatus.READY
    return health.message if health and silent else ""


def status_line(state: ServerState) -> str:
    """Draw state, model, process, endpoint, uptime, latency and slots."""
    badge = f"<span class='kitty-badge kitty-{TONES[state.status]}'>{state.status}</span>"
    profile = f"<span class='kitty-heading'>{escape(state.config.profile)}</span>"
    facts = (f"<span class='kitty-fact'>{fact}</span>" for fact in _facts(state))
    return "".join([badge, profile, *facts])


def _facts(state: ServerState) -> Iterator[str]:
    if not state.config.local_only:
        hint = "Set LLAMACPP_HOST=127.0.0.1 to keep it to this machine."
        host = escape(state.config.host)
        yield f"<span class='kitty-bad-text' title='{hint}'>open to the network ({host})</span>"
    if state.pid is not None:
        if state.model_name:
            yield _shortened(state.model_name)
        if state.projector:
            yield f"with {_shortened(state.projector.name)}"
        yield f"as <b>{escape(state.alias)}</b>"
        yield f"PID {state.pid}"
        if state.external:
            yield "not started by kitty_nb"
        if state.devices:
            yield f"on {escape(', '.join(state.devices))}"
    health = state.last_health_check
    if state.uptime is not None:
        url = escape(state.endpoint)
        yield f"<a href='{url}' target='_blank' rel='noopener'>{url}</a>"
    yield from vitals(state)
    if state.uptime is not None and health and health.latency is not None:
        yield f"{health.latency * 1000:.0f} ms"
    if state.uptime is not None and health and health.slots_total:
        yield f"slots {health.slots_busy}/{health.slots_total}"
    if silence := unanswered(state):
        yield f"<span class='kitty-bad-text'>{escape(silence)}</span>"


def _shortened(name: str) -> str:
    """Return a file's name; of one that is called by its hash, the beginning."""
    return escape(name if PurePath(name).suffix else f"{name[:_HASH_SHOWN]}…")


def describe_load(progress: LoadProgress) -> str:
    """Describe a load, e.g. `loading weights · 43 % · 12 s · about 16 s left`."""
    if progress.stage is Stage.READY:
        return f"ready · loaded in {duration(progress.elapsed)}"
    parts = [progress.stage.label, f"{int(progress.fraction * 100)} %", duration(progress.elapsed)]
    if progress.eta is not None:
        parts.append(f"about {duration(max(progress.eta, 1))} left")
    if progress.overdue:
        parts.append("longer than usual")
    return " · ".join(parts)


class LoadBar(Meter):
    """The present or the last load."""

    def __init__(self) -> None:
        super().__init__("kitty-load")

    def show(self, status: ServerStatus, progress: LoadProgress | None, model: str = "") -> None:
        """Show how far the load is, coloured by what became of it."""
        if status in {ServerStatus.STOPPED, ServerStatus.STOPPING, ServerStatus.RESTARTING}:
            progress = None
        elif progress and TONES[status] == "bad":
            progress = replace(progress, eta=None)
        # Empty, it would look like a scrollbar.
        self.bar.layout.visibility = "visible" if progress else "hidden"
        with self.bar.hold_sync():
            self.bar.value = int(progress.fraction * self.STEPS) if progress else 0
            self.bar.bar_style = {"good": "success", "bad": "danger"}.get(TONES[status], "")
        words = [escape(model)] if model else []
        self.text.value = " · ".join([*words, describe_load(progress)]) if progress else ""

    def show_router(self, load: RouterLoad | None) -> None:
        """Show the load of one of a router's models, by name; the router itself is ready."""
        progress = load.progress if load else None
        loading = progress and progress.stage is not Stage.READY
        status = ServerStatus.LOADING if loading else ServerStatus.READY
        self.show(status, progress, load.model if load else "")


_ACTIVITIES_KEPT = 200
_COLOURS = {Level.SUCCESS: "\x1b[32m", Level.WARNING: "\x1b[33m", Level.ERROR: "\x1b[31m"}


class ActivityLog(Output):
    """The newest activities.

    The text is assigned whole: capturing prints with `with output:` is unreliable off the main
    thread, and appending sends a message whose size grows with all that came before.

    Args:
        activities: Those to begin with.

    Attributes:
        activities: Those that are shown, oldest first.
    """

    def __init__(self, activities: Iterable[Activity] = ()) -> None:
        super().__init__()
        self.add_class("kitty-activity")
        self.activities = deque(activities, maxlen=_ACTIVITIES_KEPT)
        self._changed = bool(self.activities)

    @property
    def lines(self) -> tuple[str, ...]:
        """The messages, oldest first."""
        return tuple(activity.message for activity in tuple(self.activities))

    def append(self, activity: Activity) -> None:
        """Add an activity, on any thread; it is shown by the next `flush`."""
        self.activities.append(activity)
        self._changed = True

    def flush(self) -> None:
        """Show what has been added, as one message."""
        if self._changed:
            self._changed = False
            text = "".join(map(_line, tuple(self.activities)))
            self.outputs = ({"output_type": "stream", "name": "stdout", "text": text},)


def _line(activity: Activity) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(activity.at))
    message = activity.message.replace("\n", "\n          ")
    colour = _COLOURS.get(activity.level)
    return f"{clock}  {colour}{message}\x1b[0m\n" if colour else f"{clock}  {message}\n"


LINES_KEPT = 2000


class ServerLog(Page):
    """Log lines; the page follows or pauses, filters and copies.

    Lines travel as messages, new ones only, so neither the widget's state nor a saved notebook
    grows with the log. Messages number their lines: a page that opens later, or misses some, asks
    for a replay.

    Args:
        on_replay_asked: Called, on the front end's thread, when `flush` has something to do
            because a page asks for all the lines there are.
    """

    _esm: ClassVar[str] = asset("page.js", "clipboard.js", "server_log.js")
    # The style of the whole panel, here alone: each that carries it adds it to saved notebooks.
    _css: ClassVar[str] = asset("panel.css")

    def __init__(self, on_replay_asked: Callable[[], object]) -> None:
        super().__init__("kitty-log-box")
        self._kept: deque[str] = deque(maxlen=LINES_KEPT)
        self._count = 0
        self._sent = 0
        self._on_replay_asked = on_replay_asked

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines that a page opened now would show."""
        return tuple(self._kept)

    def append(self, lines: Sequence[str]) -> None:
        """Add lines; they are shown by the next `flush`."""
        self._kept.extend(lines)
        self._count += len(lines)

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

    def receive(self, message: Any) -> None:
        """Take a message of a page."""
        match message:
            case {"kind": "replay"}:
                self._sent = 0
                self._on_replay_asked()


@dataclass(frozen=True, slots=True)
class Choices:
    """The actions that make sense.

    Attributes:
        start: A server can be started, or switched.
        stop: There is something to stop.
        restart: There is something to restart.
        switch: Starting means replacing the server that runs.
    """

    start: bool
    stop: bool
    restart: bool
    switch: bool


def choices(state: ServerState, *, startable: bool, differs: bool) -> Choices:
    """Decide which actions make sense.

    Args:
        state: The server's state.
        startable: Whether the chosen model can be started.
        differs: Whether the chosen model is another one than the server's.
    """
    waiting = state.status is ServerStatus.RESTARTING
    running = not state.status.absent and state.status is not ServerStatus.STOPPING
    usable = running and (state.external is None or state.external.models is not None)
    return Choices(
        start=startable and (state.status.absent or (usable and differs)),
        stop=running or waiting,
        restart=usable and startable,
        switch=usable and differs,
    )


class ServerButtons(HBox):
    """The three buttons, and two more where the port is held."""

    def __init__(self) -> None:
        self.start = button("Start", "play", style="primary")
        self.stop = button("Stop", "stop", "Works while a model loads, too")
        self.restart = button("Restart", "repeat", "Restart with the settings shown here")
        self.use_port = button("", "play", "Start on this port until .env is reloaded")
        connect = "Connect to the llama-server already on this port; kitty_nb won't stop it"
        self.attach = button("Attach", "plug", connect)
        super().__init__([self.start, self.stop, self.restart, self.use_port, self.attach])
        self.add_class("kitty-buttons")

    def show(self, state: ServerState, now: Choices) -> None:
        """Enable what makes sense, and name what it does."""
        self.start.disabled = not now.start
        self.start.description = "Switch" if now.switch else "Start"
        self.start.tooltip = "Replace the running model" if now.switch else "Load the model"
        self.stop.disabled = not now.stop
        waiting = state.status is ServerStatus.RESTARTING
        self.stop.description = "Cancel" if waiting else "Detach" if state.external else "Stop"
        self.restart.disabled = not now.restart
        self.use_port.description = f"Use port {state.free_port}"
        show_if(self.use_port, now.start and state.free_port is not None)
        show_if(self.attach, state.attachable)


class WebPage(Page):
    """The link to the server's web page, while the server is ready.

    The kernel does not know by which address the browser reaches it, nor whether that passes
    JupyterHub or a tunnel, so the page itself finds out: where jupyter-server-proxy answers, the
    link goes through the notebook's own server; else it is the server's address, on this machine.

    The server asks for its key there. The key is in neither the link nor this widget's state: it
    travels when the user presses *Copy key*, in a message that nothing keeps.

    Args:
        reveal_key: Returns the key.
    """

    _esm: ClassVar[str] = asset("clipboard.js", "web_page.js")
    endpoint: Any = traitlets.Unicode("").tag(sync=True)
    asks_key: Any = traitlets.Bool(True).tag(sync=True)

    def __init__(self, reveal_key: Callable[[], str | None]) -> None:
        super().__init__("kitty-web")
        self._reveal_key = reveal_key

    def show(self, state: ServerState) -> None:
        """Show the link to a server, or hide."""
        with self.hold_sync():
            self.endpoint = state.endpoint if state.status is ServerStatus.READY else ""
            self.asks_key = self._reveal_key() is not None

    def receive(self, message: Any) -> None:
        """Take a message of a page."""
        match message:
            case {"kind": "key", "for": str(asker)}:
                self.send({"kind": "key", "for": asker, "key": self._reveal_key() or ""})


_CODE = """\
print({panel}.manager.chat("Who are you?", max_tokens=500).wait())

# The same over OpenAI's API, with an httpx.Client that has the server's address and key.
messages = [{{"role": "user", "content": "Who are you?"}}]
request = {{"model": {alias!r}, "messages": messages, "max_tokens": 500}}
answer = {panel}.manager.http.post("/v1/chat/completions", json=request)
print(answer.json()["choices"][0]["message"]["content"])

{openai}

# Other programs need the base URL {endpoint}/v1 and the key:
key = {panel}.manager.reveal_api_key()"""
_OPENAI = """\
# And with an openai.OpenAI client.
print({panel}.manager.client.chat.completions.create(**request).choices[0].message.content)"""
_NO_OPENAI = "# After `pip install openai`, {panel}.manager.client is an openai.OpenAI."


def snippet(state: ServerState, panel: object) -> str:
    """Draw folded code that uses a server.

    Args:
        state: The server.
        panel: The panel that the code goes through.
    """
    name, where = _name_of(panel), {"alias": state.alias, "endpoint": state.endpoint}
    openai = (_OPENAI if find_spec("openai") else _NO_OPENAI).format(panel=name)
    code = escape(_CODE.format(panel=name, openai=openai, **where))
    return f"<details><summary>Use it from code</summary><pre>{code}</pre></details>"


def _name_of(thing: object) -> str:
    """Return a name that cells have for something, if only `_3`, the output of a cell."""
    shell = get_ipython()
    names = shell.user_ns.copy().items() if shell else ()
    found = [name for name, value in names if value is thing and name.strip("_")]
    return min(found, key=lambda name: name.startswith("_"), default="panel")
