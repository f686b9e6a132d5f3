"""A server on screen: its status, its load, its buttons, the facts in a fold, the ways to it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

import traitlets
from IPython import get_ipython
from ipywidgets import HBox
from rich.filesize import decimal

from kitty_nb.catalog.model import shard_paths
from kitty_nb.client.connect import Served, hand_overs
from kitty_nb.config import ServerConfig, Task
from kitty_nb.supervisor.events import ServerStatus, Stage
from kitty_nb.widgets.display import (
    Choice,
    Fold,
    Line,
    Meter,
    Page,
    asset,
    button,
    duration,
    show_if,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kitty_nb.catalog.model import Model
    from kitty_nb.client.connect import HandOver
    from kitty_nb.manager import ModelManager
    from kitty_nb.operation import Operation
    from kitty_nb.supervisor.events import LoadProgress, PromptProgress, RouterLoad, ServerState


TONES = dict.fromkeys(ServerStatus, "busy") | {
    ServerStatus.STOPPED: "idle",
    ServerStatus.READY: "good",
    ServerStatus.FAILED: "bad",
    ServerStatus.CRASHED: "bad",
    ServerStatus.OUT_OF_REACH: "bad",
}
DEFAULT_PROFILE = ServerConfig.model_fields["profile"].default
_HASH_SHOWN = 19  # sha256- and twelve digits, as Ollama shows it
_MINUTE = 60


def word(status: ServerStatus) -> str:
    """Return a status as panels show it."""
    return "Not running" if status is ServerStatus.STOPPED else status.capitalize()


def badge(status: ServerStatus) -> str:
    """Draw a status."""
    return f"<span class='kitty-badge kitty-{TONES[status]}'>{word(status)}</span>"


def vitals(state: ServerState) -> Iterator[str]:
    """Yield what a server is doing now, each in a few words."""
    if state.status is ServerStatus.OUT_OF_REACH:
        yield "keeps trying to connect"
    if state.retry_in is not None:
        yield f"in {ceil(state.retry_in)} s"
    if state.uptime is not None:
        yield f"up {describe_uptime(state.uptime)}"
        if state.last_health_check and state.last_health_check.asleep:
            yield "asleep until the next request"


def describe_uptime(uptime: float) -> str:
    """Return a time span in seconds or whole minutes, so that what is beside it rarely moves."""
    seconds = int(uptime)
    if seconds < _MINUTE:
        return f"{seconds} s"
    return duration(seconds // _MINUTE * _MINUTE).removesuffix(" 00 s")


def unanswered(state: ServerState) -> str:
    """Return what is wrong with the answers of a server that was ready; empty if nothing is."""
    health = state.last_health_check
    silent = health and state.uptime is not None and health.status is not ServerStatus.READY
    return health.message if health and silent else ""


def status_line(state: ServerState) -> str:
    """Draw the state, the served model, and what else matters at once."""
    shown = (f"<span class='kitty-fact'>{fact}</span>" for fact in _facts(state))
    return "".join([badge(state.status), *shown])


def _facts(state: ServerState) -> Iterator[str]:
    if state.config.profile != DEFAULT_PROFILE:
        yield f"<span class='kitty-heading'>{escape(state.config.profile)}</span>"
    if state.config.ssh:
        yield f"on {escape(state.config.ssh)}"
    if state.config.url:
        yield escape(state.config.url)
        if state.config.key_in_the_clear:
            hint = "Use https in LLAMACPP_…_URL, or an SSH tunnel."
            yield f"<span class='kitty-bad' title='{hint}'>key sent unencrypted</span>"
    elif not (state.external or state.config.local_only):
        hint = "Set LLAMACPP_HOST=127.0.0.1 to keep it to this machine."
        host = escape(state.config.host)
        yield f"<span class='kitty-bad' title='{hint}'>open to the network ({host})</span>"
    if not state.status.idle:
        known = None if state.external else state.config.known_as or state.model_name
        if (name := known or state.alias) != state.config.profile:
            yield f"<b>{_shortened(name)}</b>"
        if state.projector:
            yield f"with {_shortened(state.projector.name)}"
        if state.external:
            yield "not started by kitty_nb"
    yield from vitals(state)
    if silence := unanswered(state):
        yield f"<span class='kitty-bad'>{escape(silence)}</span>"


def _shortened(name: str) -> str:
    """Return a file's name without its suffix; if it is a hash, only the beginning."""
    short = name.removesuffix(".gguf")
    return escape(f"{short[:_HASH_SHOWN]}…" if short.startswith("sha256-") else short)


def describe_reading(progress: PromptProgress) -> str:
    """Describe how much of a prompt has been read, e.g. `reading the prompt · 62 % · 3 s left`."""
    if not progress.total:
        return f"reading the prompt · {duration(progress.seconds)}"
    words, left = f"reading the prompt · {int(progress.fraction * 100)} %", progress.seconds_left
    return words if left is None else f"{words} · {max(ceil(left), 1)} s left"


def describe_load(progress: LoadProgress) -> str:
    """Describe a load, e.g. `loading weights · 43 % · 12 s · about 16 s left`."""
    if progress.stage is Stage.READY:
        return f"ready · loaded in {duration(progress.elapsed)}"
    parts = [progress.stage, f"{int(progress.fraction * 100)} %", duration(progress.elapsed)]
    if progress.eta is not None:
        parts.append(f"about {duration(max(progress.eta, 1))} left")
    if progress.overdue:
        parts.append("longer than usual")
    return " · ".join(parts)


class LoadBar(Meter):
    """The progress of a load or another wait; hidden at other times."""

    def __init__(self) -> None:
        super().__init__("kitty-load")
        self._pause = 0.0

    def show(
        self, state: ServerState, load: LoadProgress | None, routed: RouterLoad | None
    ) -> None:
        """Show how far a load is, how long a restart waits, or that a server is stopping.

        Of a router, which is ready itself, the load of one of its models is shown, by name.
        """
        if state.external or state.router:
            self.show_load(routed.progress if routed else None, routed.model if routed else "")
        elif state.retry_in is not None:
            self._pause = max(self._pause, state.retry_in)
            self.write(state.retry_in / max(self._pause, 1.0), "waiting before the restart")
        elif state.status is ServerStatus.STOPPING:
            self.write(None, "freeing memory")
        elif state.status in {ServerStatus.STARTING, ServerStatus.LOADING}:
            self._pause = 0.0
            self.show_load(load)
        else:
            self.write(None, "")

    def show_load(self, load: LoadProgress | None, model: str = "") -> None:
        """Show the progress of a model's load."""
        self.write(load.fraction if load else 0.0, describe_load(load) if load else "", model)

    def write(self, fraction: float | None, words: str, model: str = "") -> None:
        """Show the bar filled to a fraction, or no bar, and words beside it; hide without words."""
        self.bar.value = int((fraction or 0.0) * self.STEPS)
        self.bar.bar_style = "success" if fraction == 1.0 else ""
        self.text.value = escape(" · ".join(filter(None, (words and model, words))))
        show_if(self.bar, fraction is not None)
        show_if(self, bool(words))


@dataclass(frozen=True, slots=True)
class Choices:
    """The actions that make sense."""

    start: bool  # a server can be started, or another one in its place
    stop: bool  # there is something to stop
    restart: bool  # there is a reason to restart
    switch: bool  # starting means replacing the server that runs


def choices(
    state: ServerState, *, startable: bool, other_model: bool, other_settings: bool = False
) -> Choices:
    """Decide which actions make sense."""
    lost = state.status is ServerStatus.OUT_OF_REACH  # it reconnects by itself
    running = not (state.status.absent or lost or state.status is ServerStatus.STOPPING)
    usable = running and (state.external is None or state.external.models is not None)
    switch = usable and startable and other_model
    return Choices(
        start=startable and (state.status.absent or switch),
        stop=not state.config.url and (running or state.status is ServerStatus.RESTARTING),
        restart=usable
        and startable
        and not other_model
        and (other_settings or bool(unanswered(state))),
        switch=switch,
    )


class ServerButtons(HBox):
    """The buttons beside the model, and those that a notice offers as remedies."""

    def __init__(self) -> None:
        self.start = button("Start", "play", style="primary")
        self.restart = button("Restart", "repeat", "Restart with the settings shown here")
        self.restart.button_style = "primary"
        self.stop = button("Stop", "stop", "Works while a model loads, too")
        super().__init__([self.start, self.restart, self.stop])
        self.add_class("kitty-buttons")
        self.now = button("Restart now", "repeat", "Don't wait")
        self.cancel = button("Cancel", "stop", "Don't restart")
        self.use_port = button("", "play", "Start on this port until .env is reloaded")
        connect = "Connect to the llama-server already on this port; kitty_nb won't stop it"
        self.attach = button("Attach", "plug", connect)
        self.anyway = button("Start anyway", "play", "Start although it may not fit into memory")
        remedies = [self.now, self.cancel, self.use_port, self.attach, self.anyway]
        self.remedies = HBox(remedies).add_class("kitty-buttons")  # the latter, for the notice

    def show(self, state: ServerState, now: Choices, *, doubtful: bool) -> None:
        """Show and label the buttons that make sense; let the user insist on a doubtful start."""
        waiting = state.status is ServerStatus.RESTARTING
        show_if(self, not waiting)
        show_if(self.start, now.switch or (state.status.absent and not waiting))
        self.start.disabled = not now.start
        self.start.description = "Switch" if now.switch else "Start"
        self.start.tooltip = "Replace the running model" if now.switch else "Load the model"
        show_if(self.restart, now.restart)
        show_if(self.stop, not state.status.absent and not state.config.url)
        self.stop.disabled = not now.stop
        self.stop.description = "Detach" if state.external else "Stop"
        show_if(self.now, waiting and now.start)
        show_if(self.cancel, waiting)
        self.use_port.description = f"Use port {state.free_port}"
        show_if(self.use_port, now.start and state.free_port is not None and not doubtful)
        show_if(self.attach, state.attachable and not doubtful)
        show_if(self.anyway, doubtful)


@dataclass(eq=False)
class Switch:
    """A choice of one of a server's models."""

    model: str
    operation: Operation[Any] | None = None  # loads it there; None before that begins

    @property
    def done(self) -> bool:
        """True if the server has it, or has refused."""
        return self.operation is not None and self.operation.done


class ServedModels(Choice):
    """A choice of the model to ask, of a router or a server at a URL; hidden for other servers."""

    def __init__(self, on_choice: Callable[[str], object]) -> None:
        super().__init__("kitty-served", ("Model", "Models that the server lists"), on_choice)

    def show(self, state: ServerState, latest: Switch | None) -> None:
        """List a server's models, with the one in use, or the latest choice until that is done."""
        there = state.external if state.config.url else state.router
        models = tuple(there.models or ()) if there else ()
        chosen = state.alias if latest is None or latest.done else latest.model
        self.refill(models, chosen if chosen in models else None)
        show_if(self, bool(models))


class Details(Fold):
    """The facts, updated only while they are visible."""

    def __init__(self, on_unfold: Callable[[], object]) -> None:
        self.server, self.model = Line("kitty-server-facts"), Line("kitty-model-facts")
        super().__init__("Details", self.server, self.model, on_unfold=on_unfold)
        self.add_class("kitty-details")

    def show(self, state: ServerState, load: LoadProgress | None, model: Model | None) -> None:
        """Show a server and the chosen model."""
        if self.unfolded:
            self.server.write(_draw(server_facts(state, load)))
            chosen = draw_model(model) if model else "No model is chosen."
            elsewhere = state.config.url or state.config.models is not None
            self.model.write("" if elsewhere else chosen)


def server_facts(state: ServerState, load: LoadProgress | None) -> dict[str, str]:
    """Return the known facts about a server, by name."""
    health = state.last_health_check if state.uptime is not None else None
    slots = health and health.slots_total and f"{health.slots_busy} of {health.slots_total} busy"
    latency = health and health.latency
    program = "llama-server" if state.config.models is None else "a router"
    started, config = not state.external, state.config  # an attached server has its own settings
    loaded = load and load.stage is Stage.READY and state.uptime is not None
    known = {
        "Profile": config.profile,
        "Server": (state.pid and program) if started else "not started by kitty_nb",
        "URL": config.url,
        "PID": state.pid,
        "Model name for clients": (state.pid or state.external) and state.alias,
        "Projector": state.pid and state.projector,
        "Draft model": started and state.pid and config.drafter,
        "Devices": ", ".join(state.devices),
        "Loaded in": started and loaded and load and duration(load.elapsed),
        "Health check answered in": latency and f"{latency * 1000:.0f} ms",
        "Slots": slots,
        "Log file": started and not config.url and config.log_path,
    }
    return {name: str(value) for name, value in known.items() if value}


def draw_model(model: Model) -> str:
    """Draw a model's facts and its chat template."""
    drawn, template = _draw(model_facts(model)), model.facts.chat_template
    if not template:
        return drawn
    text = f"<pre class='kitty-template' tabindex='0'>{escape(template)}</pre>"
    return f"{drawn}<details><summary>Chat template</summary>{text}</details>"


def _draw(facts: Mapping[str, str]) -> str:
    lines = (f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl class='kitty-facts'>{''.join(lines)}</dl>"


_CONFIRMED = {
    True: "confirmed by the tensors",
    False: "according to most tensors; the file's metadata disagrees",
    None: "not confirmed by the tensors",
}


_MADE_FOR = {Task.CHAT: None, Task.EMBED: "embeddings", Task.RANK: "ranking documents"}


def model_facts(model: Model) -> dict[str, str]:
    """Return the known facts about a model, by name."""
    files, header = shard_paths(model.path), model.facts
    quantization = model.quantization and f"{model.quantization} ({_CONFIRMED[model.confirmed]})"
    known = {
        "Title": model.title,
        "Made from": header.base_model,
        "Architecture": model.architecture,
        "Parameters": _count(model.parameters) or header.size_label,
        "Layers": _count(header.layers),
        "Attention heads": _count(header.heads),
        "Vocabulary": _count(header.vocabulary, " tokens"),
        "Trained context": _count(model.context_length, " tokens"),
        "Quantization": quantization,
        "License": header.license,
        "Made for": _MADE_FOR[header.task],
        "Takes in": ", ".join(model.modalities),
        "Projector": model.projector,
        "Chat template": "none; answers may run on" if header.lacks_template else None,
        "Tools": {True: "yes", False: "no", None: None}[header.tools],
        "Repository": model.repository,
        "Known as": model.known_as,
        "Size": f"{decimal(model.size)} ({model.size:,} bytes)",
        "File": model.path,
        "Shards": f"{len(files)} files, to {files[-1].name}" if len(files) > 1 else None,
        "Missing": ", ".join(model.missing),
        "Problem": model.problem or model.doubt,
    }
    return {name: str(value) for name, value in known.items() if value}


def _count(number: int | None, of: str = "") -> str | None:
    return None if number is None else f"{number:,}{of}"


class Address(Page):
    """The server's address and what to copy, while the server is ready.

    The kernel does not know the address by which the browser reaches it, nor whether JupyterHub or
    a tunnel is in between, so the page itself finds out: if jupyter-server-proxy answers, the link
    to the server's web page goes through the notebook's own server; otherwise it is the server's
    address, on this machine.

    The web page asks for the key. The key is in neither the link nor this widget's state: it is
    sent when the user presses its *Copy*, in a message that is not stored.

    Args:
        texts: Functions that return the texts to copy, by name, called when the user copies one;
            they return None if there is nothing to copy.
        programs: Titles of the texts in the menu of other programs, by name.
    """

    _esm: ClassVar[str] = asset("page.js", "clipboard.js", "address.js")
    endpoint: Any = traitlets.Unicode("").tag(sync=True)
    asks_key: Any = traitlets.Bool(True).tag(sync=True)
    programs: Any = traitlets.List().tag(sync=True)

    def __init__(
        self, texts: Mapping[str, Callable[[], str | None]], programs: Mapping[str, str]
    ) -> None:
        super().__init__("kitty-address", programs=[*programs.items()])
        self._texts = texts

    def show(self, state: ServerState) -> None:
        """Show the address of a server, or hide."""
        with self.hold_sync():
            self.endpoint = state.endpoint if state.status is ServerStatus.READY else ""
            self.asks_key = self._texts["key"]() is not None

    def receive(self, message: Any) -> None:
        """Handle a message from a page."""
        match message:
            case {"kind": "copy", "what": str(what), "for": str(asker)} if what in self._texts:
                self.send_text(asker, self._texts[what])


# Code to paste into a cell, by what it is for.
SNIPPETS: dict[str, str] = tomllib.loads(asset("snippets.toml"))


def snippet(state: ServerState, panel: str) -> str:
    """Return code that asks a server through its panel's name, to paste into a cell."""
    openai = SNIPPETS["openai" if find_spec("openai") else "no_openai"].format(panel=panel)
    facts = {"openai": openai, "alias": state.alias, "endpoint": state.endpoint}
    return SNIPPETS[state.task].format(panel=panel, **facts)


def cells_for_programs(
    manager: ModelManager, panel: Callable[[], str]
) -> dict[str, Callable[[], str]]:
    """Return functions, by program, that create a cell to use the server with it."""

    def cell(hand_over: HandOver) -> str:
        state = manager.state
        served = Served(manager.access, state.alias, state.config.profile)
        return hand_over.in_notebook(served, f"{panel()}.manager")

    return {name: partial(cell, one) for name, one in hand_overs().items() if one.python}


def name_of(thing: object) -> str:
    """Return a variable of the notebook for an object, if only `_3`, the output of a cell."""
    shell = get_ipython()
    names = shell.user_ns.copy().items() if shell else ()
    found = [name for name, value in names if value is thing and name.strip("_")]
    return min(found, key=lambda name: name.startswith("_"), default="panel")
