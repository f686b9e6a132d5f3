"""Widgets that belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipywidgets import Widget

if TYPE_CHECKING:
    from collections.abc import Iterator


def tree(widget: Widget) -> Iterator[Widget]:
    """Yield a widget and all that belong to it: children, layouts and styles."""
    yield widget
    for value in widget.trait_values().values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Widget):
                yield from tree(part)
