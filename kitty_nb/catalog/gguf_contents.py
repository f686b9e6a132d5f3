"""What there is to know of a GGUF file besides its weights and its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kitty_nb.catalog.quantization import FILE_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["ArrayInfo", "GgufContents", "GgufHeader", "GgufLayout", "Tensor", "TensorEntry"]


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """What is kept of an array.

    Attributes:
        element_type: The number of the elements' type in the GGUF format, e.g. 8 for strings.
        length: How many elements it has.
    """

    element_type: int
    length: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of one GGUF file.

    Attributes:
        version: Of the format: 2 or 3.
        byte_order: `<` for little-endian, `>` for big-endian.
        tensor_count: How many weight tensors this file holds.
        metadata: Every key with its value; of arrays only the type and length.
        per_layer: The elements of those arrays that may have one for each layer: numbers, and no
            more than a model can have layers.
    """

    version: int
    byte_order: str
    tensor_count: int
    metadata: Mapping[str, bool | int | float | str | ArrayInfo]
    per_layer: Mapping[str, tuple[bool | int | float, ...]] = field(default_factory=dict)

    @property
    def architecture(self) -> str | None:
        """The family of network, e.g. `llama` or `qwen2`."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else None

    @property
    def quantization(self) -> str | None:
        """How the weights are stored, e.g. `Q4_K_M`; None when unsaid or unknown to this table."""
        value = self.metadata.get("general.file_type")
        return FILE_TYPES.get(value) if isinstance(value, int) else None

    @property
    def context_length(self) -> int | None:
        """The longest context that the model was trained for, in tokens."""
        value = self.metadata.get(f"{self.architecture}.context_length")
        return value if isinstance(value, int) else None

    @property
    def split_count(self) -> int:
        """How many files the model is split into; 1 when it is whole."""
        value = self.metadata.get("split.count")
        return max(value, 1) if isinstance(value, int) else 1


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight tensor of a file.

    Attributes:
        name: E.g. `blk.0.attn_k.weight`.
        shape: Its dimensions, in llama.cpp's order: the one that lies closest in memory first.
        type: How its numbers are stored, by llama.cpp's `enum ggml_type`.
        size: Bytes from its begin to that of the next, so up to a few dozen of padding too many.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """Where everything lies in one GGUF file, in bytes from its begin.

    Attributes:
        path: The file.
        size: How long the file is.
        header: What it says about itself.
        entries: Begin and end of each metadata entry.
        tensors: Its weight tensors.
        tensors_at: Begin and end of the list that describes them.
        data_at: Where the weights begin.
        alignment: Of what tensors' places are multiples.
    """

    path: Path
    size: int
    header: GgufHeader
    entries: Mapping[str, tuple[int, int]]
    tensors: tuple[Tensor, ...]
    tensors_at: tuple[int, int]
    data_at: int
    alignment: int


class TensorEntry(NamedTuple):
    """What the list of tensors says of one.

    Attributes:
        name: E.g. `blk.0.attn_k.weight`.
        shape: Its dimensions, in llama.cpp's order: the one that lies closest in memory first.
        type: How its numbers are stored, by llama.cpp's `enum ggml_type`.
        offset: Where it begins, in bytes from the begin of the weights.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufContents:
    """All that a GGUF file says before its weights, which need not be there.

    Attributes:
        size: How long the file is.
        header: What it says about itself.
        entries: Its list of tensors.
        entries_at: Begin and end of that list.
        data_at: Where the weights begin.
        alignment: Of what tensors' places are multiples.
    """

    size: int
    header: GgufHeader
    entries: tuple[TensorEntry, ...]
    entries_at: tuple[int, int]
    data_at: int
    alignment: int
