"""The overhead of a sweep over its trials, and the accuracy of its speeds.

`python -m benchmarks.sweep [--engine PATH] [--model PATH]`, by default on the engine found as usual
and a dense model of zeros, which loads and answers about as slowly as a small real one. The
yardstick for speeds is llama-bench's method on the same server in the same run: one request at a
time, by our own clock, of so many tokens of prompt or of answer.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import anyio

from benchmarks.subject import read_subject, row
from kitty_nb import Supervisor
from kitty_nb.client import Access
from kitty_nb.experiments import Outcome, Sweep, Workload
from kitty_nb.experiments.measure import BenchmarkClient

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from kitty_nb import ServerConfig

_ROUNDS, _FEWER = 20, 3  # of a dense model, of another one
_ANSWER, _SHORTER = 256, 32  # tokens
_SHORT, _LONG = "hello", "hello " * 80


def main() -> None:
    """Print the table."""
    subject = read_subject(__doc__)
    with subject.folder() as folder:
        config = subject.dense(folder, 8).config(folder, context_size=2048, threads=1)
        short = subject.model is not None
        _overhead(config, folder, short=short)
        anyio.run(_speeds, config, *((_FEWER, _SHORTER) if short else (_ROUNDS, _ANSWER)))


def _overhead(config: ServerConfig, folder: Path, *, short: bool) -> None:
    grid = {"context_size": [1024, 2048], "cache_type_k": ["f16", "q8_0"]}
    sweep = Sweep(
        grid=grid,
        repeats=1 if short else 3,
        max_tokens=_SHORTER if short else 64,
        parallel=(1, 4),
        config=config,
        store=folder / "sweep.journal",
    )
    with sweep:
        began = time.monotonic()
        rows = sweep.run().wait().rows
        seconds = time.monotonic() - began
    assert all(row.outcome is Outcome.DONE for row in rows), rows
    own = [row.seconds.own for row in rows]
    row("trials", f"{len(own)}, each {statistics.median(own):.2f} s (median)")
    row("sweep over its trials' load, warm-up and requests", f"{seconds / sum(own):.3f} x")


async def _speeds(config: ServerConfig, rounds: int, tokens_of_answer: int) -> None:
    async with Supervisor(config) as supervisor:
        state = await supervisor.start()
        async with Access(state.endpoint, supervisor.api_key).async_http() as http:
            short = BenchmarkClient(
                http, Workload((_SHORT,), max_tokens=tokens_of_answer, chat=False), {}
            )
            long = BenchmarkClient(http, Workload((_LONG,), max_tokens=2, chat=False), {})
            await short.warm_up()
            await long.warm_up()
            _, (long_answer,) = await long.speed(1, lambda _: None)
            tokens = long_answer.timings.prompt_n
            prompts, answers = [], []
            for _ in range(rounds):
                before = await _bench(http, 1, tokens_of_answer)
                speed, _ = await short.speed(1, lambda _: None)
                after = await _bench(http, 1, tokens_of_answer)
                answers.append((speed.generation_tokens_per_second or 0.0, before, after))
                before = await _bench(http, tokens, 0)
                speed, _ = await long.speed(1, lambda _: None)
                after = await _bench(http, tokens, 0)
                prompts.append((speed.prompt_tokens_per_second or 0.0, before, after))
    for what, each in (("prompt", prompts), ("generation", answers)):
        # Each round against its own two neighbours, because other work on the machine varies.
        ratio = statistics.median(ours / statistics.mean(theirs) for ours, *theirs in each)
        ours = statistics.median(ours for ours, *_ in each)
        figure = f"{ratio:.3f} x at {ours:.0f} (medians of {rounds})"
        row(f"{what} tokens/s, ours over llama-bench's method", figure)


async def _bench(http: httpx.AsyncClient, prompt: int, answer: int) -> float:
    """Return tokens per second by our own clock, of a prompt alone or an answer to one token."""
    request = {
        "prompt": [7] * prompt,
        "n_predict": max(answer, 1),
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    began = time.perf_counter()
    response = await http.post("/completion", json=request)
    seconds = time.perf_counter() - began
    response.raise_for_status()
    return (answer or prompt) / seconds


if __name__ == "__main__":
    main()
