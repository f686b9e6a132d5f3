"""The cost of supervising: ready lag, start overhead, death detection, gaps on the kernel's loop.

READY waits for a first answer, whose cost is the model's own: the same request is timed on a bare
server, and its median is subtracted from the lag.

Every figure is measured beside its yardstick in one run: `python -m benchmarks.supervision
[--engine PATH] [--model PATH]`, by default on the engine found as usual and a demo model.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import httpx

from benchmarks.subject import read_subject, row
from kitty_nb import ControlPanel, ModelManager, ServerStatus
from kitty_nb.engine.command_line import build_command

if TYPE_CHECKING:
    from kitty_nb import ServerConfig
    from kitty_nb.engine.locate import Engine

_RUNS = 15
# Prints the monotonic time of the first 200; the clock is the same for all processes.
_POLLER = """
import http.client, sys, time
while True:
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=5)
    try:
        connection.request("GET", "/health")
        if connection.getresponse().status == 200:
            print(time.monotonic())
            break
    except OSError:
        pass
    finally:
        connection.close()
    time.sleep(0.002)
"""


def main() -> None:
    """Print the table."""
    subject = read_subject(__doc__)
    with subject.folder() as folder:
        config = subject.config(folder, 100_000_000, context_size=512, threads=1, restart_max=0)
        lags, overheads, deaths, answers = [], [], [], []
        with ModelManager(config=config) as manager:
            manager.start().wait(60)  # the engine's flags are read once
            manager.stop().wait(60)
            for _ in range(_RUNS):
                bare, answer = _bare_start(subject.engine, config)
                answers.append(answer)
                began = time.monotonic()
                poller = _poll(config.port)
                state = manager.start().wait(60)
                overheads.append((time.monotonic() - began) / (bare + answer))
                first_200 = float(poller.communicate(timeout=60)[0])
                assert state.ready_since is not None
                lags.append(state.ready_since - first_200)
                deaths.append(_death(manager, state.pid))
        baseline, gap = asyncio.run(_gaps(config))
    lag, answer = statistics.median(lags), statistics.median(answers)
    row("ready lag behind a 2 ms poller", f"{_ms(lag)} (median of {_RUNS})")
    row("  of it, the first answer of a bare server", f"{_ms(answer)} (median)")
    row("  without that", _ms(lag - answer))
    row(
        "start, supervised over bare to the first answer",
        f"{statistics.median(overheads):.3f} x (median)",
    )
    row("death to CRASHED", f"{_ms(statistics.median(deaths))} (median)")
    row(
        "largest gap on the kernel's loop during a load",
        f"{gap * 1000:.1f} ms, {gap / baseline:.1f} x that of an idle loop",
    )


def _bare_start(engine: Engine, config: ServerConfig) -> tuple[float, float]:
    """Return the seconds until the bare engine is ready, and from then to an answer."""
    command = build_command(engine, config)
    request = {"prompt": "Hello", "n_predict": 1, "cache_prompt": False}
    with httpx.Client(base_url=config.endpoint, trust_env=False, timeout=60) as http:
        began = time.monotonic()
        poller = _poll(config.port)
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ready = float(poller.communicate(timeout=60)[0])
        asked = time.monotonic()
        http.post("/completion", json=request)
        answer = time.monotonic() - asked
        server.terminate()
        server.wait(30)
    return ready - began, answer


def _poll(port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _POLLER, str(port)], stdout=subprocess.PIPE, text=True
    )


def _death(manager: ModelManager, pid: int | None) -> float:
    assert pid is not None
    seen: list[float] = []
    unsubscribe = manager.subscribe(
        lambda _: (
            seen.append(time.monotonic()) if manager.state.status is ServerStatus.CRASHED else None
        )
    )
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    while not seen:
        time.sleep(0.0005)
    unsubscribe()
    return seen[0] - began


async def _gaps(config: ServerConfig) -> tuple[float, float]:
    """Return the largest gap of a 1 ms ticker: on an idle loop, and while a panel shows a load."""
    idle = await _largest_gap(2.0)
    with ModelManager(config=config) as manager:
        panel = ControlPanel(manager=manager)
        gaps = []
        for _ in range(5):
            manager.restart()
            gaps.append(await _largest_gap(1.0))
        panel.close()
    return idle, statistics.median(gaps)


async def _largest_gap(seconds: float) -> float:
    largest, last = 0.0, time.perf_counter()
    end = last + seconds
    while last < end:
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        largest, last = max(largest, now - last), now
    return largest


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


if __name__ == "__main__":
    main()
