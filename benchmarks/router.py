"""A router under a memory limit: lost requests, memory use, and kitty_nb's overhead.

`python -m benchmarks.router [--requests N] [--engine PATH]` serves six demo models behind one
address, with memory for three according to the memory preview, and sends random requests. Then it
asks a loaded model alternately through this router and through a bare one on the same presets.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from benchmarks.subject import is_healthy, subject_of, subject_parser
from kitty_nb import ModelManager, write_demo_model
from kitty_nb.network import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODELS, _SIZE, _ROOM = 6, 40_000_000, 3.4
_PAIRS, _TOKENS = 200, 8


def main() -> None:
    """Print the figures."""
    parser = subject_parser(__doc__)
    parser.add_argument("--requests", type=int, default=500)
    args = parser.parse_args()
    subject = subject_of(args)
    with subject.folder() as folder:
        env = folder / ".env"
        names = [f"m{number}" for number in range(_MODELS)]
        lines = [
            *("LLAMACPP_MODELS_DIR=models", "LLAMACPP_LOG_DIR=logs", "LLAMACPP_CTX=512"),
            *("LLAMACPP_HISTORY=history.sqlite3", "LLAMACPP_PARALLEL=1", "LLAMACPP_THREADS=1"),
            *("LLAMACPP_ROUTER_MODELS=all", f"LLAMACPP_ROUTER_PORT={free_port()}"),
            *([f"LLAMACPP_BIN={subject.binary}"] if subject.binary else []),
        ]
        for model in names:
            write_demo_model(folder / "models" / f"{model}.gguf", size=_SIZE)
            lines.append(f"LLAMACPP_{model.upper()}_MODEL={model}.gguf")
        env.write_text("\n".join(lines))
        need = _need(env, names[0])
        limit = need * _ROOM
        env.write_text("\n".join([*lines, f"LLAMACPP_ROUTER_MEMORY_GB={limit / 1e9}"]))
        with ModelManager(env, "router") as manager:
            manager.start().wait(120)
            _serve(manager, names, args.requests, limit)
            _compare(manager, names[0])


def _need(env: Path, profile: str) -> int:
    """Return the bytes that one model needs, according to the memory preview."""
    with ModelManager(env, profile) as manager:
        preview = manager.preview_memory().wait(60)
    return preview.requirement.known


def _serve(manager: ModelManager, names: list[str], count: int, limit: float) -> None:
    """Send random requests, one after the other, and watch the memory meanwhile."""
    dice = random.Random(0)  # noqa: S311 (no secret)
    answers: Counter[str] = Counter()
    held, most, over = [0], [0], threading.Event()
    watch = threading.Thread(target=_watch, args=(manager.state.pid, held, most, over))
    watch.start()
    began, seconds = time.perf_counter(), []
    for _ in range(count):
        at = time.perf_counter()
        reply = _ask(manager.state.config.port, dice.choice(names), manager.reveal_api_key())
        seconds.append(time.perf_counter() - at)
        answers["answered" if reply else "lost"] += 1
    over.set()
    watch.join()
    print(
        f"{count} requests over {len(names)} models in {time.perf_counter() - began:.0f} s:"
        f" {answers['answered']} answered, {answers['lost']} lost, router"
        f" {manager.state.status} after {manager.state.restart_count} restarts"
    )
    print(
        f"memory: limit {limit / 1e6:.0f} MB, at most {held[0] / 1e6:.0f} MB held by"
        f" {most[0]} models at once"
    )
    print(f"an answer: median {statistics.median(seconds) * 1e3:.0f} ms, with loads")


def _watch(pid: int | None, held: list[int], most: list[int], over: threading.Event) -> None:
    """Record the most that the router's children hold, without their shared libraries."""
    router = psutil.Process(pid)
    while not over.wait(0.02):
        sizes = []
        for child in router.children():
            try:
                sizes.append(child.memory_full_info().uss)
            except psutil.Error:
                continue
        held[0], most[0] = max(held[0], sum(sizes)), max(most[0], len(sizes))


def _compare(manager: ModelManager, name: str) -> None:
    """Ask one loaded model alternately through both routers."""
    config, key = manager.state.config, manager.reveal_api_key()
    command = [str(word) for word in psutil.Process(manager.state.pid).cmdline()]
    port = free_port()
    if "--listen" in command:  # llama-swap, whose servers need other ports, too
        command[command.index("--listen") + 1] = f"127.0.0.1:{port}"
        text = Path(command[command.index("--config") + 1]).read_text()
        bare = config.log_dir / "bare.yaml"
        bare.write_text(re.sub(r"startPort: \d+", f"startPort: {free_port()}", text))
        command[command.index("--config") + 1] = str(bare)
    else:
        command[command.index("--port") + 1] = str(port)
    with _bare(command, config.log_dir, key, port):
        ports = {"kitty_nb": config.port, "bare": port}
        times: dict[str, list[float]] = {who: [] for who in ports}
        for one in ports.values():
            _ask(one, name, key)
        for number in range(_PAIRS):
            for who in sorted(ports, reverse=bool(number % 2)):
                at = time.perf_counter()
                if not _ask(ports[who], name, key):
                    sys.exit(f"{who} lost a request")
                times[who].append(time.perf_counter() - at)
    added = [one - other for one, other in zip(times["kitty_nb"], times["bare"], strict=True)]
    bare = statistics.median(times["bare"])
    print(
        f"a loaded model: bare router {bare * 1e3:.2f} ms, kitty_nb's"
        f" {statistics.median(added) * 1e3:+.2f} ms (median of pairs)"
    )


@contextmanager
def _bare(command: list[str], folder: Path, key: str | None, port: int) -> Iterator[None]:
    environment = os.environ | {"LLAMA_API_KEY": key or "", "LLAMA_CACHE": str(folder / "none")}
    with (folder / "bare.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        while not is_healthy(port):
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def _ask(port: int, model: str, key: str | None) -> str:
    """Return the text of an answer; empty if there is none."""
    request = {
        "model": model,
        "messages": [{"role": "user", "content": "Who are you?"}],
        "max_tokens": _TOKENS,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
        body = json.loads(connection.getresponse().read())
        return str(body["choices"][0]["message"]["content"])
    except (OSError, KeyError, ValueError):
        return ""
    finally:
        connection.close()


if __name__ == "__main__":
    main()
