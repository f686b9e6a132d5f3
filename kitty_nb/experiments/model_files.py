"""Which files a server reads: a fingerprint at a glance, and the SHA-256 of all of them."""

from __future__ import annotations

import hashlib
import io
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from anyio.from_thread import check_cancelled
from anyio.to_thread import run_sync
from pydantic import BaseModel, ConfigDict

from kitty_nb.catalog.folder import DigestCache, Stamp, settled, stamp_of
from kitty_nb.catalog.model import shard_paths
from kitty_nb.errors import ConfigError, ModelFileError, Problem
from kitty_nb.experiments.trial import ModelFingerprint
from kitty_nb.isolated_server import gather_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed import WriteableBuffer

    from kitty_nb.config import ServerConfig

    OnProgress = Callable[[int, int], object]

_STEP = 1 << 24  # bytes, about a hundredth of a second
_GGUF = re.compile(r"(.+\.gguf)(:[^:/]*)?", re.IGNORECASE | re.DOTALL)  # with an adapter's scale


class FileDigest(BaseModel):
    """Which file it is, whatever its folder.

    Attributes:
        name: What it is called.
        size: Its bytes.
        sha256: Of all of it, in hexadecimal digits: what the Hugging Face Hub shows too.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    size: int
    sha256: str


class ModelDigest(BaseModel):
    """Which model it is.

    Attributes:
        shards: Its own files, first to last.
        companions: The other GGUF files that the server is given: a projector, adapters, a draft
            model.
    """

    model_config = ConfigDict(frozen=True)

    shards: tuple[FileDigest, ...]
    companions: tuple[FileDigest, ...] = ()

    @property
    def name(self) -> str:
        """What its first file is called."""
        return self.shards[0].name if self.shards else ""

    @property
    def size(self) -> int:
        """Bytes of the shards."""
        return sum(shard.size for shard in self.shards)


async def digest_model(config: ServerConfig, on_progress: OnProgress | None = None) -> ModelDigest:
    """Work out which model a server with these settings serves.

    What was worked out once is remembered until a file changes. Cancelled, it ends within
    hundredths of a second, and the files that were read to their end are remembered.

    Args:
        config: What is served.
        on_progress: Called in a worker thread with the bytes that are read, and that are to be.

    Raises:
        ModelFileError: A file is missing, cannot be read, or changes meanwhile.
    """
    shards = shard_paths(config.model) if config.model else ()
    paired = (config.projector,) if config.projector else ()
    words = (part for word in config.extra_args for part in word.split(","))
    named = tuple(Path(found[1]) for word in words if (found := _GGUF.fullmatch(word)))
    digests = await run_sync(_digest, (*shards, *paired, *named), on_progress or (lambda *_: None))
    return ModelDigest(shards=digests[: len(shards)], companions=digests[len(shards) :])


def _digest(paths: tuple[Path, ...], on_progress: OnProgress) -> tuple[FileDigest, ...]:
    cache = DigestCache()
    names = [os.path.abspath(path) for path in paths]  # noqa: PTH100 - links stay links
    files = {name: _stamp(Path(name)) for name in names}
    known = cache.recall(files)
    total = sum(stamp.size for name, stamp in files.items() if name not in known)
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        check_cancelled()
        done += count
        on_progress(done, total)

    for name, stamp in files.items():
        if name not in known:
            path = Path(name)
            known[name] = _sha256(path, tell)
            if stamp_of(path) != stamp:
                raise ModelFileError(
                    f"{path} has changed while it was read. Wait until it is complete, and try"
                    " again."
                )
            if settled(path, stamp):
                cache.keep({name: (stamp, known[name])}, (), set())
    return tuple(
        FileDigest(name=Path(name).name, size=files[name].size, sha256=known[name])
        for name in names
    )


def _stamp(path: Path) -> Stamp:
    stamp = stamp_of(path)
    if stamp is None:
        raise ModelFileError(
            f"{path} is not there, or may not be looked at: which model it is cannot be told. Put"
            " it back, or give permission."
        )
    return stamp


def _sha256(path: Path, tell: Callable[[int], None]) -> str:
    try:
        with _Watched(path, tell) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read: {error.strerror or error}. Give permission, or see to the"
            " disk."
        ) from error


class _Watched(io.FileIO):
    """A file that tells, now and then and at its end, how many more bytes were read of it."""

    def __init__(self, path: Path, tell: Callable[[int], None]) -> None:
        super().__init__(path)
        self._tell = tell
        self._untold = 0

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        count = super().readinto(buffer) or 0
        self._untold += count
        if self._untold >= _STEP or count == 0:
            self._tell(self._untold)
            self._untold = 0
        return count


def fingerprint_of(model: str, config: ServerConfig) -> ModelFingerprint:
    """Look at a model on this machine. It blocks.

    Args:
        model: As trials name it.
        config: Of the sweep, which says where models are.

    Raises:
        ConfigError: It is not here.
    """
    facts = gather_facts(config.replace(model=model))
    return ModelFingerprint(facts.size, facts.digest)


def fingerprints_here(models: Iterable[str], config: ServerConfig) -> dict[str, ModelFingerprint]:
    """Look at those of the models that can be read on this machine. It blocks.

    Args:
        models: As trials name them.
        config: As for `fingerprint_of`.
    """
    found: dict[str, ModelFingerprint] = {}
    for model in dict.fromkeys(models):
        with suppress(ConfigError):
            found[model] = fingerprint_of(model, config)
    return {model: one for model, one in found.items() if one.digest}


def check_models(models: Iterable[str], config: ServerConfig) -> None:
    """Check that the models are on this machine. It blocks.

    Args:
        models: As trials name them.
        config: As for `fingerprint_of`.

    Raises:
        ConfigError: Listing those that are not.
    """
    problems: list[Problem] = []
    for model in dict.fromkeys(models):
        try:
            config.replace(model=model)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError("the sweep", tuple(problems))
