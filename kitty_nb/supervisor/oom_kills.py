"""Counting the kills of the system's out-of-memory killer."""

from __future__ import annotations

from pathlib import Path

_COUNTERS = Path("/proc/vmstat")


def oom_kills(counters: Path = _COUNTERS) -> int | None:
    """Count the processes that Linux has killed for memory since it started.

    It counts those in control groups too, containers' among them, and needs no rights. A server
    that was ended by SIGKILL while the count rose was most likely one of them.

    Args:
        counters: Where Linux (since 4.13) keeps its counters.

    Returns:
        None where the system does not tell.
    """
    try:
        lines = counters.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
