"""Would it fit? The memory that the chosen model needs, against what there is."""

from __future__ import annotations

import threading
from contextlib import suppress
from html import escape
from typing import TYPE_CHECKING

from ipywidgets import HTML

from kitty_nb.catalog.memory import Verdict
from kitty_nb.errors import KittyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kitty_nb.catalog.memory import MemoryPreview, Part
    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import ModelManager, Operation

_TONES = {
    Verdict.FITS: "good",
    Verdict.TIGHT: "warn",
    Verdict.WILL_NOT_FIT: "bad",
    Verdict.UNKNOWN: "idle",
}
_GB, _MB = 1e9, 1e6
_WORTH_SAYING = _GB / 10  # bytes


class MemoryLine(HTML):
    """A sentence about memory; hidden while no model is chosen.

    Args:
        manager: It works the figures out, and calls back on its own thread.
        wanted: Returns the settings that a start would use; where it raises a `KittyError`, there
            is nothing to show.

    Attributes:
        preview: What is shown; None while nothing is.
    """

    preview: MemoryPreview | None = None

    def __init__(self, manager: ModelManager, wanted: Callable[[], ServerConfig]) -> None:
        super().__init__()
        self.add_class("kitty-memory")
        self._manager, self._wanted = manager, wanted
        self._looking: Operation[MemoryPreview] | None = None
        self._turn = threading.Lock()
        self._show(None)

    def refresh(self) -> None:
        """Look again, because the model or a setting has changed.

        Callable from any thread but the manager's. A look under way is called off.
        """
        with self._turn, suppress(KittyError):  # the manager may have been closed
            self.stop()
            try:
                config = self._wanted()
            except KittyError:
                self._manager.run(self._hide)
            else:
                self._looking = self._manager.preview_memory(config, self._show)

    def stop(self) -> None:
        """Call off the look under way, if there is one."""
        if self._looking is not None:
            self._looking.cancel()

    async def _hide(self) -> None:
        self._show(None)

    def _show(self, preview: MemoryPreview | None) -> None:
        self.value = describe(preview) if preview else ""
        self.layout.display = None if preview else "none"
        self.preview = preview


def describe(preview: MemoryPreview) -> str:
    """The sentence, as HTML.

    E.g. `Memory: needs 21.4 GB of 24.0 GB free for a context of 32,768 · weights 18.9 GB · KV cache
    2.1 GB · compute 412 MB — tight; the largest context that fits is 24,576`. What goes where
    follows on a second line when there is more than one place.
    """
    tone = f"kitty-{_TONES[preview.verdict]}"
    if not preview.parts:
        return f"Memory: <span class='{tone}'>unknown</span>. {escape(preview.problem or '')}"
    free = f" of {_free(preview.parts[0])}" if len(preview.parts) == 1 else ""
    about = "" if preview.exact else "about "
    needs = preview.needs
    if needs.total is None or needs.cache is None or needs.compute is None:
        what = f"weights <b>{_size(needs.weights)}</b>{free} · KV cache and compute not known yet"
    else:
        context = f" for a context of {preview.context:,}" if preview.context else ""
        what = (
            f"needs {about}<b>{_size(needs.total)}</b>{free}{context}"
            f" · weights {_size(needs.weights)} · KV cache {_size(needs.cache)}"
            f" · compute {_size(needs.compute)}"
        )
    line = f"Memory: {what} — <b class='{tone}'>{preview.verdict}</b>{_advice(preview)}"
    if free:
        return line
    places = " · ".join(map(_place, preview.parts))
    return f"{line}<br><span class='kitty-fact'>{places}</span>"


def _advice(preview: MemoryPreview) -> str:
    match preview.largest_context:
        case None:
            return ""
        case 0:
            return "; no context is small enough"
        case largest:
            return f"; the largest context that fits is {largest:,}"


def _place(part: Part) -> str:
    needed = part.needs.weights if part.needs.total is None else part.needs.total
    return f"{escape(part.place.name)} {_size(needed)} of {_free(part)}"


def _free(part: Part) -> str:
    returned = part.place.returned
    held = f" (with {_size(returned)} that the running server gives back)"
    return f"{_size(part.place.free)} free{held if returned >= _WORTH_SAYING else ''}"


def _size(count: float) -> str:
    """Bytes as a person says them, e.g. `21.4 GB` or `412 MB`."""
    return f"{count / _MB:.0f} MB" if count < _GB - _MB / 2 else f"{count / _GB:.1f} GB"
