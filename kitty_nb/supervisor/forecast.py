"""Memory: what is free, what a server will need with its settings, and whether it fits."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import psutil
from anyio.lowlevel import checkpoint_if_cancelled
from anyio.to_thread import run_sync
from rich.filesize import decimal

from kitty_nb.catalog.catalog import why_not_served
from kitty_nb.catalog.memory import (
    CACHE_TYPES,
    Memory,
    MemoryPool,
    MemoryPreview,
    MemorySettings,
    Requirement,
    Verdict,
    allocate,
    estimate,
    plan,
    preview,
    read_shape,
)
from kitty_nb.catalog.model import total_size
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.config.flags import PROJECTOR
from kitty_nb.engine.command_line import options_of
from kitty_nb.engine.devices import Device, list_devices, remote_machines
from kitty_nb.engine.locate import Engine, locate_engine
from kitty_nb.errors import ConfigError, KittyError, ModelFileError
from kitty_nb.supervisor.events import MemoryUse
from kitty_nb.supervisor.history import LoadHistory
from kitty_nb.supervisor.process import family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kitty_nb.config import ServerConfig


Options = list[tuple[str, str]]

_NUMBERS = {
    "--ctx-size": "context", "--parallel": "sequences", "--batch-size": "batch",
    "--ubatch-size": "micro_batch", "--gpu-layers": "gpu_layers",
}  # fmt: skip
_TYPES = {"--cache-type-k": "cache_type_k", "--cache-type-v": "cache_type_v"}
_SWITCHES = {
    "--kv-unified": ("unified", True), "--no-kv-unified": ("unified", False),
    "--no-kv-offload": ("cache_on_gpu", False), "--swa-full": ("full_window", True),
    "--embedding": ("scores_all", True), "--rerank": ("scores_all", True),
}  # fmt: skip
_ADAPTERS = {"--lora", "--lora-scaled"}
_FILES = {*PROJECTOR, *_ADAPTERS}
_DRAFT = "--spec-draft-model"
# The flags of a draft model's own settings, with those of the main model.
_DRAFT_FLAGS = {
    "--spec-draft-ngl": "--gpu-layers",
    "--spec-draft-type-k": "--cache-type-k",
    "--spec-draft-type-v": "--cache-type-v",
}
_NOT_OF_DRAFT = {_DRAFT, *_FILES, *_DRAFT_FLAGS.values(), "--spec-type"}
# Tokens that speculation without a draft model proposes at once.
_DRAFTED_BY = {
    "none": 0, "ngram-simple": 48, "ngram-map-k": 48, "ngram-map-k4v": 48, "ngram-mod": 64,
    "ngram-cache": 8,
}  # fmt: skip
_DRAFTED = 3  # by default
_ALL_LAYERS = 999
_OLD_CONTEXT = 4096  # the default of builds without --fit
# Of each version of control groups, as `/proc/self/cgroup` names its controllers: the folder, the
# files with the limit and the use, and the prefix of counters that include the groups below.
_CGROUPS = {
    "": ("", "memory.max", "memory.current", ""),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
_BUSY = (
    "The devices of the RPC machines are unknown. To see whether the model fits, check that they"
    " can be reached, and stop any server that uses them: each serves one client at a time."
)


def settings_of(config: ServerConfig, engine: Engine | None = None) -> MemorySettings:
    """Read the memory settings from a server's settings, `extra_args` last. It blocks.

    Values that the engine would refuse are ignored. Older builds have other defaults; None stands
    for a current build.
    """
    options = options_of(config)
    settings = _settings(options, engine)
    model = dict(options).get(_DRAFT)
    if model is None:
        return settings
    own = [(_DRAFT_FLAGS.get(flag, flag), v) for flag, v in options if flag not in _NOT_OF_DRAFT]
    draft = _settings(own, engine)
    layers = _ALL_LAYERS if draft.gpu_layers is None else draft.gpu_layers
    with suppress(ModelFileError):  # starting it reports what is wrong
        beside = read_shape(Path(model)), replace(draft, gpu_layers=layers)
        return replace(settings, draft=beside)
    return settings


def offloads(config: ServerConfig, engine: Engine) -> bool:
    """Return whether a device, if there is one, gets a part of the model. It blocks."""
    return settings_of(config, engine).gpu_layers != 0


def _settings(options: Options, engine: Engine | None) -> MemorySettings:
    has_fit = engine is None or engine.dialect.option("--fit") is not None
    given: dict[str, Any] = {
        "sequences": 0,
        "unified": False,
        "fits": has_fit,
        "drafted": _drafted(options),
        "extra_weights": _weights_beside(options),
    }
    for flag, value in options:
        given |= _given(flag, value)
    if not given["sequences"]:  # llama-server's automatic choice, as -1 layers are
        given |= {"sequences": 4 if has_fit else 1, "unified": True}
    if not has_fit:
        # All layers and a choice of flash attention became the defaults in the same build.
        flash = engine and engine.dialect.option("--flash-attn")
        layers = _ALL_LAYERS if flash and flash.values else 0
        given = {"context": _OLD_CONTEXT, "gpu_layers": layers} | _without_none(given)
        given["scores_all"] = True
    return MemorySettings(**_without_none(given))


def _without_none(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _given(flag: str, value: str) -> dict[str, Any]:
    """Return the setting that a command-line option stands for, if it concerns memory."""
    if flag in _SWITCHES:
        return dict([_SWITCHES[flag]])
    if flag in _TYPES and value in CACHE_TYPES:
        return {_TYPES[flag]: value}
    if flag in _NUMBERS:
        with suppress(ValueError):
            number = _ALL_LAYERS if value == "all" else int(value)
            return {_NUMBERS[flag]: number if number >= 0 else None}
    match flag, value:
        case "--flash-attn", _:
            return {"flash_attention": value != "off"}
        case "--fit", "off":
            return {"fits": False}
        case "--pooling", _ if value != "none":
            return {"scores_all": True}
    return {}


def _drafted(options: Options) -> int:
    """Return the number of tokens that speculation proposes at once."""
    given = dict(options)
    most = given.get("--spec-draft-n-max", "")
    otherwise = int(most) if most.isdigit() else _DRAFTED
    kinds = given.get("--spec-type", "none").split(",")
    return max(_DRAFTED_BY.get(kind, otherwise) for kind in kinds)


def _weights_beside(options: Options) -> int:
    """Return the bytes of the projector and the adapters; names may end in `:` and a scale."""
    names: list[str] = []
    for flag, value in options:
        if flag in _FILES:
            names += value.split(",") if flag in _ADAPTERS else [value]
    return sum(total_size(Path(n)) or total_size(Path(n.rpartition(":")[0])) for n in names)


def free_memory(pid: int | None = None, root: Path = Path("/")) -> Memory:
    """Measure what is free, including what a running server and its children will release.

    If the limit of a container or a batch job leaves less RAM than the machine has free, the pool's
    name says so. Its total is the machine's all the same: llama.cpp, too, goes by that.

    The GPUs are those that NVIDIA's library knows; see `with_devices` for others.

    Args:
        pid: The server.
        root: Where `proc` and `sys` are mounted.
    """
    ram = psutil.virtual_memory()
    holders = [] if pid is None else family(pid)
    returned = sum(map(_held, holders))
    name, free = "RAM", min(ram.available + returned, ram.total)
    for limit, left in _limits(root):
        if (left := min(left + returned, limit)) < free:
            name, free = f"RAM (limit of this container or job: {decimal(limit)})", left
    return Memory(
        MemoryPool(name, free, ram.total, returned), _gpus({process.pid for process in holders})
    )


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the limits of this process's control groups and of those above, and what they leave.

    Cached files, such as mapped weights, count as free, as they do in the whole machine's memory.
    """
    with suppress(OSError, ValueError):  # another system than Linux
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in _CGROUPS:
                continue
            folder, limited, used, below = _CGROUPS[controllers]
            # A container may see its own group as the root, whatever the path says.
            own = PurePosixPath(path.lstrip("/"))
            for group in (own, *own.parents):
                place = root / "sys/fs/cgroup" / folder / group
                with suppress(OSError, ValueError, LookupError):  # no limit, or not to be seen
                    limit, use = (int((place / name).read_text()) for name in (limited, used))
                    rows = (place / "memory.stat").read_text().splitlines()
                    counts = {name: int(count) for name, count in map(str.split, rows)}
                    cached = counts[f"{below}active_file"] + counts[f"{below}inactive_file"]
                    yield limit, limit - use + cached


def with_devices(memory: Memory, devices: Iterable[Device] | None) -> Memory:
    """Replace the GPUs with the devices that the engine lists, keeping what a server will release.

    Args:
        memory: As `free_memory` measures it.
        devices: As the engine lists them; None if it doesn't. A Mac's GPU shares the RAM, and so
            does not count.
    """
    if devices is None or sys.platform == "darwin":
        return memory
    left, pools = [*memory.gpus], []
    for device in devices:
        known = next((gpu for gpu in left if gpu.name == device.about), None)
        returned = known.returned if known else 0
        if known:
            left.remove(known)
        free = min(device.free + returned, device.total)
        pools.append(MemoryPool(str(device), free, device.total, returned))
    return Memory(memory.ram, tuple(pools))


def memory_use(pid: int) -> MemoryUse | None:
    """Measure what a server and its children hold; None if it has just exited."""
    processes = family(pid)
    resident = 0
    for process in processes:
        with suppress(psutil.Error):
            resident += process.memory_info().rss
    if not resident:
        return None
    held = sum(pool.returned for pool in _gpus({process.pid for process in processes}))
    return MemoryUse(resident, held or None)


def _held(process: psutil.Process) -> int:
    """Return the bytes that become free when a process exits.

    Weights that are mapped from a file are not among them: the system counts them as available.
    """
    try:
        usage = process.memory_info()
    except psutil.Error:
        return 0
    return max(0, usage.rss - getattr(usage, "shared", 0))  # macOS doesn't report the shared part


def _gpus(pids: set[int]) -> tuple[MemoryPool, ...]:
    """Return the GPUs that NVIDIA's library knows; none if anything is wrong with it."""
    try:
        # Optional (`kitty_nb[gpu]`), and slow to initialize: it talks to the driver.
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001 (no package, no driver, no GPU, a driver of another version)
        return ()
    try:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return tuple(_gpu(nvml, handle, pids) for handle in handles)
    except nvml.NVMLError:
        return ()
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any, pids: set[int]) -> MemoryPool:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name = nvml.nvmlDeviceGetName(handle)
    returned = 0
    with suppress(nvml.NVMLError):  # a container may not see who holds what
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        returned = sum(p.usedGpuMemory or 0 for p in running if p.pid in pids)
    return MemoryPool(
        name.decode() if isinstance(name, bytes) else name,
        min(memory.free + returned, memory.total),
        memory.total,
        returned,
    )


class Running(NamedTuple):
    """The server that exits before another starts, if there is one."""

    pid: int | None = None  # its process
    # The settings that it was started with; None if somebody else started it.
    config: ServerConfig | None = None


class Forecaster:
    """Forecasts one profile's memory. It remembers the engine's devices while those are busy."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._devices: tuple[Device, ...] | None = None
        self._remote: str | None = None

    async def preview(
        self,
        config: ServerConfig,
        running: Running,
        on_preview: Callable[[MemoryPreview], object],
        delay: float,
    ) -> MemoryPreview:
        """Preview what a model needs. See `Supervisor.preview_memory`.

        The engine is asked for its devices only after `delay` seconds.
        """
        latest: MemoryPreview | None = None
        config = await _with_files(config)
        try:
            if config.model is None:
                final = MemoryPreview(problem="No model is chosen.")
            else:
                measured = await run_sync(free_memory, running.pid)
                known = with_devices(measured, self._devices)
                latest = await run_sync(_preview, config, self._engine, known)
                await checkpoint_if_cancelled()  # the thread is waited for in any case
                on_preview(latest)
                await anyio.sleep(delay)
                final = await self._answer(config, running, measured)
        except ModelFileError as error:
            why = await run_sync(why_not_served, config.require_model())
            final = MemoryPreview(problem=why or str(error))
        except (KittyError, OSError, psutil.Error):  # starting reports what is wrong
            unknown = MemoryPreview(problem="Free memory cannot be measured on this system.")
            return latest or unknown
        if final != latest:
            await checkpoint_if_cancelled()
            on_preview(final)
        return final

    async def why_not(self, config: ServerConfig, running: Running) -> str:
        """Return why a model will not fit, as the preview says it; empty if it may fit.

        The engine is asked for its devices only if these could change the answer.
        """
        with suppress(KittyError, OSError, psutil.Error):  # starting reports what is wrong
            config = await _with_files(config)
            if config.model is None:
                return ""
            measured = await run_sync(free_memory, running.pid)
            in_ram = await run_sync(_preview, config, None, Memory(measured.ram))
            wanted = await run_sync(settings_of, config)
            # What is left to the engine goes to its devices as far as they have room.
            its_choice = wanted.fits and not wanted.gpu_layers and not wanted.draft
            if not its_choice or in_ram.verdict is not Verdict.FITS:
                return (await self._answer(config, running, measured)).why_not()
        return ""

    async def _answer(
        self, config: ServerConfig, running: Running, measured: Memory
    ) -> MemoryPreview:
        engine, memory = await self.find_memory(config, running, measured)
        if memory is None:
            return MemoryPreview(problem=_BUSY)
        return await run_sync(_preview, config, engine, memory)

    async def find_memory(
        self, config: ServerConfig, running: Running, measured: Memory
    ) -> tuple[Engine, Memory | None]:
        """Find the engine, and the memory that it can use; None if the memory is unknown."""
        self._engine = await locate_engine(config.binary)
        devices = await list_devices(config)
        remote = remote_machines(config)
        if devices is not None or remote is None:
            self._devices, self._remote = devices, remote
        elif self._remote != remote:  # busy, and never seen free
            return self._engine, None
        memory = with_devices(measured, self._devices)
        if running.config and memory.gpus:
            memory = await run_sync(_given_back, memory, running.config, self._engine)
        return self._engine, memory


async def _with_files(config: ServerConfig) -> ServerConfig:
    """Return the settings with the model's projector, if the files are as they should be."""
    with suppress(ConfigError):  # starting reports what is wrong
        return await run_sync(resolve_model, config)
    return config


def _preview(config: ServerConfig, engine: Engine | None, memory: Memory) -> MemoryPreview:
    return preview(read_shape(config.require_model()), settings_of(config, engine), memory)


def _given_back(memory: Memory, running: ServerConfig, engine: Engine) -> Memory:
    """Include, by formula, what a server holds on devices on which nobody can measure that."""
    if running.model is None:
        return memory
    try:
        shape = read_shape(running.model)
    except ModelFileError:
        return memory
    empty = Memory(memory.ram, tuple(replace(gpu, free=gpu.total) for gpu in memory.gpus))
    settings = plan(shape, settings_of(running, engine), empty)

    def credited(gpu: MemoryPool, need: Requirement) -> MemoryPool:
        held = min(need.total or need.weights, gpu.total - gpu.free)
        return gpu if gpu.returned else replace(gpu, free=gpu.free + held, returned=held)

    needs = estimate(shape, settings, empty.gpus)[1:]
    return Memory(memory.ram, tuple(map(credited, memory.gpus, needs)))


class ModelStats:
    """Usage and memory of models, and whether they fit. For coroutines of the supervisor's loop.

    `pid` returns the server that would exit before another starts.
    """

    def __init__(self, pid: Callable[[], int | None]) -> None:
        self._pid = pid
        self._forecaster = Forecaster()

    def history(self, config: ServerConfig, warn: Callable[[str], None]) -> LoadHistory:
        """Return the history of loads and favourites; `warn` is called with its problems."""
        return LoadHistory(config.history, warn)

    async def memory_use(self) -> MemoryUse | None:
        """Measure the memory that the server holds now; None without a server."""
        pid = self._pid()
        return None if pid is None else await run_sync(memory_use, pid)

    async def fits(self, models: Sequence[Path], config: ServerConfig) -> dict[Path, Verdict]:
        """Judge by formula which models would fit into the memory that is free now."""
        engine, running = None, Running(self._pid())
        measured = await run_sync(free_memory, running.pid)
        memory: Memory | None = measured
        with suppress(KittyError):  # a start reports what is wrong with the engine
            engine, memory = await self._forecaster.find_memory(config, running, measured)
        verdicts = dict.fromkeys(models, Verdict.UNKNOWN)
        if memory is None:
            return verdicts
        settings = await run_sync(settings_of, config, engine)
        for model in models:
            with suppress(ModelFileError):
                verdicts[model] = await run_sync(_verdict, model, settings, memory)
        return verdicts


def _verdict(model: Path, settings: MemorySettings, memory: Memory) -> Verdict:
    shape = read_shape(model)
    return MemoryPreview(allocate(shape, plan(shape, settings, memory), memory)).verdict
