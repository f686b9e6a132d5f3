"""Names, logs and answers give a terminal no orders."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from hub_server import ONE, Hub
from rich.table import Table
from terminal import run

from kitty_nb import ServerConfig
from kitty_nb.cli.console import PlainConsole
from kitty_nb.errors import KittyError, printable

# Sets the title, writes the clipboard, and a colour by the one letter of 8-bit terminals.
EVIL = "\x1b]0;owned\x07\x1b]52;c;cm0gLXJm\x07\x9b31m"
HARMLESS = r"\x1b]0;owned\x07\x1b]52;c;cm0gLXJm\x07\x9b31m"


def tame(text: str) -> bool:
    return not {"\x1b", "\x07", "\x9b"} & {*text}


def test_orders_are_shown_and_words_stay() -> None:
    assert printable(EVIL) == HARMLESS
    assert printable("a\tb\nc\rd \u00fc \U0001f468\u200d\U0001f469") == (
        "a\tb\nc\\x0dd \u00fc \U0001f468\u200d\U0001f469"
    )


def test_tables_and_lines_of_a_console_are_tame_and_colours_stay() -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=True, color_system="standard", width=120)
    table = Table(EVIL, box=None)
    table.add_row(f"name {EVIL}", style="red")
    console.print(table)
    console.print(EVIL, soft_wrap=True)
    text = out.getvalue()
    assert "\x1b[31m" in text
    assert "\x07" not in text
    assert "\x1b]" not in text
    assert r"\x1b]0;owned" in text


@pytest.mark.parametrize("verb", ["scan", "logs"])
def test_file_names_and_logs_are_tame(
    config: ServerConfig, demo_model: Path, tmp_path: Path, verb: str
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(demo_model, models / f"{EVIL.replace('/', '')}.gguf")
    config.log_dir.mkdir()
    config.log_path.write_text(f"said: {EVIL}\n")
    env = tmp_path / "x.env"
    env.write_text(
        f"LLAMACPP_MODELS_DIR={models}\nLLAMACPP_LOG_DIR={config.log_dir}\n"
        "LLAMACPP_OTHER_STORES=0\n"
    )
    result = run(verb, "--env", env, color=True)
    assert result.exit_code == 0
    assert tame(result.output)
    assert "owned" in result.output.replace("\n", "")


def test_names_on_the_hub_and_what_is_said_of_them_are_tame(hub: Hub, tmp_path: Path) -> None:
    files = hub.repos[ONE].files
    files[f"tiny-{EVIL}-Q5_K_M.gguf"] = b"x"
    env = tmp_path / "x.env"
    env.write_text(f"LLAMACPP_MODELS_DIR={tmp_path}\n")
    result = run("download", ONE, "--list", "--env", env, color=True)
    assert "owned" in result.output.replace("\n", "")
    assert tame(result.output)
    assert tame("".join(KittyError(f"no {EVIL}")._render_traceback_()))
