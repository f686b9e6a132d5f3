"""A search as an Optuna study: what to choose from, what to try next, and what is best so far.

Optuna's tree-structured Parzen estimator looks at all settings together (`multivariate`): by itself
it comes within a few percent of a grid's best in a quarter of the grid's trials, where the one that
looks at each setting alone does not.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import optuna
import psutil
from anyio.from_thread import start_blocking_portal
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import NopPruner, ThresholdPruner
from optuna.trial import TrialState, create_trial

from kitty_nb.config import FlashAttention
from kitty_nb.errors import ConfigError, ExperimentError, Problem
from kitty_nb.experiments.metrics import Spread
from kitty_nb.experiments.results import Results, choose
from kitty_nb.experiments.space import FIELDS, as_value, combine, in_use
from kitty_nb.experiments.store import quiet
from kitty_nb.experiments.trial import Outcome, RequestAnswered, Trial, TrialProgressed
from kitty_nb.isolated_server import has_gpu

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from optuna.distributions import BaseDistribution

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.combination import Combination
    from kitty_nb.experiments.metrics import Constraint, Objective
    from kitty_nb.experiments.trial import SweepEvent, TrialResult

    Choice = bool | int | float | str | None

Axis = CategoricalDistribution | IntDistribution | FloatDistribution
Space = dict[str, Axis]

_RANDOM = 5  # trials before the estimator has anything to go by
_ASKED = 30  # proposals that may be known already before chance decides
_ENUMERABLE = 4096  # combinations
_CONFIRM_EVERY = 8  # trials, one of which measures again what is best so far
_SURE = 3  # measurements after which the median of a combination is believed
_PEERS = 4  # combinations from which on their median says what is usual
_CLEARLY = 0.1  # share by which a trial must be worse than usual, beyond noise
_WIDE = 16  # ratio of a range's ends from which on it is the order of magnitude that matters
_SHOWN = 3  # reasons in a message
_LENGTH = 300  # characters of one
_LAYERS = [0, 8, 16, 24, 32, 48, 999]  # to have on GPUs; the last is all of any model


class Search:
    """A search for the best settings of one model, by the rows there are. It runs nothing.

    Attributes:
        model: The model, as trials name it.
        space: What to choose from.
        objective: What should be best.
        study: What Optuna knows.
        rows: Of all trials, those of earlier runs too.
    """

    def __init__(
        self,
        model: str,
        space: Space,
        objective: Objective,
        bounds: Sequence[Constraint],
        config: ServerConfig,
        seed: int,
    ) -> None:
        self.rows: list[TrialResult] = []
        self.model = model
        self.space = space
        self._distributions: dict[str, BaseDistribution] = {**space}
        self.objective = objective
        self._bounds = bounds
        self._config = config
        self._random = Random(seed)  # noqa: S311 (no secret)
        self.study = _make_study(objective, seed)

    def resume(self, rows: Iterable[TrialResult]) -> None:
        """Take over those rows of earlier runs that are part of this search."""
        for row in rows:
            settings = dict(row.trial.settings)
            inside = settings.keys() == self.space.keys() and all(
                _holds(axis, settings[name]) for name, axis in self.space.items()
            )
            if row.trial.model != self.model or not inside or not self._may_count(row):
                continue
            ordered = tuple((name, settings[name]) for name in self.space)
            self.rows.append(replace(row, trial=replace(row.trial, settings=ordered)))
            value = self.objective.of(row)
            self.study.add_trial(
                create_trial(
                    state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
                    value=value,
                    params=dict(ordered),
                    distributions=self._distributions,
                    constraints=self._excess(row),
                )
            )

    def ask(self) -> tuple[Trial, optuna.Trial] | None:
        """Return what to measure next, also as Optuna's trial; None when everything is known.

        The settings in use come first. What is best so far is measured again now and then, because
        medians are compared.
        """
        self.study.pruner = self._pruner()
        doubtful = self._doubtful()
        confirm = doubtful is not None and (len(self.rows) + 1) % _CONFIRM_EVERY == 0
        if not confirm and (new := self._propose()):
            return new
        return (doubtful, self._enqueued(dict(doubtful.settings))) if doubtful else None

    def tell(self, row: TrialResult, asked: optuna.Trial) -> None:
        """Take a new row. What has no value counts as pruned, so as to be avoided.

        Raises:
            ExperimentError: The user's objective failed.
        """
        self.rows.append(row)
        value = self.objective.of(row)
        for name, excess in self._excess(row).items():
            asked.set_constraint(name, excess)
        self.study.tell(asked, value, TrialState.PRUNED if value is None else None)

    def prune_reason(self, asked: optuna.Trial, values: Sequence[float]) -> str:
        """Say why a trial under way cannot win any more; empty while it may.

        Args:
            asked: The trial.
            values: What its requests so far say of the objective.
        """
        asked.report(median(values), len(values))
        if not asked.should_prune():
            return ""
        name, usual = self.objective.name, median(self._peers().values())
        return f"its {name} was {median(values):.4g} by then, and {usual:.4g} is usual."

    @property
    def usual_seconds(self) -> float | None:
        """The usual seconds of a trial; None while too few are known."""
        peers = self._peers()
        if len(peers) < _PEERS:
            return None
        return median(r.seconds.overall for r in self.rows if r.trial.combination in peers)

    @property
    def best(self) -> tuple[Combination, Spread] | None:
        """The best by `choose` that keeps all constraints, with its objective; None without one."""
        found = self._feasible()
        objective = self.objective
        smaller, speed = objective.smaller, objective.tells_speed
        return choose(found, objective.name, smaller=smaller, speed=speed) if found else None

    @property
    def complaint(self) -> str:
        """The reason that nothing is best, and the remedy."""
        measured = [one for one in Results(self._config, tuple(self.rows)).combinations if one.done]
        if not measured:
            reasons = Counter(row.reason[:_LENGTH] for row in self.rows).most_common(_SHOWN)
            told = "\n".join(f"- {count} of them: {reason}" for reason, count in reasons)
            return f"None of {len(self.rows)} trials could be measured:\n{told}"
        if all(self.objective.of(row) is None for row in self.rows):
            return (
                f"No trial has {self.objective.name}. Choose another objective, or have it"
                " measured (quality=…, parallel=…)."
            )
        bounds = " and ".join(map(str, self._bounds))
        near = min(measured, key=lambda o: sum(b.excess(o.value(b.name)) for b in self._bounds))
        have = ", ".join(f"{b.name} {near.value(b.name)}" for b in self._bounds)
        return (
            f"None of {len(measured)} combinations keeps {bounds}. The nearest is"
            f" {near.trial.label}, with {have}. Loosen a constraint, or try other settings."
        )

    def _may_count(self, row: TrialResult) -> bool:
        """Trials pruned for another objective, which may win by this one."""
        return row.outcome is not Outcome.PRUNED or f" {self.objective.name} " in row.reason

    def _feasible(self) -> list[tuple[Combination, Spread]]:
        """The measured rows that keep all constraints, with their objective."""
        values: dict[Trial, list[float]] = {}
        for row in self.rows:
            if (value := self.objective.of(row)) is not None:
                values.setdefault(row.trial.combination, []).append(value)
        return [
            (one, Spread.over(values[one.trial]))
            for one in Results(self._config, tuple(self.rows)).combinations
            if one.trial in values and all(b.allows(one.value(b.name)) for b in self._bounds)
        ]

    def _peers(self) -> dict[Trial, float]:
        return {one.trial: spread.median for one, spread in self._feasible()}

    def _doubtful(self) -> Trial | None:
        """Another measurement of the best among those that were measured too seldom."""
        times = Counter(row.trial.combination for row in self.rows)
        values = {trial: v for trial, v in self._peers().items() if times[trial] < _SURE}
        if not values:
            return None
        best = (min if self.objective.smaller else max)(values, key=values.__getitem__)
        return replace(best, repeat=times[best] + 1)

    def _propose(self) -> tuple[Trial, optuna.Trial] | None:
        if not self.rows:
            used = {name: in_use(name, self._config) for name in self.space}
            first = {n: value for n, value in used.items() if _holds(self.space[n], value)}
            self.study.enqueue_trial(first)
        tried = {row.trial.settings for row in self.rows}
        for _ in range(_ASKED):
            asked = self.study.ask(self._distributions)
            settings = tuple((name, asked.params[name]) for name in self.space)
            if settings not in tried:
                return Trial(self.model, settings), asked
            self.study.tell(asked, state=TrialState.FAIL)
        left = [point for point in _points(self.space) if point not in tried]
        if not left:
            return None
        settings = self._random.choice(left)
        return Trial(self.model, settings), self._enqueued(dict(settings))

    def _enqueued(self, settings: dict[str, Any]) -> optuna.Trial:
        self.study.enqueue_trial(settings)
        return self.study.ask(self._distributions)

    def _excess(self, row: TrialResult) -> dict[str, float]:
        """The violation of each constraint by a measured row, keyed by the constraint's text."""
        (one,) = Results(self._config, (row,)).combinations
        return {str(b): b.excess(one.value(b.name)) for b in self._bounds} if one.done else {}

    def _pruner(self) -> optuna.pruners.BasePruner:
        peers = self._peers()
        if len(peers) < _PEERS:
            return NopPruner()
        usual = median(peers.values())
        clearly = _CLEARLY * abs(usual)
        if self.objective.smaller:
            return ThresholdPruner(upper=usual + clearly)
        return ThresholdPruner(lower=usual - clearly)


def partial_metrics(event: SweepEvent, least: int) -> dict[str, float]:
    """Return what an event says of numbers that its trial will have, by their names in the table.

    Args:
        event: Of a trial under way.
        least: The least number of requests in parallel, whose names are plain.
    """
    match event:
        case TrialProgressed(progress=progress):
            return {"load_seconds": progress.elapsed}
        case RequestAnswered(done=done, total=total) if done < total:
            end = "" if event.parallel == least else f"_{event.parallel}"
            found = {
                f"time_to_first_token{end}": event.time_to_first_token,
                f"generation_tokens_per_second{end}": event.tokens_per_second,
                f"prompt_tokens_per_second{end}": event.prompt_tokens_per_second,
            }
            return {name: value for name, value in found.items() if value is not None}
    return {}


def read_space(
    model: object,
    base: ServerConfig,
    written: Mapping[str, Any] | None,
    bounds: Sequence[Constraint],
    metrics: Collection[str],
) -> tuple[str, Space]:
    """Return how a trial names the model, and what may be chosen with all bounds on it kept.

    A bound on a setting that is not in the space fixes it there, unless `base` keeps it already.

    Args:
        model: The file, absolute or in the models folder; None for that of `base`.
        base: What holds where the space says nothing.
        written: By name a list of values, a tuple of the ends of a range, or one value; None for
            what usually makes a difference on this machine.
        bounds: The constraints; those on measured numbers are left to others.
        metrics: The names of measured numbers.

    Raises:
        ConfigError: Listing all names and values that are wrong.
        ExperimentError: Nothing is left to choose from.
    """
    given = dict(_default(base) if written is None else written)
    for bound in bounds:
        if bound.name not in {*given, *metrics} and not _kept(bound, base, {*given, *metrics}):
            given[bound.name] = bound.bound
    if not given:
        raise ExperimentError("The space is empty. Name at least one setting to vary.")
    problems = [
        Problem(name, str(choice), "It has no values.", f"Write {name}=[…].")
        for name, choice in given.items()
        if not _listed(choice) or (_is_range(choice) and choice[0] > choice[1])
    ]
    if problems:
        raise ConfigError("the space", tuple(problems))
    each = [{name: value} for name, choice in given.items() for value in _listed(choice)]
    try:
        trials = combine(base, [] if model is None else [model], configs=each)
    except ConfigError as error:
        raise ConfigError("the space", error.problems) from None
    space = {
        name: _axis(name, choice, [bound for bound in bounds if bound.name == name])
        for name, choice in given.items()
    }
    return trials[0].model, space


def _kept(bound: Constraint, base: ServerConfig, names: Collection[str]) -> bool:
    """True if the settings in use keep a bound on one of them; else it can be fixed to it."""
    if bound.name not in FIELDS:
        raise ExperimentError(
            f"The constraint {bound} names neither a setting in the space nor a measurement."
            f" Available: {', '.join(sorted(names))}."
        )
    value = as_value(getattr(base, bound.name))
    if value and bound.allows(value):
        return True
    if not bound.allows(bound.bound):
        raise ExperimentError(
            f"{bound.name} is {value or 'not set'}, which does not keep {bound}. Put it into the"
            " space, or change it in config."
        )
    return False


def _axis(name: str, choice: Any, bounds: Sequence[Constraint]) -> Axis:
    """The choices for Optuna: the values of a list, or a range, as far as bounds allow."""
    if _is_range(choice):
        low, high = (cast("float", as_value(end)) for end in choice)
        for bound in bounds:
            low, high = _cut(low, high, bound)
        if low <= high:
            wide = low > 0 and high / low >= _WIDE
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=wide)
            return FloatDistribution(low, high, log=wide)
    else:
        values = dict.fromkeys(map(as_value, _listed(choice)))
        if left := [value for value in values if all(b.allows(value) for b in bounds)]:
            return CategoricalDistribution(cast("list[Choice]", left))
    raise ExperimentError(
        f"The space has no {name} that keeps {' and '.join(map(str, bounds))}. Loosen the"
        " constraint, or give other values."
    )


def _cut(low: float, high: float, bound: Constraint) -> tuple[float, float]:
    """The part of a range that a bound allows; an empty one where it allows none."""
    if not _is_number(bound.bound):
        return 1, 0
    limit, whole = bound.bound, isinstance(low, int) and isinstance(high, int)
    match bound.sign:
        case ">=":
            return max(low, math.ceil(limit) if whole else limit), high
        case ">":
            return max(low, math.floor(limit) + 1 if whole else math.nextafter(limit, high)), high
        case "==":
            return (limit, limit) if low <= limit <= high else (1, 0)
        case "<":
            return low, min(high, math.ceil(limit) - 1 if whole else math.nextafter(limit, low))
    return low, min(high, math.floor(limit) if whole else limit)


def _holds(axis: Axis, value: Any) -> bool:
    """True if a value is one that may be chosen."""
    if isinstance(axis, CategoricalDistribution):
        return value in axis.choices
    kinds = (int,) if isinstance(axis, IntDistribution) else (int, float)
    return isinstance(value, kinds) and axis.low <= value <= axis.high


def _points(space: Space) -> list[tuple[tuple[str, Any], ...]]:
    """All combinations of a space; none where there are too many to list."""
    axes: list[Sequence[Any]] = []
    for axis in space.values():
        if isinstance(axis, CategoricalDistribution):
            axes.append(axis.choices)
        elif isinstance(axis, IntDistribution):
            axes.append(range(axis.low, axis.high + 1))
        else:
            return []
    if math.prod(map(len, axes)) > _ENUMERABLE:
        return []
    return [tuple(zip(space, values, strict=True)) for values in product(*axes)]


def _make_study(objective: Objective, seed: int) -> optuna.Study:
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM, multivariate=True)
        return optuna.create_study(
            direction="minimize" if objective.smaller else "maximize", sampler=sampler
        )


def samples(space: Space) -> Iterator[tuple[str, Any]]:
    """Yield the values of a space, of a range its ends, each with its name."""
    for name, axis in space.items():
        if isinstance(axis, CategoricalDistribution):
            yield from ((name, value) for value in axis.choices)
        else:
            yield from ((name, axis.low), (name, axis.high))


def _listed(choice: Any) -> list[Any]:
    alone = isinstance(choice, str | bytes) or not isinstance(choice, Iterable)
    return [choice] if alone else list(choice)


def _is_range(choice: object) -> bool:
    return isinstance(choice, tuple) and len(choice) == 2 and all(map(_is_number, choice))  # noqa: PLR2004


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _default(base: ServerConfig) -> dict[str, Any]:
    """Return what changes the speed on this machine, and not the answers.

    Batch sizes are left out: they matter only for prompts that are longer than a batch.
    """
    cores = psutil.cpu_count(logical=False) or 1
    logical = psutil.cpu_count() or cores
    doubled = {1 << power for power in range(logical.bit_length())}
    space: dict[str, Any] = {
        "threads": sorted(doubled | {cores, logical}),
        "flash_attention": [FlashAttention.AUTO, FlashAttention.ON, FlashAttention.OFF],
    }
    with start_blocking_portal() as portal:
        if portal.call(has_gpu, base):
            space["n_gpu_layers"] = _LAYERS
    return space
