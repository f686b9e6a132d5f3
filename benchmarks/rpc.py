"""Devices of other machines: the cost of supervision and ssh, and the delay of replacing a worker.

Two workers run on this machine, behind the benchmark's own sshd on loopback. Tokens per second are
measured alternately: on a bare `llama-server --rpc` whose workers are reached directly, and on a
server that kitty_nb starts, whose workers ssh starts. Then one worker is killed in the middle of an
answer, again and again.

    python -m benchmarks.rpc --engine PATH --model PATH [--rounds 5] [--kills 50] [--layers 99]

With as many layers as the model has blocks, its output layer stays here, and the scores of its
vocabulary don't travel through ssh.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from random import Random
from typing import TYPE_CHECKING

import httpx
import psutil

from benchmarks.subject import row, subject_of, subject_parser
from kitty_nb import ModelManager, ServerStatus
from kitty_nb.errors import KittyError
from kitty_nb.network import free_port
from tests.ssh_machine import ssh_machine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kitty_nb import ServerConfig

_TOKENS = 32
_RATIO, _HANG, _EXTRA = 0.95, 10.0, 5.0
_GIVEN_UP = 120.0  # seconds


def main() -> None:
    """Print the table."""
    parser = subject_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--layers", type=int, default=99)
    asked = parser.parse_args()
    subject = subject_of(asked)
    assert asked.engine, "needs --engine: a llama-server with a ggml-rpc-server beside it"
    with subject.folder() as folder, ExitStack() as stack:
        path = f"{asked.engine.parent}:/usr/bin:/bin"
        machine = stack.enter_context(ssh_machine(folder / "there", free_port(), PATH=path))
        config = subject.config(
            folder,
            context_size=512,
            threads=1,
            n_gpu_layers=asked.layers,
            ssh_config=machine.client,
            rpc_hosts=[f"there:{free_port()}" for _ in range(2)],
            restart_max=1000,
            restart_delay_seconds=0.1,
            restart_delay_max_seconds=0.1,
        )
        manager = stack.enter_context(ModelManager(config=config))
        _speed(manager, asked.engine, config, asked.rounds)
        if asked.kills:
            _kills(manager, asked.kills)


def _speed(manager: ModelManager, engine: Path, config: ServerConfig, rounds: int) -> None:
    ours, bare = [], []
    for _ in range(rounds):
        with _bare(engine, config) as url:
            bare.append(_tokens_per_second(url, {}))
        manager.start().wait(_GIVEN_UP)
        key = manager.reveal_api_key()
        url = manager.state.endpoint
        ours.append(_tokens_per_second(url, {"Authorization": f"Bearer {key}"}))
        manager.stop().wait(_GIVEN_UP)
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    speeds = f"{statistics.median(ours):.2f} and {statistics.median(bare):.2f}"
    row("tokens/s, ours over a bare --rpc", f"{ratio:.3f} ({speeds}; asked >= {_RATIO})")


@contextmanager
def _bare(engine: Path, config: ServerConfig) -> Iterator[str]:
    """Run a server whose workers listen on this machine, without ssh."""
    rpc, port = [free_port() for _ in range(2)], free_port()
    threads = str(os.cpu_count())
    program = str(engine.with_name("ggml-rpc-server"))
    commands = [[program, "--threads", threads, "--port", str(at)] for at in rpc]
    words = ["--ctx-size", "512", "--threads", "1", "--cache-ram", "0"]
    words += ["--n-gpu-layers", str(config.n_gpu_layers)]
    addresses = ",".join(f"127.0.0.1:{at}" for at in rpc)
    started = [
        subprocess.Popen(one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for one in commands
    ]
    try:
        time.sleep(1)
        server = [engine, "--rpc", addresses, "--model", config.model, "--port", str(port), *words]
        started.append(
            subprocess.Popen(
                [*map(str, server)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + _GIVEN_UP
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").is_success:
                    break
            time.sleep(0.1)
        yield url
    finally:
        for one in reversed(started):
            one.kill()
            one.wait()


def _tokens_per_second(url: str, headers: dict[str, str]) -> float:
    request = {"prompt": "Hi", "n_predict": _TOKENS, "ignore_eos": True, "cache_prompt": False}
    for _ in range(2):  # the first is the warm-up
        answer = httpx.post(f"{url}/completion", json=request, headers=headers, timeout=_GIVEN_UP)
    return float(answer.raise_for_status().json()["timings"]["predicted_per_second"])


def _kills(manager: ModelManager, kills: int) -> None:
    began = time.monotonic()
    manager.start().wait(_GIVEN_UP)
    load = time.monotonic() - began
    ended, again = [], []
    chance = Random(0)  # noqa: S311 (no secret)
    for _ in range(kills):
        restarts = manager.state.restart_count
        answer = manager.chat("Tell me a story.", max_tokens=400, ignore_eos=True)
        time.sleep(chance.uniform(0.2, 1.0))
        victim = chance.choice(_workers())
        victim.kill()
        killed = time.monotonic()
        with suppress(KittyError):
            answer.wait(_GIVEN_UP)
        ended.append(time.monotonic() - killed)
        while (
            manager.state.status is not ServerStatus.READY
            or manager.state.restart_count == restarts
        ):
            if time.monotonic() - killed > _GIVEN_UP:
                sys.exit(f"not serving again: {manager.state.sentence}")
            time.sleep(0.01)
        manager.chat("Hi", max_tokens=1).wait(_GIVEN_UP)
        again.append(time.monotonic() - killed)
    hangs = sum(one > _HANG for one in ended)
    row(
        f"answers that hung over {_HANG:.0f} s, of {kills}", f"{hangs} (longest {max(ended):.2f} s)"
    )
    worst = f"{statistics.median(again):.1f} s, worst {max(again):.1f} s"
    row("serving again", f"{worst} (asked <= reload {load:.1f} s + {_EXTRA:.0f} s)")


def _workers() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [one for one in mine if one.name() == "ggml-rpc-server" and one.status() != "zombie"]


if __name__ == "__main__":
    main()
