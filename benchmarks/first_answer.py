"""Seconds from `kitty-nb start` to the first answer, and of `kitty-nb status`.

Every figure is measured beside its yardstick in one run: `python -m benchmarks.first_answer
[--engine PATH] [--model PATH]`, by default on the engine found as usual and a demo model of 1 MB.
Python caches its bytecode, as it does by default.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.subject import is_healthy, read_subject, seconds_of
from kitty_nb.config import env_settings
from kitty_nb.config.profiles import env_lines
from kitty_nb.engine.command_line import build_command

if TYPE_CHECKING:
    from collections.abc import Sequence

_RUNS = 7
_LOOK_EVERY = 0.002  # seconds


def main() -> None:
    """Print the table."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    subject = read_subject(__doc__)
    with subject.folder() as folder:
        config = subject.config(folder, None, context_size=512, threads=1, parallel=1)
        env = folder / "my.env"
        env.write_text("\n".join(env_lines(config, set(env_settings()) - {"extra_args"})))
        bare = build_command(subject.engine, config)
        figures: dict[str, list[float]] = {}

        def note(what: str, seconds: float) -> None:
            figures.setdefault(what, []).append(seconds)

        def kitty(*words: str) -> list[str]:
            return [sys.executable, "-m", "kitty_nb.cli", *words, "--env", str(env)]

        _run(kitty("start"))  # fills the caches that later starts use
        _run(kitty("stop"))
        for _ in range(_RUNS):
            note("python -c pass", _run([sys.executable, "-c", "pass"]))
            note("bare engine, first 200", _first_200(bare, config.port))
            note("kitty-nb start, first 200", _first_200(kitty("start"), config.port))
            note("kitty-nb status, of a server", _run(kitty("status")))
            _run(kitty("stop"))
            note("kitty-nb status, of none", _run(kitty("status")))
    medians = {what: statistics.median(seconds) for what, seconds in figures.items()}
    for what, seconds in medians.items():
        yardstick = "bare engine, first 200" if "200" in what else "python -c pass"
        ratio = seconds / medians[yardstick]
        print(f"{what:<32}{seconds:6.2f} s, {ratio:5.1f} x {yardstick} (median of {_RUNS})")


def _run(command: Sequence[str]) -> float:
    return seconds_of(lambda: subprocess.run(command, capture_output=True, check=False))


def _first_200(command: Sequence[str], port: int) -> float:
    """Return the seconds from a command to the first 200; a bare engine is then stopped."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not is_healthy(port):
            assert time.monotonic() - began < 60
            time.sleep(_LOOK_EVERY)
        seconds = time.monotonic() - began
        if "kitty_nb.cli" not in command:
            process.terminate()
    return seconds


if __name__ == "__main__":
    main()
