"""Start, Pause and Cancel of a sweep, and what to do with its best."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipywidgets import Button, Dropdown, HBox

from kitty_nb.widgets.sweep_status import SweepStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

_RUNNING = {SweepStatus.RUNNING, SweepStatus.PAUSING, SweepStatus.PAUSED}


class SweepButtons(HBox):
    """The buttons, each enabled only where it makes sense.

    Args:
        headings: The numbers by which the best may be chosen, with what to call them.
        objective: The one to begin with.
    """

    def __init__(self, headings: Mapping[str, str], objective: str) -> None:
        self.start = Button(icon="play", button_style="primary")
        self.pause = Button()
        self.cancel = Button(description="Cancel", icon="stop", tooltip="What is done is kept")
        named = {objective: objective.replace("_", " "), **headings}
        self.objective = Dropdown(
            options=[(text, name) for name, text in named.items()],
            value=objective,
            description="Best by",
        )
        self.use = Button(description="Use the best", icon="star")
        choosing = HBox([self.objective, self.use])
        choosing.add_class("kitty-choosing")
        super().__init__([self.start, self.pause, self.cancel, choosing])
        self.add_class("kitty-buttons")

    def show(self, status: SweepStatus, *, failed: bool, best: bool) -> None:
        """Enable what makes sense, and say what it does.

        Args:
            status: Where the sweep is.
            failed: Whether a trial failed or was skipped.
            best: Whether there is a best.
        """
        running, paused = status in _RUNNING, status in {SweepStatus.PAUSING, SweepStatus.PAUSED}
        again = status is SweepStatus.DONE and failed
        begun = status in {SweepStatus.INTERRUPTED, SweepStatus.FAILED}
        finished = status is SweepStatus.DONE and not failed
        self.start.disabled = running or finished or status is SweepStatus.STARTING
        self.start.description = "Try failed again" if again else "Go on" if begun else "Start"
        self.pause.disabled = not running
        self.pause.description = "Resume" if paused else "Pause"
        self.pause.icon = "play" if paused else "pause"
        self.pause.tooltip = (
            "Begin the next trial" if paused else "Let the trial under way end, and begin no other"
        )
        self.cancel.disabled = not running
        self.use.disabled = not best
