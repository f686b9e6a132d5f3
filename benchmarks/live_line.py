"""The cost and accuracy of the live line: tokens per second lost, delay and error of the progress.

Answers with and without a watching panel take turns in one run. The true progress of a prompt is
linear in time, from the request to its first token, as its client measures them; the first prompt,
which teaches the prompt speed, is not counted, but the one after a restart is. With `--busy`, the
last prompts are read beside a busy core. `python -m benchmarks.live_line [--busy] [--engine PATH]
[--model PATH]`, by default on the engine found as usual and a demo model.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.subject import busy_cores, row, subject_of, subject_parser
from kitty_nb import ControlPanel, ModelManager
from kitty_nb.supervisor.events import Event, Working

if TYPE_CHECKING:
    import httpx

_ROUNDS, _TOKENS, _PROMPTS = 6, 96, 4
_SETTLED = 4.0  # seconds, in which a new panel looks for models, devices and memory


def main() -> None:
    """Print the table."""
    parser = subject_parser(__doc__)
    parser.add_argument("--busy", action="store_true", help="occupy a core")
    asked = parser.parse_args()
    subject = subject_of(asked)
    with subject.folder() as folder:
        config = subject.config(folder, 100_000_000, context_size=4096, parallel=2)
        with ModelManager(config=config) as manager:
            manager.start().wait(120)
            lost = [1 - _watched(manager) / _speed(manager.http) for _ in range(_ROUNDS)]
            _follow(manager, 0)
            manager.restart().wait(120)
            looks = [_follow(manager, number, busy=asked.busy) for number in range(1, _PROMPTS + 1)]
    row("tokens per second lost while watched", f"{statistics.median(lost):+.1%} (median)")
    row("  each", ", ".join(f"{one:+.1%}" for one in lost))
    row("delay of a prompt's progress", f"{max(delay for delay, _ in looks):.2f} s (largest)")
    row("error of a prompt's progress", f"{max(error for _, error in looks):.2f} (largest)")


def _watched(manager: ModelManager) -> float:
    panel = ControlPanel(manager=manager)
    time.sleep(_SETTLED)
    try:
        return _speed(manager.http)
    finally:
        panel.close()


def _speed(http: httpx.Client) -> float:
    request = {"prompt": "Once", "n_predict": _TOKENS, "ignore_eos": True, "temperature": 0}
    timings = http.post("/completion", json=request, timeout=600).json()["timings"]
    return float(timings["predicted_per_second"])


def _follow(manager: ModelManager, number: int, *, busy: bool = False) -> tuple[float, float]:
    """Yield the seconds until a prompt's progress is reported, and the largest error in it.

    With a busy core from the second prompt on: the first teaches another speed.
    """
    told: list[tuple[float, float]] = []
    while manager.work.busy:  # with the end of the last request
        time.sleep(0.05)

    def note(event: Event) -> None:
        if isinstance(event, Working) and (reading := event.work.reading) and reading.total:
            told.append((time.monotonic(), reading.fraction))

    prompt = " ".join(f"{number} {word} apple" for word in range(200))
    request: dict[str, Any] = {"prompt": prompt, "n_predict": 2, "stream": True}
    unsubscribe = manager.subscribe(note)
    with busy_cores(busy and number > 1):
        began = time.monotonic()
        with manager.http.stream("POST", "/completion", json=request, timeout=600) as answer:
            first = next(line for line in answer.iter_lines() if line and json.loads(line[6:]))
            seconds = time.monotonic() - began
            assert first
    unsubscribe()
    looks = [(at - began, share) for at, share in told if at - began <= seconds]
    errors = [abs(at / seconds - share) for at, share in looks]
    print(f"a prompt of {seconds:.1f} s, {len(looks)} looks")
    return (looks[0][0], max(errors)) if looks else (seconds, 1.0)


if __name__ == "__main__":
    main()
