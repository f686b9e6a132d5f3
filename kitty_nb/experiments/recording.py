"""Recording a run of a served model, and replaying it on a new server."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import psutil
from anyio.to_thread import run_sync
from pydantic import JsonValue, ValidationError
from rich.filesize import decimal

from kitty_nb.catalog.cache import digest_files
from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.model import shard_paths
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.client.protocol import broken_off, post, props
from kitty_nb.config.profiles import load_lenient
from kitty_nb.errors import ExperimentError, RunRecordError, ServerError
from kitty_nb.experiments.arguments import config_of, require, several
from kitty_nb.experiments.run_record import (
    Comparison,
    EngineFacts,
    Exchange,
    Gpu,
    HostFacts,
    ModelDigest,
    Request,
    RunRecord,
    compare,
)
from kitty_nb.isolated_server import (
    SERVER_SETTINGS,
    LoadSeconds,
    find_load,
    free_memory,
    gather_facts,
    in_background,
    isolated_server,
    locate_engine,
    ready_at,
    require_here,
)
from kitty_nb.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from kitty_nb.client import Access
    from kitty_nb.config import ServerConfig
    from kitty_nb.isolated_server import LoadProgress, ServerState
    from kitty_nb.manager import ModelManager

    OnBytes = Callable[[int, int], object]

_DIGITS = 12  # of a checksum in messages
_GGUF = re.compile(r"(.+\.gguf)(:[^:/]*)?", re.IGNORECASE | re.DOTALL)  # with an adapter's scale
_CPU_NAME = re.compile(r"^(?:model name|Model)\s*:\s*(.+)$", re.MULTILINE)  # proc_cpuinfo(5)
_LIBRARIES = ("kitty_nb", "xllamacpp", "gguf", "httpx", "anyio", "pydantic", "psutil", "numpy")


Prompt = str | Sequence[dict[str, JsonValue]] | Request


def record_run(
    manager: ModelManager,
    prompts: str | Request | Iterable[Prompt],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    on_progress: OnBytes | None = None,
    **parameters: JsonValue,
) -> Operation[RunRecord]:
    """Send requests to a manager's server, one after the other, and record the run.

    Answers are greedy by default, and with a temperature seeded, so that a replay can repeat them.

    Args:
        manager: A manager whose server is ready.
        prompts: User messages, one conversation each; conversations, as lists of messages; or
            requests, whose own parameters take precedence.
        max_tokens: Maximum length of an answer, in tokens.
        temperature: The sampling temperature; 0 means greedy.
        seed: The seed of sampling.
        on_progress: Called in a worker thread with the bytes hashed so far and their total, when
            a model is recorded for the first time.
        parameters: Other request parameters of llama-server, such as `top_k=1`.

    Raises:
        KittyError: The server is not ready, was not started by kitty_nb or runs on another machine,
            or a prompt is invalid. Waiting for the result raises ExperimentError if the server
            rejects a request, such as one that exceeds the context.
    """
    sampling: dict[str, JsonValue] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "cache_prompt": False,  # earlier requests must not influence the computation
        **parameters,
    }
    requests = [_request(prompt, sampling) for prompt in several(prompts)]
    require_here(manager.state.config)
    access, state = manager.access, manager.state
    if state.external:
        raise ExperimentError(
            f"{state.external.who} was not started by kitty_nb, so its model and settings are"
            " unknown. Start your own server, and record that one."
        )

    async def run() -> RunRecord:
        exchanges = await ask(access, requests)
        if manager.state.ready_since != state.ready_since:
            raise ExperimentError(
                "The server stopped or was restarted during the run, so the answers don't come from"
                " a single server. Start it, and record again."
            )
        return await describe_run(state, access, exchanges, seed, on_progress)

    return manager.run(run)


def replay(
    record: RunRecord, *, model: str | Path | None = None, config: ServerConfig | None = None
) -> Operation[Comparison]:
    """Repeat a recorded run on a new server with the recorded settings, and compare.

    The server stops when the replay ends or is cancelled; other servers aren't touched.

    Args:
        record: The run record.
        model: Another model to use. By default the recorded model, at its recorded path or else
            found by its checksum in the models folder.
        config: The settings of this machine, such as models folder and engine; by default those of
            `.env`.

    Raises:
        ExperimentError: An argument is wrong.
        ConfigError: `.env` can't be read. Waiting for the result raises RunRecordError if the
            recorded model isn't found, or any error of starting a server or sending requests.
    """
    require("record", record, RunRecord, "a RunRecord, such as RunRecord.load('run.json')")
    here = load_lenient(profile=record.profile)[0] if config is None else config_of(config)
    progress: deque[LoadProgress] = deque(maxlen=1)

    async def repeat() -> Comparison:
        asked = await settings_of(record, here, model)
        async with isolated_server(asked, anyway=True, on_progress=progress.append) as server:
            exchanges = await ask(server.access, (one.request for one in record.exchanges))
            repeated = await describe_run(server.state, server.access, exchanges, record.seed)
            return compare(record, repeated)

    future = in_background(repeat, "kitty_nb replay")[1]
    return Operation(future, lambda: progress[-1] if progress else None)


async def settings_of(
    record: RunRecord, here: ServerConfig, model: str | Path | None = None
) -> ServerConfig:
    """Return the settings for replaying a run on this machine, perhaps with another model."""
    require_here(here)
    own = here.replace(
        **record.config.model_dump(include=set(SERVER_SETTINGS)),
        profile=record.profile,
        alias=record.config.alias,
        model=model,
        allow_absolute_paths=True,
    )
    return await (run_sync(resolve_model, own) if model else _find(record, own))


async def ask(access: Access, requests: Iterable[Request]) -> tuple[Exchange, ...]:
    """Send requests to a server, one after the other."""
    try:
        async with access.async_http() as http:
            return tuple([await _ask(http, request) for request in requests])
    except httpx.HTTPError as error:
        raise ExperimentError(broken_off(error)) from error
    except ServerError as error:
        raise ExperimentError(str(error)) from error


async def describe_run(
    state: ServerState,
    access: Access,
    exchanges: tuple[Exchange, ...],
    seed: int,
    on_progress: OnBytes | None = None,
) -> RunRecord:
    """Build the record of a ready server and its answers."""
    config = state.config
    engine = await locate_engine(config.binary)
    load = await find_load(state)
    facts = await run_sync(gather_facts, config)
    async with access.async_http() as http:
        served = await props(http)
    ready_ns = ready_at(state) * 1e9
    if facts.mtime_ns != load.mtime_ns if load else facts.mtime_ns > ready_ns:
        raise ExperimentError(
            f"{config.model} has changed since this server loaded it, so the model behind the"
            " answers is unknown. Restart the server, and record again."
        )
    return RunRecord(
        made=datetime.now(UTC),
        config=config,
        model=await digest_model(config, on_progress),
        header=facts.digest,
        engine=EngineFacts(
            kind=engine.kind,
            version=engine.version,
            build=str(served.get("build_info", "")),
            devices=state.devices,
        ),
        host=await run_sync(host_facts),
        libraries=await run_sync(library_versions),
        seed=seed,
        load_seconds=LoadSeconds(load.starting, load.loading, load.preparing, load.cached)
        if load
        else None,
        exchanges=exchanges,
    )


async def digest_model(config: ServerConfig, on_progress: OnBytes | None = None) -> ModelDigest:
    """Hash all files of the model that a server with these settings serves."""
    shards = shard_paths(config.model) if config.model else ()
    paired = filter(None, (config.projector, config.drafter))
    words = (part for word in config.extra_args for part in word.split(","))
    named = (Path(found[1]) for word in words if (found := _GGUF.fullmatch(word)))
    files = (*shards, *paired, *named)
    digests = await run_sync(digest_files, files, on_progress or (lambda *_: None))
    return ModelDigest(shards=digests[: len(shards)], companions=digests[len(shards) :])


def _request(prompt: Prompt, sampling: dict[str, JsonValue]) -> Request:
    if isinstance(prompt, Request):
        return prompt.model_copy(update={"parameters": {**sampling, **prompt.parameters}})
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    try:
        return Request.model_validate({"messages": prompt, "parameters": sampling})
    except ValidationError as error:
        raise ExperimentError(
            f"Not a valid prompt: {prompt!r}. Give a text, a list of messages such as"
            ' {"role": "user", "content": "…"}, or a Request.'
        ) from error


async def _find(record: RunRecord, own: ServerConfig) -> ServerConfig:
    """Return the settings with the present path of the recorded model."""
    wanted, recorded = record.model, record.config.model
    paths = [recorded] if recorded and await anyio.Path(recorded).is_file() else []
    fate = "has changed" if paths else "is gone"
    for path in paths + await run_sync(_similar_models, record, own):
        config = await run_sync(resolve_model, own.replace(model=path))
        found = (await digest_model(config)).shards
        if [one.sha256 for one in found] == [one.sha256 for one in wanted.shards]:
            return config
    digest = wanted.shards[0].sha256[:_DIGITS] if wanted.shards else "unknown"
    raise RunRecordError(
        f"The recorded model {fate}: {recorded}, {decimal(wanted.size)}, SHA-256 {digest}…"
        f" It is not in {own.models_dir} either. Put it back, set LLAMACPP_MODELS_DIR to the"
        " folder that has it, or compare with another model: replay(record, model=…)."
    )


def _similar_models(record: RunRecord, own: ServerConfig) -> list[Path]:
    """Return the models in the folder whose size and header match the record."""
    return [
        model.path
        for model in ModelCatalog(own.models_dir).scan()
        if model.startable
        and model.size == record.model.size
        and gather_facts(own.replace(model=model.path)).digest == record.header
    ]


async def _ask(http: httpx.AsyncClient, request: Request) -> Exchange:
    return exchange_of(request, await post(http, request.path, request.body, "choices"))


def exchange_of(request: Request, answer: dict[str, Any]) -> Exchange:
    """Parse the server's answer to a request."""
    choice: dict[str, Any] = next(iter(answer["choices"]), {})
    message = choice.get("message", {"content": choice.get("text")})
    calls = message.get("tool_calls") or ()
    return Exchange(
        request=request,
        output=message.get("content") or "",
        reasoning=message.get("reasoning_content") or "",
        tool_calls=tuple({key: call[key] for key in call if key != "id"} for call in calls),
        finish_reason=choice.get("finish_reason"),
        timings=answer.get("timings"),
    )


def host_facts() -> HostFacts:
    """Describe this machine. Blocking, because it queries drivers and programs."""
    memory = free_memory()
    affinity = getattr(os, "sched_getaffinity", None)  # macOS pins nothing
    return HostFacts(
        name=platform.node(),
        cpu=_cpu_name() or platform.machine(),
        cores=psutil.cpu_count(logical=False),
        threads=psutil.cpu_count(),
        usable_threads=len(affinity(0)) if affinity else psutil.cpu_count(),
        ram=memory.ram.total,
        gpus=tuple(Gpu(name=gpu.name, memory=gpu.total) for gpu in memory.gpus),
        os=platform.platform(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
    )


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that a run depends on."""
    return {name: version(name) for name in _LIBRARIES if find_spec(name)}


def _cpu_name() -> str:
    if psutil.MACOS:
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    with suppress(OSError):
        if found := _CPU_NAME.search(Path("/proc/cpuinfo").read_text(errors="replace")):
            return found[1]
    return ""
