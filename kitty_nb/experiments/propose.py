"""What to try next: Optuna's tree-structured Parzen estimator on what is known so far.

A server's settings are mostly good or bad each by itself, and an estimator needs many trials to see
that. So two of three proposals change a single setting of the best, and find the way uphill; the
third is the estimator's alone, which sees settings together and leaves hills that are not the best.

Each proposal has a study of its own, made of all that is known. So it depends on nothing else: a
search that is resumed proposes what it would have proposed, and repeats count by their median.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import product
from math import prod
from random import Random
from typing import TYPE_CHECKING, Any, cast

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial

from kitty_nb.experiments.space import Range, Values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kitty_nb.experiments.space import Axis, Space
    from kitty_nb.experiments.standing import Known
    from kitty_nb.experiments.trial import Value

__all__ = ["make_study", "propose"]

Settings = tuple[tuple[str, "Value"], ...]

_RANDOM = 3  # combinations to know before the estimator has anything to go by
_TOGETHER = 3  # each so many proposals, the estimator chooses all settings together
_WIDE = 16  # ratio of a range's ends from which on it is the order of magnitude that matters
_ENUMERABLE = 4096  # combinations
_ASKED = 30  # proposals that may be known already before chance decides


def propose(
    space: Space, known: Sequence[Known], first: Mapping[str, Value], smaller: bool, seed: int
) -> Settings | None:
    """Return a combination that is not known yet, or None when all are, or nearly all.

    Args:
        space: What to choose from.
        known: What has been tried.
        first: Settings to begin with where they are in the space, such as those in use.
        smaller: Whether less of the objective is better.
        seed: Of all chance.
    """
    random = Random(f"{seed} {len(known)}")  # noqa: S311 (no secret)
    tried = {one.combination.trial.settings for one in known}
    left = _left(space, tried)
    if left == []:
        return None
    sampler = optuna.samplers.TPESampler(seed=random.getrandbits(32), n_startup_trials=_RANDOM)
    study = make_study(space, known, smaller, sampler)
    if not known:
        begin = ((name, axis, first.get(name)) for name, axis in space.items())
        start = {name: _inward(axis, value) for name, axis, value in begin if value in axis}
        study.enqueue_trial(start)
    best = _best(known, smaller) if len(known) >= _RANDOM and len(known) % _TOGETHER else None
    for _ in range(_ASKED):
        params = study.ask(_distributions(space)).params
        asked = tuple((name, _outward(axis, params[name])) for name, axis in space.items())
        if best:
            asked = _one_changed(space, best, dict(asked), random)
        if asked not in tried:
            return asked
    return random.choice(left) if left else None


def _best(known: Sequence[Known], smaller: bool) -> Settings | None:
    values = {
        one.combination.trial.settings: one.value
        for one in known
        if one.counts and one.value is not None
    }
    pick = min if smaller else max
    return pick(values, key=values.__getitem__, default=None)


def _one_changed(
    space: Space, best: Settings, asked: Mapping[str, Value], random: Random
) -> Settings:
    """The best but for one setting: any other value, or the estimator's number from a range."""
    several = [name for name, axis in space.items() if not _fixed(axis)]
    name = random.choice(several or list(space))
    axis = space[name]
    value = random.choice(axis.values) if isinstance(axis, Values) else asked[name]
    return tuple((each, value if each == name else kept) for each, kept in best)


def make_study(
    space: Space,
    known: Sequence[Known],
    smaller: bool,
    sampler: optuna.samplers.BaseSampler | None = None,
) -> optuna.Study:
    """Tell Optuna all that is known. What has no value counts as pruned, so as to be avoided."""
    with _quiet():
        study = optuna.create_study(
            direction="minimize" if smaller else "maximize", sampler=sampler
        )
    distributions = _distributions(space)
    for one in known:
        settings = one.combination.trial.settings
        trial = create_trial(
            state=TrialState.PRUNED if one.value is None else TrialState.COMPLETE,
            value=one.value,
            params={name: _inward(space[name], value) for name, value in settings},
            distributions=distributions,
            user_attrs=dict(settings),
            constraints=dict(one.excess),
        )
        study.add_trial(trial)
    return study


def _fixed(axis: Axis) -> bool:
    return len(axis.values) == 1 if isinstance(axis, Values) else axis.low == axis.high


def _left(space: Space, tried: set[Settings]) -> list[Settings] | None:
    """All combinations that were not tried; None where there are too many to list."""
    axes = [values for axis in space.values() if (values := _listed(axis)) is not None]
    if len(axes) < len(space) or prod(map(len, axes)) > _ENUMERABLE:
        return None
    points = (tuple(zip(space, values, strict=True)) for values in product(*axes))
    return [one for one in points if one not in tried]


def _listed(axis: Axis) -> Sequence[Value] | None:
    if isinstance(axis, Values):
        return axis.values
    return range(int(axis.low), int(axis.high) + 1) if axis.whole else None


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    return {name: _distribution(axis) for name, axis in space.items()}


def _distribution(axis: Axis) -> BaseDistribution:
    """How Optuna sees an axis: ordered values by their place, so that it knows neighbours."""
    if isinstance(axis, Range):
        wide = axis.low > 0 and axis.high / axis.low >= _WIDE
        if axis.whole:
            return IntDistribution(int(axis.low), int(axis.high), log=wide)
        return FloatDistribution(axis.low, axis.high, log=wide)
    if axis.ordered:
        return IntDistribution(0, len(axis.values) - 1)
    return CategoricalDistribution([str(value) for value in axis.values])


def _inward(axis: Axis, value: Value) -> object:
    match axis:
        case Range():
            return value
        case Values(values) if axis.ordered:
            return values.index(value)
    return str(value)


def _outward(axis: Axis, param: Any) -> Value:
    match axis:
        case Values(values) if axis.ordered:
            return values[int(param)]
        case Values(values):
            return next(value for value in values if str(value) == param)
    return cast("Value", param)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from announcing each study; its user's own choice holds again afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
