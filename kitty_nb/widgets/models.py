"""The models to choose from: the dropdown with the scan that fills it, and the table."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import aclosing, suppress
from html import escape
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypedDict
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
from ipywidgets import HTML, HBox, VBox
from rich.filesize import decimal

from kitty_nb.catalog.catalog import families
from kitty_nb.catalog.memory import Verdict
from kitty_nb.catalog.model import ModelNote
from kitty_nb.catalog.stores import StoreKind
from kitty_nb.errors import KittyError
from kitty_nb.widgets import display

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
    from pathlib import Path

    from kitty_nb.catalog.catalog import ModelCatalog, ScanStep
    from kitty_nb.catalog.model import Model
    from kitty_nb.catalog.stores import Store
    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import ModelManager
    from kitty_nb.operation import Operation
    from kitty_nb.remote.supervisor import RemoteCatalog
    from kitty_nb.widgets.settings_form import SettingsForm

    Catalog: TypeAlias = ModelCatalog | RemoteCatalog


class ModelDropdown(display.Choice):
    """A list of models by their labels; its value is the chosen one's path."""

    def __init__(self, on_choice: Callable[[Path], object]) -> None:
        label = "Model", "Models in the models folder and elsewhere"
        super().__init__("kitty-model", label, on_choice)

    def fill(self, models: Sequence[Model], chosen: Path | None) -> None:
        """List other models."""
        seen = Counter(model.label for model in models)
        options = tuple(
            # Models with one name in two folders are distinguished by their paths.
            (model.label if seen[model.label] == 1 else f"{model.label} · {model.name}", model.path)
            for model in models
        )
        self.refill(options, chosen)


_PATIENCE = 0.3  # seconds that a search may take before it continues in the background
_CHOICE_WITHIN = 60.0  # seconds; a search of a slow disk
_LIST_EVERY = 1.0  # seconds; each longer list is a message, and moves under the mouse


class ModelPicker(VBox):
    """The models in some folders, to choose from; the list stays current by itself.

    The list is written by a worker thread of the manager's loop, one at a time.

    Args:
        manager: Its loop searches and watches the folders.
        on_choice: Called when the user has chosen another model.
        on_change: Called on a worker thread when a change of the list has changed the chosen model,
            or what is known about it.

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
        self._choice: Path | None = None  # the wish, if the user has chosen it
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
        """The folders that contain the models."""
        return self._catalog.stores if self._catalog else ()

    @property
    def model(self) -> Model | None:
        """The chosen model."""
        return self._models.get(self.dropdown.value)

    def scan(self, catalog: Catalog, preferred: Path | None = None) -> None:
        """List the models of some folders, from now on.

        Returns when all are listed, or after a moment, and continues in the background. The user's
        choice is kept while the model exists.

        Args:
            catalog: The folders; those of another machine are listed by that machine.
            preferred: The model to choose unless the user chooses another; it may be elsewhere.
        """
        with suppress(KittyError):  # the manager is closed; the panel says so
            with self.dropdown.turn:
                self.stop()
                self._catalog = catalog
                if self._choice in {None, self._preferred}:
                    self._choice, self._wish = None, preferred or self._wish
                self._preferred, self._list_due = preferred, 0.0
                self._complete.clear()
                self._following = self._manager.run(self._follow, catalog)
            self._complete.wait(_PATIENCE)

    def choose(self, path: Path) -> None:
        """Choose a model, as a user does; do nothing if it no longer exists.

        One that is not listed yet, such as one that has just been downloaded, is listed first.
        """
        with self.dropdown.turn:
            if path not in self._models and self._catalog:
                fresh = self._catalog.describe(path)
                if fresh and path.exists():
                    self._list([*self.models, fresh], finished=False)
            if path in self._models:
                self.dropdown.value = self._choice = path

    def wait_for_choice(self) -> None:
        """Wait until a model is chosen, or none has been found."""
        if self.dropdown.value is None:
            self._complete.wait(_CHOICE_WITHIN)

    def stop(self) -> None:
        """Stop updating the list, and forget its folders."""
        self._catalog = None
        if self._following is not None:
            self._following.cancel()

    async def _follow(self, catalog: Catalog) -> None:
        watch = _Watch(_watches.setdefault(self._manager, []))
        try:
            await watch.run(lambda: catalog.watch(on_step=lambda step: self._take(catalog, step)))
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
        """Return the wanted models that were not found there: elsewhere, or not read yet."""
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
            if not self._complete.is_set():  # later, no model replaces one that has gone
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


class _Watch:
    """A picker's watch of its folders, on its manager's event loop.

    Each watch keeps a thread, so of several on one manager, the latest alone goes on. An earlier
    one rests when it has listed the models, until there is no later one.

    Args:
        watches: All of that manager, the latest last.
    """

    def __init__(self, watches: list[_Watch]) -> None:
        self._watches = watches
        self._listed = False
        self._scope, self._resumed = anyio.CancelScope(), anyio.Event()

    async def run(self, watch: Callable[[], AsyncGenerator[list[Model]]]) -> None:
        """Watch until cancelled."""
        if self._watches and self._watches[-1]._listed:
            self._watches[-1]._scope.cancel()
        self._watches.append(self)
        try:
            while True:
                with anyio.CancelScope() as self._scope:
                    await self._go_on(watch())
                self._resumed = anyio.Event()
                if self._watches[-1] is not self:
                    await self._resumed.wait()
        finally:
            self._watches.remove(self)
            if self._watches:
                self._watches[-1]._resumed.set()

    async def _go_on(self, lists: AsyncGenerator[list[Model]]) -> None:
        async with aclosing(lists):
            async for _ in lists:
                self._listed = True
                if self._watches[-1] is not self:
                    return
                await anyio.sleep(_LIST_EVERY)  # a download changes its folder all the time


_watches: WeakKeyDictionary[ModelManager, list[_Watch]] = WeakKeyDictionary()


def _scanned(step: ScanStep) -> str:
    """Draw a thin bar, and a few words."""
    percent = 100 * step.done / step.total
    bar = f"<div class='kitty-scan-bar'><div style='width:{percent:.1f}%'></div></div>"
    return f"{bar}Reading models: {step.done:,} of {step.total:,}"


class Row(TypedDict):
    """One model in the table, mostly as text for people."""

    id: int  # its identifier on the page
    family: str  # the base model; empty for a model that is alone in its family
    name: str  # the name that people know
    store: str  # the program whose folder it is in; empty in the models folder
    quantization: str  # the way in which its weights are stored
    size: str  # the size of all its files
    context: str  # the context that it was trained for, in tokens
    # When it was last ready, in seconds since the epoch, for the page's own clock.
    used: float | None
    load: str  # the time that this load took
    favourite: bool  # whether it is marked
    state: str  # why it cannot be started, in a word or two
    problem: str  # the same as a sentence
    words: str  # the text that the filter searches, in lower case


def table_rows(
    models: Sequence[Model],
    stores: Sequence[Store],
    notes: Mapping[Path, ModelNote],
    ids: Mapping[Path, int],
) -> list[Row]:
    """Arrange models by family: first those with a favourite, then those used most recently."""
    nothing = ModelNote()

    def rank(model: Model) -> tuple[bool, float]:
        note = notes.get(model.path, nothing)
        return not note.favourite, -(note.last_used or 0.0)

    def row(model: Model, family: str, alone: bool) -> Row:
        note = notes.get(model.path, nothing)
        name, store = model.known_as or model.stem, _store(model, stores)
        said = (name, family, model.title, model.quantization, model.architecture, store)
        return Row(
            id=ids[model.path],
            family="" if alone else family,
            name=name,
            store=store,
            quantization=model.quantization or "",
            size=decimal(model.size),
            context=f"{model.context_length:,}" if model.context_length else "",
            used=note.last_used,
            load="" if note.load_seconds is None else display.duration(note.load_seconds),
            favourite=note.favourite,
            state=model.state,
            problem=model.problem or model.doubt or "",
            words=" ".join(filter(None, (*said, model.repository, model.name))).casefold(),
        )

    ranked = [(name, sorted(members, key=rank)) for name, members in families(models).items()]
    return [
        row(model, family, alone=len(members) == 1)
        for family, members in sorted(ranked, key=lambda item: rank(item[1][0]))
        for model in members
    ]


def _store(model: Model, stores: Sequence[Store]) -> str:
    for store in stores:
        if model.path.is_relative_to(store.path):
            return "" if store.kind is StoreKind.FOLDER else store.kind.value
    return str(model.path.parent)


class LastTime(HBox):
    """An offer of the last used settings; hidden if there are none, or they are set already."""

    def __init__(self, form: SettingsForm) -> None:
        self._form = form
        self._settings: Mapping[str, object] = {}
        self.text = HTML()
        self.use = display.button("Use these", "", "Fill in the fields above")
        self.use.on_click(lambda _: self._form.apply(self._settings))
        super().__init__([self.text, self.use])
        self.add_class("kitty-last-time")
        self.show(None)

    def show(self, note: ModelNote | None) -> None:
        """Offer the settings with which a model was last used."""
        used = note is not None and note.last_used is not None
        self._settings = note.settings if note and used else {}
        others = self._form.differing(self._settings) if used else []
        self.text.value = f"Last time: {escape(' · '.join(others))}" if others else ""
        display.show_if(self, bool(others))


_LOOK_EVERY = 30.0  # seconds; free memory changes, and other programs use the same history
_PAUSE = 0.25  # seconds between two looks
_JUDGED_AT_ONCE = 50  # models; reading so many headers takes a second or two


class ModelTable(display.Page):
    """The page of the table."""

    _esm: ClassVar[str] = display.asset("page.js", "model_table.js")

    def __init__(self, receive: Callable[[Any], None]) -> None:
        super().__init__("kitty-browser")
        self._receive = receive

    def receive(self, message: Any) -> None:
        """Handle a message from a page."""
        self._receive(message)


class ModelBrowser(display.Fold):
    """A table of the models. The manager's loop sends its contents while it is unfolded.

    A click on a row chooses in the picker; the last used settings go into the form. `say` is
    called, on the manager's loop, with a sentence about what can't be stored.
    """

    def __init__(
        self,
        manager: ModelManager,
        picker: ModelPicker,
        form: SettingsForm,
        wanted: Callable[[], ServerConfig],
        say: Callable[[str], None],
    ) -> None:
        self.table = ModelTable(self._receive)
        super().__init__("All models", self.table)
        self._manager, self._picker, self._wanted, self._say = manager, picker, wanted, say
        self._told: dict[str, object] = {}
        self._ids: dict[Path, int] = {}  # identifiers on the page; each model keeps its number
        self._fits: dict[int, str] = {}
        self._view = display.LiveView(self._look, say, self._next_look, _PAUSE)
        self.look_again, self.stop = self._view.wake, self._view.stop
        self.last_time = LastTime(form)  # the offer of settings
        picker.on_list = self.look_again
        self.observe(lambda _: self.look_again(), names="selected_index")
        self._view.start(manager.run)

    def _receive(self, message: Any) -> None:
        self._told.pop("chosen", None)  # a page shows at once what is chosen there
        by_id = dict(enumerate(self._ids.copy()))  # the loop adds to it
        match message:
            case {"kind": "replay"}:
                self._told.clear()
                self.look_again()
            case {"kind": "choose", "id": int(number)} if number in by_id:
                self._picker.choose(by_id[number])
            case {"kind": "mark", "id": int(number), "favourite": bool(favourite)} if (
                number in by_id
            ):
                with suppress(KittyError):  # the manager is closed
                    self._manager.run(self._mark, by_id[number], favourite)

    def _next_look(self) -> float:
        return _LOOK_EVERY if self.unfolded else inf

    async def _mark(self, model: Path, favourite: bool) -> None:
        config = self._manager.state.config
        history = self._manager.stats.history(config, self._say)
        await history.set_favorite(model, favourite)
        self.look_again()

    async def _look(self) -> None:
        model, models = self._picker.model, self._picker.models
        try:
            config, right = self._wanted(), True
        except KittyError:
            config, right = self._manager.state.config, False
        history = self._manager.stats.history(config, self._say)
        notes = await history.notes(one.path for one in models)
        self.last_time.show(notes.get(model.path) if model else None)
        if self.unfolded:
            for one in models:
                self._ids.setdefault(one.path, len(self._ids))
            stores, ids = self._picker.stores, self._ids
            rows = await anyio.to_thread.run_sync(table_rows, models, stores, notes, ids)
            self._tell("rows", rows=rows)
            self._tell("chosen", id=ids[model.path] if model else None)
            if right:
                await self._judge([one.path for one in models if one.startable], config)

    async def _judge(self, models: Sequence[Path], config: ServerConfig) -> None:
        """Find out which models fit, until something has changed again."""
        waiting = iter(models)
        while (some := [*islice(waiting, _JUDGED_AT_ONCE)]) and not self._view.changed:
            for path, verdict in (await self._manager.stats.fits(some, config)).items():
                self._fits[self._ids[path]] = "" if verdict is Verdict.UNKNOWN else verdict.value
            self._tell("fits", fits={**self._fits})

    def _tell(self, kind: str, **content: object) -> None:
        """Send contents to the page if they have changed."""
        if self._told.get(kind) != content:
            self._told[kind] = content
            self.table.send({"kind": kind, **content})
