"""Roles, labels and keys that screen readers and keyboards need and ipywidgets leaves out."""

from __future__ import annotations

from html import escape
from typing import Any, ClassVar

import traitlets
from anywidget import AnyWidget

from kitty_nb.widgets.assets import asset


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
