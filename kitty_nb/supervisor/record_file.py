"""Where a server's record stands, and how it is withdrawn: small, for the programs beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from kitty_nb.config import ServerConfig

RECORD = ".server.json"
_WITHDRAWN = ".leaving.json"
_FAILURE = ".failure.txt"


def record_path(config: ServerConfig) -> Path:
    """Where the record of a profile is while its server is meant to run."""
    return config.log_dir / f"{config.profile}{RECORD}"


def withdrawn_path(record: Path) -> Path:
    """Where a record is from when its server is being ended."""
    return record.with_name(record.name.removesuffix(RECORD) + _WITHDRAWN)


def failure_path(record: Path) -> Path:
    """Return where the reason of the last failure stands until the next start or stop."""
    return record.with_name(record.name.removesuffix(RECORD) + _FAILURE)


def withdraw(record: Path) -> None:
    """Say that a server is being ended. Until it has, nobody may start another one.

    Raises:
        OSError: It is not there, or its folder cannot be written.
    """
    record.replace(withdrawn_path(record))
    failure_path(record).unlink(missing_ok=True)
