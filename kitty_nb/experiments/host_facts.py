"""What a run was made on: the machine, and the libraries."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from kitty_nb.isolated_server import free_memory

_CPU_NAME = ("model name", "Model", "Hardware")  # of proc_cpuinfo(5), by architecture
_LIBRARIES = ("kitty_nb", "xllamacpp", "gguf", "httpx", "anyio", "pydantic", "psutil", "numpy")


class Gpu(BaseModel):
    """A GPU.

    Attributes:
        name: What its driver calls it.
        memory: All of its own, in bytes.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    memory: int


class HostFacts(BaseModel):
    """A machine.

    Attributes:
        name: What it is called on its network.
        cpu: What its processor is called.
        cores: Cores of the processor, where the system tells.
        threads: What it can run at once, by the processor.
        usable_threads: What this program may use of that.
        ram: Bytes of memory.
        gpus: Those of NVIDIA; a Mac's belongs to its processor.
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
    return HostFacts(
        name=platform.node(),
        cpu=_cpu_name(),
        cores=psutil.cpu_count(logical=False),
        threads=psutil.cpu_count(),
        usable_threads=_usable_threads(),
        ram=memory.ram.total,
        gpus=tuple(Gpu(name=gpu.name, memory=gpu.total) for gpu in memory.gpus),
        os=platform.platform(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
    )


def library_versions() -> dict[str, str]:
    """Give the versions of those libraries that are there and that a run goes through."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _usable_threads() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)  # macOS pins nothing
    return len(affinity(0)) if affinity else psutil.cpu_count()


def _cpu_name() -> str:
    if psutil.MACOS:
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return told or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    says = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return next((says[key] for key in _CPU_NAME if says.get(key)), platform.machine())
