"""The distance of `tune` from a full grid's best, with a quarter of its trials.

By default the model is dense, of zeros, and answers about as slowly as a small real one; for
another one the grid is smaller. All servers have one thread: with one per core, other processes on
the machine would decide what is fastest. Grid and searches are measured one after the other; their
winners then once more side by side, in turns, because the best of many noisy figures is partly
luck:

    python -m benchmarks.tune [--engine PATH] [--model PATH]
"""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.subject import read_subject, row
from kitty_nb.experiments import Outcome, Sweep, TrialResult, tune

if TYPE_CHECKING:
    from pathlib import Path

    from kitty_nb import ServerConfig
    from kitty_nb.experiments import Combination, Results

_OBJECTIVE = "total_tokens_per_second"
_GRID: dict[str, list[Any]] = {
    "ubatch_size": [4, 16, 64, 256],
    "parallel": [1, 2, 4],
    "flash_attention": ["on", "off"],
    "cache_type_k": ["f16", "q8_0"],
    "batch_size": [64, 512],
}
_SMALL_GRID = _GRID | {"ubatch_size": [4, 16, 256], "parallel": [1, 4], "batch_size": [512]}
_SHARE_OF_TRIALS = 0.25
_SEEDS = (0, 1, 2)
_ROUNDS, _FEWER = 9, 3
_LIMIT = 0.95
_ASKED: dict[str, Any] = {
    "prompts": [f"{number} {'hello ' * 40}" for number in range(4)],
    "parallel": 4,
    "max_tokens": 16,
}


def main() -> None:
    """Print the table."""
    subject = read_subject(__doc__)
    with subject.folder() as folder:
        config = subject.dense(folder, 2).config(folder, context_size=4096, threads=1)
        began = time.monotonic()
        choices, rounds = (_SMALL_GRID, _FEWER) if subject.model else (_GRID, _ROUNDS)
        grid = _sweep(config, folder / "grid.journal", grid=choices)
        # Not the one nearest to the settings in use, as in `Results.best`.
        best = max(grid.combinations, key=lambda one: one.value(_OBJECTIVE))
        spread = [one.value(_OBJECTIVE) for one in grid.combinations]
        row("grid", f"{len(grid)} trials in {time.monotonic() - began:.0f} s")
        row("its objective, lowest, median, best", ", ".join(map(_short, _quartiles(spread))))
        budget = math.floor(_SHARE_OF_TRIALS * len(grid))
        winners = [_search(config, folder, choices, seed, budget) for seed in _SEEDS]
        shares = _side_by_side(config, folder, best, winners, rounds)
        row("the grid's best", best.trial.label)
        for seed, winner, share in zip(_SEEDS, winners, shares, strict=True):
            row(f"share of it, seed {seed}", f"{share:.3f} with {winner.trial.label}")
        row("share of it, median seed", f"{statistics.median(shares):.3f} (limit {_LIMIT})")


def _sweep(config: ServerConfig, store: Path, **what: Any) -> Results:
    with Sweep(config=config, store=store, **{"repeats": 1, **_ASKED, **what}) as sweep:
        results = sweep.run().wait()
    assert all(row.outcome is Outcome.DONE for row in results.rows), results.rows
    return results


def _search(
    config: ServerConfig, folder: Path, choices: dict[str, list[Any]], seed: int, budget: int
) -> Combination:
    began = time.monotonic()
    found = tune(
        objective=_OBJECTIVE,
        space=choices,
        budget=budget,
        seed=seed,
        config=config,
        store=folder / f"tune_{seed}.journal",
        **_ASKED,
    ).wait()
    rows: tuple[TrialResult, ...] = found.results.rows
    assert len(rows) <= budget
    pruned = sum(row.outcome is Outcome.PRUNED for row in rows)
    seconds = time.monotonic() - began
    row(f"tune, seed {seed}", f"{len(rows)} trials in {seconds:.0f} s, {pruned} pruned")
    return found.best


def _side_by_side(
    config: ServerConfig, folder: Path, best: Combination, winners: list[Combination], rounds: int
) -> list[float]:
    """Return the share of the best that each winner reaches, by medians over the rounds."""
    configs = [dict(one.trial.settings) for one in (best, *winners)]
    results = _sweep(config, folder / "again.journal", configs=configs, repeats=rounds)
    rates = {frozenset(one.trial.settings): one.value(_OBJECTIVE) for one in results.combinations}
    reached: list[float] = [rates[frozenset(one.trial.settings)] for one in (best, *winners)]
    return [one / reached[0] for one in reached[1:]]


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def _short(value: float) -> str:
    return f"{value:.0f}"


if __name__ == "__main__":
    main()
