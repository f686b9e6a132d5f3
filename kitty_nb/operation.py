"""Work in progress on a manager's thread, to await, wait for, cancel or iterate."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import nest_asyncio2

from kitty_nb.client.conversation import as_messages
from kitty_nb.errors import WaitTimeoutError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator

    from kitty_nb.client import Piece
    from kitty_nb.client.conversation import Messages
    from kitty_nb.supervisor.events import LoadProgress
    from kitty_nb.supervisor.prompt_keeper import Pin

T = TypeVar("T")


class Operation(Generic[T]):
    """Work in progress on the supervisor's thread.

    `await` it in a cell, or `wait` for it. Neither ending the wait nor dropping this object ends
    the work; `cancel` does.
    """

    def __init__(
        self, future: Future[T], progress: Callable[[], LoadProgress | None] = lambda: None
    ) -> None:
        self._future = future
        self._progress = progress

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()

    def __repr__(self) -> str:
        return f"Operation(done={self.done})"

    def wait(self, timeout: float | None = None) -> T:
        """Block until the result is available, and return it.

        In a cell, the kernel's own tasks continue meanwhile.

        Args:
            timeout: Seconds, or None to wait as long as it takes.

        Raises:
            WaitTimeoutError: It is not done in time; it continues.
            KittyError: The operation's own error.
        """
        _wait(self._future, timeout)
        if not self._future.done():
            raise WaitTimeoutError(f"Not done after {timeout} s; it continues in the background.")
        return self._future.result()

    def cancel(self) -> None:
        """Cancel it. A cancelled start stops its server."""
        self._future.cancel()

    @property
    def done(self) -> bool:
        """True if it has ended, whatever the result."""
        return self._future.done()

    @property
    def progress(self) -> LoadProgress | None:
        """The progress of the current load; None before the first."""
        return self._progress()


def _wait(future: Future[Any], timeout: float | None = None) -> None:
    """Block until a future is done; in a cell, the kernel's own tasks continue meanwhile."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        wait_for([future], timeout)
    else:
        nest_asyncio2.apply(loop)
        waiting = asyncio.wrap_future(future)
        # Its error is raised elsewhere; asyncio would report it again as never retrieved.
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        loop.run_until_complete(asyncio.wait([waiting], timeout=timeout))


class Pieces:
    """The pieces of an answer, as a chain: each is a future until it arrives.

    The manager's thread adds pieces; whichever thread cancels the answer ends the chain.
    """

    def __init__(self, on_piece: Callable[[Piece], object] | None = None) -> None:
        self._on_piece = on_piece
        self.first: Future[Any] = Future()
        self._last: Future[Any] | None = self.first  # None once the chain has ended
        self._lock = Lock()

    def add(self, piece: Piece) -> None:
        """Add a piece, and pass it to the callback; ignore it once the chain has ended."""
        following: Future[Any] = Future()
        if last := self._replace_last(following):
            last.set_result((piece, following))
            if self._on_piece:
                self._on_piece(piece)

    def end(self) -> None:
        """End the chain: there are no more pieces."""
        if last := self._replace_last(None):
            last.set_result(None)

    def _replace_last(self, following: Future[Any] | None) -> Future[Any] | None:
        """Return the last link, for the caller to resolve; None once the chain has ended."""
        with self._lock:
            last = self._last
            self._last = last and following
        return last


class Chat(Operation[T]):
    """An answer in progress: await it, wait for it, or iterate over its pieces.

    The model stops when nobody wants the rest: when an `await` is interrupted, or a loop over the
    pieces is left early.
    """

    def __init__(
        self, future: Future[T], progress: Callable[[], LoadProgress | None], pieces: Pieces
    ) -> None:
        super().__init__(future, progress)
        self._pieces = pieces
        future.add_done_callback(lambda _: pieces.end())

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self._future).__await__()

    def __iter__(self) -> Iterator[Piece]:
        link = self._pieces.first
        try:
            while True:
                _wait(link)
                if link.result() is None:
                    break
                piece, link = link.result()
                yield piece
            self.wait()
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        link = self._pieces.first
        try:
            while found := await asyncio.shield(asyncio.wrap_future(link)):
                piece, link = found
                yield piece
            await self
        finally:
            self.cancel()


class Pinned:
    """A text to ask questions about: `with manager.pinned("manual.txt", text) as manual:`.

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
        """Its length, and the time it took; this waits until both are known.

        Raises:
            KittyError: The server is not ready, keeps no prompts, or refused the text.
        """
        return self._operation.wait()

    def chat(self, messages: Messages, *args: Any, **options: Any) -> Chat[Any]:
        """Ask about the text, as `ModelManager.chat` does without it."""
        return self._chat([*self.messages, *as_messages(messages)], *args, **options)
