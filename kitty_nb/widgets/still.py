"""A still picture of a panel, for pages where widgets cannot live, as an exported notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

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
