"""The fold with the facts about the server and the chosen model."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from rich.filesize import decimal

from kitty_nb.catalog.model import shard_paths
from kitty_nb.config import Task
from kitty_nb.widgets.display import Fold, Line, duration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kitty_nb.catalog.model import Model
    from kitty_nb.supervisor.events import LoadProgress, ServerState


class Details(Fold):
    """Facts, written while somebody sees them."""

    def __init__(self, on_unfold: Callable[[], object]) -> None:
        self.server, self.model = Line("kitty-server-facts"), Line("kitty-model-facts")
        super().__init__("Details", self.server, self.model, on_unfold=on_unfold)
        self.add_class("kitty-details")

    def show(self, state: ServerState, load: LoadProgress | None, model: Model | None) -> None:
        """Show a server, and the model that is chosen."""
        if self.unfolded:
            self.server.write(_draw(server_facts(state, load)))
            chosen = draw_model(model) if model else "No model is chosen."
            elsewhere = state.config.url or state.config.models is not None
            self.model.write("" if elsewhere else chosen)


def server_facts(state: ServerState, load: LoadProgress | None) -> dict[str, str]:
    """Return what is known of a server, by the name of each fact."""
    health = state.last_health_check if state.uptime is not None else None
    slots = health and health.slots_total and f"{health.slots_busy} of {health.slots_total} busy"
    latency = health and health.latency
    program = "llama-server" if state.config.models is None else "a router"
    known = {
        "Profile": state.config.profile,
        "Server": "not started by kitty_nb" if state.external else state.pid and program,
        "URL": state.config.url,
        "PID": state.pid,
        "Model name for clients": (state.pid or state.external) and state.alias,
        "Projector": state.pid and state.projector,
        "Draft model": state.pid and state.config.drafter,
        "Devices": ", ".join(state.devices),
        "Loaded in": load and state.uptime is not None and duration(load.elapsed),
        "Health check answered in": latency and f"{latency * 1000:.0f} ms",
        "Slots": slots,
        "Log file": None if state.config.url else state.config.log_path,
    }
    return {name: str(value) for name, value in known.items() if value}


def draw_model(model: Model) -> str:
    """Draw a model's facts and its chat template."""
    drawn, template = _draw(model_facts(model)), model.facts.chat_template
    if not template:
        return drawn
    text = f"<pre class='kitty-template' tabindex='0'>{escape(template)}</pre>"
    return f"{drawn}<details><summary>Chat template</summary>{text}</details>"


def _draw(facts: Mapping[str, str]) -> str:
    lines = (f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl class='kitty-facts'>{''.join(lines)}</dl>"


_CONFIRMED = {
    True: "confirmed by the tensors",
    False: "according to most tensors; the file's metadata disagrees",
    None: "not confirmed by the tensors",
}


_MADE_FOR = {Task.CHAT: None, Task.EMBED: "embeddings", Task.RANK: "ranking documents"}


def model_facts(model: Model) -> dict[str, str]:
    """Return what is known of a model, by the name of each fact."""
    files, header = shard_paths(model.path), model.facts
    quantization = model.quantization and f"{model.quantization} ({_CONFIRMED[model.confirmed]})"
    known = {
        "Title": model.title,
        "Made from": header.base_model,
        "Architecture": model.architecture,
        "Parameters": _count(model.parameters) or header.size_label,
        "Layers": _count(header.layers),
        "Attention heads": _count(header.heads),
        "Vocabulary": _count(header.vocabulary, " tokens"),
        "Trained context": _count(model.context_length, " tokens"),
        "Quantization": quantization,
        "License": header.license,
        "Made for": _MADE_FOR[header.task],
        "Takes in": ", ".join(model.modalities),
        "Projector": model.projector,
        "Chat template": "none; answers may run on" if header.lacks_template else None,
        "Tools": {True: "yes", False: "no", None: None}[header.tools],
        "Repository": model.repository,
        "Known as": model.known_as,
        "Size": f"{decimal(model.size)} ({model.size:,} bytes)",
        "File": model.path,
        "Shards": f"{len(files)} files, to {files[-1].name}" if len(files) > 1 else None,
        "Missing": ", ".join(model.missing),
        "Problem": model.problem or model.doubt,
    }
    return {name: str(value) for name, value in known.items() if value}


def _count(number: int | None, of: str = "") -> str | None:
    return None if number is None else f"{number:,}{of}"
