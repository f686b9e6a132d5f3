"""Tokens per second with and without speculation from n-grams, on an edit of code.

`python -m benchmarks.speculation [--engine PATH] [--model PATH]` has a model continue a file that
its prompt contains twice, as when somebody edits it again and again: greedily, on two servers in
turn. A model that does not copy gains nothing, as its answer shows.
"""

from __future__ import annotations

import inspect
import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.subject import read_subject
from kitty_nb import ModelManager
from kitty_nb.config import Speculation
from kitty_nb.supervisor import log

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.subject import Subject

_RUNS, _TOKENS = 5, 160
_LINES, _BEGUN = 90, 12  # of the file, and of its third copy


def main() -> None:
    """Print the figures."""
    subject = read_subject(__doc__)
    rows: dict[Speculation, list[dict[str, Any]]] = {Speculation.OFF: [], Speculation.NGRAM: []}
    with subject.folder() as folder:
        for _ in range(_RUNS):
            for speculation, answers in rows.items():
                answers.append(_answer(subject, folder, speculation))
    speeds = {
        speculation: statistics.median(one["timings"]["predicted_per_second"] for one in answers)
        for speculation, answers in rows.items()
    }
    for speculation, speed in speeds.items():
        timings = rows[speculation][-1]["timings"]
        drafts = f"{timings.get('draft_n_accepted', 0)} of {timings.get('draft_n', 0)} accepted"
        print(f"{speculation:<6}{speed:6.1f} tokens/s, {drafts}")
    texts = {one["content"] for answers in rows.values() for one in answers}
    print(f"ratio {speeds[Speculation.NGRAM] / speeds[Speculation.OFF]:.2f}, ", end="")
    print(f"{'one answer' if len(texts) == 1 else f'{len(texts)} answers'} in {2 * _RUNS} runs")


def _answer(subject: Subject, folder: Path, speculation: Speculation) -> dict[str, Any]:
    config = subject.config(
        folder, context_size=8192, parallel=1, threads=1, speculation=speculation
    )
    lines = inspect.getsource(log).splitlines()[:_LINES]
    whole, begun = "\n".join(lines), "\n".join(lines[:_BEGUN])
    prompt = f"# log.py\n{whole}\n\n" * 2 + f"# log.py\n{begun}"
    request = {"prompt": prompt, "n_predict": _TOKENS, "temperature": 0, "ignore_eos": True}
    with ModelManager(config=config) as manager:
        manager.start().wait(300)
        answer: dict[str, Any] = manager.http.post("/completion", json=request).json()
    return answer


if __name__ == "__main__":
    main()
