"""The shape of a model: what memory depends on, read from its header."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kitty_nb.catalog.cache import FileSignature, signature_of
from kitty_nb.catalog.gguf import MOST_LAYERS, ArrayInfo, GgufLayout, read_layout
from kitty_nb.catalog.model import shard_paths
from kitty_nb.errors import ModelFileError

_LARGEST = 1 << 24  # far beyond the context, the width or the vocabulary of any model
# Models whose headers are remembered: with all their tensors, and as far as memory goes.
_LAYOUTS_KEPT, _SHAPES_KEPT = 16, 1024

# Architectures with sliding windows: every how many layers one looks at everything, and whether
# the first of them is such a one. Others say it layer by layer.
_WINDOW_PERIOD = {
    "afmoe": (4, False), "cohere2": (4, False), "cohere2moe": (4, True),
    "exaone-moe": (4, False), "gemma2": (2, False), "gemma3": (6, False), "gemma3n": (5, False),
    "gpt-oss": (2, False), "laguna": (4, True), "llama4": (4, False), "mellum": (4, False),
    "olmo2": (4, False), "plamo3": (8, False), "smallthinker": (4, True),
}  # fmt: skip
_DEFAULT_WINDOW = {"gemma2": 4096, "llama4": 8192}
# Keys of models that remember otherwise than by keys and values for each token: state-space,
# linear and indexed sparse attention, encoders with a decoder.
_OTHER_MEMORY = re.compile(
    r"\.(ssm|wkv|kda|shortconv|indexer|recurrent_layers|full_attention_interval|token_shift_count"
    r"|compress_ratios|decoder_block_count)\b"
)
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# Types that llama.cpp rearranges for the processor (`ggml/src/ggml-cpu/repack.cpp`, with AVX2 or
# ARM's dot product): Q4_0, Q4_K and IQ4_NL.
_REARRANGED = {2, 12, 20}
# Read by row rather than multiplied with, so llama.cpp keeps it in RAM.
_INPUTS = ("token_embd.", "per_layer_token_embd.", "position_embd.", "token_types.")


@dataclass(frozen=True, slots=True)
class Layer:
    """One block of a model.

    Attributes:
        weights: Bytes of its tensors.
        keys: Numbers that its key cache holds for each token.
        values: Numbers that its value cache holds for each token.
        windowed: Whether it looks back through a sliding window only.
    """

    weights: int
    keys: int
    values: int
    windowed: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model, as far as memory is concerned.

    Attributes:
        layers: Its blocks, first to last.
        input_weights: Bytes of what turns tokens into vectors.
        output_weights: Bytes of what comes after the last block.
        output_is_input: Whether the token embeddings serve as output matrix too.
        output_rearranged: Whether the processor would have a rearranged copy of them for that.
        trained_context: The longest context that it was trained for, in tokens.
        window: Tokens that a sliding window spans; 0 without one.
        width: Numbers in the vector of one token (`n_embd`).
        heads: Attention heads, of the layer with the most.
        queries: Numbers in a token's queries, of the layer with the most.
        activations: Numbers that the feed-forward part holds for a token at its widest.
        vocabulary: How many tokens it knows.
        cache_known: Whether it remembers by keys and values, so that the cache can be worked out.
    """

    layers: tuple[Layer, ...]
    input_weights: int
    output_weights: int
    output_is_input: bool
    output_rearranged: bool
    trained_context: int
    window: int
    width: int
    heads: int
    queries: int
    activations: int
    vocabulary: int
    cache_known: bool


def read_layouts(path: Path) -> tuple[GgufLayout, ...]:
    """Read the layouts of a model's files, first to last; of unchanged files only once.

    Raises:
        ModelFileError: A file is missing, or cannot be read.
    """
    return _layouts(_signatures(path))


def read_shape(path: Path) -> ModelShape:
    """Read what decides about the memory that a model needs, from the headers of all its files.

    Raises:
        ModelFileError: A file is missing or cannot be read, or a number is missing or absurd.
    """
    return _shape(_signatures(path))


_Signatures = tuple[tuple[Path, FileSignature | None], ...]


def _signatures(path: Path) -> _Signatures:
    return tuple((shard, signature_of(shard)) for shard in shard_paths(path))


@lru_cache(maxsize=_LAYOUTS_KEPT)
def _layouts(signatures: _Signatures) -> tuple[GgufLayout, ...]:
    return tuple(read_layout(path) for path, _ in signatures)


@lru_cache(maxsize=_SHAPES_KEPT)
def _shape(signatures: _Signatures) -> ModelShape:
    return _Header(_layouts(signatures)).shape()


class _Header:
    """Looks numbers up in the header of a model's first file."""

    def __init__(self, layouts: tuple[GgufLayout, ...]) -> None:
        self._path = layouts[0].path
        self._header = layouts[0].header
        self._architecture = self._header.architecture or ""
        self._tensors = [tensor for layout in layouts for tensor in layout.tensors]
        self._count = self._number("block_count", largest=MOST_LAYERS)

    def shape(self) -> ModelShape:
        outside = {t.name: t.size for t in self._tensors if not _BLOCK.match(t.name)}
        inputs = sum(size for name, size in outside.items() if name.startswith(_INPUTS))
        heads = self._each("attention.head_count")
        layers = self._layers(heads)
        window = self._number("attention.sliding_window", self._default_window)
        known = not any(map(_OTHER_MEMORY.search, self._header.metadata))
        vocabulary = self._header.metadata.get("tokenizer.ggml.tokens")
        return ModelShape(
            layers=layers,
            input_weights=inputs,
            output_weights=sum(outside.values()) - inputs,
            output_is_input="output.weight" not in outside,
            output_rearranged=any(
                t.name == "token_embd.weight" and t.type in _REARRANGED for t in self._tensors
            ),
            trained_context=self._number("context_length"),
            window=window if any(layer.windowed for layer in layers) else 0,
            width=self._number("embedding_length"),
            heads=max(heads),
            queries=max(heads) * self._head_length("key", windowed=False),
            activations=self._activations(),
            vocabulary=vocabulary.length if isinstance(vocabulary, ArrayInfo) else 0,
            cache_known=known,
        )

    def _layers(self, heads: list[int]) -> tuple[Layer, ...]:
        weights = dict.fromkeys(range(self._count), 0)
        for tensor in self._tensors:
            if block := _BLOCK.match(tensor.name):
                weights[int(block[1])] = weights.get(int(block[1]), 0) + tensor.size
        kv_heads = self._each("attention.head_count_kv", heads)
        windowed = self._windowed()
        compressed = f"{self._architecture}.attention.key_length_mla" in self._header.metadata
        # The blocks that predict tokens after the next are not loaded unless asked for.
        used = self._count - self._number("nextn_predict_layers", 0)
        return tuple(
            Layer(
                weights=weights[i] if i < used else 0,
                keys=kv * self._head_length("key", windowed=windowed[i]),
                values=0 if compressed else kv * self._head_length("value", windowed=windowed[i]),
                windowed=windowed[i],
            )
            for i, kv in enumerate(self._cached(kv_heads, used))
        )

    def _cached(self, kv_heads: list[int], used: int) -> list[int]:
        """The heads of each layer with a cache of its own; 0 for one that shares or has none."""
        if self._header.metadata.get(f"{self._architecture}.attention.causal") is False:
            used = 0
        elif self._architecture == "gemma3n":
            # As llama.cpp has it, whatever the header says: later layers look into those before.
            used = min(used, 20)
        else:
            used -= self._number("attention.shared_kv_layers", 0)
        return [kv if i < used else 0 for i, kv in enumerate(kv_heads)]

    def _windowed(self) -> list[bool]:
        key = "attention.sliding_window_pattern"
        default, full_first = _WINDOW_PERIOD.get(self._architecture, (1, False))
        if self._number("attention.sliding_window", self._default_window) == 0:
            return [False] * self._count
        if listed := self._header.per_layer.get(f"{self._architecture}.{key}"):
            return [*map(bool, listed), *[False] * self._count][: self._count]
        period = self._number(key, default) if self._architecture in _WINDOW_PERIOD else 1
        full = 0 if full_first else period - 1
        return [period == 0 or i % period != full for i in range(self._count)]

    @property
    def _default_window(self) -> int:
        return _DEFAULT_WINDOW.get(self._architecture, 0)

    def _head_length(self, kind: str, *, windowed: bool) -> int:
        heads = self._each("attention.head_count")[0]
        length = self._number(
            f"attention.{kind}_length", self._number("embedding_length") // max(heads, 1)
        )
        return self._number(f"attention.{kind}_length_swa", length) if windowed else length

    def _activations(self) -> int:
        """The numbers that a token has at the widest place of a feed-forward part.

        Measured on llama.cpp: gate, up and their product are held at once; the results of the
        experts go where gate and up were, if they fit.
        """
        blocks: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for tensor in self._tensors:
            if block := _BLOCK.match(tensor.name):
                blocks[block[1]][block[2]] = tensor.shape
        width = self._number("embedding_length")
        used = max(self._each("expert_used_count", [0] * self._count))
        widest = 0
        for shapes in blocks.values():
            for suffix, times in (("", 1), ("_shexp", 1), ("_exps", used)):
                down = shapes.get(f"ffn_down{suffix}.weight", (0,))[0] * times
                into = times * sum(
                    shapes.get(f"ffn_{kind}{suffix}.weight", (0, 0))[1]
                    for kind in ("up", "gate", "gate_up")
                )
                inner = into + (down if into == 2 * down else 0)
                results = width * times if suffix == "_exps" else 0
                if results > into:
                    inner = results if down <= width else inner + results
                widest = max(widest, inner)
        return widest

    def _each(self, key: str, default: list[int] | None = None) -> list[int]:
        """A number for each layer, whether the header has one for all or a list."""
        full_key = f"{self._architecture}.{key}"
        if listed := self._header.per_layer.get(full_key):
            numbers = [n for n in listed[: self._count] if 0 <= n <= _LARGEST]
            if len(numbers) < self._count:
                raise self._unusable(f"has a {full_key} that is too short or implausible")
            return list(map(int, numbers))
        if default is not None and full_key not in self._header.metadata:
            return default
        return [self._number(key, least=0)] * self._count

    def _number(
        self, key: str, default: int | None = None, *, least: int = 1, largest: int = _LARGEST
    ) -> int:
        full_key = f"{self._architecture}.{key}"
        value = self._header.metadata.get(full_key, default)
        if value is None:
            raise self._unusable(f"lacks {full_key}")
        least = least if default is None else 0
        if isinstance(value, ArrayInfo):
            raise self._unusable(f"has a list as {full_key}")
        if type(value) is not int or not least <= value <= largest:
            raise self._unusable(f"says that its {full_key} is {value}")
        return value

    def _unusable(self, what: str) -> ModelFileError:
        return ModelFileError(
            f"{self._path.name} {what}, so its memory use cannot be estimated. Download it again,"
            " or try another conversion of the model."
        )
