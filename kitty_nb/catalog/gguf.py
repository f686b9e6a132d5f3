"""GGUF files: their headers, and the names of quantizations."""

from __future__ import annotations

import re
import stat
import struct
import tomllib
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from kitty_nb.errors import ModelFileCutShortError, ModelFileError

if TYPE_CHECKING:
    from collections.abc import Mapping


class TensorType(NamedTuple):
    """The storage type of a tensor's numbers."""

    name: str  # e.g. `Q4_K`
    block: int  # numbers that are stored together
    size: int  # bytes of a block


FORMATS: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("formats.toml").read_text(encoding="utf-8")
)
FILE_TYPES: dict[int, str] = {int(number): name for number, name in FORMATS["file_types"].items()}
TENSOR_TYPES = {int(number): TensorType(*of) for number, of in FORMATS["tensor_types"].items()}

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
        stem: The file's name, used if the header does not tell.

    Returns:
        The name, e.g. `Q4_K_M`, or None if it is unknown; and whether it agrees with the tensors,
        or None if one of them is unknown. If they disagree, the name is the type of most bytes.
    """
    claimed = FILE_TYPES.get(-1 if file_type is None else file_type) or named_quantization(stem)
    known = {TENSOR_TYPES[kind].name: n for kind, n in weights.items() if kind in TENSOR_TYPES}
    if not known:
        return claimed, None
    most: str = max(known, key=lambda name: known[name])
    if claimed is None:
        return most, None
    expected = {claimed, FORMATS["stored_as"].get(claimed, claimed)}
    agrees = any(name in expected or claimed.startswith(f"{name}_") for name in known)
    return (claimed, True) if agrees else (most, False)


def named_quantization(stem: str) -> str | None:
    """Find the quantization in a file's name, e.g. `Q8_0` in `qwen2.5-7b-q8_0`."""
    tags: list[str] = _TAG.findall(stem)
    return tags[-1].upper() if tags else None


_LARGEST = 1 << 53  # exact in every JSON parser; far beyond any real number in a header


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """The kept part of an array."""

    length: int  # number of elements
    # Its elements, if they are numbers, and no more of them than a model can have layers.
    numbers: tuple[bool | int | float, ...] = ()
    # The range of bytes of its strings in the file; in a list as long as a vocabulary, without the
    # first and the last strings, in which models of one family may differ.
    span: range = field(default=range(0), compare=False, repr=False)


Value = bool | int | float | str | ArrayInfo


class Tensor(NamedTuple):
    """One weight tensor of a file."""

    name: str  # e.g. `blk.0.attn_k.weight`
    # Its dimensions, in llama.cpp's order: the contiguous one first.
    shape: tuple[int, ...]
    type: int  # its storage type, by llama.cpp's `enum ggml_type`
    offset: int  # its offset in bytes from the start of the weights
    size: int  # bytes up to the next tensor, including up to a few dozen of padding

    @property
    def stored(self) -> int:
        """Bytes by its type; 0 if the type is not in the table."""
        kind = TENSOR_TYPES.get(self.type)
        return prod(self.shape) // kind.block * kind.size if kind else 0


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything that a GGUF file contains before its weights."""

    path: Path
    size: int  # its length, in bytes
    metadata: Mapping[str, Value]  # every key with its value
    tensors: tuple[Tensor, ...]  # its weight tensors
    data_at: int  # the offset of the weights

    @property
    def architecture(self) -> str | None:
        """The family of network, e.g. `llama` or `qwen2`."""
        return self.text("general.architecture")

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens it knows; None if the header does not say."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.length if isinstance(tokens, ArrayInfo) else self.own_number("vocab_size")

    def text(self, key: str) -> str | None:
        """Return a text; None if the key is missing, empty or something else."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) and value else None

    def number(self, key: str) -> int | None:
        """Return a natural number, the largest of a list; None if it is missing or not one."""
        value = self.metadata.get(key)
        numbers = value.numbers if isinstance(value, ArrayInfo) else (value,)
        return max((n for n in numbers if type(n) is int and 0 <= n <= _LARGEST), default=None)

    def own_number(self, key: str) -> int | None:
        """Return a number of its architecture, such as `block_count`."""
        return self.number(f"{self.architecture}.{key}")

    @property
    def problem(self) -> str | None:
        """A sentence, if weights are missing at the end; None if all are there."""
        ends = (self.data_at + tensor.offset + tensor.stored for tensor in self.tensors)
        needed = max(ends, default=0)
        if needed <= self.size:
            return None
        return (
            f"{self.path} ends before its last weights, after {self.size} of {needed} bytes."
            f" {_DOWNLOAD_AGAIN}"
        )


_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

_WINDOW = 1 << 18  # bytes
# llama.cpp compares the tokens of a draft model from the sixth on, and lets up to 128 be missing.
_FIRST, _PADDING = 5, 128
_PADDED = 1 << 13  # tokens
# Far beyond any real header, and small enough to read through.
_LIMIT = 1 << 24  # bytes of a string, or of an alignment
_MOST_STRINGS = 1 << 22  # in an array
_MOST_ENTRIES = 1 << 16
_MOST_TENSORS = 1 << 17
_LONGEST = 1 << 27  # bytes
MOST_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS
_MOST_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
_DOWNLOAD_AGAIN = "It is damaged or incomplete: download it again."


def read_header(path: Path, before: str | None = None) -> GgufHeader:
    """Read the header of a GGUF file and its list of tensors, whether or not those are there.

    Versions 2 and 3 are supported, in either byte order. Reading stops at a key that begins with
    `before`: a vocabulary takes long to read through.

    Raises:
        ModelFileError: The file can't be opened, is not GGUF, or is damaged or cut short.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise ModelFileError(f"{path} is not a file. Choose a .gguf file.")
        with path.open("rb") as file:
            return _Reader(file, path, status.st_size).header(before)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist. Check its name, or download it.") from None
    except OSError as error:
        raise ModelFileError(
            f"Can't read {path}: {error.strerror}. Check its permissions and the disk."
        ) from error


class _Reader:
    """A forward reader of a file, with a window of its bytes in memory."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._order = "<"
        self._window = b""
        self._start = 0  # of the window, in the file
        self._at = 0  # the next byte, from the window's start; beyond its end after a skip

    def header(self, before: str | None) -> GgufHeader:
        if self._size == 0:
            raise self._damaged("is empty", ModelFileCutShortError)
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
        entry_count = self._count("metadata entries", _MOST_ENTRIES)
        metadata: dict[str, Value] = {}
        for _ in range(entry_count):
            key = self._string()
            if before and key.startswith(before):
                return GgufHeader(self._path, self._size, metadata, (), 0)
            if key in metadata:  # as in a hole full of zeros
                raise self._damaged(f"has the key {key!r} twice")
            metadata[key] = self._value()
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name = self._string()
            if name in entries:
                raise self._damaged(f"has the tensor {name!r} twice")
            entries[name] = self._tensor()
        self._require(0)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment < _LIMIT:
            raise self._damaged(f"has the alignment {alignment}")
        data_at = -(-(self._start + self._at) // alignment) * alignment
        starts = sorted({offset for *_, offset in entries.values()})
        ends = dict(pairwise([*starts, self._size - data_at]))
        tensors = tuple(
            Tensor(name, *entry, ends[entry[-1]] - entry[-1]) for name, entry in entries.items()
        )
        return GgufHeader(self._path, self._size, metadata, tensors, data_at)

    def _tensor(self) -> tuple[tuple[int, ...], int, int]:
        dimensions: int = self._scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._damaged(f"has a tensor of {dimensions} dimensions")
        *shape, kind, offset = self._unpack(f"{dimensions}QIQ")
        return tuple(shape), kind, offset

    def _value(self) -> Value:
        kind: int = self._scalar("I")
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._scalar("I"))
        value: bool | int | float = self._scalar(self._code(kind))
        return value

    def _array(self, kind: int) -> ArrayInfo:
        if kind == _STRING:
            length = self._count("strings in an array", _MOST_STRINGS)
            # As many as vocabularies share whose lengths differ by a little padding.
            common = (length - _PADDING) // _PADDED * _PADDED
            first, last = (_FIRST, common) if common > _FIRST else (0, length)
            self._skip_strings(first)
            start = self._start + self._at
            self._skip_strings(last - first)
            end = self._start + self._at
            self._skip_strings(length - last)
            return ArrayInfo(length, span=range(start, end))
        code, length = self._code(kind), self._scalar("Q")
        if length <= MOST_LAYERS:
            return ArrayInfo(length, self._unpack(f"{length}{code}"))
        self._at += length * struct.calcsize(self._order + code)
        return ArrayInfo(length)

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._damaged(f"has a value of the unknown type {kind}")
        return _SCALARS[kind]

    def _skip_strings(self, count: int) -> None:
        """Skip strings: the one hot loop, 300,000 iterations for a large vocabulary."""
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
        return self._take(self._count("bytes in a string", _LIMIT)).decode(errors="replace")

    def _count(self, what: str, limit: int) -> int:
        count: int = self._scalar("Q")
        if count > limit:
            raise self._damaged(f"claims to have {count} {what}")
        return count

    def _scalar(self, code: str) -> Any:
        return self._unpack(code)[0]

    def _unpack(self, codes: str) -> tuple[Any, ...]:
        layout = self._order + codes
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

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
            raise self._damaged("became shorter while it was read", ModelFileCutShortError)

    def _require(self, count: int) -> None:
        end = self._start + self._at + count
        if end > self._size:
            what = f"ends in the middle of its header, after {self._size} bytes"
            raise self._damaged(what, ModelFileCutShortError)
        if end > _LONGEST:
            raise self._damaged(f"claims to have a header of more than {_LONGEST} bytes")

    def _damaged(self, what: str, kind: type[ModelFileError] = ModelFileError) -> ModelFileError:
        return kind(f"{self._path} {what}. {_DOWNLOAD_AGAIN}")
