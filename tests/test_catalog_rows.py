"""The catalog's facts about models, and its rows for files that are not whole models."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as Type
from model_files import write_header

from kitty_nb.catalog.catalog import ModelCatalog, families
from kitty_nb.catalog.model import Kind, Modality, Model

OLD = (1_700_000_000, 1_700_000_000)
AHEAD = (4_000_000_000, 4_000_000_000)


def one(folder: Path) -> Model:
    (model,) = ModelCatalog(folder).scan()
    return model


@pytest.mark.parametrize("endian", gguf.GGUFEndian)
def test_a_header_tells_all_of_a_model(tmp_path: Path, endian: gguf.GGUFEndian) -> None:
    write_header(
        tmp_path / "m.gguf",
        endian=endian,
        tensors={"a.weight": ([32, 64], Type.F16), "norm.weight": ([64], Type.F32)},
        general__file_type=1,
        general__name="Qwen2.5 7B Instruct",
        general__size_label="7B",
        general__license="apache-2.0",
        general__base_model__0__name="Qwen2.5 7B",
        qwen2__context_length=32768,
        qwen2__block_count=28,
        qwen2__attention__head_count=[28, 14],
        tokenizer__ggml__tokens=["a", "b", "c"],
        tokenizer__chat_template="{%- if tools %}{{ tools }}{% endif %}",
    )
    model = one(tmp_path)
    facts = model.facts
    assert (model.title, facts.size_label) == ("Qwen2.5 7B Instruct", "7B")
    assert (facts.license, facts.base_model) == ("apache-2.0", "Qwen2.5 7B")
    assert (model.quantization, model.confirmed) == ("F16", True)
    assert (model.context_length, facts.layers, facts.heads) == (32768, 28, 28)
    assert (facts.vocabulary, model.parameters) == (3, 32 * 64 + 64)
    assert facts.chat_template == "{%- if tools %}{{ tools }}{% endif %}"
    assert facts.tools is True
    assert model.modalities == (Modality.TEXT,)
    assert model.kind is Kind.MODEL
    assert model.startable


@pytest.mark.parametrize(
    ("template", "tools"),
    [
        (None, None),
        ("{{ messages }} may use tools", False),
        ("{# tools #}{{ messages }}", False),
        ("{%- if tools is defined -%}", True),
        ("{{ tools | tojson }}", True),
        ("{{ toolset }}", False),
        pytest.param("{{" * 100_000, False, id="never closed"),
    ],
)
def test_a_template_tells_whether_it_takes_tools(
    tmp_path: Path, template: str | None, tools: bool | None
) -> None:
    keys = {"tokenizer__chat_template": template} if template else {}
    write_header(tmp_path / "m.gguf", **keys)
    assert one(tmp_path).facts.tools is tools


@pytest.mark.parametrize(
    ("name", "file_type", "types", "expected"),
    [
        ("m", 15, [Type.Q4_K, Type.Q6_K], ("Q4_K_M", True)),
        ("m", 7, [Type.Q8_0], ("Q8_0", True)),
        ("m", 27, [Type.IQ3_S], ("IQ3_M", True)),
        ("m", 38, [Type.MXFP4, Type.Q8_0], ("MXFP4_MOE", True)),
        ("m", 15, [Type.Q8_0], ("Q8_0", False)),
        ("m-Q4_K_M", None, [Type.F16], ("F16", False)),
        ("m-UD-Q4_K_XL", None, [Type.Q4_K], ("Q4_K_XL", True)),
        ("m", None, [Type.Q5_K], ("Q5_K", None)),
        ("m", 15, [], ("Q4_K_M", None)),
        ("m", 999, [], (None, None)),
    ],
)
def test_the_tensors_confirm_the_quantization(
    tmp_path: Path,
    name: str,
    file_type: int | None,
    types: list[Type],
    expected: tuple[str | None, bool | None],
) -> None:
    keys = {} if file_type is None else {"general__file_type": file_type}
    tensors = {f"{kind.name}.weight": ([8, 256], kind) for kind in types}
    write_header(tmp_path / f"{name}.gguf", tensors=tensors, **keys)
    model = one(tmp_path)
    assert (model.quantization, model.confirmed) == expected


def test_parameters_of_shards_are_added_up(tmp_path: Path) -> None:
    for number in range(2):
        write_header(
            tmp_path / f"m-0000{number + 1}-of-00002.gguf",
            tensors={f"{number}.weight": ([32, 32], Type.Q8_0 if number else Type.F32)},
            split__no=number,
            split__count=2,
            split__tensors__count=2,
            general__file_type=7,
        )
    model = one(tmp_path)
    assert (model.parameters, model.quantization, model.confirmed) == (2048, "Q8_0", True)
    assert model.startable
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    assert one(tmp_path).parameters is None


def test_shards_that_lost_their_names_say_so(tmp_path: Path) -> None:
    for number, name in ((0, "b"), (2, "a")):
        path = tmp_path / f"{name}.gguf"
        write_header(path, split__no=number, split__count=3, split__tensors__count=9)
    for model in ModelCatalog(tmp_path).scan():
        assert f"{model.path} is a shard of a model in 3 files" in (model.problem or "")
        assert "…-00001-of-00003.gguf" in (model.problem or "")


@pytest.mark.parametrize(
    ("numbers", "tensors", "message"),
    [
        ((1, 0), 2, "is shard number 2, but its name says otherwise"),
        ((0, 1), 7, "hold 2 tensors together instead of 7"),
    ],
)
def test_shards_that_do_not_belong_together_are_told(
    tmp_path: Path, numbers: tuple[int, int], tensors: int, message: str
) -> None:
    for place, number in enumerate(numbers, 1):
        write_header(
            tmp_path / f"m-0000{place}-of-00002.gguf",
            tensors={f"{place}.weight": ([32], Type.F32)},
            split__no=number,
            split__count=2,
            split__tensors__count=tensors,
        )
    assert message in (one(tmp_path).problem or "")


def test_adapters_and_projectors_are_listed_when_asked_for(tmp_path: Path) -> None:
    write_header(tmp_path / "m.gguf")
    write_header(tmp_path / "lora.gguf", general__type="adapter", adapter__type="lora")
    write_header(tmp_path / "mmproj.gguf", "clip", clip__has_vision_encoder=True)
    write_header(tmp_path / "imatrix.gguf", general__type="imatrix")
    catalog = ModelCatalog(tmp_path)
    names = {kind: [model.path.stem for model in catalog.scan(kind)] for kind in Kind}
    assert names == {
        Kind.MODEL: ["m"],
        Kind.ADAPTER: ["lora"],
        Kind.PROJECTOR: ["mmproj"],
        Kind.OTHER: ["imatrix"],
    }


def test_a_projector_goes_with_the_model_beside_it(tmp_path: Path) -> None:
    for kind in ("Q4_K_M", "Q8_0"):
        write_header(tmp_path / "gemma" / f"gemma-3-4b-{kind}.gguf", "gemma3")
    write_header(tmp_path / "qwen" / "qwen.gguf")
    for file_type, kind in ((0, "F32"), (1, "F16"), (32, "BF16")):
        path = tmp_path / "gemma" / f"mmproj-{kind}.gguf"
        write_header(path, "clip", general__file_type=file_type, clip__has_vision_encoder=True)
    models = {model.path.stem: model for model in ModelCatalog(tmp_path).scan()}
    for kind in ("Q4_K_M", "Q8_0"):
        model = models[f"gemma-3-4b-{kind}"]
        assert model.projector == tmp_path / "gemma" / "mmproj-F16.gguf"
        assert model.modalities == (Modality.TEXT, Modality.IMAGE)
    assert models["qwen"].projector is None


def test_in_a_folder_of_many_models_names_and_titles_tell_whose_a_projector_is(
    tmp_path: Path,
) -> None:
    write_header(tmp_path / "gemma-3-4b-it-Q4_K_M.gguf", "gemma3")
    write_header(tmp_path / "renamed.gguf", "ultravox", general__name="Ultra Vox")
    write_header(tmp_path / "qwen.gguf", general__name="Qwen")
    write_header(tmp_path / "mmproj-gemma-3-4b-it-f16.gguf", "clip", clip__has_vision_encoder=True)
    path = tmp_path / "mmproj.gguf"
    write_header(path, "clip", general__name="Ultra-vox", clip__has_audio_encoder=True)
    models = {model.path.stem: model for model in ModelCatalog(tmp_path).scan()}
    assert models["gemma-3-4b-it-Q4_K_M"].modalities == (Modality.TEXT, Modality.IMAGE)
    assert models["renamed"].modalities == (Modality.TEXT, Modality.AUDIO)
    assert models["renamed"].projector == path
    assert models["qwen"].projector is None


def test_families_are_found_by_the_base_model(tmp_path: Path) -> None:
    base = {"general__name": "Qwen2.5 7B"}
    tuned = {"general__name": "Qwen2.5 7B Instruct", "general__base_model__0__name": "Qwen2.5-7B"}
    write_header(tmp_path / "1.gguf", **base)
    write_header(tmp_path / "2.gguf", **tuned)
    write_header(
        tmp_path / "3.gguf",
        general__name="My tune",
        general__base_model__0__repo_url="https://huggingface.co/Qwen/Qwen2.5-7B-Instruct",
    )
    write_header(tmp_path / "llama-q4_0.gguf", "llama")
    found = families(ModelCatalog(tmp_path).scan())
    assert {name: [model.path.stem for model in family] for name, family in found.items()} == {
        "Qwen2.5 7B": ["1", "2", "3"],
        "llama-q4_0": ["llama-q4_0"],
    }


def test_models_that_are_each_others_base_are_no_trouble(tmp_path: Path) -> None:
    for mine, theirs in (("A", "B"), ("B", "A")):
        path = tmp_path / f"{mine}.gguf"
        write_header(path, general__name=mine, general__base_model__0__name=theirs)
    assert sum(map(len, families(ModelCatalog(tmp_path).scan()).values())) == 2


@pytest.mark.parametrize(
    "name",
    [
        "m.gguf.part",
        "m.gguf.incomplete",
        "m.gguf.downloadInProgress",
        "m.gguf.crdownload",
        "downloading_m.gguf.part",
    ],
)
def test_a_download_is_a_row_that_says_so(tmp_path: Path, name: str) -> None:
    part = tmp_path / name
    part.write_bytes(b"GGUF" + bytes(2_000_000))
    model = one(tmp_path)
    assert (model.path, model.downloading) == (tmp_path / "m.gguf", True)
    assert "is still being downloaded: 2.0 MB so far" in (model.problem or "")
    assert model.label == "m · 2.0 MB · downloading"
    os.utime(part, OLD)
    model = one(tmp_path)
    assert "only partly downloaded: 2.0 MB so far. Resume" in (model.problem or "")
    assert (model.downloading, model.label) == (False, "m · 2.0 MB · incomplete")


def test_a_file_of_full_length_is_not_complete_while_it_is_being_filled(tmp_path: Path) -> None:
    write_header(tmp_path / "m.gguf")
    (tmp_path / "m.gguf.aria2").touch()
    assert one(tmp_path).downloading
    (tmp_path / "m.gguf.aria2").unlink()
    assert one(tmp_path).startable


def test_what_a_download_has_left_beside_a_whole_file_does_not_count(tmp_path: Path) -> None:
    path = write_header(tmp_path / "m.gguf", tensors={"a.weight": ([64, 64], Type.F16)})
    (tmp_path / "m.gguf.0123456789ab.incomplete").write_bytes(bytes(100_000))
    model = one(tmp_path)
    assert (model.startable, model.downloading, model.size) == (True, False, path.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)
    model = one(tmp_path)
    assert (model.startable, model.downloading) == (False, True)


def test_shards_on_their_way_are_not_called_missing(tmp_path: Path) -> None:
    write_header(tmp_path / "m-00001-of-00002.gguf", split__count=2)
    (tmp_path / "m-00002-of-00002.gguf.part").write_bytes(b"12")
    model = one(tmp_path)
    assert model.downloading
    assert model.missing == ("m-00002-of-00002.gguf",)
    assert "still being downloaded, 1 of 2 files" in (model.problem or "")


@pytest.mark.parametrize("length", [0, 100, 5_000])
def test_a_file_that_ends_too_early_is_growing_or_damaged(tmp_path: Path, length: int) -> None:
    path = write_header(tmp_path / "m.gguf", tensors={"a.weight": ([64, 64], Type.F16)})
    os.truncate(path, length)
    model = one(tmp_path)
    assert model.downloading
    assert "written to a moment ago" in (model.problem or "")
    for then in (OLD, AHEAD):  # a clock that was wrong, or a time zone taken for UTC
        os.utime(path, then)
        model = one(tmp_path)
        assert not model.downloading
        assert "download it again" in (model.problem or "")


def test_folders_that_all_link_to_each_other_are_walked_once(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(12)]
    for folder in folders:
        write_header(folder / "m.gguf")
    for folder in folders:
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other)
    assert len(ModelCatalog(tmp_path).scan()) == 12
