"""How busy the machine was with other things while a server was measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
from anyio.to_thread import run_sync

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_BUSY = 0.1  # share of the processors beyond which others distort what is measured
_SHORT = 0.2  # seconds; systems count in hundredths, so of less no share can be told
_IDLE = ("idle", "iowait")
_TWICE = ("guest", "guest_nice")  # which Linux counts within user and nice, too


@dataclass(frozen=True, slots=True)
class Noise:
    """The state of the machine during the requests of a trial.

    Attributes:
        load: The share of the processors that was busy.
        others: The share that processes other than the server and its client used.
        clock_ghz: The processors' clock at the end; None where it is not known.
        temperature_celsius: The warmest processor sensor at the end; None where there is none.
    """

    load: float
    others: float
    clock_ghz: float | None = None
    temperature_celsius: float | None = None

    @property
    def busy(self) -> bool:
        """True if other processes are likely to have distorted the measurement."""
        return self.others > _BUSY


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds of processor time up to a moment, over the number of processors.

    Attributes:
        passed: Those of the clock.
        busy: Those in which the processors were busy, with whatever.
        own: Those that the server and its client used.
    """

    passed: float
    busy: float
    own: float


async def usage_with(pid: int) -> Usage:
    """Read the processor time so far.

    Args:
        pid: The server's; its client is the thread that calls.
    """
    client = time.thread_time()
    times, server = await run_sync(_read, pid)
    return usage_of(times, server + client, psutil.cpu_count() or 1)


def usage_of(times: Mapping[str, float], own: float, processors: int) -> Usage:
    """Make a `Usage` of `psutil.cpu_times` by name. Pure."""
    passed = sum(seconds for name, seconds in times.items() if name not in _TWICE)
    busy = passed - sum(times.get(name, 0.0) for name in _IDLE)
    return Usage(passed / processors, busy / processors, own / processors)


def noise_between(
    before: Usage,
    after: Usage,
    clock_mhz: float | None = None,
    sensors: Mapping[str, Sequence[float]] | None = None,
) -> Noise | None:
    """Tell what the machine did between two moments; None where they are too close. Pure.

    Args:
        before: The first moment.
        after: The second.
        clock_mhz: The processors' clock; None or 0 where it is not known.
        sensors: The temperatures of the processors by sensor.
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
    """Tell what the machine has done since a moment, with clock and temperature now."""
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
        pass  # it has just ended, and so will the trial
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
