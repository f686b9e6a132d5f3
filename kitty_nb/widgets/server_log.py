"""The server's own log, streamed into a view that keeps a bounded number of lines."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

from anywidget import AnyWidget

from kitty_nb.widgets.assets import asset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
