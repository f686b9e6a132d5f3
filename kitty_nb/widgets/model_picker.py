"""The models to choose from: the dropdown, and the scan that fills it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import aclosing, suppress
from html import escape
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import anyio
from ipywidgets import HBox, VBox

from kitty_nb.errors import KittyError
from kitty_nb.widgets import display

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kitty_nb.catalog.catalog import ModelCatalog, ScanStep
    from kitty_nb.catalog.model import Model
    from kitty_nb.catalog.stores import Store
    from kitty_nb.manager import ModelManager
    from kitty_nb.operation import Operation
    from kitty_nb.remote.models import RemoteCatalog

    Catalog: TypeAlias = ModelCatalog | RemoteCatalog


class ModelDropdown(display.Choice):
    """A list of models by their labels; its value is the chosen one's path.

    Two threads write it: people choose, and the list changes. They take turns.
    """

    def __init__(self, on_choice: Callable[[Path], object]) -> None:
        self.turn = threading.RLock()  # held while one of them writes
        label = "Model", "Models in the models folder and elsewhere"
        super().__init__("kitty-model", label, on_choice)

    def fill(self, models: Sequence[Model], chosen: Path | None) -> None:
        """List other models."""
        seen = Counter(model.label for model in models)
        options = tuple(
            # Models of one name in two folders are told apart by their paths.
            (model.label if seen[model.label] == 1 else f"{model.label} · {model.name}", model.path)
            for model in models
        )
        with self.turn:
            self.refill(options, chosen)

    def set_state(self, sync_data: Any) -> None:
        """Take what a page has chosen."""
        with self.turn:
            super().set_state(sync_data)


_PATIENCE = 0.3  # seconds that a search may take before it goes on in the background
_CHOICE_WITHIN = 60.0  # seconds; a search of a slow disk
_LIST_EVERY = 1.0  # seconds; a longer list each time is a message, and moves under the mouse


class ModelPicker(VBox):
    """The models in some folders, to choose from; the list stays current by itself.

    The list is written by a worker thread of the manager's loop, one at a time.

    Args:
        manager: Its loop searches and watches the folders.
        on_choice: Called when somebody has chosen another model.
        on_change: Called on a worker thread when there is another one, or what is known of it has
            changed, because the list has.

    Attributes:
        on_list: Called on a worker thread when there are other models, or they have changed.
    """

    def __init__(
        self,
        manager: ModelManager,
        on_choice: Callable[[], object],
        on_change: Callable[[], object],
    ) -> None:
        self._manager, self._on_choice, self._on_change = manager, on_choice, on_change
        self.on_list: Callable[[], object] = lambda: None
        self._models: dict[Path | None, Model] = {}
        self._catalog: Catalog | None = None
        self._preferred: Path | None = None
        self._wish: Path | None = None
        self._choice: Path | None = None  # the wish, where somebody has chosen it
        self._complete = threading.Event()
        self._list_due = 0.0
        self._following: Operation[None] | None = None
        self.dropdown = ModelDropdown(self._note_choice)
        self.rescan = display.button("", "refresh", "Rescan: reload .env and look for models")
        self.scan_line = display.Line("kitty-scan")
        row = HBox([self.dropdown, self.rescan]).add_class("kitty-picker")
        super().__init__([row, self.scan_line])
        self.add_class("kitty-models")

    @property
    def models(self) -> tuple[Model, ...]:
        """The models in the dropdown, incomplete ones too."""
        return tuple(self._models.values())

    @property
    def stores(self) -> tuple[Store, ...]:
        """The folders that the models are from."""
        return self._catalog.stores if self._catalog else ()

    @property
    def model(self) -> Model | None:
        """The chosen model."""
        return self._models.get(self.dropdown.value)

    def scan(self, catalog: Catalog, preferred: Path | None = None) -> None:
        """List the models of some folders, from now on.

        Returns when all are listed, or after a moment, while it goes on in the background. What
        somebody has chosen stays so as long as it is there.

        Args:
            catalog: The folders; those of another machine are listed by that machine.
            preferred: Choose this one, where nobody has chosen another; it may be elsewhere.
        """
        self.stop()
        if earlier := _watching.get(self._manager):
            earlier.stop()  # another panel on this manager; each watch keeps a thread
        _watching[self._manager] = self
        with self.dropdown.turn:
            self._catalog = catalog
            if self._choice in {None, self._preferred}:
                self._choice, self._wish = None, preferred or self._wish
            self._preferred, self._list_due = preferred, 0.0
            self._complete.clear()
        with suppress(KittyError):  # the manager is closed; the panel says so
            self._following = self._manager.run(self._follow, catalog)
            self._complete.wait(_PATIENCE)

    def choose(self, path: Path) -> None:
        """Choose a model, as a user does; nothing happens where it is not there any more.

        One that is not listed yet is listed first, as is one that has just been downloaded.
        """
        with self.dropdown.turn:
            if path not in self._models and self._catalog:
                fresh = self._catalog.describe(path)
                if fresh and path.exists():
                    self._list([*self.models, fresh], finished=False)
            if path in self._models:
                self.dropdown.value = self._choice = path

    def wait_for_choice(self) -> None:
        """Wait until there is a model, or none was found."""
        if self.dropdown.value is None:
            self._complete.wait(_CHOICE_WITHIN)

    def stop(self) -> None:
        """Keep the list as it is."""
        self._catalog = None
        if self._following is not None:
            self._following.cancel()
        if _watching.get(self._manager) is self:  # it would keep itself and its manager for ever
            del _watching[self._manager]

    async def _follow(self, catalog: Catalog) -> None:
        try:
            lists = catalog.watch(on_step=lambda step: self._take(catalog, step))
            async with aclosing(lists):
                async for _ in lists:
                    await anyio.sleep(_LIST_EVERY)  # a download changes its folder all the time
        except OSError as error:
            problem = f"The list does not update by itself: {error}. Press Rescan to update it."
            self.scan_line.write(escape(problem))
        except Exception as error:  # noqa: BLE001 (raised here, nobody would see it)
            self.scan_line.write(escape(display.explain(error)))
            self._complete.set()

    def _take(self, catalog: Catalog, step: ScanStep) -> None:
        """Show one step of a search, in a worker thread."""
        if catalog is not self._catalog:
            return
        finished = step.done == step.total
        self.scan_line.write("" if finished else _scanned(step))
        if finished or time.monotonic() >= self._list_due:
            with self.dropdown.turn:
                if catalog is not self._catalog:  # another search has begun meanwhile
                    return
                self._list([*self._beside(catalog, step, finished), *step.models], finished)
            self._list_due = time.monotonic() + _LIST_EVERY
        if finished:
            self._complete.set()

    def _beside(self, catalog: Catalog, step: ScanStep, finished: bool) -> list[Model]:
        """The models that are wanted and not found there: elsewhere, or not read yet."""
        found = {model.path for model in step.models}
        beside = []
        for path in dict.fromkeys((self._preferred, self._wish)):
            if path is None or path in found:
                continue
            if finished and any(path.is_relative_to(store.path) for store in catalog.stores):
                continue
            known = self._models.get(path)
            beside.append(known or (catalog.describe(path) if path == self._preferred else None))
        return [model for model in beside if model]

    def _list(self, models: list[Model], finished: bool) -> None:
        with self.dropdown.turn:
            before, all_before = self.model, self._models
            self._models = {model.path: model for model in models}
            wishes = [self._wish]
            if not self._complete.is_set():  # later, what is chosen may go, but not to another
                wishes.append(self._preferred)
            if self._wish is None or (finished and not self._complete.is_set()):
                wishes.extend(model.path for model in models if model.startable)
            chosen = next((path for path in wishes if path in self._models), None)
            self._wish = chosen or self._wish
            self.dropdown.fill(models, chosen)
        if self.model != before:
            self._on_change()
        if self._models != all_before:
            self.on_list()

    def _note_choice(self, chosen: Path) -> None:
        self._wish = self._choice = chosen
        self._on_choice()


_watching: WeakKeyDictionary[ModelManager, ModelPicker] = WeakKeyDictionary()


def _scanned(step: ScanStep) -> str:
    """Draw a thin bar, and a few words."""
    percent = 100 * step.done / step.total
    bar = f"<div class='kitty-scan-bar'><div style='width:{percent:.1f}%'></div></div>"
    return f"{bar}Reading models: {step.done:,} of {step.total:,}"
