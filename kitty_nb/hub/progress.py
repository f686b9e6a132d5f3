"""How far a download is, how fast, and how long it will take."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from rich.filesize import decimal

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DownloadProgress", "DownloadStep", "Meter", "describe"]

_WINDOW = 10.0  # seconds over which the rate is an average
_SETTLED = 1.0  # seconds before a rate is worth saying
_REPORT_EVERY = 0.25  # seconds


class DownloadStep(StrEnum):
    """What is being done."""

    CHECKING = "checking what is there"
    DOWNLOADING = "downloading"
    WAITING = "connection lost, trying again"
    DONE = "complete"


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far a download is.

    Attributes:
        bytes_done: Bytes of all files that are on the disk.
        bytes_total: Bytes of all files.
        rate: Bytes per second, averaged over the last ten seconds; None when not known yet.
        eta: Seconds that the rest will take; None when not known.
        file: The file that it is at, as the repository calls it.
        step: What is being done with it.
    """

    bytes_done: int
    bytes_total: int
    rate: float | None
    eta: float | None
    file: str
    step: DownloadStep

    @property
    def fraction(self) -> float:
        """From 0 to 1."""
        return self.bytes_done / self.bytes_total if self.bytes_total else 1.0


class Meter:
    """Counts bytes and reports a few times a second.

    Args:
        total: Bytes of all files.
        report: Called with the progress; an error in it ends the download.
        clock: Seconds.
    """

    def __init__(
        self,
        total: int,
        report: Callable[[DownloadProgress], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._report, self._clock = total, report, clock
        self._done = 0
        self._file = ""
        self._step = DownloadStep.CHECKING
        self._samples: deque[tuple[float, int]] = deque()
        self._came = 0
        self._reported = float("-inf")

    def enter(self, step: DownloadStep, file: str | None = None) -> None:
        """Go on to another step, or another file."""
        self._step, self._file = step, self._file if file is None else file
        self._tell()

    def found(self, count: int) -> None:
        """Count bytes that were there already, or with a minus those that are not any more."""
        self._done += count
        self._tell(sparingly=True)

    def came(self, count: int) -> None:
        """Count bytes that have come."""
        self._done += count
        self._came += count
        self._tell(sparingly=True)

    @property
    def progress(self) -> DownloadProgress:
        """How far it is now."""
        now = self._clock()
        rate = self._rate(now) if self._step is not DownloadStep.DONE else None
        eta = (self._total - self._done) / rate if rate else None
        return DownloadProgress(self._done, self._total, rate, eta, self._file, self._step)

    def _rate(self, now: float) -> float | None:
        while len(self._samples) > 1 and self._samples[1][0] <= now - _WINDOW:
            self._samples.popleft()
        if not self._samples or now - self._samples[0][0] < _SETTLED:
            return None
        since, before = self._samples[0]
        return (self._came - before) / (now - since)

    def _tell(self, *, sparingly: bool = False) -> None:
        now = self._clock()
        if self._step is DownloadStep.DOWNLOADING and not self._samples:
            self._samples.append((now, self._came))
        if sparingly and now - self._reported < _REPORT_EVERY:
            return
        self._reported = now
        if self._samples:
            self._samples.append((now, self._came))
        self._report(self.progress)


def describe(progress: DownloadProgress) -> str:
    """One line, e.g. `downloading · 43 % · 1.2 GB of 2.8 GB · 34.5 MB/s · 0:00:47 left`."""
    done, total = decimal(progress.bytes_done), decimal(progress.bytes_total)
    parts = [progress.step, f"{int(progress.fraction * 100)} %", f"{done} of {total}"]
    if progress.rate is not None:
        parts.append(f"{decimal(int(progress.rate))}/s")
    if progress.eta is not None:
        parts.append(f"{timedelta(seconds=round(progress.eta))} left")
    return " · ".join(parts)
