"""Events to whoever has subscribed, with a subscriber's failure being nobody else's."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

E = TypeVar("E")

_HELD = 10_000
_log = logging.getLogger(__name__)


class Broadcast(Generic[E]):
    """Calls all subscribers with each event, on the thread that tells it."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[E], object]] = []

    def subscribe(self, callback: Callable[[E], object]) -> Callable[[], None]:
        """Call back with each event until the result is called."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def tell(self, event: E) -> None:
        """Hand an event on. What a subscriber raises is logged."""
        for callback in tuple(self._subscribers):
            try:
                callback(event)
            except Exception:  # noqa: BLE001 (whatever a user's callback raises)
                _log.exception("A subscriber failed; what it was told of goes on.")

    async def stream(self) -> AsyncGenerator[E, None]:
        """Yield what is told from now on. A reader too far behind loses the newest events."""
        send, receive = anyio.create_memory_object_stream[E](_HELD)

        def offer(event: E) -> None:
            try:
                send.send_nowait(event)
            except anyio.WouldBlock:
                _log.warning("An event was dropped: a reader of the events is too slow.")

        with send, receive, ExitStack() as stack:
            stack.callback(self.subscribe(offer))
            async for event in receive:
                yield event
