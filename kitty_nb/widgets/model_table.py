"""All models in a table: to look through, to mark, to choose from."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from anywidget import AnyWidget

from kitty_nb.catalog.memory import Verdict
from kitty_nb.widgets.assets import asset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from kitty_nb.widgets.model_rows import Group

_WORDS = {Verdict.FITS: "fits", Verdict.TIGHT: "tight", Verdict.WILL_NOT_FIT: "too big"}


class ModelTable(AnyWidget):
    """A folded table with a filter.

    Rows travel as messages, once somebody has unfolded it, so neither the widget's state nor a
    saved notebook grows with them.

    Args:
        on_choose: Called, on the front end's thread, with the model of a row that was clicked.
        on_mark: Called there with a model, and whether it is a favourite from now on.
        on_open: Called there when a page wants the rows.

    Attributes:
        asked: Whether a page has ever wanted them.
    """

    _esm: ClassVar[str] = asset("model_table.js")
    asked = False

    def __init__(
        self,
        on_choose: Callable[[Path], object],
        on_mark: Callable[[Path, bool], object],
        on_open: Callable[[], object],
    ) -> None:
        super().__init__()
        self.add_class("kitty-table-box")
        self._on_choose, self._on_mark, self._on_open = on_choose, on_mark, on_open
        self._ids: dict[Path, int] = {}
        self._paths: list[Path] = []
        self._sent: Sequence[Group] | None = None
        self._fits: dict[int, str] = {}
        self.on_msg(self._receive)

    def number(self, models: Iterable[Path]) -> Mapping[Path, int]:
        """Tell what the page calls some models; each keeps its number."""
        for model in models:
            if model not in self._ids:
                self._ids[model] = len(self._paths)
                self._paths.append(model)
        return self._ids

    def show(self, groups: Sequence[Group]) -> None:
        """Show these rows, where they are others than before."""
        if groups != self._sent:
            self._sent = groups
            self.send({"kind": "rows", "groups": [asdict(group) for group in groups]})

    def show_fits(self, verdicts: Mapping[Path, Verdict]) -> None:
        """Show of some models whether they would fit into memory."""
        fits = {self._ids[path]: _WORDS.get(verdict, "") for path, verdict in verdicts.items()}
        others = {number: word for number, word in fits.items() if self._fits.get(number) != word}
        if others:
            self._fits |= others
            self.send({"kind": "fits", "fits": others})

    def show_chosen(self, model: Path | None) -> None:
        """Show which model is chosen."""
        self.send({"kind": "chosen", "id": self._ids.get(model) if model else None})

    def _receive(self, _widget: object, message: Any, _buffers: object) -> None:
        match message:
            case {"kind": "replay"}:
                self.asked, self._sent, self._fits = True, None, {}
                self._on_open()
            case {"kind": "choose", "id": int(number)} if number < len(self._paths):
                self._on_choose(self._paths[number])
            case {"kind": "mark", "id": int(number), "favourite": bool(favourite)} if number < len(
                self._paths
            ):
                self._on_mark(self._paths[number], favourite)
