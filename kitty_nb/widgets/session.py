"""Managers, panels and clicks of a kernel: one `ModelManager` per `.env` file and profile."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from kitty_nb.catalog.resolve import load_profile
from kitty_nb.errors import WillNotFitError
from kitty_nb.manager import ModelManager
from kitty_nb.widgets.display import explain

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from kitty_nb.config import ServerConfig
    from kitty_nb.operation import Operation

T = TypeVar("T")

_managers: dict[tuple[Path, str], tuple[ModelManager, set[Hashable]]] = {}  # with their users
_lock = threading.Lock()
_panels: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()


def acquire(
    env: str | Path, profile: str, user: Hashable, config: ServerConfig | None = None
) -> ModelManager:
    """Return the kernel's manager of a profile; create one if there is none, or it is closed.

    It stays open until its last `user` calls `release`. By default, a new one has the valid
    settings of the file.
    """
    key = _key(env, profile)
    with _lock:
        manager, users = _managers.get(key, (None, set()))
        if manager is None or manager.closed:
            manager = ModelManager(config=config or load_profile(env, profile)[0])
            manager.env = env
        _managers[key] = manager, users | {user}
        return manager


def get(env: str | Path, profile: str) -> ModelManager | None:
    """Return the kernel's manager of a profile; None if nobody uses one.

    It does not wait while another one is created, which may have to connect first.
    """
    manager, _ = _managers.get(_key(env, profile), (None, None))
    return manager


def release(user: Hashable) -> None:
    """Close the managers that nobody else uses; their servers stop."""
    unused = []
    with _lock:
        for key, (manager, users) in [*_managers.items()]:
            users.discard(user)
            if not users:
                del _managers[key]
                unused.append(manager)
    for manager in unused:
        manager.close()


def _key(env: str | Path, profile: str) -> tuple[Path, str]:
    return Path(env).absolute(), profile.lower()


def config_to_start(manager: ModelManager, env: str | Path, profile: str) -> ServerConfig:
    """Read the settings to start with, or take those of the manager's last start.

    The latter apply if the file names no model: the user has chosen it in a panel.

    Raises:
        ConfigError: Settings are invalid; the error lists all of them.
    """
    config, complaint = load_profile(env, profile)
    if complaint:
        raise complaint
    chosen = config.model or config.models or config.url
    return config if chosen else manager.state.config


def succeed(panel: T, *key: Hashable) -> T | None:
    """Return the earlier panel of this kind and key, to be replaced; remember this one."""
    earlier: T | None = newest(type(panel), *key)
    _panels[type(panel).__name__, key] = panel
    return earlier


def newest(kind: type[T], *key: Hashable) -> T | None:
    """Return the panel of a kind and key whose cell ran last."""
    # By name: an instance to which traits are added gets a class of its own.
    return _panels.get((kind.__name__, key))


_SEEN_AFTER = 1.0  # seconds; until then, a press cannot be an answer to a refusal


class ActionRunner:
    """Calls the manager for clicks, shows failures, and has doubtful starts confirmed.

    Args:
        run: Runs a coroutine function on an event loop, which waits for actions to end.
        show_problem: Called on any thread with what went wrong, and with None at each click.
        remedy: How to insist on a start that will not fit, as a sentence.
    """

    refusal: str | None = None  # why the latest start was refused, if `insist` starts it anyway
    insist: Callable[[], None]  # repeats the action

    def __init__(
        self,
        run: Callable[..., object],
        show_problem: Callable[[str | None], None],
        remedy: str = "Press the button again to start anyway.",
    ) -> None:
        self._run, self._show_problem = run, show_problem
        self._remedy = remedy
        self._refused: ServerConfig | None = None  # the settings of the latest refused start
        self._refused_at = 0.0
        self._starting: Operation[Any] | None = None

    def run(
        self,
        action: Callable[..., Operation[Any]],
        wanted: Callable[[], ServerConfig] | None = None,
        *,
        insist: bool = False,
    ) -> None:
        """Run an action; a start whose memory is still being checked is cancelled.

        Args:
            action: Begins the work, such as a command of the manager.
            wanted: Returns the settings, if the action starts a server.
            insist: Whether to start even if these settings were refused last time. A second press
                does so, too, if the refusal has been on screen for a second.
        """
        self.refusal, self.insist = None, partial(self.run, action, wanted, insist=True)
        insist = insist or monotonic() - self._refused_at >= _SEEN_AFTER
        refused, self._refused = self._refused, None  # the next action alone can insist
        self._show_problem(None)
        if self._starting is not None:
            self._starting.cancel()
        with self._showing_failures():
            if wanted is None:
                self._run(self._follow, action(), None)
                return
            config = wanted()
            anyway = insist and config == refused
            self._starting = action(config, wait_for_ready=False, anyway=anyway)
            self._run(self._follow, self._starting, config)

    async def _follow(self, operation: Operation[Any], config: ServerConfig | None) -> None:
        with self._showing_failures(config):
            await operation

    @contextmanager
    def _showing_failures(self, config: ServerConfig | None = None) -> Iterator[None]:
        try:
            yield
        except WillNotFitError as error:
            self._refused, self._refused_at = config, monotonic()
            self.refusal = f"{error} {self._remedy}".rstrip()
            self._show_problem(self.refusal)
        except Exception as error:  # noqa: BLE001 (raised in a callback, nobody would see it)
            self._show_problem(explain(error))
