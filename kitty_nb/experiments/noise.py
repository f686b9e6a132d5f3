"""Interference: how busy other processes kept the machine during a measurement."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
from anyio.to_thread import run_sync

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_BUSY = 0.1  # fraction of processor time beyond which other processes distort a measurement
_SHORT = 0.2  # seconds; systems count processor time in hundredths, too coarse for less
_IDLE = ("idle", "iowait")
_TWICE = ("guest", "guest_nice")  # Linux includes these in user and nice


@dataclass(frozen=True, slots=True)
class Noise:
    """The state of the machine during the requests of a trial.

    Attributes:
        load: The busy fraction of the processor time.
        others: The fraction used by anything but the server and its client: other processes, and
            other threads of this one, such as those of notebook cells.
        clock_ghz: The processors' clock at the end, in GHz; None if unknown.
        temperature_celsius: The warmest processor sensor at the end, in °C; None without sensors.
    """

    load: float
    others: float
    clock_ghz: float | None = None
    temperature_celsius: float | None = None

    @property
    def busy(self) -> bool:
        """True if other processes are likely to have distorted the measurement."""
        return self.others > _BUSY

    @property
    def warning(self) -> str:
        """What to do about other work, in sentences; empty if it did not disturb."""
        if not self.busy:
            return ""
        return (
            f"Other work, in this process or others, used {self.others * 100:.0f} % of the"
            " processors. Stop it, and measure again."
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Cumulative processor time up to a moment, in seconds per processor.

    Attributes:
        passed: All of it, idle time included.
        busy: The time spent in any process.
        own: The time spent in the server and its client.
    """

    passed: float
    busy: float
    own: float


async def usage_with(pid: int) -> Usage:
    """Read the processor time so far of a server and its client, which is the calling thread."""
    client = time.thread_time()
    times, server = await run_sync(_read, pid)
    return usage_of(times, server + client, psutil.cpu_count() or 1)


def usage_of(times: Mapping[str, float], own: float, processors: int) -> Usage:
    """Compute a `Usage` from the fields of `psutil.cpu_times`. Pure."""
    passed = sum(seconds for name, seconds in times.items() if name not in _TWICE)
    busy = passed - sum(times.get(name, 0.0) for name in _IDLE)
    return Usage(passed / processors, busy / processors, own / processors)


def noise_between(
    before: Usage,
    after: Usage,
    clock_mhz: float | None = None,
    sensors: Mapping[str, Sequence[float]] | None = None,
) -> Noise | None:
    """Return the machine's state between two moments; None if they are too close. Pure.

    Sensors report temperatures in °C.
    """
    passed = after.passed - before.passed
    if passed < _SHORT:
        return None
    busy, own = after.busy - before.busy, after.own - before.own
    warmest = max((degree for several in (sensors or {}).values() for degree in several), default=0)
    return Noise(
        load=min(1.0, max(0.0, busy / passed)),
        others=min(1.0, max(0.0, (busy - own) / passed)),
        clock_ghz=clock_mhz / 1000 if clock_mhz else None,
        temperature_celsius=warmest or None,
    )


async def noise_since(before: Usage, pid: int) -> Noise | None:
    """Return the machine's state since a moment, with the present clock and temperature."""
    after = await usage_with(pid)
    return noise_between(before, after, *await run_sync(_clock_and_sensors))


def _read(pid: int) -> tuple[dict[str, float], float]:
    seconds = 0.0
    try:
        server = psutil.Process(pid)
        for process in (server, *server.children(recursive=True)):
            times = process.cpu_times()
            seconds += times.user + times.system
    except psutil.Error:
        pass  # the server just exited, and the trial will fail
    return psutil.cpu_times()._asdict(), seconds


def _clock_and_sensors() -> tuple[float | None, dict[str, list[float]]]:
    try:
        clock: Any = psutil.cpu_freq()
    except (OSError, RuntimeError, NotImplementedError):  # a virtual machine, or a Mac
        clock = None
    found: Mapping[str, Any] = getattr(psutil, "sensors_temperatures", dict)()
    sensors = {
        name: [one.current for one in several]
        for name, several in found.items()
        if name in {"coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal"}
    }
    return (clock.current if clock else None), sensors
