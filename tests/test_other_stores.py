"""Models that other programs keep can be chosen and started where they are."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import eventually
from model_files import write_header
from terminal import run

from kitty_nb import ControlPanel, ServerConfig, ServerStatus
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.errors import ConfigError


@pytest.fixture
def blob(tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in Ollama's store, beside a blob that is none."""
    store = tmp_path / "ollama"
    digest = hashlib.sha256(demo_model.read_bytes()).hexdigest()
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "kitty" / "1b"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))
    (store / "blobs").mkdir()
    (store / "blobs" / "sha256-stray").write_bytes(b"GGUF")
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    return Path(shutil.copy(demo_model, store / "blobs" / f"sha256-{digest}"))


@pytest.fixture
def env(tmp_path: Path, free_port: int) -> Path:
    write_header(tmp_path / "models" / "own.gguf")
    path = tmp_path / ".env"
    path.write_text(
        "LLAMACPP_MODELS_DIR=models\nLLAMACPP_LOG_DIR=logs\nLLAMACPP_HISTORY=history.sqlite3\n"
        f"LLAMACPP_PORT={free_port}\nLLAMACPP_CTX=512\nLLAMACPP_THREADS=1\n"
    )
    return path


def test_a_model_of_ollama_is_chosen_started_and_saved(env: Path, blob: Path) -> None:
    panel = ControlPanel(env)
    try:
        eventually(lambda: [m.known_as for m in panel.picker.models] == [None, "kitty:1b"])
        with panel.picker.dropdown.turn:
            panel.picker.dropdown.value = blob
        panel.buttons.start.click()
        eventually(lambda: panel.manager.state.status is ServerStatus.READY, within=60)
        assert panel.manager.state.config.served_alias == "kitty:1b"
        eventually(lambda: "<b>kitty:1b</b>" in panel.status_line.value)
        panel.settings.save.click()
        assert ServerConfig.from_env(env).model == blob
    finally:
        panel.close()


def test_the_name_that_a_store_gives_its_model_does_not_go_on_to_the_next(
    env: Path, blob: Path
) -> None:
    config = resolve_model(ServerConfig.from_env(env).replace(model=blob))
    assert config.served_alias == "kitty:1b"
    assert resolve_model(config.replace(model="own.gguf")).served_alias == "own"
    assert config.replace(alias="mine").replace(model="own.gguf").served_alias == "mine"
    recorded = ServerConfig.model_validate_json(config.model_dump_json())
    shutil.rmtree(blob.parents[1] / "manifests")
    assert recorded.served_alias == "kitty:1b"


def test_a_second_panel_and_a_switch_serve_a_model_by_its_own_name(
    env: Path, blob: Path, demo_model: Path
) -> None:
    for name in ("next", "last"):
        shutil.copy(demo_model, env.parent / "models" / f"{name}.gguf")
    first = ControlPanel(env)
    second = None
    try:
        eventually(lambda: len(first.picker.models) == 4)
        first.picker.choose(blob)
        first.buttons.start.click()
        eventually(lambda: first.manager.state.status is ServerStatus.READY, within=60)
        second = ControlPanel(manager=first.manager)
        eventually(lambda: second.picker.models)
        second.picker.choose(env.parent / "models" / "next.gguf")
        second.buttons.start.click()
        eventually(lambda: "<b>next</b>" in second.status_line.value, within=60)
        eventually(lambda: first.manager.state.status is ServerStatus.READY, within=60)
        state = first.manager.switch_model(blob).wait(60)
        assert state.config.served_alias == "kitty:1b"
        state = first.manager.switch_model("last.gguf").wait(60)
        assert state.config.served_alias == "last"
    finally:
        if second:
            second.close()
        first.close()


@pytest.mark.parametrize("place", ["LM Studio", "llama.cpp"])
def test_a_model_in_a_known_folder_may_be_named(
    env: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folders = {"LM Studio": ".lmstudio/models/someone", "llama.cpp": ".cache/llama.cpp"}
    model = tmp_path / folders[place] / "m.gguf"
    write_header(model)
    config = ServerConfig.from_env(env).replace(model=model)
    assert resolve_model(config).model == model
    with pytest.raises(ConfigError, match="outside the models folder"):
        resolve_model(config.replace(other_stores=False))
    panel = ControlPanel(env)
    try:
        eventually(lambda: model in [found.path for found in panel.picker.models])
    finally:
        panel.close()


def test_only_blobs_that_are_models_may_be_named(env: Path, blob: Path) -> None:
    config = ServerConfig.from_env(env)
    assert resolve_model(config.replace(model=blob)).model == blob
    with pytest.raises(ConfigError, match=r"does not end in \.gguf"):
        resolve_model(config.replace(model=blob.with_name("sha256-stray")))


def test_the_command_lists_them_unless_told_otherwise(env: Path, blob: Path) -> None:
    scan = ("scan", "--env", env)
    assert f"kitty:1b ({blob})" in run(*scan).stdout
    env.write_text(env.read_text() + "LLAMACPP_OTHER_STORES=0\n")
    listed = run(*scan).stdout
    assert "own.gguf" in listed
    assert "kitty:1b" not in listed
