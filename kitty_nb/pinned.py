"""`Pinned`: a text that questions are about, which a server reads only once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from kitty_nb.operation import Chat, Operation
    from kitty_nb.supervisor.prompt_keeper import Pin


class Pinned:
    """A text that questions are about: `with manager.pinned("manual.txt", text) as manual:`.

    Entering the block, or awaiting it, waits until the server has read the text, or has restored
    what it read in an earlier kernel. It stays on disk afterwards.

    Attributes:
        messages: What conversations about the text begin with.
    """

    def __init__(
        self, text: str, operation: Operation[Pin], chat: Callable[..., Chat[Any]]
    ) -> None:
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": text}]
        self._operation, self._chat = operation, chat

    def __enter__(self) -> Self:
        self._operation.wait()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __await__(self) -> Generator[Any, None, Self]:
        yield from self._operation.__await__()
        return self

    def __repr__(self) -> str:
        return f"Pinned(done={self._operation.done})"

    @property
    def pin(self) -> Pin:
        """Its length, and the time it took; waits for it.

        Raises:
            KittyError: The server is not ready, keeps no prompts, or refused the text.
        """
        return self._operation.wait()

    def chat(self, messages: str | list[dict[str, Any]], *args: Any, **options: Any) -> Chat[Any]:
        """Ask about the text, as `ModelManager.chat` does without it."""
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self._chat([*self.messages, *asked], *args, **options)
