"""The table of the models, and the settings that one was last used with."""

from __future__ import annotations

from contextlib import suppress
from html import escape
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import anyio.to_thread
from ipywidgets import HTML, HBox
from rich.filesize import decimal

from kitty_nb.catalog.catalog import families
from kitty_nb.catalog.memory import Verdict
from kitty_nb.catalog.model import ModelNote
from kitty_nb.catalog.stores import StoreKind
from kitty_nb.errors import KittyError
from kitty_nb.widgets import display

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from kitty_nb.catalog.model import Model
    from kitty_nb.catalog.stores import Store
    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import ModelManager
    from kitty_nb.widgets.model_picker import ModelPicker
    from kitty_nb.widgets.settings_form import SettingsForm


class Row(TypedDict):
    """One model in the table; everything is text for people but `used`."""

    id: int  # the page's name for it
    family: str  # the base model; empty for a model that is alone in its family
    name: str  # the name that people know
    store: str  # the program whose folder it is in; empty in the models folder
    quantization: str  # the way in which its weights are stored
    size: str  # the size of all its files
    context: str  # the tokens that it was trained for
    # When it was last ready, in seconds since the epoch, for the page's own clock.
    used: float | None
    load: str  # the time that this load took
    favourite: bool  # whether it is marked
    state: str  # why it cannot be started, in a word or two
    problem: str  # the same as a sentence
    words: str  # the text that the filter looks through, in small letters


def table_rows(
    models: Sequence[Model],
    stores: Sequence[Store],
    notes: Mapping[Path, ModelNote],
    ids: Mapping[Path, int],
) -> list[Row]:
    """Arrange models by family: first those with a favourite, then those used last."""
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
    """An offer of the settings of last time; hidden without any, and where they are set already."""

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
        """Offer what a model was used with."""
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
        """Take a message of a page."""
        self._receive(message)


class ModelBrowser(display.Fold):
    """A table of the models. The manager's loop sends its contents while it is unfolded.

    A click on a row chooses in the picker; the settings of last time go into the form. `say` is
    called, on the manager's loop, with a sentence about what cannot be remembered.
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
        self._ids: dict[Path, int] = {}  # the page's names for the models; each keeps its number
        self._fits: dict[int, str] = {}
        self._view = display.LiveView(self._look, say, self._next_look, _PAUSE)
        self.look_again, self.stop = self._view.wake, self._view.stop
        self.last_time = LastTime(form)  # the offer of settings
        picker.on_list = self.look_again
        self.observe(lambda _: self.look_again(), names="selected_index")
        self._view.start(manager.run)

    def _receive(self, message: Any) -> None:
        self._told.pop("chosen", None)  # a page shows at once what is chosen there
        by_id = dict(enumerate(self._ids))
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
        """Look which models fit, until something has changed again."""
        waiting = iter(models)
        while (some := [*islice(waiting, _JUDGED_AT_ONCE)]) and not self._view.changed:
            for path, verdict in (await self._manager.stats.fits(some, config)).items():
                self._fits[self._ids[path]] = "" if verdict is Verdict.UNKNOWN else verdict.value
            self._tell("fits", fits={**self._fits})

    def _tell(self, kind: str, **content: object) -> None:
        """Send contents to the page, where they are other than before."""
        if self._told.get(kind) != content:
            self._told[kind] = content
            self.table.send({"kind": kind, **content})
