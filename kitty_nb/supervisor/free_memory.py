"""The memory that is free, and that a server holds: RAM, and each device's own."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import psutil

from kitty_nb.catalog.memory import Memory, MemoryPool
from kitty_nb.supervisor.events import MemoryUse
from kitty_nb.supervisor.process import family

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kitty_nb.engine.devices import Device


def free_memory(pid: int | None = None) -> Memory:
    """Measure what is free, counting in what a running server will give back.

    The GPUs are those that NVIDIA's library knows; see `with_devices` for others.

    Args:
        pid: The server that ends before another starts. What its children hold counts too.
    """
    ram = psutil.virtual_memory()
    holders = [] if pid is None else family(pid)
    returned = sum(map(_held, holders))
    return Memory(
        MemoryPool("RAM", min(ram.available + returned, ram.total), ram.total, returned),
        _gpus({process.pid for process in holders}),
    )


def with_devices(memory: Memory, devices: Iterable[Device] | None) -> Memory:
    """Replace the GPUs by the devices that the engine lists, keeping what a server gives back.

    Args:
        memory: As `free_memory` measures it.
        devices: As the engine lists them; None where it does not. A Mac's GPU shares the RAM, and
            so does not count.
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
    """Measure what a server and its children hold; None when it has just ended."""
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
    """Bytes that become free with the end of a process.

    Weights that are mapped from a file are not among them: the system counts them as available.
    """
    try:
        usage = process.memory_info()
    except psutil.Error:
        return 0
    return max(0, usage.rss - getattr(usage, "shared", 0))  # macOS does not tell the shared part


def _gpus(pids: set[int]) -> tuple[MemoryPool, ...]:
    """The GPUs that NVIDIA's library knows. Whatever is amiss with it, there are none."""
    try:
        # Optional (`kitty_nb[gpu]`), and slow to begin with: it talks to the driver.
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
