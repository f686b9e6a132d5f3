"""`Search`: an Optuna study that proposes what to measure next, and its search space.

The sampler is Optuna's multivariate tree-structured Parzen estimator: it comes within a few percent
of a grid's best in a quarter of the grid's trials, which the univariate one does not.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import optuna
import psutil
from anyio.from_thread import start_blocking_portal
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from kitty_nb.config import FlashAttention
from kitty_nb.errors import ConfigError, ExperimentError
from kitty_nb.experiments.arguments import require, several
from kitty_nb.experiments.combination import Combination
from kitty_nb.experiments.metrics import first_answers, known
from kitty_nb.experiments.results import Results
from kitty_nb.experiments.space import FIELDS, as_value, combine, in_use
from kitty_nb.experiments.store import quiet
from kitty_nb.experiments.trial import Outcome, Trial
from kitty_nb.isolated_server import has_gpu

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.bounds import Constraint
    from kitty_nb.experiments.metrics import Objective
    from kitty_nb.experiments.space import Settings
    from kitty_nb.experiments.trial import TrialResult

    Choice = bool | int | float | str | None

Axis = CategoricalDistribution | IntDistribution | FloatDistribution
Space = dict[str, Axis]

_MODEL = "model"  # the name of the axis of models
_RANDOM = 5  # random trials before the estimator takes over
_ASKED = 30  # repeated proposals in a row before a random choice
_ENUMERABLE = 4096  # combinations
_CONFIRM_EVERY = 8  # trials, the last of which repeats the best so far
_SURE = 3  # measurements after which a median is trusted
_PEERS = 4  # minimum number of combinations for a usual value
_CLEARLY = 0.1  # relative margin, beyond noise, by which a pruned trial is worse than usual
_WIDE = 16  # ratio of a range's ends from which it is searched on a logarithmic scale
_LAYERS = [0, 8, 16, 24, 32, 48, 999]  # on GPUs; the last means all


class Search:
    """A search for the best model and settings. It chooses trials, but doesn't run them.

    Attributes:
        models: The models to choose from, by their names in trials; the one in use comes first.
        study: The Optuna study, with a trial for each row.
        rows: The rows of all trials, including earlier runs.
    """

    def __init__(
        self,
        models: tuple[str, ...],
        space: Space,
        objective: Objective,
        bounds: tuple[Constraint, ...],
        config: ServerConfig,
        seed: int,
    ) -> None:
        self.models = models
        self.space = space
        model = {_MODEL: CategoricalDistribution(models)} if len(models) > 1 else {}
        self._axes: Space = {**model, **space}
        self.objective = objective
        self.bounds = bounds
        self.rows: list[TrialResult] = []
        self._resumed = 0
        self._config = config
        self._random = Random(seed)  # noqa: S311 (no secret)
        self._asked: dict[Trial, optuna.Trial] = {}
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = optuna.create_study(
                direction="minimize" if objective.smaller else "maximize",
                sampler=TPESampler(seed=seed, n_startup_trials=_RANDOM, multivariate=True),
            )

    @property
    def results(self) -> Results:
        """The results so far."""
        return Results(self._config, tuple(self.rows))

    def samples(self, name: str) -> Settings:
        """Return a setting's possible values, or the ends of its range, each with its name."""
        axis = self.space[name]
        ends = axis.choices if isinstance(axis, CategoricalDistribution) else (axis.low, axis.high)
        return tuple((name, value) for value in ends)

    def resume(self, rows: Iterable[TrialResult]) -> None:
        """Add the rows of earlier runs that lie in the search space."""
        for row in rows:
            settings = dict(row.trial.settings)
            inside = settings.keys() == self.space.keys() and all(
                _holds(axis, settings[name]) for name, axis in self.space.items()
            )
            # A trial that was pruned for another objective may win now.
            lost = row.outcome is Outcome.PRUNED and f" {self.objective.name} " not in row.reason
            if row.trial.model in self.models and inside and not lost:
                ordered = tuple((name, settings[name]) for name in self.space)
                self.tell(replace(row, trial=replace(row.trial, settings=ordered)))
        self._resumed = len(self.rows)

    def ask(self, *, last: bool = False) -> Trial | None:
        """Return the next trial; None when the space is exhausted.

        The settings in use come first. The best so far is repeated now and then, and by the `last`
        trial unless there were only a few, because medians are compared.
        """
        doubtful, tried = self._doubtful(), len(self.rows)
        confirm = (tried + 1) % _CONFIRM_EVERY == 0 or (last and tried >= _PEERS)
        return doubtful if doubtful and confirm else self._propose() or doubtful

    def tell(self, row: TrialResult) -> None:
        """Add a row. A row without a value counts as pruned, so that the sampler avoids it."""
        self.rows.append(row)
        value = self.objective.of(row)
        asked = self._asked.pop(row.trial, None)
        if asked is None:  # Optuna did not propose it
            self.study.enqueue_trial({_MODEL: row.trial.model, **dict(row.trial.settings)})
            asked = self.study.ask({**self._axes})
        if row.outcome is Outcome.DONE:
            one = Combination.of([row], self._config)
            for bound in self.bounds:
                asked.set_constraint(str(bound), bound.excess(one.value(bound.name)))
        self.study.tell(asked, value, TrialState.PRUNED if value is None else None)

    def prune_reason(self, now: float, answers: int = 0) -> str:
        """Say why a trial with this value so far can no longer win; empty while it can.

        It is compared with other trials of this run, because the machine may have been faster
        before. If it is the median of some first answers, so are theirs: prompts differ in length.
        """
        name, peers = self.objective.name, self._medians()
        first = (row for row in self.rows[self._resumed :] if row.trial in peers)
        found = [v for row in first if (v := first_answers(row, name, answers)) is not None]
        if len(found) < _PEERS:
            return ""
        usual = median(found)
        behind = now - usual if self.objective.smaller else usual - now
        if behind <= _CLEARLY * abs(usual):
            return ""
        return f"its {name} was {now:.4g} so far, and {usual:.4g} is usual."

    @property
    def usual_seconds(self) -> float | None:
        """The median duration of a trial in seconds; None while there are too few."""
        peers = self._medians()
        if len(peers) < _PEERS:
            return None
        return median(r.seconds.overall for r in self.rows if r.trial.combination in peers)

    def _medians(self) -> dict[Trial, float]:
        """Return the median objective of each combination that satisfies all constraints."""
        name, fitting = self.objective.name, self.results.fitting(self.objective, self.bounds)
        return {one.trial: one.metrics[name].median for one in fitting}

    def _doubtful(self) -> Trial | None:
        """Return a repeat of the best combination whose median isn't trusted yet."""
        times = Counter(row.trial.combination for row in self.rows)
        values = {trial: v for trial, v in self._medians().items() if times[trial] < _SURE}
        if not values:
            return None
        best = (min if self.objective.smaller else max)(values, key=values.__getitem__)
        return replace(best, repeat=times[best] + 1)

    def _propose(self) -> Trial | None:
        """Return a combination that was not tried yet; None if there is none."""
        if not self.rows:
            used = {name: in_use(name, self._config) for name in self.space}
            first = {n: value for n, value in used.items() if _holds(self.space[n], value)}
            self.study.enqueue_trial({_MODEL: self.models[0], **first})
        tried = {row.trial.combination for row in self.rows}
        for _ in range(_ASKED):
            asked = self.study.ask({**self._axes})
            trial = self._trial(asked.params)
            if trial not in tried:
                self._asked[trial] = asked
                return trial
            self.study.tell(asked, state=TrialState.FAIL)
        points = (self._trial(dict(point)) for point in _points(self._axes))
        left = [trial for trial in points if trial not in tried]
        return self._random.choice(left) if left else None

    def _trial(self, chosen: Mapping[str, Any]) -> Trial:
        settings = tuple((name, chosen[name]) for name in self.space)
        return Trial(chosen.get(_MODEL, self.models[0]), settings)


def read_space(
    models: Sequence[object],
    base: ServerConfig,
    written: Mapping[str, Any] | None,
    bounds: Sequence[Constraint],
    metrics: Collection[str],
) -> tuple[tuple[str, ...], Space]:
    """Return the models' names in trials, and the search space restricted by bounds on settings.

    A bound on a setting outside the space adds it with that value, unless `base` satisfies it. By
    default the space has the settings that usually matter on this machine.
    """
    given = default_space(base) if written is None else written
    require("space", given, Mapping, 'values by name of setting: {"threads": [4, 8]}')
    given = dict(given)
    for bound in bounds:
        known(bound.name, {*given, *metrics, *FIELDS})
        in_base = as_value(getattr(base, bound.name, None))
        if bound.name not in {*given, *metrics} and not (in_base and bound.allows(in_base)):
            given[bound.name] = bound.bound
    if not given:
        raise ExperimentError("The space is empty. Name at least one setting to vary.")
    each = [{name: value} for name, choice in given.items() for value in several(choice)]
    try:
        trials = combine(base, models, configs=[{}, *each])
    except ConfigError as error:
        raise ConfigError("the space", error.problems) from None
    space = {
        name: _axis(name, choice, [bound for bound in bounds if bound.name == name])
        for name, choice in given.items()
    }
    return tuple(dict.fromkeys(trial.model for trial in trials)), space


def _axis(name: str, choice: Any, bounds: Sequence[Constraint]) -> Axis:
    """Return the values of a list or a range that satisfy the bounds, as Optuna's distribution."""
    if not _is_range(choice):
        values = dict.fromkeys(map(as_value, several(choice)))
        if left := [value for value in values if all(b.allows(value) for b in bounds)]:
            return CategoricalDistribution(cast("list[Choice]", left))
    elif all(_is_number(bound.bound) for bound in bounds):
        low, high = (cast("float", as_value(end)) for end in choice)
        whole = isinstance(low, int) and isinstance(high, int)
        for bound in bounds:
            low, high = _cut(low, high, bound)
        low, high = (math.ceil(low), math.floor(high)) if whole else (low, high)
        if low <= high:
            wide = low > 0 and high / low >= _WIDE
            if whole:
                return IntDistribution(int(low), int(high), log=wide)
            return FloatDistribution(low, high, log=wide)
    kept = f" that keeps {' and '.join(map(str, bounds))}" if bounds else ""
    loosen = ", or loosen the constraint" if bounds else ""
    raise ExperimentError(f"The space has no value of {name}{kept}. Give other values{loosen}.")


def _cut(low: float, high: float, bound: Constraint) -> tuple[float, float]:
    """Return the ends of a range restricted by a bound."""
    limit, sign = bound.bound, bound.sign
    if sign in {"<", ">"}:
        limit = math.nextafter(limit, math.inf if sign == ">" else -math.inf)
    return (
        low if sign.startswith("<") else max(low, limit),
        high if sign.startswith(">") else min(high, limit),
    )


def _holds(axis: Axis, value: Any) -> bool:
    """Return whether an axis contains a value."""
    if isinstance(axis, CategoricalDistribution):
        return value in axis.choices
    kinds = (int,) if isinstance(axis, IntDistribution) else (int, float)
    return isinstance(value, kinds) and axis.low <= value <= axis.high


def _points(space: Space) -> list[tuple[tuple[str, Any], ...]]:
    """Return all combinations of a space; none if there are too many to list."""
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


def _is_range(choice: object) -> bool:
    return isinstance(choice, tuple) and len(choice) == 2 and all(map(_is_number, choice))  # noqa: PLR2004


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def default_space(base: ServerConfig) -> dict[str, Any]:
    """Return the settings that affect speed on this machine but not answers.

    Batch sizes are omitted: they matter only for prompts longer than a batch.
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
