from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from model_files import write_header, write_model

from kitty_nb.catalog.gguf import read_header
from kitty_nb.catalog.memory import (
    CACHE_TYPES,
    Allocation,
    Memory,
    MemoryPool,
    MemoryPreview,
    MemorySettings,
    ModelShape,
    Requirement,
    Verdict,
    estimate,
    plan,
    preview,
    read_shape,
)
from kitty_nb.errors import ModelFileError

GIB = 1 << 30
ROOM = MemoryPool("RAM", 1 << 60, 1 << 60)
ONE = MemorySettings(context=4096, sequences=1)


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    def make(architecture: str = "llama", **details: object) -> Path:
        return write_model(tmp_path / "model.gguf", architecture, **details)

    return make


@pytest.fixture
def shape(model: Callable[..., Path]) -> Callable[..., ModelShape]:
    return lambda *args, **details: read_shape(model(*args, **details))


def cache(shape: ModelShape, settings: MemorySettings = ONE) -> int:
    (needs,) = estimate(shape, settings)
    assert needs.cache is not None
    return needs.cache


@pytest.mark.parametrize("endian", gguf.GGUFEndian)
def test_a_header_says_where_everything_lies(tmp_path: Path, endian: gguf.GGUFEndian) -> None:
    path = write_model(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType.Q4_K, endian=endian)
    header = read_header(path)
    truth = gguf.GGUFReader(path)
    assert header.data_at == truth.data_offset
    assert len(header.tensors) == len(truth.tensors)
    for mine, theirs in zip(header.tensors, truth.tensors, strict=True):
        assert (mine.name, mine.shape) == (theirs.name, tuple(map(int, theirs.shape)))
        assert mine.type == theirs.tensor_type
        assert 0 <= mine.size - theirs.n_bytes < 32


def test_the_cache_types_are_those_of_llama_cpp() -> None:
    for name, (_, count, size) in CACHE_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == (count, size)


def split(path: Path, folder: Path) -> Path:
    """Give a model a second file that holds the tensors of another one of its kind."""
    for number in (1, 2):
        shutil.copy(path, folder / f"m-{number:05d}-of-00002.gguf")
    return folder / "m-00001-of-00002.gguf"


def test_all_shards_count(tmp_path: Path, model: Callable[..., Path]) -> None:
    whole = model()
    first = split(whole, tmp_path)
    (once,), (twice,) = (estimate(read_shape(path), ONE) for path in (whole, first))
    blocks = sum(layer.weights for layer in read_shape(whole).layers)
    assert twice.weights == once.weights + blocks
    assert twice.cache == once.cache
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf does not exist"):
        read_shape(first)


def test_a_file_is_read_again_only_when_it_has_changed(model: Callable[..., Path]) -> None:
    path = model()
    first = read_shape(path)
    assert read_shape(path) is first
    os.utime(path, ns=(1, 1))
    assert read_shape(path) is not first


def test_the_cache_grows_with_context_layers_heads_and_type(
    shape: Callable[..., ModelShape],
) -> None:
    small = shape(layers=4, kv_heads=2, head=64)
    assert cache(small) == 4 * 2 * 64 * (2 + 2) * 4096
    assert cache(small, replace(ONE, context=4097)) == 4 * 2 * 64 * (2 + 2) * (4096 + 256)
    mixed = replace(ONE, cache_type_k="q8_0", cache_type_v="q4_0")
    assert cache(small, mixed) == 4 * 2 * 64 * (34 + 18) // 32 * 4096
    assert cache(shape(layers=8, kv_heads=2, head=64)) == 2 * cache(small)


def test_requests_share_a_cache_or_have_one_each(shape: Callable[..., ModelShape]) -> None:
    model = shape()
    three = replace(ONE, sequences=3)
    assert cache(model, three) == cache(model)
    # A third of 4096 is 1366 tokens, padded to 1536 for each.
    assert cache(model, replace(three, unified=False)) == cache(model, replace(ONE, context=4608))


@pytest.mark.parametrize(
    ("architecture", "details", "windowed"),
    [
        ("gemma2", {}, 6),
        ("gemma3", {}, 10),
        ("gemma3", {"attention__sliding_window_pattern": 3}, 8),
        ("gpt-oss", {}, 6),
        ("mimo2", {"attention__sliding_window_pattern": [True] * 5 + [False] * 7}, 5),
        ("llama", {}, 0),  # as Mistral's: llama.cpp does not look at its window
        ("cohere2moe", {}, 9),
    ],
)
def test_layers_with_a_window_keep_only_that(
    shape: Callable[..., ModelShape], architecture: str, details: dict[str, object], windowed: int
) -> None:
    model = shape(architecture, layers=12, window=512, **details)
    assert sum(layer.windowed for layer in model.layers) == windowed
    settings = replace(ONE, context=16384)
    row = 2 * 64 * (2 + 2)
    kept = {True: 512 + 512, False: 16384}
    expected = sum(row * kept[layer.windowed] for layer in model.layers)
    assert cache(model, settings) == expected
    assert cache(model, replace(settings, full_window=True)) == row * 16384 * 12
    assert cache(model, replace(settings, context=512)) == row * 512 * 12


def test_heads_may_differ_by_layer(model: Callable[..., Path]) -> None:
    path = model(layers=3, head=64, kv_heads=2)
    before = cache(read_shape(path))
    write_model(path, layers=3, head=64, attention__head_count_kv=[4, 0, 2])
    assert read_shape(path).layers[1].keys == 0
    assert cache(read_shape(path)) == before


def test_some_layers_or_models_keep_less(shape: Callable[..., ModelShape]) -> None:
    usual = cache(shape(layers=8))
    assert cache(shape(layers=8, attention__causal=False)) == 0
    assert cache(shape("gemma4", layers=8, attention__shared_kv_layers=4)) == usual // 2
    gemma3n = {"layers": 24, "attention__shared_kv_layers": 8}  # llama.cpp does not look at it
    assert cache(shape("gemma3n", **gemma3n)) == usual // 8 * 20
    compressed = shape(
        "deepseek2", layers=8, attention__key_length_mla=192, attention__value_length_mla=128
    )
    assert cache(compressed) == usual // 2


def test_blocks_for_later_tokens_are_not_loaded(shape: Callable[..., ModelShape]) -> None:
    all_blocks, fewer = (
        shape("glm4moe", layers=8),
        shape("glm4moe", layers=8, nextn_predict_layers=2),
    )
    assert cache(fewer) == cache(all_blocks) * 6 // 8
    (needs,), (less) = estimate(all_blocks, ONE), estimate(fewer, ONE)[0]
    assert needs.weights - less.weights == 2 * all_blocks.layers[0].weights
    assert cache(shape("glm4moe", layers=8, nextn_predict_layers=99)) == 0


def test_a_model_without_attention_has_a_shape(shape: Callable[..., ModelShape]) -> None:
    """llama.cpp's converters write no head for Mamba and RWKV."""
    mamba = shape("mamba", attention__head_count=0, ssm__conv_kernel=4)
    assert sum(layer.weights for layer in mamba.layers) > 0


@pytest.mark.parametrize(
    "key", ["ssm__conv_kernel", "wkv__head_size", "shortconv__l_cache", "full_attention_interval"]
)
def test_what_a_model_remembers_otherwise_is_not_guessed(
    shape: Callable[..., ModelShape], key: str
) -> None:
    model = shape("whatever", **{key: 4})
    shown = preview(model, MemorySettings(), Memory(ROOM))
    assert shown.verdict is Verdict.UNKNOWN
    assert (shown.requirement.cache, shown.requirement.compute, shown.requirement.total) == (
        None,
        None,
        None,
    )
    assert shown.requirement.weights > 0
    assert shown.largest_context is None
    weights = shown.requirement.weights
    little = Memory(MemoryPool("RAM (limit of this job)", weights - 1, weights))
    shown = preview(model, MemorySettings(), little)
    assert shown.verdict is Verdict.WILL_NOT_FIT
    assert shown.why_not().endswith("Lower the context, or pick a smaller model.")


def test_old_builds_make_room_for_the_scores_of_all_tokens(
    shape: Callable[..., ModelShape],
) -> None:
    model = shape(vocabulary=100_000)
    (now,), (then,) = estimate(model, ONE), estimate(model, replace(ONE, scores_all=True))
    assert now.compute
    assert then.compute
    assert then.compute > 512 * 100_000 * 4 > 10 * now.compute


GPUS = (MemoryPool("one", 3 * GIB, 4 * GIB), MemoryPool("two", GIB, 2 * GIB))


def test_layers_go_to_the_gpus_by_their_free_memory(shape: Callable[..., ModelShape]) -> None:
    model = shape(layers=15)
    (alone,) = estimate(model, ONE)
    ram, one, two = estimate(model, replace(ONE, gpu_layers=16), GPUS)
    layer = model.layers[0].weights
    assert ram.weights == model.input_weights
    assert one.weights == 12 * layer
    assert two.weights == 3 * layer + model.output_weights
    assert ram.weights + one.weights + two.weights == alone.weights
    assert (ram.cache, one.cache, two.cache) == (0, cache(model) * 12 // 15, cache(model) * 3 // 15)
    assert two.compute == one.compute == alone.compute
    assert ram.compute
    assert one.compute
    assert 0 < ram.compute < one.compute


def test_fewer_layers_on_a_gpu_leave_the_first_in_ram(shape: Callable[..., ModelShape]) -> None:
    model = shape(layers=15)
    ram, gpu = estimate(model, replace(ONE, gpu_layers=6), GPUS[:1])
    assert gpu.weights == 5 * model.layers[0].weights + model.output_weights
    assert ram.weights == 10 * model.layers[0].weights + model.input_weights
    kept = estimate(model, replace(ONE, gpu_layers=6, cache_on_gpu=False), GPUS[:1])
    assert (kept[0].cache, kept[1].cache) == (cache(model), 0)


def test_embeddings_that_are_the_output_too_are_needed_twice(
    shape: Callable[..., ModelShape],
) -> None:
    model = shape(tied=True)
    (alone,) = estimate(model, ONE)
    ram, gpu = estimate(model, replace(ONE, gpu_layers=99), GPUS[:1])
    assert ram.weights + gpu.weights == alone.weights + model.input_weights


def part(needed: int, free: int) -> Verdict:
    return Allocation(MemoryPool("RAM", free, free), Requirement(needed, 0, 0)).verdict


def test_the_verdict_leaves_a_margin() -> None:
    assert part(22 * GIB, 24 * GIB) is Verdict.FITS
    assert part(23 * GIB + 1, 24 * GIB) is Verdict.TIGHT
    assert part(24 * GIB, 24 * GIB) is Verdict.TIGHT
    assert part(24 * GIB + 1, 24 * GIB) is Verdict.WILL_NOT_FIT
    assert part(GIB // 2, GIB) is Verdict.FITS  # of little memory a tenth is enough


def test_the_worst_place_decides() -> None:
    fits, tight, bad = (
        Allocation(MemoryPool("RAM", free, free), Requirement(100, 0, 0))
        for free in (1000, 101, 99)
    )
    assert MemoryPreview((fits, tight)).verdict is Verdict.TIGHT
    assert MemoryPreview((fits, bad, tight)).verdict is Verdict.WILL_NOT_FIT
    assert MemoryPreview().verdict is Verdict.UNKNOWN


@pytest.mark.parametrize("settings", [ONE, replace(ONE, sequences=4, unified=False)])
def test_the_largest_context_is_the_largest(
    shape: Callable[..., ModelShape], settings: MemorySettings
) -> None:
    model = shape(context=1 << 20)
    memory = Memory(MemoryPool("RAM", GIB, GIB))
    shown = preview(model, settings, memory)
    largest = shown.largest_context
    assert largest
    assert largest % 256 == 0
    longer = largest + 256 * settings.caches
    for context, verdict in [(largest, Verdict.FITS), (longer, Verdict.TIGHT)]:
        assert preview(model, replace(settings, context=context), memory).verdict is verdict
    assert preview(model, settings, Memory(MemoryPool("RAM", 1000, 1000))).largest_context == 0
    assert not shown.whole_context
    roomy = preview(model, settings, Memory(ROOM))
    assert roomy.largest_context == (1 << 20) * settings.caches
    assert roomy.whole_context


def test_what_is_left_to_the_engine_is_settled_as_it_would(
    shape: Callable[..., ModelShape],
) -> None:
    model = shape(context=1 << 20, layers=16)
    free = MemorySettings(sequences=1)
    assert plan(model, free, Memory(ROOM)).context == 1 << 20
    # Without a GPU, llama.cpp goes by all RAM that there is, not by what is free.
    two = Memory(MemoryPool("RAM", 0, 2 * GIB))
    settled = plan(model, free, two)
    assert settled.context
    assert settled.context % 256 == 0
    (needs,) = estimate(model, settled)
    assert needs.total
    assert 0.99 * GIB < needs.total <= GIB
    assert plan(model, replace(free, context=0), two).context == 1 << 20
    assert plan(model, replace(free, fits=False), two).context == 1 << 20
    assert plan(model, free, Memory(MemoryPool("RAM", 0, 0))).context == 4096
    # With a GPU: first the context, down to 4096, then layers.
    gpu = Memory(ROOM, (MemoryPool("GPU", 2 * GIB, 2 * GIB),))
    settled = plan(model, free, gpu)
    assert settled.gpu_layers == 17
    assert 4096 < (settled.context or 0) < 1 << 20
    scarce = Memory(ROOM, (MemoryPool("GPU", GIB + 60_000_000, 2 * GIB),))
    settled = plan(model, free, scarce)
    assert settled.context == 4096
    assert 0 < (settled.gpu_layers or 0) < 17
    assert plan(model, replace(free, gpu_layers=17), scarce).gpu_layers == 17


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"block_count": None}, "lacks llama.block_count"),
        ({"block_count": 100_000}, "block_count is 100000"),
        ({"context_length": None}, "lacks llama.context_length"),
        ({"context_length": 4_000_000_000}, "context_length is 4000000000"),
        ({"embedding_length": None}, "lacks llama.embedding_length"),
        ({"embedding_length": 0}, "embedding_length is 0"),
        ({"attention__head_count": 1 << 30}, f"head_count is {1 << 30}"),
        ({"attention__head_count": True}, "head_count is True"),
        ({"attention__head_count": "four"}, "head_count is four"),
        ({"attention__key_length": -1.5}, "key_length is -1.5"),
        ({"attention__key_length": [1, 2]}, "key_length is a list that does not fit"),
        ({"attention__head_count_kv": [1, 2]}, "head_count_kv is a list that does not fit"),
        ({"attention__head_count_kv": [-1] * 8}, "head_count_kv is a list that does not fit"),
    ],
)
def test_numbers_that_are_missing_or_absurd_are_named(
    model: Callable[..., Path], details: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelFileError, match=message):
        read_shape(model(**details))


def test_a_sentence_stays_short_whatever_the_header_says(model: Callable[..., Path]) -> None:
    with pytest.raises(ModelFileError) as refused:
        read_shape(model(attention__head_count="x" * 100_000))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("shape", [[4], [4, 8]])
@pytest.mark.parametrize("name", ["blk.0.ffn_up.weight", f"blk.{'9' * 5000}.ffn_up.weight"])
def test_odd_tensors_have_no_part_in_the_shape(tmp_path: Path, name: str, shape: list[int]) -> None:
    keys = {"block_count": 1, "embedding_length": 4, "context_length": 8}
    path = write_header(
        tmp_path / "odd.gguf",
        tensors={name: (shape, gguf.GGMLQuantizationType.F32)},
        **{f"qwen2.{key}": value for key, value in keys.items()},
        **{"qwen2.attention.head_count": 1},
    )
    assert len(read_shape(path).layers) == 1


def test_a_file_cut_short_is_refused(tmp_path: Path, model: Callable[..., Path]) -> None:
    path = model(vocabulary=300)
    header = read_header(path)
    last = header.size - header.tensors[-1].size
    for length in [*range(0, header.data_at, 97), header.data_at, last]:
        short = tmp_path / "short.gguf"
        shutil.copy(path, short)
        os.truncate(short, length)
        with pytest.raises(ModelFileError, match="download it again"):
            read_shape(short)
