"""The line that says what a ready server is doing, and its chart of the last ten minutes."""

from __future__ import annotations

import time
from collections import deque
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from kitty_nb.supervisor.events import ServerStatus, StateChanged, Working
from kitty_nb.widgets.display import LiveView, Page, asset
from kitty_nb.widgets.server_view import describe_reading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kitty_nb.manager import ModelManager
    from kitty_nb.supervisor.events import Work

    Point = tuple[float, float, int]

SHOWN = 600.0  # seconds
_POINT_EVERY, _MEMORY_EVERY = 2.0, 10.0  # seconds
_MIB = 1 << 20


def describe_work(work: Work) -> str:
    """Describe what a server is doing: `2 of 4 slots · reading the prompt · 62 % · 3 s left`."""
    words = []
    if work.busy and work.slots:
        words.append(f"{work.busy} of {work.slots} slots")
    if work.reading:
        words.append(describe_reading(work.reading))
    if work.tokens_per_second:
        words.append(f"{work.tokens_per_second:.1f} tok/s")
    if words and work.cached is not None:
        words.append(f"cache hits {work.cached * 100:.0f} %")
    if words and work.accepted is not None:
        words.append(f"drafts accepted {work.accepted * 100:.0f} %")
    if not words and work.restored:
        words.append(f"prompt of {work.restored}")
    return " · ".join(words)


class LiveLine(Page):
    """A ready server's work, in words and as a chart; hidden until it does something.

    All of it is kept here for a page that opens later.
    """

    _esm: ClassVar[str] = asset("page.js", "live_line.js")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__("kitty-live")
        self.words, self.shown = "", False
        self._clock = clock
        self._points: deque[Point] = deque(maxlen=int(SHOWN / _POINT_EVERY))
        self._memory, self._measured_at = 0, -inf
        self._view: LiveView | None = None

    @property
    def points(self) -> tuple[Point, ...]:
        """Seconds of the clock, tokens a second and MiB of memory, oldest first."""
        return tuple(self._points)

    def watch(self, manager: ModelManager, show_error: Callable[[str], object]) -> None:
        """Follow a manager's server until `stop`, several times a second while it works."""

        async def look() -> None:
            state, work = manager.state, manager.work
            ready = state.status is ServerStatus.READY
            if ready and self._clock() - self._measured_at >= _MEMORY_EVERY:
                self._measured_at = self._clock()
                use = await manager.stats.memory_use()
                self._memory = use.resident + (use.gpu or 0) if use else 0
            self.show(work, self._memory, ready=ready)

        def subscribe() -> Callable[[], object]:
            return manager.subscribe(
                lambda event: view.wake() if isinstance(event, Working | StateChanged) else None
            )

        view = LiveView(look, show_error, lambda: _POINT_EVERY, subscribe=subscribe)
        view.start(manager.run)
        self._view = view

    def stop(self) -> None:
        """Follow no more."""
        if self._view:
            self._view.stop()

    def show(self, work: Work, memory: int, *, ready: bool) -> None:
        """Show what the server does, and the bytes that it holds, in a chart of one ready time."""
        before, begins = (self.words, self.shown), False
        if not ready:
            self._points.clear()
            self.words, self.shown = "", False
        else:
            now = self._clock()
            words = describe_work(work)
            begins = bool(words) and not self.shown
            self.shown = self.shown or begins
            self.words = words or ("idle" if self.shown else "")
            if not self._points or now - self._points[-1][0] >= _POINT_EVERY:
                self._points.append((now, work.tokens_per_second or 0.0, memory // _MIB))
                if self.shown and not begins:
                    self._tell(self.points[-1:])
        if begins or (not ready and before[1]):
            self._tell(self.points, anew=True)
        elif self.words != before[0]:
            self._tell()

    def receive(self, message: Any) -> None:
        """Take a message of a page."""
        match message:
            case {"kind": "replay"} if self.shown:
                self._tell(self.points, anew=True)

    def _tell(self, points: Sequence[Point] = (), *, anew: bool = False) -> None:
        told = [(round(at, 1), round(pace, 2), memory) for at, pace, memory in points]
        self.send({"words": self.words, "shown": self.shown, "points": told, "anew": anew})
