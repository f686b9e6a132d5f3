"""Buttons become actions: run beside the kernel, confirmed, and failures shown."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import anyio.to_thread
from ipywidgets import HTML

from kitty_nb.errors import KittyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import ModelManager, Operation
    from kitty_nb.supervisor.events import ServerState


class Notice(HTML):
    """A message in plain words; hidden while there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-notice")
        self.show(None)

    def show(self, message: str | None) -> None:
        """Show a message, or hide."""
        self.value = escape(message or "").replace("\n", "<br>")
        self.layout.display = None if message else "none"


def explain(error: BaseException) -> str:
    """Say what went wrong, in a sentence to show."""
    if isinstance(error, KittyError):
        return str(error)
    return f"Something went wrong inside kitty_nb: {error!r}. Please report it."


class SecondAsk:
    """Remembers what has been refused once.

    Args:
        again: How to ask once more, in words.
    """

    def __init__(self, again: str) -> None:
        self._again = again
        self._refused: ServerConfig | None = None

    def agree(self, config: ServerConfig, refusal: str) -> None:
        """Let these settings pass, or refuse them the first time.

        Args:
            config: What is to be started.
            refusal: Why that will not do, in words; empty where it may.

        Raises:
            KittyError: The refusal, and how to insist.
        """
        if refusal and config != self._refused:
            self._refused = config
            raise KittyError(f"{refusal} To start it all the same, {self._again}.")


class Clicks:
    """Does what clicks ask; a later one calls off what an earlier one has not begun.

    Args:
        manager: It does it, on its own loop.
        tell: Called with what went wrong, and with None at each click; never on that loop.
    """

    def __init__(self, manager: ModelManager, tell: Callable[[str | None], None]) -> None:
        self._manager, self._tell = manager, tell
        self._second_ask = SecondAsk("press the button again")
        self._following: Operation[None] | None = None

    def act(self, action: Callable[[], Awaitable[ServerState]]) -> None:
        """Do what a click asks; whatever goes wrong is told."""
        self._tell(None)
        if self._following is not None:
            self._following.cancel()  # a start that still asks for memory must not follow a stop
        try:
            self._following = self._manager.run(self._follow, action())
        except Exception as error:  # noqa: BLE001 (raised here, nobody would see it)
            self._tell(explain(error))

    def launch(
        self, launch: Callable[..., Operation[ServerState]], config: ServerConfig
    ) -> Awaitable[ServerState]:
        """Launch a server by a method of the manager; one that will not fit on a second ask only.

        Raises:
            KittyError: The manager is closed.
        """
        refusal = self._manager.refusal(config)

        async def agreed() -> ServerState:
            self._second_ask.agree(config, await refusal)
            # In a thread: the manager takes no orders on its own loop.
            operation = await anyio.to_thread.run_sync(
                lambda: launch(config, wait_for_ready=False, anyway=True)
            )
            return await operation

        return agreed()

    async def _follow(self, action: Awaitable[ServerState]) -> None:
        try:
            await action
        except Exception as error:  # noqa: BLE001 (as above)
            await anyio.to_thread.run_sync(self._tell, explain(error))
