"""`RunRecord`: what a served model was asked and all that its answers depend on, as JSON.

`compare` lays two of them side by side.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from kitty_nb.catalog.cache import FileDigest
from kitty_nb.config import ServerConfig, takes_secret
from kitty_nb.errors import ConfigError, RunRecordError
from kitty_nb.isolated_server import SERVER_SETTINGS, EngineKind, LoadSeconds
from kitty_nb.safe_files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# One higher whenever an older version of this package would misread a record.
SCHEMA_VERSION = 1
_COMPARED: dict[str, Any] = {
    "config": set(SERVER_SETTINGS),
    **dict.fromkeys(("model", "engine", "host", "libraries", "seed"), True),
    "exchanges": {"__all__": {"request", "finish_reason"}},
}
_NOTHING = "-"
_SHOWN = 40  # characters of an answer


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
        cores: Cores of the processor, where the system reports them.
        threads: Hardware threads of the processor.
        usable_threads: Hardware threads that this program may use.
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
        version: The program's version, e.g. `11434 (abc123)`.
        build: The running server's own name, e.g. `b11434-abc123`; empty where it has none.
        devices: The devices other than the processor that held the model.
    """

    kind: EngineKind
    version: str
    build: str = ""
    devices: tuple[str, ...] = ()


class Timings(_Facts):
    """The server's figures for one request: `n` are tokens, `ms` milliseconds.

    Attributes:
        cache_n: Tokens of the prompt that were in the cache.
        prompt_n: Tokens of the prompt that the server processed.
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
        parameters: Everything else that is sent, such as sampling, seed and length.
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
        """The JSON that is sent there."""
        if self.text is None:
            return {"messages": list(self.messages), **self.parameters}
        return {"prompt": self.text, **self.parameters}


class Exchange(_Facts):
    """A request and its answer.

    Attributes:
        output: The answer.
        reasoning: The model's reasoning, where the server reports it separately.
        tool_calls: Tool calls in OpenAI's protocol, without their ids, which never repeat.
        finish_reason: Why the answer ended: `stop`, or `length` when it was cut short.
        timings: The server's figures, if it reports any.
    """

    request: Request
    output: str
    reasoning: str = ""
    tool_calls: tuple[dict[str, JsonValue], ...] = ()
    finish_reason: str | None = None
    timings: Timings | None = None

    @property
    def text(self) -> str:
        """Everything that the model wrote."""
        calls = (json.dumps(one, ensure_ascii=False, sort_keys=True) for one in self.tool_calls)
        return self.reasoning + self.output + "".join(calls)


class RunRecord(_Facts):
    """The prompts and answers of a served model, and everything they depend on.

    No key is in it: neither the server's, nor those that `extra_args` may hold.

    Attributes:
        made: The time of the recording.
        config: The server's settings. A replay takes llama-server's own from it, and uses its own
            folders, port and the like.
        header: Hash of the beginning of the model's first file, which tells most models apart.
        libraries: Versions by name.
        seed: The seed of all sampling.
        load_seconds: How long the load took; None where that is not known.
        exchanges: The requests and their answers, in order.
    """

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1)
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
        """Read a record from its JSON; `source` names it in errors.

        Raises:
            RunRecordError: It is damaged, or a later version wrote it.
        """
        try:
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

    def to_json(self) -> str:
        """Return it as JSON."""
        return self.model_dump_json(indent=2, exclude={"config": {"api_key"}})

    def save(self, path: str | Path) -> Path:
        """Write it to a file, whole or not at all, and return where.

        Raises:
            RunRecordError: The file cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, f"{self.to_json()}\n".encode(), private=False)
        except OSError as error:
            raise RunRecordError(
                f"Can't write {path}: {error.strerror or error}. Free some space, check the"
                " folder's permissions, or choose another place."
            ) from error
        return path

    @field_validator("schema_version")
    @classmethod
    def _is_known(cls, schema: int) -> int:
        """Stop at once where the other fields may mean something else."""
        if schema > SCHEMA_VERSION:
            raise RunRecordError(
                f"A later version of kitty_nb wrote this run record (schema {schema}; this version"
                f" reads {SCHEMA_VERSION}). Update: pip install --upgrade kitty_nb"
            )
        return schema

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


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference in something that the answers may depend on.

    Attributes:
        what: Its place in the record, e.g. `engine.version`.
    """

    what: str
    recorded: str
    now: str


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """An answer that differs.

    Attributes:
        exchange: Its index, from 0.
        position: The first character that differs, from 0.
        recorded: The beginning of the recorded answer's rest.
        now: The beginning of the present answer's rest.
    """

    exchange: int
    position: int
    recorded: str
    now: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A measurement, which varies from run to run.

    Attributes:
        what: What was measured, with its unit.
    """

    what: str
    recorded: float
    now: float

    @property
    def ratio(self) -> float:
        """The present value over the recorded one."""
        return self.now / self.recorded


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs side by side; `print` shows it as tables.

    Attributes:
        recorded: The earlier run.
        repeated: The later one.
        outputs: Answers that differ.
        differences: What else differs, timings apart.
        figures: What was measured in both.
    """

    recorded: RunRecord = field(repr=False)
    repeated: RunRecord = field(repr=False)
    outputs: tuple[OutputDifference, ...]
    differences: tuple[Difference, ...]
    figures: tuple[Figure, ...] = field(repr=False)

    @property
    def same_outputs(self) -> bool:
        """True if all answers are the same, to the letter."""
        return not self.outputs

    def __str__(self) -> str:
        count = max(len(run.exchanges) for run in (self.recorded, self.repeated))
        lines = [f"Answers: {count - len(self.outputs)} of {count} are the same."]
        lines += [
            f"Answer {one.exchange + 1} differs from character {one.position + 1} on:"
            f" recorded {one.recorded!r}, now {one.now!r}."
            for one in self.outputs
        ]
        rows = [(one.what, one.recorded, one.now) for one in self.differences]
        figures = [
            (one.what, f"{one.recorded:.4g}", f"{one.now:.4g}", f"{one.ratio:.2f}")
            for one in self.figures
        ]
        lines += _table(("differs", "recorded", "now"), rows)
        lines += _table(("varies", "recorded", "now", "ratio"), figures)
        return "\n".join(lines)


def compare(recorded: RunRecord, repeated: RunRecord) -> Comparison:
    """Lay two runs side by side. What merely varies, such as timings, is no difference."""
    before, after = (
        dict(_leaves(run.model_dump(mode="json", include=_COMPARED)))
        for run in (recorded, repeated)
    )
    was, now = (dict(_measured(run)) for run in (recorded, repeated))
    return Comparison(
        recorded,
        repeated,
        outputs=tuple(_output_differences(recorded, repeated)),
        differences=tuple(
            Difference(key, before.get(key, _NOTHING), after.get(key, _NOTHING))
            for key in before | after
            if before.get(key) != after.get(key)
        ),
        figures=tuple(Figure(what, was[what], now[what]) for what in was if what in now),
    )


def _leaves(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{place}[{index}]")
    else:
        yield place, _NOTHING if value is None else str(value)


def _output_differences(recorded: RunRecord, repeated: RunRecord) -> Iterator[OutputDifference]:
    texts = ([exchange.text for exchange in run.exchanges] for run in (recorded, repeated))
    for index, (was, now) in enumerate(zip_longest(*texts, fillvalue="")):
        if was != now:
            at = next((at for at, pair in enumerate(zip_longest(was, now)) if len(set(pair)) > 1))
            yield OutputDifference(index, at, was[at : at + _SHOWN], now[at : at + _SHOWN])


def _measured(run: RunRecord) -> Iterator[tuple[str, float]]:
    """Yield the figures of a run that are known."""
    if run.load_seconds:
        yield "load, s", run.load_seconds.total
    timings = [exchange.timings for exchange in run.exchanges if exchange.timings]
    if seconds := sum(one.prompt_ms for one in timings) / 1000:
        yield "prompt, tokens/s", sum(one.prompt_n for one in timings) / seconds
    if seconds := sum(one.predicted_ms for one in timings) / 1000:
        yield "generation, tokens/s", sum(one.predicted_n for one in timings) / seconds


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table below an empty line; none without rows."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (head, tuple("-" * width for width in widths), *rows)
    return ["", *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)]
