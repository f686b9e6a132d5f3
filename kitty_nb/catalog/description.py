"""One model by its path, without a scan of the folders: what it is and which projector it has."""

from __future__ import annotations

import os
import time
from functools import lru_cache
from typing import TYPE_CHECKING

from kitty_nb.catalog.file_facts import FileFacts, Kind, read_facts
from kitty_nb.catalog.folder import FoundFile, find_files, stamp_of, too_young
from kitty_nb.catalog.projectors import is_projector_name
from kitty_nb.catalog.rows import Part, rows
from kitty_nb.catalog.shards import shard_paths
from kitty_nb.catalog.unserved import doubt, why_never

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from kitty_nb.catalog.model import Model
    from kitty_nb.catalog.scan_cache import Stamp

__all__ = ["describe", "find_projector", "why_not_served"]

_REMEMBERED = 64  # files: a setting is validated at each key that is pressed


def describe(path: Path, roots: Sequence[Path]) -> Model | None:
    """Describe the model that begins with `path`; None when it is not one to serve.

    Args:
        path: Its file, the first of a split model.
        roots: Folders that models are listed from; its name is relative to the first.
    """
    return _describe(path, roots, _near(path, roots))


def find_projector(path: Path, roots: Sequence[Path]) -> Path | None:
    """Find the projector for images or sound that goes with a model; None where there is none.

    Headers are read only if there is a projector nearby.
    """
    near = _near(path, roots)
    model = _describe(path, roots, near) if near else None
    return model.projector if model else None


def why_not_served(path: Path) -> str | None:
    """Say what a file is that is no model to serve; None of any other, also where it is damaged."""
    facts = [read_facts(shard) for shard in shard_paths(path)]
    if any(each.problem for each in facts):
        return None
    reason = why_never(path, facts[0], sum(each.tensor_count for each in facts))
    return reason or doubt(path, facts[0], dict(facts[0].weights))


def _describe(path: Path, roots: Sequence[Path], near: Iterable[Path]) -> Model | None:
    shards = shard_paths(path)
    found = [FoundFile(shard, stamp_of(shard)) for shard in shards]
    if len(found) > 1:
        found = [file for file in found if file.stamp] or found[:1]
    own = {file.path: Part(file, _facts(file)) for file in found}
    parts = {**dict(_beside(near)), **own}
    listed = rows(parts.values(), roots[0] if roots else path.parent, time.time())
    row = next(row for row in listed if row.path == shards[0])
    return row if row.kind is Kind.MODEL else None


def _near(path: Path, roots: Sequence[Path]) -> list[Path]:
    """List the folders that may have its projector: its own and, in a root, the one above."""
    own, above = path.parent, path.parent.parent
    folders = [own, above] if any(above.is_relative_to(root) for root in roots) else [own]
    return [folder for folder in folders if any(map(is_projector_name, _gguf_in(folder)))]


def _beside(folders: Iterable[Path]) -> Iterator[tuple[Path, Part]]:
    """Yield projectors with what they say; of all else the name is enough."""
    for folder in folders:
        for file in find_files(folder):
            known = is_projector_name(file.path) and file.stamp
            yield file.path, Part(file, _facts(file) if known else None)


def _gguf_in(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in os.listdir(folder) if name.lower().endswith(".gguf")]  # noqa: PTH208 - no object for each name
    except OSError:
        return []


def _facts(file: FoundFile) -> FileFacts:
    if file.stamp and not too_young(file.stamp):
        facts = _facts_at(file.path, file.stamp)
        if facts.problem is None:
            return facts
    return read_facts(file.path)


@lru_cache(_REMEMBERED)
def _facts_at(path: Path, stamp: Stamp) -> FileFacts:
    """Read a file once for each of its stamps."""
    return read_facts(path)
