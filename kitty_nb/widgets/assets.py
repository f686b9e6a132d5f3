"""The scripts and styles that pages load for widgets."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def asset(*names: str) -> str:
    """Return files of this folder as one text.

    A widget is not given their paths: anywidget would watch them, and never free the widget.
    """
    return "".join((_HERE / name).read_text(encoding="utf-8") for name in names)
