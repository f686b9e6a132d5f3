"""Would it fit? At once by formula, and a moment later from the engine itself."""

from __future__ import annotations

import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.to_thread
import psutil

from kitty_nb.catalog.description import why_not_served
from kitty_nb.catalog.memory import Memory, MemoryPreview, Needs, Verdict
from kitty_nb.catalog.memory_formula import estimate
from kitty_nb.catalog.memory_plan import plan, preview
from kitty_nb.catalog.model_shape import read_shape
from kitty_nb.engine.devices import engine_devices, remote_machines
from kitty_nb.errors import KittyError, ModelFileError
from kitty_nb.supervisor.free_memory import free_memory, with_devices
from kitty_nb.supervisor.memory_probe import Answer, ask_engine, can_answer
from kitty_nb.supervisor.memory_settings import projected, settings_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kitty_nb.catalog.memory import Place
    from kitty_nb.catalog.model_shape import ModelShape
    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.devices import Device
    from kitty_nb.engine.locate import Engine

# Tokens. Though the engine allocates no cache to answer, it was seen to take 50 bytes for each.
_LONGEST_ASKED = 1 << 22
_BUSY = (
    "The machines that --rpc names do not answer: they serve one client at a time. Stop the server"
    " that uses them to see whether it fits."
)
_ROUNDED = 2 << 20  # bytes that an answer may lack: a fraction of a MiB for each kind of buffer


class Running(NamedTuple):
    """A server that ends before another starts.

    Attributes:
        pid: Its process.
        config: What it was started with; None where somebody else has started it.
    """

    pid: int
    config: ServerConfig | None


class MemoryPreviewer:
    """Previews one profile's memory. It remembers what it has learned of the engine."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._devices: tuple[Device, ...] | None = None
        self._remote: str | None = None
        self._looks: set[anyio.CancelScope] = set()

    def close(self) -> None:
        """Call off all previews under way."""
        for look in self._looks:
            look.cancel()

    async def preview(
        self,
        config: ServerConfig,
        running: Running | None,
        on_preview: Callable[[MemoryPreview], object],
        delay: float,
    ) -> MemoryPreview:
        """Say what a model needs. See `Supervisor.preview_memory`.

        Args:
            config: What would be started.
            running: The server that would end before.
            on_preview: Called with the formula's result at once, and with the engine's.
            delay: Seconds to wait before the engine is asked.
        """
        latest = MemoryPreview(problem="It was called off.")

        def tell(result: MemoryPreview) -> None:
            nonlocal latest
            if result != latest:
                latest = result
                on_preview(result)

        with self._look():
            try:
                if config.model is None:
                    tell(MemoryPreview(problem="No model is chosen."))
                    return latest
                shape = await anyio.to_thread.run_sync(read_shape, config.model)
                measured = await anyio.to_thread.run_sync(free_memory, _pid(running))
                known = with_devices(measured, self._devices)
                tell(await _by_formula(config, self._engine, shape, known))
                await anyio.sleep(delay)
                with suppress(KittyError, OSError, psutil.Error):  # starting says what is wrong
                    engine, memory, busy = await self._find_devices(config, running, measured)
                    if memory is None:
                        tell(MemoryPreview(problem=_BUSY))
                    elif busy:
                        tell(await _by_formula(config, engine, shape, memory))
                    else:
                        tell(await _ask(engine, config, shape, memory))
            except ModelFileError as error:
                model = config.model
                told = await anyio.to_thread.run_sync(why_not_served, model) if model else None
                tell(MemoryPreview(problem=told or str(error)))
        return latest

    async def refusal(self, config: ServerConfig, running: Running | None) -> str:
        """Say why a model will not fit, as the preview has it; empty where it may.

        The engine is asked only where that could change the answer.
        """
        with self._look(), suppress(ModelFileError):  # starting says what is wrong
            if config.model is None:
                return ""
            shape = await anyio.to_thread.run_sync(read_shape, config.model)
            measured = await anyio.to_thread.run_sync(free_memory, _pid(running))
            wanted = await anyio.to_thread.run_sync(settings_of, config)
            told = await _by_formula(config, None, shape, Memory(measured.ram))
            # What is left to the engine goes to its devices as far as they have room.
            its_choice = wanted.fits and not wanted.gpu_layers and not wanted.draft
            if its_choice and told.verdict is Verdict.FITS:
                return ""
            with suppress(KittyError, OSError, psutil.Error):
                engine, memory, busy = await self._find_devices(config, running, measured)
                if memory is None:
                    return ""
                told = await _by_formula(config, engine, shape, memory)
                if told.verdict is not Verdict.FITS and not busy:
                    told = await _ask(engine, config, shape, memory)
            return told.refusal
        return ""

    @contextmanager
    def _look(self) -> Iterator[None]:
        with anyio.CancelScope() as look:
            self._looks.add(look)
            try:
                yield
            finally:
                self._looks.discard(look)

    async def _find_devices(
        self, config: ServerConfig, running: Running | None, measured: Memory
    ) -> tuple[Engine, Memory | None, bool]:
        """The engine, the memory with that of its devices, and whether they are too busy to ask.

        The memory is None where nobody has seen those devices before.
        """
        self._engine, devices = await engine_devices(config)
        remote = remote_machines(config)
        busy = remote is not None and devices is None
        if not busy:
            self._devices, self._remote = devices, remote
        elif self._remote != remote:
            return self._engine, None, busy
        memory = with_devices(measured, self._devices)
        if running and running.config and memory.gpus:
            memory = await anyio.to_thread.run_sync(
                _given_back, memory, running.config, self._engine
            )
        return self._engine, memory, busy


async def _by_formula(
    config: ServerConfig, engine: Engine | None, shape: ModelShape, memory: Memory
) -> MemoryPreview:
    wanted = await anyio.to_thread.run_sync(settings_of, config, engine)
    return preview(shape, plan(shape, wanted, memory), memory)


async def _ask(
    engine: Engine, config: ServerConfig, shape: ModelShape, memory: Memory
) -> MemoryPreview:
    """Ask the engine, and once more when it uses other devices than it lists."""
    wanted = await anyio.to_thread.run_sync(settings_of, config, engine)
    settings = plan(shape, wanted, memory)
    if not can_answer(engine) or (settings.context or 0) > _LONGEST_ASKED:
        return preview(shape, settings, memory)
    for _ in range(2):
        changes: dict[str, object] = {"context_size": settings.context}
        if memory.gpus:
            changes["n_gpu_layers"] = settings.gpu_layers
        answer = await ask_engine(engine, config.model_copy(update=changes))
        if answer is None:
            return preview(shape, settings, memory)
        asked, (memory, needs) = settings, _placed(answer, memory)
        settings = plan(shape, wanted, memory)
        if settings == asked:
            break
    needs = (*needs[:-1], needs[-1] + Needs(wanted.extra_weights, 0, 0))
    formula = estimate(shape, asked, memory.gpus)
    told = preview(shape, asked, memory, tuple(map(_finer, needs, formula)))
    # What a projector needs beside its weights, nobody has said.
    return replace(told, exact=not projected(config))


def _pid(running: Running | None) -> int | None:
    return running.pid if running else None


def _given_back(memory: Memory, running: ServerConfig, engine: Engine) -> Memory:
    """Count in what a server holds on devices where nobody can measure that, by formula."""
    if running.model is None:
        return memory
    try:
        shape = read_shape(running.model)
    except ModelFileError:
        return memory
    empty = Memory(memory.ram, tuple(replace(gpu, free=gpu.total) for gpu in memory.gpus))
    settings = plan(shape, settings_of(running, engine), empty)

    def credited(gpu: Place, needs: Needs) -> Place:
        held = min(needs.total or needs.weights, gpu.total - gpu.free)
        return gpu if gpu.returned else replace(gpu, free=gpu.free + held, returned=held)

    needs = estimate(shape, settings, empty.gpus)[1:]
    return Memory(memory.ram, tuple(map(credited, memory.gpus, needs)))


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
    # What is known already counts in what the running server will give back.
    known = {_id(place): place for place in memory.gpus}
    gpus = tuple(known.get(_id(place), place) for place, _ in answer.gpus)
    return Memory(memory.ram, gpus), (answer.ram, *(needs for _, needs in answer.gpus))


def _id(place: Place) -> str:
    """Return the engine's name of a device, e.g. `CUDA0`."""
    return place.name.partition(" (")[0]
