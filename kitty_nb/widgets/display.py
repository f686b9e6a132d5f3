"""Lines, labels, snapshots and the drawing loop that all widgets share."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import anyio
import anyio.to_thread
import traitlets
from anywidget import AnyWidget
from ipywidgets import HTML, Accordion, Button, DOMWidget, Dropdown, HBox, IntProgress, VBox, Widget

from kitty_nb.errors import KittyError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence


_HERE = Path(__file__).parent
_CARD = "display: inline-block; padding: 8px 16px; border: 1px solid #888; border-radius: 8px"
_STILL = "A snapshot from when the cell ran. Run the cell again for the live panel."


def asset(*names: str) -> str:
    """Read files of this folder as one text.

    A widget is not given their paths: anywidget would watch them, and never free the widget.
    """
    return "".join((_HERE / name).read_text(encoding="utf-8") for name in names)


class Line(HTML):
    """A piece of HTML, or nothing."""

    def __init__(self, css_class: str) -> None:
        super().__init__()
        self.add_class(css_class)
        self.write("")

    def write(self, html: str) -> None:
        """Show some HTML, or hide. Hiding keeps the HTML, so that an open fold in it stays open."""
        if html:
            self.value = html
        show_if(self, bool(html))


class Notice(Line):
    """A message in plain words; hidden while there is none."""

    def __init__(self) -> None:
        super().__init__("kitty-notice")

    def show(self, message: str | None) -> None:
        """Show a message, or hide."""
        self.write(escape(message or "").replace("\n", "<br>"))


class Meter(HBox):
    """A progress bar with a text beside it."""

    STEPS = 1000  # finer than percent, so that a long load moves visibly

    def __init__(self, css_class: str) -> None:
        self.bar = IntProgress(min=0, max=self.STEPS).add_class("kitty-bar")
        self.text = HTML().add_class("kitty-bar-text")
        super().__init__([self.bar, self.text])
        self.add_class(css_class)


class Page(AnyWidget):
    """A widget whose page sends messages.

    The contents of the page are sent as messages, too, so that neither the widget's state nor a
    saved notebook contains them.
    """

    def __init__(self, css_class: str, **traits: Any) -> None:
        super().__init__(**traits)
        self.add_class(css_class)
        self.on_msg(lambda _widget, message, _buffers: self.receive(message))

    def receive(self, message: Any) -> None:
        """Handle a message from a page, on the front end's thread."""

    def send_text(self, asker: str, text: Callable[[], str | None]) -> None:
        """Send a page the text that it asked for, to copy, or why there is none."""
        try:
            answer = {"text": text()}
        except Exception as error:  # noqa: BLE001 (raised here, the page would wait forever)
            answer = {"problem": explain(error)}
        self.send({"kind": "copy", "for": asker, **answer})


class Fold(Accordion):
    """A part that folds away under its name; several of them share a row."""

    def __init__(
        self, name: str, *parts: Widget, on_unfold: Callable[[], object] | None = None
    ) -> None:
        super().__init__([VBox(parts)], titles=(name,), selected_index=None)
        self.add_class("kitty-fold")
        if on_unfold:
            self.observe(lambda _: on_unfold(), names="selected_index")

    @property
    def unfolded(self) -> bool:
        """True if its contents are visible."""
        return self.selected_index is not None


class Choice(Dropdown):
    """A list to choose from; `on_choice` is called for choices, not for changes to the list.

    Two threads write it, for the user's choices and for changes of the list. They take turns, and
    `on_choice` is called within one: it must not wait for a thread or an event loop.
    """

    options: Any
    value: Any

    def __init__(
        self, css_class: str, label: tuple[str, str], on_choice: Callable[[Any], object]
    ) -> None:
        self.turn = threading.RLock()  # held while one of them writes
        self._filling = False
        super().__init__(**labelled(*label))
        self.add_class(css_class)
        self.observe(lambda change: self._filling or on_choice(change["new"]), names="value")

    def refill(self, options: Sequence[Any], chosen: object) -> None:
        """List other options, and choose one of them, or None, as one message to the page."""
        with self.turn:
            if (options, chosen) == (self.options, self.value):
                return
            self._filling = True
            try:
                with self.hold_sync():
                    self.index = None  # else the first of the list would be chosen in between
                    self.options, self.value = options, chosen
            finally:
                self._filling = False

    def set_state(self, sync_data: Any) -> None:
        """Apply a choice made on a page."""
        with self.turn:
            super().set_state(sync_data)


def button(word: str, icon: str, tip: str = "", style: str = "") -> Button:
    """Create a button."""
    return Button(description=word, icon=icon, tooltip=tip, button_style=style)


def show_if(widget: DOMWidget, shown: bool) -> None:
    """Show a widget, or hide it and its space."""
    widget.layout.display = None if shown else "none"


def explain(error: BaseException) -> str:
    """Describe a failure in a sentence."""
    if isinstance(error, KittyError):
        return str(error)
    return f"Internal error in kitty_nb: {error!r}. Please report this."


def duration(seconds: float) -> str:
    """Format a time span for people: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 05 min`."""
    if seconds < 9.95:  # noqa: PLR2004 (what rounds to 10 has no decimal)
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02} min" if hours else f"{minutes} min {rest:02} s"


def still(name: str, facts: Sequence[str], table: str = "") -> str:
    """Draw a snapshot of a panel as plain HTML, without scripts and style sheets."""
    line = " · ".join(escape(fact) for fact in facts if fact)
    head = f"<b>{escape(name)}</b> · {line}<br><small>{_STILL}</small>"
    return f"<div style='{_CARD}'>{head}{table}</div>"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Draw a table."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{line('th', headings)}</tr></thead><tbody>{body}</tbody></table>"


def labelled(text: str, tip: str) -> dict[str, Any]:
    """Return the keywords that give a field a label with a tooltip.

    ipywidgets shows the tooltip of a field only if the field has no label.
    """
    label = f"<span title='{escape(tip)}'>{escape(text)}</span>"
    return {"description": label, "description_allow_html": True}


def receive_while_busy(widgets: Iterable[Widget]) -> None:
    """Have these widgets' messages handled at once, even while a cell keeps the kernel busy.

    JupyterLab sends widget messages to a subshell, a second thread of the kernel. ipykernel 7.4
    routes them back to the main thread if the widget was last written from there, as every widget
    created in a cell was; this keeps them on the subshell. If ipykernel or the front end has no
    such routing, nothing changes: messages wait until the cell ends.
    """
    for widget in widgets:
        if hasattr(widget.comm, "_reply_subshell_for"):
            widget.comm._reply_subshell_for = lambda _data, default: default


def tree(widget: Widget) -> Iterator[Widget]:
    """Yield a widget and everything that belongs to it: children, layouts and styles."""
    yield widget
    for value in widget.trait_values().values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Widget):
                yield from tree(part)


class Accessible(AnyWidget):
    """The name, roles, live regions and keys of a panel, none of them visible."""

    _esm: ClassVar[str] = asset("page.js", "accessible.js")
    label: Any = traitlets.Unicode("").tag(sync=True)

    def __init__(self, label: str) -> None:
        super().__init__(label=label)
        self.add_class("kitty-accessible")


# Seconds. A drawing sends at most six messages; 20 a second for a whole panel stays far below
# what jupyter_server lets through.
_DRAW_EVERY = 0.25


class Task(Protocol):
    """Work in progress on another thread's event loop."""

    def cancel(self) -> object:
        """Cancel the work."""


class LiveView:
    """A drawing loop, from `start` until `stop` or until its event loop ends.

    It draws soon after a change, and after each `tick`, with a `pause` in between. All functions
    given to it are called on that event loop. It can be started again, on another one.

    Args:
        draw: Writes the widgets, at once or as a coroutine function.
        show_error: Shows a sentence when drawing has failed, which ends the loop.
        tick: Returns the seconds until something changes by itself, such as a clock.
        pause: The minimum number of seconds between two drawings.
        subscribe: Subscribes to changes; returns a function that unsubscribes.
    """

    def __init__(
        self,
        draw: Callable[[], Coroutine[Any, Any, object] | None],
        show_error: Callable[[str], object],
        tick: Callable[[], float],
        pause: float = _DRAW_EVERY,
        subscribe: Callable[[], Callable[[], object]] = lambda: lambda: None,
    ) -> None:
        self._draw, self._show_error, self._tick = draw, show_error, tick
        self._pause, self._subscribe = pause, subscribe
        self._jobs: deque[Callable[[], object]] = deque()
        self._changed: asyncio.Event
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: Task | None = None

    def start(self, run: Callable[[Callable[[], Coroutine[Any, Any, None]]], Task]) -> None:
        """Begin to draw, on the loop where `run` runs a coroutine function."""
        self._task = run(self._run)

    @property
    def drawing(self) -> bool:
        """True if it has been started, and its loop has not ended."""
        return self._task is not None

    @property
    def changed(self) -> bool:
        """True if something has changed since the latest drawing began."""
        return self._changed.is_set()

    def wake(self) -> None:
        """Draw soon; callable from any thread."""
        if self._loop:
            try:
                self._loop.call_soon_threadsafe(self._changed.set)
            except RuntimeError:  # the loop is closed, so nobody else draws
                self._draw_last()

    def before_drawing(self, job: Callable[[], object]) -> None:
        """Call a job once in a worker thread, then draw; callable from any thread."""
        if job not in self._jobs:
            self._jobs.append(job)
        self.wake()

    def stop(self) -> None:
        """Stop drawing: the widgets are about to be closed."""
        task, self._task = self._task, None
        if task:
            task.cancel()

    async def _run(self) -> None:
        self._changed = asyncio.Event()  # before the loop: `wake` sets it there
        self._loop = asyncio.get_running_loop()
        unsubscribe = self._subscribe()
        try:
            while True:
                self._changed.clear()
                while self._jobs:
                    await anyio.to_thread.run_sync(self._jobs.popleft())
                if drawing := self._draw():
                    await drawing
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
                self._draw_last()  # the loop ends, and the widgets stay

    def _draw_last(self) -> None:
        if drawing := self._draw():
            drawing.close()  # no loop runs it
