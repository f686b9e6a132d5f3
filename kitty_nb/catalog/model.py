"""A model: its files, what their headers say, what is wrong with them, and its projector."""

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
    number: int  # which shard it is, from 1 to `count`
    count: int  # how many shards the whole model has

    @classmethod
    def parse(cls, path: PurePath) -> Self | None:
        """Read the name of `path`; None when it is not the name of a shard."""
        match = _SHARD.fullmatch(path.name)
        if match is None:
            return None
        number, count = int(match["number"]), int(match["count"])
        return cls(match["prefix"], number, count) if 1 <= number <= count else None

    def file_name(self, number: int) -> str:
        """Name shard `number` (from 1) of the same model."""
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
    """Name the first of some things, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def total_size(path: Path) -> int:
    """Add up the bytes of those files of the model that `path` belongs to which are there."""
    return sum(file_size(shard) or 0 for shard in shard_paths(path))


def file_size(path: Path) -> int | None:
    """Give the bytes of a file; None when it is absent or its folder may not be entered."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


# The engine's backends all have kernels for F16; the others follow by what they cost.
_PREFERRED = ("F16", "BF16", "Q8_0", "F32")
_SEPARATORS = re.compile(r"[\s._-]+")
_PROJECTOR = re.compile(r"mmproj(?:-model)?", re.IGNORECASE)
_WHEN_COMPLETE = "Start it when it is complete."
_NO_MODEL = re.compile(r"mmproj|(?<![a-z])(?:imatrix|lora)(?![a-z])", re.IGNORECASE)


def is_projector_name(path: PurePath) -> bool:
    """Tell by a file's name whether it is a projector, as llama.cpp does."""
    return "mmproj" in path.name.lower()


def preference(stem: str, quantization: str | None) -> tuple[int, int]:
    """The rank of a usable projector, best first: by its name, then by its storage type."""
    return -len(own_name(stem)), (*_PREFERRED, quantization).index(quantization)  # others last


def own_name(stem: str) -> str:
    """A file's name without its role and storage type."""
    stem = _PROJECTOR.sub("", stem)
    if tag := named_quantization(stem):
        stem = re.sub(rf"(?i)(?:UD-)?{tag}", "", stem)
    return plain_name(stem)


def plain_name(name: str) -> str:
    """A name without what people write differently: case, and what separates its words."""
    return _SEPARATORS.sub("-", name.casefold()).strip("-")


# Up to the next delimiter of either kind: a search for the right one takes forever where none is.
_IN_JINJA = re.compile(r"\{[{%](?:(?!\{[{%]|[%}]\}).)*", re.DOTALL)
_LONGEST = 1 << 20  # letters of a template, far beyond any real one
_TOOLS = re.compile(r"\btools\b")
_OF_LORA = (".lora_a", ".lora_b")  # converters of 2024 do not say the file's type
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

    # Why the file cannot be served, as a sentence; all else is empty where its header cannot be
    # read.
    problem: str | None = None
    cut_short: bool = False  # whether that is because it ends too early
    # What it is: a model, an adapter, a projector for images or sound, or something else.
    kind: Kind = Kind.MODEL
    architecture: str | None = None  # the family of network, e.g. `qwen2`
    title: str | None = None  # what its author calls it, e.g. `Qwen2.5 Coder 32B Instruct`
    size_label: str | None = None  # its size in its author's words, e.g. `32B`
    base_model: str | None = None  # what it was made from
    license: str | None = None  # e.g. `apache-2.0`
    file_type: int | None = None  # its quantization, by llama.cpp's `enum llama_ftype`
    # Bytes of its matrices, by llama.cpp's `enum ggml_type`.
    weights: tuple[tuple[int, int], ...] = ()
    parameters: int = 0  # how many numbers all its tensors hold
    tensor_count: int = 0  # how many tensors it holds
    context_length: int | None = None  # the longest context it was trained for, in tokens
    layers: int | None = None  # how many blocks it has
    # Numbers in the vector of one token; of a projector, in those that it makes.
    width: int | None = None
    heads: int | None = None  # attention heads, of the layer with the most
    vocabulary: int | None = None  # how many tokens it knows
    tokenizer: bool = False  # whether it says how to cut text into tokens
    chat_template: str | None = field(default=None, repr=False)  # in Jinja
    tools: bool | None = None  # whether the template takes tools; None without a template
    senses: tuple[Modality, ...] = ()  # the inputs that a projector adds to its model
    task: Task = Task.CHAT  # what it was made for
    split_number: int | None = None  # which shard it is, from 0; None for a whole model
    split_count: int = 1  # how many shards there are; 1 for a whole model
    split_tensors: int | None = None  # how many tensors all shards hold together; None when unsaid

    @property
    def lacks_template(self) -> bool:
        """True if it is made to answer, and does not say how questions are written to it."""
        return self.task is Task.CHAT and self.tokenizer and self.chat_template is None


def read_facts(path: Path) -> FileFacts:
    """Read what a file says about itself; what is wrong with it becomes its `problem`."""
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
    """Read what a model was made for; one that cannot be read is one to chat with."""
    try:
        header = read_header(path, before="tokenizer.")
        if header.architecture in FORMATS["encoders"]:  # its tensors tell, too
            header = read_header(path)
        return _task(header)
    except ModelFileError:
        return Task.CHAT


def _task(header: GgufHeader) -> Task:
    """Tell by the pooling that its converter wrote, of old conversions by what they consist of."""
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
    # Converters that do not say their file's type meant something else by this key.
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


_JUST_NOW = 120  # seconds in which a download that still runs has written something


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that looks like a model by its name."""

    path: Path  # its place, also while it is still being downloaded
    signature: FileSignature | None  # changes whenever the file does; None while it is not there
    # Bytes of it that are downloaded so far; None when no download is under way.
    downloading: int | None = None
    known_as: str | None = None  # its store's name for it; None where the file's name is that
    # The Hub repository it is from, e.g. `Qwen/Qwen2.5-7B-Instruct-GGUF`.
    repository: str | None = None
    projector: Path | None = None  # the projector that the store keeps for it
    # A fault of its store, as a sentence, such as a manifest that can't be read.
    problem: str | None = None
    # Whether the download is written into the file itself, at its full length.
    filling: bool = False
    # Its header's facts; None while it is not there, or not yet read.
    facts: FileFacts | None = None

    @property
    def readable(self) -> bool:
        """True if its header should be read: its store is sound, and it is more than a part."""
        return self.problem is None and (self.signature is not None or self.downloading is None)

    @property
    def unfinished(self) -> bool:
        """True if a download is under way, not where an old part lies beside the whole file."""
        whole = self.signature and self.facts and self.facts.problem is None
        return self.downloading is not None and (self.filling or not whole)

    @property
    def growing(self) -> bool:
        """True if it ends too early, and was written to a moment ago."""
        if not (self.signature and self.facts and self.facts.cut_short):
            return False
        # A time in the future says nothing, and would make it a download for ever.
        return abs(time.time() - self.signature.mtime_ns / 1e9) < _JUST_NOW

    @property
    def size(self) -> int:
        """Bytes that are on the disk so far."""
        there = self.signature.size if self.signature else 0
        return max(there, self.downloading or 0) if self.unfinished else there


@dataclass(frozen=True, slots=True)
class ModelNote:
    """The usage history of a model."""

    favourite: bool = False  # whether the user marked it
    # When it last became ready, in seconds since the epoch; None when it never did.
    last_used: float | None = None
    load_seconds: float | None = None  # how long that load took
    # What it was started with then, by field of `ServerConfig`; what is left out was left to the
    # engine.
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Model:
    """A model on disk, whether it can be served or not.

    Attributes:
        path: Its file; of a split model the first one, which the engine is given.
        name: `path` within the catalog's first folder, with `/`, and the whole path elsewhere: what
            one writes in `.env`.
        facts: What its first file says about itself.
        size: Bytes of all its files that are there.
        quantization: How its weights are stored, e.g. `Q4_K_M`; None when unknown.
        confirmed: Whether the tensors are stored as `quantization` was said to be; where they are
            not, it names what most of them are. None when one of the two says nothing.
        parameters: How many numbers its weights are; None while files are missing.
        shard_count: How many files it has when complete.
        missing: Names of those files that are not there.
        problem: Why it cannot be served and what to do about it; None when nothing is known.
        doubt: Why it may not be served, though an engine may load it; None when nothing tells.
        modalities: What it takes in, with its projector; of a projector, what that adds.
        projector: The projector for images or sound that goes with it (`mmproj`).
        known_as: What the store that has it calls it, e.g. `llama3.2:3b`; None where that is the
            name of the file.
        repository: The Hub repository that it is from, e.g. `Qwen/Qwen2.5-7B-Instruct-GGUF`.
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
        """The kind of its file: a model, or what goes with one."""
        return self.facts.kind

    @property
    def title(self) -> str | None:
        """The author's name for it, e.g. `Qwen2.5 Coder 32B Instruct`."""
        return self.facts.title

    @property
    def architecture(self) -> str | None:
        """The family of network, e.g. `qwen2`; None when unknown."""
        return self.facts.architecture

    @property
    def context_length(self) -> int | None:
        """The longest context it was trained for, in tokens; None when unknown."""
        return self.facts.context_length

    @property
    def startable(self) -> bool:
        """True if nothing is known that stands in the way of serving it."""
        return self.problem is None

    @property
    def stem(self) -> str:
        """The name of its file, without the shard's number and the ending."""
        shard = ShardName.parse(self.path)
        return shard.prefix if shard else self.path.stem

    @property
    def state(self) -> str:
        """The obstacle to serving it, in a word or two; empty where nothing is known."""
        if self.downloading:
            return "downloading"
        if self.missing:
            return "incomplete"
        if self.problem:
            return "unusable"
        return "may not load" if self.doubt else ""

    @property
    def label(self) -> str:
        """One line for a list to choose from."""
        state = self.state
        if state == "incomplete":
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
    """Say what a file is that is no model to serve, and what to do; None of any other.

    `tensors` counts those of all its shards.
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
    """Say why a model may not be served though an engine may load it; None where nothing tells."""
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
    """Make a row of each model, adapter, projector and the rest, with names relative to `root`."""
    groups: defaultdict[Path, list[FoundFile]] = defaultdict(list)
    for file in sorted(files, key=lambda file: file.path):
        groups[first_shard(file.path)].append(file)
    return with_projectors([_row(path, group, root) for path, group in groups.items()])


def _row(path: Path, group: Sequence[FoundFile], root: Path) -> Model:
    first, shard = group[0], ShardName.parse(path)
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
