"""The doctor lets the engine load a model: an engine that only answers `--help` is no engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import STAND_IN

from kitty_nb import ModelManager, ServerConfig
from kitty_nb.cli.doctor import Finding, Verdict, examine


def load_of(env: Path) -> Finding:
    return next(one for one in examine(env) if one.what == "Load")


def settings(path: Path, config: ServerConfig, engine: Path | None = None) -> Path:
    words = {
        "MODELS_DIR": config.models_dir,
        "LOG_DIR": config.log_dir,
        "HISTORY": config.history,
        "PORT": config.port,
        "OTHER_STORES": 0,
        "BIN": engine or "",
    }
    path.write_text("".join(f"LLAMACPP_{key}={value}\n" for key, value in words.items()))
    return path


def stand_in(path: Path, flags: str) -> Path:
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P "{STAND_IN}" "$@" {flags}\n')
    path.chmod(0o755)
    return path


def test_an_engine_that_dies_at_every_load_is_wrong(config: ServerConfig, tmp_path: Path) -> None:
    engine = stand_in(tmp_path / "llama-server", "--exit-after 0 --exit-code -4")
    found = load_of(settings(tmp_path / "x.env", config, engine))
    assert found.verdict is Verdict.ERROR
    assert "killed by SIGILL" in found.advice
    assert "instructions that this CPU lacks" in found.advice


def test_an_engine_that_takes_its_time_is_not_called_wrong(
    config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.cli.doctor._LOADED_WITHIN", 1.0)
    engine = stand_in(tmp_path / "llama-server", "--never-ready")
    found = load_of(settings(tmp_path / "x.env", config, engine))
    assert found.verdict is Verdict.WARNING
    assert "within 1 s" in found.found


def test_an_engine_that_serves_is_good_beside_a_server_that_runs(
    config: ServerConfig, engine: Path | None, tmp_path: Path
) -> None:
    env = settings(tmp_path / "x.env", config, engine)
    with ModelManager(config=config) as manager:
        pid = manager.start().wait(60).pid
        found = load_of(env)
        assert (found.verdict, found.advice) == (Verdict.OK, "")
        assert manager.check_health().wait(10).latency is not None
        assert manager.state.pid == pid
