"""Random GGUF headers, whole and damaged, against the `gguf` package's reader."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import tempfile
import tracemalloc
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import write_header

from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.gguf import TENSOR_TYPES, ArrayInfo, read_header

if TYPE_CHECKING:
    from collections.abc import Iterator

steady = settings(
    derandomize=True,
    database=None,
    max_examples=50,
    deadline=timedelta(seconds=10),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

SCALARS = {
    GGUFValueType.UINT8: st.integers(0, 2**8 - 1),
    GGUFValueType.INT8: st.integers(-(2**7), 2**7 - 1),
    GGUFValueType.UINT16: st.integers(0, 2**16 - 1),
    GGUFValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    GGUFValueType.UINT32: st.integers(0, 2**32 - 1),
    GGUFValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    GGUFValueType.UINT64: st.integers(0, 2**64 - 1),
    GGUFValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    GGUFValueType.FLOAT32: st.floats(width=32),
    GGUFValueType.FLOAT64: st.floats(),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.STRING: st.text(max_size=300),
}
KEYS = st.text(min_size=1, max_size=40).filter(
    lambda key: not key.startswith(("GGUF.", "general.architecture", "general.alignment"))
)
VALUES = st.one_of(
    *(st.tuples(st.just(kind), st.none(), values) for kind, values in SCALARS.items()),
    *(
        st.tuples(
            st.just(GGUFValueType.ARRAY), st.just(kind), st.lists(values, min_size=1, max_size=40)
        )
        for kind, values in SCALARS.items()
    ),
)
TENSORS = st.dictionaries(
    st.text(st.characters(codec="ascii"), min_size=1, max_size=30),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    max_size=6,
)


@contextlib.contextmanager
def written(
    values: dict[str, tuple[GGUFValueType, GGUFValueType | None, object]],
    tensors: dict[str, list[int]],
    endian: gguf.GGUFEndian,
    version: int,
) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        with contextlib.closing(gguf.GGUFWriter(path, "llama", endianess=endian)) as writer:
            for key, (kind, of, value) in values.items():
                writer.add_key_value(key, value, kind, of)
            for name, shape in tensors.items():
                writer.add_tensor(name, np.zeros(shape, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        order = "<" if endian is gguf.GGUFEndian.LITTLE else ">"
        with path.open("r+b") as file:
            file.seek(4)
            file.write(struct.pack(f"{order}I", version))
        yield path


def same(ours: object, theirs: object) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return ours == theirs or (math.isnan(ours) and math.isnan(theirs))
    return type(ours) is type(theirs) and ours == theirs


@steady
@given(
    st.dictionaries(KEYS, VALUES, max_size=12),
    TENSORS,
    st.sampled_from(gguf.GGUFEndian),
    st.sampled_from([2, 3]),
)
def test_a_header_reads_as_the_gguf_package_reads_it(
    values: dict[str, tuple[GGUFValueType, GGUFValueType | None, object]],
    tensors: dict[str, list[int]],
    endian: gguf.GGUFEndian,
    version: int,
) -> None:
    with written(values, tensors, endian, version) as path:
        header = read_header(path)
        reader = gguf.GGUFReader(path)

        fields = {key: f for key, f in reader.fields.items() if not key.startswith("GGUF.")}
        assert list(header.metadata) == list(fields)
        for key, field in fields.items():
            value = header.metadata[key]
            if isinstance(value, ArrayInfo):
                assert value.length == len(field.data)
                if field.types[-1] is not GGUFValueType.STRING:
                    pairs = zip(value.numbers, field.contents(), strict=True)
                    assert all(same(ours, theirs) for ours, theirs in pairs)
            else:
                assert same(value, field.contents())
        assert [
            (e.name, list(e.shape), e.type, header.data_at + e.offset) for e in header.tensors
        ] == [
            (t.name, t.shape.tolist(), t.tensor_type.value, t.data_offset) for t in reader.tensors
        ]
        del reader


def test_tensor_types_are_those_of_the_gguf_package() -> None:
    assert {
        GGMLQuantizationType(number).name: (kind.block, kind.size)
        for number, kind in TENSOR_TYPES.items()
        if kind.name == GGMLQuantizationType(number).name
    } == {kind.name: gguf.GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_header(
        tmp_path_factory.mktemp("sound") / "m.gguf",
        general__name="A model",
        general__file_type=15,
        qwen2__block_count=2,
        qwen2__attention__head_count=[4, 8],
        tokenizer__ggml__tokens=["a", "bc", "def"] * 5,
        tokenizer__ggml__scores=[0.5] * 600,
        tokenizer__chat_template="{{ messages }}",
        tensors={"a.weight": ([64, 64], GGMLQuantizationType.F16)},
    )
    return path.read_bytes()


NUMBERS = st.sampled_from(
    [0, 1, 2**16, 2**22, 2**24, 2**27, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
)


@steady
@given(
    damages=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 900), st.binary(min_size=1, max_size=12)),
            st.tuples(st.integers(0, 900), NUMBERS.map(lambda n: struct.pack("<Q", n))),
            st.tuples(st.integers(0, 900), st.integers(0, 12).map(lambda n: struct.pack("<I", n))),
        ),
        min_size=1,
        max_size=4,
    ),
    length=st.one_of(st.none(), st.integers(0, 9000), st.just(1 << 40)),
)
def test_a_damaged_file_is_a_row_within_bounds(
    sound: bytes, damages: list[tuple[int, bytes]], length: int | None
) -> None:
    content = bytearray(sound)
    for at, damage in damages:
        content[at : at + len(damage)] = damage
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.gguf")
        path.write_bytes(content)
        if length is not None:
            os.truncate(path, length)  # 1 TB of zeros: whatever length is claimed is there
        tracemalloc.start()
        try:
            rows = ModelCatalog(folder, Path(folder, "cache")).scan()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert all(row.path == path for row in rows)
        assert peak < 80_000_000


@pytest.mark.parametrize(
    "claim", ["tensors", "entries", "strings"], ids=lambda claim: f"a hole full of {claim}"
)
def test_a_hole_in_a_file_is_not_taken_for_a_header(tmp_path: Path, claim: str) -> None:
    counts = {"tensors": (2**17, 0), "entries": (0, 2**16), "strings": (0, 1)}[claim]
    content = b"GGUF" + struct.pack("<IQQ", 3, *counts)
    if claim == "strings":
        content += struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**18)
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    os.truncate(path, 1 << 40)
    tracemalloc.start()
    try:
        ModelCatalog(tmp_path, tmp_path / "cache").scan()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 80_000_000
