"""How far the search for models is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipywidgets import HTML

if TYPE_CHECKING:
    from kitty_nb.catalog import ScanStep


class ScanLine(HTML):
    """A thin bar and a few words; hidden unless models are being read."""

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-scan")
        self.hide()

    def show(self, step: ScanStep) -> None:
        """Show a step, or hide after the last."""
        if step.done >= step.total:
            self.hide()
            return
        percent = 100 * step.done / step.total
        self.value = (
            f"<div class='kitty-scan-bar'><div style='width:{percent:.1f}%'></div></div>"
            f"Reading models: {step.done:,} of {step.total:,}"
        )
        self.layout.display = None

    def say(self, message: str) -> None:
        """Show a sentence instead."""
        self.value = message
        self.layout.display = None

    def hide(self) -> None:
        """Show nothing."""
        self.value = ""
        self.layout.display = "none"
