"""The panel's section that fetches a model from the Hugging Face Hub."""

from __future__ import annotations

from datetime import timedelta
from html import escape
from typing import TYPE_CHECKING

from anyio import CancelScope
from anyio.to_thread import run_sync
from ipywidgets import HTML, Accordion, Button, Dropdown, HBox, IntProgress, Text, VBox
from rich.filesize import decimal

from kitty_nb.errors import KittyError
from kitty_nb.hub.download import Download, DownloadStep
from kitty_nb.hub.repository import (
    MISSING_EXTRA,
    HubReference,
    find_repository,
    hub_is_installed,
)
from kitty_nb.widgets.accessible import labelled
from kitty_nb.widgets.notice import Notice, explain

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path
    from typing import Any

    from rich.progress import Task

    from kitty_nb.hub.download import DownloadProgress, Plan
    from kitty_nb.hub.repository import Repository, Variant
    from kitty_nb.manager import ModelManager, Operation

_STEPS = 1000


class DownloadForm(Accordion):
    """A folded section: name a repository, see its models, fetch one of them.

    The manager's thread writes everything but the values of the two fields, which are the user's;
    it sets the choice only while it lists the models. A download goes on while other cells run, and
    ends with the manager.

    Args:
        manager: Its thread does the work.
        models_dir: Returns the models folder.
        on_done: Called with the file of a downloaded model, on a worker thread.
        endpoint: The Hub's address; None for the usual one.
    """

    def __init__(
        self,
        manager: ModelManager,
        models_dir: Callable[[], Path],
        on_done: Callable[[Path], object],
        endpoint: str | None = None,
    ) -> None:
        self._manager, self.endpoint = manager, endpoint
        self.attach(models_dir, on_done)
        self._repository: Repository | None = None
        self._looking: Operation[None] | None = None
        self._fetching: Operation[None] | None = None
        self.repository = Text(
            placeholder="owner/name, owner/name:Q4_K_M, or the address of its page",
            **labelled("Repository", "A repository with GGUF files on huggingface.co"),
        )
        self.show_files = Button(
            description="Show files", icon="search", tooltip="List its models and their sizes"
        )
        self.choice = Dropdown(disabled=True, **labelled("Model", "Smallest first"))
        self.download = Button(
            description="Download", icon="download", button_style="primary", disabled=True
        )
        self.cancel = Button(
            description="Cancel",
            icon="stop",
            tooltip="Stop, and keep the downloaded part",
            disabled=True,
        )
        self.files, self.text, self.notice = HTML(), HTML(), Notice()
        self.bar = IntProgress(min=0, max=_STEPS)
        self.progress = HBox([self.bar, self.text])
        self.progress.layout.display = "none"
        rows = [
            HBox([self.repository, self.show_files]),
            HBox([self.choice, self.download, self.cancel]),
        ]
        form = VBox([*rows, self.files, self.progress, self.notice])
        super().__init__([form], titles=("Download a model",), selected_index=None)
        styled = [
            (self, "kitty-download"),
            (form, "kitty-form"),
            *((row, "kitty-form-row") for row in rows),
            (self.files, "kitty-files"),
            (self.progress, "kitty-fetch"),
            (self.bar, "kitty-bar"),
            (self.text, "kitty-bar-text"),
        ]
        for widget, name in styled:
            widget.add_class(name)
        self.show_files.on_click(lambda _: self._show_files())
        self.choice.observe(lambda _: self._describe_choice(), names="value")
        self.download.on_click(lambda _: self._download())
        self.cancel.on_click(lambda _: self.stop())
        if not hub_is_installed():
            self.show_files.disabled = True
            self.notice.show(MISSING_EXTRA)

    def attach(self, models_dir: Callable[[], Path], on_done: Callable[[Path], object]) -> None:
        """Serve another panel from now on; a running download goes on."""
        self._models_dir, self._on_done = models_dir, on_done

    def stop(self) -> None:
        """Cancel a listing or a download; the downloaded part is kept."""
        for operation in (self._looking, self._fetching):
            if operation is not None:
                operation.cancel()

    def _show_files(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        self._looking = self._do(self._look, self.repository.value)

    def _describe_choice(self) -> None:
        if self._repository and self.choice.value:
            self._do(self._describe, self._repository, self.choice.value)

    def _download(self) -> None:
        busy = self._fetching is not None and not self._fetching.done
        if self._repository and self.choice.value and not busy:
            self._fetching = self._do(self._fetch, self._repository, self.choice.value)

    def _do(
        self, work: Callable[..., Coroutine[Any, Any, None]], *args: object
    ) -> Operation[None] | None:
        """Run on the manager's thread, and show what goes wrong."""

        async def guarded() -> None:
            self.notice.show(None)
            try:
                await work(*args)
            except Exception as error:  # noqa: BLE001 - nobody would see it raised
                self.notice.show(explain(error))

        try:
            return self._manager.run(guarded)
        except KittyError as error:
            self.notice.show(str(error))
            return None

    async def _look(self, text: str) -> None:
        self._repository = None
        self.choice.disabled = self.download.disabled = True
        self.choice.options = ()
        self.files.value = "Asking the Hub…"
        try:
            reference = HubReference.parse(text)
            repository = await find_repository(reference, self.endpoint)
            if reference.wanted or not repository.variants:
                variant = repository.choose(reference.wanted)
            else:
                variant = repository.usual or repository.variants[0]
        except KittyError:
            self.files.value = ""
            raise
        self.choice.options = [(f"{v.label} · {decimal(v.size)}", v) for v in repository.variants]
        self.choice.value = variant
        self._repository = repository
        self.choice.disabled = self._is_fetching
        await self._describe(repository, variant)

    async def _describe(self, repository: Repository, variant: Variant) -> None:
        plan = await run_sync(Download(repository, variant, self._models_dir()).plan)
        self.files.value = _describe_plan(variant, plan)
        self.download.description = "Resume" if 0 < plan.there < plan.size else "Download"
        self.download.disabled = self._is_fetching or plan.shortage > 0

    async def _fetch(self, repository: Repository, variant: Variant) -> None:
        from rich.progress import Progress  # noqa: PLC0415 - slow to import

        # It works out rate and time left, and draws nothing.
        meter = Progress(disable=True)
        line = meter.add_task("")

        def show(progress: DownloadProgress) -> None:
            meter.update(line, completed=progress.done, total=progress.total)
            self._show(progress, meter.tasks[0])

        self._set_busy(True)
        try:
            model = await Download(repository, variant, self._models_dir()).run(show)
        except BaseException:
            self.bar.bar_style = "danger"
            self.text.value = "incomplete; the downloaded part is kept"
            raise
        finally:
            self._set_busy(False)
            with CancelScope(shield=True):
                await self._describe(repository, variant)
        await run_sync(self._on_done, model)

    @property
    def _is_fetching(self) -> bool:
        return not self.cancel.disabled

    def _set_busy(self, busy: bool) -> None:
        self.cancel.disabled = not busy
        self.choice.disabled = self.download.disabled = self.show_files.disabled = busy
        if busy:
            self.progress.layout.display = None

    def _show(self, progress: DownloadProgress, task: Task) -> None:
        done = progress.step is DownloadStep.DONE
        self.bar.value = int(_STEPS * progress.done / max(progress.total, 1))
        self.bar.bar_style = "success" if done else ""
        parts = [progress.step, f"{decimal(progress.done)} of {decimal(progress.total)}"]
        if task.speed and not done:
            parts.append(f"{decimal(int(task.speed))}/s")
        if task.time_remaining and not done:
            parts.append(f"{timedelta(seconds=round(task.time_remaining))} left")
        self.text.value = " · ".join(parts)


def _describe_plan(variant: Variant, plan: Plan) -> str:
    """The files, and whether the disk has room for them, as HTML."""
    rows = [f"{escape(file.path)} · {decimal(file.size)}" for file in variant.files]
    total = f"<b>{decimal(plan.size)}</b> into {escape(str(plan.folder))}"
    if plan.there:
        total += f" · {decimal(plan.there)} of it downloaded already"
    room = f"{decimal(plan.free)} free"
    if plan.shortage:
        room = f"<span class='kitty-bad'>{room}: {decimal(plan.shortage)} too little</span>"
    return "<br>".join([*rows, f"{total} · {room}"])
