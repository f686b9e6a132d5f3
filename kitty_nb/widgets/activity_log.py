"""What the manager did, one line per fact."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from ipywidgets import Output

from kitty_nb.supervisor.events import Level

if TYPE_CHECKING:
    from kitty_nb.supervisor.events import Activity

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
