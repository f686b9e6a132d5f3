"""A model: its files, what their headers say, and how the user knows it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, Self

from rich.filesize import decimal

from kitty_nb.catalog.gguf import read_contents
from kitty_nb.errors import ModelFileCutShortError, ModelFileError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path, PurePath

    from kitty_nb.catalog.gguf import GgufHeader, GgufLayout


_SHARD = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII)


@dataclass(frozen=True, slots=True)
class ShardName:
    """What the name of one shard header.

    Attributes:
        prefix: The file name up to the shard's number, e.g. `qwen2.5-coder-32b-q8_0`.
        number: Which shard it is, from 1 to `count`.
        count: How many shards the whole model has.
    """

    prefix: str
    number: int
    count: int

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


def missing_shards(path: Path) -> tuple[Path, ...]:
    """List the files of the model that `path` belongs to which are not there, first to last."""
    return tuple(shard for shard in shard_paths(path) if file_size(shard) is None)


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


_IN_JINJA = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
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
_KINDS = {
    **dict.fromkeys((None, "model", "vocab"), Kind.MODEL),
    "adapter": Kind.ADAPTER,
    "mmproj": Kind.PROJECTOR,
}
_SENSES = {
    Modality.IMAGE: "clip.has_vision_encoder",
    Modality.AUDIO: "clip.has_audio_encoder",
}


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The facts in one GGUF file's header.

    Attributes:
        problem: Why the file cannot be served, as a sentence; all else is empty where its header
            cannot be read.
        cut_short: Whether that is because it ends too early.
        kind: What it is: a model, an adapter, a projector for images or sound, or something else.
        architecture: The family of network, e.g. `qwen2`.
        title: What its author calls it, e.g. `Qwen2.5 Coder 32B Instruct`.
        size_label: Its size in its author's words, e.g. `32B`.
        base_model: What it was made from.
        license: E.g. `apache-2.0`.
        file_type: Its quantization, by llama.cpp's `enum llama_ftype`.
        weights: Bytes of its matrices, by llama.cpp's `enum ggml_type`.
        parameters: How many numbers all its tensors hold.
        tensor_count: How many tensors it holds.
        context_length: The longest context it was trained for, in tokens.
        layers: How many blocks it has.
        width: Numbers in the vector of one token; of a projector, in those that it makes.
        heads: Attention heads, of the layer with the most.
        vocabulary: How many tokens it knows.
        tokenizer: Whether it says how to cut text into tokens.
        chat_template: In Jinja.
        tools: Whether the template takes tools; None without a template.
        senses: The inputs that a projector adds to its model.
        split_number: Which shard it is, from 0; None for a whole model.
        split_count: How many shards there are; 1 for a whole model.
        split_tensors: How many tensors all shards hold together; None when unsaid.
    """

    problem: str | None = None
    cut_short: bool = False
    kind: Kind = Kind.MODEL
    architecture: str | None = None
    title: str | None = None
    size_label: str | None = None
    base_model: str | None = None
    license: str | None = None
    file_type: int | None = None
    weights: tuple[tuple[int, int], ...] = ()
    parameters: int = 0
    tensor_count: int = 0
    context_length: int | None = None
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    vocabulary: int | None = None
    tokenizer: bool = False
    chat_template: str | None = field(default=None, repr=False)
    tools: bool | None = None
    senses: tuple[Modality, ...] = ()
    split_number: int | None = None
    split_count: int = 1
    split_tensors: int | None = None


def read_facts(path: Path) -> FileFacts:
    """Read what a file says about itself; what is wrong with it becomes its `problem`."""
    try:
        return _facts(read_contents(path))
    except ModelFileError as error:
        return FileFacts(str(error), isinstance(error, ModelFileCutShortError))


def _facts(contents: GgufLayout) -> FileFacts:
    header, problem = contents.header, contents.problem
    template = header.text("tokenizer.chat_template")
    weights: Counter[int] = Counter()
    for tensor in contents.tensors:
        if len(tensor.shape) > 1:
            weights[tensor.type] += tensor.stored
    return FileFacts(
        problem=problem,
        cut_short=problem is not None,
        kind=_kind(contents),
        architecture=header.architecture,
        title=header.text("general.name"),
        size_label=header.text("general.size_label"),
        base_model=_base_model(header),
        license=header.text("general.license"),
        file_type=header.number("general.file_type"),
        weights=tuple(weights.items()),
        parameters=sum(prod(tensor.shape) for tensor in contents.tensors),
        tensor_count=len(contents.tensors),
        context_length=header.own_number("context_length"),
        layers=header.own_number("block_count"),
        width=_width(header),
        heads=header.own_number("attention.head_count"),
        vocabulary=header.vocabulary,
        tokenizer=header.text("tokenizer.ggml.model") is not None,
        chat_template=template,
        tools=_takes_tools(header, template),
        senses=tuple(sense for sense, key in _SENSES.items() if header.metadata.get(key) is True),
        split_number=header.number("split.no"),
        split_count=header.number("split.count") or 1,
        split_tensors=header.number("split.tensors.count"),
    )


def _kind(contents: GgufLayout) -> Kind:
    header = contents.header
    if header.architecture == "clip":
        return Kind.PROJECTOR
    named = any(tensor.name.endswith(_OF_LORA) for tensor in contents.tensors)
    if named or header.text("adapter.type"):
        return Kind.ADAPTER
    return _KINDS.get(header.text("general.type"), Kind.OTHER)


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
    return any(_TOOLS.search(code) for code in _IN_JINJA.findall(template))


@dataclass(frozen=True, slots=True)
class ModelNote:
    """The usage history of a model.

    Attributes:
        favourite: Whether the user marked it.
        last_used: When it last became ready, in seconds since the epoch; None when it never did.
        load_seconds: How long that load took.
        settings: What it was started with then, by field of `ServerConfig`; what is left out was
            left to the engine.
    """

    favourite: bool = False
    last_used: float | None = None
    load_seconds: float | None = None
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
        """Whether it is a model, or goes with one."""
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
    def label(self) -> str:
        """One line for a list to choose from."""
        state = ""
        if self.downloading:
            state = "downloading"
        elif self.missing:
            state = f"incomplete ({len(self.missing)} of {self.shard_count} shards missing)"
        elif self.problem or self.doubt:
            state = "unusable" if self.problem else "may not load"
        elif self.shard_count > 1:
            state = f"{self.shard_count} shards"
        parts = (self.known_as or self.stem, self.quantization, decimal(self.size), state)
        return " · ".join(filter(None, parts))
