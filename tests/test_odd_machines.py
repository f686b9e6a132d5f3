"""Users without a home folder, full disks and locales that lack letters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kitty_nb import ServerConfig

_COMMAND = (sys.executable, "-m", "kitty_nb.cli")
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


@pytest.mark.parametrize("verb", ["status", "start", "stop", "scan", "doctor", "logs"])
def test_without_a_home_folder_every_verb_names_the_variables(
    nobodys_folder: Path, verb: str
) -> None:
    done = run(*_AS_NOBODY, *_COMMAND, verb, cwd=nobodys_folder)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for name in ("LLAMACPP_MODELS_DIR", "LLAMACPP_LOG_DIR", "LLAMACPP_HISTORY"):
        assert f"Set {name}, or HOME." in " ".join((done.stdout + done.stderr).split())


def test_without_a_home_folder_all_works_once_they_are_set(
    nobodys_folder: Path, free_port: int
) -> None:
    (nobodys_folder / ".env").write_text(
        "LLAMACPP_MODELS_DIR=models\nLLAMACPP_LOG_DIR=logs\nLLAMACPP_HISTORY=history.sqlite3\n"
        f"LLAMACPP_PRIMARY_MODEL=kitty-demo.gguf\nLLAMACPP_PORT={free_port}\nLLAMACPP_CTX=512\n"
    )
    for words in (("demo-model",), ("scan",), ("start",), ("status",), ("stop",)):
        done = run(*_AS_NOBODY, *_COMMAND, *words, cwd=nobodys_folder)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


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
        for verb in ("status", "scan", "start"):
            done = run(*_COMMAND, verb, cwd=tmp_path, env=plain)
            assert "locale (ascii) cannot encode. Set LC_ALL=C.UTF-8" in done.stderr
            assert "Traceback" not in done.stderr
            assert "codec" not in done.stderr
    panels = "from kitty_nb.widgets import ControlPanel, FleetPanel, SweepPanel"
    assert not run(sys.executable, "-c", panels, env=plain).stderr
