"""What will not fit into memory is started only when it is asked for twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kitty_nb.errors import KittyError

if TYPE_CHECKING:
    from kitty_nb.config import ServerConfig


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
