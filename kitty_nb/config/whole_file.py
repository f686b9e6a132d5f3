"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path


def write_whole(
    file: Path, content: bytes, *, like: Path | None = None, durable: bool = True
) -> None:
    """Write a file, whole or not at all, with the rights of another, or for its owner alone.

    Args:
        file: The file.
        content: All of it.
        like: The file whose rights it gets.
        durable: Whether it must survive a power cut; a disk takes a while to promise that.

    Raises:
        OSError: It cannot be written; what was there before is still there.
    """
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as new:
            new.write(content)
            if durable:
                new.flush()
                os.fsync(new.fileno())
        if like:
            with suppress(FileNotFoundError):
                shutil.copymode(like, name)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
