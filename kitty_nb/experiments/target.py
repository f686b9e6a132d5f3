"""`tune` with a target: the cheapest settings of a family of quants that reach it, with proof."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, cast

from kitty_nb.catalog.catalog import ModelCatalog, families
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.combination import choose
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.metrics import Constraint
from kitty_nb.experiments.results import Results
from kitty_nb.experiments.search_run import TuneResult, Tuning
from kitty_nb.experiments.space import in_use
from kitty_nb.experiments.statistics import LEAST_ROUNDS, Verdict
from kitty_nb.experiments.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.combination import Combination
    from kitty_nb.experiments.statistics import Difference
    from kitty_nb.experiments.trial import TrialResult

COSTS: Mapping[str, Any] = {  # what costs memory or quality, beside what usually matters
    "cache_type_k": ["f16", "q8_0"],
    "speculation": ["off", "ngram"],
    "ubatch_size": [128, 512],
}
_TEXT = (
    "Sunlight looks white, but it is a mixture of all colours. Air scatters blue light far more"
    " than red light, so blue reaches our eyes from every direction. At sunset the light takes a"
    " longer way through the air; most of the blue is lost, and red and orange remain."
)
COST = "memory_gib"
_BOUND = re.compile(
    r"(?P<name>[a-z]\w*)?\s*(?P<sign><=|>=|<|>)\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>%|[GM]i?B)?"
)
_UNITS = {"%": 0.01, "GiB": 1.0, "GB": 1e9 / 2**30, "MiB": 1 / 1024, "MB": 1e6 / 2**30}
_PROOF = 1000  # repeats from there on are rounds of the proof
_CANDIDATES = 3  # that may fail the proof
_RERUNS = 0.95  # share of re-runs in which the target is to hold: 19 of 20
_SAME = 0.01  # share of memory that is no gain


def read_bound(text: str, name: str = "") -> Constraint:
    """Read a bound as a person writes it: `generation_tokens_per_second >= 30`, `<= 20 GB`.

    Args:
        text: What the person wrote.
        name: The name of the number, where the text has none.

    Raises:
        ExperimentError: It cannot be understood.
    """
    match = _BOUND.fullmatch(text.strip())
    if match is None or not (match["name"] or name):
        example = "<= 2 %" if name == "quality_loss" else "<= 20 GB"
        example = example if name else "generation_tokens_per_second >= 30"
        raise ExperimentError(f"Can't parse {text!r}. Write it like {example!r}.")
    number = float(match["number"]) * _UNITS.get(match["unit"] or "", 1.0)
    return Constraint(match["name"] or name, match["sign"], number)


@dataclass(frozen=True)
class Goal:
    """What `tune` is to reach, and at what cost.

    Attributes:
        target: The bound to keep.
        limits: All bounds on measured numbers, as constraints are written.
        loss: The bound on the share by which perplexity may be worse; None for any.
        text: The text whose perplexity is measured.
        rounds: The rounds of the proof.
    """

    target: Constraint
    limits: Mapping[str, float]
    loss: Constraint | None
    text: str
    rounds: int

    @classmethod
    def of(
        cls, target: str, quality_loss: str | None, memory: str | None, text: str, rounds: int
    ) -> Goal:
        """Read a goal as a person writes it.

        Raises:
            ExperimentError: It cannot be understood.
        """
        if rounds < LEAST_ROUNDS:
            raise ExperimentError(
                f"proof_rounds is {rounds}. A proof takes {LEAST_ROUNDS} or more."
            )
        bounds = [read_bound(target), *([read_bound(memory, COST)] if memory else [])]
        limits = {f"{one.name}{one.sign}": one.bound for one in bounds}
        loss = read_bound(quality_loss, "quality_loss") if quality_loss else None
        return cls(bounds[0], limits, loss, text or _TEXT, rounds)


def family_of(model: object, config: ServerConfig) -> tuple[list[Path], Path]:
    """Return a model and the others of its family on disk, and the largest of all. It blocks.

    A family has one base model and one architecture; its quantization differs.

    Raises:
        ConfigError: The model is missing.
    """
    path = resolve_model(config if model is None else config.replace(model=model)).model
    own = cast("Path", path)
    for members in families(ModelCatalog(config.models_dir).scan()).values():
        kinds = {one.path: one.architecture for one in members if one.startable}
        if own in kinds:
            same = [one for one in members if kinds.get(one.path, "") == kinds[own]]
            largest = max(same, key=lambda one: one.size)
            others = [one.path for one in same if one.path != own]
            return [own, *others], largest.path
    return [own], own


@dataclass(frozen=True)
class Proof:
    """What repeated measurements say about the settings that a search found.

    Attributes:
        target: The target.
        reached: What 19 of 20 re-runs are expected to reach, by the rounds measured.
        rounds: The rounds measured, in each of which all were measured that are compared here.
        kept: The rounds in which the target held.
        memory_gib: The memory.
        memory_in_use: The memory with the settings in use; None where they could not be measured.
        quality_loss: The share by which perplexity is worse than the largest quant's; None where it
            was not asked for.
        against_in_use: The target's number compared with the settings in use; None where those are
            the best, or could not be measured.
        against_runner_up: The same compared with the next cheapest; None where there is none.
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
        """What is gained over the settings in use, in a sentence."""
        saved = (self.memory_in_use or 0.0) - self.memory_gib
        gains = []
        if self.memory_in_use and abs(saved) > _SAME * self.memory_in_use:
            gains.append(f"{abs(saved):.2f} GiB {'less' if saved > 0 else 'more'} memory")
        if self.against_in_use and self.against_in_use.verdict is not Verdict.TOO_CLOSE:
            gains.append(f"{self.target.name} {self.against_in_use}")
        if self.memory_in_use is None:
            return "The settings in use could not be measured."
        if not gains:
            return "Nothing is gained over the settings in use."
        return f"Compared with the settings in use: {', '.join(gains)}."

    def __str__(self) -> str:
        """The proof in sentences."""
        loss = self.quality_loss
        quality = "" if loss is None else f" Perplexity: {loss * 100:+.1f} % against the largest."
        return (
            f"{self.target} held in {self.kept} of {self.rounds} rounds; 19 of 20 re-runs should"
            f" reach {self.reached:.4g}. It takes {self.memory_gib:.2f} GiB.{quality} {self.gain}"
        )


class TargetTuning(Tuning):
    """A search for the cheapest settings that reach a target, and their proof."""

    def __init__(
        self,
        *,
        goal: Goal,
        reference: str,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self._target = goal.target
        self._loss = goal.loss
        self._used = Trial(self._search.models[0])
        self._reference = Trial(reference)
        self._rounds = goal.rounds
        self._proved: tuple[Combination, Proof] | None = None
        self._best_perplexity: float | None = None
        self._earlier: list[TrialResult] = []

    def _resume(self, rows: list[TrialResult]) -> None:
        """Take over earlier rows; those of the search once it is known what quality they need."""
        proofs = [r for r in rows if r.trial.repeat >= _PROOF or r.trial == self._reference]
        self._rows |= {row.trial.key: row for row in proofs}
        self._earlier = [row for row in rows if row.trial.repeat < _PROOF]

    async def _find(self) -> TuneResult:
        await self._controlled(self._run)
        search = self._search
        if self._proved is None:  # nothing fits: say what comes nearest
            search.results.choose(search.objective, search.bounds)
            raise ExperimentError(
                f"Nothing keeps {self._target} in 19 of 20 runs. Ask for less, or try again on a"
                " quiet machine: noise counts, too."
            )
        best, proof = self._proved
        await self._write_requests(search.results)
        value = best.metrics[COST].median
        return TuneResult(best, value, COST, search.results, search.study, proof)

    def _plan(self) -> Iterator[Trial]:
        if self._loss:
            yield from self._missing([self._reference])
            found = self._rows[self._reference.key].measurement
            self._best_perplexity = found.perplexity if found else None
            if self._best_perplexity is None:
                raise ExperimentError(
                    f"The reference {self._reference.label} could not be measured:"
                    f" {self._rows[self._reference.key].reason}"
                )
            most = self._best_perplexity * (1 + self._loss.bound)
            self._search.bounds += (Constraint("perplexity", self._loss.sign, most),)
        self._search.resume(self._earlier)
        yield from super()._plan()
        yield from self._prove()

    def _prove(self) -> Iterator[Trial]:
        """Measure the cheapest, the next and the settings in use side by side, in rounds."""
        search = self._search
        left = search.results.fitting(search.objective, search.bounds)
        for number in range(_CANDIDATES):
            if not left:
                return
            best = choose(left, search.objective)
            left = [one for one in left if one.trial != best.trial]
            other = min(left, key=lambda one: one.metrics[COST].median) if left else None
            same = self._is_used(best.trial)
            compared = [best.trial, *([] if same else [self._used])]
            compared += [other.trial] if other and not self._is_used(other.trial) else []
            first = _PROOF + number * self._rounds
            rounds = [
                Trial(one.model, one.settings, first + step)
                for step in range(self._rounds)
                for one in (compared if step % 2 else reversed(compared))
            ]
            yield from self._missing(rounds)
            rows = tuple(self._rows[trial.key] for trial in rounds)
            if proof := self._judge(Results(self.config, rows), best.trial, other, same=same):
                self._proved = best, proof
                return

    def _judge(
        self, proof: Results, best: Trial, other: Combination | None, *, same: bool
    ) -> Proof | None:
        """Return the proof if the target holds in so many re-runs; otherwise None."""
        name = self._target.name
        by_trial = {one.trial: one for one in proof.combinations}
        one = by_trial[best]
        values = [*one.series.get(name, {}).values()]
        if len(values) < self._rounds:  # a round failed
            return None
        reached = reached_in_reruns(values, at_least=self._target.sign.startswith(">"))
        if not (self._target.allows(reached) and one.keeps(self._search.bounds)):
            return None
        used = one if same else by_trial[self._used]
        next_best = by_trial.get(other.trial) if other else None
        perplexity = one.metrics.get("perplexity")
        ends = self._best_perplexity
        return Proof(
            target=self._target,
            reached=reached,
            rounds=self._rounds,
            kept=sum(map(self._target.allows, values)),
            memory_gib=one.metrics[COST].median,
            memory_in_use=used.metrics[COST].median if used.done else None,
            quality_loss=perplexity.median / ends - 1 if perplexity and ends else None,
            against_in_use=None if same or not used.done else proof.verdict(one, used, name),
            against_runner_up=(
                proof.verdict(one, next_best, name) if next_best and next_best.done else None
            ),
        )

    def _missing(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """Yield those that have no row yet."""
        for trial in trials:
            if trial.key not in self._rows:
                yield trial

    def _is_used(self, trial: Trial) -> bool:
        return trial.model == self._used.model and all(
            value == in_use(name, self.config) for name, value in trial.settings
        )


def reached_in_reruns(values: Sequence[float], *, at_least: bool) -> float:
    """Return what 19 of 20 re-runs are expected to reach, or not to exceed. Pure.

    Args:
        values: Positive numbers, two or more.
        at_least: Whether more is better.
    """
    logs = [math.log(value) for value in values]
    quantile = extra("scipy.stats").t.ppf(_RERUNS, len(logs) - 1)
    far = float(quantile) * stdev(logs) * math.sqrt(1 + 1 / len(logs))
    return math.exp(fmean(logs) - far if at_least else fmean(logs) + far)
