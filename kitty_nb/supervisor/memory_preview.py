"""Would it fit? At once by formula, and a moment later from the engine itself."""

from __future__ import annotations

import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import psutil

from kitty_nb.catalog.memory import (
    CACHE_TYPES,
    Memory,
    MemoryPreview,
    MemorySettings,
    Needs,
)
from kitty_nb.catalog.memory_formula import estimate
from kitty_nb.catalog.memory_plan import plan, preview
from kitty_nb.catalog.model_shape import ModelShape, read_shape
from kitty_nb.catalog.shards import total_size
from kitty_nb.config import FlashAttention
from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import KittyError, ModelFileError
from kitty_nb.supervisor.free_memory import free_memory
from kitty_nb.supervisor.memory_probe import Answer, ask_engine, can_answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Engine

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
}  # fmt: skip
_FILES = {"-mm", "--mmproj", "-md", "--model-draft", "--spec-draft-model", "--lora"}
_ALL_LAYERS = 999
_OLD_CONTEXT = 4096  # what builds without --fit take unless told
# Tokens. Though the engine allocates no cache to answer, it was seen to take 50 bytes for each.
_LONGEST_ASKED = 1 << 22
_ROUNDED = 2 << 20  # bytes that an answer may lack: a fraction of a MiB for each kind of buffer


class MemoryPreviewer:
    """Previews one profile's memory. It remembers what it has learned of the engine."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._devices: int | None = None
        self._looks: set[anyio.CancelScope] = set()

    def close(self) -> None:
        """Call off all previews under way."""
        for look in self._looks:
            look.cancel()

    async def preview(
        self,
        config: ServerConfig,
        pid: int | None,
        on_preview: Callable[[MemoryPreview], object],
        delay: float,
    ) -> MemoryPreview:
        """Say what a model needs. See `Supervisor.preview_memory`.

        Args:
            config: What would be started.
            pid: The server that would end before.
            on_preview: Called with the formula's result at once, and with the engine's.
            delay: Seconds to wait before the engine is asked.
        """
        latest = MemoryPreview(problem="It was called off.")

        def tell(result: MemoryPreview) -> None:
            nonlocal latest
            if result != latest:
                latest = result
                on_preview(result)

        with anyio.CancelScope() as look:
            self._looks.add(look)
            try:
                await self._look(config, pid, tell, delay)
            except ModelFileError as error:
                tell(MemoryPreview(problem=str(error)))
            finally:
                self._looks.discard(look)
        return latest

    async def _look(
        self,
        config: ServerConfig,
        pid: int | None,
        tell: Callable[[MemoryPreview], None],
        delay: float,
    ) -> None:
        if config.model is None:
            tell(MemoryPreview(problem="No model is chosen."))
            return
        shape = await anyio.to_thread.run_sync(read_shape, config.model)
        memory = await anyio.to_thread.run_sync(free_memory, pid)
        known = Memory(memory.ram, memory.gpus[: self._devices])
        wanted = await anyio.to_thread.run_sync(settings_of, config, self._engine)
        tell(preview(shape, plan(shape, wanted, known), known))
        await anyio.sleep(delay)
        with suppress(KittyError, OSError, psutil.Error):  # starting it says what is wrong
            self._engine = await locate_engine(config.binary)
            wanted = await anyio.to_thread.run_sync(settings_of, config, self._engine)
            tell(await self._ask(self._engine, config, shape, wanted, memory))

    async def _ask(
        self,
        engine: Engine,
        config: ServerConfig,
        shape: ModelShape,
        wanted: MemorySettings,
        memory: Memory,
    ) -> MemoryPreview:
        """Ask the engine, and once more when it has other devices than was thought."""
        seen = Memory(memory.ram, memory.gpus[: self._devices])
        settings = plan(shape, wanted, seen)
        if not can_answer(engine) or (settings.context or 0) > _LONGEST_ASKED:
            return preview(shape, settings, seen)
        for _ in range(2):
            changes: dict[str, object] = {"context_size": settings.context}
            if seen.gpus:
                changes["n_gpu_layers"] = settings.gpu_layers
            answer = await ask_engine(engine, config.model_copy(update=changes))
            if answer is None:
                return preview(shape, settings, seen)
            self._devices = len(answer.gpus)
            asked, (seen, needs) = settings, _placed(answer, memory)
            settings = plan(shape, wanted, seen)
            if settings == asked:
                break
        needs = (*needs[:-1], needs[-1] + Needs(wanted.extra_weights, 0, 0))
        formula = estimate(shape, asked, seen.gpus)
        return preview(shape, asked, seen, tuple(map(_finer, needs, formula)))


def preview_by_formula(
    config: ServerConfig, engine: Engine | None = None, pid: int | None = None
) -> MemoryPreview:
    """Say what a model would need with some settings, without asking the engine.

    It takes a millisecond or a few: run it in a worker thread.

    Args:
        config: What would be started.
        engine: By what; None stands for a build of today.
        pid: The server that would end before.

    Raises:
        ModelFileError: The model cannot be read.
    """
    if config.model is None:
        return MemoryPreview(problem="No model is chosen.")
    shape, memory = read_shape(config.model), free_memory(pid)
    return preview(shape, plan(shape, settings_of(config, engine), memory), memory)


def _finer(told: Needs, formula: Needs) -> Needs:
    """What the engine says in whole MiB, with the formula's bytes where they agree."""
    if told.total is None or formula.total is None:
        return told
    pairs = (
        (told.weights, formula.weights),
        (told.cache or 0, formula.cache or 0),
        (told.compute or 0, formula.compute or 0),
    )
    return Needs(*(own if 0 <= own - said < _ROUNDED else said for said, own in pairs))


def _placed(answer: Answer, memory: Memory) -> tuple[Memory, tuple[Needs, ...]]:
    """Bring together what the engine and the system say of this machine's memory."""
    if sys.platform == "darwin":  # its GPU works in RAM
        return Memory(memory.ram), (sum((needs for _, needs in answer.gpus), answer.ram),)
    gpus = tuple(place for place, _ in answer.gpus)
    if len(gpus) == len(memory.gpus):
        gpus = memory.gpus  # they count in what the running server will give back
    return Memory(memory.ram, gpus), (answer.ram, *(needs for _, needs in answer.gpus))


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
        "scores_all": engine is not None and not can_answer(engine),
    } | _from_words(config.extra_args, config.projector)
    if (given["sequences"] or 0) < 1:  # llama-server's automatic choice, as -1 layers are
        given |= {"sequences": 4 if has_fit else 1, "unified": True}
    else:
        given.setdefault("unified", False)
    if not has_fit:
        given["gpu_layers"] = given["gpu_layers"] or 0
        given["context"] = _OLD_CONTEXT if given["context"] is None else given["context"]
    return MemorySettings(**{name: value for name, value in given.items() if value is not None})


def _from_words(words: tuple[str, ...], projector: Path | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    files = [projector] if projector else []
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
        elif flag in _FILES:
            files.append(Path(value))
    if files:
        given["extra_weights"] = sum(map(total_size, files))
    return given
