"""The gain from a second worker: the same trials on one worker, and on two.

Each worker is pinned to a core of its own, with the servers that it starts; both clusters are up
all the time, and take turns. The demo model fits into a core's own cache, so that the two do not
compete for memory; answers of another model are kept short. The machine should do nothing else
meanwhile.

    python -m benchmarks.dask_sweep [--engine PATH] [--model PATH]
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import psutil
from distributed import Client, LocalCluster

from benchmarks.subject import read_subject
from kitty_nb.experiments import Outcome, Sweep

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kitty_nb import ServerConfig

_ROUNDS = 3
_TRIALS = 8
_PROMPTS = [f"Who are you? {number}" for number in range(12)]
_ANSWER, _SHORT_ANSWER = 768, 16  # tokens


def main() -> None:
    """Print the table."""
    subject = read_subject(__doc__)
    cores = sorted(psutil.Process().cpu_affinity() or ())[:2]
    with subject.folder(f"; workers pinned to {cores}") as folder, ExitStack() as stack:
        print(f"{'':<12}{'one worker':>14}{'two':>12}{'ratio':>10}")
        config = subject.config(folder, context_size=1024, threads=1, parallel=1)
        answer = _SHORT_ANSWER if subject.model else _ANSWER
        clients = [stack.enter_context(pinned_cluster(folder, cores[:count])) for count in (1, 2)]
        for client in clients:
            _seconds(client, config, answer, repeats=2)
        ratios = []
        for number in range(1, _ROUNDS + 1):
            one, two = (_seconds(client, config, answer, repeats=_TRIALS) for client in clients)
            ratios.append(one / two)
            print(f"{f'round {number}':<12}{one:>12.1f} s{two:>10.1f} s{one / two:>8.2f} x")
        print(f"{'median':<12}{statistics.median(ratios):>36.2f} x")


@contextmanager
def pinned_cluster(folder: Path, cores: list[int]) -> Iterator[Client]:
    """Run a cluster with a worker on each of some cores."""
    with (
        LocalCluster(
            n_workers=len(cores),
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            local_directory=str(folder),
            resources={"kitty_trial": 1},
        ) as cluster,
        Client(cluster) as client,
    ):
        workers = client.scheduler_info()["workers"]
        for worker, core in zip(workers, cores, strict=True):
            client.run(lambda core: psutil.Process().cpu_affinity([core]), core, workers=[worker])
        yield client


def _seconds(client: Client, config: ServerConfig, answer: int, repeats: int) -> float:
    with Sweep(
        config=config,
        prompts=_PROMPTS,
        max_tokens=answer,
        repeats=repeats,
        busy_repeats=0,  # one worker alone would measure trials again, two wouldn't
        store=config.log_dir / f"{time.monotonic_ns()}.journal",
    ) as sweep:
        began = time.perf_counter()
        rows = sweep.run(client=client).wait().rows
        seconds = time.perf_counter() - began
    assert [row.outcome for row in rows] == [Outcome.DONE] * repeats, rows
    return seconds


if __name__ == "__main__":
    main()
