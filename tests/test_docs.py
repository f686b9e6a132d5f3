"""The README and the manual: examples run, links lead somewhere, nothing is left out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from dotenv import dotenv_values
from hub_server import Hub, Repo
from typer.main import get_group

from kitty_nb import write_demo_model
from kitty_nb.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW = {"clusters", "command-line", "experiments"}  # trials, and a start for each verb
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why_not>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
TERMINAL = """
import subprocess

def terminal(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
"""

# What a kernel runs cells by, without its start and its sockets: `test_notebooks.py` has those.
SHELL = """
import sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
sys.exit(not all(shell.run_cell(cell).success for cell in sys.argv[1:]))
"""


@dataclass(frozen=True)
class Example:
    """A fenced block: its language, its text, and why it is not run, if it is not."""

    language: str
    text: str
    why_not: str | None

    @property
    def cell(self) -> str:
        """The block as a cell of a notebook: what it holds, or its commands one by one."""
        if self.language == "python":
            return self.text
        commands = [line.removeprefix("$ ") for line in self.text.splitlines()]
        return "\n".join(f"terminal(*{shlex.split(command)!r})" for command in commands)


def examples(page: Path, *languages: str) -> list[Example]:
    found = [
        Example(block["language"], block["text"], block["why_not"])
        for block in FENCE.finditer(page.read_text())
    ]
    return [one for one in found if one.language in languages]


def runnable(page: Path) -> list[Example]:
    return [one for one in examples(page, "python", "console") if not one.why_not]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in SLOW))
        for page in PAGES
        if runnable(page)
    ],
)
def test_the_examples_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, free_port: int, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for name in {"kitty-demo.gguf", *re.findall(r'"([\w.-]+\.gguf)"', page.read_text())}:
        write_demo_model(models / name)
    (tmp_path / ".env").write_text(
        f"LLAMACPP_PORT={free_port}\nLLAMACPP_MODELS_DIR=models\nLLAMACPP_LOG_DIR=logs\n"
        "LLAMACPP_HISTORY=history.sqlite3\nLLAMACPP_ON_KERNEL_EXIT=stop\n"
        "LLAMACPP_PRIMARY_MODEL=kitty-demo.gguf\nLLAMACPP_CTX=4096\nLLAMACPP_THREADS=1\n"
    )
    model = (models / "kitty-demo.gguf").read_bytes()
    hub.repos["ggml-org/gemma-3-4b-it-GGUF"] = Repo({"gemma-3-4b-it-Q4_K_M.gguf": model})
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    cells = [TERMINAL, *(one.cell for one in runnable(page)), 'terminal("kitty-nb", "stop")']
    done = subprocess.run(
        [sys.executable, "-c", SHELL, *cells],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_looks_like_a_command_runs_or_says_why_not(page: Path) -> None:
    assert all(one.why_not for one in examples(page, "bash", "sh"))
    for one in examples(page, "console"):
        assert all(line.startswith("$ ") for line in one.text.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_shown_are_settings_there_are(page: Path) -> None:
    def without_profile(keys: Iterable[str]) -> set[str]:
        return {re.sub("_(PRIMARY|CODER|MINE|ROUTER|EMBEDDER)_", "_", key) for key in keys}

    shown = re.findall(r"\bLLAMACPP_[A-Z0-9_]+", page.read_text())
    assert without_profile(shown) <= without_profile(dotenv_values(ROOT / ".env.example"))


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """Those between pages are checked by `mkdocs build --strict`."""
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "internals.md"])
def test_files_that_a_guide_names_are_there(page: Path) -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:py|js|toml|md|yml|yaml))`", page.read_text()))
    homes = (ROOT, ROOT / "kitty_nb", ROOT / "kitty_nb" / "widgets")
    assert [name for name in named if not any((home / name).exists() for home in homes)] == []


def test_the_readme_is_read_in_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 600


def test_every_verb_and_option_is_on_the_page_of_the_command_line() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    rows = dict(re.findall(r"^\| `(?!kitty-nb)([\w-]+)([^`]*)` \|", page, re.MULTILINE))
    options = {
        name: {max(option.opts, key=len) for option in verb.params if option.opts[0][0] == "-"}
        for name, verb in get_group(app).commands.items()
    }
    common = {"--env", "--profile"}
    assert {name: set(re.findall(r"--[\w-]+", row)) for name, row in rows.items()} == {
        name: found - common for name, found in options.items()
    }
    assert [name for name, found in options.items() if not common <= found] == ["lab", "serve"]


def test_every_extra_is_in_the_table() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    index = (ROOT / "docs" / "index.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)` \|", index, re.MULTILINE)) == set(
        project["optional-dependencies"]
    )
