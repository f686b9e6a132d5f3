"""The table of models, and the details of one."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from html import escape
from itertools import islice
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar

import anyio
import anyio.to_thread
from anywidget import AnyWidget
from ipywidgets import HTML, Button, HBox, VBox
from rich.filesize import decimal

from kitty_nb.catalog.catalog import families
from kitty_nb.catalog.memory import Verdict
from kitty_nb.catalog.model import ModelNote, shard_paths
from kitty_nb.catalog.stores import StoreKind, model_stores
from kitty_nb.errors import KittyError
from kitty_nb.widgets.display import asset
from kitty_nb.widgets.load_bar import duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from kitty_nb.catalog.model import Model
    from kitty_nb.catalog.stores import Store
    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import ModelManager
    from kitty_nb.widgets.model_picker import ModelPicker
    from kitty_nb.widgets.settings_form import SettingsForm


_NOTHING = ModelNote()


@dataclass(frozen=True, slots=True)
class Row:
    """One model as it is shown; everything is text for people but `used`.

    Attributes:
        id: What the page calls it.
        name: What it is called.
        store: Whose folder it is in; empty in the models folder.
        architecture: The family of network.
        quantization: How its weights are stored.
        size: Of all its files.
        context: Tokens that it was trained for.
        used: When it was last ready, in seconds since the epoch, for the page's own clock.
        load: How long that load took.
        favourite: Whether it is marked.
        state: Why it cannot be started, in a word or two.
        problem: The same as a sentence.
        words: What the filter looks through, in small letters.
    """

    id: int
    name: str
    store: str
    architecture: str
    quantization: str
    size: str
    context: str
    used: float | None
    load: str
    favourite: bool
    state: str
    problem: str
    words: str


@dataclass(frozen=True, slots=True)
class Group:
    """Models of one family.

    Attributes:
        name: The base model; empty for a model that is alone in its family.
        rows: The models.
    """

    name: str
    rows: tuple[Row, ...]


def group_rows(
    models: Sequence[Model],
    stores: Sequence[Store],
    notes: Mapping[Path, ModelNote],
    ids: Mapping[Path, int],
) -> list[Group]:
    """Arrange models by family: first those with a favourite, then those used last.

    Args:
        models: In the order that holds where nothing is remembered.
        stores: The folders that they may be in.
        notes: What is remembered of them.
        ids: What the page calls them.
    """

    def rank(model: Model) -> tuple[bool, float]:
        note = notes.get(model.path, _NOTHING)
        return not note.favourite, -(note.last_used or 0.0)

    def row(model: Model, family: str) -> Row:
        note = notes.get(model.path, _NOTHING)
        name, store = model.known_as or model.stem, _store(model, stores)
        said = (name, family, model.title, model.quantization, model.architecture, store)
        return Row(
            id=ids[model.path],
            name=name,
            store=store,
            architecture=model.architecture or "",
            quantization=model.quantization or "",
            size=decimal(model.size),
            context=f"{model.context_length:,}" if model.context_length else "",
            used=note.last_used,
            load="" if note.load_seconds is None else duration(note.load_seconds),
            favourite=note.favourite,
            state=_state(model),
            problem=model.problem or model.doubt or "",
            words=" ".join(filter(None, (*said, model.repository, model.name))).casefold(),
        )

    found = families(models).items()
    return [
        Group(
            family if len(members) > 1 else "",
            tuple(row(model, family) for model in sorted(members, key=rank)),
        )
        for family, members in sorted(found, key=lambda item: min(map(rank, item[1])))
    ]


def _store(model: Model, stores: Sequence[Store]) -> str:
    for store in stores:
        if model.path.is_relative_to(store.path):
            return "" if store.kind is StoreKind.FOLDER else store.kind.value
    return str(PurePath(model.path).parent)


def _state(model: Model) -> str:
    if model.downloading:
        return "downloading"
    if model.missing:
        return "incomplete"
    return "unusable" if model.problem else "may not load" if model.doubt else ""


_CONFIRMED = {
    True: "confirmed by the tensors",
    False: "according to most tensors; the file's metadata disagrees",
    None: "not confirmed by the tensors",
}


class ModelDetails(AnyWidget):
    """A folded pane with the facts of a model's header and its chat template.

    They travel as messages, once somebody has unfolded it.

    Args:
        on_open: Called, on the front end's thread, when a page wants them.
    """

    _esm: ClassVar[str] = asset("model_details.js")

    def __init__(self, on_open: Callable[[], object]) -> None:
        super().__init__()
        self.add_class("kitty-details-box")
        self._asked = self._fresh = False
        self._on_open = on_open
        self._sent: Model | None = None
        self.on_msg(self._receive)

    def show(self, model: Model | None) -> None:
        """Show a model, where it is another than before."""
        if self._asked and (self._fresh or model != self._sent):
            self._fresh, self._sent = False, model
            facts = [*describe(model)] if model else []
            template = (model.facts.chat_template if model else None) or ""
            self.send({"kind": "facts", "facts": facts, "template": template})

    def _receive(self, _widget: object, message: Any, _buffers: object) -> None:
        if isinstance(message, dict) and message.get("kind") == "replay":
            self._asked = self._fresh = True
            self._on_open()


def describe(model: Model) -> Iterator[tuple[str, str]]:
    """Yield what is known of a model, each fact with its name."""
    files = shard_paths(model.path)
    known = {
        "Title": model.title,
        "Made from": model.facts.base_model,
        "Architecture": model.architecture,
        "Parameters": _count(model.parameters) or model.facts.size_label,
        "Layers": _count(model.facts.layers),
        "Attention heads": _count(model.facts.heads),
        "Vocabulary": _count(model.facts.vocabulary, " tokens"),
        "Trained context": _count(model.context_length, " tokens"),
        "Quantization": model.quantization
        and f"{model.quantization} ({_CONFIRMED[model.confirmed]})",
        "License": model.facts.license,
        "Takes in": ", ".join(model.modalities),
        "Projector": model.projector and str(model.projector),
        "Tools": {True: "yes", False: "no", None: None}[model.facts.tools],
        "Repository": model.repository,
        "Known as": model.known_as,
        "Size": f"{decimal(model.size)} ({model.size:,} bytes)",
        "File": str(model.path),
        "Shards": f"{len(files)} files, to {files[-1].name}" if len(files) > 1 else None,
        "Missing": ", ".join(model.missing),
        "Problem": model.problem or model.doubt,
    }
    for name, value in known.items():
        if value:
            yield name, value


def _count(number: int | None, of: str = "") -> str | None:
    return None if number is None else f"{number:,}{of}"


class LastTime(HBox):
    """An offer; hidden where there is none, or the form says the same.

    Args:
        form: Where the settings go.
    """

    def __init__(self, form: SettingsForm) -> None:
        self._form = form
        self._note: ModelNote | None = None
        self.text = HTML()
        self.use = Button(description="Use these", tooltip="Fill in the fields below")
        self.use.on_click(lambda _: self._note and self._form.apply(self._note.settings))
        super().__init__([self.text, self.use])
        self.add_class("kitty-last-time")
        self.show(None)

    def show(self, note: ModelNote | None) -> None:
        """Offer what a model was used with."""
        used = note if note and note.last_used else None
        others = self._form.differing(used.settings) if used else []
        self._note = used
        self.text.value = f"Last time: {escape(' · '.join(others))}" if others else ""
        self.layout.display = None if others else "none"


_WORDS = {Verdict.FITS: "fits", Verdict.TIGHT: "tight", Verdict.WILL_NOT_FIT: "too big"}


class ModelTable(AnyWidget):
    """A folded table with a filter.

    Rows travel as messages, once somebody has unfolded it, so neither the widget's state nor a
    saved notebook grows with them.

    Args:
        on_choose: Called, on the front end's thread, with the model of a row that was clicked.
        on_mark: Called there with a model, and whether it is a favourite from now on.
        on_open: Called there when a page wants the rows.

    Attributes:
        asked: Whether a page has ever wanted them.
    """

    _esm: ClassVar[str] = asset("model_table.js")
    asked = False

    def __init__(
        self,
        on_choose: Callable[[Path], object],
        on_mark: Callable[[Path, bool], object],
        on_open: Callable[[], object],
    ) -> None:
        super().__init__()
        self.add_class("kitty-table-box")
        self._on_choose, self._on_mark, self._on_open = on_choose, on_mark, on_open
        self._ids: dict[Path, int] = {}
        self._paths: list[Path] = []
        self._sent: Sequence[Group] | None = None
        self._fits: dict[int, str] = {}
        self.on_msg(self._receive)

    def number(self, models: Iterable[Path]) -> Mapping[Path, int]:
        """Tell what the page calls some models; each keeps its number."""
        for model in models:
            if model not in self._ids:
                self._ids[model] = len(self._paths)
                self._paths.append(model)
        return self._ids

    def show(self, groups: Sequence[Group]) -> None:
        """Show these rows, where they are others than before."""
        if groups != self._sent:
            self._sent = groups
            self.send({"kind": "rows", "groups": [asdict(group) for group in groups]})

    def show_fits(self, verdicts: Mapping[Path, Verdict]) -> None:
        """Show of some models whether they would fit into memory."""
        fits = {self._ids[path]: _WORDS.get(verdict, "") for path, verdict in verdicts.items()}
        others = {number: word for number, word in fits.items() if self._fits.get(number) != word}
        if others:
            self._fits |= others
            self.send({"kind": "fits", "fits": others})

    def show_chosen(self, model: Path | None) -> None:
        """Show which model is chosen."""
        self.send({"kind": "chosen", "id": self._ids.get(model) if model else None})

    def _receive(self, _widget: object, message: Any, _buffers: object) -> None:
        match message:
            case {"kind": "replay"}:
                self.asked, self._sent, self._fits = True, None, {}
                self._on_open()
            case {"kind": "choose", "id": int(number)} if number < len(self._paths):
                self._on_choose(self._paths[number])
            case {"kind": "mark", "id": int(number), "favourite": bool(favourite)} if number < len(
                self._paths
            ):
                self._on_mark(self._paths[number], favourite)


_LOOK_EVERY = 30.0  # seconds; free memory changes, and other programs use the same history
_PAUSE = 0.2  # seconds, in which several changes become one
_JUDGED_AT_ONCE = 50  # models; reading so many headers takes a second or two


class ModelBrowser(VBox):
    """Folds out under the picker. What it shows is written by the manager's loop.

    Args:
        manager: It knows how models were used, and whether they fit.
        picker: Whose models these are; a click on a row chooses there.
        form: Where the settings of last time go.
        wanted: Returns the settings that a start would use, or raises a `KittyError`.
        tell: Called, on the manager's loop, with a sentence about what cannot be remembered.
    """

    def __init__(
        self,
        manager: ModelManager,
        picker: ModelPicker,
        form: SettingsForm,
        wanted: Callable[[], ServerConfig],
        tell: Callable[[str], None],
    ) -> None:
        self._manager, self._picker, self._wanted, self._tell = manager, picker, wanted, tell
        self._stale = anyio.Event()
        self.last_time = LastTime(form)
        self.table = ModelTable(picker.choose, self._mark, self.look_again)
        self.details = ModelDetails(self.look_again)
        super().__init__([self.last_time, self.table, self.details])
        self.add_class("kitty-browser")
        picker.on_list = self.look_again
        self._looking = manager.run(self._look_forever)

    def look_again(self) -> None:
        """Have everything looked at again; callable from any thread but the manager's."""
        with suppress(KittyError):  # the manager is closed
            self._manager.run(self._note_change)

    def note_change(self) -> None:
        """The same, on the manager's loop."""
        self._stale.set()

    def stop(self) -> None:
        """Look no more."""
        self._looking.cancel()

    async def _note_change(self) -> None:
        self.note_change()

    def _mark(self, model: Path, favourite: bool) -> None:
        with suppress(KittyError):
            self._manager.run(self._remember, model, favourite)

    async def _remember(self, model: Path, favourite: bool) -> None:
        config = self._manager.state.config
        await self._manager.stats.set_favorite(model, favourite, config, self._tell)
        self.note_change()

    async def _look_forever(self) -> None:
        while True:
            with anyio.move_on_after(_LOOK_EVERY if self.table.asked else None):
                await self._stale.wait()
            await anyio.sleep(_PAUSE)
            self._stale = anyio.Event()
            await self._look()

    async def _look(self) -> None:
        model, models = self._picker.model, self._picker.models
        try:
            config, right = await anyio.to_thread.run_sync(self._wanted), True
        except KittyError:
            config, right = self._manager.state.config, False
        self.details.show(model)
        paths = [model.path for model in models]
        notes = await self._manager.stats.load(paths, config, self._tell)
        self.last_time.show(notes.get(model.path) if model else None)
        if not self.table.asked:
            return
        ids = self.table.number(paths)
        stores = model_stores(config)
        groups = await anyio.to_thread.run_sync(group_rows, models, stores, notes, ids)
        self.table.show(groups)
        self.table.show_chosen(model.path if model else None)
        if right:
            await self._judge(models, config)

    async def _judge(self, models: Sequence[Model], config: ServerConfig) -> None:
        """Look which models fit, until something has changed again."""
        waiting = (model.path for model in models if model.startable)
        while (some := [*islice(waiting, _JUDGED_AT_ONCE)]) and not self._stale.is_set():
            self.table.show_fits(await self._manager.stats.fits(some, config))
