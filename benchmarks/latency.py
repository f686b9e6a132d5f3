"""Our latencies and guidellm's, on one server in one run.

`python -m benchmarks.latency --guidellm PATH [--engine PATH] [--model PATH]`, where PATH is the
program in an environment of its own: `uv venv x && uv pip install --python x guidellm`. Both ask
the same prompt for answers of the same length, in turns: what the machine does else comes and goes.
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
from anyio.to_thread import run_sync

from benchmarks.subject import subject_of, subject_parser
from kitty_nb import Supervisor
from kitty_nb.client import Access
from kitty_nb.experiments import load_test

if TYPE_CHECKING:
    from kitty_nb import ServerConfig

_PROMPT = "Explain in a few sentences why the sky is blue, and why it is red at sunset."
_ROUNDS, _REQUESTS, _TOKENS = 3, 10, 32
_LOADS = ({"concurrency": 1}, {"concurrency": 4}, {"rate": 1.0})
_THEIRS = {
    "time_to_first_token": "time_to_first_token_ms",
    "time_between_tokens": "inter_token_latency_ms",
}
_PERCENTS = (50, 90)


def main() -> None:
    """Print the table."""
    parser = subject_parser(__doc__)
    parser.add_argument("--guidellm", type=Path, required=True, metavar="PATH")
    asked = parser.parse_args()
    subject = subject_of(asked)
    with tempfile.TemporaryDirectory() as name:
        config = subject.config(Path(name), context_size=4096, parallel=2, threads=1)
        print(f"{subject}\n")
        anyio.run(_compare, config, asked.guidellm, Path(name))


async def _compare(config: ServerConfig, guidellm: Path, folder: Path) -> None:
    async with Supervisor(config) as supervisor:
        state = await supervisor.start()
        access = Access(state.endpoint, supervisor.api_key)
        for load in _LOADS:
            ratios: dict[str, list[float]] = {}
            for _ in range(_ROUNDS):
                (ours,) = (
                    await load_test(
                        access=access,
                        prompts=_PROMPT,
                        requests=_REQUESTS,
                        max_tokens=_TOKENS,
                        arrivals="constant",
                        **load,  # type: ignore[arg-type]
                    )
                ).loads
                found = await run_sync(_guidellm, guidellm, access, load, folder)
                for name, theirs in _THEIRS.items():
                    for percent in _PERCENTS:
                        there = found[theirs]["successful"]["percentiles"][f"p{percent}"] / 1000
                        key = f"{name}_p{percent}"
                        ratios.setdefault(key, []).append(ours.metrics()[key] / there)
            for key, several in ratios.items():
                each = ", ".join(f"{ratio:.3f}" for ratio in several)
                print(f"{ours.label:<14}{key:<28}{statistics.median(several):.3f} x ({each})")
                sys.stdout.flush()


def _guidellm(program: Path, access: Access, load: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run guidellm once, and return its metrics."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text(f"{json.dumps({'prompt': _PROMPT})}\n" * _REQUESTS)
    profile = (
        f"kind=constant,rate={load['rate']}"
        if "rate" in load
        else f"kind=concurrent,streams={load['concurrency']}"
    )
    extras = {"body": {"ignore_eos": True, "cache_prompt": False, "temperature": 0}}
    backend = {
        "kind": "openai_http",
        "target": access.endpoint,
        "api_key": access.api_key.get_secret_value() if access.api_key else None,
        "max_tokens": _TOKENS,
        "extras": extras,
    }
    command = (
        *(program, "run", "--backend", json.dumps(backend), "--profile", profile),
        *("--data", f"kind=json_file,path={prompts}"),
        *("--constraint", f"kind=max_requests,count={_REQUESTS}"),
        *("--output", f"kind=json,path={folder / 'guidellm.json'}", "--disable-console"),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "guidellm.json").read_text())
    metrics: dict[str, Any] = report["benchmarks"][0]["metrics"]
    return metrics


if __name__ == "__main__":
    main()
