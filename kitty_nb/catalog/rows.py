"""From files to models: shards joined, projectors paired, what cannot be served told apart."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.filesize import decimal

from kitty_nb.catalog.gguf import TENSOR_TYPES, named_quantization, stored_quantization
from kitty_nb.catalog.model import FileFacts, Kind, Modality, Model, ShardName, name_some

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path, PurePath

    from kitty_nb.catalog.stores import FoundFile


_ELSEWHERE = "Use it in the program it was made for."
_OF_OTHER_PROGRAMS = {
    **dict.fromkeys(("aura", "flux", "hidream", "lumina2", "qwen_image"), "an image model"),
    **dict.fromkeys(("sd1", "sd3", "sdxl"), "an image model"),
    **dict.fromkeys(("cosmos", "hyvid", "ltxv", "wan"), "a video model"),
    **dict.fromkeys(("dia", "kokoro", "parler-tts"), "a speech model"),
}
# What goes with a model, and what to do with it.
_COMPANIONS = {
    "controlvector": "a control vector. Pick a model, and name this with --control-vector"
    " in LLAMACPP_EXTRA_ARGS.",
}
_KINDS = {
    Kind.ADAPTER: "an adapter (LoRA). Pick the model it was made for, and name this with --lora"
    " in LLAMACPP_EXTRA_ARGS.",
    Kind.PROJECTOR: "a projector (mmproj). Pick the model itself; a projector in the same folder"
    " is used automatically.",
    Kind.OTHER: f"data about a model. {_ELSEWHERE}",
}
# Engines load these, but not to chat with.
_DRAFTER = "a drafter. Pick the model it was made for, and name this as its draft model."
_NOT_FOR_CHAT = {
    "dflash": _DRAFTER,
    "eagle3": _DRAFTER,
    "t5encoder": "a text encoder of an image model. It cannot chat.",
    "wavtokenizer-dec": "the vocoder of a speech model. It cannot chat.",
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
    if of_other := _OF_OTHER_PROGRAMS.get(architecture):
        return f"{name} is {of_other} ({architecture}), which llama-server cannot run. {_ELSEWHERE}"
    if companion := _COMPANIONS.get(architecture):
        return f"{name} is {companion}"
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
    if unusual := _NOT_FOR_CHAT.get(facts.architecture or ""):
        return f"{path.name} is {unusual}"
    if unknown := sorted(set(types) - TENSOR_TYPES.keys()):
        numbers = ", ".join(map(str, unknown))
        return (
            f"{path.name} stores weights in a format that kitty_nb does not know (type {numbers})."
            " The engine may support it; if not, download another quantization."
        )
    return None


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
    widths = model.facts.width, projector.facts.width
    if all(widths) and widths[0] != widths[1]:
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
    """The rank of a projector's storage type among usable ones; 0 is the best."""
    return _PREFERRED.index(quantization) if quantization in _PREFERRED else len(_PREFERRED)


def own_name(stem: str) -> str:
    """A file's name without its role and storage type."""
    stem = _PROJECTOR.sub("", stem)
    if tag := named_quantization(stem):
        stem = re.sub(rf"(?i)(?:UD-)?{tag}", "", stem)
    return plain_name(stem)


def plain_name(name: str) -> str:
    """A name without what people write differently: case, and what separates its words."""
    return _SEPARATORS.sub("-", name.casefold()).strip("-")


_JUST_NOW = 120  # seconds in which a download that still runs has written something
_WHEN_COMPLETE = "Start it when it is complete."


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a row.

    Attributes:
        file: The file.
        facts: What it says; None while it is not there.
    """

    file: FoundFile
    facts: FileFacts | None


def rows(parts: Iterable[Part], root: Path, now: float) -> list[Model]:
    """Make a row of each model, adapter, projector and whatever else there is.

    Args:
        parts: All files that were found.
        root: The folder that names are relative to.
        now: Seconds since the epoch, to tell files that are still being written.
    """
    return with_projectors(_row(group, root, now) for group in _groups(list(parts)))


def _groups(parts: list[Part]) -> Iterator[list[Part]]:
    """Join shards: by their names, and by what they say where their names do not tell."""
    said = Counter((*_said(part), _number(part)) for part in parts)
    groups: dict[object, list[Part]] = {}
    for part in parts:
        shard = ShardName.parse(part.file.path)
        if shard:
            key: object = (part.file.path.parent, shard.prefix, shard.count)
        elif part.facts and part.facts.split_count > 1 and said[(*_said(part), _number(part))] == 1:
            key = _said(part)
        else:
            key = part.file.path
        groups.setdefault(key, []).append(part)
    for group in groups.values():
        yield sorted(group, key=lambda part: (_number(part) or 0, part.file.path))


def _said(part: Part) -> tuple[object, ...]:
    facts = part.facts or FileFacts()
    return part.file.path.parent, facts.split_count, facts.split_tensors


def _number(part: Part) -> int | None:
    """The shard's index, from 0."""
    shard = ShardName.parse(part.file.path)
    return shard.number - 1 if shard else part.facts.split_number if part.facts else None


def _row(group: Sequence[Part], root: Path, now: float) -> Model:
    first = group[0].file
    shard = ShardName.parse(first.path)
    path = first.path.with_name(shard.file_name(1)) if shard else first.path
    here = {part.file.path.name for part in group if part.file.signature and not _on_its_way(part)}
    names = [shard.file_name(n + 1) for n in range(shard.count)] if shard else [path.name]
    absent = [name for name in names if name not in here] if shard else []
    readable = [part.facts for part in group if part.facts and part.facts.problem is None]
    facts = readable[0] if readable else FileFacts()
    weights: Counter[int] = Counter()
    for each in readable:
        weights.update(dict(each.weights))
    quantization, confirmed = stored_quantization(facts.file_type, weights, path.stem)
    downloading = any(_on_its_way(part) or _growing(part, now) for part in group)
    problem = _problem(group, path, names, absent, now)
    if problem is None and readable and facts.kind is Kind.MODEL:
        problem = why_never(path, facts, sum(each.tensor_count for each in readable))
    return Model(
        path=path,
        name=(path.relative_to(root) if path.is_relative_to(root) else path).as_posix(),
        facts=facts,
        size=sum(_size(part) for part in group),
        quantization=quantization,
        confirmed=confirmed,
        parameters=(sum(each.parameters for each in readable) or None) if not absent else None,
        shard_count=len(names) if shard else max(facts.split_count if len(group) > 1 else 1, 1),
        missing=tuple(absent),
        problem=problem,
        doubt=None if problem else doubt(path, facts, weights),
        modalities=_modalities(facts),
        projector=first.projector,
        known_as=first.known_as,
        repository=first.repository,
        downloading=downloading,
    )


def _modalities(facts: FileFacts) -> tuple[Modality, ...]:
    if facts.kind is not Kind.PROJECTOR:
        return (Modality.TEXT,)
    senses = ((Modality.IMAGE, facts.sees), (Modality.AUDIO, facts.hears))
    return tuple(sense for sense, has in senses if has)


def _size(part: Part) -> int:
    there = part.file.signature.size if part.file.signature else 0
    return max(there, part.file.downloading or 0) if _on_its_way(part) else there


def _on_its_way(part: Part) -> bool:
    """Tell whether a file is still to be completed: not where only an old part lies beside it."""
    signature, facts = part.file.signature, part.facts
    whole = signature and facts and facts.problem is None and facts.needed <= signature.size
    return part.file.downloading is not None and (part.file.filling or not whole)


def _growing(part: Part, now: float) -> bool:
    """Tell whether a file that ends too early was written to a moment ago."""
    signature, facts = part.file.signature, part.facts
    if signature is None or facts is None or not (facts.cut_short or facts.needed > signature.size):
        return False
    # A time that lies ahead tells nothing, and would make it a download for ever.
    return abs(now - signature.mtime_ns / 1e9) < _JUST_NOW


def _problem(
    group: Sequence[Part], path: Path, names: Sequence[str], absent: Sequence[str], now: float
) -> str | None:
    if on_its_way := [part for part in group if _on_its_way(part)]:
        so_far = decimal(sum(map(_size, group)))
        files = f", {len(on_its_way)} of {len(names)} files" if len(names) > 1 else ""
        return f"{path.name} is still being downloaded{files}: {so_far} so far. {_WHEN_COMPLETE}"
    if absent:
        return _incomplete(absent, len(names), path.parent)
    for part in group:
        if problem := part.file.problem or _growth(part, now) or _fault(part):
            return problem
    return _misfit(group, path, len(names))


def _growth(part: Part, now: float) -> str | None:
    if not _growing(part, now):
        return None
    return (
        f"{part.file.path} is incomplete, but was written to a moment ago: it is still being "
        f"downloaded or copied. {_WHEN_COMPLETE}"
    )


def _fault(part: Part) -> str | None:
    signature, facts = part.file.signature, part.facts
    if facts is None or facts.problem:
        return facts.problem if facts else None
    if signature and facts.needed > signature.size:
        return (
            f"{part.file.path} ends before its last weights, after {signature.size} of"
            f" {facts.needed} bytes. It is damaged or incomplete: download it again."
        )
    return None


def _misfit(group: Sequence[Part], path: Path, count: int) -> str | None:
    """Say what is wrong with shards that are all there but do not belong together so."""
    every = [part.facts for part in group if part.facts]
    for part in group:
        facts = part.facts
        if facts is None:
            continue
        if facts.split_count not in (1, count):
            return _misnamed(path, facts.split_count, sorted(f.split_number or 0 for f in every))
        if count > 1 and facts.split_number not in (None, _number(part)):
            return (
                f"{part.file.path} is shard number {(facts.split_number or 0) + 1}, but its name"
                " says otherwise. Restore the shards' original names."
            )
    expected = every[0].split_tensors if every else None
    there = sum(facts.tensor_count for facts in every)
    if count > 1 and expected is not None and there != expected:
        return (
            f"The shards of {path.name} hold {there} tensors together instead of {expected}: they "
            "are not all of the same model. Download them again."
        )
    return None


def _incomplete(missing: Sequence[str], count: int, folder: Path) -> str:
    named = name_some(missing)
    return f"{len(missing)} of {count} shards are missing: {named}. Download them into {folder}."


def _misnamed(path: Path, count: int, numbers: Sequence[int]) -> str:
    gone = sorted({*range(count)} - {*numbers})
    lacking = name_some([f"{number + 1:05d}" for number in gone])
    without = f" Download the missing {lacking}." if len(numbers) > 1 and gone else ""
    return (
        f"{path} is a shard of a model in {count} files, but its name does not say so. Restore all"
        f" of their names, from …-00001-of-{count:05d}.gguf on.{without}"
    )
