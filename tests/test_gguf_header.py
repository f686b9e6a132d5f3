from __future__ import annotations

import contextlib
import os
import struct
import time
from typing import TYPE_CHECKING

import gguf
import pytest

from kitty_nb.catalog.gguf import ArrayInfo, read_header, stored_quantization
from kitty_nb.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def written(
    path: Path, endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE
) -> Iterator[gguf.GGUFWriter]:
    """Fill in a header; it is on disk when the block ends."""
    with contextlib.closing(gguf.GGUFWriter(path, "llama", endianess=endian)) as writer:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def raw(*entries: bytes, version: int = 3, count: int | None = None) -> bytes:
    count = len(entries) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, 0, count) + b"".join(entries)


@pytest.mark.parametrize("endian", gguf.GGUFEndian)
def test_every_kind_of_value_comes_back(tmp_path: Path, endian: gguf.GGUFEndian) -> None:
    path = tmp_path / "model.gguf"
    with written(path, endian) as writer:
        writer.add_name("Großes Modell")
        writer.add_context_length(32768)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
        writer.add_int8("x.i8", -3)
        writer.add_uint16("x.u16", 65535)
        writer.add_uint64("x.u64", 2**63)
        writer.add_float64("x.f64", 0.1)
        writer.add_bool("x.yes", True)
        writer.add_bool("x.no", False)
        writer.add_array("x.numbers", [1, 2, 3])
        writer.add_token_list(["a", "bc", ""])
        writer.add_string("x.last", "after the arrays")

    header = read_header(path)

    assert header.tensors == ()
    assert header.architecture == "llama"
    assert header.number("general.file_type") == 15
    assert header.own_number("context_length") == 32768
    assert header.number("split.count") is None
    assert header.metadata == {
        "general.architecture": "llama",
        "general.name": "Großes Modell",
        "general.file_type": 15,
        "llama.context_length": 32768,
        "x.i8": -3,
        "x.u16": 65535,
        "x.u64": 2**63,
        "x.f64": 0.1,
        "x.yes": True,
        "x.no": False,
        "x.numbers": ArrayInfo(3, (1, 2, 3)),
        "tokenizer.ggml.tokens": ArrayInfo(3),
        "x.last": "after the arrays",
    }


def test_quantizations_are_named_as_llama_cpp_names_them() -> None:
    types = set(gguf.LlamaFileType) - {gguf.LlamaFileType.GUESSED}
    named = {file_type: stored_quantization(file_type, {}, "model")[0] for file_type in types}
    assert named == {
        file_type: file_type.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for file_type in types
    }


def test_an_unknown_quantization_is_not_guessed() -> None:
    assert stored_quantization(gguf.LlamaFileType.GUESSED, {}, "model")[0] is None


def test_version_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw(string(b"split.count") + struct.pack("<IH", 2, 42), version=2))
    header = read_header(path)
    assert header.number("split.count") == 42


def test_a_large_vocabulary_is_passed_over_quickly(tmp_path: Path) -> None:
    count = 152_000
    strings = struct.pack("<IIQ", 9, 8, count) + b"".join(
        string(b"x" * (number % 15)) for number in range(count)
    )
    numbers = struct.pack("<IIQ", 9, 6, count) + bytes(4 * count)
    path = tmp_path / "model.gguf"
    path.write_bytes(
        raw(
            string(b"tokens") + strings,
            string(b"scores") + numbers,
            string(b"merges") + strings,
            string(b"last") + struct.pack("<I", 8) + string("\u2581".encode() * 100_000),
        )
    )
    times = []
    for _ in range(3):
        begin = time.process_time()
        header = read_header(path)
        times.append(time.process_time() - begin)
    assert header.metadata["merges"] == ArrayInfo(count)
    assert header.metadata["last"] == "\u2581" * 100_000
    assert min(times) < 0.5


@pytest.mark.parametrize("count", [5, 127, 8191, 8192, 8196, 8256, 8319, 8320, 8325, 16_500])
def test_strings_of_any_number_are_passed_over(tmp_path: Path, count: int) -> None:
    strings = struct.pack("<IIQ", 9, 8, count) + string(b"x") * count
    path = tmp_path / "model.gguf"
    path.write_bytes(raw(string(b"tokens") + strings, string(b"last") + struct.pack("<IB", 7, 1)))
    assert read_header(path).metadata["last"] is True


def test_a_file_cut_short_anywhere_in_its_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with written(path) as writer:
        writer.add_name("demo")
        writer.add_array("x.numbers", [1, 2, 3])
        writer.add_token_list(["a", "bc"])
    whole = path.read_bytes()
    end = whole.index(b"bc") + 2
    for length in range(end):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match="download it again"):
            read_header(path)
    path.write_bytes(whole[:end])
    assert read_header(path).metadata["general.name"] == "demo"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "not a GGUF model: it begins with b'vers'",
        ),
        (raw(version=1), "is GGUF version 1"),
        (raw(version=4), "is GGUF version 4"),
        (raw(count=2**63), "9223372036854775808 metadata entries"),
        (raw(struct.pack("<Q", 2**64 - 1)), "18446744073709551615 bytes in a string"),
        (raw(string(b"k") + struct.pack("<I", 99)), "unknown type 99"),
        (raw(string(b"k") + struct.pack("<IIQ", 9, 8, 2**62)), "strings in an array"),
        (raw(string(b"k") + struct.pack("<IIQ", 9, 12, 2**63)), "ends in the middle"),
        (raw(string(b"k") + struct.pack("<IIQQ", 9, 8, 2, 2**63)), "ends in the middle"),
        (raw(string(b"k") + struct.pack("<IIQ", 9, 9, 1)), "unknown type 9"),
    ],
)
def test_what_is_not_a_sound_header_is_refused_with_the_reason(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    for path, message in [
        (tmp_path, "is not a file"),
        (pipe, "is not a file"),
        (tmp_path / "absent.gguf", "does not exist"),
        (loop, "Can't read .*: Too many levels"),
    ]:
        with pytest.raises(ModelFileError, match=message):
            read_header(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw())
    path.chmod(0)
    with pytest.raises(ModelFileError, match=r"Can't read .*: Permission denied"):
        read_header(path)


@pytest.mark.parametrize("twice", ["key", "tensor"])
def test_what_stands_twice_is_damage(tmp_path: Path, twice: str) -> None:
    entry = struct.pack("<Q1sII", 1, b"k", 4, 7)
    tensor = struct.pack("<Q1sIQIQ", 1, b"t", 1, 1, 0, 0)
    counts, body = {"key": ((0, 2), entry), "tensor": ((2, 0), tensor)}[twice]
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + body * 2)
    with pytest.raises(ModelFileError, match=f"has the {twice} '.' twice. It is damaged"):
        read_header(path)
