"""Rich output: tables without control characters, and the bars of loads and downloads."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Table

from kitty_nb.errors import printable
from kitty_nb.hub import Download, find_repository

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from rich.console import ConsoleOptions, RenderableType
    from rich.progress import ProgressColumn

    from kitty_nb.experiments.bench import BenchProgress
    from kitty_nb.hub import HubReference


class PlainConsole(Console):
    """Escapes control characters in its input; only rich itself controls the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """See `rich.console.Console.render`."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)


def load_bar() -> Progress:
    """Start the bar of a load on stderr; its task has the field `time`."""
    elapsed = TextColumn("{task.fields[time]}")
    label = TextColumn("{task.description:<15}")
    bar = _bar(PlainConsole(stderr=True), label, BarColumn(), TaskProgressColumn(), elapsed)
    bar.start()
    bar.add_task("", total=1.0, time="")
    return bar


@contextmanager
def measuring_bar() -> Iterator[Callable[[BenchProgress], None]]:
    """Show a bar of measurements on stderr; the result takes each step."""
    with load_bar() as bar:
        yield lambda progress: bar.update(
            bar.task_ids[0],
            completed=progress.done / progress.total,
            description=progress.test,
            time=f"{progress.done} of {progress.total}",
            refresh=True,
        )


async def show_variants(reference: HubReference, models_dir: Path) -> None:
    """List a repository's models, their sizes, and warnings about them.

    Raises:
        HubError: The repository can't be read, or has no models.
    """
    repository = await find_repository(reference)
    table = Table("Model", "Size", "Files", "To download", box=None)
    for variant in repository.variants:
        plan = Download(repository, variant, models_dir).plan()
        missing = decimal(plan.size - plan.there) if plan.there < plan.size else "complete"
        files = "\n".join(str(file.path) for file in variant.files)
        notes = ", ".join([missing, *plan.warnings])
        table.add_row(variant.label, decimal(variant.size), files, notes)
    console = PlainConsole()
    console.print(table)
    console.print(f"{models_dir} has {decimal(plan.free)} free.", soft_wrap=True)


async def download(reference: HubReference, wanted: str | None, models_dir: Path) -> Path:
    """Download a model, with a bar in a terminal; return the file to give to the engine.

    Args:
        reference: The repository.
        wanted: One of its models; None for the one that the reference names, or the usual one.
        models_dir: The models folder.

    Raises:
        HubError: The download failed. The downloaded part is kept.
    """
    console = PlainConsole(stderr=True)
    repository = await find_repository(reference)
    variant = repository.choose(wanted or reference.wanted)
    task = Download(repository, variant, models_dir)
    plan = task.plan()
    for file in variant.files:
        console.print(f"{file.path}: {decimal(file.size)}", soft_wrap=True)
    there = f", {decimal(plan.there)} of it already downloaded" if plan.there else ""
    console.print(f"{decimal(plan.size)}{there}; {decimal(plan.free)} free.", soft_wrap=True)
    step = TextColumn("{task.description}")
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), step)
    with _bar(console, *columns) as bar:
        line = bar.add_task("", total=plan.size)

        def show(step: str, done: int) -> None:
            bar.update(line, completed=done, description=step, refresh=True)

        return await task.run(show)


def _bar(console: Console, *columns: ProgressColumn) -> Progress:
    """Create a bar that is redrawn only when it is updated, so that it needs no thread."""
    disable = not console.is_interactive
    return Progress(*columns, console=console, auto_refresh=False, transient=True, disable=disable)
