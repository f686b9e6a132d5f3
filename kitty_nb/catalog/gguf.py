"""GGUF files: their header, and what a quantization is."""

from __future__ import annotations

import re
import stat
import struct
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from kitty_nb.errors import ModelFileCutShortError, ModelFileError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


LARGEST = 1 << 53  # what JSON carries everywhere; far beyond any real number in a header


class TensorType(NamedTuple):
    """The storage type of a tensor's numbers.

    Attributes:
        name: E.g. `Q4_K`.
        block: How many numbers are stored together.
        size: Bytes that they take.
    """

    name: str
    block: int
    size: int


# llama.cpp's enum llama_ftype, without its MOSTLY_ and ALL_.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0",
}  # fmt: skip

TENSOR_TYPES = {
    number: TensorType(*of)
    for number, of in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
        10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
        26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    }.items()
}  # fmt: skip

# What llama.cpp stores most weights as where the file type does not begin with its name
# (`llama_ftype_get_default_type` in `src/llama-quant.cpp`).
_STORED_AS = {"IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S"}

_TAG = re.compile(
    r"(?<![a-z0-9])(?:(?:I?Q|TQ)\d(?:_[a-z0-9]{1,3})*|B?FP?16|FP?32|MXFP4(?:_MOE)?|NVFP4)(?![a-z0-9])",
    re.ASCII | re.IGNORECASE,
)


def stored_quantization(
    file_type: int | None, weights: Mapping[int, int], stem: str
) -> tuple[str | None, bool | None]:
    """Name a model's quantization by its header or its name, confirmed by its tensors.

    Args:
        file_type: The header's `general.file_type`; None without one.
        weights: Bytes of the model's matrices by their type.
        stem: The file's name, which tells it where the header does not.

    Returns:
        The name, e.g. `Q4_K_M`, or None when nothing tells; and whether that and the tensors agree,
        or None when one of them says nothing. Where they do not agree, the name is that of the
        type that most bytes are stored as.
    """
    by_header = FILE_TYPES.get(file_type) if file_type is not None else None
    claimed = by_header or named_quantization(stem)
    known = {TENSOR_TYPES[kind].name: n for kind, n in weights.items() if kind in TENSOR_TYPES}
    if not known:
        return claimed, None
    most: str = max(known, key=lambda name: known[name])
    if claimed is None:
        return most, None
    expected = {claimed, _STORED_AS.get(claimed, claimed)}
    agrees = any(name in expected or claimed.startswith(f"{name}_") for name in known)
    return (claimed, True) if agrees else (most, False)


def named_quantization(stem: str) -> str | None:
    """Find what a file's name says about quantization, e.g. `Q8_0` in `qwen2.5-7b-q8_0`."""
    tags: list[str] = _TAG.findall(stem)
    return tags[-1].upper() if tags else None


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """The kept part of an array.

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
        tensor_count: How many weight tensors this file holds.
        metadata: Every key with its value; of arrays only the type and length.
        per_layer: The elements of those arrays that may have one for each layer: numbers, and no
            more than a model can have layers.
    """

    version: int
    tensor_count: int
    metadata: Mapping[str, bool | int | float | str | ArrayInfo]
    per_layer: Mapping[str, tuple[bool | int | float, ...]] = field(default_factory=dict)

    @property
    def architecture(self) -> str | None:
        """The family of network, e.g. `llama` or `qwen2`."""
        return self.text("general.architecture")

    def text(self, key: str) -> str | None:
        """A text; None where the key is missing, empty or something else."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) and value else None

    def flag(self, key: str) -> bool:
        """A truth value; False where the key is missing or something else."""
        return self.metadata.get(key) is True

    def length(self, key: str) -> int | None:
        """The length of an array; None where the key is missing or something else."""
        value = self.metadata.get(key)
        return value.length if isinstance(value, ArrayInfo) else None

    def number(self, key: str) -> int | None:
        """A natural number; None where the key is missing, absurd or something else."""
        value = self.metadata.get(key)
        return value if type(value) is int and 0 <= value <= LARGEST else None

    def own_number(self, key: str) -> int | None:
        """A number of its architecture, the largest where each layer has its own."""
        full_key = f"{self.architecture}.{key}"
        if listed := self.per_layer.get(full_key):
            return max((n for n in listed if type(n) is int and 0 <= n <= LARGEST), default=None)
        return self.number(full_key)


class Tensor(NamedTuple):
    """One weight tensor of a file.

    Attributes:
        name: E.g. `blk.0.attn_k.weight`.
        shape: Its dimensions, in llama.cpp's order: the one that lies closest in memory first.
        type: How its numbers are stored, by llama.cpp's `enum ggml_type`.
        offset: Where it begins, in bytes from the begin of the weights.
        size: Bytes up to the next tensor, so up to a few dozen of padding too many.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """All that a GGUF file says before its weights.

    Attributes:
        path: The file.
        size: Its length, in bytes.
        header: What it says about itself.
        tensors: Its weight tensors.
        data_at: The offset of the weights.
    """

    path: Path
    size: int
    header: GgufHeader
    tensors: tuple[Tensor, ...]
    data_at: int


_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

_WINDOW = 1 << 18  # bytes
# Far beyond any real header, and little enough to read through.
_LIMIT = 1 << 24  # bytes of a string, or of an alignment
_MOST_STRINGS = 1 << 22  # in an array
_MOST_ENTRIES = 1 << 16
_MOST_TENSORS = 1 << 17
_LONGEST = 1 << 27  # bytes
MOST_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS
_MOST_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
_SHOWN = 80  # characters of a key in a message
_DOWNLOAD_AGAIN = "It is damaged or incomplete: download it again."


def read_contents(path: Path) -> GgufLayout:
    """Read the header of a GGUF file and its list of tensors, whether those are there or not.

    Versions 2 and 3 are read, in either byte order.

    Raises:
        ModelFileError: It cannot be opened, is not GGUF, or is damaged or cut short.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise ModelFileError(f"{path} is not a file. Choose a .gguf file.")
        with path.open("rb") as file:
            return _Reader(file, path, status.st_size).contents()
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist. Check its name, or download it.") from None
    except OSError as error:
        raise ModelFileError(
            f"Can't read {path}: {error.strerror}. Check its permissions and the disk."
        ) from error


def read_layout(path: Path) -> GgufLayout:
    """Read the header of a GGUF file and the list of its tensors after it.

    Raises:
        ModelFileError: As for `read_contents`, and when weights are missing at the end.
    """
    found = read_contents(path)
    if any(found.data_at + tensor.offset >= found.size for tensor in found.tensors):
        raise ModelFileCutShortError(
            f"{path} ends before its last weights, after {found.size} bytes. {_DOWNLOAD_AGAIN}"
        )
    return found


class _Reader:
    """Walks forward through a file, with a window of its bytes in memory."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._order = "<"
        self._window = b""
        self._start = 0  # of the window, in the file
        self._at = 0  # the next byte, from the window's start; beyond its end after a skip
        self._numbers: tuple[bool | int | float, ...] = ()  # of the latest array, if it is short

    def _header(self) -> GgufHeader:
        if self._size == 0:
            raise self._cut_short("is empty")
        magic = self._take(4)
        if magic != b"GGUF":
            raise ModelFileError(
                f"{self._path} is not a GGUF model: it begins with {magic!r}. "
                "Choose another file, or download the model again."
            )
        self._order = "<" if self._take(4)[0] else ">"
        self._at -= 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ModelFileError(
                f"{self._path} is GGUF version {version}, and kitty_nb reads only 2 and 3. "
                "Download a newer conversion of the model, or update kitty_nb."
            )
        tensor_count = self._count("tensors", _MOST_TENSORS)
        entries = self._count("metadata entries", _MOST_ENTRIES)
        metadata: dict[str, bool | int | float | str | ArrayInfo] = {}
        per_layer: dict[str, tuple[bool | int | float, ...]] = {}
        for _ in range(entries):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"has the key {key[:_SHOWN]!r} twice")
            self._numbers = ()
            metadata[key] = self._value(self._scalar("I"))
            if self._numbers:
                per_layer[key] = self._numbers
        self._require(0)
        return GgufHeader(version, tensor_count, metadata, per_layer)

    def contents(self) -> GgufLayout:
        header = self._header()
        entries = [self._tensor() for _ in range(header.tensor_count)]
        if twice := [name for name, n in Counter(name for name, *_ in entries).items() if n > 1]:
            raise self._damaged(f"has the tensor {twice[0][:_SHOWN]!r} twice")
        self._require(0)
        alignment = header.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment < _LIMIT:
            raise self._damaged(f"has the alignment {alignment}")
        data_at = -(-(self._start + self._at) // alignment) * alignment
        starts = sorted({offset for *_, offset in entries})
        ends = dict(pairwise([*starts, self._size - data_at]))
        tensors = tuple(
            Tensor(name, shape, kind, offset, ends[offset] - offset)
            for name, shape, kind, offset in entries
        )
        return GgufLayout(self._path, self._size, header, tensors, data_at)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions: int = self._scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._damaged(f"has a tensor of {dimensions} dimensions")
        layout = f"{self._order}{dimensions}QIQ"
        *shape, kind, offset = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return name, tuple(shape), kind, offset

    def _value(self, value_type: int) -> bool | int | float | str | ArrayInfo:
        if value_type == _STRING:
            return self._string()
        if value_type == _ARRAY:
            return self._array()
        if value_type not in _SCALARS:
            raise self._damaged(f"has a value of the unknown type {value_type}")
        value: bool | int | float = self._scalar(_SCALARS[value_type])
        return value

    def _array(self) -> ArrayInfo:
        element_type: int = self._scalar("I")
        if element_type == _STRING:
            length = self._count("strings in an array", _MOST_STRINGS)
            self._skip_strings(length)
        elif element_type in _SCALARS:
            length = self._scalar("Q")
            code = _SCALARS[element_type]
            if length <= MOST_LAYERS:
                layout = f"{self._order}{length}{code}"
                self._numbers = struct.unpack(layout, self._take(struct.calcsize(layout)))
            else:
                self._at += length * struct.calcsize(self._order + code)
        else:
            raise self._damaged(
                f"has an array with elements of type {element_type}, which llama.cpp refuses too"
            )
        return ArrayInfo(element_type, length)

    def _skip_strings(self, count: int) -> None:
        """Pass over strings: the one hot loop, 300,000 turns for a large vocabulary."""
        unpack = struct.Struct(self._order + "Q").unpack_from
        window, at, last = self._window, self._at, len(self._window) - 8
        for _ in range(count):
            if at > last:
                self._at = at
                self._fill(8)
                window, at, last = self._window, 0, len(self._window) - 8
            at += 8 + unpack(window, at)[0]
        self._at = at

    def _string(self) -> str:
        return self._take(self._count("bytes in a string")).decode(errors="replace")

    def _count(self, what: str, limit: int = _LIMIT) -> int:
        count: int = self._scalar("Q")
        if count > limit:
            raise self._damaged(f"claims to have {count} {what}")
        return count

    def _scalar(self, code: str) -> Any:
        layout = self._order + code
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._window):
            self._fill(count)
        taken = self._window[self._at : self._at + count]
        self._at += count
        return taken

    def _fill(self, count: int) -> None:
        """Move the window to the next byte, with at least `count` bytes in it."""
        self._require(count)
        self._start, self._at = self._start + self._at, 0
        self._file.seek(self._start)
        self._window = self._file.read(max(count, _WINDOW))
        if len(self._window) < count:
            raise self._cut_short("became shorter while it was read")

    def _require(self, count: int) -> None:
        if self._start + self._at + count > self._size:
            raise self._cut_short(f"ends in the middle of its header, after {self._size} bytes")
        if self._start + self._at + count > _LONGEST:
            raise self._damaged(f"claims to have a header of more than {_LONGEST} bytes")

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(self._sentence(what))

    def _cut_short(self, what: str) -> ModelFileCutShortError:
        return ModelFileCutShortError(self._sentence(what))

    def _sentence(self, what: str) -> str:
        return f"{self._path} {what}. {_DOWNLOAD_AGAIN}"
