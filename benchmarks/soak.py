"""A search for leaks: starts and stops in one process, some by a kill.

Each cycle starts the engine and ends it by a stop, a forced stop, a restart or SIGKILL, at a random
moment. Threads, files, processes and Python's memory blocks (`blocks`) stay constant from the first
tenth on. Resident memory (MB) grows a little in the first half, while the history of loads grows to
the 200 that each start reads and the allocator settles.

    python -m benchmarks.soak [--cycles 500] [--seed 0] [--engine PATH] [--model PATH]
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import astuple, dataclass

import psutil

from benchmarks.subject import subject_of, subject_parser
from kitty_nb import ModelManager, ServerStatus
from kitty_nb.errors import ServerError

_CYCLES = 500
_SHOWN_AT = (0.1, 0.25, 0.5, 0.75, 1.0)
_SECONDS = 20.0


@dataclass(frozen=True)
class _Left:
    """This process while no server runs; memory in MB, blocks as Python counts them."""

    threads: int
    files: int
    processes: int
    memory: float
    blocks: int


def main() -> None:
    """Print the table."""
    parser = subject_parser(__doc__)
    parser.add_argument("--cycles", type=int, default=_CYCLES)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    cycles, dice = asked.cycles, random.Random(asked.seed)  # noqa: S311
    subject = subject_of(asked)
    shown = {max(1, round(cycles * share)) for share in _SHOWN_AT}
    print(
        f"{'cycles':>8}{'kills':>8}{'seconds':>9}{'threads':>9}{'files':>7}{'processes':>11}{'MB':>8}"
        f"{'blocks':>10}"
    )
    with subject.folder() as folder:
        config = subject.config(folder, context_size=512, threads=1, restart_max=0)
        began, kills = time.monotonic(), 0
        with ModelManager(config=config) as manager:
            for cycle in range(1, cycles + 1):
                kills += _cycle(manager, dice)
                if cycle in shown:
                    threads, files, processes, memory, blocks = astuple(_left())
                    seconds = time.monotonic() - began
                    print(
                        f"{cycle:>8}{kills:>8}{seconds:>9.0f}{threads:>9}{files:>7}"
                        f"{processes:>11}{memory:>8.1f}{blocks:>10,}"
                    )


def _cycle(manager: ModelManager, dice: random.Random) -> bool:
    """Run one start and its end; return whether that was a kill."""
    ready = dice.random() < 0.5
    operation = manager.start()
    while manager.state.pid is None:
        time.sleep(0.001)
    if ready:
        operation.wait(_SECONDS)
    else:
        time.sleep(dice.uniform(0, 0.3))
    kill = dice.random() < 0.4
    if kill and (pid := manager.state.pid):
        os.kill(pid, signal.SIGKILL)
        while manager.state.status is not ServerStatus.CRASHED:
            time.sleep(0.001)
    elif dice.random() < 0.2:
        manager.restart().wait(_SECONDS)
    manager.stop(force=dice.random() < 0.3).wait(_SECONDS)
    with suppress(ServerError):  # it was stopped before it was ready
        operation.wait(_SECONDS)
    return kill


def _left() -> _Left:
    gc.collect()
    me = psutil.Process()
    return _Left(
        threading.active_count(),
        me.num_fds(),
        len(me.children(recursive=True)),
        me.memory_info().rss / 1e6,
        sys.getallocatedblocks(),
    )


if __name__ == "__main__":
    main()
