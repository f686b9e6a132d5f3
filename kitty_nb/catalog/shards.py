"""The names of a split model's files: `<prefix>-00001-of-00042.gguf`, as llama.cpp writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path, PurePath

__all__ = ["ShardName", "missing_shards", "shard_paths", "total_size"]

_SHARD = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII)


@dataclass(frozen=True, slots=True)
class ShardName:
    """What the name of one shard says.

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
    return tuple(shard for shard in shard_paths(path) if _size(shard) is None)


def total_size(path: Path) -> int:
    """Add up the bytes of those files of the model that `path` belongs to which are there."""
    return sum(_size(shard) or 0 for shard in shard_paths(path))


def _size(path: Path) -> int | None:
    """Give the bytes of a file; None when it is absent or its folder may not be entered."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
