"""`Bench` beside a raw HTTP loop and llama-bench, by turns: tokens per second, and their ratios.

`python -m benchmarks.bench [--model PATH] [--engine PATH] [--llama-bench PATH]`. Without `--engine`
it measures the engine found as usual; give `--llama-bench` a program that was built like it. All
run in every round, in a different order each time, so that drift affects all alike. Other work on
the machine adds differences of its own: see the printed load.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from benchmarks.subject import subject_of, subject_parser
from kitty_nb.experiments.bench import Bench, BenchKind, BenchTest, plain_config
from kitty_nb.isolated_server import isolated_server, locate_engine

if TYPE_CHECKING:
    from collections.abc import Callable

    from kitty_nb import ServerConfig

    Speeds = dict[BenchTest, float]

_VOCABULARY = 256  # tokens that every model has


def main() -> None:
    """Print the table."""
    parser = subject_parser(__doc__)
    parser.add_argument("--llama-bench", type=Path, metavar="PATH")
    parser.add_argument("--pp", type=int, default=512)
    parser.add_argument("--tg", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="*", default=[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    subject = subject_of(asked)
    with subject.folder(f"\nload before: {os.getloadavg()[0]:.1f}") as folder:
        config = subject.config(folder, threads=asked.threads)
        shape = {"prompt": asked.pp, "answer": asked.tg, "depths": asked.depths}
        bench = Bench(config=config, repeats=1, **shape)
        ways: dict[str, Callable[[], Speeds]] = {
            "bench": lambda: {row.test: row.speeds[0] for row in bench.run().wait().rows},
            "raw HTTP loop": partial(anyio.run, _raw, config, bench.tests),
        }
        if asked.llama_bench:
            ways["llama-bench"] = partial(_llama_bench, asked.llama_bench, config, bench.tests)
        rounds: dict[str, list[Speeds]] = {name: [] for name in ways}
        for _ in range(asked.rounds):
            for name in random.sample([*ways], len(ways)):
                rounds[name].append(ways[name]())
    for test in bench.tests:
        ours = [speeds[test] for speeds in rounds["bench"]]
        print(f"{test!s:<16}bench {statistics.median(ours):9.2f} t/s")
        for name in [*ways][1:]:
            theirs = [speeds[test] for speeds in rounds[name]]
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            print(f"{'':<16}over {name}: {ratio:.3f} x ({statistics.median(theirs):.2f} t/s)")
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


async def _raw(config: ServerConfig, tests: tuple[BenchTest, ...]) -> Speeds:
    """Measure by plain requests and our own clock; an answer's time is that of its later tokens."""
    engine = await locate_engine(config.binary)
    served = await anyio.to_thread.run_sync(plain_config, config, engine.dialect, tests)
    speeds: Speeds = {}
    async with isolated_server(served) as server:
        with server.access.http() as http:

            def seconds(before: list[int], prompt: int, count: int) -> float:
                fresh = random.choices(range(_VOCABULARY), k=prompt)  # noqa: S311
                body = {
                    "prompt": before + fresh,
                    "n_predict": count,
                    "ignore_eos": True,
                    "temperature": 0,
                    "cache_prompt": bool(before),
                }
                began = time.perf_counter()
                http.post("/completion", json=body).raise_for_status()
                return time.perf_counter() - began

            for test in tests:
                before = random.choices(range(_VOCABULARY), k=test.depth)  # noqa: S311
                seconds([], test.prompt, 1)
                if before:
                    seconds(before, 0, 1)
                speeds[test] = test.tokens / seconds(before, test.prompt, test.predicted)
    return speeds


def _llama_bench(program: Path, config: ServerConfig, tests: tuple[BenchTest, ...]) -> Speeds:
    sizes = {test.kind: str(test.tokens) for test in tests}
    command = [
        *(program, "-m", config.require_model(), "-r", "1", "-o", "json"),
        *("-t", str(config.threads), "-p", sizes.get(BenchKind.PROMPT, "0")),
        *("-n", sizes.get(BenchKind.ANSWER, "0")),
        *("-d", ",".join(str(depth) for depth in sorted({test.depth for test in tests}))),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        (
            BenchTest(BenchKind.PROMPT, row["n_prompt"], row["n_depth"])
            if row["n_prompt"]
            else BenchTest(BenchKind.ANSWER, row["n_gen"], row["n_depth"])
        ): row["avg_ts"]
        for row in json.loads(done.stdout)
    }


if __name__ == "__main__":
    main()
