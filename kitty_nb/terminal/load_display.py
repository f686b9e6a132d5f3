"""A load, as a terminal shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from kitty_nb.supervisor.events import Activity, Event, Level, ProgressMade

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console


class LoadDisplay:
    """Shows a load: a bar in a terminal, lines anywhere else. A context manager.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        # Drawn when something has moved, so that no thread is needed.
        self._bar = Progress(
            TextColumn("{task.description:<15}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[time]}"),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_interactive,
        )
        self._task = self._bar.add_task("", total=1.0, time="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, event: Event) -> None:
        """Show what an event says of the load."""
        match event:
            case ProgressMade(progress):
                left = "" if progress.eta is None else f", about {progress.eta:.0f} s left"
                self._bar.update(
                    self._task,
                    completed=progress.fraction,
                    description=progress.stage.label,
                    time=f"{progress.elapsed:.0f} s{left}",
                    refresh=True,
                )
            # How a command ends, its own last words say. The bar says what the lines in between do.
            case Activity(level=Level.ERROR):
                pass
            case Activity(message, level) if level is not Level.INFO or self._bar.disable:
                self._console.print(message, markup=False, highlight=False, soft_wrap=True)
