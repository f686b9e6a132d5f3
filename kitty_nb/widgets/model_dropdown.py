"""The compact choice among models."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from ipywidgets import Dropdown

from kitty_nb.widgets.accessible import labelled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kitty_nb.catalog import Model


class ModelDropdown(Dropdown):
    """Lists models by their labels; its value is the chosen one's path.

    Two threads write it: people choose, and the list changes. They take turns.

    Args:
        on_choice: Called when somebody has chosen another model; not when the list has changed.

    Attributes:
        turn: Held while one of them writes.
    """

    options: Any
    value: Any

    def __init__(self, on_choice: Callable[[], object]) -> None:
        self.turn = threading.RLock()
        self._filling = False
        self._on_choice = on_choice
        super().__init__(**labelled("Model", "Models in the models folder and elsewhere"))
        self.add_class("kitty-model")
        self.observe(lambda _change: self._filling or self._on_choice(), names="value")

    def fill(self, models: Sequence[Model], chosen: Path | None) -> None:
        """List other models, as one message to the page.

        Args:
            models: What to list.
            chosen: The one to choose; one of them, or None.
        """
        seen = Counter(model.label for model in models)
        options = tuple(
            # Models of one name in two folders are told apart by their paths.
            (model.label if seen[model.label] == 1 else f"{model.label} · {model.name}", model.path)
            for model in models
        )
        with self.turn:
            if options == self.options and chosen == self.value:
                return
            self._filling = True
            try:
                with self.hold_sync():
                    self.index = None  # else the first of the list would be chosen in between
                    self.options = options
                    self.value = chosen
            finally:
                self._filling = False

    def set_state(self, sync_data: Any) -> None:
        """Take what a page has chosen."""
        with self.turn:
            super().set_state(sync_data)
