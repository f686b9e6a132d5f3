"""The devices that an engine would use: GPUs, and machines that lend theirs."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from kitty_nb.config.flags import value_of
from kitty_nb.engine.locate import EngineKind, locate_engine, output_of
from kitty_nb.engine.rpc import by_host, with_workers

if TYPE_CHECKING:
    from kitty_nb.config import ServerConfig

_MIB = 1 << 20
_ANSWER_WITHIN = 20.0  # seconds, on a busy machine; a GPU's driver wakes up when it is used first
# Seconds. Machines of --rpc serve one client at a time: a server that runs keeps others waiting.
_REMOTE_WITHIN = 2.0
_LISTED = "Available devices"
# One of these exists if Linux has a GPU's driver, on a PC, in WSL or on a Jetson.
_DRIVERS = ("/dev/dri", "/dev/kfd", "/dev/dxg", "/dev/nvidiactl", "/dev/nvmap")
_DEVICE = re.compile(
    r"^  (?P<name>\S+): (?P<about>.*) \((?P<total>\d+) MiB, (?P<free>\d+) MiB free\)$", re.MULTILINE
)
_names: dict[tuple[object, ...], tuple[str, ...]] = {}


@dataclass(frozen=True, slots=True)
class Device:
    """A device with its memory, such as a GPU, or a machine that serves as one."""

    name: str  # the engine's name for it, e.g. `Vulkan0`
    # Its description, e.g. `AMD Radeon RX 7900 XTX`; for another machine, its address.
    about: str
    free: int  # free bytes of its memory
    total: int  # bytes of its memory

    def __str__(self) -> str:
        return f"{self.name} ({self.about})"


def parse_devices(text: str) -> tuple[Device, ...]:
    """Parse the output of `llama-server --list-devices`."""
    return tuple(
        Device(found["name"], found["about"], int(found["free"]) * _MIB, int(found["total"]) * _MIB)
        for found in _DEVICE.finditer(text)
    )


async def device_names(config: ServerConfig) -> tuple[str, ...] | None:
    """Return the devices' names as first listed, before a server kept other machines busy.

    Raises:
        EngineError: There is no usable engine.
    """
    engine = await locate_engine(config.binary)
    question = engine.command, remote_machines(config), _chosen(config)
    if question not in _names and (found := await list_devices(config)) is not None:
        _names[question] = tuple(map(str, found))
    return _names.get(question)


async def list_devices(config: ServerConfig) -> tuple[Device, ...] | None:
    """Ask the engine for the devices that it would use with some settings, in its order.

    Returns:
        The devices; None if this build can't list them, or machines of `--rpc` are busy.

    Raises:
        EngineError: There is no usable engine.
    """
    engine = await locate_engine(config.binary)
    if engine.dialect.option("--list-devices") is None:
        return None
    # Python is slow to report that there are none.
    if engine.kind is EngineKind.EMBEDDED and not await anyio.to_thread.run_sync(_has_driver):
        return ()
    remote = remote_machines(config)
    servers = ("--rpc", remote) if remote and not config.rpc_hosts else ()
    command = (*with_workers(config, engine.command), *servers, "--list-devices")
    answer = by_host(await output_of(command, _REMOTE_WITHIN if servers else _ANSWER_WITHIN))
    if _LISTED not in answer:
        return None
    found = parse_devices(answer)
    if (chosen := _chosen(config)) is not None:
        by_name = {device.name: device for device in found}
        return tuple(by_name[name] for name in chosen.split(",") if name in by_name)
    # Other machines come first, as in llama.cpp, so that less of the model travels.
    return tuple(sorted(found, key=lambda device: not device.name.startswith("RPC")))


def _chosen(config: ServerConfig) -> str | None:
    return value_of(config.extra_args, {"-dev", "--device"})


def _has_driver() -> bool:
    return sys.platform != "linux" or any(Path(file).exists() for file in _DRIVERS)


def remote_machines(config: ServerConfig) -> str | None:
    """Return the addresses of other machines that lend their devices; None without any."""
    return ",".join(config.rpc_hosts) or value_of(config.extra_args, {"--rpc"})
