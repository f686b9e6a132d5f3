"""Fetching another model from the Hugging Face Hub."""

from __future__ import annotations

from contextlib import suppress
from html import escape
from typing import TYPE_CHECKING

from anyio import CancelScope
from anyio.to_thread import run_sync
from ipywidgets import HTML, Accordion, Button, Dropdown, HBox, IntProgress, Text, VBox
from rich.filesize import decimal

from kitty_nb.errors import KittyError
from kitty_nb.hub import (
    Download,
    DownloadStep,
    HubReference,
    choose,
    describe,
    find_repository,
    hub_is_installed,
    usual,
)
from kitty_nb.widgets.accessible import labelled
from kitty_nb.widgets.notice import Notice, explain

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path
    from typing import Any

    from kitty_nb.hub import DownloadProgress, Offer, Plan, Repository
    from kitty_nb.manager import ModelManager, Operation

_STEPS = 1000
_MISSING = "Downloads need the package huggingface_hub: pip install 'kitty_nb[hub]'"


class DownloadForm(Accordion):
    """A folded section: name a repository, see what it has, fetch one of its models.

    The manager's thread writes all but the two fields' values, which are the user's; it sets the
    choice only while it lists what can be chosen. A download goes on while other cells run, and
    ends with the manager.

    Args:
        manager: Its thread does the work.
        models_dir: Returns the models folder.
        on_done: Called with the file of a model that has come, on a worker thread.
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
            description="Show files", icon="search", tooltip="What there is, and how large"
        )
        self.choice = Dropdown(
            disabled=True, **labelled("Model", "Quantizations, the smallest first")
        )
        self.download = Button(
            description="Download", icon="download", button_style="primary", disabled=True
        )
        self.cancel = Button(
            description="Cancel", icon="stop", tooltip="What has come is kept", disabled=True
        )
        self.files = HTML()
        self.bar = IntProgress(min=0, max=_STEPS)
        self.text = HTML()
        self.progress = HBox([self.bar, self.text])
        self.notice = Notice()
        rows = [HBox([self.repository, self.show_files])]
        rows.append(HBox([self.choice, self.download, self.cancel]))
        form = VBox([*rows, self.files, self.progress, self.notice])
        super().__init__(
            [form],
            titles=("Download a model",),
            selected_index=None,
        )
        self.add_class("kitty-download")
        form.add_class("kitty-form")
        self.files.add_class("kitty-files")
        self.progress.add_class("kitty-fetch")
        self.bar.add_class("kitty-bar")
        self.text.add_class("kitty-bar-text")
        self.progress.layout.display = "none"
        for row in rows:
            row.add_class("kitty-form-row")
        self.show_files.on_click(lambda _: self._show_files())
        self.choice.observe(lambda _: self._describe_choice(), names="value")
        self.download.on_click(lambda _: self._download())
        self.cancel.on_click(lambda _: self.stop())
        if not hub_is_installed():
            self.show_files.disabled = True
            self.notice.show(_MISSING)

    def attach(self, models_dir: Callable[[], Path], on_done: Callable[[Path], object]) -> None:
        """Belong to another panel from now on; a download under way goes on."""
        self._models_dir, self._on_done = models_dir, on_done

    def stop(self) -> None:
        """Call off what is under way; what has come is kept."""
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
        """Have the manager's thread do something; what goes wrong is shown."""

        async def guarded() -> None:
            self.notice.show(None)
            try:
                await work(*args)
            except Exception as error:  # noqa: BLE001 (raised here, nobody would see it)
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
            listed = repository.offers
            wanted = usual(listed) or (listed[0] if listed else None)
            if reference.wanted or not wanted:
                wanted = choose(listed, reference.wanted, repository.name)
        except KittyError:
            self.files.value = ""
            raise
        offers = [(f"{offer.label} · {decimal(offer.size)}", offer) for offer in repository.offers]
        self.choice.options = offers
        self.choice.value = wanted
        self._repository = repository
        self.choice.disabled = self._is_fetching
        await self._describe(repository, wanted)

    async def _describe(self, repository: Repository, offer: Offer) -> None:
        task = Download(repository, offer, self._models_dir())
        plan = await run_sync(task.plan)
        fits = plan.to_come <= plan.free
        self.files.value = describe_plan(plan)
        self.download.description = "Resume" if 0 < plan.there < plan.size else "Download"
        self.download.disabled = self._is_fetching or not fits

    async def _fetch(self, repository: Repository, offer: Offer) -> None:
        task = Download(repository, offer, self._models_dir())
        self._busy(True)
        try:
            model = await task.run(self._show)
        except BaseException:
            self.bar.bar_style = "danger"
            self.text.value = "not complete; what has come is kept"
            raise
        finally:
            self._busy(False)
            with CancelScope(shield=True):
                await self._describe(repository, offer)
        await run_sync(self._on_done, model)

    @property
    def _is_fetching(self) -> bool:
        return not self.cancel.disabled

    def _busy(self, busy: bool) -> None:
        self.cancel.disabled = not busy
        self.choice.disabled = self.download.disabled = self.show_files.disabled = busy
        if busy:
            self.progress.layout.display = None

    def _show(self, progress: DownloadProgress) -> None:
        self.bar.value = int(progress.fraction * _STEPS)
        done = progress.step is DownloadStep.DONE
        self.bar.bar_style = "success" if done else ""
        self.text.value = escape(describe(progress))


def describe_plan(plan: Plan) -> str:
    """What would come and whether there is room for it, as HTML."""
    rows = [f"{escape(f.file.path)} · {decimal(f.file.size)}" for f in plan.files]
    total = f"<b>{decimal(plan.size)}</b> into {escape(str(plan.folder))}"
    if plan.there:
        total += f" · {decimal(plan.there)} of it there already"
    with suppress(KittyError):
        plan.check()
        return "<br>".join([*rows, f"{total} · {decimal(plan.free)} free"])
    short = decimal(plan.to_come - plan.free)
    bad = f"<span class='kitty-bad'>{short} more than the {decimal(plan.free)} free there</span>"
    return "<br>".join([*rows, f"{total} · {bad}"])
