"""Asking the engine itself how much memory a model would need.

llama-server says so in its log before it reads any weights: with `--log-jsonl` in one line, else at
a high verbosity in a table. It is started on an outline of the model, see
`kitty_nb.catalog.gguf_outline`, and ended there.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.to_thread

from kitty_nb.catalog.gguf_outline import write_outline
from kitty_nb.catalog.memory import Needs, Place
from kitty_nb.catalog.model_shape import read_layouts
from kitty_nb.config import server_environment
from kitty_nb.engine.command_line import build_command
from kitty_nb.supervisor.log_file import LogTail
from kitty_nb.supervisor.memory_settings import draft_config
from kitty_nb.supervisor.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Engine

_MIB = 1 << 20
_POLL = 0.002  # seconds
_ANSWER_WITHIN = 20.0  # seconds; a GPU's driver can take its time when it is used first
# What would leave traces, take long or disturb a server that runs, and does not change the answer.
_LEFT_OUT = {
    "--log-file", "--log-disable", "--log-prompts-dir", "--mcp-servers-config",
    "--mcp-servers-json", "--tools", "--mmproj", "--fit", "--no-log-jsonl", "--verbosity",
    "--model-draft",
}  # fmt: skip
_TELLING = "5"  # the verbosity that shows the table, in builds of every year
# E.g. `… |   - Host               |                  296 =   222 +      49 +      24        |`. A
# device's row begins with its total and free memory, and ends in what others hold of it.
_ROW = re.compile(r"\|   - (?P<name>.+?) +\|(?P<numbers>[-+=()\d ]+)\|\s*$")
_DEVICE_NUMBERS = 7  # total, free, self, model, context, compute, unaccounted; others have four


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
    knows = engine.dialect.option
    return bool(knows("--fit") and (knows("--log-jsonl") or knows("--verbosity")))


async def ask_engine(engine: Engine, config: ServerConfig) -> Answer | None:
    """Ask how much memory the model of `config` would need with its settings.

    A draft model is asked for by itself, and added: builds differ in how they tell of it.
    Nothing is left behind, also when this is cancelled: no process, no file.

    Returns:
        None when the engine does not answer; a start with these settings says why.

    Raises:
        KittyError: The model cannot be read, or the engine does not know a setting.
        OSError: The engine cannot be run, or the temporary folder not be written.
    """
    answer = await _ask(engine, config)
    draft = draft_config(config)
    if answer is None or draft is None:
        return answer
    beside = await _ask(engine, draft)
    return beside and _together(answer, beside)


async def _ask(engine: Engine, config: ServerConfig) -> Answer | None:
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
    telling = () if engine.dialect.option("--log-jsonl") else ("--verbosity", _TELLING)
    changes = {
        "model": outline,
        "projector": None,
        "host": "127.0.0.1",
        "port": 0,
        "extra_args": (*words, "--fit", "on", *telling, *missing),
    }
    return build_command(engine, config.model_copy(update=changes))


async def _wait_for_answer(process: ServerProcess, log: LogTail) -> Answer | None:
    async with anyio.create_task_group() as tasks:
        ended = anyio.Event()

        async def watch() -> None:
            await process.wait()
            ended.set()

        tasks.start_soon(watch)
        reader, answer = AnswerReader(), None
        while answer is None:
            over = ended.is_set()
            answer = next(filter(None, map(reader.read, log.read(to_end=over))), None)
            if over:
                break
            with anyio.move_on_after(_POLL):
                await ended.wait()
        tasks.cancel_scope.cancel()
    return answer


class _Row(NamedTuple):
    """The needs in one place; None is RAM."""

    place: Place | None
    needs: Needs


@dataclass(slots=True)
class AnswerReader:
    """Reads the answer out of a log, line by line."""

    _table: list[_Row] = field(default_factory=list)

    def read(self, line: str) -> Answer | None:
        """Return the answer once it is complete, which of a table is at the line after it."""
        if "fit_memory_breakdown" in line:
            return _from_json(line)
        if row := _ROW.search(line):
            self._table.append(_from_text(row["name"], row["numbers"]))
            return None
        return _answer(self._table) if self._table else None


def _together(answer: Answer, beside: Answer) -> Answer:
    """Add up what two models need in each place."""
    gpus = {place.name: (place, needs) for place, needs in answer.gpus}
    for place, needs in beside.gpus:
        _, already = gpus.get(place.name, (place, Needs(0, 0, 0)))
        gpus[place.name] = place, already + needs
    return Answer(answer.ram + beside.ram, tuple(gpus.values()))


def _answer(rows: Iterable[_Row]) -> Answer:
    ram, gpus = Needs(0, 0, 0), []
    for place, needs in rows:
        if place:
            gpus.append((place, needs))
        else:
            ram += needs
    return Answer(ram, tuple(gpus))


def _from_text(name: str, text: str) -> _Row:
    numbers = [int(number) * _MIB for number in re.findall(r"-?\d+", text)]
    if len(numbers) < _DEVICE_NUMBERS:
        return _Row(None, Needs(*numbers[-3:]))
    total, free, _, *parts, _ = numbers
    return _Row(Place(name, free, total), Needs(*parts))


def _from_json(line: str) -> Answer | None:
    try:
        return _answer(map(_json_row, json.loads(line)["data"]["rows"]))
    except (ValueError, TypeError, KeyError):
        return None  # a later build may say it otherwise


def _json_row(row: dict[str, Any]) -> _Row:
    needs = Needs(*(int(row[part]) * _MIB for part in ("model", "context", "compute")))
    if row["kind"] != "device":
        return _Row(None, needs)
    about = f" ({row['description']})" if row.get("description") else ""
    place = Place(f"{row['name']}{about}", int(row["free"]) * _MIB, int(row["total"]) * _MIB)
    return _Row(place, needs)
