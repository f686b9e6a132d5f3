"""Assets, labels, notices and snapshots that all widgets share."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import traitlets
from anywidget import AnyWidget
from ipywidgets import HTML, DOMWidget, Widget

from kitty_nb.errors import KittyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


_HERE = Path(__file__).parent
_STILL = "A snapshot from when the cell ran. Run the cell again for the live panel."


def asset(*names: str) -> str:
    """Read files of this folder as one text.

    A widget is not given their paths: anywidget would watch them, and never free the widget.
    """
    return "".join((_HERE / name).read_text(encoding="utf-8") for name in names)


class Notice(HTML):
    """A message in plain words; hidden while there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-notice")
        self.show(None)

    def show(self, message: str | None) -> None:
        """Show a message, or hide."""
        self.value = escape(message or "").replace("\n", "<br>")
        show_if(self, bool(message))


def show_if(widget: DOMWidget, shown: bool) -> None:
    """Show a widget, or hide it and its space."""
    widget.layout.display = None if shown else "none"


def explain(error: BaseException) -> str:
    """Describe a failure in a sentence."""
    if isinstance(error, KittyError):
        return str(error)
    return f"Internal error in kitty_nb: {error!r}. Please report this."


def still(name: str, facts: Sequence[str], table: str = "") -> str:
    """Draw a snapshot of a panel as plain HTML, without scripts and styles.

    Args:
        name: The panel's name.
        facts: What the first line says.
        table: HTML to show below.
    """
    line = " · ".join(escape(fact) for fact in facts if fact)
    return f"<p><b>{escape(name)}</b> · {line}<br><small>{_STILL}</small></p>{table}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Draw a table."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{line('th', headings)}</tr></thead><tbody>{body}</tbody></table>"


def receive_while_busy(widgets: Iterable[Widget]) -> None:
    """Let these widgets' messages be handled at once, also while a cell keeps the kernel busy.

    JupyterLab sends widget messages to a subshell, a second thread of the kernel. ipykernel 7.4
    routes them back to the main thread when the widget was last written from there, as every
    widget made in a cell was; this keeps them on the subshell. Where ipykernel or the front end
    has no such routing, nothing is changed: messages wait until the cell ends.
    """
    for widget in widgets:
        if hasattr(widget.comm, "_reply_subshell_for"):
            widget.comm._reply_subshell_for = lambda _data, default: default


def tree(widget: Widget) -> Iterator[Widget]:
    """Yield a widget and all that belong to it: children, layouts and styles."""
    yield widget
    for value in widget.trait_values().values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Widget):
                yield from tree(part)


class Accessible(AnyWidget):
    """Name, roles, live regions and keys of a panel; nothing of it is visible.

    Args:
        label: The name of the panel.
    """

    _esm: ClassVar[str] = asset("accessible.js")
    label: Any = traitlets.Unicode("").tag(sync=True)

    def __init__(self, label: str) -> None:
        super().__init__(label=label)
        self.add_class("kitty-accessible")


def labelled(text: str, tip: str) -> dict[str, Any]:
    """Return the keywords that give a field a label with a tooltip.

    ipywidgets shows the tooltip of a field only where the field has no label.
    """
    label = f"<span title='{escape(tip)}'>{escape(text)}</span>"
    return {"description": label, "description_allow_html": True}
