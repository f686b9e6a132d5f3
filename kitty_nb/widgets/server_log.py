"""The log on screen: what the manager did, and what the server wrote."""

from __future__ import annotations

import re
import time
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

from ipywidgets import Output

from kitty_nb.supervisor.events import Level
from kitty_nb.widgets.display import Page, asset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kitty_nb.supervisor.events import Activity


_ACTIVITIES_KEPT = 200
_COUNTED = re.compile(r".+…(?= \()")
_COLOURS = {Level.SUCCESS: "\x1b[32m", Level.WARNING: "\x1b[33m", Level.ERROR: "\x1b[31m"}


class ActivityLog(Output):
    """The newest activities.

    The text is assigned whole: capturing prints with `with output:` is unreliable off the main
    thread, and appending sends a message whose size grows with all that came before.

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
        """Add an activity, on any thread; it is shown by the next `flush`.

        One that only counts on, as in `Loading model… (12/120, 11s elapsed)`, replaces the last.
        """
        counted = _COUNTED.match(activity.message)
        if counted and self.activities and self.activities[-1].message.startswith(counted[0]):
            self.activities.pop()
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

    Messages number their lines, new ones only: a page that opens later, or misses some, asks for a
    replay.

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
