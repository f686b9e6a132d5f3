"""The reason why a profile's last server failed, for whoever asks when nothing watches."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from kitty_nb.supervisor.record_file import failure_path, record_path
from kitty_nb.trust import distrust

if TYPE_CHECKING:
    from kitty_nb.config import ServerConfig


def note_failure(config: ServerConfig, reason: str) -> None:
    """Keep the reason until the next start, or until the server is stopped."""
    path = failure_path(record_path(config))
    with suppress(OSError):  # the folder may be what is wrong
        if not distrust(path.parent) and not distrust(path):
            path.write_text(reason, encoding="utf-8")


def last_failure(config: ServerConfig) -> str | None:
    """Return why the last server failed; None when it did not, or this user did not start it."""
    path = failure_path(record_path(config))
    with suppress(OSError, UnicodeDecodeError):
        return None if distrust(path) else path.read_text(encoding="utf-8")
    return None
