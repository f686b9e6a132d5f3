from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.model import (
    Model,
    ShardName,
    read_facts,
    shard_paths,
    total_size,
)


def model_file(path: Path, **metadata: str | int) -> Path:
    """Write a GGUF header; dots in keys are written as two underscores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(gguf.GGUFWriter(path, "qwen2")) as writer:
        for key, value in metadata.items():
            if isinstance(value, str):
                writer.add_string(key.replace("__", "."), value)
            else:
                writer.add_uint32(key.replace("__", "."), value)
        writer.add_tokenizer_model("no_vocab")
        writer.add_tensor("a.weight", np.zeros(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def split_model(folder: Path, prefix: str, count: int) -> list[Path]:
    return [
        model_file(folder / f"{prefix}-{number:05d}-of-{count:05d}.gguf", split__count=count)
        for number in range(1, count + 1)
    ]


def scan(folder: Path) -> dict[str, Model]:
    return {model.name: model for model in ModelCatalog(folder).scan()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/m-00002-of-00042.gguf", ShardName("m", 2, 42)),
        ("m-00001-of-00002-00001-of-00003.gguf", ShardName("m-00001-of-00002", 1, 3)),
        ("m.gguf", None),
        ("m-0001-of-0002.gguf", None),
        ("m-00003-of-00002.gguf", None),
        ("m-00000-of-00002.gguf", None),
        ("-00001-of-00002.gguf", None),
        ("m-00001-of-00002.gguf.part", None),
    ],
)
def test_shard_names(name: str, expected: ShardName | None) -> None:
    assert ShardName.parse(Path(name)) == expected


def test_any_shard_leads_to_all_of_its_model(tmp_path: Path) -> None:
    shards = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for size, shard in zip((10, 0, 3), shards, strict=True):
        shard.write_bytes(bytes(size))
    shards[1].unlink()
    for shard in shards:
        assert shard_paths(shard) == tuple(shards)
        assert total_size(shard) == 13


def test_a_model_in_one_file_is_its_own_only_shard(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert shard_paths(path) == (path,)
    assert total_size(path) == 0
    path.write_bytes(b"12")
    assert total_size(path) == 2


def test_a_model_is_described_by_its_header(tmp_path: Path) -> None:
    path = model_file(
        tmp_path / "sub" / "Qwen.gguf",
        general__file_type=15,
        qwen2__context_length=32768,
        general__type="model",
    )
    (model,) = ModelCatalog(str(tmp_path)).scan()
    assert model == Model(
        path=path,
        name="sub/Qwen.gguf",
        facts=read_facts(path),
        quantization="Q4_K_M",
        size=path.stat().st_size,
        parameters=32,
    )
    assert (model.architecture, model.context_length) == ("qwen2", 32768)
    assert model.startable
    assert model.label == f"Qwen · Q4_K_M · {model.size:,} bytes"


@pytest.mark.parametrize(
    ("stem", "tag"),
    [
        ("qwen2.5-coder-32b-instruct-q8_0", "Q8_0"),
        ("Llama-3.Q4_K_M", "Q4_K_M"),
        ("gemma-UD-IQ2_XXS", "IQ2_XXS"),
        ("m-q4_k_m_imatrix", "Q4_K_M"),
        ("m-fp16", "FP16"),
        ("m.BF16", "BF16"),
        ("gpt-oss-20b-mxfp4", "MXFP4"),
        ("f16-to-q6_k", "Q6_K"),
        ("qwen2.5-7b", None),
        ("iq200", None),
    ],
)
def test_without_a_file_type_the_name_tells_the_quantization(
    tmp_path: Path, stem: str, tag: str | None
) -> None:
    model_file(tmp_path / f"{stem}.gguf")
    (model,) = ModelCatalog(tmp_path).scan()
    assert model.quantization == tag


def test_names_sort_naturally_without_regard_to_case(tmp_path: Path) -> None:
    for name in ("b-10B", "B-2B", "a/z", "b-2b", "C", "²", "1"):
        model_file(tmp_path / f"{name}.gguf")
    names = [model.name.removesuffix(".gguf") for model in ModelCatalog(tmp_path).scan()]
    assert names == ["1", "a/z", "B-2B", "b-2b", "b-10B", "C", "²"]


def test_shards_are_one_row(tmp_path: Path) -> None:
    shards = split_model(tmp_path, "m-q8_0", 3)
    (model,) = ModelCatalog(tmp_path).scan()
    assert (model.path, model.name) == (shards[0], "m-q8_0-00001-of-00003.gguf")
    assert (model.shard_count, model.missing, model.startable) == (3, (), True)
    assert model.size == sum(shard.stat().st_size for shard in shards)
    assert model.label == f"m-q8_0 · Q8_0 · {model.size:,} bytes · 3 shards"


@pytest.mark.parametrize("gone", [0, 1])
def test_missing_shards_are_named(tmp_path: Path, gone: int) -> None:
    shards = split_model(tmp_path, "m-q8_0", 3)
    shards[gone].unlink()
    (model,) = ModelCatalog(tmp_path).scan()
    assert (model.path, model.quantization) == (shards[0], "Q8_0")
    assert model.missing == (shards[gone].name,)
    assert not model.startable
    assert model.problem is not None
    assert shards[gone].name in model.problem
    assert model.label.endswith(" · incomplete (1 of 3 shards missing)")


def test_many_missing_shards_keep_the_sentence_short(tmp_path: Path) -> None:
    model_file(tmp_path / "m-00007-of-05000.gguf")
    (model,) = ModelCatalog(tmp_path).scan()
    assert len(model.missing) == 4_999
    assert model.problem is not None
    assert "m-00003-of-05000.gguf and 4996 more" in model.problem


def test_a_broken_later_shard_is_noticed(tmp_path: Path) -> None:
    shards = split_model(tmp_path, "m", 3)
    shards[2].write_bytes(b"")
    os.utime(shards[2], (0, 0))
    (model,) = ModelCatalog(tmp_path).scan()
    assert model.architecture == "qwen2"
    assert model.problem == f"{shards[2]} is empty. It is damaged or incomplete: download it again."


def test_a_shard_under_another_name_is_noticed(tmp_path: Path) -> None:
    model_file(tmp_path / "m.gguf", split__count=21)
    (model,) = ModelCatalog(tmp_path).scan()
    assert model.problem is not None
    assert "…-00001-of-00021.gguf" in model.problem


def test_bad_files_are_rows_with_their_problem(tmp_path: Path) -> None:
    (tmp_path / "page-q4_0.gguf").write_text("<!DOCTYPE html>")
    (tmp_path / "gone.gguf").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    models = scan(tmp_path)
    assert models.keys() == {"page-q4_0.gguf", "gone.gguf", "loop.gguf"}
    assert not any(model.startable for model in models.values())
    assert all(
        "download" in (models[name].problem or "") for name in ("gone.gguf", "page-q4_0.gguf")
    )
    assert models["page-q4_0.gguf"].label == "page-q4_0 · Q4_0 · 15 bytes · unusable"


def test_what_is_not_a_model_to_serve_is_left_out(tmp_path: Path) -> None:
    model_file(tmp_path / "mmproj-a.gguf", general__type="mmproj")
    model_file(tmp_path / "mmproj-b.gguf", general__architecture="clip")
    model_file(tmp_path / "lora.gguf", general__type="adapter")
    model_file(tmp_path / "._copied-by-a-mac.gguf")
    model_file(tmp_path / ".cache" / "m.gguf")
    (tmp_path / "README.md").touch()
    (tmp_path / "folder.gguf").mkdir()
    model_file(tmp_path / "kept.GGUF")
    assert scan(tmp_path).keys() == {"kept.GGUF"}


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    models = tmp_path / "models"
    model_file(elsewhere / "deep" / "far.gguf")
    model_file(models / "near.gguf")
    (models / "disk").symlink_to(elsewhere)
    (models / "alias.gguf").symlink_to(models / "near.gguf")
    (models / "self").symlink_to(models)
    (elsewhere / "deep" / "back").symlink_to(models)
    (elsewhere / "deep" / "up").symlink_to("..")
    assert scan(models).keys() == {"near.gguf", "alias.gguf", "disk/deep/far.gguf"}


def test_a_relative_folder_may_lead_upwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_file(tmp_path / "models" / "sub" / "m.gguf")
    monkeypatch.chdir(tmp_path / "models")
    assert scan(Path("../models")).keys() == scan(Path()).keys() == {"sub/m.gguf"}


def test_an_absent_folder_has_no_models(tmp_path: Path) -> None:
    assert ModelCatalog(tmp_path / "absent").scan() == []
    assert ModelCatalog(model_file(tmp_path / "m.gguf")).scan() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("mode", [0o000, 0o400])
def test_an_unreadable_folder_is_passed_over(tmp_path: Path, mode: int) -> None:
    model_file(tmp_path / "m.gguf")
    locked = model_file(tmp_path / "locked" / "sub" / "m.gguf").parent.parent
    (tmp_path / "link").symlink_to(locked / "sub")
    locked.chmod(mode)
    try:
        assert scan(tmp_path).keys() == {"m.gguf"}
    finally:
        locked.chmod(0o700)


def test_importing_the_catalog_is_cheap() -> None:
    code = "import sys, kitty_nb.catalog.catalog; print({'gguf', 'numpy'} & sys.modules.keys())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert output.stdout == b"set()\n"
