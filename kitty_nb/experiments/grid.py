"""Models and settings become the list of trials, in the order in which they are run. Pure."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from kitty_nb.config import ServerConfig
from kitty_nb.errors import ConfigError, ExperimentError, Problem
from kitty_nb.experiments.settings import FIELDS, as_value, changes, check_names
from kitty_nb.experiments.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kitty_nb.experiments.trial import Value

    Skip = Callable[[Mapping[str, Any]], object]

__all__ = ["combine", "in_order"]


def combine(
    base: ServerConfig,
    models: Sequence[object] = (),
    grid: Mapping[str, Iterable[Any]] | None = None,
    configs: Iterable[ServerConfig | Mapping[str, Any]] | None = None,
    skip: Skip | None = None,
) -> tuple[Trial, ...]:
    """Return every combination of models and settings once.

    Args:
        base: What holds where a combination says nothing.
        models: Files, absolute or in the models folder; without any, that of `base`.
        grid: Values by name of setting: all combinations of them are tried.
        configs: Combinations one by one, as whole settings or as changes to `base`. With a grid,
            each is combined with all of it.
        skip: Called with each combination, its model as `model`; what it returns true for is left
            out.

    Raises:
        ConfigError: Listing all names and values that are wrong.
        ExperimentError: Nothing is left to try.
    """
    problems: list[Problem] = []
    axes = {name: _values(name, values, problems) for name, values in (grid or {}).items()}
    listed = [_listed(one, base, problems) for one in ([{}] if configs is None else configs)]
    problems += check_names([*axes, *(name for _, settings in listed for name in settings)])
    if problems:
        raise ConfigError("the sweep", tuple(problems))
    named = [_name(model, base) for model in models or filter(None, (base.model,))]
    if not named and not all(model for model, _ in listed):
        raise ExperimentError("No model is chosen. Write models=[…], or set one in .env.")
    combinations = dict.fromkeys(
        Trial(model, tuple((settings | dict(zip(axes, point, strict=True))).items()))
        for own_model, settings in listed
        for model in ([own_model] if own_model else named)
        for point in product(*axes.values())
    )
    left = tuple(trial for trial in combinations if not _skipped(trial, skip))
    if not left:
        emptied = [name for name, values in axes.items() if not values]
        what = f"no values are given for {', '.join(emptied)}" if emptied else "skip leaves none"
        what = "configs is empty" if configs is not None and not listed else what
        raise ExperimentError(f"There is nothing to try: {what}. Give at least one combination.")
    _check_values(left, base)
    return left


def in_order(
    combinations: Sequence[Trial], repeats: int = 1, seed: int | None = 0
) -> tuple[Trial, ...]:
    """Return all trials: each combination once, then each once more, every round shuffled.

    What drifts, such as a machine that grows warm, so falls on all combinations alike.

    Args:
        combinations: What is to be tried.
        repeats: How often each is measured.
        seed: Decides the order; None keeps every round in the order given.
    """
    rounds = []
    for repeat in range(1, repeats + 1):
        trials = [Trial(one.model, one.settings, repeat) for one in combinations]
        if seed is not None:
            Random(f"{seed} {repeat}").shuffle(trials)  # noqa: S311 (an order, not a secret)
        rounds += trials
    return tuple(rounds)


def _listed(
    config: ServerConfig | Mapping[str, Any], base: ServerConfig, problems: list[Problem]
) -> tuple[str | None, dict[str, Value]]:
    """The model of a config, if it names one, and its other settings."""
    if isinstance(config, ServerConfig):
        whole = {name: getattr(config, name) for name in (*FIELDS, "model")}
        config = {name: value for name, value in whole.items() if value != getattr(base, name)}
    model = _name(config["model"], base) if config.get("model") else None
    settings: dict[str, Value] = {}
    for name, value in config.items():
        if name != "model":
            for one in _values(name, [value], problems):
                settings[name] = one
    return model, settings


def _values(name: str, values: Iterable[Any], problems: list[Problem]) -> tuple[Value, ...]:
    fix = f"Write {name}=[…] with the values to try."
    if isinstance(values, (str, bytes)):
        problems.append(Problem(name, str(values), "It is one value, not several.", fix))
        return ()
    try:
        return tuple(dict.fromkeys(map(as_value, values)))
    except TypeError as error:
        problems.append(Problem(name, str(values), f"{error}.", fix))
        return ()


def _name(model: object, base: ServerConfig) -> str:
    """How a trial names a model: by its place in the models folder, which any machine can have."""
    path, folder = Path(str(getattr(model, "path", model))).expanduser(), base.models_dir
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _skipped(trial: Trial, skip: Skip | None) -> bool:
    if skip is None:
        return False
    combination = {"model": trial.model, **dict(trial.settings)}
    try:
        return bool(skip(combination))
    except Exception as error:
        raise ExperimentError(
            f"skip failed with {error!r} for {combination}. It is called with the settings of a"
            " combination, and returns whether to leave it out."
        ) from error


def _check_values(trials: Iterable[Trial], base: ServerConfig) -> None:
    """Validate the settings of all trials; their models are looked at when their turn comes."""
    bare = base.model_copy(update={"model": None})
    problems: dict[tuple[str, str], Problem] = {}
    for trial in trials:
        wanted = changes(trial, bare)
        try:
            bare.replace(**{name: wanted[name] for name in wanted if name != "model"})
        except ConfigError as error:
            problems |= {(one.key, one.value): one for one in error.problems}
    if problems:
        raise ConfigError("the sweep", tuple(problems.values()))
