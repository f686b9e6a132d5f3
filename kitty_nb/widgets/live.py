"""`LiveView`: a panel drawn on one event loop, soon after a change and rarely more often."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.to_thread

from kitty_nb.widgets.display import explain

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

# Seconds. A drawing sends at most six messages; 20 a second for a whole panel stays far below
# what jupyter_server lets through.
_DRAW_EVERY = 0.25


class Task(Protocol):
    """Something under way on another thread's event loop."""

    def cancel(self) -> object:
        """End it."""


class LiveView:
    """Draws from `start` until `stop`, or until its loop ends.

    All of its arguments are called on that loop.

    Args:
        subscribe: Subscribes to what changes; returns how to unsubscribe.
        draw: Writes the widgets.
        show_error: Shows a sentence: drawing has failed, and ends.
        tick: Returns the seconds until something changes by itself, such as a clock.
        pause: Seconds between two drawings at least.
    """

    def __init__(
        self,
        subscribe: Callable[[], Callable[[], object]],
        draw: Callable[[], object],
        show_error: Callable[[str], object],
        tick: Callable[[], float],
        pause: float = _DRAW_EVERY,
    ) -> None:
        self._subscribe, self._draw = subscribe, draw
        self._show_error, self._tick, self._pause = show_error, tick, pause
        self._jobs: deque[Callable[[], object]] = deque()
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: Task | None = None

    def start(self, run: Callable[[Callable[[], Coroutine[Any, Any, None]]], Task]) -> None:
        """Begin to draw, on the loop where `run` runs a coroutine function."""
        self._task = run(self._run)

    @property
    def drawing(self) -> bool:
        """True if it has been started, and its loop has not ended."""
        return self._task is not None

    def wake(self) -> None:
        """Draw soon; callable from any thread."""
        if self._loop:
            try:
                self._loop.call_soon_threadsafe(self._changed.set)
            except RuntimeError:  # the loop is closed, so nobody else draws
                self._draw()

    def before_drawing(self, job: Callable[[], object]) -> None:
        """Call something in a worker thread once, then draw; callable from any thread."""
        if job not in self._jobs:
            self._jobs.append(job)
        self.wake()

    def stop(self) -> None:
        """Draw no more: the widgets are about to be closed."""
        task, self._task = self._task, None
        if task:
            task.cancel()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        unsubscribe = self._subscribe()
        try:
            while True:
                self._changed.clear()
                while self._jobs:
                    await anyio.to_thread.run_sync(self._jobs.popleft())
                self._draw()
                await anyio.sleep(self._pause)
                with anyio.move_on_after(self._tick()):
                    await self._changed.wait()
        except Exception as error:  # noqa: BLE001 (raised here, nobody would see it)
            self._task = None
            self._show_error(explain(error))
        finally:
            unsubscribe()
            if self._task:
                self._task = None
                self._draw()  # the loop ends, and the widgets stay
