"""One `ModelManager` per `.env` file and profile in a kernel, shared by panels and magics."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from kitty_nb.catalog.resolve import load_profile
from kitty_nb.manager import ModelManager

if TYPE_CHECKING:
    from collections.abc import Hashable

    from kitty_nb.config import ServerConfig

    Key = tuple[Path, str]

T = TypeVar("T")

_managers: dict[Key, ModelManager] = {}
_users: dict[Key, set[Hashable]] = {}
_lock = threading.Lock()
_panels: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()


def acquire(
    env: str | Path, profile: str, user: Hashable, config: ServerConfig | None = None
) -> ModelManager:
    """Return the kernel's manager of a profile; it is made if there is none, or a closed one.

    Args:
        env: The `.env` file.
        profile: The profile.
        user: Whoever keeps the manager open until it calls `release`.
        config: Settings for a manager that is made; by default the usable ones of the file.
    """
    key = _key(env, profile)
    with _lock:
        manager = _managers.get(key)
        if manager is None or manager.closed:
            usable = config or load_profile(env, profile)[0]
            manager = _managers[key] = ModelManager(config=usable)
            manager.env = env
        _users.setdefault(key, set()).add(user)
        return manager


def get(env: str | Path, profile: str) -> ModelManager | None:
    """Return the kernel's manager of a profile; None where nobody uses one."""
    with _lock:
        return _managers.get(_key(env, profile))


def release(user: Hashable) -> None:
    """Close the managers that nobody else uses; their servers stop."""
    with _lock:
        for users in _users.values():
            users.discard(user)
        unused = [_managers.pop(key) for key, users in _users.items() if not users]
        for key in [key for key, users in _users.items() if not users]:
            del _users[key]
    for manager in unused:
        manager.close()


def config_to_start(env: str | Path, profile: str) -> ServerConfig | None:
    """Read the settings to start with; None for those of the last start.

    The latter where the file names no model: a panel's user has chosen it.

    Raises:
        ConfigError: Listing every wrong setting.
    """
    config, complaint = load_profile(env, profile)
    if complaint:
        raise complaint
    return config if config.model else None


def succeed(panel: T, *key: Hashable) -> T | None:
    """Return the earlier panel of a kind and key, whose cell is run again; remember this one."""
    earlier: T | None = newest(type(panel), *key)
    _panels[type(panel).__name__, key] = panel
    return earlier


def newest(kind: type[T], *key: Hashable) -> T | None:
    """Return the panel of a kind and key whose cell ran last."""
    # By name: where traits are added to an instance, it gets a class of its own.
    return _panels.get((kind.__name__, key))


def _key(env: str | Path, profile: str) -> Key:
    return Path(env).absolute(), profile.lower()
