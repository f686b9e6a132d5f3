"""Asking the engine itself how much memory a model would need.

With `--log-jsonl` llama-server says so in its log before it reads any weights. It is started on an
outline of the model, see `kitty_nb.catalog.gguf_outline`, and ended at that line.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from kitty_nb.catalog.gguf_outline import write_outline
from kitty_nb.catalog.memory import Needs, Place
from kitty_nb.catalog.model_shape import read_layouts
from kitty_nb.config import server_environment
from kitty_nb.engine.command_line import build_command
from kitty_nb.supervisor.log_file import LogTail
from kitty_nb.supervisor.process import ServerProcess

if TYPE_CHECKING:
    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Engine

_MIB = 1 << 20
_POLL = 0.002  # seconds
_ANSWER_WITHIN = 20.0  # seconds; a GPU's driver can take its time when it is used first
# What would leave traces, take long or disturb a server that runs, and does not change the answer.
_LEFT_OUT = {
    "--log-file", "--log-disable", "--log-prompts-dir", "--mcp-servers-config",
    "--mcp-servers-json", "--tools", "--mmproj", "--fit", "--no-log-jsonl",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine says it needs.

    Attributes:
        ram: In RAM.
        gpus: On each device that it would use, with its memory as the engine sees it.
    """

    ram: Needs
    gpus: tuple[tuple[Place, Needs], ...]


def can_answer(engine: Engine) -> bool:
    """Whether this build of the engine says how much memory it needs."""
    return bool(engine.dialect.option("--log-jsonl") and engine.dialect.option("--fit"))


async def ask_engine(engine: Engine, config: ServerConfig) -> Answer | None:
    """Ask how much memory the model of `config` would need with its settings.

    Nothing is left behind, also when this is cancelled: no process, no file.

    Returns:
        None when the engine does not answer; a start with these settings says why.

    Raises:
        KittyError: The model cannot be read, or the engine does not know a setting.
        OSError: The engine cannot be run, or the temporary folder not be written.
    """
    if config.model is None:
        return None
    layouts = await anyio.to_thread.run_sync(read_layouts, config.model)
    with tempfile.TemporaryDirectory(prefix="kitty_nb-") as name:
        folder = Path(name)
        outline = await anyio.to_thread.run_sync(write_outline, layouts, folder)
        command = probe_command(engine, config, outline)
        process = ServerProcess.spawn(command, folder / "log", server_environment(api_key=None))
        try:
            with LogTail(folder / "log") as log, anyio.move_on_after(_ANSWER_WITHIN):
                return await _wait_for_answer(process, log)
        finally:
            process.kill()
            with anyio.CancelScope(shield=True):
                await process.wait()
    return None


def probe_command(engine: Engine, config: ServerConfig, outline: Path) -> tuple[str, ...]:
    """Return the command that starts `engine` on an outline instead of the model.

    It listens where nobody looks: on a port of this machine that the system picks. Should nobody
    be there to end it, because the kernel was killed, it ends by itself: after the weights it looks
    for an adapter that there is not.

    Raises:
        KittyError: See `build_command`.
    """
    words, dropping = [], 0
    for word in config.extra_args:
        option = None if dropping else engine.dialect.option(word)
        if option and _LEFT_OUT & {*option.flags}:
            dropping = 1 + option.values
        if not dropping:
            words.append(word)
        dropping = max(0, dropping - 1)
    has_adapters = engine.dialect.option("--lora")
    missing = ("--lora", str(outline.with_name("none"))) if has_adapters else ()
    changes = {
        "model": outline,
        "projector": None,
        "host": "127.0.0.1",
        "port": 0,
        "extra_args": (*words, "--fit", "on", *missing),
    }
    return build_command(engine, config.model_copy(update=changes))


async def _wait_for_answer(process: ServerProcess, log: LogTail) -> Answer | None:
    async with anyio.create_task_group() as tasks:
        ended = anyio.Event()

        async def watch() -> None:
            await process.wait()
            ended.set()

        tasks.start_soon(watch)
        answer = None
        while answer is None:
            over = ended.is_set()
            answer = next(filter(None, map(read_answer, log.read(to_end=over))), None)
            if over:
                break
            with anyio.move_on_after(_POLL):
                await ended.wait()
        tasks.cancel_scope.cancel()
    return answer


def read_answer(line: str) -> Answer | None:
    """Read a line of the log; None when it is not the one that tells."""
    if "fit_memory_breakdown" not in line:
        return None
    try:
        rows = json.loads(line)["data"]["rows"]
        ram = sum((_needs(row) for row in rows if row["kind"] != "device"), Needs(0, 0, 0))
        gpus = tuple((_place(row), _needs(row)) for row in rows if row["kind"] == "device")
    except (ValueError, TypeError, KeyError):
        return None  # a later build may say it otherwise
    return Answer(ram, gpus)


def _needs(row: dict[str, Any]) -> Needs:
    return Needs(*(int(row[part]) * _MIB for part in ("model", "context", "compute")))


def _place(row: dict[str, Any]) -> Place:
    name = str(row.get("description") or row["name"])
    return Place(name, int(row["free"]) * _MIB, int(row["total"]) * _MIB)
