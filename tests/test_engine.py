"""Finding an engine, and reading its flags from the help texts of several years."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from kitty_nb.engine.locate import Engine, EngineKind, locate_engine, parse_help
from kitty_nb.errors import EngineError, EngineNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

HELP_2023 = """\
usage: ./server [options]

options:
  -h, --help                show this help message and exit
  -t N, --threads N         number of threads to use during computation (default: 8)
  --rope-scaling {none,linear,yarn}
                            RoPE frequency scaling method, defaults to linear
  -ngl N, --n-gpu-layers N
                            number of layers to store in VRAM
  -m FNAME, --model FNAME
                            model path (default: models/7B/ggml-model-f16.gguf)
  -cb, --cont-batching      enable continuous batching (default: disabled)
"""
HELP_EARLY_2024 = """\
  -m FNAME, --model FNAME
                            model path
  --pooling {none,mean,cls} pooling type for embeddings, use model default if unspecified
  --host                    ip address to listen (default: 127.0.0.1)
"""
HELP_2024 = """\
----- common params -----

  -h,    --help, --usage          print usage and exit
         --verbosity N            set specific verbosity level (default: 0)
  -m,    --model FNAME            model path
  -fa,   --flash-attn             enable Flash Attention (default: disabled)
         --lora-scaled FNAME SCALE
                                  path to LoRA adapter with user defined scaling
         --control-vector-layer-range START END
                                  layer range, start and end inclusive
"""
HELP_2026 = """\
----- common params -----

-h,    --help, --usage                  print usage and exit
-m,    --model FNAME                    model path to load
                                        (env: LLAMA_ARG_MODEL)
-c,    --ctx-size N                     size of the prompt context (default: 0)
                                        (env: LLAMA_ARG_CTX_SIZE)
-fa,   --flash-attn [on|off|auto]       set Flash Attention use (default: 'auto')
--cpu-strict <0|1>                      use strict CPU placement (default: 0)
--poll <0...100>                        use polling level to wait for work
-kvo,  --kv-offload, -nkvo, --no-kv-offload
                                        whether to enable KV cache offloading (default: enabled)
-dev,  --device <dev1,dev2,..>          comma-separated list of devices to use for offloading
-ot,   --override-tensor <tensor name pattern>=<buffer type>,...
                                        override tensor buffer type
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM, either an exact
                                        number, 'auto', or 'all' (default: auto)
-sm,   --split-mode {none,layer,row}    how to split the model across multiple GPUs, one of:
                                        - none: use one GPU only
                                        --not-a-flag of this build, only prose
--spec-draft-model, -md, --model-draft FNAME
                                        draft model for speculative decoding (default: unused)


----- example-specific params -----

--jinja, --no-jinja                     whether to use jinja template engine for chat
--port PORT                             port to listen (default: 8080)
"""


@pytest.mark.parametrize(
    ("text", "flag", "flags", "values", "choices"),
    [
        (HELP_2023, "-h", ("-h", "--help"), 0, ()),
        (HELP_2023, "--threads", ("-t", "--threads"), 1, ()),
        (HELP_2023, "-ngl", ("-ngl", "--n-gpu-layers"), 1, ()),
        (HELP_2023, "--rope-scaling", ("--rope-scaling",), 1, ("none", "linear", "yarn")),
        (HELP_2023, "-cb", ("-cb", "--cont-batching"), 0, ()),
        (HELP_EARLY_2024, "--pooling", ("--pooling",), 1, ("none", "mean", "cls")),
        (HELP_EARLY_2024, "--host", ("--host",), 0, ()),
        (HELP_2024, "--usage", ("-h", "--help", "--usage"), 0, ()),
        (HELP_2024, "--verbosity", ("--verbosity",), 1, ()),
        (HELP_2024, "-fa", ("-fa", "--flash-attn"), 0, ()),
        (HELP_2024, "--lora-scaled", ("--lora-scaled",), 2, ()),
        (HELP_2024, "--control-vector-layer-range", ("--control-vector-layer-range",), 2, ()),
        (HELP_2026, "--ctx-size", ("-c", "--ctx-size"), 1, ()),
        (HELP_2026, "--flash-attn", ("-fa", "--flash-attn"), 1, ("on", "off", "auto")),
        (HELP_2026, "--cpu-strict", ("--cpu-strict",), 1, ("0", "1")),
        (HELP_2026, "--poll", ("--poll",), 1, ()),
        (HELP_2026, "-nkvo", ("-kvo", "--kv-offload", "-nkvo", "--no-kv-offload"), 0, ()),
        (HELP_2026, "--device", ("-dev", "--device"), 1, ()),
        (HELP_2026, "-ot", ("-ot", "--override-tensor"), 1, ()),
        (HELP_2026, "-ngl", ("-ngl", "--gpu-layers", "--n-gpu-layers"), 1, ()),
        (HELP_2026, "-sm", ("-sm", "--split-mode"), 1, ("none", "layer", "row")),
        (HELP_2026, "-md", ("--spec-draft-model", "-md", "--model-draft"), 1, ()),
        (HELP_2026, "--no-jinja", ("--jinja", "--no-jinja"), 0, ()),
    ],
)
def test_options_of_all_ages(
    text: str, flag: str, flags: tuple[str, ...], values: int, choices: tuple[str, ...]
) -> None:
    option = parse_help(text).option(flag)

    assert option is not None
    assert (option.flags, option.values, option.choices) == (flags, values, choices)


@pytest.mark.parametrize(("text", "count"), [(HELP_2023, 6), (HELP_2024, 6), (HELP_2026, 14)])
def test_prose_is_not_an_option(text: str, count: int) -> None:
    assert len(parse_help(text).options) == count


def test_underscores_are_read_as_llama_server_reads_them() -> None:
    dialect = parse_help(HELP_2026)

    assert dialect.option("--ctx_size") is dialect.option("--ctx-size")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--flash-attention", "--flash-attn"), ("--ctxsize", "--ctx-size"), ("--zzz", None)],
)
def test_nearest_flag(typed: str, meant: str | None) -> None:
    assert parse_help(HELP_2026).nearest(typed) == meant


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    """Write an executable shell script named llama-server."""

    def write(body: str) -> Path:
        path = tmp_path / "bin" / "llama-server"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    return write


def answering(calls: Path) -> str:
    """A script like llama-server, which notes each question."""
    return (
        f"echo $1 >> '{calls}'\n"
        'case $1 in --help) echo "-m,    --model FNAME    model path" ;;\n'
        "--version) echo 'version: 11434 (abc123)' >&2; echo built with GNU >&2 ;; esac"
    )


def locate(binary: Path | None = None, answer_within: float = 20.0) -> Engine:
    return anyio.run(locate_engine, binary, answer_within)


def test_own_binary(program: Callable[[str], Path], tmp_path: Path) -> None:
    path = program(answering(tmp_path / "calls"))

    engine = locate(path)

    assert engine.kind is EngineKind.NATIVE
    assert engine.command == (str(path),)
    assert engine.version == "11434 (abc123)"
    assert engine.dialect.option("--model")


def test_folder_that_holds_it(program: Callable[[str], Path], tmp_path: Path) -> None:
    path = program(answering(tmp_path / "calls"))

    assert locate(path.parent).command == locate(path.parents[1]).command == (str(path),)


def test_asked_once_until_it_changes(program: Callable[[str], Path], tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    path = program(answering(calls))
    first = locate(path)

    assert locate(path) is first
    assert sorted(calls.read_text().split()) == ["--help", "--version"]

    program(answering(calls).replace("11434", "11435"))
    os.utime(path, (0, 0))  # a fast machine writes both within one tick of the clock for files
    assert locate(path).version == "11435 (abc123)"


def test_found_on_path_before_the_wheel(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(answering(tmp_path / "calls"))
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")

    assert locate().command == (str(path),)


@pytest.mark.parametrize("script", [None, "exec {inside}", 'exec "$(dirname "$0")/{inside.name}"'])
def test_another_program_of_the_same_path_is_asked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None
) -> None:
    """A program's answer is kept beyond this process; a script counts with what it starts."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = inside = tmp_path / "llama-server"
    if script:
        inside = tmp_path / "inside"
        path.write_text(f'#!/bin/sh\necho >> asked\n{script.format(inside=inside)} "$@"\n')
        path.chmod(0o755)
    for version, times in (("1 (first)", 1), ("22 (second)", 2)):
        text = f"echo '-m, --model FNAME  x'; echo 'version: {version}'"
        inside.write_text(f"#!/bin/sh\n{text}\n")
        inside.chmod(0o755)
        for _ in range(2):
            monkeypatch.setattr("kitty_nb.engine.locate._engines", {})  # as in another process
            assert anyio.run(locate_engine, path).version == version
        if script:  # for --help and for --version, each time where it is worked out what starts
            asked = 2 * times if str(inside) in path.read_text() else 4 * times
            assert len(Path("asked").read_text()) == asked


def test_wheel_when_path_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("PATH", str(tmp_path))

    engine = locate()

    assert engine.kind is EngineKind.EMBEDDED
    said = [
        subprocess.run([*engine.command, flag], capture_output=True, text=True, check=True).stdout
        for flag in ("--help", "--version")
    ]
    assert engine.dialect.options == parse_help(said[0]).options
    assert engine.version in said[1]
    assert engine.command[0] == sys.executable
    assert "xllamacpp" in engine.version
    assert engine.dialect.option("--n-gpu-layers")


def test_none_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "xllamacpp", None)

    with pytest.raises(EngineNotFoundError) as refusal:
        locate()

    for way in ("kitty_nb[embedded]", "PATH", "LLAMACPP_BIN"):
        assert way in str(refusal.value)


def test_binary_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such file"):
        locate(tmp_path / "llama-server")
    with pytest.raises(EngineError, match="without a llama-server"):
        locate(tmp_path)


def test_binary_that_may_not_be_run(program: Callable[[str], Path]) -> None:
    path = program("exit 0")
    path.chmod(0o644)

    with pytest.raises(EngineError, match=r"chmod \+x"):
        locate(path)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("exit 3", "nothing, and exited with code 3"),
        ("kill -ILL $$", "nothing, and exited with code -4"),
        ("echo; echo 'libllama.so: cannot open' >&2; exit 127", "libllama.so: cannot open"),
        ("echo 'usage: some other program'", "usage: some other program"),
        ("exec sleep 60", r"nothing within 0\.2 s"),
    ],
)
def test_binary_that_does_not_answer(
    program: Callable[[str], Path], body: str, reason: str
) -> None:
    path = program(body)

    with pytest.raises(EngineError, match=reason) as refusal:
        locate(path, 0.2 if "sleep" in body else 20)
    assert str(path) in str(refusal.value)


def test_binary_of_another_machine(program: Callable[[str], Path]) -> None:
    path = program("")
    path.write_bytes(b"\x7fELF" + bytes(60))

    with pytest.raises(EngineError, match="Exec format error"):
        locate(path)
