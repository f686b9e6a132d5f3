"""What a server does and has done: its work now, its finished requests, its log."""

from __future__ import annotations

import re
import time
from collections import deque
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from ipywidgets import Output

from kitty_nb.supervisor.events import Level, ServerStatus, StateChanged, Working
from kitty_nb.widgets.display import Fold, LiveView, Page, asset, duration
from kitty_nb.widgets.server_view import describe_reading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kitty_nb.manager import ModelManager
    from kitty_nb.supervisor.events import Activity, Request, Work

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
        words.append(f"{work.tokens_per_second:,.1f} tok/s")
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
        self._pid: int | None = None  # of the server that it was measured of
        self._view: LiveView | None = None

    @property
    def points(self) -> tuple[Point, ...]:
        """Seconds of the clock, tokens per second and MiB of memory, oldest first."""
        return tuple(self._points)

    def watch(self, manager: ModelManager, show_error: Callable[[str], object]) -> None:
        """Follow a manager's server until `stop`, several times a second while it works."""

        async def look() -> None:
            state, work = manager.state, manager.work
            ready = state.status is ServerStatus.READY
            if state.pid != self._pid:  # the memory was another server's
                self._pid, self._memory, self._measured_at = state.pid, 0, -inf
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
        """Stop following."""
        if self._view:
            self._view.stop()

    def show(self, work: Work, memory: int, *, ready: bool) -> None:
        """Show a server's work, and its memory in bytes; while it is not ready, clear the chart."""
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
        """Handle a message from a page."""
        match message:
            case {"kind": "replay"} if self.shown:
                self._tell(self.points, anew=True)

    def _tell(self, points: Sequence[Point] = (), *, anew: bool = False) -> None:
        told = [(round(at, 1), round(pace, 2), memory) for at, pace, memory in points]
        self.send({"words": self.words, "shown": self.shown, "points": told, "anew": anew})


def request_row(request: Request) -> dict[str, Any]:
    """Format a request for people; the page formats `at` by its own clock."""

    def told(value: float | None, text: Callable[[float], str]) -> str:
        return "" if value is None else text(value)

    return {
        "at": request.at,
        "model": request.model,
        "prompt": told(request.prompt_tokens, "{:,}".format),
        "answer": told(request.answer_tokens, "{:,}".format),
        "first": told(request.first_token, duration),
        "speed": told(request.tokens_per_second, "{:,.1f} tok/s".format),
        "cached": told(request.cached, "{:.0%}".format),
        "accepted": told(request.accepted, "{:.0%}".format),
        "took": told(request.seconds, duration),
        "ended": request.ended.value,
        "error": request.error,
    }


class RequestsTable(Fold):
    """The requests since the server's start, by any client, without their contents."""

    def __init__(self, on_unfold: Callable[[], object]) -> None:
        self.rows = RequestRows(on_unfold)
        super().__init__("Requests", self.rows, on_unfold=on_unfold)

    def show(self, requests: Sequence[Request]) -> None:
        """Show requests, given oldest first."""
        if self.unfolded:
            self.rows.show(requests)


class RequestRows(Page):
    """The rows of the table.

    Args:
        on_replay_asked: Called, on the front end's thread, when `show` has all rows to send.
    """

    _esm: ClassVar[str] = asset("page.js", "requests_table.js")

    def __init__(self, on_replay_asked: Callable[[], object]) -> None:
        super().__init__("kitty-requests")
        self._on_replay_asked = on_replay_asked
        self._sent: Sequence[Request] | None = None

    def show(self, requests: Sequence[Request]) -> None:
        """Send the rows to the pages if they have changed."""
        if requests != self._sent:
            self._sent = requests
            self.send({"kind": "rows", "rows": [request_row(one) for one in reversed(requests)]})

    def receive(self, message: Any) -> None:
        """Handle a message from a page."""
        match message:
            case {"kind": "replay"}:
                self._sent = None
                self._on_replay_asked()


_ACTIVITIES_KEPT = 200
_COUNTED = re.compile(r".+…(?= \()")
_COLOURS = {Level.SUCCESS: "\x1b[32m", Level.WARNING: "\x1b[33m", Level.ERROR: "\x1b[31m"}


class ActivityLog(Output):
    """The newest activities.

    The text is assigned whole: capturing prints with `with output:` is unreliable off the main
    thread, and appending sends a message whose size grows with all that came before.

    Attributes:
        activities: The activities that are shown, oldest first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-activity")
        self.activities: deque[Activity] = deque(maxlen=_ACTIVITIES_KEPT)
        self._changed = False

    @property
    def lines(self) -> tuple[str, ...]:
        """The messages, oldest first."""
        return tuple(activity.message for activity in tuple(self.activities))

    def append(self, activity: Activity) -> None:
        """Add an activity, on any thread; it is shown by the next `flush`.

        One that only updates a count, as in `Loading model… (12/120, 11s elapsed)`, replaces the
        last.
        """
        counted = _COUNTED.match(activity.message)
        if counted and self.activities and self.activities[-1].message.startswith(counted[0]):
            self.activities.pop()
        self.activities.append(activity)
        self._changed = True

    def flush(self) -> None:
        """Show what has been added, as one message."""
        if self._changed:
            self._changed = False
            text = "".join(map(_line, tuple(self.activities)))
            self.outputs = ({"output_type": "stream", "name": "stdout", "text": text},)


def _line(activity: Activity) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(activity.at))
    message = activity.message.replace("\n", "\n          ")
    colour = _COLOURS.get(activity.level)
    return f"{clock}  {colour}{message}\x1b[0m\n" if colour else f"{clock}  {message}\n"


LINES_KEPT = 2000


class ServerLog(Page):
    """Log lines; the page follows or pauses, filters and copies.

    Messages contain only new lines, and number them: a page that opens later, or misses some, asks
    for a replay, a message with all that are kept.

    Args:
        on_replay_asked: Called, on the front end's thread, when a page asks for all lines, so that
            `flush` has something to do.
    """

    _esm: ClassVar[str] = asset("page.js", "clipboard.js", "server_log.js")
    # The style of the whole panel, only here: each widget with it adds a copy to saved notebooks.
    _css: ClassVar[str] = asset("panel.css")

    def __init__(self, on_replay_asked: Callable[[], object]) -> None:
        super().__init__("kitty-log-box")
        self._kept: deque[str] = deque(maxlen=LINES_KEPT)
        self._count = 0
        self._sent = 0
        self._on_replay_asked = on_replay_asked

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines that a page opened now would show."""
        return tuple(self._kept)

    def append(self, lines: Sequence[str]) -> None:
        """Add lines; they are shown by the next `flush`."""
        self._kept.extend(lines)
        self._count += len(lines)

    def clear(self) -> None:
        """Forget all lines: another server's log begins."""
        self._kept.clear()
        self._sent = self._count
        self.send({"kind": "clear", "next": self._count})

    def flush(self) -> None:
        """Send what has not been sent yet, as one message."""
        fresh = min(self._count - self._sent, len(self._kept))
        self._sent = self._count  # before it is sent: a page may ask for a replay meanwhile
        if fresh:
            lines, whole = list(self._kept)[-fresh:], fresh == len(self._kept)
            first = self._count - fresh
            self.send({"kind": "lines", "first": first, "lines": lines, "whole": whole})

    def receive(self, message: Any) -> None:
        """Handle a message from a page."""
        match message:
            case {"kind": "replay"}:
                self._sent = 0
                self._on_replay_asked()
