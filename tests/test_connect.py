"""Hand-overs to other programs: what is printed is pasted, and the real clients get an answer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import demo_config, unused_port
from terminal import run

from kitty_nb.client import Access
from kitty_nb.client.connect import Served, hand_overs

# What the client is imported by; imports of a second and more.
MODULES = {
    "openai": "openai",
    "openai-embeddings": "openai",
    "langchain": "langchain_openai",
    "langchain-embeddings": "langchain_openai",
    "llamaindex": "llama_index.llms.openai_like",
    "llamaindex-embeddings": "llama_index.embeddings.openai_like",
    "litellm": "litellm",
}
MAIN = "openai"  # the client that most have; the others import for seconds
NOTEBOOK = """
print("---")
from types import SimpleNamespace
from kitty_nb import ModelManager
from kitty_nb.client.connect import Served, hand_overs
panel = SimpleNamespace(manager=ModelManager({env!r}, {profile!r}))
served = Served(panel.manager.access, panel.manager.state.alias, {profile!r})
cell = hand_overs()[{name!r}].in_notebook(served, "panel.manager")
exec(cell, {{"panel": panel}})
"""


@pytest.fixture(scope="module")
def env(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two ready servers: one that answers, and one that embeds in a folder with a hostile name."""
    folder = tmp_path_factory.mktemp("it's $HOME")
    config = demo_config(demo_model, folder, unused_port())
    (folder / ".env").write_text(
        f"LLAMACPP_MODELS_DIR={config.models_dir}\nLLAMACPP_LOG_DIR=logs\nLLAMACPP_CTX=1024\n"
        f"LLAMACPP_HISTORY=history.sqlite3\nLLAMACPP_THREADS=1\nLLAMACPP_PARALLEL=1\n"
        f"LLAMACPP_PRIMARY_MODEL={demo_model.name}\nLLAMACPP_PRIMARY_PORT={config.port}\n"
        f"LLAMACPP_PRIMARY_ALIAS='it\\'s \"the\" demo'\n"
        f"LLAMACPP_EMBEDDER_MODEL={demo_model.name}\nLLAMACPP_EMBEDDER_PORT={unused_port()}\n"
        f"LLAMACPP_EMBEDDER_EXTRA_ARGS=--embedding --pooling mean\n"
    )
    profiles = ("primary", "embedder")
    for profile in profiles:
        done = run("start", "--env", folder / ".env", "--profile", profile)
        assert done.exit_code == 0, done.stderr
    yield folder / ".env"
    for profile in profiles:
        run("stop", "--env", folder / ".env", "--profile", profile, "--force")


def printed(name: str, env: Path, profile: str = "primary") -> str:
    done = run("connect", name, "--env", env, "--profile", profile)
    assert done.exit_code == 0, done.stderr
    key = run("key", "--env", env, "--profile", profile).stdout.strip()
    assert key
    assert key not in done.output
    return done.stdout


def paste(command: list[str], code: str, home: Path, **more: str) -> str:
    """Run code as a fresh program, in the surroundings of somebody else."""
    keep = {name: value for name, value in os.environ.items() if "KITTY" in name}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    surroundings = keep | {"HOME": str(home), "PATH": path} | more
    done = subprocess.run(
        command, input=code, env=surroundings, cwd=home, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != MAIN))
        for name, found in hand_overs().items()
        if found.python and name in MODULES
    ],
)
def test_python_code_gets_an_answer_outside_and_in_a_notebook(
    name: str, env: Path, tmp_path: Path
) -> None:
    if find_spec(MODULES[name].partition(".")[0]) is None:
        pytest.skip(f"needs {hand_overs()[name].install}")
    profile = "embedder" if "embed" in name else "primary"
    cell = NOTEBOOK.format(env=str(env), profile=profile, name=name)
    code = printed(name, env, profile) + cell
    first, _, second = paste([sys.executable, "-"], code, tmp_path).partition("---")
    assert first.strip()
    assert second.strip()


def test_curl_gets_an_answer(env: Path, tmp_path: Path) -> None:
    assert '"finish_reason"' in paste(["sh"], printed("curl", env), tmp_path)


@pytest.mark.slow
def test_programs_that_read_the_environment_get_an_answer(env: Path, tmp_path: Path) -> None:
    ask = 'python -c "from openai import OpenAI; print(OpenAI().models.list().data[0].id)"'
    said = paste(["sh"], printed("env", env) + ask, tmp_path, OPENAI_API_KEY="their-own")
    assert said == 'it\'s "the" demo'


@pytest.mark.slow
def test_llm_gets_an_answer_also_where_an_older_paste_names_another_address(
    env: Path, tmp_path: Path
) -> None:
    lines = printed("llm", env)
    stale = lines.replace("127.0.0.1:", "127.0.0.1:1").partition("OPENAI_API_KEY")[0]
    assert paste(["sh"], stale + lines, tmp_path, LLM_USER_PATH=str(tmp_path))


def test_a_server_without_a_key_gets_a_word_that_clients_accept(tmp_path: Path) -> None:
    served = Served(Access("http://127.0.0.1:1", None), "demo", "primary")
    for found in hand_overs().values():
        code = found.in_terminal(served, ["no-such-command"]) + found.in_notebook(served, "manager")
        assert "none" in code
        assert "no-such-command" not in code
        assert "manager" not in code


def test_names_are_listed_and_errors_have_their_codes(tmp_path: Path) -> None:
    (tmp_path / "my.env").write_text("LLAMACPP_LOG_DIR=logs\n")
    listed = run("connect")
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [*hand_overs()]
    idle = run("connect", "curl", "--env", tmp_path / "my.env")
    assert (idle.exit_code, idle.stdout) == (3, "")
    assert run("connect", "nothing", "--env", tmp_path / "my.env").exit_code == 2
