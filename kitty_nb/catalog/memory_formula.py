"""How much memory a model needs, by formula. Pure.

Checked against what llama.cpp itself reports (`fit_memory_breakdown`), see
`benchmarks/memory_preview.py`. Weights and cache follow its source: `src/llama-kv-cache.cpp`,
`src/llama-kv-cache-iswa.cpp` and `load_tensors` in `src/llama-model.cpp`. The compute buffer is
what its allocator was seen to take: a few vectors for each token of a batch, and the mask.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from operator import add
from typing import TYPE_CHECKING

from kitty_nb.catalog.memory import CACHE_TYPES, Needs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kitty_nb.catalog.memory import MemorySettings, Place
    from kitty_nb.catalog.model_shape import ModelShape

__all__ = ["CONTEXT_STEP", "estimate"]

CONTEXT_STEP = 256  # llama.cpp rounds contexts up to a multiple of this
_FLOAT = 4  # bytes
# Vectors as wide as the model that are held beside the widest step of a block.
_VECTORS = 5


def estimate(
    shape: ModelShape, settings: MemorySettings, gpus: Sequence[Place] = ()
) -> tuple[Needs, ...]:
    """Work out what a model needs in RAM and then on each GPU, by formula.

    Args:
        shape: The model.
        settings: With context and GPU layers settled, as `plan` returns them.
        gpus: Layers are shared out in proportion to their free memory.
    """
    homes = _homes(len(shape.layers), settings.gpu_layers or 0, [gpu.free for gpu in gpus])
    weights, cache = [0] * (1 + len(gpus)), [0] * (1 + len(gpus))
    cells, window_cells = _cells(shape, settings)
    bytes_k, per_k = CACHE_TYPES[settings.cache_type_k]
    bytes_v, per_v = CACHE_TYPES[settings.cache_type_v]
    # Without flash attention values are kept transposed, padded to the widest layer's.
    widest = 0 if settings.flash_attention else max(layer.values for layer in shape.layers)
    for layer, home in zip(shape.layers, homes, strict=False):
        values = max(layer.values, widest) if layer.values else 0
        row = layer.keys * bytes_k // per_k + values * bytes_v // per_v
        weights[home] += layer.weights
        kept = window_cells if layer.windowed else cells
        cache[home if settings.cache_on_gpu else 0] += row * kept * settings.caches
    weights[0] += shape.input_weights
    weights[homes[-1]] += shape.output_weights
    if shape.output_is_input and (homes[-1] or (shape.output_rearranged and not gpus)):
        weights[homes[-1]] += shape.input_weights
    weights[max(homes)] += settings.extra_weights
    busy = set(homes)
    compute, inputs = _compute(shape, settings)
    computes = [compute if home in busy else 0 for home in range(len(weights))]
    computes[0] = max(computes[0], inputs)
    if not shape.cache_known:
        return tuple(Needs(weight, None, None) for weight in weights)
    needs = tuple(map(Needs, weights, cache, computes))
    if draft := settings.draft:
        beside = replace(draft.settings, context=settings.context)
        return tuple(map(add, needs, estimate(draft.shape, beside, gpus)))
    return needs


def _homes(layers: int, offloaded: int, free: Sequence[int]) -> list[int]:
    """Where each layer and at last the output go: 0 is RAM, GPUs count from 1."""
    offloaded = min(offloaded, layers + 1) if sum(free) else 0
    ends = list(accumulate(free))
    on_gpus = [
        1 + min(bisect_right(ends, number * ends[-1] // offloaded), len(free) - 1)
        for number in range(offloaded)
    ]
    return [0] * (layers + 1 - offloaded) + on_gpus


def _cells(shape: ModelShape, settings: MemorySettings) -> tuple[int, int]:
    """The tokens that each cache keeps: in all, and within a window."""
    cells = _padded((settings.context or shape.trained_context) // settings.caches)
    sharing = settings.sequences if settings.unified else 1
    windowed = _padded(min(cells, shape.window * sharing + _micro_batch(settings)))
    return cells, cells if settings.full_window else windowed


def _compute(shape: ModelShape, settings: MemorySettings) -> tuple[int, int]:
    """Bytes for work in progress, and for the inputs alone, which are prepared in RAM."""
    cells, window_cells = _cells(shape, settings)
    sequences = settings.sequences
    tokens = -(-_micro_batch(settings) // sequences) * sequences
    mask_bytes = 2 if settings.flash_attention else _FLOAT
    masks = tokens * mask_bytes * (cells + (window_cells if shape.window else 0))
    keys = max((layer.keys + layer.values for layer in shape.layers), default=0)
    scores = 0 if settings.flash_attention else cells * shape.heads
    attention = 2 * shape.queries + keys + scores
    scored = sequences * (1 + settings.drafted)
    outputs = tokens if settings.scores_all else min(scored, tokens)
    widest = max(
        tokens * (_VECTORS * shape.width + max(shape.activations, attention)),
        outputs * shape.vocabulary + tokens * shape.width,
    )
    return masks + _FLOAT * widest, masks + _FLOAT * tokens * shape.width


def _micro_batch(settings: MemorySettings) -> int:
    return min(settings.context or settings.batch, settings.batch, settings.micro_batch)


def _padded(tokens: int) -> int:
    return max(-(-tokens // CONTEXT_STEP), 1) * CONTEXT_STEP
