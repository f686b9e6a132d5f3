"""Batch sizes: whether two of them differ in what they do to prompts of some length. Pure."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, cast

from kitty_nb.experiments.metrics import OBJECTIVE
from kitty_nb.experiments.settings import ENGINE_DEFAULTS, in_use
from kitty_nb.experiments.workload import DEFAULT_PROMPT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.trial import Value
    from kitty_nb.experiments.workload import Workload

    Settings = tuple[tuple[str, Value], ...]

__all__ = ["alike", "filled", "idle", "of_space", "samples", "warn"]

_NAMES = ("batch_size", "ubatch_size")
_BYTES_PER_TOKEN = 4  # of most texts, with most tokenizers
_ENDLESS = 1 << 62


def alike(one: Settings, other: Settings, base: ServerConfig, tokens: int) -> bool:
    """Whether two combinations do the same to batches that get so many tokens at most."""
    return _effect(one, base, tokens) == _effect(other, base, tokens)


def idle(settings: Settings, base: ServerConfig, tokens: int) -> tuple[str, ...]:
    """Name the batch sizes that do to so many tokens what those in use do."""
    return tuple(
        name
        for name, value in settings
        if name in _NAMES and value != in_use(name, base)
        if alike(settings, tuple(one for one in settings if one[0] != name), base, tokens)
    )


def filled(
    workload: Workload, tried: Iterable[Settings], base: ServerConfig, objective: str = ""
) -> Workload:
    """Let the default prompt fill the batches where their sizes are varied and matter."""
    if workload.prompts != (DEFAULT_PROMPT,) or workload.quality or _alone(objective, workload):
        return workload
    return replace(workload, fill=_largest(tried, base))


def _largest(tried: Iterable[Settings], base: ServerConfig) -> int:
    """Return the largest batch size that is tried; 0 where none is varied."""
    sizes = [_sizes(settings, base) for settings in tried]
    varied = [values for values in zip(*sizes, strict=True) if len(set(values)) > 1]
    return max((value for values in varied for value in values), default=0)


def samples(space: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Yield the values of a search's space, of a range its ends, each with its name."""
    for name, axis in space.items():
        ends = axis.choices if hasattr(axis, "choices") else (axis.low, axis.high)
        yield from ((name, value) for value in ends)


def of_space(space: Mapping[str, Any]) -> Iterator[Settings]:
    """Yield the batch sizes that a search may choose, of a range its ends."""
    sizes = [*samples({name: space[name] for name in _NAMES if name in space})]
    names = dict.fromkeys(name for name, _ in sizes)
    yield from product(*([one for one in sizes if one[0] == name] for name in names))


def warn(
    tried: Sequence[Settings], base: ServerConfig, workload: Workload, objective: str = ""
) -> Iterator[str]:
    """Say that the batch sizes that are tried cannot be told apart, if so.

    Args:
        tried: The combinations.
        base: What they change.
        workload: What is asked.
        objective: The number that is compared, where that is known.
    """
    most = _largest(tried, base)
    if most and _alone(objective, workload):
        yield (
            f"{objective} of one request at a time does not depend on batch sizes. Leave them out,"
            " or compare prompt_tokens_per_second or time_to_first_token."
        )
        return
    size = max(len(prompt.encode()) for prompt in workload.prompts) / _BYTES_PER_TOKEN
    tokens = max(round(size), workload.fill) * workload.levels[-1]
    told, all_there_is = (
        {_effect(settings, base, limit) for settings in tried} for limit in (tokens, _ENDLESS)
    )
    if len(told) < len(all_there_is):
        yield (
            f"Prompts of about {tokens} tokens cannot tell apart all batch sizes that are tried: no"
            f" batch gets more. Give prompts of {most} tokens or more."
        )


def _alone(objective: str, workload: Workload) -> bool:
    """Whether a number is of one answer at a time, which is made token by token."""
    return objective == OBJECTIVE and workload.levels[0] == 1


def _effect(settings: Settings, base: ServerConfig, tokens: int) -> tuple[object, ...]:
    batch, ubatch = _sizes(settings, base)
    rest = frozenset(one for one in settings if one[0] not in _NAMES)
    return rest, min(batch, tokens), min(ubatch, batch, tokens)


def _sizes(settings: Settings, base: ServerConfig) -> list[int]:
    given = dict(settings)
    sizes = (given[name] if name in given else in_use(name, base) for name in _NAMES)
    return [
        cast("int", size or ENGINE_DEFAULTS[name]) for name, size in zip(_NAMES, sizes, strict=True)
    ]
