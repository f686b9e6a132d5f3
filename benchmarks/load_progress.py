"""The accuracy of the load bar and the ETA, and the cost of watching a load.

`python -m benchmarks.load_progress [--engine PATH] [--model PATH]` loads that model, or a demo
model of 1.65 GB, again and again with that engine, or the one found as usual: from disk (its page
cache is dropped for that) and from the page cache, mapped and copied, first without any history and
then with one. If the system allows it (as root, with control groups), the disk is throttled, too,
and the scripted stand-in of the tests loads evenly for ten seconds.

Bar error: mean over the load's time of |fraction shown - share of the time actually elapsed|.
ETA error: |ETA shown at a quarter of the time - time actually left| / time actually left.
Watching: CPU time of this process from spawn to ready, as a share of one core.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.subject import read_subject, stand_in
from kitty_nb import ModelManager, write_demo_model
from kitty_nb.supervisor.events import Event, LoadProgress, ProgressMade, StateChanged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kitty_nb import ServerConfig

_SIZE = 1_650_000_000  # bytes
_ROUNDS = 5
_SLOW_DISK = 150_000_000  # bytes a second: a load of eleven seconds
_EVEN_LOAD = ("--load-seconds", "10", "--prepare-seconds", "1")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Load:
    """One load as the bar showed it.

    Attributes:
        shown: Seconds since the start and the progress shown from then on.
        seconds: The duration of the load.
        watching: Share of one core that this process used from spawn to ready.
    """

    shown: list[tuple[float, LoadProgress]]
    seconds: float
    watching: float

    def bar_error(self) -> float:
        """Return the mean distance of the bar from the truth."""
        ends = [*(at for at, _ in self.shown[1:]), self.seconds]
        return sum(
            _distance(progress.fraction, at / self.seconds, end / self.seconds)
            for (at, progress), end in zip(self.shown, ends, strict=True)
        )

    def eta_error(self) -> float | None:
        """Return how far off the ETA is at a quarter, or None when none is shown then."""
        early = [entry for entry in self.shown if entry[0] <= self.seconds / 4]
        if not early or (eta := early[-1][1].eta) is None:
            return None
        left = self.seconds - early[-1][0]
        return abs(eta - left) / left


def _distance(fraction: float, begin: float, end: float) -> float:
    """Integrate |fraction - share| over the shares from begin to end."""
    if begin < fraction < end:
        return ((fraction - begin) ** 2 + (end - fraction) ** 2) / 2
    return abs(fraction - (begin + end) / 2) * (end - begin)


def main() -> None:
    """Print the tables."""
    subject = read_subject(__doc__)
    print(f"{subject}; medians of {_ROUNDS}\n")
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".benchmark-") as name:
        folder = Path(name)
        config = subject.config(folder, _SIZE, context_size=512, threads=1, parallel=1)
        model = config.model
        assert model
        with model.open("rb") as file:
            os.fsync(file.fileno())
        print(f"{'':34}seconds  bar error  ETA error at 1/4  watching")
        _rounds("disk as it is", config, folder, "cold", "hot")
        _rounds("copied", config.replace(extra_args=("--no-mmap",)), folder, "hot")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_slow_disk(model))
            except OSError as error:
                print(f"(the disk can't be throttled here: {error})")
            else:
                _rounds(f"disk at {_SLOW_DISK / 1e6:.0f} MB/s", config, folder, "cold")
        _even_load(config, folder)


def _rounds(title: str, config: ServerConfig, folder: Path, *temperatures: str) -> None:
    loads: dict[str, list[Load]] = {}
    for number in range(_ROUNDS):
        history = folder / f"{title}-{number}.sqlite3"
        for turn in ("first", "second"):
            for temperature in temperatures:
                _prepare_cache(config.model, temperature)
                load = _load(config.replace(history=history))
                loads.setdefault(f"{turn} {temperature}", []).append(load)
    for name, group in loads.items():
        _row(f"{title}: {name}", group)


def _even_load(config: ServerConfig, folder: Path) -> None:
    model = write_demo_model(folder / "small.gguf", size=200_000_000)
    config = config.replace(
        binary=stand_in(folder),
        models_dir=folder,
        model=model,
        extra_args=_EVEN_LOAD,
        history=folder / "even.sqlite3",
    )
    for turn in ("first", "second"):
        _row(f"stand-in, even load: {turn}", [_load(config)])


def _load(config: ServerConfig) -> Load:
    """Load the model once, in a manager of its own."""
    shown: list[tuple[float, LoadProgress]] = []
    spawned: list[tuple[float, float]] = []
    with ModelManager(config=config) as manager:

        def note(event: Event) -> None:
            now, used = time.monotonic(), time.process_time()
            if isinstance(event, ProgressMade):
                shown.append((now - began, event.progress))
                if event.progress.fraction == 1:
                    spawned.append((now, used))
            elif isinstance(event, StateChanged) and event.state.pid and not spawned:
                spawned.append((now, used))

        unsubscribe = manager.subscribe(note)
        began = time.monotonic()
        manager.start().wait(300)
        unsubscribe()
    (first, used_then), (last, used_now) = spawned
    watching = (used_now - used_then) / (last - first)
    return Load(shown[:-1], shown[-1][0], watching)


def _prepare_cache(model: Path | None, temperature: str) -> None:
    assert model is not None
    with model.open("rb", buffering=0) as file:
        if temperature == "cold":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(1 << 24):
                pass


@contextlib.contextmanager
def _slow_disk(model: Path) -> Iterator[None]:
    """Limit the rate at which this process and its children read the model's disk."""
    device = model.stat().st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    old = (_CGROUP / "blkio").is_dir()
    parent = _CGROUP / "blkio" if old else _CGROUP
    group = parent / f"kitty_nb-{os.getpid()}"
    group.mkdir()
    try:
        if old:
            limit = group / "blkio.throttle.read_bps_device"
            limit.write_text(f"{numbers} {_SLOW_DISK}")
        else:
            (group / "io.max").write_text(f"{numbers} rbps={_SLOW_DISK}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (parent / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def _row(name: str, loads: list[Load]) -> None:
    seconds = statistics.median(load.seconds for load in loads)
    bar = statistics.median(load.bar_error() for load in loads)
    known = [error for load in loads if (error := load.eta_error()) is not None]
    eta = f"{statistics.median(known):.3f}" if len(known) == len(loads) else "none shown"
    watching = statistics.median(load.watching for load in loads)
    print(f"{name:34}{seconds:7.2f}  {bar:9.3f}  {eta:>16}  {watching:8.2%}", flush=True)


if __name__ == "__main__":
    main()
