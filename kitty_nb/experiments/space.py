"""What a search may choose from: values or ranges by name of setting. Pure but for the default."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import psutil
from anyio.from_thread import start_blocking_portal

from kitty_nb.catalog.model_shape import read_shape
from kitty_nb.config import FlashAttention
from kitty_nb.engine.devices import engine_devices
from kitty_nb.errors import ConfigError, EngineError, ExperimentError, ModelFileError, Problem
from kitty_nb.experiments.grid import combine
from kitty_nb.experiments.settings import FIELDS, as_value
from kitty_nb.supervisor.free_memory import free_memory

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.metrics import Constraint
    from kitty_nb.experiments.trial import Value

__all__ = ["Range", "Space", "Values", "read_space"]

_ENDS = 2  # of a range
_ALL_LAYERS = 999
_GPU_STEPS = 4


@dataclass(frozen=True)
class Values:
    """Values to choose one from; numbers are in ascending order."""

    values: tuple[Value, ...]

    @property
    def ordered(self) -> bool:
        """Whether neighbours are alike."""
        return all(map(_is_number, self.values))

    @property
    def samples(self) -> tuple[Value, ...]:
        """Some of its values, the first and the last among them."""
        return self.values

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def within(self, bound: Constraint) -> Values:
        """Leave what a constraint allows."""
        return Values(tuple(value for value in self.values if bound.allows(value)))


@dataclass(frozen=True)
class Range:
    """All numbers from one to another, both included; whole ones if both are."""

    low: float
    high: float

    @property
    def whole(self) -> bool:
        """Whether it has whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def samples(self) -> tuple[Value, ...]:
        """Some of its values, the first and the last among them."""
        return self.low, self.high

    def __contains__(self, value: object) -> bool:
        kinds = (int,) if self.whole else (int, float)
        return _is_number(value) and isinstance(value, kinds) and self.low <= value <= self.high

    def within(self, bound: Constraint) -> Range | Values:
        """Leave what a constraint allows."""
        if not _is_number(bound.bound):
            return Values(())
        low, high = self._allowed(bound)
        return Range(low, high) if low <= high else Values(())

    def _allowed(self, bound: Constraint) -> tuple[float, float]:
        limit = bound.bound
        match bound.sign:
            case ">=" | ">":
                least = self._at(math.ceil(limit), limit)
                if bound.sign == ">" and least == limit:
                    least = self._at(limit + 1, math.nextafter(limit, math.inf))
                return max(self.low, least), self.high
            case "==":
                return (limit, limit) if limit in self else (1, 0)
            case _:
                most = self._at(math.floor(limit), limit)
                if bound.sign == "<" and most == limit:
                    most = self._at(limit - 1, math.nextafter(limit, -math.inf))
                return self.low, min(self.high, most)

    def _at(self, whole: float, exact: float) -> float:
        return int(whole) if self.whole else float(exact)


Axis = Values | Range
Space = dict[str, Axis]


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
    given = dict(_default(model, base) if written is None else written)
    for bound in bounds:
        if _fixes(bound, base, given, metrics):
            given[bound.name] = bound.bound
    if not given:
        raise ExperimentError("The space is empty. Name at least one setting to choose.")
    name = _check(model, base, given)
    space = {setting: _axis(choice) for setting, choice in given.items()}
    for bound in bounds:
        if bound.name not in space:
            continue
        space[bound.name] = space[bound.name].within(bound)
        if space[bound.name] == Values(()):
            raise ExperimentError(
                f"The space has no {bound.name} that keeps {bound}. Loosen the constraint, or"
                " give other values."
            )
    return name, space


def _fixes(
    bound: Constraint, base: ServerConfig, given: Mapping[str, Any], metrics: Collection[str]
) -> bool:
    """Whether a bound is on a setting that nothing else makes keep it."""
    if bound.name in given or bound.name in metrics:
        return False
    if bound.name not in FIELDS:
        names = ", ".join(sorted({*given, *metrics}))
        raise ExperimentError(
            f"The constraint {bound} is on nothing that is chosen or measured. There are {names}."
        )
    value = as_value(getattr(base, bound.name))
    if value and bound.allows(value):
        return False
    if not bound.allows(bound.bound):
        raise ExperimentError(
            f"{bound.name} is {value or 'not set'}, which does not keep {bound}. Put it into the"
            " space, or change it in config."
        )
    return True


def _check(model: object, base: ServerConfig, given: Mapping[str, Any]) -> str:
    """Have every name and value validated; return how a trial names the model."""
    problems = [
        Problem(name, str(choice), "There is no value in it.", f"Write {name}=[…].")
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
    return trials[0].model


def _axis(choice: Any) -> Axis:
    if _is_range(choice):
        low, high = map(as_value, choice)
        return Range(cast("float", low), cast("float", high))
    values = Values(tuple(dict.fromkeys(map(as_value, _listed(choice)))))
    return Values(tuple(sorted(values.values, key=_number))) if values.ordered else values


def _listed(choice: Any) -> list[Any]:
    alone = isinstance(choice, str | bytes) or not isinstance(choice, Iterable)
    return [choice] if alone else list(choice)


def _is_range(choice: object) -> bool:
    return isinstance(choice, tuple) and len(choice) == _ENDS and all(map(_is_number, choice))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Value) -> float:
    return cast("float", value)


def _default(model: object, base: ServerConfig) -> dict[str, Any]:
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
    path = base.model if model is None else base.models_dir / str(getattr(model, "path", model))
    if path is not None and _has_devices(base):
        space["n_gpu_layers"] = _offloads(path)
    return space


def _has_devices(base: ServerConfig) -> bool:
    with start_blocking_portal() as portal, suppress(EngineError):  # the trials will say so
        _, devices = portal.call(engine_devices, base)
        return bool(free_memory().gpus if devices is None else devices)
    return False


def _offloads(path: Path) -> list[int]:
    """Numbers of layers to have on GPUs: all, and from none on in steps."""
    try:
        layers = len(read_shape(path).layers)
    except ModelFileError:  # the trials will say so
        layers = 0
    return [*range(0, layers, math.ceil(layers / _GPU_STEPS) or 1), _ALL_LAYERS]
