"""Draft models: smaller models with the same vocabulary, found by their headers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple, Self

from kitty_nb.catalog.cache import FileCache, signature_of
from kitty_nb.catalog.gguf import ArrayInfo, read_header
from kitty_nb.catalog.model import shard_paths, total_size
from kitty_nb.catalog.stores import find_files
from kitty_nb.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_FEWER = 128  # tokens: llama.cpp's limit on the difference of two vocabularies
_SMALLER = 2  # times; a larger draft model would take longer than it saves


class Vocabulary(NamedTuple):
    """A tokenizer, as far as it decides whether two models share their tokens."""

    length: int  # how many tokens it has
    digest: str  # of its kind and its tokens, but for the last, which only pad some models' lists

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` writes.

        Raises:
            ValueError: It is something else.
        """
        length, digest = text.split()
        return cls(int(length), digest)

    def __str__(self) -> str:
        return f"{self.length} {self.digest}"

    def matches(self, other: Vocabulary) -> bool:
        """Tell whether llama.cpp takes two models with these vocabularies together."""
        return self.digest == other.digest and abs(self.length - other.length) <= _FEWER


_NONE = Vocabulary(0, "none")


def find_drafts(model: Path, folders: Sequence[Path]) -> list[Path]:
    """List the models in and below folders that can draft for another, smallest first."""
    files = (file.path for folder in folders for file in find_files(folder) if file.signature)
    limit = total_size(model) // _SMALLER
    sizes = {
        path: size
        for path in files
        if path == shard_paths(path)[0] and (size := total_size(path)) <= limit
    }
    known = _vocabularies([model, *sizes])
    own = known[model]
    fitting = [path for path in sizes if own != _NONE and known[path].matches(own)]
    return sorted(fitting, key=lambda path: (sizes[path], path))


def can_draft(draft: Path, model: Path) -> bool:
    """Tell whether two models have the same vocabulary, whatever their sizes."""
    known = _vocabularies([draft, model])
    return known[draft] != _NONE and known[draft].matches(known[model])


def _vocabularies(paths: Sequence[Path]) -> dict[Path, Vocabulary]:
    """Read the vocabularies of files, those that have changed since they were read last."""
    signatures = {str(path): signature for path in paths if (signature := signature_of(path))}
    cache = FileCache("vocabulary 1", Vocabulary.parse, str)
    known = cache.recall(signatures)
    new = {str(path): _read(path) for path in paths if str(path) not in known}
    lasting = {
        name: (signature, new[name])
        for name, signature in signatures.items()
        if name in new and not signature.racily_fresh
    }
    if lasting:
        cache.keep(lasting)
    return {path: (known | new)[str(path)] for path in paths}


def _read(path: Path) -> Vocabulary:
    try:
        header = read_header(path)
        tokens = header.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, ArrayInfo) or not header.tensors:
            return _NONE
        with path.open("rb") as file:
            file.seek(tokens.span.start)
            text = file.read(len(tokens.span))
    except (ModelFileError, OSError):  # the catalog says what is wrong with it
        return _NONE
    kind = header.text("tokenizer.ggml.model") or ""
    return Vocabulary(tokens.length, hashlib.sha256(kind.encode() + b"\0" + text).hexdigest())
