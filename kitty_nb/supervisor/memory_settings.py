"""The part of a server's settings that decides about memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import compress, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitty_nb.catalog.memory import CACHE_TYPES, Draft, MemorySettings
from kitty_nb.catalog.model_shape import read_shape
from kitty_nb.catalog.shards import total_size
from kitty_nb.config import PROJECTOR, FlashAttention, value_of
from kitty_nb.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Collection

    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Engine

__all__ = ["draft_config", "offloads", "projected", "settings_of"]

_NUMBERS = {
    "-c": "context", "--ctx-size": "context",
    "-np": "sequences", "--parallel": "sequences",
    "-b": "batch", "--batch-size": "batch",
    "-ub": "micro_batch", "--ubatch-size": "micro_batch",
    "-ngl": "gpu_layers", "--gpu-layers": "gpu_layers", "--n-gpu-layers": "gpu_layers",
}  # fmt: skip
_WORDS = {
    "-ctk": "cache_type_k", "--cache-type-k": "cache_type_k",
    "-ctv": "cache_type_v", "--cache-type-v": "cache_type_v",
}  # fmt: skip
_SWITCHES = {
    "-kvu": ("unified", True), "--kv-unified": ("unified", True),
    "-no-kvu": ("unified", False), "--no-kv-unified": ("unified", False),
    "-nkvo": ("cache_on_gpu", False), "--no-kv-offload": ("cache_on_gpu", False),
    "--swa-full": ("full_window", True),
    "--embedding": ("scores_all", True), "--embeddings": ("scores_all", True),
    "--rerank": ("scores_all", True), "--reranking": ("scores_all", True),
}  # fmt: skip
_FILES = {*PROJECTOR, "--lora", "--lora-scaled"}
_DRAFT = {"-md", "--model-draft", "--spec-draft-model"}
# What a draft model has settings of its own for, by the flag of the model's.
_DRAFT_FLAGS = {
    "-ngld": "-ngl", "--gpu-layers-draft": "-ngl", "--n-gpu-layers-draft": "-ngl",
    "--spec-draft-ngl": "-ngl",
    "-ctkd": "-ctk", "--cache-type-k-draft": "-ctk", "--spec-draft-type-k": "-ctk",
    "-ctvd": "-ctv", "--cache-type-v-draft": "-ctv", "--spec-draft-type-v": "-ctv",
    "-devd": "-dev", "--device-draft": "-dev", "--spec-draft-device": "-dev",
}  # fmt: skip
# What is left out of the draft model's settings, each with a value.
_NOT_OF_DRAFT = (
    _DRAFT
    | _FILES
    | {*_DRAFT_FLAGS, *_WORDS, "-dev", "--device", "--spec-type"}
    | {flag for flag, name in _NUMBERS.items() if name == "gpu_layers"}
)
# Tokens that speculation without a draft model proposes at once.
_DRAFTED_BY = {
    "none": 0, "ngram-simple": 48, "ngram-map-k": 48, "ngram-map-k4v": 48, "ngram-mod": 64,
    "ngram-cache": 8,
}  # fmt: skip
_MOST_DRAFTED = {"--spec-draft-n-max", "--draft", "--draft-n", "--draft-max"}
_DRAFTED = 3  # unless told
_ALL_LAYERS = 999
_OLD_CONTEXT = 4096  # what builds without --fit take unless told


def settings_of(config: ServerConfig, engine: Engine | None = None) -> MemorySettings:
    """Read what decides about memory from a server's settings, `extra_args` last.

    Args:
        config: The settings. Values that the engine would refuse are passed over.
        engine: Older builds have other defaults; None stands for a build of today.
    """
    has_fit = engine is None or engine.dialect.option("--fit") is not None
    given: dict[str, Any] = {
        "context": config.context_size,
        "sequences": config.parallel,
        "batch": config.batch_size,
        "micro_batch": config.ubatch_size,
        "gpu_layers": None if config.n_gpu_layers == -1 else config.n_gpu_layers,
        "flash_attention": config.flash_attention is not FlashAttention.OFF,
        "fits": has_fit,
        "draft": _draft_model(config, engine),
    } | _from_words(config.extra_args, config.projector)
    if not has_fit:
        given["scores_all"] = True
    if (given["sequences"] or 0) < 1:  # llama-server's automatic choice, as -1 layers are
        given |= {"sequences": 4 if has_fit else 1, "unified": True}
    else:
        given.setdefault("unified", False)
    if not has_fit:
        given["gpu_layers"] = given["gpu_layers"] or 0
        given["context"] = _OLD_CONTEXT if given["context"] is None else given["context"]
    return MemorySettings(**{name: value for name, value in given.items() if value is not None})


def offloads(config: ServerConfig) -> bool:
    """Tell whether a device, where there is one, gets a part of the model. It blocks."""
    return settings_of(config).gpu_layers != 0


def projected(config: ServerConfig) -> bool:
    """Tell whether a projector is loaded beside the model."""
    return config.projector is not None or value_of(config.extra_args, PROJECTOR) is not None


def draft_config(config: ServerConfig) -> ServerConfig | None:
    """Return the settings that the model's draft model is loaded with; None without one."""
    model: str | None = None
    words: list[str] = []
    for flag, value in pairwise((*config.extra_args, "")):
        if flag in _DRAFT:
            model = value
        elif own := _DRAFT_FLAGS.get(flag):
            words += [own, value]
    if model is None:
        return None
    shared = _without(config.extra_args, _NOT_OF_DRAFT)
    changes = {
        "model": Path(model),
        "projector": None,
        "n_gpu_layers": None,
        "extra_args": (*shared, *words),
    }
    return config.model_copy(update=changes)


def _draft_model(config: ServerConfig, engine: Engine | None) -> Draft | None:
    draft = draft_config(config)
    if draft is None or draft.model is None:
        return None
    with suppress(ModelFileError):  # starting it says what is wrong
        settings = settings_of(draft, engine)
        layers = _ALL_LAYERS if settings.gpu_layers is None else settings.gpu_layers
        return Draft(read_shape(draft.model), replace(settings, gpu_layers=layers))
    return None


def _without(words: tuple[str, ...], flags: Collection[str]) -> tuple[str, ...]:
    """Leave flags out, with the value that follows each."""
    kept = [True] * len(words)
    for number, word in enumerate(words):
        if word in flags:
            kept[number : number + 2] = [False] * len(kept[number : number + 2])
    return tuple(compress(words, kept))


def _from_words(words: tuple[str, ...], projector: Path | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    files = [str(projector)] if projector else []
    kinds: list[str] = []
    most = _DRAFTED
    for flag, value in pairwise((*words, "")):
        if flag in _SWITCHES:
            name, choice = _SWITCHES[flag]
            given[name] = choice
        elif flag in _WORDS and value in CACHE_TYPES:
            given[_WORDS[flag]] = value
        elif flag in _NUMBERS:
            with suppress(ValueError):
                number = _ALL_LAYERS if value == "all" else int(value)
                given[_NUMBERS[flag]] = number if number >= 0 else None
        elif flag in {"-fa", "--flash-attn"}:
            given["flash_attention"] = value != "off"
        elif flag in {"-fit", "--fit"} and value == "off":
            given["fits"] = False
        elif flag == "--pooling" and value != "none":
            given["scores_all"] = True
        elif flag == "--spec-type":
            kinds = value.split(",")
        elif flag in _MOST_DRAFTED and value.isdigit():
            most = int(value)
        elif flag in _FILES:
            files += value.split(",") if flag.startswith("--lora") else [value]
    given["drafted"] = max((_DRAFTED_BY.get(kind, most) for kind in kinds), default=0)
    if files:
        given["extra_weights"] = sum(map(_file_size, files))
    return given


def _file_size(name: str) -> int:
    """The size of a file, which may be followed by `:` and a scale."""
    return total_size(Path(name)) or total_size(Path(name.rpartition(":")[0]))
