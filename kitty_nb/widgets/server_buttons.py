"""Start, Stop and Restart, each enabled only where it makes sense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ipywidgets import Button, HBox

from kitty_nb.supervisor.events import ServerStatus

if TYPE_CHECKING:
    from kitty_nb.supervisor.events import ServerState

_RUNNING = {ServerStatus.STARTING, ServerStatus.LOADING, ServerStatus.READY}


@dataclass(frozen=True, slots=True)
class Choices:
    """Which buttons make sense.

    Attributes:
        start: A server can be started, or switched.
        stop: There is something to stop.
        restart: There is something to restart.
        switch: Starting means replacing the server that runs.
        cancel: Stopping means calling off a restart.
        port: A free port to start on instead of the one that is held.
        attach: What holds it can be used as it is.
        let_go: Stopping means letting go of a server that was not started here.
    """

    start: bool
    stop: bool
    restart: bool
    switch: bool
    cancel: bool = False
    port: int | None = None
    attach: bool = False
    let_go: bool = False


def choices(state: ServerState, *, startable: bool, differs: bool) -> Choices:
    """Decide which buttons make sense.

    Args:
        state: The server's state.
        startable: Whether the chosen model can be started.
        differs: Whether the chosen model is another one than the server's.
    """
    running, waiting = state.status in _RUNNING, state.status is ServerStatus.RESTARTING
    foreign = state.foreign is not None
    usable = running and (state.foreign is None or state.foreign.models is not None)
    return Choices(
        start=startable and (state.status.idle or waiting or (usable and differs)),
        stop=running or waiting,
        restart=usable and startable,
        switch=usable and differs,
        cancel=waiting,
        port=state.free_port if startable else None,
        attach=state.attachable,
        let_go=foreign,
    )


class ServerButtons(HBox):
    """The three buttons, and two more where the port is held."""

    def __init__(self) -> None:
        self.start = Button(description="Start", icon="play", button_style="primary")
        self.stop = Button(description="Stop", icon="stop", tooltip="Also while a model loads")
        self.restart = Button(
            description="Restart", icon="repeat", tooltip="With the settings shown here"
        )
        self.use_port = Button(
            icon="play", tooltip="Start there, until the settings are read again"
        )
        self.attach = Button(
            description="Attach",
            icon="plug",
            tooltip="Use the llama-server that has the port; it is never ended from here",
        )
        super().__init__([self.start, self.stop, self.restart, self.use_port, self.attach])
        self.add_class("kitty-buttons")

    def show(self, now: Choices) -> None:
        """Enable what makes sense."""
        self.start.disabled = not now.start
        self.stop.disabled = not now.stop
        self.restart.disabled = not now.restart
        self.stop.description = "Cancel" if now.cancel else "Let go" if now.let_go else "Stop"
        self.start.description = "Switch" if now.switch else "Start"
        self.use_port.description = f"Use port {now.port}"
        self.use_port.layout.display = None if now.port else "none"
        self.attach.layout.display = None if now.attach else "none"
        self.start.tooltip = "Replace the running model" if now.switch else "Load the model"
