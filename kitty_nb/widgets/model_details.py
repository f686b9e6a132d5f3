"""What the chosen model says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from anywidget import AnyWidget
from rich.filesize import decimal

from kitty_nb.catalog import shard_paths
from kitty_nb.widgets.assets import asset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kitty_nb.catalog import Model

_CONFIRMED = {
    True: "as the tensors say too",
    False: "by most of the tensors; the file says otherwise",
    None: "not confirmed by the tensors",
}


class ModelDetails(AnyWidget):
    """A folded pane with the facts of a model's header and its chat template.

    They travel as messages, once somebody has unfolded it.

    Args:
        on_open: Called, on the front end's thread, when a page wants them.
    """

    _esm: ClassVar[str] = asset("model_details.js")

    def __init__(self, on_open: Callable[[], object]) -> None:
        super().__init__()
        self.add_class("kitty-details-box")
        self._asked = self._fresh = False
        self._on_open = on_open
        self._sent: Model | None = None
        self.on_msg(self._receive)

    def show(self, model: Model | None) -> None:
        """Show a model, where it is another than before."""
        if self._asked and (self._fresh or model != self._sent):
            self._fresh, self._sent = False, model
            facts = [*describe(model)] if model else []
            template = (model.chat_template if model else None) or ""
            self.send({"kind": "facts", "facts": facts, "template": template})

    def _receive(self, _widget: object, message: Any, _buffers: object) -> None:
        if isinstance(message, dict) and message.get("kind") == "replay":
            self._asked = self._fresh = True
            self._on_open()


def describe(model: Model) -> Iterator[tuple[str, str]]:
    """Yield what is known of a model, each fact with its name."""
    files = shard_paths(model.path)
    known = {
        "Title": model.title,
        "Made from": model.base_model,
        "Architecture": model.architecture,
        "Parameters": _count(model.parameters) or model.size_label,
        "Layers": _count(model.layers),
        "Attention heads": _count(model.heads),
        "Vocabulary": _count(model.vocabulary, " tokens"),
        "Trained context": _count(model.context_length, " tokens"),
        "Quantization": model.quantization
        and f"{model.quantization} ({_CONFIRMED[model.confirmed]})",
        "License": model.license,
        "Takes in": ", ".join(model.modalities),
        "Projector": model.projector and str(model.projector),
        "Tools": {True: "yes", False: "no", None: None}[model.tools],
        "Repository": model.repository,
        "Known as": model.known_as,
        "Size": f"{decimal(model.size)} ({model.size:,} bytes)",
        "File": str(model.path),
        "Shards": f"{len(files)} files, to {files[-1].name}" if len(files) > 1 else None,
        "Missing": ", ".join(model.missing),
        "Problem": model.problem or model.doubt,
    }
    for name, value in known.items():
        if value:
            yield name, value


def _count(number: int | None, of: str = "") -> str | None:
    return None if number is None else f"{number:,}{of}"
