"""Warnings about keys in a `.env` file or the environment that have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import eventually
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from kitty_nb import ControlPanel, ServerConfig
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.cli.doctor import Verdict, examine
from kitty_nb.config.profiles import env_warnings
from kitty_nb.errors import ConfigError
from kitty_nb.widgets import FleetPanel

EXAMPLE = Path(__file__).parents[1] / ".env.example"


def warnings(folder: Path, *lines: str, profile: str = "primary") -> list[str]:
    path = folder / "my.env"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [*env_warnings(path, profile)]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("LLAMACPP_MODEL_DIR=/m", "LLAMACPP_MODELS_DIR"),
        ("LLAMACPP_CONTEXT=4096", "LLAMACPP_CTX"),
        ("LLAMACPP_GPU_LAYERS=99", "LLAMACPP_N_GPU_LAYERS"),
        ("LLAMACPP_CODER_GPU_LAYERS=99", "LLAMACPP_CODER_N_GPU_LAYERS"),
        ("LLAMACPP_PRIMRY_MODEL=m.gguf", "LLAMACPP_PRIMARY_MODEL"),
        ("LLAMACPP_VISON_PORT=9000", "LLAMACPP_VISION_PORT"),
    ],
)
def test_a_misspelled_key_is_told_with_the_nearest(tmp_path: Path, line: str, meant: str) -> None:
    (told,) = warnings(tmp_path, line)
    assert told.startswith(line.partition("=")[0])
    assert meant in told


def test_a_key_like_no_other_is_told_too(tmp_path: Path) -> None:
    (told,) = warnings(tmp_path, "LLAMACPP_ZZZ=1")
    assert told == "LLAMACPP_ZZZ is not a setting, so it has no effect."


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("LLAMACPP_MODELS_DIR=$HOME/models", "${HOME}"),
        ("LLAMACPP_MODELS_DIR=${KITTY_NOPE}/models", "Set KITTY_NOPE"),
        ("LLAMACPP_PORT=\u201c8082\u201d", "curly quotes"),
    ],
)
def test_what_only_looks_like_a_value_is_told_with_its_fix(
    tmp_path: Path, line: str, fix: str
) -> None:
    (told,) = warnings(tmp_path, line)
    assert told.startswith(line.partition("=")[0])
    assert fix in told


def test_what_is_right_needs_no_word(tmp_path: Path) -> None:
    assert env_warnings(EXAMPLE) == ()
    lines = (
        *("OTHER_CONTEXT=1", "HERE=/tmp", "LLAMACPP_MODELS_DIR=${HERE}/models"),
        *("LLAMACPP_LOG_DIR=${NOPE:-/tmp}/logs", "LLAMACPP_API_KEY='a$b'", "LLAMACPP_CONTEXT="),
        *("LLAMACPP_CODER2_MODEL=m.gguf", "LLAMACPP_MINE_MODEL=m.gguf", "LLAMACPP_Q4_PORT=1"),
    )
    assert warnings(tmp_path, *lines) == []


def test_settings_in_the_environment_that_differ_are_told_without_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACPP_CTX", "4096")
    monkeypatch.setenv("LLAMACPP_API_KEY", "very-secret")
    monkeypatch.setenv("LLAMACPP_CODER_PORT", "9000")
    (told,) = warnings(tmp_path, "LLAMACPP_CTX=8192")
    assert told.startswith("LLAMACPP_API_KEY, LLAMACPP_CTX in this program's environment")
    assert "very-secret" not in told
    assert ServerConfig.from_env(tmp_path / "my.env").context_size == 8192
    same = ("LLAMACPP_CTX=4096", "LLAMACPP_API_KEY=very-secret")
    assert warnings(tmp_path, *same) == []
    (told,) = warnings(tmp_path, *same, profile="coder")
    assert told.startswith("LLAMACPP_CODER_PORT in this")


def test_the_doctor_tells_them_and_where_there_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("LLAMACPP_CONTEXT=1\n")
    monkeypatch.chdir(tmp_path)
    found = {one.what: one for one in examine()}[".env"]
    assert found.verdict is Verdict.WARNING
    assert "LLAMACPP_CTX" in found.advice
    (tmp_path / ".env").unlink()
    assert "No .env in" in {one.what: one for one in examine()}[".env"].found


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("port", "abc", "It is not valid. Write a whole number from 1 to 65535."),
        ("alias", "a,b", "It is not valid. Write one name, without commas."),
        ("host", "a b", "Not a valid host name. Write an address"),
        ("contextsize", "1", "There is no such setting. Did you mean context_size?"),
        ("profile", "a b", "Use a letter, then letters, digits and underscores."),
    ],
)
def test_a_complaint_is_in_our_own_words(name: str, value: str, ours: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        ServerConfig(**{name: value})
    assert ours in str(refusal.value)
    assert "Input should" not in str(refusal.value)


def test_a_mistyped_file_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError) as refusal:
        resolve_model(ServerConfig(models_dir=tmp_path, other_stores=False, model="mine/q4.ggu"))
    assert "Did you mean mine/q4.gguf?" in str(refusal.value)
    assert "download" not in str(refusal.value)


def test_every_front_end_tells_them(
    tmp_path: Path,
    sent: object,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = "LLAMACPP_CONTEXT is not a setting, so it has no effect. Did you mean LLAMACPP_CTX?"
    env = tmp_path / "my.env"
    env.write_text(
        "LLAMACPP_CONTEXT=1\nLLAMACPP_OTHER_STORES=0\nLLAMACPP_MODELS_DIR=models\n"
        "LLAMACPP_LOG_DIR=logs\nLLAMACPP_HISTORY=history.sqlite3\n"
    )
    (tmp_path / "models").mkdir()
    panel = ControlPanel(env)
    try:
        eventually(lambda: told in panel.notice.value)
    finally:
        panel.close()
    env.write_text(f"{env.read_text()}LLAMACPP_CODER_PARALLEL=1\n")
    monkeypatch.setenv("LLAMACPP_CODER_PORT", "9000")  # of another profile than primary
    fleet = FleetPanel(env)
    try:
        eventually(lambda: told in fleet.notice)
        assert fleet.notice.count("LLAMACPP_CODER_PORT in this program's environment") == 1
    finally:
        fleet.close()
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    shell.run_line_magic("load_ext", "kitty_nb")
    try:
        shell.run_line_magic("kitty", f"status --env {env}")
    finally:
        shell.run_line_magic("unload_ext", "kitty_nb")
    assert told in capsys.readouterr().out
