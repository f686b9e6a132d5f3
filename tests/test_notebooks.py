from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from kitty_nb import ModelManager, ServerConfig, ServerStatus, write_demo_model
from kitty_nb.experiments import Outcome, RunRecord, Sweep

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# The same with outputs: JupyterLab would distrust a notebook that comes with some.
RUN_ONCE = Path(__file__).parent / "notebooks"


def at_home(folder: Path, port: int) -> None:
    """Keep what runs in a folder away from the user's own models, ports and logs."""
    (folder / ".env").write_text(
        f"LLAMACPP_PORT={port}\nLLAMACPP_MODELS_DIR=models\nLLAMACPP_LOG_DIR=logs\n"
        "LLAMACPP_HISTORY=history.sqlite3\nLLAMACPP_ON_KERNEL_EXIT=stop\n"
        "LLAMACPP_THREADS=1\n"  # several would wait for each other, and compute while they do
    )
    (folder / "models").mkdir()


def cells(notebook: Path) -> list[NotebookNode]:
    return [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_shipped_as_nobody_has_run_it(notebook: Path) -> None:
    shipped, run = nbformat.read(notebook, 4), nbformat.read(RUN_ONCE / notebook.name, 4)
    assert any(cell.get("outputs") for cell in run.cells)
    for cell in run.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    assert shipped == run


# The others run headless, with parameters, in tests of their own.
@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem != "control_panel"))
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_gives_the_outputs_kept_of_it(
    notebook: Path, tmp_path: Path, free_port: int
) -> None:
    at_home(tmp_path, free_port)
    command = [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "nbval.plugin"),
        *("--nbval", "--nbval-cell-timeout=120"),
        shutil.copy(RUN_ONCE / notebook.name, tmp_path),
    ]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # of a dozen plugins
    done = subprocess.run(
        command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_all(name: str, folder: Path, **environment: str) -> list[NotebookNode]:
    """Run a notebook from its first cell to its last, or to the first that fails."""
    notebook = next(path for path in NOTEBOOKS if path.stem == name)
    script = Path(__file__).with_name("run_notebook.py")
    command = [sys.executable, script, notebook, "done.ipynb"]
    subprocess.run(command, cwd=folder, timeout=300, env=os.environ | environment, check=True)
    return cells(folder / "done.ipynb")


def test_run_all_asks_the_users_own_server_and_leaves_it_running(
    tmp_path: Path, free_port: int
) -> None:
    at_home(tmp_path, free_port)
    for name in ("first", "second"):
        write_demo_model(tmp_path / "models" / f"{name}.gguf")
    with ModelManager(tmp_path / ".env") as manager:
        config = manager.state.config.replace(model="second.gguf", context_size=256)
        pid = manager.start(config.replace(on_kernel_exit="keep")).wait(30).pid
        done = run_all("control_panel", tmp_path)
        assert not [out for cell in done for out in cell.outputs if out.output_type == "error"]
        assert "Ready · second.gguf" in done[0].outputs[0].data["text/html"]
        printed = "".join(out.text for out in done[1].outputs)  # in one piece or in several
        assert "Hello! I am the kitty_nb demo model" in printed
        assert (manager.state.status, manager.state.pid) == (ServerStatus.READY, pid)


def test_a_notebook_says_what_it_lacks_before_anything_runs(tmp_path: Path, free_port: int) -> None:
    at_home(tmp_path, free_port)
    begin = tmp_path / "ipython" / "profile_default" / "startup" / "begin.py"
    begin.parent.mkdir(parents=True)
    begin.write_text("import sys\nsys.modules['pandas'] = None")  # as if it were not installed
    first, *others = run_all("experiments", tmp_path, IPYTHONDIR=str(tmp_path / "ipython"))
    assert first.outputs[-1].evalue == "Tables and plots need: pip install pandas"
    assert not any(cell.execution_count for cell in others)
    assert not list((tmp_path / "models").iterdir())


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
        *("-p", "repeats", "1", "-p", "max_tokens", "4", "-p", "store", "mine.journal"),
        *("-p", "save_to", "mine.env"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    config = ServerConfig.from_env(tmp_path / ".env")
    store = tmp_path / "mine.journal"
    grid = {"batch_size": [32, 64]}
    again = Sweep(
        ["mine.gguf"], grid, "Who are you?", repeats=1, max_tokens=4, config=config, store=store
    )
    assert [row.outcome for row in again.results.rows] == [Outcome.DONE] * 2
    assert (tmp_path / "mine.env").read_text() == f"{again.results.env_lines()}\n"
