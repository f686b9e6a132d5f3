"""What a server will need of memory, by formula and by asking the engine."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import compress, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.to_thread
import psutil

from kitty_nb.catalog.catalog import why_not_served
from kitty_nb.catalog.gguf import write_outline
from kitty_nb.catalog.memory import (
    CACHE_TYPES,
    Draft,
    Memory,
    MemoryPreview,
    MemorySettings,
    Needs,
    Place,
    Verdict,
    estimate,
    plan,
    preview,
)
from kitty_nb.catalog.model import total_size
from kitty_nb.catalog.model_shape import read_layouts, read_shape
from kitty_nb.config import PROJECTOR, FlashAttention, server_environment, value_of
from kitty_nb.engine.command_line import build_command
from kitty_nb.engine.devices import engine_devices, remote_machines
from kitty_nb.errors import KittyError, ModelFileError
from kitty_nb.supervisor.free_memory import free_memory, with_devices
from kitty_nb.supervisor.log import LogTail
from kitty_nb.supervisor.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from kitty_nb.catalog.model_shape import ModelShape
    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.devices import Device
    from kitty_nb.engine.locate import Engine


_NUMBERS = {
    "-c": "context", "--ctx-size": "context",
    "-np": "sequences", "--parallel": "sequences",
    "-b": "batch", "--batch-size": "batch",
    "-ub": "micro_batch", "--ubatch-size": "micro_batch",
    "-ngl": "gpu_layers", "--gpu-layers": "gpu_layers", "--n-gpu-layers": "gpu_layers",
}  # fmt: skip
_WORDS = {
    "-ctk": "cache_type_k", "--cache-type-k": "cache_type_k",
    "-ctv": "cache_type_v", "--cache-type-v": "cache_type_v",
}  # fmt: skip
_SWITCHES = {
    "-kvu": ("unified", True), "--kv-unified": ("unified", True),
    "-no-kvu": ("unified", False), "--no-kv-unified": ("unified", False),
    "-nkvo": ("cache_on_gpu", False), "--no-kv-offload": ("cache_on_gpu", False),
    "--swa-full": ("full_window", True),
    "--embedding": ("scores_all", True), "--embeddings": ("scores_all", True),
    "--rerank": ("scores_all", True), "--reranking": ("scores_all", True),
}  # fmt: skip
_FILES = {*PROJECTOR, "--lora", "--lora-scaled"}
_DRAFT = {"-md", "--model-draft", "--spec-draft-model"}
# What a draft model has settings of its own for, by the flag of the model's.
_DRAFT_FLAGS = {
    "-ngld": "-ngl", "--gpu-layers-draft": "-ngl", "--n-gpu-layers-draft": "-ngl",
    "--spec-draft-ngl": "-ngl",
    "-ctkd": "-ctk", "--cache-type-k-draft": "-ctk", "--spec-draft-type-k": "-ctk",
    "-ctvd": "-ctv", "--cache-type-v-draft": "-ctv", "--spec-draft-type-v": "-ctv",
    "-devd": "-dev", "--device-draft": "-dev", "--spec-draft-device": "-dev",
}  # fmt: skip
# What is left out of the draft model's settings, each with a value.
_NOT_OF_DRAFT = (
    _DRAFT
    | _FILES
    | {*_DRAFT_FLAGS, *_WORDS, "-dev", "--device", "--spec-type"}
    | {flag for flag, name in _NUMBERS.items() if name == "gpu_layers"}
)
# Tokens that speculation without a draft model proposes at once.
_DRAFTED_BY = {
    "none": 0, "ngram-simple": 48, "ngram-map-k": 48, "ngram-map-k4v": 48, "ngram-mod": 64,
    "ngram-cache": 8,
}  # fmt: skip
_MOST_DRAFTED = {"--spec-draft-n-max", "--draft", "--draft-n", "--draft-max"}
_DRAFTED = 3  # unless told
_ALL_LAYERS = 999
_OLD_CONTEXT = 4096  # what builds without --fit take unless told


def settings_of(config: ServerConfig, engine: Engine | None = None) -> MemorySettings:
    """Read what decides about memory from a server's settings, `extra_args` last.

    Args:
        config: The settings. Values that the engine would refuse are passed over.
        engine: Older builds have other defaults; None stands for a build of today.
    """
    has_fit = engine is None or engine.dialect.option("--fit") is not None
    given: dict[str, Any] = {
        "context": config.context_size,
        "sequences": config.parallel,
        "batch": config.batch_size,
        "micro_batch": config.ubatch_size,
        "gpu_layers": None if config.n_gpu_layers == -1 else config.n_gpu_layers,
        "flash_attention": config.flash_attention is not FlashAttention.OFF,
        "fits": has_fit,
        "draft": _draft_model(config, engine),
    } | _from_words(config.extra_args, config.projector)
    if not has_fit:
        given["scores_all"] = True
    if (given["sequences"] or 0) < 1:  # llama-server's automatic choice, as -1 layers are
        given |= {"sequences": 4 if has_fit else 1, "unified": True}
    else:
        given.setdefault("unified", False)
    if not has_fit:
        given["gpu_layers"] = given["gpu_layers"] or 0
        given["context"] = _OLD_CONTEXT if given["context"] is None else given["context"]
    return MemorySettings(**{name: value for name, value in given.items() if value is not None})


def offloads(config: ServerConfig) -> bool:
    """Tell whether a device, where there is one, gets a part of the model. It blocks."""
    return settings_of(config).gpu_layers != 0


def projected(config: ServerConfig) -> bool:
    """Tell whether a projector is loaded beside the model."""
    return config.projector is not None or value_of(config.extra_args, PROJECTOR) is not None


def draft_config(config: ServerConfig) -> ServerConfig | None:
    """Return the settings that the model's draft model is loaded with; None without one."""
    model: str | None = None
    words: list[str] = []
    for flag, value in pairwise((*config.extra_args, "")):
        if flag in _DRAFT:
            model = value
        elif own := _DRAFT_FLAGS.get(flag):
            words += [own, value]
    if model is None:
        return None
    shared = _without(config.extra_args, _NOT_OF_DRAFT)
    changes = {
        "model": Path(model),
        "projector": None,
        "n_gpu_layers": None,
        "extra_args": (*shared, *words),
    }
    return config.model_copy(update=changes)


def _draft_model(config: ServerConfig, engine: Engine | None) -> Draft | None:
    draft = draft_config(config)
    if draft is None or draft.model is None:
        return None
    with suppress(ModelFileError):  # starting it says what is wrong
        settings = settings_of(draft, engine)
        layers = _ALL_LAYERS if settings.gpu_layers is None else settings.gpu_layers
        return Draft(read_shape(draft.model), replace(settings, gpu_layers=layers))
    return None


def _without(words: tuple[str, ...], flags: Collection[str]) -> tuple[str, ...]:
    """Leave flags out, with the value that follows each."""
    kept = [True] * len(words)
    for number, word in enumerate(words):
        if word in flags:
            kept[number : number + 2] = [False] * len(kept[number : number + 2])
    return tuple(compress(words, kept))


def _from_words(words: tuple[str, ...], projector: Path | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    files = [str(projector)] if projector else []
    kinds: list[str] = []
    most = _DRAFTED
    for flag, value in pairwise((*words, "")):
        if flag in _SWITCHES:
            name, choice = _SWITCHES[flag]
            given[name] = choice
        elif flag in _WORDS and value in CACHE_TYPES:
            given[_WORDS[flag]] = value
        elif flag in _NUMBERS:
            with suppress(ValueError):
                number = _ALL_LAYERS if value == "all" else int(value)
                given[_NUMBERS[flag]] = number if number >= 0 else None
        elif flag in {"-fa", "--flash-attn"}:
            given["flash_attention"] = value != "off"
        elif flag in {"-fit", "--fit"} and value == "off":
            given["fits"] = False
        elif flag == "--pooling" and value != "none":
            given["scores_all"] = True
        elif flag == "--spec-type":
            kinds = value.split(",")
        elif flag in _MOST_DRAFTED and value.isdigit():
            most = int(value)
        elif flag in _FILES:
            files += value.split(",") if flag.startswith("--lora") else [value]
    given["drafted"] = max((_DRAFTED_BY.get(kind, most) for kind in kinds), default=0)
    if files:
        given["extra_weights"] = sum(map(_file_size, files))
    return given


def _file_size(name: str) -> int:
    """The size of a file, which may be followed by `:` and a scale."""
    return total_size(Path(name)) or total_size(Path(name.rpartition(":")[0]))


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


# Tokens. Though the engine allocates no cache to answer, it was seen to take 50 bytes for each.
_LONGEST_ASKED = 1 << 22
_BUSY = (
    "The machines that --rpc names do not answer: they serve one client at a time. Stop the server"
    " that uses them to see whether it fits."
)
_ROUNDED = 2 << 20  # bytes that an answer may lack: a fraction of a MiB for each kind of buffer


class Running(NamedTuple):
    """A server that ends before another starts.

    Attributes:
        pid: Its process.
        config: What it was started with; None where somebody else has started it.
    """

    pid: int
    config: ServerConfig | None


class MemoryPreviewer:
    """Previews one profile's memory. It remembers what it has learned of the engine."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._devices: tuple[Device, ...] | None = None
        self._remote: str | None = None
        self._looks: set[anyio.CancelScope] = set()

    def close(self) -> None:
        """Call off all previews under way."""
        for look in self._looks:
            look.cancel()

    async def preview(
        self,
        config: ServerConfig,
        running: Running | None,
        on_preview: Callable[[MemoryPreview], object],
        delay: float,
    ) -> MemoryPreview:
        """Say what a model needs. See `Supervisor.preview_memory`.

        Args:
            config: What would be started.
            running: The server that would end before.
            on_preview: Called with the formula's result at once, and with the engine's.
            delay: Seconds to wait before the engine is asked.
        """
        latest = MemoryPreview(problem="It was called off.")

        def tell(result: MemoryPreview) -> None:
            nonlocal latest
            if result != latest:
                latest = result
                on_preview(result)

        with self._look():
            try:
                if config.model is None:
                    tell(MemoryPreview(problem="No model is chosen."))
                    return latest
                shape = await anyio.to_thread.run_sync(read_shape, config.model)
                measured = await anyio.to_thread.run_sync(free_memory, _pid(running))
                known = with_devices(measured, self._devices)
                tell(await _by_formula(config, self._engine, shape, known))
                await anyio.sleep(delay)
                with suppress(KittyError, OSError, psutil.Error):  # starting says what is wrong
                    engine, memory, busy = await self._find_devices(config, running, measured)
                    if memory is None:
                        tell(MemoryPreview(problem=_BUSY))
                    elif busy:
                        tell(await _by_formula(config, engine, shape, memory))
                    else:
                        tell(await _ask_memory_preview(engine, config, shape, memory))
            except ModelFileError as error:
                model = config.model
                told = await anyio.to_thread.run_sync(why_not_served, model) if model else None
                tell(MemoryPreview(problem=told or str(error)))
        return latest

    async def refusal(self, config: ServerConfig, running: Running | None) -> str:
        """Say why a model will not fit, as the preview has it; empty where it may.

        The engine is asked only where that could change the answer.
        """
        with self._look(), suppress(ModelFileError):  # starting says what is wrong
            if config.model is None:
                return ""
            shape = await anyio.to_thread.run_sync(read_shape, config.model)
            measured = await anyio.to_thread.run_sync(free_memory, _pid(running))
            wanted = await anyio.to_thread.run_sync(settings_of, config)
            told = await _by_formula(config, None, shape, Memory(measured.ram))
            # What is left to the engine goes to its devices as far as they have room.
            its_choice = wanted.fits and not wanted.gpu_layers and not wanted.draft
            if its_choice and told.verdict is Verdict.FITS:
                return ""
            with suppress(KittyError, OSError, psutil.Error):
                engine, memory, busy = await self._find_devices(config, running, measured)
                if memory is None:
                    return ""
                told = await _by_formula(config, engine, shape, memory)
                if told.verdict is not Verdict.FITS and not busy:
                    told = await _ask_memory_preview(engine, config, shape, memory)
            return told.refusal
        return ""

    @contextmanager
    def _look(self) -> Iterator[None]:
        with anyio.CancelScope() as look:
            self._looks.add(look)
            try:
                yield
            finally:
                self._looks.discard(look)

    async def _find_devices(
        self, config: ServerConfig, running: Running | None, measured: Memory
    ) -> tuple[Engine, Memory | None, bool]:
        """The engine, the memory with that of its devices, and whether they are too busy to ask.

        The memory is None where nobody has seen those devices before.
        """
        self._engine, devices = await engine_devices(config)
        remote = remote_machines(config)
        busy = remote is not None and devices is None
        if not busy:
            self._devices, self._remote = devices, remote
        elif self._remote != remote:
            return self._engine, None, busy
        memory = with_devices(measured, self._devices)
        if running and running.config and memory.gpus:
            memory = await anyio.to_thread.run_sync(
                _given_back, memory, running.config, self._engine
            )
        return self._engine, memory, busy


async def _by_formula(
    config: ServerConfig, engine: Engine | None, shape: ModelShape, memory: Memory
) -> MemoryPreview:
    wanted = await anyio.to_thread.run_sync(settings_of, config, engine)
    return preview(shape, plan(shape, wanted, memory), memory)


async def _ask_memory_preview(
    engine: Engine, config: ServerConfig, shape: ModelShape, memory: Memory
) -> MemoryPreview:
    """Ask the engine, and once more when it uses other devices than it lists."""
    wanted = await anyio.to_thread.run_sync(settings_of, config, engine)
    settings = plan(shape, wanted, memory)
    if not can_answer(engine) or (settings.context or 0) > _LONGEST_ASKED:
        return preview(shape, settings, memory)
    for _ in range(2):
        changes: dict[str, object] = {"context_size": settings.context}
        if memory.gpus:
            changes["n_gpu_layers"] = settings.gpu_layers
        answer = await ask_engine(engine, config.model_copy(update=changes))
        if answer is None:
            return preview(shape, settings, memory)
        asked, (memory, needs) = settings, _placed(answer, memory)
        settings = plan(shape, wanted, memory)
        if settings == asked:
            break
    needs = (*needs[:-1], needs[-1] + Needs(wanted.extra_weights, 0, 0))
    formula = estimate(shape, asked, memory.gpus)
    told = preview(shape, asked, memory, tuple(map(_finer, needs, formula)))
    # What a projector needs beside its weights, nobody has said.
    return replace(told, exact=not projected(config))


def _pid(running: Running | None) -> int | None:
    return running.pid if running else None


def _given_back(memory: Memory, running: ServerConfig, engine: Engine) -> Memory:
    """Count in what a server holds on devices where nobody can measure that, by formula."""
    if running.model is None:
        return memory
    try:
        shape = read_shape(running.model)
    except ModelFileError:
        return memory
    empty = Memory(memory.ram, tuple(replace(gpu, free=gpu.total) for gpu in memory.gpus))
    settings = plan(shape, settings_of(running, engine), empty)

    def credited(gpu: Place, needs: Needs) -> Place:
        held = min(needs.total or needs.weights, gpu.total - gpu.free)
        return gpu if gpu.returned else replace(gpu, free=gpu.free + held, returned=held)

    needs = estimate(shape, settings, empty.gpus)[1:]
    return Memory(memory.ram, tuple(map(credited, memory.gpus, needs)))


def _finer(told: Needs, formula: Needs) -> Needs:
    """What the engine says in whole MiB, with the formula's bytes where they agree."""
    if told.total is None or formula.total is None:
        return told
    pairs = (
        (told.weights, formula.weights),
        (told.cache or 0, formula.cache or 0),
        (told.compute or 0, formula.compute or 0),
    )
    return Needs(*(own if 0 <= own - said < _ROUNDED else said for said, own in pairs))


def _placed(answer: Answer, memory: Memory) -> tuple[Memory, tuple[Needs, ...]]:
    """Bring together what the engine and the system say of this machine's memory."""
    if sys.platform == "darwin":  # its GPU works in RAM
        return Memory(memory.ram), (sum((needs for _, needs in answer.gpus), answer.ram),)
    # What is known already counts in what the running server will give back.
    known = {_id(place): place for place in memory.gpus}
    gpus = tuple(known.get(_id(place), place) for place, _ in answer.gpus)
    return Memory(memory.ram, gpus), (answer.ram, *(needs for _, needs in answer.gpus))


def _id(place: Place) -> str:
    """Return the engine's name of a device, e.g. `CUDA0`."""
    return place.name.partition(" (")[0]
