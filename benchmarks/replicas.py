"""The gain from a second replica: requests per second of one, and of two.

Each worker of the Dask cluster is pinned to a core of its own, with the server that it starts; both
fleets are up all the time, and take turns. Then the cost of a replica besides its server: the
messages that it sends, and the memory of its worker. The machine should do nothing else meanwhile.

    python -m benchmarks.replicas [--engine PATH] [--model PATH]
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psutil

from benchmarks.dask_sweep import pinned_cluster
from benchmarks.subject import read_subject
from kitty_nb import Fleet

if TYPE_CHECKING:
    from distributed import Client

_ROUNDS = 3
_REQUESTS = 24
_AT_ONCE = 2  # requests per replica: the next one waits in it while one is answered
_ANSWER = 16  # tokens
_TEXT = "The quick brown fox jumps over the lazy dog while the band plays on. " * 5
_WATCHED = 10.0  # seconds


def main() -> None:
    """Print the tables."""
    subject = read_subject(__doc__)
    cores = sorted(psutil.Process().cpu_affinity() or ())[:2]
    with subject.folder(f"; workers pinned to {cores}") as folder, ExitStack() as stack:
        config = subject.config(folder, context_size=2048, threads=1, parallel=1)
        fleets = []
        for count in (1, 2):
            client = stack.enter_context(pinned_cluster(folder, cores[:count]))
            before = client.run(_memory)
            fleet = stack.enter_context(Fleet.run(client=client, replicas=count, config=config))
            fleet.wait_ready(timeout=300)
            after = client.run(_memory)
            fleets.append((fleet, client, before, after))
            _rate(fleet, count, requests=4)
        print(f"{'':<12}{'one replica':>16}{'two':>14}{'ratio':>10}")
        ratios = []
        for number in range(1, _ROUNDS + 1):
            one, two = (_rate(fleet, count) for count, (fleet, *_) in enumerate(fleets, 1))
            ratios.append(two / one)
            print(f"{f'round {number}':<12}{one:>14.2f}/s{two:>12.2f}/s{two / one:>8.2f} x")
        print(f"{'median':<12}{statistics.median(ratios):>38.2f} x\n")
        fleet, client, before, after = fleets[-1]
        grown = [after[worker] - before[worker] for worker in before]
        print(f"memory that a replica adds to its worker: {max(grown) / 1e6:.0f} MB")
        for busy in (False, True):
            rate = _messages(fleet, client, busy)
            print(f"{'busy' if busy else 'idle'} replica: {rate:.2f} messages per second")
        sizes = [len(message) for _, message in _events(client)]
        print(f"bytes of a message: {statistics.mean(sizes):.0f} on average, {max(sizes)} at most")


def _memory() -> int:
    return int(psutil.Process().memory_info().rss)


def _rate(fleet: Fleet, replicas: int, requests: int = _REQUESTS) -> float:
    def ask(number: int) -> None:
        request = {
            "prompt": f"{number} {time.monotonic_ns()} {_TEXT}",
            "n_predict": _ANSWER,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        fleet.http.post("/completion", json=request).raise_for_status()

    began = time.perf_counter()
    with ThreadPoolExecutor(_AT_ONCE * replicas) as pool:
        list(pool.map(ask, range(requests)))
    return requests / (time.perf_counter() - began)


def _messages(fleet: Fleet, client: Client, busy: bool) -> float:
    before, began = len(_events(client)), time.monotonic()
    while time.monotonic() - began < _WATCHED:
        if busy:
            _rate(fleet, 2, requests=4)
        else:
            time.sleep(_WATCHED)
    return (len(_events(client)) - before) / (time.monotonic() - began) / 2


def _events(client: Client) -> list[tuple[float, bytes]]:
    """Return the messages of replicas that the scheduler still has: the last thousand."""
    topics = client.get_events()
    return [one for topic, told in topics.items() if topic.startswith("kitty_nb-") for one in told]


if __name__ == "__main__":
    main()
