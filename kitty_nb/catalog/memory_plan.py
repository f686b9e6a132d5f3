"""Whether a model fits: what the engine would choose, and how long a context could be. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kitty_nb.catalog.memory import MARGIN, MemoryPreview, Needs, Part, Verdict
from kitty_nb.catalog.memory_formula import CONTEXT_STEP, estimate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kitty_nb.catalog.memory import Memory, MemorySettings
    from kitty_nb.catalog.model_shape import ModelShape

__all__ = ["plan", "preview"]

_LEAST_CONTEXT = 4096  # llama.cpp's --fit-ctx: --fit shrinks no further


def plan(shape: ModelShape, settings: MemorySettings, memory: Memory) -> MemorySettings:
    """Settle what is left to the engine, context and GPU layers, as its `--fit` would.

    It shortens a context that was not asked for, and then takes layers off the GPUs, until its
    margin is left free on each of them; without a GPU it measures by all of the RAM.
    """
    trained = shape.trained_context * settings.caches
    least = _LEAST_CONTEXT * settings.caches
    layers = settings.gpu_layers
    most = (len(shape.layers) + 1) if memory.gpus else 0
    settled = replace(
        settings,
        context=settings.context or trained,
        gpu_layers=min(most if layers is None or layers < 0 else layers, most),
    )
    if not settings.fits or not shape.cache_known:
        return settled

    def agrees(trial: MemorySettings) -> bool:
        needs = estimate(shape, trial, memory.gpus)
        if not memory.gpus:
            return _within(needs[0], memory.ram.total - MARGIN)
        return all(map(_within, needs[1:], (gpu.free - MARGIN for gpu in memory.gpus)))

    if settings.context is None and not agrees(settled) and trained > least:
        step = CONTEXT_STEP * settings.caches
        longest = _most(lambda n: agrees(replace(settled, context=n)), trained, step)
        settled = replace(settled, context=max(longest, least))
    if layers is None and memory.gpus and not agrees(settled):
        count = _most(lambda n: agrees(replace(settled, gpu_layers=n)), most, 1)
        settled = replace(settled, gpu_layers=count)
    return settled


def preview(
    shape: ModelShape,
    settings: MemorySettings,
    memory: Memory,
    answer: Sequence[Needs] | None = None,
) -> MemoryPreview:
    """Compare what a model needs with the memory there is.

    Args:
        shape: The model.
        settings: As `plan` returns them.
        memory: What there is.
        answer: What the engine says it needs in each of `memory.places`; without it the formula
            holds. The formula then still tells how the needs change with the context.
    """
    formula = estimate(shape, settings, memory.gpus)
    needs = formula if answer is None else answer

    def fits(context: int) -> bool:
        trial = estimate(shape, replace(settings, context=context), memory.gpus)
        return all(
            Part(place, _shifted(then, now, said)).verdict is Verdict.FITS
            for place, then, now, said in zip(memory.places, trial, formula, needs, strict=True)
            if then.weights
        )

    upmost = shape.trained_context * settings.caches
    return MemoryPreview(
        parts=tuple(
            Part(place, part)
            for place, part in zip(memory.places, needs, strict=True)
            if part.total != 0
        ),
        context=settings.context,
        largest_context=_most(fits, upmost, CONTEXT_STEP * settings.caches)
        if shape.cache_known
        else None,
        exact=answer is not None,
    )


def _within(needs: Needs, limit: int) -> bool:
    return needs.total is not None and needs.total <= limit


def _shifted(then: Needs, now: Needs, said: Needs) -> Needs:
    """`then` by formula, corrected by what the engine says of `now`."""
    if then.total is None or now.total is None or said.total is None:
        return then
    return Needs(then.total - now.total + said.total, 0, 0)


def _most(fits: Callable[[int], bool], upmost: int, step: int) -> int:
    """The largest number up to `upmost` that fits, else in whole steps; 0 when none does."""
    if fits(upmost):
        return upmost
    low, high = 0, -(-upmost // step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step
