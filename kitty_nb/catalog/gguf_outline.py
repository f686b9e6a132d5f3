"""A model without its weights and its vocabulary, to ask an engine about its memory.

What llama.cpp needs for that question is the description of each tensor. Given the model itself, it
reads the whole vocabulary first, which takes longer than all the rest; and were it not ended in
time, it would go on to the weights. An outline has neither: some kilobytes, and then a hole as long
as the weights, which takes no room on disk.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, BinaryIO

from kitty_nb.catalog.gguf_contents import ArrayInfo

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kitty_nb.catalog.gguf_contents import GgufLayout

__all__ = ["write_outline"]

_UINT32, _STRING = 4, 8  # types of a value in the GGUF format


def write_outline(layouts: Iterable[GgufLayout], folder: Path) -> Path:
    """Write the outline of a model, file by file under the same names.

    Args:
        layouts: Of the model's files, first to last.
        folder: Where to write them; it must exist.

    Returns:
        The first of them.

    Raises:
        OSError: A file of the model cannot be read, or the outline cannot be written.
    """
    written = [_write(layout, folder / layout.path.name) for layout in layouts]
    return written[0]


def _write(layout: GgufLayout, path: Path) -> Path:
    order = layout.header.byte_order
    with layout.path.open("rb") as source:
        entries = [
            _range(source, *where)
            for key, where in layout.entries.items()
            if not key.startswith("tokenizer.")
        ]
        tensors = _range(source, *layout.tensors_at)
    entries += _vocabulary(layout)
    counts = struct.pack(f"{order}IQQ", layout.header.version, len(layout.tensors), len(entries))
    described = b"GGUF" + counts + b"".join(entries) + tensors
    with path.open("wb") as outline:
        outline.write(described)
        weights_at = -(-len(described) // layout.alignment) * layout.alignment
        outline.truncate(weights_at + layout.size - layout.data_at)
    return path


def _vocabulary(layout: GgufLayout) -> list[bytes]:
    """What stands for the vocabulary: that there is none, and how large it is."""
    tokens = layout.header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, ArrayInfo):
        return []
    order = layout.header.byte_order
    none = _text(order, "tokenizer.ggml.model") + struct.pack(f"{order}I", _STRING)
    entries = [none + _text(order, "no_vocab")]
    key = f"{layout.header.architecture}.vocab_size"
    if key not in layout.entries:
        entries.append(_text(order, key) + struct.pack(f"{order}II", _UINT32, tokens.length))
    return entries


def _text(order: str, text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(f"{order}Q", len(encoded)) + encoded


def _range(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)
