"""What is wrong and what to do, where the user looks."""

from __future__ import annotations

from html import escape

from ipywidgets import HTML

from kitty_nb.errors import KittyError


class Notice(HTML):
    """A message in plain words; hidden while there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-notice")
        self.show(None)

    def show(self, message: str | None) -> None:
        """Show a message, or hide."""
        self.value = escape(message or "").replace("\n", "<br>")
        self.layout.display = None if message else "none"


def explain(error: BaseException) -> str:
    """Say what went wrong, in a sentence to show."""
    if isinstance(error, KittyError):
        return str(error)
    return f"Something went wrong inside kitty_nb: {error!r}. Please report it."
