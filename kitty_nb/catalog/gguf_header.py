"""What a GGUF file says about itself, read without its weights or its vocabulary.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is read through a
window rather than mapped: a mapped file that shrinks while it is read, as when a download
starts over, would end the whole notebook kernel with a bus error.
"""

from __future__ import annotations

import stat
import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from kitty_nb.catalog.gguf_contents import (
    ArrayInfo,
    GgufContents,
    GgufHeader,
    GgufLayout,
    Tensor,
    TensorEntry,
)
from kitty_nb.errors import ModelFileCutShortError, ModelFileError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

__all__ = ["read_contents", "read_header", "read_layout"]

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
_MOST_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS
_MOST_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
_SHOWN = 80  # characters of a key in a message


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, version 2 or 3, in either byte order.

    Raises:
        ModelFileError: It cannot be opened, is not GGUF, or is damaged or cut short.
    """
    return _read(path, _Reader.header)


def read_contents(path: Path) -> GgufContents:
    """Read the header of a GGUF file and the list of its tensors, whether those are there or not.

    Raises:
        ModelFileError: As for `read_header`.
    """
    return _read(path, _Reader.contents)


def read_layout(path: Path) -> GgufLayout:
    """Read the header of a GGUF file and the list of its tensors after it.

    Raises:
        ModelFileError: As for `read_header`, and when weights are missing at the end.
    """
    return _read(path, _Reader.layout)


def _read(path: Path, part: Callable[[_Reader], T]) -> T:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise ModelFileError(f"{path} is not a file. Choose a .gguf file.")
        with path.open("rb") as file:
            return part(_Reader(file, path, status.st_size))
    except FileNotFoundError:
        raise ModelFileError(f"{path} is not there. Check its name, or download it.") from None
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read: {error.strerror}. Check its permissions and its disk."
        ) from error


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
        self._entries: dict[str, tuple[int, int]] = {}

    def header(self) -> GgufHeader:
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
                f"{self._path} is GGUF version {version}, and only 2 and 3 can be read. "
                "Download a newer conversion of the model, or update kitty_nb."
            )
        tensor_count = self._count("tensors", _MOST_TENSORS)
        entries = self._count("metadata entries", _MOST_ENTRIES)
        metadata: dict[str, bool | int | float | str | ArrayInfo] = {}
        per_layer: dict[str, tuple[bool | int | float, ...]] = {}
        for _ in range(entries):
            begin = self._position
            key = self._string()
            if key in metadata:
                raise self._damaged(f"has the key {key[:_SHOWN]!r} twice")
            self._numbers = ()
            metadata[key] = self._value(self._scalar("I"))
            self._entries[key] = begin, self._position
            if self._numbers:
                per_layer[key] = self._numbers
        self._require(0)
        return GgufHeader(version, self._order, tensor_count, metadata, per_layer)

    def contents(self) -> GgufContents:
        header = self.header()
        begin = self._position
        entries: dict[str, TensorEntry] = {}
        for _ in range(header.tensor_count):
            entry = self._tensor()
            if entry.name in entries:
                raise self._damaged(f"has the tensor {entry.name[:_SHOWN]!r} twice")
            entries[entry.name] = entry
        end = self._position
        self._require(0)
        alignment = header.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment < _LIMIT:
            raise self._damaged(f"has the alignment {alignment}")
        data_at = -(-end // alignment) * alignment
        return GgufContents(
            self._size, header, tuple(entries.values()), (begin, end), data_at, alignment
        )

    def layout(self) -> GgufLayout:
        found = self.contents()
        starts = sorted({found.data_at + entry.offset for entry in found.entries})
        if starts and starts[-1] >= self._size:
            raise self._cut_short(f"ends before its last weights, after {self._size} bytes")
        ends = dict(pairwise([*starts, self._size]))
        tensors = tuple(
            Tensor(name, shape, kind, ends[found.data_at + offset] - found.data_at - offset)
            for name, shape, kind, offset in found.entries
        )
        return GgufLayout(
            self._path,
            self._size,
            found.header,
            self._entries,
            tensors,
            found.entries_at,
            found.data_at,
            found.alignment,
        )

    def _tensor(self) -> TensorEntry:
        name = self._string()
        dimensions: int = self._scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._damaged(f"has a tensor of {dimensions} dimensions")
        layout = f"{self._order}{dimensions}QIQ"
        *shape, kind, offset = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return TensorEntry(name, tuple(shape), kind, offset)

    @property
    def _position(self) -> int:
        return self._start + self._at

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
            if length <= _MOST_LAYERS:
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
        return f"{self._path} {what}. It is damaged or incomplete: download it again."
