"""Models in the folders of other programs."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from model_files import write_header

from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.model import Modality
from kitty_nb.catalog.stores import Store, StoreKind, known_stores


def hub_file(hub: Path, repository: str, revision: str, name: str) -> Path:
    folder = hub / f"models--{repository.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256(f"{revision}{name}".encode()).hexdigest()
    write_header(blob, general__name=name)
    link = folder / "snapshots" / revision / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


def ollama_model(root: Path, name: str, tag: str, **kinds: str) -> dict[str, Path]:
    blobs, layers = {}, []
    for kind, content in kinds.items():
        digest = hashlib.sha256(content.encode()).hexdigest()
        blob = root / "blobs" / f"sha256-{digest}"
        if kind in {"model", "projector"}:
            keys = {"clip__has_vision_encoder": True} if kind == "projector" else {}
            write_header(blob, "clip" if kind == "projector" else "llama", **keys)
        layers.append(
            {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"}
        )
        blobs[kind] = blob
    manifest = root / "manifests" / name / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return blobs


def test_only_stores_that_exist_are_known(tmp_path: Path) -> None:
    assert known_stores({}, tmp_path) == []
    places = {
        StoreKind.HUGGING_FACE: ".cache/huggingface/hub",
        StoreKind.LLAMA_CPP: ".cache/llama.cpp",
        StoreKind.LM_STUDIO: ".lmstudio/models",
        StoreKind.OLLAMA: ".ollama/models",
    }
    for place in places.values():
        (tmp_path / place).mkdir(parents=True)
    assert known_stores({}, tmp_path) == [
        Store(tmp_path / place, kind) for kind, place in places.items()
    ]


def test_variables_move_stores(tmp_path: Path) -> None:
    for name in ("hub", "home/hub", "llama", "ollama", "xdg/llama.cpp"):
        (tmp_path / name).mkdir(parents=True)

    def stores(**variables: str) -> dict[StoreKind, Path]:
        return {store.kind: store.path for store in known_stores(variables, tmp_path)}

    assert stores(HF_HUB_CACHE="~/hub", HF_HOME=str(tmp_path / "home")) == {
        StoreKind.HUGGING_FACE: tmp_path / "hub"
    }
    assert stores(HF_HOME=str(tmp_path / "home"), OLLAMA_MODELS="") == {
        StoreKind.HUGGING_FACE: tmp_path / "home" / "hub"
    }
    assert stores(LLAMA_CACHE=str(tmp_path / "llama"), OLLAMA_MODELS=str(tmp_path / "ollama")) == {
        StoreKind.LLAMA_CPP: tmp_path / "llama",
        StoreKind.OLLAMA: tmp_path / "ollama",
    }
    assert stores(XDG_CACHE_HOME=str(tmp_path / "xdg")) == {
        StoreKind.LLAMA_CPP: tmp_path / "xdg" / "llama.cpp"
    }


def test_the_hub_cache_lists_each_file_once_under_its_repository(tmp_path: Path) -> None:
    hub_file(tmp_path, "Qwen/Small-GGUF", "old", "small-q8_0.gguf")
    hub_file(tmp_path, "Qwen/Small-GGUF", "old", "dropped.gguf")
    latest = hub_file(tmp_path, "Qwen/Small-GGUF", "new", "small-q8_0.gguf")
    refs = tmp_path / "models--Qwen--Small-GGUF" / "refs"
    refs.mkdir()
    (refs / "main").write_text("new")
    (tmp_path / "datasets--a--b" / "snapshots").mkdir(parents=True)
    (tmp_path / ".locks").mkdir()
    models = ModelCatalog(Store(tmp_path, StoreKind.HUGGING_FACE)).scan()
    assert [model.path.name for model in models] == ["small-q8_0.gguf", "dropped.gguf"]
    assert models[0].path == latest
    assert {model.repository for model in models} == {"Qwen/Small-GGUF"}
    assert all(model.startable for model in models)


def test_a_revision_with_all_shards_is_preferred(tmp_path: Path) -> None:
    names = [f"big-0000{number}-of-00002.gguf" for number in (1, 2)]
    whole = [hub_file(tmp_path, "a/b", "old", name) for name in names]
    hub_file(tmp_path, "a/b", "new", names[0])
    refs = tmp_path / "models--a--b" / "refs"
    refs.mkdir()
    (refs / "main").write_text("new")
    (model,) = ModelCatalog(Store(tmp_path, StoreKind.HUGGING_FACE)).scan()
    assert (model.path, model.missing) == (whole[0], ())


def test_ollamas_blobs_are_named_by_their_manifests(tmp_path: Path) -> None:
    library = "registry.ollama.ai/library"
    blobs = ollama_model(
        tmp_path, f"{library}/gemma3", "4b", model="g", projector="p", template="t"
    )
    ollama_model(tmp_path, f"{library}/gemma3", "latest", model="g", projector="p")
    ollama_model(tmp_path, "registry.ollama.ai/me/mine", "latest", model="m")
    ollama_model(tmp_path, "hf.co/a/b", "Q4_0", model="h")
    models = {model.known_as: model for model in ModelCatalog(ollama(tmp_path)).scan()}
    assert models.keys() == {"gemma3:4b, gemma3:latest", "me/mine:latest", "hf.co/a/b:Q4_0"}
    gemma = models["gemma3:4b, gemma3:latest"]
    assert (gemma.path, gemma.projector) == (blobs["model"], blobs["projector"])
    assert gemma.modalities == (Modality.TEXT, Modality.IMAGE)
    assert gemma.label.startswith("gemma3:4b, gemma3:latest · ")
    assert models["me/mine:latest"].projector is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "../../x"}]}',
        '{"layers": [1]}',
        "[" * 100_000,
    ],
)
def test_a_bad_manifest_is_a_row(tmp_path: Path, content: str) -> None:
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "bad" / "latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(content)
    (model,) = ModelCatalog(ollama(tmp_path)).scan()
    assert model.path == manifest
    assert "Can't read the manifest" in (model.problem or "")


def test_a_blob_that_is_gone_is_a_row(tmp_path: Path) -> None:
    blobs = ollama_model(tmp_path, "registry.ollama.ai/library/m", "1b", model="m")
    blobs["model"].unlink()
    (model,) = ModelCatalog(ollama(tmp_path)).scan()
    assert (model.known_as, model.startable) == ("m:1b", False)
    assert "does not exist" in (model.problem or "")


def test_several_folders_are_listed_one_after_the_other(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    write_header(mine / "sub" / "z.gguf")
    write_header(theirs / "publisher" / "a" / "a.gguf")
    ollama_model(tmp_path / "ollama", "registry.ollama.ai/library/b", "1b", model="b")
    store = Store(theirs, StoreKind.LM_STUDIO)
    models = ModelCatalog([mine, store, ollama(tmp_path / "ollama"), mine / "sub"]).scan()
    assert [model.known_as or model.name for model in models] == [
        "sub/z.gguf",
        (theirs / "publisher" / "a" / "a.gguf").as_posix(),
        "b:1b",
    ]


def ollama(root: Path) -> Store:
    return Store(root, StoreKind.OLLAMA)
