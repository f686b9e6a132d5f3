"""A load, as a terminal shows it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self

from kitty_nb.errors import printable
from kitty_nb.supervisor.events import Activity, Event, Level, ProgressMade

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress, TaskID

    from kitty_nb.supervisor.events import LoadProgress

_DRAWN_AFTER = 0.2  # seconds; until then there is nothing to see, and the server is to be started


class LoadDisplay:
    """Shows a load on the error stream: a bar in a terminal, lines anywhere else."""

    def __init__(self) -> None:
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar[0].stop()

    def show(self, event: Event) -> None:
        """Show what an event says of the load."""
        match event:
            case ProgressMade(progress):
                self._draw(progress)
            # How a command ends, its own last words say. The bar says what the lines in between do.
            case Activity(level=Level.ERROR):
                pass
            case Activity(message, level) if level is not Level.INFO or not sys.stderr.isatty():
                if self._bar:
                    self._bar[0].console.print(
                        message, markup=False, highlight=False, soft_wrap=True
                    )
                else:
                    print(printable(message), file=sys.stderr, flush=True)

    def _draw(self, progress: LoadProgress) -> None:
        if not sys.stderr.isatty() or (not self._bar and progress.elapsed < _DRAWN_AFTER):
            return
        self._bar = self._bar or _new_bar()
        bar, task = self._bar
        left = "" if progress.eta is None else f", about {progress.eta:.0f} s left"
        bar.update(
            task,
            completed=progress.fraction,
            description=progress.stage.label,
            time=f"{progress.elapsed:.0f} s{left}",
            refresh=True,
        )


def _new_bar() -> tuple[Progress, TaskID]:
    # Imported once the server loads: that takes longer than a small model does.
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn  # noqa: PLC0415

    from kitty_nb.terminal.console import PlainConsole  # noqa: PLC0415

    console = PlainConsole(stderr=True)
    # Drawn when something has moved, so that no thread is needed.
    bar = Progress(
        TextColumn("{task.description:<15}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[time]}"),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_interactive,
    )
    bar.start()
    return bar, bar.add_task("", total=1.0, time="")
