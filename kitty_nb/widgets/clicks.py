"""What clicks ask of a manager, and what becomes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio.to_thread

from kitty_nb.widgets.notice import explain
from kitty_nb.widgets.second_ask import SecondAsk

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import ModelManager, Operation
    from kitty_nb.supervisor.events import ServerState


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
            operation = await anyio.to_thread.run_sync(lambda: launch(config, wait_for_ready=False))
            return await operation

        return agreed()

    async def _follow(self, action: Awaitable[ServerState]) -> None:
        try:
            await action
        except Exception as error:  # noqa: BLE001 (as above)
            await anyio.to_thread.run_sync(self._tell, explain(error))
