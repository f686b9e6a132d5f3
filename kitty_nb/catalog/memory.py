"""The memory that a model needs, by formula, and its distribution over devices."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate
from operator import add
from typing import TYPE_CHECKING

from kitty_nb.catalog.cache import FileSignature, signature_of
from kitty_nb.catalog.gguf import FORMATS, MOST_LAYERS, TENSOR_TYPES, ArrayInfo, read_header
from kitty_nb.catalog.model import shard_paths
from kitty_nb.errors import ModelFileCutShortError, ModelFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kitty_nb.catalog.gguf import GgufHeader, Tensor

# Far beyond the context, the width or the vocabulary of any model.
_NATURAL, _POSITIVE = range(1 << 24), range(1, 1 << 24)
_SHAPES_KEPT = 1024
_LONGEST = 200  # maximum characters from a header in a sentence
# Header keys of models whose memory is not just keys and values for each token: state-space,
# linear and indexed sparse attention, encoders with a decoder.
_OTHER_MEMORY = re.compile(
    r"\.(ssm|wkv|kda|shortconv|indexer|recurrent_layers|full_attention_interval|token_shift_count"
    r"|compress_ratios|decoder_block_count)\b"
)
_BLOCK = re.compile(r"blk\.(\d{1,9})\.(.+)", re.ASCII)
# Types that llama.cpp rearranges for the processor (`ggml/src/ggml-cpu/repack.cpp`, with AVX2 or
# ARM's dot product): Q4_0, Q4_K and IQ4_NL.
_REARRANGED = {2, 12, 20}
# Looked up by row rather than multiplied, so llama.cpp keeps them in RAM.
_INPUTS = ("token_embd.", "per_layer_token_embd.", "position_embd.", "token_types.")


@dataclass(frozen=True, slots=True)
class Layer:
    """One block of a model."""

    weights: int  # bytes of its tensors
    keys: int  # numbers per token in its key cache
    values: int  # numbers per token in its value cache
    windowed: bool  # whether it attends only to a sliding window


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The properties of a model that determine its memory use."""

    layers: tuple[Layer, ...]  # its blocks, first to last
    input_weights: int  # bytes of the tensors that turn tokens into vectors
    output_weights: int  # bytes of the tensors after the last block
    output_is_input: bool  # whether the token embeddings are the output matrix, too
    output_rearranged: bool  # whether the CPU would use a rearranged copy of them for that
    trained_context: int  # the longest context that it was trained for, in tokens
    window: int  # tokens that a sliding window spans; 0 without one
    width: int  # numbers in the vector of one token (`n_embd`)
    heads: int  # attention heads in the layer with the most
    queries: int  # numbers in a token's queries in the layer with the most
    activations: int  # numbers per token at the widest point of the feed-forward part
    vocabulary: int  # number of tokens it knows
    # Whether its memory is keys and values, so that the cache can be computed.
    cache_known: bool


def read_shape(path: Path) -> ModelShape:
    """Read what determines a model's memory use, from the headers of all its files.

    Files that have not changed since are not read again.

    Raises:
        ModelFileError: A file is missing or can't be read, or a number is missing or absurd.
    """
    return _shape(tuple((shard, signature_of(shard)) for shard in shard_paths(path)))


@lru_cache(maxsize=_SHAPES_KEPT)
def _shape(files: tuple[tuple[Path, FileSignature | None], ...]) -> ModelShape:
    headers = [read_header(path) for path, _ in files]
    for header in headers:
        if header.problem:
            raise ModelFileCutShortError(header.problem)
    return _ShapeReader(headers).shape()


class _ShapeReader:
    """A reader of numbers from the header of a model's first file."""

    def __init__(self, headers: list[GgufHeader]) -> None:
        self._header = headers[0]
        self._count = 1
        self._count = self._number("block_count", within=range(1, MOST_LAYERS + 1))
        self._width = self._number("embedding_length", within=_POSITIVE)
        self._heads = self._each("attention.head_count")
        self._periods = FORMATS["windows"].get(self._header.architecture or "", {})
        self._window = self._number("attention.sliding_window", self._periods.get("span", 0))
        self._outside: dict[str, Tensor] = {}
        self._blocks: defaultdict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for tensor in (tensor for header in headers for tensor in header.tensors):
            if block := _BLOCK.match(tensor.name):
                self._blocks[int(block[1])].append((block[2], tensor))
            else:
                self._outside[tensor.name] = tensor

    def shape(self) -> ModelShape:
        sizes = {name: tensor.size for name, tensor in self._outside.items()}
        inputs = sum(size for name, size in sizes.items() if name.startswith(_INPUTS))
        embeddings = self._outside.get("token_embd.weight")
        windowed = self._windowed()
        return ModelShape(
            layers=self._layers(windowed),
            input_weights=inputs,
            output_weights=sum(sizes.values()) - inputs,
            output_is_input="output.weight" not in sizes,
            output_rearranged=embeddings is not None and embeddings.type in _REARRANGED,
            trained_context=self._number("context_length", within=_POSITIVE),
            window=self._window if any(windowed) else 0,
            width=self._width,
            heads=max(self._heads),
            queries=max(self._heads) * self._head_length("key", windowed=False),
            activations=max(map(self._activations, self._blocks.values()), default=0),
            vocabulary=self._header.vocabulary or 0,
            cache_known=not any(map(_OTHER_MEMORY.search, self._header.metadata)),
        )

    def _layers(self, in_window: list[bool]) -> tuple[Layer, ...]:
        said = self._key("attention.head_count_kv") in self._header.metadata
        heads = self._each("attention.head_count_kv") if said else self._heads
        compressed = self._key("attention.key_length_mla") in self._header.metadata
        # The blocks for multi-token prediction are loaded only on request.
        loaded = self._count - self._number("nextn_predict_layers", 0)
        cached = max(self._cached(loaded), 0)
        heads = [*heads[:cached], *[0] * (self._count - cached)]
        layers = []
        for i, windowed in enumerate(in_window):
            weights = sum(tensor.size for _, tensor in self._blocks[i]) if i < loaded else 0
            keys = heads[i] * self._head_length("key", windowed=windowed)
            values = 0 if compressed else heads[i] * self._head_length("value", windowed=windowed)
            layers.append(Layer(weights, keys, values, windowed))
        return tuple(layers)

    def _cached(self, loaded: int) -> int:
        """Return the number of layers with their own cache; later ones share it or have none."""
        if self._header.metadata.get(self._key("attention.causal")) is False:
            return 0
        if self._header.architecture == "gemma3n":
            # As in llama.cpp, whatever the header says: later layers use earlier ones' caches.
            return min(loaded, 20)
        return loaded - self._number("attention.shared_kv_layers", 0)

    def _windowed(self) -> list[bool]:
        if self._window == 0:
            return [False] * self._count
        key = "attention.sliding_window_pattern"
        pattern = self._header.metadata.get(self._key(key))
        if isinstance(pattern, ArrayInfo):
            return [*map(bool, pattern.numbers), *[False] * self._count][: self._count]
        period = self._number(key, self._periods["period"]) if self._periods else 1
        full = 0 if self._periods.get("first") else period - 1
        return [period == 0 or i % period != full for i in range(self._count)]

    def _head_length(self, kind: str, *, windowed: bool) -> int:
        key = f"attention.{kind}_length"
        length = self._number(key, self._width // max(self._heads[0], 1))
        return self._number(f"{key}_swa", length) if windowed else length

    def _activations(self, block: list[tuple[str, Tensor]]) -> int:
        """Return the numbers per token at the widest point of a feed-forward part.

        Measured on llama.cpp: gate, up and their product are held at once; the results of the
        experts reuse the space of gate and up, if they fit.
        """
        shapes = {name: tensor.shape for name, tensor in block}

        def side(name: str, number: int) -> int:
            return next(iter(shapes.get(f"{name}.weight", ())[number:]), 0)

        used = self._number("expert_used_count", 0)
        widest = 0
        for suffix, times in (("", 1), ("_shexp", 1), ("_exps", used)):
            down = side(f"ffn_down{suffix}", 0) * times
            into = times * sum(side(f"ffn_{kind}{suffix}", 1) for kind in ("up", "gate", "gate_up"))
            inner = into + (down if into == 2 * down else 0)
            results = self._width * times if suffix == "_exps" else 0
            if results > into:
                inner = results if down <= self._width else inner + results
            widest = max(widest, inner)
        return widest

    def _number(self, key: str, default: int | None = None, within: range = _NATURAL) -> int:
        """Return a number; the largest if each layer has its own."""
        return max(self._each(key, default, within))

    def _each(self, key: str, default: int | None = None, within: range = _NATURAL) -> list[int]:
        """Return a number for each layer, whether the header has one for all or a list."""
        said = self._header.metadata.get(self._key(key), default)
        if said is None:
            raise self._unusable(f"lacks {self._key(key)}")
        listed = said.numbers if isinstance(said, ArrayInfo) else (said,) * self._count
        sound = [n for n in listed[: self._count] if type(n) is int and n in within]
        if len(sound) < self._count:
            shown = "a list that does not fit" if isinstance(said, ArrayInfo) else said
            raise self._unusable(f"says that its {self._key(key)} is {shown}")
        return sound

    def _key(self, key: str) -> str:
        return f"{self._header.architecture}.{key}"

    def _unusable(self, what: str) -> ModelFileError:
        return ModelFileError(
            f"{self._header.path.name} {what:.{_LONGEST}}, so its memory use can't be estimated."
            " Download it again, or try another conversion of the model."
        )


# The types that --cache-type-k accepts, by its names for them.
_CACHE_TYPES = {"F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL"}
CACHE_TYPES = {
    kind.name.lower(): kind for kind in TENSOR_TYPES.values() if kind.name in _CACHE_TYPES
}
_GB = 1_000_000_000
MARGIN = 1 << 30  # llama.cpp's --fit-target: bytes that --fit leaves free on each device
_MARGIN_SHARE = 10  # of a small memory, a tenth is enough margin
CONTEXT_STEP = 256  # llama.cpp rounds contexts up to a multiple of this
_LEAST_CONTEXT = 4096  # llama.cpp's --fit-ctx: --fit shrinks no further
_FLOAT = 4  # bytes
_VECTORS = 5  # as wide as the model, held during the widest step of a block


class Verdict(StrEnum):
    """The verdict on whether a model fits into free memory."""

    FITS = "fits"
    TIGHT = "tight"
    WILL_NOT_FIT = "will not fit"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """The settings of llama-server that determine memory use, with its defaults."""

    # Tokens of context; None leaves it to the engine, 0 is the trained context.
    context: int | None = None
    sequences: int = 4  # requests served at once
    unified: bool = True  # whether they share one cache, rather than each having a part of it
    batch: int = 2048  # tokens of a prompt submitted at once
    micro_batch: int = 512  # tokens of a prompt computed at once
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attention: bool = True  # whether attention is computed without a matrix of all scores
    full_window: bool = False  # whether layers with a sliding window keep all tokens anyway
    # Layers to put on GPUs, where the output counts as one; None for as many as fit.
    gpu_layers: int | None = None
    cache_on_gpu: bool = True  # whether the cache of those layers goes there too
    fits: bool = True  # whether the engine shrinks the settings left to it until they fit (`--fit`)
    # Whether the engine allocates memory for the scores of all tokens of a batch, as it does for
    # embeddings, and did for everything before it had `--fit`.
    scores_all: bool = False
    drafted: int = 0  # tokens that speculation proposes at once, which need scores too
    extra_weights: int = 0  # bytes of files loaded with the model, such as a projector
    # The smaller model that proposes tokens, with its own settings except this context.
    draft: tuple[ModelShape, MemorySettings] | None = None

    @property
    def caches(self) -> int:
        """The number of caches that share the context."""
        return 1 if self.unified else self.sequences


@dataclass(frozen=True, slots=True)
class MemoryPool:
    """RAM, or the memory of one GPU, in bytes."""

    name: str  # `RAM`, or the GPU's
    free: int  # what is free once the running server has exited
    total: int  # its size
    returned: int = 0  # the part of `free` that the running server still holds


@dataclass(frozen=True, slots=True)
class Memory:
    """A machine's memory; a GPU that shares the RAM is not listed as a GPU."""

    ram: MemoryPool
    gpus: tuple[MemoryPool, ...] = ()

    @property
    def pools(self) -> tuple[MemoryPool, ...]:
        """The RAM, then the GPUs."""
        return (self.ram, *self.gpus)


@dataclass(frozen=True, slots=True)
class Requirement:
    """Bytes that a model needs; None for a part that the formula can't compute."""

    weights: int
    cache: int | None
    compute: int | None

    @property
    def total(self) -> int | None:
        """All parts together; None if one is unknown."""
        return None if self.cache is None or self.compute is None else self.known

    @property
    def known(self) -> int:
        """The sum of the known parts, a lower bound."""
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
        """The verdict on this pool: `tight` if less than the margin is left."""
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
        allocations: By pool, for those that the model uses; empty if nothing is known.
        context: The context that the preview is for, in tokens.
        largest_context: The longest one that fits, with a margin; 0 if none does, None if unknown.
        whole_context: Whether that is the full context that the model was trained for.
        problem: Why nothing is known, in a sentence.
    """

    allocations: tuple[Allocation, ...] = ()
    context: int | None = None
    largest_context: int | None = None
    whole_context: bool = False
    problem: str | None = None

    @property
    def requirement(self) -> Requirement:
        """The requirement in all pools together."""
        return sum((one.requirement for one in self.allocations), Requirement(0, 0, 0))

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of any pool."""
        worst_first = (Verdict.WILL_NOT_FIT, Verdict.UNKNOWN, Verdict.TIGHT, Verdict.FITS)
        found = (one.verdict for one in self.allocations)
        return min(found, key=worst_first.index, default=Verdict.UNKNOWN)

    def why_not(self) -> str:
        """Return why the model will not fit, and the remedy; empty if it may fit."""
        short = {
            one.pool.name: f"needs {one.requirement.known / _GB:.1f} GB of {one.pool.name},"
            f" {one.pool.free / _GB:.1f} GB free"
            for one in self.allocations
            if one.verdict is Verdict.WILL_NOT_FIT
        }
        on_gpus = not any(name.startswith("RAM") for name in short)
        lower = "Lower the context or the GPU layers" if on_gpus else "Lower the context"
        advice = f"{lower}, or pick a smaller model."
        return f"Not enough memory: {', '.join(short.values())}. {advice}" if short else ""


def estimate(
    shape: ModelShape, settings: MemorySettings, gpus: Sequence[MemoryPool] = ()
) -> tuple[Requirement, ...]:
    """Compute what a model needs in RAM and then on each GPU.

    Context and GPU layers must be settled, as by `plan`. Layers are split among the GPUs in
    proportion to their free memory.
    """
    homes = _homes(len(shape.layers), settings.gpu_layers or 0, [gpu.free for gpu in gpus])
    weights, cache = [0] * (1 + len(gpus)), [0] * (1 + len(gpus))
    cells, window_cells = _cells(shape, settings)
    _, per_k, bytes_k = CACHE_TYPES[settings.cache_type_k]
    _, per_v, bytes_v = CACHE_TYPES[settings.cache_type_v]
    # Without flash attention, values are stored transposed, padded to the widest layer's.
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
    """Return the pool of each layer, then of the output: 0 is RAM, GPUs count from 1."""
    offloaded = min(offloaded, layers + 1) if sum(free) else 0
    ends = list(accumulate(free))
    on_gpus = [
        1 + min(bisect_right(ends, number * ends[-1] // offloaded), len(free) - 1)
        for number in range(offloaded)
    ]
    return [0] * (layers + 1 - offloaded) + on_gpus


def _cells(shape: ModelShape, settings: MemorySettings) -> tuple[int, int]:
    """Return the number of tokens that each cache keeps: without a window, and with one."""
    cells = _padded((settings.context or shape.trained_context) // settings.caches)
    sharing = settings.sequences if settings.unified else 1
    windowed = _padded(min(cells, shape.window * sharing + _micro_batch(settings)))
    return cells, cells if settings.full_window else windowed


def _compute(shape: ModelShape, settings: MemorySettings) -> tuple[int, int]:
    """Return the bytes of compute buffers, and of inputs alone, which are prepared in RAM."""
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

    It shortens a context that was not requested, then takes layers off the GPUs, until its margin
    is left free on each of them; without a GPU, it goes by all of the RAM.
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
    """Spread a model over the pools, with settings from `plan`; unused pools are left out."""
    needs = estimate(shape, settings, memory.gpus)
    pairs = zip(memory.pools, needs, strict=True)
    return tuple(Allocation(pool, need) for pool, need in pairs if need.total != 0)


def preview(shape: ModelShape, settings: MemorySettings, memory: Memory) -> MemoryPreview:
    """Compare a model's requirement with the memory, and find the longest context that fits."""
    settled = plan(shape, settings, memory)

    def fits(context: int) -> bool:
        trial = replace(settled, context=context)
        return MemoryPreview(allocate(shape, trial, memory)).verdict is Verdict.FITS

    upmost, step = shape.trained_context * settled.caches, CONTEXT_STEP * settled.caches
    largest = _most(fits, upmost, step) if shape.cache_known else None
    return MemoryPreview(
        allocations=allocate(shape, settled, memory),
        context=settled.context,
        largest_context=largest,
        whole_context=largest == upmost,
    )


def _most(fits: Callable[[int], bool], upmost: int, step: int) -> int:
    """Return `upmost` if it fits, else the largest multiple of `step` that does; 0 if none does."""
    if fits(upmost):
        return upmost
    steps = range(step, upmost, step)
    return step * bisect_left(steps, x=True, key=lambda size: not fits(size))
