"""A link to the server's own web page that works from wherever the notebook is seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import traitlets
from anywidget import AnyWidget

from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.widgets.assets import asset

if TYPE_CHECKING:
    from collections.abc import Callable

    from kitty_nb.supervisor.events import ServerState


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
