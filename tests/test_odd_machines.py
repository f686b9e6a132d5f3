"""Users without a home folder, full disks and locales that lack letters."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kitty_nb import ServerConfig

_COMMAND = (sys.executable, "-m", "kitty_nb.cli")
# The verbs share what they import, which takes much longer than they do.
_EACH = """
import os, sys
from kitty_nb import cli, manager
from kitty_nb.cli import doctor
for verb in sys.argv[1:]:
    if not os.fork():
        sys.argv[1:] = [verb]
        sys.exit(cli.main())
    code = os.waitstatus_to_exitcode(os.wait()[1])
    print(f"<ended with {code}>", flush=True)
"""
_NOBODY = 54321
# Another user, who may read this user's Python.
_AS_NOBODY = (
    *("setpriv", f"--reuid={_NOBODY}", "--clear-groups", "--inh-caps=+dac_read_search"),
    *("--ambient-caps=+dac_read_search", "env", "-u", "HOME"),
)


def run(
    *words: object, cwd: Path | str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_each(
    *verbs: str, before: tuple[str, ...] = (), cwd: Path, env: dict[str, str] | None = None
) -> list[tuple[int, str]]:
    """Run verbs one after the other, each in a process of its own; their codes and output."""
    command = [*before, sys.executable, "-c", _EACH, *verbs]
    told = subprocess.check_output(command, cwd=cwd, env=env, stderr=subprocess.STDOUT, timeout=120)
    *ended, rest = re.split(r"\n?<ended with (\d+)>\n", told.decode())
    assert not rest
    return [(int(code), text) for text, code in zip(ended[::2], ended[1::2], strict=True)]


@pytest.fixture
def nobodys_folder(tmp_path: Path) -> Path:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root may be somebody else")
    if run(*_AS_NOBODY, *_COMMAND, "--help", cwd="/").returncode:
        pytest.skip("this system does not let root be somebody else")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    folder = tmp_path / "nobody"
    folder.mkdir()
    os.chown(folder, _NOBODY, _NOBODY)
    return folder


def test_without_a_home_folder_every_verb_names_the_variables(nobodys_folder: Path) -> None:
    verbs = ("status", "start", "stop", "scan", "doctor", "logs")
    for code, told in run_each(*verbs, before=_AS_NOBODY, cwd=nobodys_folder):
        assert code == 1
        assert "Traceback" not in told
        for name in ("LLAMACPP_MODELS_DIR", "LLAMACPP_LOG_DIR", "LLAMACPP_HISTORY"):
            assert f"Set {name}, or HOME." in " ".join(told.split())


def test_without_a_home_folder_all_works_once_they_are_set(
    nobodys_folder: Path, free_port: int
) -> None:
    (nobodys_folder / ".env").write_text(
        "LLAMACPP_MODELS_DIR=models\nLLAMACPP_LOG_DIR=logs\nLLAMACPP_HISTORY=history.sqlite3\n"
        f"LLAMACPP_PRIMARY_MODEL=kitty-demo.gguf\nLLAMACPP_PORT={free_port}\nLLAMACPP_CTX=512\n"
    )
    verbs = ("demo-model", "scan", "start", "status", "stop")
    for code, told in run_each(*verbs, before=_AS_NOBODY, cwd=nobodys_folder):
        assert code == 0, told
        assert "Traceback" not in told


def test_a_home_that_cannot_be_written_is_answered_with_the_variable_that_helps(
    tmp_path: Path, config: ServerConfig
) -> None:
    env = tmp_path / "my.env"
    env.write_text(
        f"LLAMACPP_MODELS_DIR={config.models_dir}\nLLAMACPP_PRIMARY_MODEL={config.model}\n"
        f"LLAMACPP_PORT={config.port}\n"
    )
    nowhere = os.environ | {"HOME": "/proc/nowhere"}
    nowhere = {name: value for name, value in nowhere.items() if not name.startswith("XDG_")}
    done = run(*_COMMAND, "start", "--env", env, env=nowhere)
    assert done.returncode == 1
    assert "Set LLAMACPP_LOG_DIR to a writable folder." in done.stderr
    done = run(*_COMMAND, "demo-model", cwd=tmp_path, env=nowhere)
    assert done.returncode == 1
    assert "LLAMACPP_MODELS_DIR" in done.stderr


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or run("mount", "-t", "tmpfs", "-o", "size=16k", "t", place).returncode:
        pytest.skip("only root may mount a disk")
    try:
        (place / "logs").mkdir()
        with (place / "filler").open("wb", buffering=0) as filler:
            while True:
                try:
                    filler.write(b"x" * 512)
                except OSError:
                    break
        yield place
    finally:
        assert run("umount", place).returncode == 0


def test_a_full_disk_for_logs_is_named(
    tmp_path: Path, config: ServerConfig, full_disk: Path
) -> None:
    env = tmp_path / "my.env"
    env.write_text(
        f"LLAMACPP_MODELS_DIR={config.models_dir}\nLLAMACPP_PRIMARY_MODEL={config.model}\n"
        f"LLAMACPP_PORT={config.port}\nLLAMACPP_LOG_DIR={full_disk}/logs\n"
        f"LLAMACPP_HISTORY={config.history}\n"
    )
    done = run(*_COMMAND, "start", "--env", env)
    assert done.returncode == 1
    assert f"The disk that holds the log folder {full_disk}/logs is full." in done.stderr
    assert "the program" not in done.stderr


@pytest.mark.slow
def test_a_locale_without_the_letters_of_a_name_is_meant(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(demo_model, tmp_path / "models" / "caf\u00e9.gguf")
    env = tmp_path / ".env"
    plain = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for lines in (
        "LLAMACPP_MODELS_DIR=models\nLLAMACPP_PRIMARY_MODEL=caf\u00e9.gguf\n",
        "LLAMACPP_MODELS_DIR=mod\u00e8les\n",
    ):
        env.write_text(f"{lines}LLAMACPP_LOG_DIR=logs\n", encoding="utf-8")
        for _, told in run_each("status", "scan", "start", cwd=tmp_path, env=plain):
            assert "locale (ascii) can't encode. Set LC_ALL=C.UTF-8" in told
            assert "Traceback" not in told
            assert "codec" not in told
    panels = "from kitty_nb.widgets import ControlPanel, FleetPanel, SweepPanel"
    assert not run(sys.executable, "-c", panels, env=plain).stderr
