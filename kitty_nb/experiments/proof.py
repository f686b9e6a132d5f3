"""The proof that settings reach a target: repeated measurements, round by round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.metrics import in_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kitty_nb.experiments.bounds import Constraint
    from kitty_nb.experiments.statistics import Difference

_RERUNS = 0.95  # fraction of re-runs that must reach the target: 19 of 20
_SAME = 0.01  # relative difference in memory that counts as none


@dataclass(frozen=True)
class Proof:
    """The comparison of the best settings with others by repeated measurements, round by round.

    Attributes:
        target: The target.
        reached: The value that 19 of 20 re-runs are expected to reach.
        rounds: The number of rounds.
        kept: The number of rounds in which the target was reached.
        memory_gib: The memory used, in GiB.
        memory_in_use: The same with the settings in use; None if unknown.
        quality_loss: The relative increase of perplexity over the largest quant; None if not
            limited.
        against_in_use: The target's metric compared with the settings in use; None if those are the
            best, or couldn't be measured.
        against_runner_up: The same compared with the next cheapest; None without one.
    """

    target: Constraint
    reached: float
    rounds: int
    kept: int
    memory_gib: float
    memory_in_use: float | None
    quality_loss: float | None
    against_in_use: Difference | None
    against_runner_up: Difference | None

    @property
    def gain(self) -> str:
        """The gain over the settings in use, in a sentence."""
        saved = (self.memory_in_use or 0.0) - self.memory_gib
        gains = []
        if self.memory_in_use and abs(saved) > _SAME * self.memory_in_use:
            gains.append(f"{abs(saved):.2f} GiB {'less' if saved > 0 else 'more'} memory")
        if self.against_in_use:
            name = self.target.name
            gains.append(f"{name} {in_words(name, self.against_in_use)}")
        told = [f"Compared with the settings in use: {', '.join(gains)}."] if gains else []
        if self.memory_in_use is None:
            if self.against_in_use is None:
                return "The settings in use could not be measured."
            told.append("The memory that the settings in use take is unknown.")
        return " ".join(told) or "There is no gain over the settings in use."

    def __str__(self) -> str:
        """The proof in sentences."""
        loss = self.quality_loss
        quality = "" if loss is None else f" Perplexity: {loss * 100:+.1f} % vs. the largest quant."
        return (
            f"{self.target} in {self.kept} of {self.rounds} rounds; 19 of 20 re-runs should reach"
            f" {self.reached:.4g}. Memory: {self.memory_gib:.2f} GiB.{quality} {self.gain}"
        )


def reached_in_reruns(values: Sequence[float], *, at_least: bool) -> float:
    """Return the one-sided prediction bound that holds for 19 of 20 re-runs. Pure.

    Args:
        values: Two or more numbers, compared by their ratios if all are positive.
        at_least: Whether the bound is a lower one.
    """
    scale, back = (math.log, math.exp) if min(values) > 0 else (float, float)
    scaled = [scale(value) for value in values]
    quantile = extra("scipy.stats").t.ppf(_RERUNS, len(scaled) - 1)
    far = float(quantile) * stdev(scaled) * math.sqrt(1 + 1 / len(scaled))
    return back(fmean(scaled) - far if at_least else fmean(scaled) + far)
