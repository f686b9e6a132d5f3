"""Faults before a server runs: each row on the real engine, unless only the stand-in
can produce it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import STAND_IN, eventually
from faults import CRASHED, FAILED, READY, STOPPED, Case, Fault
from model_files import split_model

from kitty_nb import ServerConfig


def write(content: bytes | str) -> Any:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda case: case.model.write_bytes(data)


def cut(case: Case) -> None:
    os.truncate(case.model, case.model.stat().st_size - 100_000)
    os.utime(case.model, (0, 0))  # just written, it would count as still being downloaded


def rename_architecture(case: Case) -> None:
    length = b"\x05" + b"\0" * 7
    data = case.model.read_bytes().replace(length + b"llama", length + b"other", 1)
    case.model.write_bytes(data)


def unmount_models(case: Case) -> None:
    case.model.parent.rename(case.folder / "elsewhere")


def shards(case: Case) -> list[Path]:
    paths = split_model(case.model, case.folder / "models")
    case.change(model=paths[0])
    return paths


def lose_shard(case: Case) -> None:
    shards(case)[1].unlink()


def lose_shard_late(case: Case) -> None:
    case.at_spawn(shards(case)[1].unlink)


def hold_port(case: Case) -> None:
    case.heal.enter_context(socket.create_server(("127.0.0.1", case.config.port)))


def steal_port(case: Case) -> None:
    case.at_spawn(lambda: hold_port(case))


def steal_port_by_server(case: Case) -> None:
    """Another llama-server takes the port, and answers there that it is well."""

    def steal() -> None:
        command = [sys.executable, "-P", STAND_IN, "-m", case.model, "-a", "other"]
        address = ["--host", "127.0.0.1", "--port", str(case.config.port)]
        thief = subprocess.Popen([*command, *address], stderr=subprocess.DEVNULL)
        case.heal.callback(thief.communicate)
        case.heal.callback(thief.kill)
        eventually(lambda: _answers(case.config.port))

    case.at_spawn(steal)


def _answers(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def program(text: str, mode: int = 0o755) -> Any:
    """A binary of the user's, with the stand-in's flags where it can tell them."""

    def put(case: Case) -> None:
        path = case.folder / "bin" / "llama-server"
        path.parent.mkdir()
        path.write_text(text.format(python=sys.executable, stand_in=STAND_IN))
        path.chmod(mode)
        case.change(binary=path)

    return put


ASKED = '#!/bin/sh\ncase "$1" in --help|--version) exec "{python}" "{stand_in}" "$@";; esac\n'


def lose_program(case: Case) -> None:
    program(ASKED)(case)
    assert case.config.binary
    case.config.binary.unlink()


def dead_proxy(case: Case) -> None:
    patch = case.heal.enter_context(pytest.MonkeyPatch.context())
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        patch.setenv(name, "http://127.0.0.1:9")


def flags(*words: str) -> dict[str, Any]:
    return {"extra_args": words}


MODEL = [
    Fault("model deleted", STOPPED, "no such file", before=lambda case: case.model.unlink()),
    Fault("models folder unmounted", STOPPED, "no such file", before=unmount_models),
    Fault(
        "model deleted after the last check",
        CRASHED,
        "File not found",
        before=lambda case: case.at_spawn(case.model.unlink),
    ),
    Fault("empty model", CRASHED, "truncated or damaged", before=write(b"")),
    Fault(
        "pointer of git-lfs instead of a model",
        CRASHED,
        "not a GGUF file",
        before=write("version https://git-lfs"),
    ),
    Fault(
        "truncated model",
        CRASHED,
        "not within the file bounds.*ends before its last weights.*download it",
        before=cut,
    ),
    Fault("unknown architecture", CRASHED, "the architecture 'other'", before=rename_architecture),
    Fault("missing shard", STOPPED, "1 of its 3 shards are missing", before=lose_shard),
    Fault(
        "shard deleted after the last check", CRASHED, "shard of the model", before=lose_shard_late
    ),
]
SETTINGS = [
    Fault(
        "flag that no build knows",
        FAILED,
        "--ctx-sise.*--ctx-size",
        changes=flags("--ctx-sise", "5"),
    ),
    Fault(
        "flag with a value that it refuses",
        CRASHED,
        "refused the value of -b",
        changes=flags("-b", "many"),
    ),
    Fault(
        "flag that the panel owns",
        FAILED,
        "set LLAMACPP_PRIMARY_PORT instead",
        changes=flags("--port", "1"),
    ),
    Fault(
        "flag that only prints",
        CRASHED,
        "without starting to serve",
        changes=flags("--version"),
    ),
    Fault(
        "projector of another model",
        CRASHED,
        "cannot load the projector",
        before=lambda case: case.change(extra_args=("--mmproj", str(case.model))),
    ),
    Fault(
        "model as an adapter",
        CRASHED,
        "not an adapter for this model",
        before=lambda case: case.change(extra_args=("--lora", str(case.model))),
    ),
    Fault(
        "chat template that is none",
        CRASHED,
        "chat template",
        changes=flags("--chat-template", "{{ unclosed"),
    ),
    Fault(
        "cache type without what it takes",
        CRASHED,
        "needs flash attention",
        changes=flags("-ctv", "q8_0") | {"flash_attention": "off"},
    ),
    Fault(
        "more slots than there can be", CRASHED, "with these settings", changes={"parallel": 1000}
    ),
]
ENGINE = [
    Fault("engine deleted", FAILED, "no such file", before=lose_program),
    Fault("engine that may not be run", FAILED, "chmod", before=program(ASKED, mode=0o644)),
    Fault("engine for another machine", FAILED, "Exec format error", before=program("\x7fELF")),
    Fault(
        "engine whose library is missing",
        CRASHED,
        "needs libcudart.so.12, which this system lacks",
        before=program(
            ASKED
            + "echo 'llama-server: error while loading shared libraries: libcudart.so.12: cannot"
            " open shared object file' >&2; exit 127"
        ),
    ),
]
PORT = [
    Fault("port busy", FAILED, "Port .* in use by .*LLAMACPP_PRIMARY_PORT", before=hold_port),
    Fault(
        "port stolen between check and bind",
        CRASHED,
        r"The port is in use.* in use by \S+ \(PID \d+\)",
        before=steal_port,
    ),
    Fault(
        "port stolen by another llama-server",
        CRASHED,
        r"The port is in use.* in use by \S+ \(PID \d+\)",
        before=steal_port_by_server,
    ),
    Fault("host of another machine", FAILED, "not an address", changes={"host": "192.0.2.1"}),
    Fault("proxy that is not there", READY, "Model loaded", before=dead_proxy),
]


@pytest.mark.parametrize("fault", [*MODEL, *SETTINGS, *ENGINE, *PORT], ids=lambda fault: fault.name)
def test_what_is_wrong_before_the_start_is_said(
    fault: Fault, config: ServerConfig, tmp_path: Path, stand_in: Path
) -> None:
    pytest.importorskip("xllamacpp")
    fault.check(config, tmp_path, stand_in)
