"""`tune` with a target: the settings that reach it with the least memory, and their proof."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack, cast

from kitty_nb.catalog.catalog import ModelCatalog, families
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.arguments import whole
from kitty_nb.experiments.bounds import QUALITY_LOSS, Constraint, read_bound
from kitty_nb.experiments.combination import choose
from kitty_nb.experiments.metrics import smaller_is_better
from kitty_nb.experiments.proof import Proof, reached_in_reruns
from kitty_nb.experiments.results import Results
from kitty_nb.experiments.search_run import TuneResult, Tuning, TuningOptions
from kitty_nb.experiments.space import in_use
from kitty_nb.experiments.statistics import LEAST_ROUNDS
from kitty_nb.experiments.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.combination import Combination
    from kitty_nb.experiments.statistics import Difference
    from kitty_nb.experiments.trial import TrialResult

COSTS: Mapping[str, Any] = {  # settings that trade memory or quality for speed
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
_PROOF = 1000  # numbers of repeats from here on are rounds of the proof
_CANDIDATES = 3  # the number of proofs to attempt


@dataclass(frozen=True)
class Goal:
    """The target of a search, its limits as constraints, and the rounds of its proof.

    `loss` bounds the relative increase of the text's perplexity.
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
        """Parse the arguments of `tune`."""
        whole("proof_rounds", rounds, LEAST_ROUNDS)
        bounds = [read_bound(target), *([read_bound(memory, COST)] if memory else [])]
        limits = {f"{one.name}{one.sign}": one.bound for one in bounds}
        loss = read_bound(quality_loss, QUALITY_LOSS) if quality_loss else None
        return cls(bounds[0], limits, loss, text or _TEXT, rounds)


def family_of(model: object, config: ServerConfig) -> tuple[list[Path], Path]:
    """Return a model with the other quants of it on disk, and the largest of them. Blocking.

    Quants of a model share its base model and architecture.
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


class TargetTuning(Tuning):
    """Runs a search for the settings that reach a target with the least memory, and proves them."""

    def __init__(self, *, goal: Goal, reference: str, **options: Unpack[TuningOptions]) -> None:
        super().__init__(**options)
        self._target = goal.target
        self._loss = goal.loss
        self._used = Trial(self._search.models[0])
        self._reference = Trial(reference)
        self._rounds = goal.rounds
        self._proved: tuple[Combination, Proof] | None = None
        self._unproved: list[str] = []  # the candidates that failed, and why
        self._best_perplexity: float | None = None
        self._earlier: list[TrialResult] = []

    def _resume(self, rows: list[TrialResult]) -> None:
        """Add the proof's rows; the search's follow once the reference's perplexity is known."""
        proofs = [r for r in rows if r.trial.repeat >= _PROOF or r.trial == self._reference]
        self._rows |= {row.trial.key: row for row in proofs}
        self._earlier = [row for row in rows if row.trial.repeat < _PROOF]

    async def _find(self) -> TuneResult:
        await self._controlled(self._run)
        search = self._search
        if self._proved is None:  # `choose` names the nearest if nothing fits
            search.results.choose(search.objective, search.bounds)
            fitting = len(search.results.fitting(search.objective, search.bounds))
            raise ExperimentError(
                f"{fitting} of {len(search.results.combinations)} combinations reached"
                f" {self._target} in the search, but the cheapest failed the proof, which asks for"
                f" 19 of 20 runs:{''.join(self._unproved)}\nLoosen a bound, or try again on a quiet"
                " machine, because noise counts against them."
            )
        best, proof = self._proved
        await self._write_requests(search.results)
        value = best.metrics[COST].median
        return TuneResult(best, value, COST, search.results, search.study, proof)

    def _plan(self) -> Iterator[Trial]:
        if self._loss:
            yield from self._missing([[self._reference]])
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
        """Yield rounds of the cheapest settings, the runner-up and the settings in use."""
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
                [Trial(one.model, one.settings, first + step) for one in compared]
                for step in range(self._rounds)
            ]
            yield from self._missing(
                each if step % 2 else each[::-1] for step, each in enumerate(rounds)
            )
            rows = tuple(self._rows[trial.key] for each in rounds for trial in each)
            proof = self._judge(Results(self.config, rows), best.trial, other, same=same)
            if isinstance(proof, Proof):
                self._proved = replace(best, more_rounds=0), proof  # a search has no rounds to add
                return
            self._unproved.append(f"\n- {best.trial.label}: {proof}")

    def _judge(
        self, proof: Results, best: Trial, other: Combination | None, *, same: bool
    ) -> Proof | str:
        """Return the proof if enough re-runs should reach the target; otherwise the reason."""
        name = self._target.name
        by_trial = {one.trial: one for one in proof.combinations}
        one = by_trial[best]
        values = [*one.series.get(name, {}).values()]
        if len(values) < self._rounds:  # a round failed
            return " ".join(one.reasons) or f"a round has no {name}"
        reached = reached_in_reruns(values, at_least=self._target.sign.startswith(">"))
        others = (bound for bound in self._search.bounds if bound != self._target)
        found = (self._target, reached), *((each, one.value(each.name)) for each in others)
        if missed := [bound.told(value) for bound, value in found if not bound.allows(value)]:
            return ", ".join(missed)
        used = one if same else by_trial[self._used]
        perplexity = one.metrics.get("perplexity")
        ends = self._best_perplexity

        def against(rival: Combination | None) -> Difference | None:
            if rival is None or not rival.done:
                return None
            return one.against(rival, name, smaller_is_better=smaller_is_better(name))

        return Proof(
            target=self._target,
            reached=reached,
            rounds=self._rounds,
            kept=sum(map(self._target.allows, values)),
            memory_gib=one.metrics[COST].median,
            memory_in_use=used.value(COST),
            quality_loss=perplexity.median / ends - 1 if perplexity and ends else None,
            against_in_use=None if same else against(used),
            against_runner_up=against(by_trial.get(other.trial)) if other else None,
        )

    def _missing(self, rounds: Iterable[Sequence[Trial]]) -> Iterator[Trial]:
        """Yield the trials of each round that no single run has measured as a whole."""
        for trials in rounds:
            rows = [self._rows.get(trial.key) for trial in trials]
            if None in rows or len({row.run for row in rows if row}) > 1:
                yield from trials

    def _is_used(self, trial: Trial) -> bool:
        return trial.model == self._used.model and all(
            value == in_use(name, self.config) for name, value in trial.settings
        )
