"""`RunRecord`: all that is needed to repeat what a served model was asked, as one JSON document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

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

from kitty_nb.config import RECORDED, ServerConfig, takes_secret
from kitty_nb.config.whole_file import write_whole
from kitty_nb.errors import ConfigError, RunRecordError
from kitty_nb.experiments.host_facts import HostFacts
from kitty_nb.experiments.model_files import ModelDigest
from kitty_nb.isolated_server import EngineKind, LoadSeconds

# One higher whenever an older version of this package would misread a record.
SCHEMA_VERSION = 1


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class EngineFacts(_Facts):
    """What served the model.

    Attributes:
        kind: A llama-server of its own, or the one inside a wheel.
        version: What the program calls itself, e.g. `11434 (abc123)`.
        build: What the running server calls itself, e.g. `b11434-abc123`; empty where it does not.
        devices: What it had put the model on beside the processor, as it names them.
    """

    kind: EngineKind
    version: str
    build: str = ""
    devices: tuple[str, ...] = ()


class Timings(_Facts):
    """What the server says of one request: `n` are tokens, `ms` milliseconds.

    Attributes:
        cache_n: Tokens of the prompt that it still knew.
        prompt_n: Tokens of the prompt that it read.
        predicted_n: Tokens of the answer.
    """

    cache_n: int = 0
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float | None = None
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float | None = None


class Request(_Facts):
    """What a model is asked: a conversation, or a text to go on from.

    Attributes:
        messages: The conversation, as OpenAI's protocol has it.
        text: The text, without any template; instead of messages.
        parameters: What else is sent: of sampling, the seed, the length of the answer.
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
        """Where the server takes it."""
        return "/v1/chat/completions" if self.text is None else "/v1/completions"

    @property
    def body(self) -> dict[str, JsonValue]:
        """What is sent there."""
        if self.text is None:
            return {"messages": list(self.messages), **self.parameters}
        return {"prompt": self.text, **self.parameters}


class Exchange(_Facts):
    """A request and what came of it.

    Attributes:
        request: What was asked.
        output: The answer.
        reasoning: What the model has thought before, where it tells apart.
        tool_calls: Which tools it calls, and with what, as OpenAI's protocol has it; without the
            ids, which are others each time.
        finish_reason: Why it ended: `stop`, or `length` when it was cut short.
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
        """All that the model has written."""
        calls = (json.dumps(one, ensure_ascii=False, sort_keys=True) for one in self.tool_calls)
        return self.reasoning + self.output + "".join(calls)


class RunRecord(_Facts):
    """What a served model was asked and has answered, and all that this depends on.

    No key is in it: neither the server's, nor those that `extra_args` may hold.

    Attributes:
        schema_version: Of this document.
        made: When.
        config: What the server was started with. What a replay takes from it is what goes to
            llama-server itself; folders, port and the like are those of the replay.
        model: Which model that was.
        header: Hash of the beginning of the model's first file, which tells most models apart.
        engine: What served it.
        host: On which machine.
        libraries: Versions of libraries.
        seed: Of all sampling.
        load_seconds: How long the load took; None where that is not known.
        exchanges: What was asked, and what was answered, in order.
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
        """Which named set of settings the server was started with."""
        return self.config.profile

    @property
    def outputs(self) -> tuple[str, ...]:
        """The answers, in order."""
        return tuple(exchange.output for exchange in self.exchanges)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record that `save` wrote.

        Raises:
            RunRecordError: There is none, it is damaged, or a later version has written it.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise RunRecordError(
                f"{path} cannot be read: {error.strerror or error}. Correct the path."
            ) from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str | bytes, source: str = "The text") -> Self:
        """Read a record from what a file of one holds.

        Args:
            text: JSON.
            source: Where it comes from, for a complaint.

        Raises:
            RunRecordError: It is damaged, or a later version has written it.
        """
        try:
            version = _Version.model_validate_json(text).schema_version
            if version > SCHEMA_VERSION:
                raise RunRecordError(
                    f"A later version of kitty_nb has written {source} (schema {version}, known is"
                    f" {SCHEMA_VERSION}). Update: pip install --upgrade kitty_nb"
                )
            return cls.model_validate_json(text, context=RECORDED)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            reason = f"{where}: {first['msg']}" if where else first["msg"]
        except ConfigError as error:
            reason = " ".join(map(str, error.problems))
        raise RunRecordError(
            f"{source} is not a run record that can be understood: {reason.rstrip('.')}. It is"
            " damaged, or something else: take a copy that is whole."
        )

    def save(self, path: str | Path) -> Path:
        """Write it to a file, whole or not at all, and return where.

        Raises:
            RunRecordError: The file cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, f"{self.model_dump_json(indent=2)}\n".encode(), like=path)
        except OSError as error:
            raise RunRecordError(
                f"{path} cannot be written: {error.strerror or error}. Make room, give permission,"
                " or choose another place."
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
