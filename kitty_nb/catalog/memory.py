"""The memory that a server needs, by formula, and how it is spread over devices."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate
from operator import add
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kitty_nb.catalog.model_shape import ModelShape

# Bytes of a block and numbers in it, by the names that --cache-type-k takes.
CACHE_TYPES = {
    "f32": (4, 1), "f16": (2, 1), "bf16": (2, 1), "q8_0": (34, 32), "q5_1": (24, 32),
    "q5_0": (22, 32), "q4_1": (20, 32), "q4_0": (18, 32), "iq4_nl": (18, 32),
}  # fmt: skip
_GB = 1_000_000_000
MARGIN = 1 << 30  # llama.cpp's --fit-target: bytes that --fit leaves free on each device
_MARGIN_SHARE = 10  # of a small memory, a tenth is margin enough
CONTEXT_STEP = 256  # llama.cpp rounds contexts up to a multiple of this
_LEAST_CONTEXT = 4096  # llama.cpp's --fit-ctx: --fit shrinks no further
_FLOAT = 4  # bytes
_VECTORS = 5  # as wide as the model, held beside the widest step of a block


class Verdict(StrEnum):
    """The verdict on whether a model fits into free memory."""

    FITS = "fits"
    TIGHT = "tight"
    WILL_NOT_FIT = "will not fit"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """The settings of llama-server that decide about memory, with its defaults.

    Attributes:
        context: Tokens of context; None leaves it to the engine, 0 is all that was trained for.
        sequences: Requests served at once.
        unified: Whether they share one cache, rather than a part of it each.
        batch: Tokens of a prompt handed over at once.
        micro_batch: Tokens of a prompt worked on at once.
        flash_attention: Whether attention is worked out without a matrix of all scores.
        full_window: Whether layers with a sliding window keep all tokens nevertheless.
        gpu_layers: Layers to put on GPUs, the output being one more; None is what fits.
        cache_on_gpu: Whether the cache of those layers goes there too.
        fits: Whether the engine shrinks what is left to it until it fits (`--fit`).
        scores_all: Whether the engine makes room for the scores of all tokens of a batch, as it
            does for embeddings, and did for everything before it had `--fit`.
        drafted: Tokens that speculation proposes at once, which need scores too.
        extra_weights: Bytes of files that are loaded beside the model, such as a projector.
        draft: The smaller model that proposes tokens, with settings of its own but this context.
    """

    context: int | None = None
    sequences: int = 4
    unified: bool = True
    batch: int = 2048
    micro_batch: int = 512
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attention: bool = True
    full_window: bool = False
    gpu_layers: int | None = None
    cache_on_gpu: bool = True
    fits: bool = True
    scores_all: bool = False
    drafted: int = 0
    extra_weights: int = 0
    draft: tuple[ModelShape, MemorySettings] | None = None

    @property
    def caches(self) -> int:
        """The caches that share the context between them."""
        return 1 if self.unified else self.sequences


@dataclass(frozen=True, slots=True)
class MemoryPool:
    """RAM, or the memory of one GPU, in bytes.

    Attributes:
        name: `RAM`, or the GPU's.
        free: What is free once the server that runs now has exited.
        total: Its size.
        returned: The part of `free` that the running server still holds.
    """

    name: str
    free: int
    total: int
    returned: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """All memory of a machine; a GPU that shares the RAM is not among the GPUs."""

    ram: MemoryPool
    gpus: tuple[MemoryPool, ...] = ()

    @property
    def pools(self) -> tuple[MemoryPool, ...]:
        """RAM and then the GPUs."""
        return (self.ram, *self.gpus)


@dataclass(frozen=True, slots=True)
class Requirement:
    """Bytes that a model needs; None for a part that the formula does not know."""

    weights: int
    cache: int | None
    compute: int | None

    @property
    def total(self) -> int | None:
        """All parts together; None when one is unknown."""
        return None if self.cache is None or self.compute is None else self.known

    @property
    def known(self) -> int:
        """The parts that the formula knows: at least so much."""
        return self.weights + (self.cache or 0) + (self.compute or 0)

    def __add__(self, other: Requirement) -> Requirement:
        if self.total is None or other.total is None:
            return Requirement(self.weights + other.weights, None, None)
        cache = (self.cache or 0) + (other.cache or 0)
        compute = (self.compute or 0) + (other.compute or 0)
        return Requirement(self.weights + other.weights, cache, compute)


@dataclass(frozen=True, slots=True)
class Allocation:
    """The memory that a model would take from one pool."""

    pool: MemoryPool
    requirement: Requirement

    @property
    def verdict(self) -> Verdict:
        """Whether the pool has room, `tight` where less than the margin is left."""
        left = self.pool.free - self.requirement.known
        if left < 0:
            return Verdict.WILL_NOT_FIT
        if self.requirement.total is None:
            return Verdict.UNKNOWN
        margin = min(MARGIN, self.pool.free // _MARGIN_SHARE)
        return Verdict.TIGHT if left < margin else Verdict.FITS


@dataclass(frozen=True, slots=True)
class MemoryPreview:
    """The memory that a model would take with some settings.

    Attributes:
        allocations: By pool, of those that the model uses. Empty when nothing is known.
        context: The context that this is for, in tokens.
        largest_context: The longest one that fits, with a margin; 0 when none does, None when that
            is unknown.
        problem: Why nothing is known, in a sentence.
    """

    allocations: tuple[Allocation, ...] = ()
    context: int | None = None
    largest_context: int | None = None
    problem: str | None = None

    @property
    def requirement(self) -> Requirement:
        """The need in all pools together."""
        return sum((one.requirement for one in self.allocations), Requirement(0, 0, 0))

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of any pool."""
        found = {one.verdict for one in self.allocations} or {Verdict.UNKNOWN}
        worst_first = (Verdict.WILL_NOT_FIT, Verdict.UNKNOWN, Verdict.TIGHT, Verdict.FITS)
        return next(verdict for verdict in worst_first if verdict in found)

    def why_not(self) -> str:
        """Say why the model will not fit, and the remedy; empty where it may fit."""
        short = ", ".join(
            f"needs {one.requirement.known / _GB:.1f} GB of {one.pool.name},"
            f" {one.pool.free / _GB:.1f} GB free"
            for one in self.allocations
            if one.verdict is Verdict.WILL_NOT_FIT
        )
        advice = "Lower the context or the GPU layers, or pick a smaller model."
        return f"Not enough memory: {short}. {advice}" if short else ""


def estimate(
    shape: ModelShape, settings: MemorySettings, gpus: Sequence[MemoryPool] = ()
) -> tuple[Requirement, ...]:
    """Work out what a model needs in RAM and then on each GPU.

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
    if not shape.cache_known:
        return tuple(Requirement(weight, None, None) for weight in weights)
    compute, inputs = _compute(shape, settings)
    computes = [compute if home in homes else 0 for home in range(len(weights))]
    computes[0] = max(computes[0], inputs)
    needs = tuple(map(Requirement, weights, cache, computes))
    if settings.draft is None:
        return needs
    smaller, own = settings.draft
    beside = estimate(smaller, replace(own, context=settings.context), gpus)
    return tuple(map(add, needs, beside))


def _homes(layers: int, offloaded: int, free: Sequence[int]) -> list[int]:
    """The pool of each layer, then of the output: 0 is RAM, GPUs count from 1."""
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
            return (needs[0].total or 0) <= memory.ram.total - MARGIN
        on_gpus = zip(needs[1:], memory.gpus, strict=True)
        return all((need.total or 0) <= gpu.free - MARGIN for need, gpu in on_gpus)

    if settings.context is None and not agrees(settled) and trained > least:
        step = CONTEXT_STEP * settings.caches
        longest = _most(lambda n: agrees(replace(settled, context=n)), trained, step)
        settled = replace(settled, context=max(longest, least))
    if layers is None and memory.gpus and not agrees(settled):
        count = _most(lambda n: agrees(replace(settled, gpu_layers=n)), most, 1)
        settled = replace(settled, gpu_layers=count)
    return settled


def allocate(shape: ModelShape, settings: MemorySettings, memory: Memory) -> tuple[Allocation, ...]:
    """Spread a model over the pools, with settings as `plan` returns them; unused ones left out."""
    needs = estimate(shape, settings, memory.gpus)
    pairs = zip(memory.pools, needs, strict=True)
    return tuple(Allocation(pool, need) for pool, need in pairs if need.total != 0)


def preview(shape: ModelShape, settings: MemorySettings, memory: Memory) -> MemoryPreview:
    """Compare a model's need with the memory there is, and find the longest context that fits."""
    settled = plan(shape, settings, memory)

    def fits(context: int) -> bool:
        trial = replace(settled, context=context)
        return MemoryPreview(allocate(shape, trial, memory)).verdict is Verdict.FITS

    caches = settled.caches
    upmost, step = shape.trained_context * caches, CONTEXT_STEP * caches
    return MemoryPreview(
        allocations=allocate(shape, settled, memory),
        context=settled.context,
        largest_context=_most(fits, upmost, step) if shape.cache_known else None,
    )


def _most(fits: Callable[[int], bool], upmost: int, step: int) -> int:
    """The largest number up to `upmost` that fits, else in whole steps; 0 when none does."""
    if fits(upmost):
        return upmost
    low, high = 0, -(-upmost // step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step
