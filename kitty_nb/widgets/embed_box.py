"""The box of the panel in which a user sees what a model that embeds makes of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipywidgets import HTML, HBox, Text

from kitty_nb.config import Task
from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.widgets.display import button, show_if
from kitty_nb.widgets.session import ActionRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from kitty_nb.client.embeddings import Vectors
    from kitty_nb.manager import ModelManager
    from kitty_nb.operation import Operation
    from kitty_nb.supervisor.events import ServerState

_SHOWN = 4  # numbers


class EmbedBox(HBox):
    """A text, its vector in a few words, and how near it is to the text before."""

    def __init__(self, manager: ModelManager, show_problem: Callable[[str | None], None]) -> None:
        self._manager = manager
        self._before: Vectors | None = None
        self.text = Text(placeholder="A text to embed", continuous_update=False)
        self.text.add_class("kitty-grow")
        self.embed = button("Embed", "", "Show the vector of this text", "primary")
        self.vector = HTML().add_class("kitty-fact")
        super().__init__([self.text, self.embed, self.vector])
        self.add_class("kitty-embed")
        actions = ActionRunner(manager.run, show_problem)
        self.embed.on_click(lambda _: actions.run(self._ask))
        self.show(manager.state)

    def show(self, state: ServerState) -> None:
        """Show the box while a model that embeds is ready."""
        show_if(self, state.status is ServerStatus.READY and state.task is Task.EMBED)

    def _ask(self) -> Operation[None]:
        return self._manager.run(self._tell, self._manager.embed([self.text.value]))

    async def _tell(self, asked: Operation[Vectors]) -> None:
        (vector,) = await asked
        self.vector.value, self._before = describe_vector(vector, self._before), vector


def describe_vector(vector: Vectors, before: Vectors | None = None) -> str:
    """Describe a vector, e.g. `768 numbers · length 1.00 · 0.012, -0.340, … · 0.83 similar`.

    The similarity to the vector before is the cosine of the angle between the two.
    """
    length = float(vector @ vector) ** 0.5
    numbers = ", ".join(f"{number:.3f}" for number in vector[:_SHOWN])
    parts = [f"{len(vector)} numbers", f"length {length:.2f}", f"{numbers}, …"]
    if before is not None and before.shape == vector.shape:
        other = float(before @ before) ** 0.5
        cosine = float(vector @ before) / max(length * other, 1e-12)
        parts.append(f"{cosine:.2f} similar to the text before")
    return " · ".join(parts)
