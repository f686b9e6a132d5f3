"""The panel's section that downloads a model from the Hugging Face Hub."""

from __future__ import annotations

from functools import partial
from html import escape
from typing import TYPE_CHECKING

from anyio import CancelScope, Lock
from anyio.to_thread import run_sync
from ipywidgets import HTML, Dropdown, HBox, Text
from rich.filesize import decimal
from rich.progress import Progress

from kitty_nb.errors import ChecksumError, KittyError
from kitty_nb.hub import Download, HubReference, find_repository
from kitty_nb.widgets.display import Fold, Meter, Notice, button, duration, labelled, show_if
from kitty_nb.widgets.session import ActionRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path
    from typing import Any

    from kitty_nb.manager import ModelManager
    from kitty_nb.operation import Operation


class DownloadForm(Fold):
    """A folded section: name a repository, see its models, download one of them.

    The manager's thread writes everything but the values of the two fields, which are the user's;
    it sets the choice only while it lists the models. A download continues while other cells run,
    and ends with the manager.

    Args:
        manager: Its thread does the work.
        models_dir: Returns the models folder.
        on_done: Called with the file of a downloaded model, on a worker thread.
    """

    def __init__(
        self,
        manager: ModelManager,
        models_dir: Callable[[], Path],
        on_done: Callable[[Path], object],
    ) -> None:
        self._manager = manager
        self.attach(models_dir, on_done)
        self._running: Operation[None] | None = None
        self._turn = Lock()  # the manager's thread does one thing at a time, in the order of clicks
        self.repository = Text(
            placeholder="owner/name, owner/name:Q4_K_M, or the page's URL",
            **labelled("Repository", "A repository of GGUF files on huggingface.co"),
        )
        models = "List the repository's models and their sizes"
        self.show_files = button("Show files", "search", models)
        self.choice = Dropdown(disabled=True, **labelled("Model", "Smallest first"))
        self.download = button("Download", "download", style="primary")
        self.cancel = button("Cancel", "stop", "Stop the download and keep the downloaded part")
        self.download.disabled = self.cancel.disabled = True
        self.files = HTML().add_class("kitty-files")
        self.progress = Meter("kitty-fetch")
        self.bar, self.text = self.progress.bar, self.progress.text
        show_if(self.progress, False)
        self.notice = Notice()
        self._actions = ActionRunner(manager.run, self.notice.show)
        where = HBox([self.repository, self.show_files]).add_class("kitty-form-row")
        what = HBox([self.choice, self.download, self.cancel]).add_class("kitty-form-row")
        super().__init__("Get a model", where, what, self.files, self.progress, self.notice)
        self.add_class("kitty-download")
        self.show_files.on_click(lambda _: self._list())
        self.choice.observe(lambda _: self._choose(), names="value")
        self.download.on_click(lambda _: self._download())
        self.cancel.on_click(lambda _: self.stop())

    def attach(self, models_dir: Callable[[], Path], on_done: Callable[[Path], object]) -> None:
        """Serve another panel from now on; a running download continues."""
        self._models_dir, self._on_done = models_dir, on_done

    def stop(self) -> None:
        """Cancel a listing or a download; the downloaded part is kept."""
        if self._running:
            self._running.cancel()

    def _list(self) -> None:
        self.stop()
        self._begin(self._look, self.repository.value)

    def _choose(self) -> None:
        if not self.choice.disabled:  # else the listing sets it
            self._actions.run(partial(self._manager.run, self._in_turn, self._describe))

    def _download(self) -> None:
        if not (self._running and not self._running.done):
            self._begin(self._fetch, self.choice.value)

    def _begin(self, work: Callable[..., Coroutine[Any, Any, None]], wanted: object) -> None:
        def begin() -> Operation[None]:
            self._running = self._manager.run(self._in_turn, work, wanted)
            return self._running

        self._actions.run(begin)

    async def _in_turn(self, work: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
        async with self._turn:
            await work(*args)

    async def _look(self, text: str) -> None:
        self.choice.disabled = self.download.disabled = True
        show_if(self.progress, False)
        self.choice.options = ()
        self.files.value = "Asking the Hub…"
        try:
            reference = HubReference.parse(text)
            repository = await find_repository(reference)
            wanted = repository.choose(reference.wanted, or_smallest=True)
        except KittyError:
            self.files.value = ""
            raise
        folder = self._models_dir()
        downloads = [Download(repository, variant, folder) for variant in repository.variants]
        self.choice.options = [
            (f"{download.variant.label} · {decimal(download.variant.size)}", download)
            for download in downloads
        ]
        self.choice.value = downloads[repository.variants.index(wanted)]
        self.choice.disabled = False
        await self._describe()

    async def _describe(self) -> None:
        if download := self.choice.value:
            show_if(self.progress, False)  # it was another download's
            await self._show_plan(download)

    async def _show_plan(self, download: Download) -> None:
        plan = await run_sync(download.plan)
        files = [f"{escape(str(f.path))} · {decimal(f.size)}" for f in download.variant.files]
        parts = [f"<b>{decimal(plan.size)}</b> into {escape(str(download.models_dir))}"]
        if plan.there:
            parts.append(f"{decimal(plan.there)} already downloaded")
        parts.append(f"{decimal(plan.free)} free")
        parts += [f"<span class='kitty-bad'>{warning}</span>" for warning in plan.warnings]
        self.files.value = "<br>".join([*files, " · ".join(parts)])
        self.download.description = "Resume" if 0 < plan.there < plan.size else "Download"
        self.download.disabled = plan.shortage > 0

    async def _fetch(self, download: Download) -> None:
        size = download.variant.size
        meter = Progress(disable=True)  # only to compute the rate
        line = meter.add_task("", total=size)

        def show(step: str, done: int) -> None:
            meter.update(line, completed=done)
            parts = [step, f"{decimal(done)} of {decimal(size)}"]
            if rate := meter.tasks[0].speed:
                left = duration((size - done) / rate)
                parts += [f"{decimal(int(rate))}/s", f"about {left} left"]
            self.bar.value = Meter.STEPS * done // max(size, 1)
            self.text.value = " · ".join(parts)

        self._set_busy(True)
        try:
            model = await download.run(show)
        except BaseException as error:
            self.bar.bar_style = "danger"
            kept = "" if isinstance(error, ChecksumError) else "; the downloaded part is kept"
            self.text.value = f"incomplete{kept}"
            raise
        finally:
            self._set_busy(False)
            with CancelScope(shield=True):
                await self._show_plan(download)
        self.bar.value, self.bar.bar_style = Meter.STEPS, "success"
        self.text.value = f"complete · {decimal(size)}"
        await run_sync(self._on_done, model)

    def _set_busy(self, busy: bool) -> None:
        self.choice.disabled = self.download.disabled = self.show_files.disabled = busy
        self.cancel.disabled = not busy
        if busy:
            self.bar.bar_style = ""
            show_if(self.progress, True)
