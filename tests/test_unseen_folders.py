"""Folders that may not be looked at. Root may enter every folder, so here they are such as nobody
can: a name that is too long makes the system refuse like a parent that may not be entered."""

from __future__ import annotations

import socket
from pathlib import Path

import anyio
import pytest
from conftest import eventually
from terminal import run

from kitty_nb import ControlPanel, ServerConfig
from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.cli.doctor import Verdict, examine
from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import ConfigError, EngineError

UNSEEN = "x" * 300


@pytest.fixture
def env(tmp_path: Path) -> Path:
    path = tmp_path / "my.env"
    path.write_text(
        f"LLAMACPP_MODELS_DIR={UNSEEN}\nLLAMACPP_PRIMARY_MODEL=one.gguf\n"
        f"LLAMACPP_LOG_DIR={UNSEEN}\nLLAMACPP_HISTORY={UNSEEN}/history.sqlite3\n"
        f"LLAMACPP_BIN={UNSEEN}\nLLAMACPP_OTHER_STORES=0\n"
    )
    return path


@pytest.mark.parametrize("model", ["one.gguf", "one", UNSEEN])
def test_a_model_that_may_not_be_looked_at_is_explained(tmp_path: Path, model: str) -> None:
    with pytest.raises(ConfigError, match=r"Can't read it .*permissions|does not end in \.gguf"):
        resolve_model(ServerConfig(models_dir=tmp_path / UNSEEN, model=model))


@pytest.mark.parametrize(("verb", "code"), [("status", 3), ("stop", 0), ("scan", 0)])
def test_such_a_folder_is_not_in_the_way_of_looking(env: Path, verb: str, code: int) -> None:
    result = run(verb, "--env", env)
    assert result.exit_code == code, result.output
    assert "LLAMACPP_PRIMARY_MODEL='one.gguf': Can't read it" in result.stderr


@pytest.mark.parametrize("follow", [(), ("--follow",)])
def test_such_a_log_is_explained(env: Path, follow: tuple[str, ...]) -> None:
    result = run("logs", *follow, "--env", env)
    assert result.exit_code == 1
    assert "(File name too long). Check LLAMACPP_LOG_DIR" in result.stderr


def test_the_doctor_goes_on_to_its_last_check(env: Path) -> None:
    findings = {finding.what: finding for finding in examine(env)}
    assert findings["Models"].verdict is Verdict.ERROR
    assert "LLAMACPP_MODELS_DIR" in findings["Models"].advice
    assert "LLAMACPP_BIN" in findings["Engine"].advice
    assert findings["Disk"].verdict is Verdict.OK  # of the folder above
    assert run("doctor", "--env", env).exit_code == 1


def test_whoever_has_the_port_is_told_without_the_folder_of_records(env: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env.write_text(f"{env.read_text()}LLAMACPP_PORT={taken.getsockname()[1]}\n")
        findings = {finding.what: finding for finding in examine(env)}
    assert findings["Port of primary"].verdict is Verdict.ERROR


def test_a_program_that_may_not_be_looked_at_is_explained(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"LLAMACPP_BIN is .*\. Correct it"):
        anyio.run(locate_engine, tmp_path / UNSEEN)


def test_a_catalog_passes_such_a_folder_over(tmp_path: Path, demo_model: Path) -> None:
    listed = ModelCatalog([tmp_path / UNSEEN, demo_model.parent]).scan()
    assert [model.path for model in listed] == [demo_model]


def test_a_panel_says_what_is_wrong_with_such_a_folder(env: Path) -> None:
    panel = ControlPanel(env)
    try:
        eventually(lambda: "Check LLAMACPP_MODELS_DIR" in panel.notice.value)
    finally:
        panel.close()
