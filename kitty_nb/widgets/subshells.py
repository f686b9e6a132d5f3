"""Clicks that arrive while a cell blocks the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ipywidgets import Widget


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
