"""One `ModelManager` for each `.env` file and profile in a kernel, whoever asks for it first."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kitty_nb.catalog.resolve import load_profile

if TYPE_CHECKING:
    from collections.abc import Callable

    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import ModelManager


@dataclass(slots=True)
class _Held:
    manager: ModelManager
    owner: object


_held: dict[tuple[Path, str], _Held] = {}
_lock = threading.Lock()


def borrow(
    env: str | Path,
    profile: str,
    owner: object,
    make: Callable[[], ModelManager],
    *,
    take_over: tuple[type, ...] = (),
) -> ModelManager:
    """Return the kernel's manager of a profile.

    Args:
        env: The `.env` file.
        profile: The profile.
        owner: Who closes the manager, by `let_go`, if it has to be made.
        make: Makes one where there is none, or only one that was closed.
        take_over: From now on it is for `owner` to close, if it was for one of these before.
    """
    key = Path(env).absolute(), profile.lower()
    with _lock:
        held = _held.get(key)
        if held is None or held.manager.closed:
            held = _held[key] = _Held(make(), owner)
            held.manager.env = env  # the settings may be what was usable of it
        elif isinstance(held.owner, take_over):
            held.owner = owner
        return held.manager


def lent(env: str | Path, profile: str) -> ModelManager | None:
    """Return the kernel's manager of a profile; None where there is none, or it was let go."""
    with _lock:
        held = _held.get((Path(env).absolute(), profile))
        return held.manager if held else None


def let_go(owner: object) -> None:
    """Close the managers that are still for `owner` to close; their servers stop."""
    with _lock:
        mine = {key: held.manager for key, held in _held.items() if held.owner is owner}
        for key in mine:
            del _held[key]
    for manager in mine.values():
        manager.close()


def wanted(env: str | Path, profile: str) -> ServerConfig | None:
    """The settings to start with: those in the file, or None for those of the last start.

    The latter where the file names no model: it was picked in a panel.

    Raises:
        ConfigError: Listing every wrong setting.
    """
    config, complaint = load_profile(env, profile)
    if complaint:
        raise complaint
    return config if config.model else None
