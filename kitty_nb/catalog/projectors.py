"""Which projector goes with which model.

A model that sees or hears needs a second file, its projector (`mmproj`). Nothing in the two files
names the other, so they are matched by folder, by title and by the names of the files. A projector
lies beside its model or in the folder above, as where each quantization has a folder of its own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from kitty_nb.catalog.file_facts import Kind
from kitty_nb.catalog.model import Modality
from kitty_nb.catalog.quantization import named_quantization

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path, PurePath

    from kitty_nb.catalog.model import Model

__all__ = ["is_projector_name", "own_name", "plain_name", "projector_rank", "with_projectors"]

# The engine's backends all have kernels for F16; the others follow by what they cost.
_PREFERRED = ("F16", "BF16", "Q8_0", "F32")
_SEPARATORS = re.compile(r"[\s._-]+")
_PROJECTOR = re.compile(r"mmproj(?:-model)?", re.IGNORECASE)
_NO_MODEL = re.compile(r"mmproj|(?<![a-z])(?:imatrix|lora)(?![a-z])", re.IGNORECASE)


def with_projectors(rows: Iterable[Model]) -> list[Model]:
    """Give each model its projector, if there is one, and with it what it can take in.

    A model of which its store says what its projector is keeps that.
    """
    rows = list(rows)
    projectors = {row.path: row for row in rows if row.kind is Kind.PROJECTOR}
    near: defaultdict[Path, list[Model]] = defaultdict(list)
    for row in projectors.values():
        if is_projector_name(row.path):
            near[row.path.parent].append(row)
    names: defaultdict[Path, set[str]] = defaultdict(set)
    for row in rows if near else ():
        if not _NO_MODEL.search(row.path.name):
            for folder in row.path.parents[:2]:
                names[folder].add(own_name(row.stem))

    def paired(row: Model) -> Model:
        if row.kind is not Kind.MODEL:
            return row
        if row.projector:
            return _with(row, projectors.get(row.projector))
        if row.known_as:
            return row
        for folder in row.path.parents[:2]:
            if found := _choose(row, near.get(folder, ()), len(names[folder]) == 1):
                return _with(row, found)
        return row

    return [paired(row) for row in rows]


def _with(model: Model, projector: Model | None) -> Model:
    if projector is None:
        return replace(model, projector=None) if model.projector else model
    return replace(
        model, projector=projector.path, modalities=(Modality.TEXT, *projector.modalities)
    )


def _choose(model: Model, projectors: Sequence[Model], alone: bool) -> Model | None:
    """Choose the one that is made for this model, by its name before by its format."""
    usable = [p for p in projectors if p.startable and _match(model, p, alone)]
    return min(
        usable,
        key=lambda p: (-len(own_name(p.stem)), projector_rank(p.quantization), p.path),
        default=None,
    )


def _match(model: Model, projector: Model, alone: bool) -> bool:
    """Tell whether a projector is for a model: not where its vectors are of another length."""
    if model.width and projector.width and model.width != projector.width:
        return False
    if model.title and projector.title and plain_name(model.title) == plain_name(projector.title):
        return True
    if name := own_name(projector.stem):
        return plain_name(model.stem).startswith(name)
    # A projector without a name of its own is meant for all that is beside it, if that is one.
    return alone


def is_projector_name(path: PurePath) -> bool:
    """Tell by a file's name whether it is a projector, as llama.cpp does."""
    return "mmproj" in path.name.lower()


def projector_rank(quantization: str | None) -> int:
    """Where a projector stored like this stands among those that would do; 0 is the best."""
    return _PREFERRED.index(quantization) if quantization in _PREFERRED else len(_PREFERRED)


def own_name(stem: str) -> str:
    """What a file is called, without what it is and how it is stored."""
    stem = _PROJECTOR.sub("", stem)
    if tag := named_quantization(stem):
        stem = re.sub(rf"(?i)(?:UD-)?{tag}", "", stem)
    return plain_name(stem)


def plain_name(name: str) -> str:
    """A name without what people write differently: case, and what separates its words."""
    return _SEPARATORS.sub("-", name.casefold()).strip("-")
