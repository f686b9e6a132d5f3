"""The machine that a run was made on, and the libraries that it went through."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from kitty_nb.isolated_server import free_memory

_CPU_NAME = re.compile(r"^(?:model name|Model)\s*:\s*(.+)$", re.MULTILINE)  # proc_cpuinfo(5)
_LIBRARIES = ("kitty_nb", "xllamacpp", "gguf", "httpx", "anyio", "pydantic", "psutil", "numpy")


class Gpu(BaseModel):
    """A GPU as its driver names it, and its own memory in bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    memory: int


class HostFacts(BaseModel):
    """A machine.

    Attributes:
        name: Its name on the network.
        cpu: The processor's name.
        cores: Cores of the processor, where the system tells.
        threads: Hardware threads of the processor.
        usable_threads: Those that this program may use.
        ram: Bytes of memory.
        gpus: NVIDIA's GPUs; a Mac's belongs to its processor.
        os: The operating system with its version.
        python: Python's implementation and version.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    cpu: str
    cores: int | None
    threads: int | None
    usable_threads: int | None
    ram: int
    gpus: tuple[Gpu, ...]
    os: str
    python: str


def host_facts() -> HostFacts:
    """Describe this machine. It asks drivers and programs: call it in a worker thread."""
    memory = free_memory()
    affinity = getattr(os, "sched_getaffinity", None)  # macOS pins nothing
    return HostFacts(
        name=platform.node(),
        cpu=_cpu_name() or platform.machine(),
        cores=psutil.cpu_count(logical=False),
        threads=psutil.cpu_count(),
        usable_threads=len(affinity(0)) if affinity else psutil.cpu_count(),
        ram=memory.ram.total,
        gpus=tuple(Gpu(name=gpu.name, memory=gpu.total) for gpu in memory.gpus),
        os=platform.platform(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
    )


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that a run goes through."""
    versions = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _cpu_name() -> str:
    if psutil.MACOS:
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    with suppress(OSError):
        if found := _CPU_NAME.search(Path("/proc/cpuinfo").read_text(errors="replace")):
            return found[1]
    return ""
