"""The environment of a server, taken from that of the program that starts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from kitty_nb import ModelManager, ServerConfig, ServerStatus, write_demo_model
from kitty_nb.config.profiles import env_warnings
from kitty_nb.errors import ServerFailedError


def test_flags_in_the_environment_are_left_out_and_named(
    misbehaving: Callable[..., ServerConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "1024")
    monkeypatch.setenv("LLAMA_CACHE", "/elsewhere")
    with ModelManager(config=misbehaving()) as manager:
        pid = manager.start().wait(30).pid
        environment = psutil.Process(pid).environ()
        assert "LLAMA_ARG_CTX_SIZE" not in environment
        assert environment["LLAMA_CACHE"] == "/elsewhere"
    (tmp_path / ".env").touch()
    (message,) = env_warnings(tmp_path / ".env")
    assert "LLAMA_ARG_CTX_SIZE" in message
    assert "not passed on" in message
    assert "LLAMACPP_EXTRA_ARGS" in message


def test_the_settings_shown_are_those_of_the_server(
    config: ServerConfig, engine: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "1024")
    monkeypatch.setenv("LLAMA_ARG_API_PREFIX", "/api")
    with ModelManager(config=config.replace(binary=engine, context_size=None)) as manager:
        manager.start().wait(60)
        settings = manager.http.get("/props").json()["default_generation_settings"]
        assert settings["n_ctx"] == 4096  # the demo model's own


@pytest.mark.parametrize(("name", "alias"), [(" trailing .gguf", None), ("a.gguf", " My Model ")])
def test_names_with_spaces_at_an_end_are_served(
    config: ServerConfig, engine: Path | None, tmp_path: Path, name: str, alias: str | None
) -> None:
    model = write_demo_model(tmp_path / name)
    wanted = config.replace(model=model, alias=alias, binary=engine)
    with ModelManager(config=wanted) as manager:
        assert manager.start().wait(60).status is ServerStatus.READY
        served = manager.http.get("/v1/models").json()["data"][0]["id"]
        assert served == manager.state.alias == (alias or model.stem).strip()


def test_a_prefix_that_a_script_adds_is_suspected(
    config: ServerConfig, native_engine: Path, tmp_path: Path
) -> None:
    script = tmp_path / "llama-server"
    script.write_text(f'#!/bin/sh\nexec "{native_engine}" "$@" --api-prefix /api\n')
    script.chmod(0o755)
    wanted = config.replace(binary=script, stall_seconds=2.0, n_gpu_layers=0)
    with (
        ModelManager(config=wanted) as manager,
        pytest.raises(ServerFailedError, match=r"/health answered 40\d.*--api-prefix"),
    ):
        manager.start().wait(60)
