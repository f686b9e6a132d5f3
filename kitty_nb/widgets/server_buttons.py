"""Start, stop and the links to a ready server."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import traitlets
from anywidget import AnyWidget
from IPython import get_ipython
from ipywidgets import HTML, Button, HBox

from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.widgets.display import asset

if TYPE_CHECKING:
    from collections.abc import Callable

    from kitty_nb.supervisor.events import ServerState


_RUNNING = {ServerStatus.STARTING, ServerStatus.LOADING, ServerStatus.READY}


@dataclass(frozen=True, slots=True)
class Choices:
    """The buttons that make sense.

    Attributes:
        start: A server can be started, or switched.
        stop: There is something to stop.
        restart: There is something to restart.
        switch: Starting means replacing the server that runs.
        cancel: Stopping means calling off a restart.
        port: A free port to start on instead of the one that is held.
        attach: What holds it can be used as it is.
        detach: Stopping only detaches from the server, which kitty_nb did not start.
    """

    start: bool
    stop: bool
    restart: bool
    switch: bool
    cancel: bool = False
    port: int | None = None
    attach: bool = False
    detach: bool = False


def choices(state: ServerState, *, startable: bool, differs: bool) -> Choices:
    """Decide which buttons make sense.

    Args:
        state: The server's state.
        startable: Whether the chosen model can be started.
        differs: Whether the chosen model is another one than the server's.
    """
    running, waiting = state.status in _RUNNING, state.status is ServerStatus.RESTARTING
    external = state.external is not None
    usable = running and (state.external is None or state.external.models is not None)
    return Choices(
        start=startable and (state.status.idle or waiting or (usable and differs)),
        stop=running or waiting,
        restart=usable and startable,
        switch=usable and differs,
        cancel=waiting,
        port=state.free_port if startable else None,
        attach=state.attachable,
        detach=external,
    )


class ServerButtons(HBox):
    """The three buttons, and two more where the port is held."""

    def __init__(self) -> None:
        self.start = Button(description="Start", icon="play", button_style="primary")
        self.stop = Button(
            description="Stop", icon="stop", tooltip="Works while a model loads, too"
        )
        self.restart = Button(
            description="Restart", icon="repeat", tooltip="Restart with the settings shown here"
        )
        self.use_port = Button(icon="play", tooltip="Start on this port until .env is reloaded")
        self.attach = Button(
            description="Attach",
            icon="plug",
            tooltip="Connect to the llama-server already on this port; kitty_nb won't stop it",
        )
        super().__init__([self.start, self.stop, self.restart, self.use_port, self.attach])
        self.add_class("kitty-buttons")

    def show(self, now: Choices) -> None:
        """Enable what makes sense."""
        self.start.disabled = not now.start
        self.stop.disabled = not now.stop
        self.restart.disabled = not now.restart
        self.stop.description = "Cancel" if now.cancel else "Detach" if now.detach else "Stop"
        self.start.description = "Switch" if now.switch else "Start"
        self.use_port.description = f"Use port {now.port}"
        self.use_port.layout.display = None if now.port else "none"
        self.attach.layout.display = None if now.attach else "none"
        self.start.tooltip = "Replace the running model" if now.switch else "Load the model"


class WebPage(AnyWidget):
    """Shows the link while the server is ready.

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
        super().__init__()
        self.add_class("kitty-web")
        self._reveal_key = reveal_key
        self.on_msg(self._receive)

    def show(self, state: ServerState, asks_key: bool) -> None:
        """Show the link to a server, or hide.

        Args:
            state: The server's.
            asks_key: Whether it wants a key.
        """
        with self.hold_sync():
            self.endpoint = state.endpoint if state.status is ServerStatus.READY else ""
            self.asks_key = asks_key

    def _receive(self, _widget: object, message: Any, _buffers: object) -> None:
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


class Snippet(HTML):
    """Folded code; hidden until the server is ready.

    Args:
        panel: The panel that the code goes through.
    """

    def __init__(self, panel: object) -> None:
        super().__init__()
        self.add_class("kitty-snippet")
        self._panel = panel
        self._openai = _OPENAI if find_spec("openai") else _NO_OPENAI

    def show(self, state: ServerState) -> None:
        """Show the code for a server."""
        ready = state.status is ServerStatus.READY
        self.layout.display = None if ready else "none"
        if ready:
            panel = _name_of(self._panel)
            openai = self._openai.format(panel=panel)
            code = _CODE.format(
                panel=panel, alias=state.alias, endpoint=state.endpoint, openai=openai
            )
            summary = "<summary>Use it from code</summary>"
            self.value = f"<details>{summary}<pre>{escape(code)}</pre></details>"


def _name_of(thing: object) -> str:
    """Return a name that cells have for something, if only `_3`, the output of a cell."""
    shell = get_ipython()
    names = shell.user_ns.copy().items() if shell else ()
    found = [name for name, value in names if value is thing and name.strip("_")]
    return min(found, key=lambda name: name.startswith("_"), default="panel")
