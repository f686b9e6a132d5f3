"""GGUF files that are no model to serve, each with its reason: as a row, and after a start."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as Type
from model_files import write_header, write_model

from kitty_nb import ModelCatalog, ModelManager, ServerConfig
from kitty_nb.catalog.model import Kind, Model
from kitty_nb.errors import ServerCrashedError
from kitty_nb.widgets.models import table_rows
from kitty_nb.widgets.server_view import model_facts

LORA = {f"blk.0.attn_q.weight.lora_{side}": ([8, 64], Type.F16) for side in "ab"}


def bare(architecture: str) -> Callable[[Path], object]:
    """Weights and nothing of a language model, as programs for images write them."""
    weights = {"double_blocks.0.weight": ([32, 64], Type.F16)}

    def write(path: Path) -> None:
        with contextlib.closing(gguf.GGUFWriter(path, architecture)) as writer:
            for name, (shape, _) in weights.items():
                writer.add_tensor(name, gguf.np.zeros(shape, "f2"))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()

    return write


def vocabulary_only(path: Path) -> None:
    write_header(path, "llama", tensors={}, tokenizer__ggml__tokens=["a", "b"])


def without_architecture(path: Path) -> None:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))


def without_layers(path: Path) -> None:
    write_model(path, layers=0)


def unknown_type(path: Path) -> None:
    """Give a matrix a type that no engine has."""
    name = b"blk.0.attn_q.weight"
    content = bytearray(write_model(path, layers=1).read_bytes())
    at = content.index(name) + len(name) + struct.calcsize("<IQQ")
    assert struct.unpack_from("<I", content, at) == (Type.F16,)
    struct.pack_into("<I", content, at, 77)
    path.write_bytes(content)


NEVER: dict[str, tuple[Callable[[Path], object], str]] = {
    **{name: (bare(name), "is an image model") for name in ("flux", "sd1", "sdxl", "sd3", "aura")},
    **{name: (bare(name), "is an image model") for name in ("qwen_image", "lumina2")},
    **{name: (bare(name), "is a video model") for name in ("wan", "ltxv", "hyvid")},
    **{name: (bare(name), "is a speech model") for name in ("parler-tts", "kokoro")},
    "controlvector": (bare("controlvector"), "with --control-vector in LLAMACPP_EXTRA_ARGS"),
    "of tomorrow": (bare("paints"), "is not a language model (paints): no vocabulary"),
    "vocabulary": (vocabulary_only, "has a vocabulary but no weights"),
    "nameless": (without_architecture, "does not say its architecture"),
    "flat": (without_layers, "has no layers"),
}
DOUBTFUL: dict[str, tuple[Callable[[Path], object], str]] = {
    name: (lambda path, name=name: write_model(path, name, layers=1), said)  # type: ignore[misc]
    for name, said in {
        "eagle3": "is a drafter",
        "t5encoder": "is a text encoder",
        "wavtokenizer-dec": "vocoder",
    }.items()
} | {"typed": (unknown_type, "kitty_nb does not know (type 77). The engine may support it")}


def one(folder: Path) -> Model:
    (model,) = ModelCatalog(folder).scan()
    return model


def shown(model: Model) -> set[str]:
    """The text that a person reads of it: in the table, and in the details."""
    (row,) = table_rows([model], [], {}, {model.path: 1})
    return {row["problem"], model_facts(model)["Problem"]}


@pytest.mark.parametrize("name", NEVER)
def test_what_can_never_be_served_says_why(tmp_path: Path, name: str) -> None:
    write, reason = NEVER[name]
    write(tmp_path / f"{name}.gguf")
    model = one(tmp_path)
    assert not model.startable
    assert reason in (model.problem or "")
    assert shown(model) == {model.problem}
    assert model.label.endswith("unusable")
    assert ModelCatalog(tmp_path).describe(model.path) == model


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_an_engine_may_load_is_told_and_can_be_tried(tmp_path: Path, name: str) -> None:
    write, reason = DOUBTFUL[name]
    write(tmp_path / f"{name}.gguf")
    model = one(tmp_path)
    assert model.startable
    assert reason in (model.doubt or "")
    assert shown(model) == {model.doubt}
    assert model.label.endswith("may not load")


def test_an_architecture_of_tomorrow_can_be_started(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", "qwen99", layers=1)
    assert (one(tmp_path).problem, one(tmp_path).doubt) == (None, None)


@pytest.mark.parametrize("keys", [{}, {"general__type": "adapter"}, {"adapter__type": "lora"}])
def test_an_adapter_is_one_whatever_it_says_of_its_type(
    tmp_path: Path, keys: dict[str, str]
) -> None:
    path = write_header(tmp_path / "lora.gguf", "llama", tensors=LORA, **keys)
    assert ModelCatalog(tmp_path).scan() == []
    assert [row.path for row in ModelCatalog(tmp_path).scan(Kind.ADAPTER)] == [path]


@pytest.mark.parametrize("name", ["flux", "vocabulary", "nameless", "flat", "lora", "imatrix"])
def test_a_start_by_path_says_it_too(
    config: ServerConfig, engine: Path | None, tmp_path: Path, name: str
) -> None:
    path = tmp_path / f"{name}.gguf"
    if name == "lora":
        write_header(path, "llama", tensors=LORA)
    elif name == "imatrix":
        write_header(path, "llama", general__type="imatrix")
    else:
        NEVER[name][0](path)
    reasons = {"lora": "is an adapter (LoRA)", "imatrix": "is data about a model"}
    with ModelManager(config=config.replace(model=path, binary=engine)) as manager:
        assert manager.preview_memory().wait(30).problem
        with pytest.raises(ServerCrashedError) as failure:
            manager.start().wait(60)
    assert reasons.get(name, NEVER.get(name, ("", ""))[1]) in str(failure.value)
    assert "Update llama.cpp" not in str(failure.value)


def test_an_unknown_architecture_is_not_called_an_old_engine(
    config: ServerConfig, engine: Path | None, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "m.gguf", "qwen99", layers=1)
    with (
        ModelManager(config=config.replace(model=path, binary=engine)) as manager,
        pytest.raises(ServerCrashedError, match="does not support the architecture 'qwen99'"),
    ):
        manager.start().wait(60)
