"""Clicks become calls of the manager; failures are shown, and doubtful starts confirmed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kitty_nb.errors import WillNotFitError
from kitty_nb.widgets.display import explain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import Operation
    from kitty_nb.supervisor.events import ServerState


class ConfirmOnce:
    """Lets a start that will not fit into memory pass when it is asked for twice.

    Args:
        remedy: How to ask again, as a sentence.
    """

    def __init__(self, remedy: str) -> None:
        self._remedy = remedy
        self._refused: ServerConfig | None = None

    def confirmed(self, config: ServerConfig) -> bool:
        """True if a start with these settings was the last to be refused."""
        return config == self._refused

    @contextmanager
    def watch(self, config: ServerConfig | None) -> Iterator[None]:
        """Remember a refusal of a start inside the block, and add the remedy to it.

        Raises:
            WillNotFitError: The refusal.
        """
        try:
            yield
        except WillNotFitError as error:
            self._refused = config
            raise WillNotFitError(f"{error} {self._remedy}") from None


class ActionRunner:
    """Runs what clicks ask for.

    Args:
        run: Runs a coroutine function on an event loop, which waits for the ends.
        show_problem: Called on any thread with what went wrong, and with None at each click.
    """

    def __init__(
        self, run: Callable[..., object], show_problem: Callable[[str | None], None]
    ) -> None:
        self._run, self._show_problem = run, show_problem
        self._confirm = ConfirmOnce("Press the button again to start anyway.")
        self._starting: Operation[ServerState] | None = None

    def run(self, action: Callable[[], Operation[ServerState]]) -> None:
        """Run an action; a start whose memory is still being checked is cancelled."""
        with self._click():
            self._run(self._follow, action(), None)

    def start(
        self, start: Callable[..., Operation[ServerState]], wanted: Callable[[], ServerConfig]
    ) -> None:
        """Start a server.

        Args:
            start: `start` or `restart` of the manager.
            wanted: Returns the settings.
        """
        with self._click():
            config = wanted()
            anyway = self._confirm.confirmed(config)
            self._starting = start(config, wait_for_ready=False, anyway=anyway)
            self._run(self._follow, self._starting, config)

    async def _follow(self, operation: Operation[ServerState], config: ServerConfig | None) -> None:
        with self._showing_failures(), self._confirm.watch(config):
            await operation

    @contextmanager
    def _click(self) -> Iterator[None]:
        self._show_problem(None)
        if self._starting is not None:
            self._starting.cancel()
        with self._showing_failures():
            yield

    @contextmanager
    def _showing_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (raised in a callback, nobody would see it)
            self._show_problem(explain(error))
