"""`RunRecord`: requests, answers and everything the answers depend on, as JSON; `compare`."""

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
from kitty_nb.config import ServerConfig
from kitty_nb.config.flags import without_secrets
from kitty_nb.errors import ConfigError, RunRecordError
from kitty_nb.experiments.arguments import require
from kitty_nb.experiments.output import markdown_table, write_file
from kitty_nb.isolated_server import SERVER_SETTINGS, EngineKind, LoadSeconds, answer_speed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Increment whenever an older version of this package would misread a record.
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
    """A GPU's name, as its driver reports it, and its memory in bytes."""

    name: str
    memory: int


class HostFacts(_Facts):
    """A machine.

    Attributes:
        cores: The number of physical cores, if the system reports it.
        threads: The number of hardware threads, some of which this process may not use.
        ram: Size of the memory in bytes.
        gpus: NVIDIA GPUs; a Mac's GPU is part of its processor.
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
    """The identity of a model: its files, and those beside it, such as a projector or adapters."""

    shards: tuple[FileDigest, ...]
    companions: tuple[FileDigest, ...] = ()

    @property
    def name(self) -> str:
        """The name of the first shard."""
        return self.shards[0].name if self.shards else ""

    @property
    def size(self) -> int:
        """The total size of the shards in bytes."""
        return sum(shard.size for shard in self.shards)


class EngineFacts(_Facts):
    """The engine that served the model.

    Attributes:
        kind: A llama-server program, or the server inside a wheel.
        version: The program's version, e.g. `11434 (abc123)`.
        build: The build that the running server reports, e.g. `b11434-abc123`; may be empty.
        devices: The devices, other than the processor, that held the model.
    """

    kind: EngineKind
    version: str
    build: str = ""
    devices: tuple[str, ...] = ()


class Timings(_Facts):
    """The server's timings of a request: `n` counts tokens, `ms` is in milliseconds.

    Attributes:
        cache_n: Prompt tokens found in the cache.
        prompt_n: Prompt tokens processed.
        predicted_n: Tokens generated.
        predicted_ms: The time from the first of them to the last.
        predicted_per_second: Their speed as this build of the server counts it.
    """

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    prompt_per_second: float | None = None
    predicted_n: int = 0
    predicted_ms: float = 0.0
    predicted_per_second: float | None = None

    @property
    def speed(self) -> float | None:
        """The tokens per second after the first; None with fewer than two."""
        return answer_speed(self.predicted_n, self.predicted_ms)


class Request(_Facts):
    """A request: a conversation, or a text to continue.

    Attributes:
        messages: The conversation in OpenAI's format.
        text: The text, sent without a chat template; used instead of messages.
        parameters: All other parameters, such as sampling, seed and length.
    """

    messages: tuple[dict[str, JsonValue], ...] = ()
    text: str | None = None
    parameters: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("give either messages or a text")
        return self

    @property
    def path(self) -> str:
        """The server's endpoint for the request."""
        return "/v1/chat/completions" if self.text is None else "/v1/completions"

    @property
    def body(self) -> dict[str, JsonValue]:
        """The JSON body of the request."""
        if self.text is None:
            return {"messages": list(self.messages), **self.parameters}
        return {"prompt": self.text, **self.parameters}


class Exchange(_Facts):
    """A request and its answer.

    Attributes:
        output: The answer.
        reasoning: The model's reasoning, if the server reports it separately.
        tool_calls: Tool calls in OpenAI's format, without their random ids.
        finish_reason: Why generation stopped: `stop`, or `length` if the answer was cut short.
        timings: The server's timings, if it reports any.
    """

    request: Request
    output: str
    reasoning: str = ""
    tool_calls: tuple[dict[str, JsonValue], ...] = ()
    finish_reason: str | None = None
    timings: Timings | None = None

    @property
    def text(self) -> str:
        """All text generated: reasoning, answer and tool calls."""
        calls = (json.dumps(one, ensure_ascii=False, sort_keys=True) for one in self.tool_calls)
        return self.reasoning + self.output + "".join(calls)


class RunRecord(_Facts):
    """A served model's requests and answers, and everything the answers depend on.

    A record contains no secrets: neither the server's API key, nor any in `extra_args`.

    Attributes:
        made: The time of the recording.
        config: The server's settings. A replay uses those of llama-server itself, but the folders,
            port and the like of its own machine.
        header: Hash of the beginning of the model's first file, to find candidates quickly.
        libraries: Library versions by name.
        seed: The seed of sampling.
        load_seconds: The seconds that the load took, by stage; None if unknown.
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
        """The profile that the server was started with."""
        return self.config.profile

    @property
    def outputs(self) -> tuple[str, ...]:
        """The answers, in order."""
        return tuple(exchange.output for exchange in self.exchanges)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a record from a file, or raise RunRecordError."""
        try:
            text = Path(path).read_bytes()
        except (OSError, TypeError, ValueError) as error:  # no name can have a zero byte
            reason = getattr(error, "strerror", None) or error
            raise RunRecordError(f"Can't read {path}: {reason}. Check the path.") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str | bytes, source: str = "The text") -> Self:
        """Parse a record from JSON, or raise RunRecordError, which names the `source`."""
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
        """Return the record as JSON."""
        return self.model_dump_json(indent=2, exclude={"config": {"api_key"}})

    def save(self, path: str | Path) -> Path:
        """Write the record to a file atomically, and return the path; or raise RunRecordError."""
        return write_file(path, f"{self.to_json()}\n".encode(), RunRecordError)

    @field_validator("schema_version")
    @classmethod
    def _is_known(cls, schema: int) -> int:
        """Reject a record of a later version before its other fields are misread."""
        if schema > SCHEMA_VERSION:
            raise RunRecordError(
                f"A later version of kitty_nb wrote this run record (schema {schema}; this version"
                f" reads {SCHEMA_VERSION}). Update: pip install --upgrade kitty_nb"
            )
        return schema

    @field_validator("config")
    @classmethod
    def _without_secrets(cls, config: ServerConfig) -> ServerConfig:
        words = without_secrets(config.extra_args)
        return config.model_copy(update={"api_key": None, "extra_args": words})


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference between two records in a field that answers may depend on."""

    what: str
    recorded: str
    now: str


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """An answer that differs: its exchange and first character, from 0, and excerpts from there."""

    exchange: int
    position: int
    recorded: str
    now: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A measurement, which varies from run to run, and its name with the unit."""

    what: str
    recorded: float
    now: float

    @property
    def ratio(self) -> float:
        """The new value over the recorded one."""
        return self.now / self.recorded


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs compared; `print` shows the differences as tables.

    Attributes:
        recorded: The earlier run.
        repeated: The later run.
        outputs: Answers that differ.
        differences: Other differences, except timings.
        figures: Measurements that both runs have.
    """

    recorded: RunRecord = field(repr=False)
    repeated: RunRecord = field(repr=False)
    outputs: tuple[OutputDifference, ...]
    differences: tuple[Difference, ...]
    figures: tuple[Figure, ...] = field(repr=False)

    @property
    def same_outputs(self) -> bool:
        """True if all answers are identical."""
        return not self.outputs

    def __str__(self) -> str:
        count = max(len(run.exchanges) for run in (self.recorded, self.repeated))
        lines = [f"Answers: {count - len(self.outputs)} of {count} are the same."]
        lines += [
            f"Answer {one.exchange + 1} differs from character {one.position + 1} on:"
            f" recorded {one.recorded!r}, now {one.now!r}."
            for one in self.outputs
        ]
        if self.differences:
            rows = ((one.what, one.recorded, one.now) for one in self.differences)
            lines += ["", *markdown_table(("differs", "recorded", "now"), rows, "lll")]
        if self.figures:
            rates = (
                (one.what, f"{one.recorded:.4g}", f"{one.now:.4g}", f"{one.ratio:.2f}")
                for one in self.figures
            )
            lines += ["", *markdown_table(("varies", "recorded", "now", "ratio"), rates, "lrrr")]
        return "\n".join(lines)


def compare(recorded: RunRecord, repeated: RunRecord) -> Comparison:
    """Compare two runs. Measurements, such as timings, don't count as differences.

    Raises:
        ExperimentError: An argument isn't a run record.
    """
    for name, run in (("recorded", recorded), ("repeated", repeated)):
        require(name, run, RunRecord, "a RunRecord, such as RunRecord.load('run.json')")
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


def first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the index of the first item that differs; the length if none does."""
    pairs = enumerate(zip_longest(one, other))
    return next((at for at, (a, b) in pairs if a != b), len(one))


def _output_differences(recorded: RunRecord, repeated: RunRecord) -> Iterator[OutputDifference]:
    texts = ([exchange.text for exchange in run.exchanges] for run in (recorded, repeated))
    for index, (was, now) in enumerate(zip_longest(*texts, fillvalue="")):
        if was != now:
            at = first_difference(was, now)
            yield OutputDifference(index, at, was[at : at + _SHOWN], now[at : at + _SHOWN])


def _measured(run: RunRecord) -> Iterator[tuple[str, float]]:
    """Yield the measurements of a run by name."""
    if run.load_seconds:
        yield "load, s", run.load_seconds.total
    timings = [exchange.timings for exchange in run.exchanges if exchange.timings]
    if seconds := sum(one.prompt_ms for one in timings) / 1000:
        yield "prompt, tokens/s", sum(one.prompt_n for one in timings) / seconds
    if seconds := sum(one.predicted_ms for one in timings) / 1000:
        yield "generation, tokens/s", sum(max(one.predicted_n - 1, 0) for one in timings) / seconds
