"""The SHA-256 of whole files, worked out once for as long as a file stays as it is."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anyio.from_thread import check_cancelled

from kitty_nb.catalog.folder import DigestCache, Stamp, settled, stamp_of
from kitty_nb.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Callable

_STEP = 1 << 24  # bytes, about a hundredth of a second


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file, whatever its folder.

    Attributes:
        sha256: Of all of it, in hexadecimal digits, as the Hugging Face Hub shows it.
    """

    name: str
    size: int
    sha256: str


def digest_files(
    paths: tuple[Path, ...], on_progress: Callable[[int, int], object]
) -> tuple[FileDigest, ...]:
    """Work out the digests of files, in a worker thread of anyio.

    Files that have not changed since are not read again. Cancelled, it ends within hundredths of a
    second, and the files that were read to their end are remembered.

    Args:
        paths: The files.
        on_progress: Called with the bytes that are read, and that are to be.

    Raises:
        ModelFileError: A file is missing, cannot be read, or changes meanwhile.
    """
    cache = DigestCache()
    names = [os.path.abspath(path) for path in paths]  # noqa: PTH100 - links stay links
    stamps = {name: _stamp(Path(name)) for name in names}
    known = cache.recall(stamps)
    total = sum(stamp.size for name, stamp in stamps.items() if name not in known)
    done = 0

    def read(count: int) -> None:
        nonlocal done
        check_cancelled()
        done += count
        on_progress(done, total)

    for name in [name for name in stamps if name not in known]:
        path, stamp = Path(name), stamps[name]
        known[name] = _sha256(path, stamp.size, read)
        if stamp_of(path) != stamp:
            raise ModelFileError(
                f"{path} changed while it was read. Wait until it is complete, and try again."
            )
        if settled(path, stamp):
            cache.keep({name: (stamp, known[name])}, (), set())
    return tuple(FileDigest(Path(name).name, stamps[name].size, known[name]) for name in names)


def _stamp(path: Path) -> Stamp:
    stamp = stamp_of(path)
    if stamp is None:
        raise ModelFileError(
            f"{path} is missing, or its folder can't be read, so which model it is is not known."
            " Put it back, or check the permissions."
        )
    return stamp


def _sha256(path: Path, size: int, on_read: Callable[[int], object]) -> str:
    digest, left = hashlib.sha256(), size
    try:
        with path.open("rb") as file:
            while data := file.read(min(_STEP, left)):
                digest.update(data)
                left -= len(data)
                on_read(len(data))
    except OSError as error:
        raise ModelFileError(
            f"Can't read {path}: {error.strerror or error}. Check the file's permissions and the"
            " disk."
        ) from error
    return digest.hexdigest()
