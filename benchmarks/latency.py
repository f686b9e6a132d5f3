"""Our latencies and guidellm's, of one server at the same time.

`python -m benchmarks.latency --guidellm PATH [--rate R] [--engine PATH] [--model PATH]`, where
the first PATH is the program in an environment of its own: `uv venv x && uv pip install --python x
guidellm`. Both send the same prompt for answers of the same length, one request after the other, at
the same time: so other work on the machine affects both alike. Ours count while theirs are under
way. With two slots, neither waits; with one, each waits for the other's answer. With a rate, each
is an open loop: it sends so many requests per second at even intervals, whatever is answered, to a
server with four slots.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
from anyio.to_thread import run_sync

from benchmarks.subject import subject_of, subject_parser
from kitty_nb import Supervisor
from kitty_nb.client import Access
from kitty_nb.experiments import load_test

if TYPE_CHECKING:
    from kitty_nb import ServerConfig
    from kitty_nb.experiments import RequestTimes

_PROMPT = "Explain in a few sentences why the sky is blue, and why it is red at sunset."
_REQUESTS, _TOKENS = 30, 32
_THEIRS = {
    "time_to_first_token": "time_to_first_token_ms",
    "time_between_tokens": "inter_token_latency_ms",
    "seconds": "request_latency",
}


def main() -> None:
    """Print the table."""
    parser = subject_parser(__doc__)
    parser.add_argument("--guidellm", type=Path, required=True, metavar="PATH")
    parser.add_argument("--rate", type=float, metavar="R", help="requests a second, of each")
    asked = parser.parse_args()
    subject = subject_of(asked)
    print(f"{subject}\n")
    for slots in (4,) if asked.rate else (2, 1):
        with tempfile.TemporaryDirectory() as name:
            config = subject.config(Path(name), context_size=2048, parallel=slots, threads=1)
            anyio.run(_compare, config, asked.guidellm, asked.rate, Path(name))


async def _compare(config: ServerConfig, guidellm: Path, rate: float | None, folder: Path) -> None:
    ours: list[RequestTimes] = []
    theirs: dict[str, Any] = {}

    async with Supervisor(config) as supervisor:
        state = await supervisor.start()
        access = Access(state.endpoint, supervisor.api_key)

        async def ask_on() -> None:
            ask: dict[str, Any] = {"prompts": _PROMPT, "max_tokens": _TOKENS}
            ask |= {"concurrency": 1, "requests": 5}
            if rate:
                ask |= {"concurrency": (), "rate": rate, "arrivals": "constant", "requests": 10}
            while True:
                test = load_test(access=access, **ask)
                try:
                    ours.extend((await test).loads[0].requests)
                finally:
                    test.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_on)
            theirs = await run_sync(_guidellm, guidellm, access, rate, folder)
            tasks.cancel_scope.cancel()
    within = [
        one
        for one in ours
        if theirs["start_time"] <= one.sent and one.sent + one.seconds <= theirs["end_time"]
    ]
    print(f"{config.parallel} slots: {len(within)} of our requests, {_REQUESTS} of guidellm's")
    for name, named in _THEIRS.items():
        found = theirs["metrics"][named]["successful"]
        scale = 1000 if named.endswith("_ms") else 1
        values = [getattr(one, name) for one in within]
        for what, our, their in (
            ("mean", statistics.mean(values), found["mean"] / scale),
            ("median", statistics.median(values), found["median"] / scale),
            ("p95", float(np.percentile(values, 95)), found["percentiles"]["p95"] / scale),
        ):
            print(f"  {name:<22}{what:<8}{our / their:.3f} x ({our:.4f} s, {their:.4f} s)")
    sys.stdout.flush()


def _guidellm(program: Path, access: Access, rate: float | None, folder: Path) -> dict[str, Any]:
    """Run guidellm once, and return its benchmark."""
    prompts, report = folder / "prompts.jsonl", folder / "guidellm.json"
    prompts.write_text(f"{json.dumps({'prompt': _PROMPT})}\n" * _REQUESTS)
    backend = {
        "kind": "openai_http",
        "target": access.endpoint,
        "api_key": access.api_key.get_secret_value() if access.api_key else None,
        "max_tokens": _TOKENS,
        "extras": {"body": {"ignore_eos": True, "cache_prompt": False, "temperature": 0}},
    }
    profile = f"kind=constant,rate={rate}" if rate else "kind=synchronous"
    command = (
        *(program, "run", "--backend", json.dumps(backend), "--profile", profile),
        *("--data", f"kind=json_file,path={prompts}"),
        *("--constraint", f"kind=max_requests,count={_REQUESTS}"),
        *("--output", f"kind=json,path={report}", "--disable-console"),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    found: dict[str, Any] = benchmark
    return found


if __name__ == "__main__":
    main()
