"""How often notebooks reproduce their saved outputs: `20 of 20` means every time.

Each run is `pytest --nbval` in its own folder, with its own kernel and servers; the outputs of
cells must equal the saved ones exactly. A run that is not done in time has failed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kitty_nb.network import free_port

_NOTEBOOK = Path(__file__).parents[1] / "tests" / "notebooks" / "reproducible_run.ipynb"
_RUNS = 20
_SECONDS = 240  # for a run, with a margin for a busy machine


def main() -> None:
    """Run the notebook so often, and print how often its outputs were the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path, nargs="?", default=_NOTEBOOK)
    parser.add_argument("--runs", type=int, default=_RUNS)
    asked = parser.parse_args()
    began, same = time.perf_counter(), 0
    for number in range(1, asked.runs + 1):
        complaint = _complaint(asked.notebook)
        same += not complaint
        if complaint:
            print(f"Run {number} differs:\n{complaint}", file=sys.stderr)
    seconds = (time.perf_counter() - began) / asked.runs
    print(f"{asked.notebook.name}: {same} of {asked.runs}, {seconds:.1f} s a run")
    sys.exit(same != asked.runs)


def _complaint(notebook: Path) -> str:
    """Run a notebook apart from the user's own models, ports and logs; return what differs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "models").mkdir()
        (folder / ".env").write_text(
            f"LLAMACPP_PORT={free_port()}\nLLAMACPP_MODELS_DIR=models\nLLAMACPP_LOG_DIR=logs\n"
            "LLAMACPP_HISTORY=history.sqlite3\nLLAMACPP_ON_KERNEL_EXIT=stop\n"
        )
        command = [
            *(sys.executable, "-m", "pytest", "--nbval", "--nbval-cell-timeout=120"),
            *("-p", "no:cacheprovider", "-p", "no:randomly", "--color=no"),
            shutil.copy(notebook, folder),
        ]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"It was not done after {_SECONDS} s."
        return done.stdout + done.stderr if done.returncode else ""


if __name__ == "__main__":
    main()
