"""What is known of a load before it begins: which model, with which settings, from where."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kitty_nb.catalog.gguf_header import read_header, read_layout
from kitty_nb.catalog.shards import shard_paths
from kitty_nb.config import PROJECTOR, value_of
from kitty_nb.errors import ModelFileError
from kitty_nb.supervisor.page_cache import cached_share

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kitty_nb.config import ServerConfig

_DIGESTED = 1 << 18  # bytes of the header; two models that differ do so in there
_SETTINGS = {
    "context_size",
    "n_gpu_layers",
    "threads",
    "batch_size",
    "ubatch_size",
    "parallel",
    "flash_attention",
}


@dataclass(frozen=True, slots=True)
class LoadFacts:
    """A load, before it begins.

    Attributes:
        path: The model's file; of a split model the first.
        size: Bytes of all its files, a projector for images included.
        mtime_ns: When the first file was last changed, in nanoseconds since the epoch.
        digest: Hash of the first file's beginning.
        engine: Where the engine comes from; empty while it is not known.
        version: What the engine calls itself; empty while it is not known.
        host: The machine.
        settings: Those that make a load longer or shorter, as one comparable text.
        cached: Share of the bytes that are in the page cache, or None where it cannot be told.
    """

    path: str
    size: int
    mtime_ns: int
    digest: str
    engine: str
    version: str
    host: str
    settings: str
    cached: float | None


def gather_facts(config: ServerConfig) -> LoadFacts:
    """Look at the files of a load. It blocks: call it in a worker thread.

    Files that are not there, or cannot be read, count for nothing: the engine will say so.
    """
    sizes = {file: size for file in _files(config) if (size := _size(file))}
    files = tuple(sizes)
    cached = cached_share(files)  # first: reading the header changes it
    mtime_ns, digest = _fingerprint(files[0]) if files else (0, "")
    return LoadFacts(
        path=path_text(config.model),
        size=sum(sizes.values()),
        mtime_ns=mtime_ns,
        digest=digest,
        engine="",
        version="",
        host=this_host(),
        settings=_settings(config),
        cached=cached,
    )


def this_host() -> str:
    """Name the machine."""
    return f"{platform.node()} {platform.machine()}"


def path_text(model: Path | None) -> str:
    """Write a model's path as text; file names need not be text."""
    return os.fsencode(model).decode(errors="backslashreplace") if model else ""


def active_share(model: Path) -> float:
    """Return the share of the weights that a token passes through, by the model's header.

    Less than 1 for a mixture of experts; what all tokens share is left out of account.
    """
    try:
        header = read_header(model)
    except ModelFileError:
        return 1.0
    used, count = (
        header.metadata.get(f"{header.architecture}.{key}")
        for key in ("expert_used_count", "expert_count")
    )
    return used / count if isinstance(used, int) and isinstance(count, int) and count else 1.0


def header_bytes(model: Path) -> int:
    """Return the bytes before the weights; 0 where the file cannot be read."""
    try:
        return read_layout(model).data_at
    except ModelFileError:
        return 0


def _files(config: ServerConfig) -> Iterator[Path]:
    if config.model:
        yield from shard_paths(config.model)
    if config.projector:
        yield config.projector
    if named := value_of(config.extra_args, PROJECTOR):
        yield Path(named)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:
        return 0


def _fingerprint(file: Path) -> tuple[int, str]:
    try:
        with file.open("rb") as opened:
            digest = hashlib.blake2b(opened.read(_DIGESTED), digest_size=16).hexdigest()
        return file.stat().st_mtime_ns, digest
    except OSError:
        return 0, ""


def _settings(config: ServerConfig) -> str:
    settings = config.model_dump(mode="json", include=_SETTINGS, exclude_none=True)
    if config.extra_args:
        # Only a short hash, because an API key may be among them.
        words = hashlib.blake2b("\0".join(config.extra_args).encode(), digest_size=4)
        settings["extra_args"] = words.hexdigest()
    return json.dumps(settings, sort_keys=True)
