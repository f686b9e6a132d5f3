"""Assets, labels and snapshots that all widgets share."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import traitlets
from anywidget import AnyWidget
from ipywidgets import Widget

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


_HERE = Path(__file__).parent


def asset(*names: str) -> str:
    """Return files of this folder as one text.

    A widget is not given their paths: anywidget would watch them, and never free the widget.
    """
    return "".join((_HERE / name).read_text(encoding="utf-8") for name in names)


_WHAT = "As it was when the cell ran; run the cell for the panel itself."


def still(name: str, facts: Sequence[str], table: str = "") -> str:
    """Draw a panel as plain HTML, without scripts and styles.

    Args:
        name: What the panel is of.
        facts: What to say in a line.
        table: What to show below, as HTML.
    """
    line = " · ".join(escape(fact) for fact in facts if fact)
    return f"<p><b>{escape(name)}</b> · {line}<br><small>{_WHAT}</small></p>{table}"


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
            widget.comm._reply_subshell_for = _as_sent


def _as_sent(_data: Any, default: str | None) -> str | None:
    return default


def tree(widget: Widget) -> Iterator[Widget]:
    """Yield a widget and all that belong to it: children, layouts and styles."""
    yield widget
    for value in widget.trait_values().values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Widget):
                yield from tree(part)


class Accessible(AnyWidget):
    """Gives its panel a name, roles, live regions and keys; shows nothing itself.

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
