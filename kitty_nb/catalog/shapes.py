"""The shapes of many models, remembered until their files change."""

from __future__ import annotations

import json
import os
from dataclasses import astuple
from typing import TYPE_CHECKING

import platformdirs

from kitty_nb.catalog.folder import stamp_of, too_young
from kitty_nb.catalog.model_shape import Layer, ModelShape, read_shape
from kitty_nb.catalog.scan_cache import FileCache, Stamp
from kitty_nb.catalog.shards import shard_paths
from kitty_nb.errors import ModelFileError
from kitty_nb.user_folders import user_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["Shapes"]

_VERSION = 2  # one higher whenever `ModelShape` changes or is worked out otherwise


def _to_json(shape: ModelShape) -> str:
    return json.dumps(astuple(shape), separators=(",", ":"))


def _from_json(text: str) -> ModelShape:
    layers, *rest = json.loads(text)
    return ModelShape(tuple(Layer(*layer) for layer in layers), *rest)


class Shapes:
    """Looks shapes up: in memory, then in a file, and at last in the models' headers.

    Args:
        cache: The SQLite file that remembers; None for one in the user's cache folder.
    """

    def __init__(self, cache: Path | None = None) -> None:
        path = cache or user_folder(platformdirs.user_cache_path) / "shapes.sqlite3"
        self._cache = FileCache(path, _VERSION, _from_json, _to_json)
        self._known: dict[str, tuple[Stamp, ModelShape]] = {}

    def look_up(self, models: Iterable[Path]) -> Iterator[tuple[Path, ModelShape | None]]:
        """Yield each model with its shape, or None where its header does not tell.

        It reads files, and may be left early: what was read until then is remembered.
        """
        stamps = {os.fspath(model): (model, _stamp(model)) for model in models}
        there = {key: stamp for key, (_, stamp) in stamps.items() if stamp}
        unknown = {
            key: stamp
            for key, stamp in there.items()
            if key not in self._known or self._known[key][0] != stamp
        }
        if unknown:
            found = self._cache.recall(unknown)
            self._known |= {key: (unknown[key], shape) for key, shape in found.items()}
        fresh: dict[str, tuple[Stamp, ModelShape]] = {}
        try:
            for key, (model, stamp) in stamps.items():
                known = self._known.get(key)
                if known is not None and known[0] == stamp:
                    yield model, known[1]
                    continue
                shape = _read(model)
                if shape and stamp and not too_young(stamp):
                    fresh[key] = self._known[key] = stamp, shape
                yield model, shape
        finally:
            if fresh:
                self._cache.keep(fresh, (), set())


def _read(model: Path) -> ModelShape | None:
    try:
        return read_shape(model)
    except ModelFileError:
        return None


def _stamp(model: Path) -> Stamp | None:
    """One stamp for all files of a model; None where one is missing."""
    stamps = [stamp_of(path) for path in shard_paths(model)]
    there = [stamp for stamp in stamps if stamp]
    if len(there) < len(stamps):
        return None
    size = sum(stamp.size for stamp in there)
    return Stamp(size, max(stamp.mtime_ns for stamp in there), there[0].inode)
