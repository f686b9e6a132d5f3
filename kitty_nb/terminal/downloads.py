"""Downloads from the Hub in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import progress
from rich.filesize import decimal
from rich.table import Table

from kitty_nb.hub.download import Download
from kitty_nb.hub.repository import find_repository

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from kitty_nb.hub.repository import HubReference


async def show_variants(reference: HubReference, models_dir: Path, console: Console) -> None:
    """List a repository's models, their sizes, and what speaks against them.

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
    console.print(table)
    console.print(f"{models_dir} has {decimal(plan.free)} free.", soft_wrap=True)


async def download(
    reference: HubReference, wanted: str | None, models_dir: Path, console: Console
) -> Path:
    """Fetch a model, with a progress bar in a terminal; return the file to give to the engine.

    Args:
        reference: The repository.
        wanted: One of its models; None for the one that the reference names, or the usual one.
        models_dir: The models folder.
        console: Shows the progress.

    Raises:
        HubError: The download failed. The downloaded part is kept.
    """
    repository = await find_repository(reference)
    variant = repository.choose(wanted or reference.wanted)
    task = Download(repository, variant, models_dir)
    plan = task.plan()
    for file in variant.files:
        console.print(f"{file.path}: {decimal(file.size)}", soft_wrap=True)
    there = f", {decimal(plan.there)} of it downloaded already" if plan.there else ""
    console.print(f"{decimal(plan.size)}{there}; {decimal(plan.free)} free.", soft_wrap=True)
    # Drawn when something has moved, so that no thread is needed.
    meter = progress.Progress(
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}"),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_interactive,
    )
    with meter:
        line = meter.add_task("", total=plan.size)

        def show(step: str, done: int) -> None:
            meter.update(line, completed=done, description=step, refresh=True)

        return await task.run(show)
