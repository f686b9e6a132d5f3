"""Batch sizes: which made a difference, and prompts that are long enough to make one. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from kitty_nb.experiments.latency import LATENCY_NAMES
from kitty_nb.experiments.metrics import OBJECTIVE, SPEEDS
from kitty_nb.experiments.space import ENGINE_DEFAULTS, in_use
from kitty_nb.experiments.trial import DEFAULT_PROMPT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.space import Settings
    from kitty_nb.experiments.trial import TrialResult, Workload

BATCHES = ("batch_size", "ubatch_size")
_BYTES_PER_TOKEN = 4  # of most texts, with most tokenizers
_SPECULATED = 64  # maximum tokens per decoding step of an answer, with speculation
_ENDLESS = 1 << 62


def batch_tokens(result: TrialResult) -> dict[str, int]:
    """Return the maximum number of tokens in a batch, by name of the speed it affects."""
    speeds = result.measurement.speeds if result.measurement else ()
    return {
        f"{name}_{speed.parallel}" if number else name: (
            min(speed.prompt_tokens, _SPECULATED)
            if name == OBJECTIVE and speed.parallel == 1
            else speed.prompt_tokens * speed.parallel
        )
        for number, speed in enumerate(speeds)
        for name in (*SPEEDS, *LATENCY_NAMES)
        if speed.prompt_tokens
    }


def idle_batches(settings: Settings, base: ServerConfig, tokens: int) -> tuple[str, ...]:
    """Name the batch sizes that split `tokens` just as those in use do."""

    def effect_without(name: str) -> object:
        return batch_effect(tuple(one for one in settings if one[0] != name), base, tokens)

    effect = batch_effect(settings, base, tokens)
    return tuple(
        name
        for name, value in settings
        if name in BATCHES and value != in_use(name, base) and effect_without(name) == effect
    )


def batch_effect(settings: Settings, base: ServerConfig, tokens: int) -> tuple[object, ...]:
    """Return a key that is equal for settings that split `tokens` into equal batches."""
    batch, ubatch = _sizes(settings, base)
    rest = frozenset(one for one in settings if one[0] not in BATCHES)
    return rest, min(batch, tokens), min(ubatch, batch, tokens)


def fill_batches(
    workload: Workload, tried: Sequence[Settings], base: ServerConfig, objective: str = ""
) -> tuple[Workload, tuple[str, ...]]:
    """Lengthen the default prompt to fill the batches, if their sizes are varied and matter.

    Returns:
        The workload, and a warning if it can't distinguish the batch sizes.
    """
    sizes = zip(*(_sizes(settings, base) for settings in tried), strict=True)
    largest = max((max(values) for values in sizes if len(set(values)) > 1), default=0)
    if not largest:
        return workload, ()
    if objective == OBJECTIVE and workload.levels[0] == 1:  # one token per step
        return workload, (
            f"{objective} of one request at a time doesn't depend on batch sizes. Leave them out,"
            " or compare prompt_tokens_per_second or time_to_first_token.",
        )
    if workload.prompts == (DEFAULT_PROMPT,) and not workload.quality:
        workload = replace(workload, fill=largest)
    size = max(len(prompt.encode()) for prompt in workload.prompts) / _BYTES_PER_TOKEN
    tokens = max(round(size), workload.fill) * workload.levels[-1]
    shown, all_of_them = (
        len({batch_effect(settings, base, limit) for settings in tried})
        for limit in (tokens, _ENDLESS)
    )
    if shown == all_of_them:
        return workload, ()
    return workload, (
        f"Prompts of about {tokens} tokens don't fill all batch sizes, so some can't differ. Use"
        f" prompts of {largest} tokens or more.",
    )


def _sizes(settings: Settings, base: ServerConfig) -> list[int]:
    given = {name: in_use(name, base) for name in BATCHES} | dict(settings)
    return [cast("int", given[name] or ENGINE_DEFAULTS[name]) for name in BATCHES]
