"""One row of the catalog: a model on disk, or what goes with models."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from rich.filesize import decimal

from kitty_nb.catalog.file_facts import Kind
from kitty_nb.catalog.shards import ShardName

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Modality", "Model"]


class Modality(StrEnum):
    """What a model takes in."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"


@dataclass(frozen=True, slots=True)
class Model:
    """A model on disk, whether it can be served or not.

    Attributes:
        path: Its file; of a split model the first one, which the engine is given.
        name: `path` within the catalog's first folder, with `/`, and the whole path elsewhere: what
            one writes in `.env`.
        architecture: The family of network, e.g. `qwen2`; None when unknown.
        quantization: How its weights are stored, e.g. `Q4_K_M`; None when unknown.
        size: Bytes of all its files that are there.
        shard_count: How many files it has when complete.
        missing: Names of those files that are not there.
        context_length: The longest context it was trained for, in tokens; None when unknown.
        problem: Why it cannot be served and what to do about it; None when nothing is known.
        doubt: Why it may not be served, though an engine may load it; None when nothing tells.
        kind: Whether it is a model, or goes with one.
        confirmed: Whether the tensors are stored as `quantization` was said to be; where they are
            not, it names what most of them are. None when one of the two says nothing.
        title: What its author calls it, e.g. `Qwen2.5 Coder 32B Instruct`.
        size_label: Its size in its author's words, e.g. `32B`.
        base_model: What it was made from, e.g. `Qwen2.5 Coder 32B`.
        license: E.g. `apache-2.0`.
        parameters: How many numbers its weights are.
        layers: How many blocks it has.
        width: Numbers in the vector of one token; of a projector, in those that it makes.
        heads: Attention heads, of the layer with the most.
        vocabulary: How many tokens it knows.
        chat_template: In Jinja.
        tools: Whether the template takes tools; None without a template.
        modalities: What it takes in, with its projector; of a projector, what that adds.
        projector: The projector for images or sound that goes with it (`mmproj`).
        known_as: What the store that has it calls it, e.g. `llama3.2:3b`; None where that is the
            name of the file.
        repository: The Hub repository that it is from, e.g. `Qwen/Qwen2.5-7B-Instruct-GGUF`.
        downloading: Whether parts of it are still on their way.
    """

    path: Path
    name: str
    architecture: str | None
    quantization: str | None
    size: int
    shard_count: int
    missing: tuple[str, ...]
    context_length: int | None
    problem: str | None
    doubt: str | None = None
    kind: Kind = Kind.MODEL
    confirmed: bool | None = None
    title: str | None = None
    size_label: str | None = None
    base_model: str | None = None
    license: str | None = None
    parameters: int | None = None
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    vocabulary: int | None = None
    chat_template: str | None = field(default=None, repr=False)
    tools: bool | None = None
    modalities: tuple[Modality, ...] = (Modality.TEXT,)
    projector: Path | None = None
    known_as: str | None = None
    repository: str | None = None
    downloading: bool = False

    @property
    def startable(self) -> bool:
        """Whether nothing is known that stands in the way of serving it."""
        return self.problem is None

    @property
    def stem(self) -> str:
        """The name of its file, without the shard's number and the ending."""
        shard = ShardName.parse(self.path)
        return shard.prefix if shard else self.path.stem

    @property
    def alias(self) -> str | None:
        """The name to serve it by where its file's name says nothing; None elsewhere."""
        return self.known_as.partition(", ")[0] if self.known_as else None

    @property
    def label(self) -> str:
        """One line for a list to choose from."""
        parts = [self.known_as or self.stem]
        if self.quantization:
            parts.append(self.quantization)
        parts.append(decimal(self.size))
        if self.downloading:
            parts.append("downloading")
        elif self.missing:
            parts.append(f"incomplete ({len(self.missing)} of {self.shard_count} shards missing)")
        elif self.problem:
            parts.append("unusable")
        elif self.doubt:
            parts.append("may not load")
        elif self.shard_count > 1:
            parts.append(f"{self.shard_count} shards")
        return " · ".join(parts)
