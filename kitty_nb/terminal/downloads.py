"""Downloads, as a terminal shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from kitty_nb.hub import Download, DownloadProgress, choose, describe, find_repository

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from kitty_nb.hub import HubReference


async def show_offers(reference: HubReference, models_dir: Path, console: Console) -> None:
    """List what a repository has, with sizes, and whether there is room for it.

    Raises:
        HubError: The repository cannot be had, or has no models.
    """
    repository = await find_repository(reference)
    if not repository.offers:
        choose(repository.offers, None, repository.name)
    table = Table("Model", "Size", "Files", "Still to come", box=None)
    for offer in repository.offers:
        plan = Download(repository, offer, models_dir).plan()
        to_come = "complete" if not plan.to_come else decimal(plan.to_come)
        room = "" if plan.to_come <= plan.free else ", more than is free"
        names = "\n".join(file.path for file in offer.files)
        table.add_row(offer.label, decimal(offer.size), names, to_come + room)
    console.print(table)
    console.print(f"{models_dir} has {decimal(plan.free)} free.", soft_wrap=True)


async def download(
    reference: HubReference, wanted: str | None, models_dir: Path, console: Console
) -> Path:
    """Fetch a model and show how far it is: a bar in a terminal, two lines anywhere else.

    Args:
        reference: The repository.
        wanted: Which of its models; None where the reference says it, or there is no choice.
        models_dir: Where to.
        console: Shows the progress.

    Returns:
        The file to give to the engine.

    Raises:
        HubError: It cannot be had. What has come is kept.
    """
    repository = await find_repository(reference)
    offer = choose(repository.offers, wanted or reference.wanted, repository.name)
    task = Download(repository, offer, models_dir)
    plan = task.plan()
    for planned in plan.files:
        console.print(f"{planned.file.path}: {decimal(planned.file.size)}", soft_wrap=True)
    there = f", {decimal(plan.there)} of it there already" if plan.there else ""
    console.print(f"{decimal(plan.size)}{there}; {decimal(plan.free)} free.", soft_wrap=True)
    # Drawn when something has moved, so that no thread is needed.
    bar = Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_interactive,
    )
    line = bar.add_task("", total=1.0)

    def show(progress: DownloadProgress) -> None:
        text = describe(progress)
        bar.update(line, completed=progress.fraction, description=text, refresh=True)

    with bar:
        return await task.run(show)
