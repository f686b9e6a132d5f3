"""False winners among comparisons of equals, and true differences of 10 % that are found.

As in a sweep, a new server is started for each measurement: two processes with the same settings
differ by about 1 % throughout their lives. In each round, in random order, one server gives an
answer, another the same answer, and a third a longer one, which takes about 10 % more time; the
true ratio is that of the whole series. Each of 100 comparisons has the same number of rounds, drawn
at random from the series; they share rounds, so the counts are not independent. All of it is done
alone, and beside a process that keeps a core busy.

    python -m benchmarks.verdicts [--engine PATH] [--model PATH] [--seconds 300] [--block 8]
        [--busy-cores 0 1]
"""

from __future__ import annotations

import math
import sys
import time
from itertools import count
from random import Random
from typing import TYPE_CHECKING

import anyio
import psutil

from benchmarks.subject import busy_cores, subject_of, subject_parser
from kitty_nb.experiments import Verdict, Workload, compare_paired
from kitty_nb.experiments.measure import BenchmarkClient
from kitty_nb.isolated_server import isolated_server

if TYPE_CHECKING:
    from kitty_nb import ServerConfig

_COMPARISONS = 100
_TOKENS, _LONGER = 20, 22
_FALSE_AT_MOST, _FOUND_AT_LEAST, _SECONDS = 5, 90, 180
_NAMES = ("one", "same", "longer")

Series = dict[str, list[float]]


def main() -> None:
    """Print the table."""
    parser = subject_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="for each of the two series")
    parser.add_argument(
        "--busy-cores", type=int, nargs="+", default=[0, 1], help="cores kept busy in each series"
    )
    parser.add_argument("--block", type=int, default=8, help="rounds of a comparison")
    asked = parser.parse_args()
    subject = subject_of(asked)
    with subject.folder(f"; load before {psutil.getloadavg()[0]:.1f}") as folder:
        config = subject.config(folder, context_size=512, threads=1)
        for cores in asked.busy_cores:
            what = f"beside {cores} busy core{'s' * (cores > 1)}" if cores else "alone"
            with busy_cores(cores):
                series, seconds = anyio.run(_measure, config, asked.seconds)
            _report(what, series, seconds, asked.block)


async def _measure(config: ServerConfig, limit: float) -> tuple[Series, float]:
    """Return the seconds of each request by name and round, and how long it took."""
    series: Series = {name: [] for name in _NAMES}
    began = time.monotonic()
    for number in count():
        if time.monotonic() - began > limit:
            break
        for name in Random(number).sample(_NAMES, len(_NAMES)):  # noqa: S311 (an order)
            workload = Workload(("Hi!",), _LONGER if name == "longer" else _TOKENS)
            async with isolated_server(config) as server, server.access.async_http() as http:
                client = BenchmarkClient(http, workload, {})
                await client.warm_up()
                speed, _ = await client.speed(1, lambda _: None)
            series[name].append(speed.seconds)
    return series, time.monotonic() - began


def _report(what: str, series: Series, seconds: float, block: int) -> None:
    rounds = len(series["one"])
    block = min(block, rounds // 2)
    chance = Random(0)  # noqa: S311 (no secret)
    drawn = [chance.sample(range(rounds), block) for _ in range(_COMPARISONS)]
    # A comparison needs two of a round's three measurements.
    needed = seconds / rounds * block * 2 / 3
    noise = _deviation(series["one"], series["same"])
    print(f"{what}: {rounds} rounds in {seconds:.0f} s; noise of a ratio {noise * 100:.1f} %")
    for name, wanted, verdict in (
        ("same", f"<= {_FALSE_AT_MOST}", None),
        ("longer", f">= {_FOUND_AT_LEAST}", Verdict.SLOWER),
    ):
        told = [
            compare_paired(
                [series["one"][index] for index in indexes],
                [series[name][index] for index in indexes],
                smaller_is_better=True,
            ).verdict
            for indexes in drawn
        ]
        found = sum(one is verdict if verdict else one is not Verdict.TOO_CLOSE for one in told)
        whole = compare_paired(series["one"], series[name], smaller_is_better=True)
        label = "true difference found" if verdict else "false winners"
        print(
            f"  {label} in {_COMPARISONS} comparisons of {block} rounds: {found} (asked {wanted});"
            f" whole series: ratio {whole.ratio:.3f} ({whole.low:.3f} to {whole.high:.3f})"
        )
    print(f"  one comparison takes {needed:.0f} s (asked <= {_SECONDS})\n")
    sys.stdout.flush()


def _deviation(first: list[float], second: list[float]) -> float:
    logs = [math.log(b / a) for a, b in zip(first, second, strict=True)]
    mean = sum(logs) / len(logs)
    return math.sqrt(sum((one - mean) ** 2 for one in logs) / (len(logs) - 1))


if __name__ == "__main__":
    main()
