"""`RunRecord`: what a served model was asked and all that its answers depend on, as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil
from anyio.to_thread import run_sync
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from kitty_nb.catalog.cache import FileDigest, digest_files
from kitty_nb.catalog.model import shard_paths
from kitty_nb.client import broken_off, post, props
from kitty_nb.config import ServerConfig, takes_secret
from kitty_nb.errors import ConfigError, ExperimentError, RunRecordError, ServerError
from kitty_nb.isolated_server import (
    EngineKind,
    LoadSeconds,
    find_load,
    free_memory,
    gather_facts,
    locate_engine,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kitty_nb.client import Access
    from kitty_nb.isolated_server import ServerState
    from kitty_nb.manager import ModelManager, Operation

    OnBytes = Callable[[int, int], object]

# One higher whenever an older version of this package would misread a record.
SCHEMA_VERSION = 1
_GGUF = re.compile(r"(.+\.gguf)(:[^:/]*)?", re.IGNORECASE | re.DOTALL)  # with an adapter's scale
_CPU_NAME = re.compile(r"^(?:model name|Model)\s*:\s*(.+)$", re.MULTILINE)  # proc_cpuinfo(5)
_LIBRARIES = ("kitty_nb", "xllamacpp", "gguf", "httpx", "anyio", "pydantic", "psutil", "numpy")


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class Gpu(_Facts):
    """A GPU as its driver names it, and its own memory in bytes."""

    name: str
    memory: int


class HostFacts(_Facts):
    """A machine.

    Attributes:
        name: Its name on the network.
        cpu: The processor's name.
        cores: Cores of the processor, where the system tells.
        threads: Hardware threads of the processor.
        usable_threads: Those that this program may use.
        ram: Bytes of memory.
        gpus: NVIDIA's GPUs; a Mac's belongs to its processor.
        os: The operating system with its version.
        python: Python's implementation and version.
    """

    name: str
    cpu: str
    cores: int | None
    threads: int | None
    usable_threads: int | None
    ram: int
    gpus: tuple[Gpu, ...]
    os: str
    python: str


class ModelDigest(_Facts):
    """The identity of a model.

    Attributes:
        shards: Its own files, first to last.
        companions: The other GGUF files that the server reads: a projector, adapters, a draft
            model.
    """

    shards: tuple[FileDigest, ...]
    companions: tuple[FileDigest, ...] = ()

    @property
    def name(self) -> str:
        """The name of its first file."""
        return self.shards[0].name if self.shards else ""

    @property
    def size(self) -> int:
        """Bytes of the shards."""
        return sum(shard.size for shard in self.shards)


class EngineFacts(_Facts):
    """The engine that served the model.

    Attributes:
        kind: A llama-server of its own, or the one inside a wheel.
        version: What the program calls itself, e.g. `11434 (abc123)`.
        build: What the running server calls itself, e.g. `b11434-abc123`; empty where it does not.
        devices: The devices beside the processor that it had put the model on.
    """

    kind: EngineKind
    version: str
    build: str = ""
    devices: tuple[str, ...] = ()


class Timings(_Facts):
    """The server's figures for one request: `n` are tokens, `ms` milliseconds.

    Attributes:
        cache_n: Tokens of the prompt that it still knew.
        prompt_n: Tokens of the prompt that it read.
        predicted_n: Tokens of the answer.
    """

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    prompt_per_second: float | None = None
    predicted_n: int = 0
    predicted_ms: float = 0.0
    predicted_per_second: float | None = None


class Request(_Facts):
    """A prompt: a conversation, or a text to continue.

    Attributes:
        messages: The conversation in OpenAI's protocol.
        text: The text, without any template; instead of messages.
        parameters: What else is sent, such as sampling, seed and length of the answer.
    """

    messages: tuple[dict[str, JsonValue], ...] = ()
    text: str | None = None
    parameters: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("write either messages or a text")
        return self

    @property
    def path(self) -> str:
        """The server's path for it."""
        return "/v1/chat/completions" if self.text is None else "/v1/completions"

    @property
    def body(self) -> dict[str, JsonValue]:
        """What is sent there."""
        if self.text is None:
            return {"messages": list(self.messages), **self.parameters}
        return {"prompt": self.text, **self.parameters}


class Exchange(_Facts):
    """A request and its answer.

    Attributes:
        output: The answer.
        reasoning: What the model thought before, where the server keeps it apart.
        tool_calls: The tools that it calls in OpenAI's protocol, without ids: they never repeat.
        finish_reason: Why the answer ended: `stop`, or `length` when it was cut short.
        timings: What the server says of it, if it does.
    """

    request: Request
    output: str
    reasoning: str = ""
    tool_calls: tuple[dict[str, JsonValue], ...] = ()
    finish_reason: str | None = None
    timings: Timings | None = None

    @property
    def text(self) -> str:
        """All that the model wrote."""
        calls = (json.dumps(one, ensure_ascii=False, sort_keys=True) for one in self.tool_calls)
        return self.reasoning + self.output + "".join(calls)


class RunRecord(_Facts):
    """The prompts and answers of a served model, and everything they depend on.

    No key is in it: neither the server's, nor those that `extra_args` may hold.

    Attributes:
        made: When.
        config: What the server was started with. A replay takes from it what goes to llama-server
            itself, and uses its own folders, port and the like.
        header: Hash of the beginning of the model's first file, which tells most models apart.
        libraries: Versions by name.
        seed: Of all sampling.
        load_seconds: How long the load took; None where that is not known.
        exchanges: In order.
    """

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)
    made: AwareDatetime
    config: ServerConfig
    model: ModelDigest
    header: str
    engine: EngineFacts
    host: HostFacts
    libraries: dict[str, str]
    seed: int
    load_seconds: LoadSeconds | None = None
    exchanges: tuple[Exchange, ...] = ()

    def __repr__(self) -> str:
        return f"RunRecord(model={self.model.name!r}, exchanges={len(self.exchanges)})"

    __str__ = __repr__

    @property
    def profile(self) -> str:
        """The named set of settings that the server was started with."""
        return self.config.profile

    @property
    def outputs(self) -> tuple[str, ...]:
        """The answers, in order."""
        return tuple(exchange.output for exchange in self.exchanges)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record that `save` wrote.

        Raises:
            RunRecordError: There is none, it is damaged, or a later version wrote it.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise RunRecordError(
                f"Can't read {path}: {error.strerror or error}. Check the path."
            ) from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str | bytes, source: str = "The text") -> Self:
        """Read a record from the JSON of its file; `source` names it in errors.

        Raises:
            RunRecordError: It is damaged, or a later version wrote it.
        """
        try:
            schema = _Version.model_validate_json(text).schema_version
            if schema > SCHEMA_VERSION:
                raise RunRecordError(
                    f"A later version of kitty_nb wrote {source} (schema {schema}; this version"
                    f" reads {SCHEMA_VERSION}). Update: pip install --upgrade kitty_nb"
                )
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            reason = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        except ConfigError as error:
            reason = " ".join(map(str, error.problems))
        raise RunRecordError(
            f"{source} is not a run record, or is damaged: {reason.rstrip('.')}. Use an intact"
            " copy."
        )

    def save(self, path: str | Path) -> Path:
        """Write it to a file, whole or not at all, and return where.

        Raises:
            RunRecordError: The file cannot be written.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(f"{self.model_dump_json(indent=2)}\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise RunRecordError(
                f"Can't write {path}: {error.strerror or error}. Free some space, check the"
                " folder's permissions, or choose another place."
            ) from error
        return path

    @field_validator("config")
    @classmethod
    def _without_secrets(cls, config: ServerConfig) -> ServerConfig:
        words = config.extra_args
        kept = (
            word
            for before, word in zip(("", *words), words, strict=False)
            if not takes_secret(word) and not takes_secret(before)
        )
        return config.model_copy(update={"api_key": None, "extra_args": tuple(kept)})

    @field_serializer("config", mode="wrap")
    def _without_key(
        self, config: ServerConfig, dump: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        return {name: value for name, value in dump(config).items() if name != "api_key"}


class _Version(BaseModel):
    schema_version: int


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
    """Ask the server that a manager runs, one request after the other, and record the run.

    Answers are greedy, so that they can be repeated; with a temperature, the seed makes them so.

    Args:
        manager: Its server must be ready.
        prompts: What a user says, one conversation each; or whole conversations, as lists of
            messages; or requests, whose own parameters go before those given here.
        max_tokens: The longest answer, in tokens.
        temperature: Of sampling; 0 takes the likeliest token each time.
        seed: Of sampling.
        on_progress: Called in a worker thread with the bytes of the model that are hashed, and
            their total: only the first time that a model is recorded.
        parameters: What else llama-server takes with a request, such as `top_k=1`.

    Raises:
        KittyError: The server is not ready or was not started by kitty_nb, or a prompt cannot be
            asked. Waiting for the result raises ExperimentError when the server refuses a request,
            such as one that is longer than its context.
    """
    sampling: dict[str, JsonValue] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "cache_prompt": False,  # what was asked before must not change how this is computed
        **parameters,
    }
    given = [prompts] if isinstance(prompts, str | Request) else prompts
    requests = [_request(prompt, sampling) for prompt in given]
    access, state = manager.access, manager.state
    if state.external:
        raise ExperimentError(
            f"{state.external.who} was not started by kitty_nb, so the model and settings that"
            " answer are unknown. Start your own server, and record that one."
        )

    async def run() -> RunRecord:
        exchanges = await ask(access, requests)
        if manager.state.ready_since != state.ready_since:
            raise ExperimentError(
                "The server was replaced or ended during the run, so the answers do not come from"
                " a single server. Start it, and record again."
            )
        return await describe_run(state, access, exchanges, seed, on_progress)

    return manager.run(run)


async def ask(access: Access, requests: Iterable[Request]) -> tuple[Exchange, ...]:
    """Send requests to a server, one after the other.

    Raises:
        ExperimentError: The server refuses one, or breaks off.
    """
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
    """Put together the record of a server that is ready and has answered.

    Raises:
        ModelFileError: A file of the model is missing or cannot be read.
        ExperimentError: The model's file has changed since it was loaded.
    """
    config = state.config
    engine = await locate_engine(config.binary)
    load = await find_load(state)
    facts = await run_sync(gather_facts, config)
    async with access.async_http() as http:
        served = await props(http)
    ready_ns = (time.time() - (state.uptime or 0.0)) * 1e9
    if facts.mtime_ns != load.mtime_ns if load else facts.mtime_ns > ready_ns:
        raise ExperimentError(
            f"{config.model} has changed since this server loaded it, so the model that answered is"
            " unknown. Restart the server, and record again."
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
        host=await run_sync(_host_facts),
        libraries=await run_sync(_library_versions),
        seed=seed,
        load_seconds=LoadSeconds(load.starting, load.loading, load.preparing, load.cached)
        if load
        else None,
        exchanges=exchanges,
    )


async def digest_model(config: ServerConfig, on_progress: OnBytes | None = None) -> ModelDigest:
    """Work out which model a server with these settings serves.

    Raises:
        ModelFileError: A file is missing, cannot be read, or changes meanwhile.
    """
    shards = shard_paths(config.model) if config.model else ()
    paired = (config.projector,) if config.projector else ()
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
            f"Not a valid prompt: {prompt!r}. Write a text, a list of messages such as"
            ' {"role": "user", "content": "…"}, or a Request.'
        ) from error


async def _ask(http: httpx.AsyncClient, request: Request) -> Exchange:
    answer = await post(http, request.path, request.body, "choices")
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


def _host_facts() -> HostFacts:
    """Describe this machine. It asks drivers and programs: call it in a worker thread."""
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


def _library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that a run goes through."""
    versions = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _cpu_name() -> str:
    if psutil.MACOS:
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    with suppress(OSError):
        if found := _CPU_NAME.search(Path("/proc/cpuinfo").read_text(errors="replace")):
            return found[1]
    return ""
