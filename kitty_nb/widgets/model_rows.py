"""The rows of the table of models. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich.filesize import decimal

from kitty_nb.catalog import StoreKind, families
from kitty_nb.catalog.model_note import ModelNote
from kitty_nb.widgets.load_bar import duration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from kitty_nb.catalog import Model, Store

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
