"""GGUF files that llama-server does not serve, told by what their headers say. Pure.

The container is used for much that is no language model. What such a file lacks is certain: without
a vocabulary, layers or weights no llama.cpp loads it. An architecture that is merely unknown here
may be known to a newer engine, so that is left to the engine to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kitty_nb.catalog.file_facts import Kind
from kitty_nb.catalog.quantization import TENSOR_TYPES

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from kitty_nb.catalog.file_facts import FileFacts

__all__ = ["doubt", "why_never"]

_ELSEWHERE = "Use it in the program it was made for."
_OF_OTHER_PROGRAMS = {
    **dict.fromkeys(("aura", "flux", "hidream", "lumina2", "qwen_image"), "an image model"),
    **dict.fromkeys(("sd1", "sd3", "sdxl"), "an image model"),
    **dict.fromkeys(("cosmos", "hyvid", "ltxv", "wan"), "a video model"),
    **dict.fromkeys(("dia", "kokoro", "parler-tts"), "a speech model"),
}
# What goes with a model, and what to do with it.
_COMPANIONS = {
    "controlvector": "a control vector. Pick a model, and name this with --control-vector"
    " in LLAMACPP_EXTRA_ARGS.",
}
_KINDS = {
    Kind.ADAPTER: "an adapter (LoRA). Pick the model it was made for, and name this with --lora"
    " in LLAMACPP_EXTRA_ARGS.",
    Kind.PROJECTOR: "a projector (mmproj). Pick the model itself; a projector beside it is used"
    " by itself.",
    Kind.OTHER: f"data about a model. {_ELSEWHERE}",
}
# Engines load these, but not to chat with.
_DRAFTER = "a drafter. Pick the model it was made for, and name this as its draft model."
_NOT_FOR_CHAT = {
    "dflash": _DRAFTER,
    "eagle3": _DRAFTER,
    "t5encoder": "a text encoder, as image models use one. It answers no chat.",
    "wavtokenizer-dec": "the part of a speech model that makes sound. It answers no chat.",
}


def why_never(path: Path, facts: FileFacts, tensors: int) -> str | None:
    """Say what a file is that is no model to serve, and what to do; None of any other.

    Args:
        path: The file, the first of a split model.
        facts: What it says.
        tensors: How many it holds, with all its shards.
    """
    name, architecture = path.name, facts.architecture
    if of_kind := _KINDS.get(facts.kind):
        return f"{name} is {of_kind}"
    if architecture is None:
        return f"{name} does not say its architecture. Download another conversion of the model."
    if of_other := _OF_OTHER_PROGRAMS.get(architecture):
        return f"{name} is {of_other} ({architecture}), which no llama-server runs. {_ELSEWHERE}"
    if companion := _COMPANIONS.get(architecture):
        return f"{name} is {companion}"
    if not facts.tokenizer:
        return f"{name} has no vocabulary: it is no language model ({architecture}). {_ELSEWHERE}"
    if tensors == 0:
        return f"{name} holds a vocabulary and no weights. Download the model itself."
    if facts.layers == 0:
        return f"{name} has no layers. Download another conversion of the model."
    return None


def doubt(path: Path, facts: FileFacts, types: Collection[int]) -> str | None:
    """Say why a model may not be served though an engine may load it; None where nothing tells.

    Args:
        path: The file, the first of a split model.
        facts: What it says.
        types: How its matrices are stored, by llama.cpp's `enum ggml_type`.
    """
    if unusual := _NOT_FOR_CHAT.get(facts.architecture or ""):
        return f"{path.name} is {unusual}"
    if unknown := sorted(set(types) - TENSOR_TYPES.keys()):
        numbers = ", ".join(map(str, unknown))
        return (
            f"{path.name} stores weights in a way that is unknown here (type {numbers}). The engine"
            " may know it; if it does not, download another quantization."
        )
    return None
