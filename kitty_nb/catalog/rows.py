"""From files to models: shards joined, projectors paired, what cannot be served told apart."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.filesize import decimal

from kitty_nb.catalog.gguf import FORMATS, TENSOR_TYPES, named_quantization, stored_quantization
from kitty_nb.catalog.model import FileFacts, Kind, Modality, Model, ShardName, name_some

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path, PurePath

    from kitty_nb.catalog.stores import FoundFile


_ELSEWHERE = "Use it in the program it was made for."
_KINDS = {
    Kind.ADAPTER: "an adapter (LoRA). Pick the model it was made for, and name this with --lora"
    " in LLAMACPP_EXTRA_ARGS.",
    Kind.PROJECTOR: "a projector (mmproj). Pick the model itself; a projector in the same folder"
    " is used automatically.",
    Kind.OTHER: f"data about a model. {_ELSEWHERE}",
}


def why_never(path: Path, facts: FileFacts, tensors: int) -> str | None:
    """Say what a file is that is no model to serve, and what to do; None of any other.

    Args:
        path: The file, the first of a split model.
        facts: What it says.
        tensors: How many it holds, with all its shards.
    """
    name, architecture = path.name, facts.architecture
    if of_kind := _KINDS.get(facts.kind):
        return f"{name} is {of_kind}"
    if architecture is None:
        return f"{name} does not say its architecture. Download another conversion of the model."
    if of_other := FORMATS["other_programs"].get(architecture):
        return f"{name} is {of_other} ({architecture}), which llama-server cannot run. {_ELSEWHERE}"
    if architecture == "controlvector":
        return (
            f"{name} is a control vector. Pick a model, and name this with --control-vector in"
            " LLAMACPP_EXTRA_ARGS."
        )
    if not facts.tokenizer:
        return f"{name} is not a language model ({architecture}): no vocabulary. {_ELSEWHERE}"
    if tensors == 0:
        return f"{name} has a vocabulary but no weights. Download the model itself."
    if facts.layers == 0:
        return f"{name} has no layers. Download another conversion of the model."
    return None


def doubt(path: Path, facts: FileFacts, types: Collection[int]) -> str | None:
    """Say why a model may not be served though an engine may load it; None where nothing tells.

    Args:
        path: The file, the first of a split model.
        facts: What it says.
        types: How its matrices are stored, by llama.cpp's `enum ggml_type`.
    """
    if unusual := FORMATS["not_for_chat"].get(facts.architecture or ""):
        return f"{path.name} is {unusual}"
    if unknown := sorted(set(types) - TENSOR_TYPES.keys()):
        numbers = ", ".join(map(str, unknown))
        return (
            f"{path.name} stores weights in a format that kitty_nb does not know (type {numbers})."
            " The engine may support it; if not, download another quantization."
        )
    return None


# The engine's backends all have kernels for F16; the others follow by what they cost.
_PREFERRED: tuple[str | None, ...] = ("F16", "BF16", "Q8_0", "F32")
_SEPARATORS = re.compile(r"[\s._-]+")
_PROJECTOR = re.compile(r"mmproj(?:-model)?", re.IGNORECASE)
_WHEN_COMPLETE = "Start it when it is complete."
_NO_MODEL = re.compile(r"mmproj|(?<![a-z])(?:imatrix|lora)(?![a-z])", re.IGNORECASE)


def with_projectors(rows: Sequence[Model]) -> list[Model]:
    """Give each model its projector, if there is one, and with it what it can take in.

    A model of which its store says what its projector is keeps that.
    """
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
        found = projectors.get(row.projector) if row.projector else None
        for folder in () if row.known_as else row.path.parents[:2]:
            found = found or _choose(row, near.get(folder, ()), alone=len(names[folder]) == 1)
        if found is None:
            return replace(row, projector=None) if row.projector else row
        return replace(row, projector=found.path, modalities=(Modality.TEXT, *found.modalities))

    return [paired(row) for row in rows]


def _choose(model: Model, projectors: Iterable[Model], *, alone: bool) -> Model | None:
    """Choose the one that is made for this model, by its name before by its format."""

    def matches(projector: Model) -> bool:
        widths = model.facts.width, projector.facts.width
        if all(widths) and widths[0] != widths[1]:  # its vectors are of another length
            return False
        titles = [plain_name(one.title or "") for one in (model, projector)]
        name = own_name(projector.stem)
        # One without a name of its own is meant for all that is beside it, if that is one.
        by_name = plain_name(model.stem).startswith(name) if name else alone
        return by_name or (titles[0] == titles[1] != "")

    usable = [one for one in projectors if one.startable and matches(one)]
    return min(
        usable, key=lambda one: (*preference(one.stem, one.quantization), one.path), default=None
    )


def is_projector_name(path: PurePath) -> bool:
    """Tell by a file's name whether it is a projector, as llama.cpp does."""
    return "mmproj" in path.name.lower()


def preference(stem: str, quantization: str | None) -> tuple[int, int]:
    """The rank of a usable projector, best first: by its name, then by its storage type."""
    known = quantization in _PREFERRED
    return -len(own_name(stem)), _PREFERRED.index(quantization) if known else len(_PREFERRED)


def own_name(stem: str) -> str:
    """A file's name without its role and storage type."""
    stem = _PROJECTOR.sub("", stem)
    if tag := named_quantization(stem):
        stem = re.sub(rf"(?i)(?:UD-)?{tag}", "", stem)
    return plain_name(stem)


def plain_name(name: str) -> str:
    """A name without what people write differently: case, and what separates its words."""
    return _SEPARATORS.sub("-", name.casefold()).strip("-")


def rows(files: Iterable[FoundFile], root: Path) -> list[Model]:
    """Make a row of each model, adapter, projector and whatever else there is.

    Args:
        files: All that were found, with their facts.
        root: The folder that names are relative to.
    """
    groups: defaultdict[object, list[FoundFile]] = defaultdict(list)
    for file in files:
        shard = ShardName.parse(file.path)
        groups[(file.path.parent, shard.prefix, shard.count) if shard else file.path].append(file)
    return with_projectors(
        [_row(sorted(group, key=lambda file: file.path), root) for group in groups.values()]
    )


def _row(group: Sequence[FoundFile], root: Path) -> Model:
    first = group[0]
    shard = ShardName.parse(first.path)
    path = first.path.with_name(shard.file_name(1)) if shard else first.path
    here = {file.path.name for file in group if file.signature and not file.unfinished}
    names = [shard.file_name(n + 1) for n in range(shard.count)] if shard else [path.name]
    missing = tuple(name for name in names if name not in here) if shard else ()
    every = [file.facts for file in group if file.facts]
    facts = next((one for one in every if not one.problem), every[0] if every else FileFacts())
    weights: Counter[int] = Counter()
    for one in every:
        weights.update(dict(one.weights))
    quantization, confirmed = stored_quantization(facts.file_type, weights, path.stem)
    problem = _problem(group, path, len(names), missing)
    if problem is None and facts.kind is Kind.MODEL:
        problem = why_never(path, facts, sum(one.tensor_count for one in every))
    return Model(
        path=path,
        name=(path.relative_to(root) if path.is_relative_to(root) else path).as_posix(),
        facts=facts,
        size=sum(file.size for file in group),
        quantization=quantization,
        confirmed=confirmed,
        parameters=None if missing else sum(one.parameters for one in every) or None,
        shard_count=len(names),
        missing=missing,
        problem=problem,
        doubt=None if problem else doubt(path, facts, weights),
        modalities=facts.senses if facts.kind is Kind.PROJECTOR else (Modality.TEXT,),
        projector=first.projector,
        known_as=first.known_as,
        repository=first.repository,
        downloading=any(file.unfinished or file.growing for file in group),
    )


def _problem(
    group: Sequence[FoundFile], path: Path, count: int, missing: Sequence[str]
) -> str | None:
    """Say why files do not make a model of `count` files, and what to do; None where they do."""
    if unfinished := [file for file in group if file.unfinished]:
        so_far = decimal(sum(file.size for file in group))
        files = f", {len(unfinished)} of {count} files" if count > 1 else ""
        return f"{path.name} is still being downloaded{files}: {so_far} so far. {_WHEN_COMPLETE}"
    if missing:
        return (
            f"{len(missing)} of {count} shards are missing: {name_some(missing)}."
            f" Download them into {path.parent}."
        )
    if problem := next(filter(None, (_file_problem(file, count) for file in group)), None):
        return problem
    every = [file.facts for file in group if file.facts]
    expected = every[0].split_tensors if every else None
    there = sum(facts.tensor_count for facts in every)
    if count > 1 and expected is not None and there != expected:
        return (
            f"The shards of {path.name} hold {there} tensors together instead of {expected}: they "
            "are not all of the same model. Download them again."
        )
    return None


def _file_problem(file: FoundFile, count: int) -> str | None:
    """Say what is wrong with one of a model's `count` files."""
    facts = file.facts or FileFacts()
    if file.growing:
        return (
            f"{file.path} is incomplete, but was written to a moment ago: it is still being "
            f"downloaded or copied. {_WHEN_COMPLETE}"
        )
    if file.problem or facts.problem:
        return file.problem or facts.problem
    if facts.split_count not in (1, count):
        return (
            f"{file.path} is a shard of a model in {facts.split_count} files, but its name does not"
            f" say so. Restore the shards' names, from …-00001-of-{facts.split_count:05d}.gguf on."
        )
    shard, number = ShardName.parse(file.path), facts.split_number
    if shard and number is not None and number + 1 != shard.number:
        return (
            f"{file.path} is shard number {number + 1}, but its name says otherwise. Restore the"
            " shards' original names."
        )
    return None
