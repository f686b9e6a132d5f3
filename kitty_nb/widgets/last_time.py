"""The settings that a model was last used with, to be used again."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ipywidgets import HTML, Button, HBox

if TYPE_CHECKING:
    from kitty_nb.catalog.model_note import ModelNote
    from kitty_nb.widgets.settings_form import SettingsForm


class LastTime(HBox):
    """An offer; hidden where there is none, or the form says the same.

    Args:
        form: Where the settings go.
    """

    def __init__(self, form: SettingsForm) -> None:
        self._form = form
        self._note: ModelNote | None = None
        self.text = HTML()
        self.use = Button(description="Use these", tooltip="Put them into the fields below")
        self.use.on_click(lambda _: self._note and self._form.apply(self._note.settings))
        super().__init__([self.text, self.use])
        self.add_class("kitty-last-time")
        self.show(None)

    def show(self, note: ModelNote | None) -> None:
        """Offer what a model was used with."""
        used = note if note and note.last_used else None
        others = self._form.differing(used.settings) if used else []
        self._note = used
        self.text.value = f"Last time: {escape(' · '.join(others))}" if others else ""
        self.layout.display = None if others else "none"
