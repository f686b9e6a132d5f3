"""A model: its files, the facts in their headers, their problems, and its projector."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import prod
from pathlib import PurePath
from typing import TYPE_CHECKING, Self, TypeVar

from rich.filesize import decimal

from kitty_nb.catalog.gguf import (
    FORMATS,
    TENSOR_TYPES,
    named_quantization,
    read_header,
    stored_quantization,
)
from kitty_nb.config import Task
from kitty_nb.errors import ModelFileCutShortError, ModelFileError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from kitty_nb.catalog.cache import FileSignature
    from kitty_nb.catalog.gguf import GgufHeader


P = TypeVar("P", bound=PurePath)
_SHARD = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII)


@dataclass(frozen=True, slots=True)
class ShardName:
    """The parts of a shard's file name."""

    prefix: str  # the file name up to the shard's number, e.g. `qwen2.5-coder-32b-q8_0`
    number: int  # the number of this shard, from 1 to `count`
    count: int  # the number of shards of the whole model

    @classmethod
    def parse(cls, path: PurePath) -> Self | None:
        """Parse the name of `path`; None if it is not the name of a shard."""
        match = _SHARD.fullmatch(path.name)
        if match is None:
            return None
        number, count = int(match["number"]), int(match["count"])
        return cls(match["prefix"], number, count) if 1 <= number <= count else None

    def file_name(self, number: int) -> str:
        """Return the file name of shard `number` (from 1) of the same model."""
        return f"{self.prefix}-{number:05d}-of-{self.count:05d}.gguf"


def shard_paths(path: Path) -> tuple[Path, ...]:
    """List all files of the model that `path` belongs to, first to last, existing or not.

    A model in one file gives `(path,)`.
    """
    shard = ShardName.parse(path)
    if shard is None:
        return (path,)
    return tuple(path.with_name(shard.file_name(n)) for n in range(1, shard.count + 1))


def first_shard(path: P) -> P:
    """Give the first file of the model that `path` belongs to, existing or not."""
    shard = ShardName.parse(path)
    return path.with_name(shard.file_name(1)) if shard else path


def name_some(names: Sequence[str], most: int = 3) -> str:
    """List the first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def total_size(path: Path) -> int:
    """Return the total bytes of the existing files of the model that `path` belongs to."""
    return sum(file_size(shard) or 0 for shard in shard_paths(path))


def file_size(path: Path) -> int | None:
    """Return the size of a file in bytes; None if it is missing or its folder is inaccessible."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


# All of the engine's backends have kernels for F16; the others follow by their cost.
_PREFERRED = ("F16", "BF16", "Q8_0", "F32")
_SEPARATORS = re.compile(r"[\s._-]+")
_PROJECTOR = re.compile(r"mmproj(?:-model)?", re.IGNORECASE)
_WHEN_COMPLETE = "Start it when it is complete."
_NO_MODEL = re.compile(r"mmproj|(?<![a-z])(?:imatrix|lora)(?![a-z])", re.IGNORECASE)


def is_projector_name(path: PurePath) -> bool:
    """Return whether a file is a projector, judging by its name as llama.cpp does."""
    return "mmproj" in path.name.lower()


def preference(stem: str, quantization: str | None) -> tuple[int, int]:
    """Return the rank of a usable projector, best first: by its name, then its storage type."""
    return -len(own_name(stem)), (*_PREFERRED, quantization).index(quantization)  # others last


def own_name(stem: str) -> str:
    """Return a file's name without its role and storage type."""
    stem = _PROJECTOR.sub("", stem)
    if tag := named_quantization(stem):
        stem = re.sub(rf"(?i)(?:UD-)?{tag}", "", stem)
    return plain_name(stem)


def plain_name(name: str) -> str:
    """Normalize what people write differently in a name: case, and separators between words."""
    return _SEPARATORS.sub("-", name.casefold()).strip("-")


# Up to the next delimiter of either kind: a search for the right one never ends without it.
_IN_JINJA = re.compile(r"\{[{%](?:(?!\{[{%]|[%}]\}).)*", re.DOTALL)
_LONGEST = 1 << 20  # characters of a template, far beyond any real one
_TOOLS = re.compile(r"\btools\b")
_OF_LORA = (".lora_a", ".lora_b")  # converters of 2024 don't write the file's type
_REPOSITORY = re.compile(r"https?://[^/]+/(?P<name>.+?)/?")


class Kind(StrEnum):
    """The kind of a GGUF file."""

    MODEL = "model"
    ADAPTER = "adapter"
    PROJECTOR = "projector"
    OTHER = "other"


class Modality(StrEnum):
    """The kinds of input that a model accepts."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"


# By `general.type`.
_TASK_WORDS = {Task.EMBED: "embeds", Task.RANK: "ranks"}
_RANK = 4  # llama.cpp's LLAMA_POOLING_TYPE_RANK
_TYPES = {
    **dict.fromkeys((None, "model", "vocab"), Kind.MODEL),
    "adapter": Kind.ADAPTER,
    "mmproj": Kind.PROJECTOR,
}
_SENSES = {Modality.IMAGE: "clip.has_vision_encoder", Modality.AUDIO: "clip.has_audio_encoder"}


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The facts in one GGUF file's header."""

    # Why the file can't be served, as a sentence; everything else is empty if its header can't be
    # read.
    problem: str | None = None
    cut_short: bool = False  # whether that is because it ends too early
    # What it is: a model, an adapter, a projector for images or sound, or something else.
    kind: Kind = Kind.MODEL
    architecture: str | None = None  # the family of network, e.g. `qwen2`
    title: str | None = None  # its author's name for it, e.g. `Qwen2.5 Coder 32B Instruct`
    size_label: str | None = None  # its size in its author's words, e.g. `32B`
    base_model: str | None = None  # the model it was made from
    license: str | None = None  # e.g. `apache-2.0`
    file_type: int | None = None  # its quantization, by llama.cpp's `enum llama_ftype`
    # Bytes of its matrices, by llama.cpp's `enum ggml_type`.
    weights: tuple[tuple[int, int], ...] = ()
    parameters: int = 0  # numbers in all its tensors
    tensor_count: int = 0  # number of tensors
    context_length: int | None = None  # the longest context it was trained for, in tokens
    layers: int | None = None  # number of blocks
    # Numbers in the vector of one token; for a projector, in the vectors that it outputs.
    width: int | None = None
    heads: int | None = None  # attention heads in the layer with the most
    vocabulary: int | None = None  # number of tokens it knows
    tokenizer: bool = False  # whether it says how to split text into tokens
    chat_template: str | None = field(default=None, repr=False)  # in Jinja
    tools: bool | None = None  # whether the template supports tools; None without a template
    senses: tuple[Modality, ...] = ()  # the inputs that a projector adds to its model
    task: Task = Task.CHAT  # the task it was made for
    split_number: int | None = None  # the number of this shard, from 0; None for a whole model
    split_count: int = 1  # number of shards; 1 for a whole model
    split_tensors: int | None = None  # number of tensors in all shards together; None if unknown

    @property
    def lacks_template(self) -> bool:
        """True if it is made for chat and has a tokenizer, but no chat template."""
        return self.task is Task.CHAT and self.tokenizer and self.chat_template is None


def read_facts(path: Path) -> FileFacts:
    """Read the facts in a file's header; an error becomes their `problem`."""
    try:
        return _facts(read_header(path))
    except ModelFileError as error:
        return FileFacts(str(error), isinstance(error, ModelFileCutShortError))


def _facts(header: GgufHeader) -> FileFacts:
    template = header.text("tokenizer.chat_template")
    weights: Counter[int] = Counter()
    for tensor in header.tensors:
        if len(tensor.shape) > 1:
            weights[tensor.type] += tensor.stored
    return FileFacts(
        problem=header.problem,
        cut_short=header.problem is not None,
        kind=_kind(header),
        architecture=header.architecture,
        title=header.text("general.name"),
        size_label=header.text("general.size_label"),
        base_model=_base_model(header),
        license=header.text("general.license"),
        file_type=header.number("general.file_type"),
        weights=tuple(weights.items()),
        parameters=sum(prod(tensor.shape) for tensor in header.tensors),
        tensor_count=len(header.tensors),
        context_length=header.own_number("context_length"),
        layers=header.own_number("block_count"),
        width=_width(header),
        heads=header.own_number("attention.head_count"),
        vocabulary=header.vocabulary,
        tokenizer=header.text("tokenizer.ggml.model") is not None,
        chat_template=template,
        tools=_takes_tools(header, template),
        senses=tuple(sense for sense, key in _SENSES.items() if header.metadata.get(key) is True),
        task=_task(header),
        split_number=header.number("split.no"),
        split_count=header.number("split.count") or 1,
        split_tensors=header.number("split.tensors.count"),
    )


def read_task(path: Path) -> Task:
    """Read the task that a model was made for; chat if it can't be read."""
    try:
        header = read_header(path, before="tokenizer.")
        if header.architecture in FORMATS["encoders"]:  # its tensors decide, too
            header = read_header(path)
        return _task(header)
    except ModelFileError:
        return Task.CHAT


def _task(header: GgufHeader) -> Task:
    """Decide by the pooling or labels in the header; in old conversions, by what they contain."""
    labels = header.metadata.get(f"{header.architecture}.classifier.output_labels")
    pooling, encodes = header.own_number("pooling_type"), header.architecture in FORMATS["encoders"]
    classifies = encodes and any(tensor.name.startswith("cls.") for tensor in header.tensors)
    if pooling == _RANK or labels is not None or (pooling is None and classifies):
        return Task.RANK
    return Task.EMBED if pooling or encodes else Task.CHAT


def _kind(header: GgufHeader) -> Kind:
    if header.architecture == "clip":
        return Kind.PROJECTOR
    named = any(tensor.name.endswith(_OF_LORA) for tensor in header.tensors)
    if named or header.text("adapter.type"):
        return Kind.ADAPTER
    return _TYPES.get(header.text("general.type"), Kind.OTHER)


def _width(header: GgufHeader) -> int | None:
    if header.architecture != "clip":
        return header.own_number("embedding_length")
    # Converters that don't write the file's type use this key for something else.
    if header.text("general.type") is None:
        return None
    return header.number("clip.vision.projection_dim") or header.number("clip.audio.projection_dim")


def _base_model(header: GgufHeader) -> str | None:
    if name := header.text("general.base_model.0.name"):
        return name
    url = _REPOSITORY.fullmatch(header.text("general.base_model.0.repo_url") or "")
    return url["name"].rsplit("/", 1)[-1] if url else None


def _takes_tools(header: GgufHeader, template: str | None) -> bool | None:
    if header.text("tokenizer.chat_template.tool_use"):
        return True
    if template is None:
        return None
    code = _IN_JINJA.finditer(template, 0, _LONGEST)
    return any(_TOOLS.search(part[0]) for part in code)


_JUST_NOW = 120  # seconds within which a running download has written something


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file whose name looks like a model's."""

    path: Path  # its final path, even while it is being downloaded
    signature: FileSignature | None  # changes whenever the file does; None while it is missing
    parts: tuple[FileSignature, ...] = ()  # what a download has written, if it is not complete
    known_as: str | None = None  # its store's name for it; None if that is the file's name
    # The Hub repository it comes from, e.g. `Qwen/Qwen2.5-7B-Instruct-GGUF`.
    repository: str | None = None
    projector: Path | None = None  # the projector that the store keeps for it
    # A problem with its store, as a sentence, such as a manifest that can't be read.
    problem: str | None = None
    # Whether the download is written into the file itself, which has its full length already.
    filling: bool = False
    # Its header's facts; None while it is missing or not yet read.
    facts: FileFacts | None = None

    @property
    def readable(self) -> bool:
        """True if its header should be read: its store is intact, and it is not just a part."""
        return self.problem is None and (self.signature is not None or not self.parts)

    @property
    def unfinished(self) -> bool:
        """True if only a part is there; an old part beside the whole file doesn't count."""
        whole = self.signature and self.facts and self.facts.problem is None
        return bool(self.parts) and (self.filling or not whole)

    @property
    def growing(self) -> bool:
        """True if only a part is there, or it ends too early, but it was written to just now."""
        cut_short = self.signature and self.facts and self.facts.cut_short
        written = self.parts if self.unfinished else (self.signature,) if cut_short else ()
        # A time in the future means nothing, and would make it a download forever.
        now = time.time()
        return any(one and abs(now - one.mtime_ns / 1e9) < _JUST_NOW for one in written)

    @property
    def size(self) -> int:
        """Bytes on the disk so far."""
        there = self.signature.size if self.signature else 0
        return max(there, sum(part.size for part in self.parts)) if self.unfinished else there


@dataclass(frozen=True, slots=True)
class ModelNote:
    """The usage history of a model."""

    favourite: bool = False  # whether the user marked it as one
    # When it last became ready, in seconds since the epoch; None if it never did.
    last_used: float | None = None
    load_seconds: float | None = None  # duration of that load
    # The settings of that load, by field of `ServerConfig`; missing ones were left to the engine.
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Model:
    """A model on disk, whether it can be served or not.

    Attributes:
        path: Its file; for a split model, the first one, which is passed to the engine.
        name: `path` relative to the catalog's first folder, with `/`, or the whole path elsewhere,
            as written in `.env`.
        facts: The facts in the header of its first file.
        size: Bytes of all its existing files.
        quantization: The storage format of its weights, e.g. `Q4_K_M`; None if unknown.
        confirmed: Whether the tensors agree with the stated quantization; if not, `quantization`
            is the type of most of them. None if one of the two is unknown.
        parameters: The number of its weights; None while files are missing.
        shard_count: The number of its files when complete.
        missing: Names of its files that are not there, or not all of them.
        problem: Why it can't be served, and the remedy; None if no problem is known.
        doubt: Why it might not be served, though an engine may load it; None if there is no reason.
        modalities: The inputs it accepts with its projector; for a projector, those that it adds.
        projector: The projector for images or sound that goes with it (`mmproj`).
        known_as: Its store's name for it, e.g. `llama3.2:3b`; None if that is the file's name.
        repository: The Hub repository it comes from, e.g. `Qwen/Qwen2.5-7B-Instruct-GGUF`.
        downloading: Whether parts of it are still being downloaded.
    """

    path: Path
    name: str
    facts: FileFacts = field(default_factory=FileFacts)
    size: int = 0
    quantization: str | None = None
    confirmed: bool | None = None
    parameters: int | None = None
    shard_count: int = 1
    missing: tuple[str, ...] = ()
    problem: str | None = None
    doubt: str | None = None
    modalities: tuple[Modality, ...] = (Modality.TEXT,)
    projector: Path | None = None
    known_as: str | None = None
    repository: str | None = None
    downloading: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of its file: a model, or something that goes with one."""
        return self.facts.kind

    @property
    def title(self) -> str | None:
        """The author's name for it, e.g. `Qwen2.5 Coder 32B Instruct`."""
        return self.facts.title

    @property
    def architecture(self) -> str | None:
        """The family of network, e.g. `qwen2`; None if unknown."""
        return self.facts.architecture

    @property
    def context_length(self) -> int | None:
        """The longest context it was trained for, in tokens; None if unknown."""
        return self.facts.context_length

    @property
    def startable(self) -> bool:
        """True if no problem is known that prevents serving it."""
        return self.problem is None

    @property
    def stem(self) -> str:
        """The name of its file, without the shard's number and the extension."""
        shard = ShardName.parse(self.path)
        return shard.prefix if shard else self.path.stem

    @property
    def state(self) -> str:
        """The obstacle to serving it, in a word or two; empty if none is known."""
        if self.downloading:
            return "downloading"
        if self.missing:
            return "incomplete"
        if self.problem:
            return "unusable"
        return "may not load" if self.doubt else ""

    @property
    def label(self) -> str:
        """Its line in a list to choose from."""
        state = self.state
        if state == "incomplete" and self.shard_count > 1:
            state = f"{state} ({len(self.missing)} of {self.shard_count} shards missing)"
        elif not state and self.shard_count > 1:
            state = f"{self.shard_count} shards"
        task = _TASK_WORDS.get(self.facts.task)
        parts = (self.known_as or self.stem, self.quantization, decimal(self.size), task, state)
        return " · ".join(filter(None, parts))


_ELSEWHERE = "Use it in the program it was made for."
_KINDS = {
    Kind.ADAPTER: "an adapter (LoRA). Pick the model it was made for, and name this with --lora"
    " in LLAMACPP_EXTRA_ARGS.",
    Kind.PROJECTOR: "a projector (mmproj). Pick the model itself; a projector in the same folder"
    " is used automatically.",
    Kind.OTHER: f"data about a model. {_ELSEWHERE}",
}


def why_never(path: Path, facts: FileFacts, tensors: int) -> str | None:
    """Return what a file is, if not a model to serve, with the remedy; None for any other.

    `tensors` is the number of tensors in all its shards.
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
    """Return why a model might fail, although an engine may load it; None if there is no reason."""
    if unusual := FORMATS["not_for_chat"].get(facts.architecture or ""):
        return f"{path.name} is {unusual}"
    if unknown := sorted(set(types) - TENSOR_TYPES.keys()):
        numbers = ", ".join(map(str, unknown))
        return (
            f"{path.name} stores weights in a format that kitty_nb does not know (type {numbers})."
            " The engine may support it; if not, download another quantization."
        )
    return None


def rows(files: Iterable[FoundFile], root: Path) -> list[Model]:
    """Return a row for each model, adapter, projector or other file, named relative to `root`."""
    groups: defaultdict[Path, list[FoundFile]] = defaultdict(list)
    for file in sorted(files, key=lambda file: file.path):
        groups[first_shard(file.path)].append(file)
    return with_projectors([_row(path, group, root) for path, group in groups.items()])


def _row(path: Path, group: Sequence[FoundFile], root: Path) -> Model:
    first, shard = group[0], ShardName.parse(path)
    here = {file.path.name for file in group if file.signature and not file.unfinished}
    names = [shard.file_name(n + 1) for n in range(shard.count)] if shard else [path.name]
    partial = shard or first.unfinished
    missing = tuple(name for name in names if name not in here) if partial else ()
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
        downloading=any(file.growing for file in group),
    )


def _problem(
    group: Sequence[FoundFile], path: Path, count: int, missing: Sequence[str]
) -> str | None:
    """Return why files don't form a model of `count` files, with the remedy; None if they do."""
    if unfinished := [file for file in group if file.unfinished]:
        so_far = decimal(sum(file.size for file in group))
        files = f", {len(unfinished)} of {count} files" if count > 1 else ""
        state, fix = "only partly downloaded", "Resume its download."
        if any(file.growing for file in unfinished):
            state, fix = "still being downloaded", _WHEN_COMPLETE
        return f"{path.name} is {state}{files}: {so_far} so far. {fix}"
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
            "don't all belong to the same model. Download them again."
        )
    return None


def _file_problem(file: FoundFile, count: int) -> str | None:
    """Return the problem with one of a model's `count` files; None if there is none."""
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
            f" say so. Restore their names: …-00001-of-{facts.split_count:05d}.gguf and so on."
        )
    shard, number = ShardName.parse(file.path), facts.split_number
    if shard and number is not None and number + 1 != shard.number:
        return (
            f"{file.path} is shard number {number + 1}, but its name says otherwise. Restore the"
            " shards' original names."
        )
    return None


def with_projectors(rows: Sequence[Model]) -> list[Model]:
    """Assign each model its projector, if there is one, and the inputs that it accepts with it.

    A projector that the model's store names takes precedence.
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
    """Choose the projector made for this model, by its name first, then its storage type."""

    def matches(projector: Model) -> bool:
        widths = model.facts.width, projector.facts.width
        if all(widths) and widths[0] != widths[1]:  # its vectors have another length
            return False
        titles = [plain_name(one.title or "") for one in (model, projector)]
        name = own_name(projector.stem)
        # One without a name of its own is for whatever is beside it, if that is a single model.
        by_name = plain_name(model.stem).startswith(name) if name else alone
        return by_name or (titles[0] == titles[1] != "")

    usable = [one for one in projectors if one.startable and matches(one)]
    return min(
        usable, key=lambda one: (*preference(one.stem, one.quantization), one.path), default=None
    )
