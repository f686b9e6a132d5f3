from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kitty_nb import ServerConfig, write_demo_model
from kitty_nb.experiments import Outcome, RunRecord, Sweep

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def at_home(folder: Path, port: int) -> None:
    """Keep what runs in a folder away from the user's own models, ports and logs."""
    (folder / ".env").write_text(
        f"LLAMACPP_PORT={port}\nLLAMACPP_MODELS_DIR=models\nLLAMACPP_LOG_DIR=logs\n"
        "LLAMACPP_HISTORY=history.sqlite3\nLLAMACPP_ON_KERNEL_EXIT=stop\n"
    )
    (folder / "models").mkdir()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_the_outputs_saved_in_it(
    notebook: Path, tmp_path: Path, free_port: int
) -> None:
    at_home(tmp_path, free_port)
    command = [
        *(sys.executable, "-m", "pytest", "--nbval", "--nbval-cell-timeout=120"),
        # Cells run in their order, whatever shuffles the tests of this suite.
        *("-p", "no:cacheprovider", "-p", "no:randomly"),
        shutil.copy(notebook, tmp_path),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_is_recorded_headless_with_parameters(tmp_path: Path, free_port: int) -> None:
    at_home(tmp_path, free_port)
    write_demo_model(tmp_path / "models" / "mine.gguf")
    notebook = next(path for path in NOTEBOOKS if path.stem == "reproducible_run")
    command = [
        *(sys.executable, "-m", "papermill", "--no-progress-bar", notebook, "done.ipynb"),
        *("-p", "model", "mine.gguf", "-p", "question", "Why?", "-p", "max_tokens", "4"),
        *("-p", "save_to", "kept.json"),
    ]
    with socket.create_server(("127.0.0.1", free_port)):  # as the user's own server has it
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0, done.stderr
    record = RunRecord.load(tmp_path / "kept.json")
    assert record.model.name == "mine.gguf"
    assert record.outputs == ("Hello! I am the kitty_nb",)
    assert record.exchanges[0].request.messages[0]["content"] == "Why?"


def test_a_sweep_runs_headless_with_parameters(
    tmp_path: Path, free_port: int, demo_model: Path
) -> None:
    at_home(tmp_path, free_port)
    shutil.copy(demo_model, tmp_path / "models" / "mine.gguf")
    notebook = next(path for path in NOTEBOOKS if path.stem == "experiments")
    command = [
        *(sys.executable, "-m", "papermill", "--no-progress-bar", notebook, "done.ipynb"),
        *("-y", "{models: [mine.gguf], grid: {batch_size: [32, 64]}}"),
        *("-p", "repeats", "1", "-p", "max_tokens", "4", "-p", "store", "mine.sqlite3"),
        *("-p", "save_to", "mine.env"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    config = ServerConfig.from_env(tmp_path / ".env")
    store = tmp_path / "mine.sqlite3"
    grid = {"batch_size": [32, 64]}
    again = Sweep(
        ["mine.gguf"], grid, "Who are you?", repeats=1, max_tokens=4, config=config, store=store
    )
    assert [row.outcome for row in again.results.rows] == [Outcome.DONE] * 2
    assert (tmp_path / "mine.env").read_text() == f"{again.results.env_lines()}\n"
