"""The load's progress: a bar, and beside it the stage, percent, elapsed time and ETA."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

from ipywidgets import HTML, HBox, IntProgress

from kitty_nb.supervisor.events import ServerStatus, Stage

if TYPE_CHECKING:
    from kitty_nb.supervisor.events import LoadProgress, RouterLoad

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
