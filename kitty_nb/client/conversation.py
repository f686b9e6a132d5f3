"""A question until it is answered: its pictures, the tools called, the answer and its form."""

from __future__ import annotations

import inspect
import time
from base64 import b64encode
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import httpx
from anyio.to_thread import run_sync
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from kitty_nb.client.protocol import broken_off, stream
from kitty_nb.errors import KittyError, NoAnswerError, ServerError
from kitty_nb.supervisor.events import PromptProgress, answer_speed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Messages = str | list[dict[str, Any]]
    Tools = Sequence[Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a streamed answer.

    Attributes:
        text: The words.
        thinking: Whether they belong to the model's thinking before the answer.
    """

    text: str
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call that the model requested.

    Attributes:
        id: The server's identifier of the call.
        name: The tool.
        arguments: The arguments, as JSON.
        result: What the tool returned, as sent to the model; None if it was not run.
    """

    id: str
    name: str
    arguments: str
    result: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """The token counts of a request; None if the server does not report them.

    Attributes:
        prompt: Tokens in the prompt.
        cached: Prompt tokens that the server had in its cache.
        answer: Tokens in the answer, including the thinking.
        drafted: Tokens that speculation proposed.
        accepted: Proposed tokens that the model accepted.
    """

    prompt: int | None = None
    cached: int | None = None
    answer: int | None = None
    drafted: int | None = None
    accepted: int | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """The timings of a request.

    Attributes:
        first_token: Seconds from the request to its first token, measured by the client.
        total: Seconds from the request to the end of the answer, measured by the client.
        prompt_per_second: Prompt tokens read per second, as the server reports it.
        answer_per_second: Answer tokens per second after the first, by the server's time.
    """

    first_token: float | None = None
    total: float | None = None
    prompt_per_second: float | None = None
    answer_per_second: float | None = None


_LIMITS = "Raise whichever applies: max_tokens, LLAMACPP_N_PREDICT or the context size."


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a model; `str(answer)` is its text.

    Attributes:
        text: The answer in words.
        thinking: The model's thinking before the answer.
        tool_calls: The tool calls that it made.
        finish_reason: Why it ended: `stop`, `length` or `tool_calls`.
        usage: Its token counts.
        timings: Its timings.
    """

    text: str
    thinking: str = field(default="", repr=False)
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    usage: Usage = field(default=Usage(), repr=False)
    timings: Timings = field(default=Timings(), repr=False)

    def __str__(self) -> str:
        return self.text

    @property
    def missing(self) -> str:
        """Why there are no words, in a sentence; empty if there are, or if nothing is wrong."""
        if self.text:
            return ""
        if self.tool_calls:
            names = ", ".join(call.name for call in self.tool_calls)
            return (
                f"The model called a tool instead of answering: {names}. To run tools, pass them to"
                " `chat(…, tools=[…])`."
            )
        if self.finish_reason == "length":
            what = "was still thinking" if self.thinking else "had said nothing yet"
            return f"The model {what} when the answer reached a limit. {_LIMITS}"
        thought = "The model gave no answer after thinking. Rephrase the prompt."
        return thought if self.thinking else ""


async def complete(
    http: httpx.AsyncClient,
    request: Mapping[str, Any],
    on_piece: Callable[[Piece], object],
    on_progress: Callable[[PromptProgress], object] | None = None,
) -> Answer:
    """Ask the model once, and pass on its answer in pieces as they arrive.

    If cancelled, it closes the connection, and the server stops answering.

    Raises:
        ServerError: The server refused the request, broke off, or is not a llama-server.
    """
    draft = _Draft(on_piece, on_progress)
    wanted = {**request, "return_progress": True} if on_progress else dict(request)
    try:
        async with aclosing(stream(http, "/v1/chat/completions", wanted)) as parts:
            async for part in parts:
                draft.add(part)
    except httpx.HTTPError as error:
        raise ServerError(broken_off(error)) from None
    return draft.answer()


class _Draft:
    """An answer that is not complete yet."""

    def __init__(
        self,
        on_piece: Callable[[Piece], object],
        on_progress: Callable[[PromptProgress], object] | None,
    ) -> None:
        self._on_piece, self._on_progress = on_piece, on_progress
        self._words: dict[bool, list[str]] = {False: [], True: []}
        self._calls: dict[int, list[str]] = {}
        self._finish: str | None = None
        self._told: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._began = time.perf_counter()
        self._first: float | None = None

    def add(self, part: dict[str, Any]) -> None:
        """Add a part of the stream, or a whole answer that is not streamed."""
        if self._on_progress and (told := _numbers(part.get("prompt_progress"))):
            total, cached, done, spent = (
                told.get(name, 0) for name in ("total", "cache", "processed", "time_ms")
            )
            self._on_progress(PromptProgress(total, cached, done, spent / 1000))
        self._told = _numbers(part.get("timings")) or self._told
        self._usage = _numbers(part.get("usage")) or self._usage
        choice = next(iter(_objects(part.get("choices"))), {})
        delta = _object(choice.get("delta") or choice.get("message"))
        # Ollama and newer builds of vLLM call it `reasoning`.
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        for thinking, text in ((True, thought), (False, delta.get("content"))):
            if isinstance(text, str) and text:
                self._begin()
                self._words[thinking].append(text)
                self._on_piece(Piece(text, thinking))
        for place, call in enumerate(_objects(delta.get("tool_calls"))):
            self._begin()
            known = self._calls.setdefault(call.get("index", place), ["", "", ""])
            function = _object(call.get("function"))
            news = call.get("id"), function.get("name"), function.get("arguments")
            known[:] = [old + str(new or "") for old, new in zip(known, news, strict=True)]
        self._finish = choice.get("finish_reason") or self._finish

    def _begin(self) -> None:
        if self._first is None:
            self._first = time.perf_counter() - self._began

    def answer(self) -> Answer:
        """Return the complete answer.

        Raises:
            ServerError: Its end is missing.
        """
        if self._finish is None:
            raise ServerError(broken_off())
        said, told = self._usage, self._told
        fresh, cached = told.get("prompt_n"), told.get("cache_n")
        prompt = said.get("prompt_tokens") if fresh is None else fresh + (cached or 0)
        answered = told.get("predicted_n", said.get("completion_tokens"))
        drafts = told.get("draft_n"), told.get("draft_n_accepted")
        speed = answer_speed(told.get("predicted_n", 0), told.get("predicted_ms", 0.0))
        return Answer(
            text="".join(self._words[False]),
            thinking="".join(self._words[True]),
            tool_calls=tuple(ToolCall(*call) for call in self._calls.values()),
            finish_reason=self._finish,
            usage=Usage(prompt, cached, answered, *drafts),
            timings=Timings(
                self._first,
                time.perf_counter() - self._began,
                told.get("prompt_per_second"),
                speed,
            ),
        )


def _object(value: Any) -> dict[str, Any]:
    """Return a value if it is an object, else an empty one: any program may have answered."""
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _numbers(value: Any) -> dict[str, Any]:
    return {name: one for name, one in _object(value).items() if type(one) in {int, float}}


class Savable(Protocol):
    """A picture of Pillow, or a similar object."""

    def save(self, fp: BytesIO, format: str) -> object:  # noqa: A002 (Pillow's name)
        """Write the picture to a file."""


Image = str | Path | bytes | Savable
# The first bytes of the formats that llama.cpp reads.
_BEGINNINGS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"BM": "bmp"}


def data_url(image: Image) -> str:
    """Return a picture as a data URL.

    Args:
        image: A path, the bytes of a file, a picture of Pillow, or a data URL.

    Raises:
        KittyError: The file can't be read, or is not a picture in a format that llama.cpp reads.
    """
    if isinstance(image, str) and image.startswith("data:"):
        return image
    if isinstance(image, str | Path):
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise KittyError(f"Can't read the picture {image} ({error.strerror}).") from None
        name = str(image)
    elif isinstance(image, bytes):
        data, name = image, "The data"
    else:
        buffer = BytesIO()
        image.save(buffer, "PNG")
        data, name = buffer.getvalue(), "The picture"
    kind = next((kind for start, kind in _BEGINNINGS.items() if data.startswith(start)), None)
    if kind is None:
        raise KittyError(f"{name} is not a PNG, JPEG, GIF or BMP picture. Convert it first.")
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def with_images(
    messages: Sequence[dict[str, Any]], images: Sequence[Image]
) -> list[dict[str, Any]]:
    """Return messages with pictures added to the last one, before its words.

    Raises:
        KittyError: There is no message to add them to, or one of them is not a picture.
    """
    if not images:
        return [*messages]
    if not messages:
        raise KittyError("Pictures need a message that says what to do with them. Add one.")
    *before, last = messages
    said = last.get("content") or []
    parts = [{"type": "text", "text": said}] if isinstance(said, str) else [*said]
    pictures = [{"type": "image_url", "image_url": {"url": data_url(one)}} for one in images]
    return [*before, {**last, "content": [*pictures, *parts]}]


class Server(Protocol):
    """The facts about a server that a request depends on."""

    @property
    def alias(self) -> str:
        """The name of the model to ask."""

    @property
    def to_choose(self) -> tuple[str, ...]:
        """The models of a router that has loaded none."""

    @property
    def sees(self) -> bool:
        """False if it is known not to take pictures."""


@dataclass(frozen=True, slots=True)
class Form:
    """The schema of an answer: a type that pydantic knows, such as a model, or a JSON schema."""

    wanted: Any

    @property
    def request(self) -> dict[str, Any]:
        """The request fields that hold the model to this schema."""
        schema = self.wanted
        if not isinstance(schema, dict):
            schema = TypeAdapter(schema).json_schema()
        form = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": form}}

    def read(self, answer: Answer) -> Any:
        """Return the object in an answer.

        Raises:
            NoAnswerError: It is cut short, or does not match the schema.
        """
        if answer.finish_reason == "length":
            raise NoAnswerError(
                f"The answer reached a limit before its JSON was complete. {_LIMITS}"
            )
        try:
            if isinstance(self.wanted, dict):
                return from_json(answer.text)
            return TypeAdapter(self.wanted).validate_json(answer.text)
        except ValueError as error:  # including pydantic's
            raise NoAnswerError(f"The answer does not match the schema: {error}") from None


def as_messages(messages: Messages) -> list[dict[str, Any]]:
    """Return a conversation; a prompt becomes the first message of one."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def chat_request(
    server: Server,
    messages: Messages,
    images: Sequence[Image],
    form: Form | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the body of a request to `/v1/chat/completions`.

    Raises:
        KittyError: A router has loaded no model, or the model takes no pictures.
    """
    if server.to_choose and "model" not in options:
        raise KittyError(
            "The router has not loaded a model yet. Name one with chat(…, model=…) or"
            f" switch_model(…): {', '.join(server.to_choose)}."
        )
    if images and not server.sees:
        raise KittyError(
            f"{server.alias} runs without a projector, so it can't see pictures. Start a model"
            " that has one beside its file (mmproj-….gguf), or set LLAMACPP_MMPROJ."
        )
    said = with_images(as_messages(messages), images)
    return {"model": server.alias, "messages": said, **(form.request if form else {}), **options}


async def converse(
    http: httpx.AsyncClient,
    request: Mapping[str, Any],
    on_piece: Callable[[Piece], object],
    on_progress: Callable[[PromptProgress], object] | None = None,
    tools: Tools = (),
    max_rounds: int = 10,
) -> Answer:
    """Ask the model, and run the tools that it calls, until it answers in words.

    A tool that blocks runs on a thread of its own; the model is sent any error that a tool raises.

    Returns:
        The last answer, with the tool calls of all.

    Raises:
        NoAnswerError: The model did not answer in words.
        ServerError: The server refused the request, broke off, or is not a llama-server.
    """
    functions = {tool.__name__: tool for tool in tools}
    asked = dict(request)
    if functions:
        asked["tools"] = [*map(_describe, functions.values()), *asked.get("tools", ())]
    made: tuple[ToolCall, ...] = ()
    for rounds in count():
        answer = await complete(http, asked, on_piece, on_progress)
        if not answer.tool_calls or not functions:
            break
        if rounds >= max_rounds:
            raise NoAnswerError(
                f"The model called tools {max_rounds} times without answering. Raise max_rounds, or"
                " say in the prompt when to stop."
            )
        calls = [replace(call, result=await _run(functions, call)) for call in answer.tool_calls]
        made += tuple(calls)
        asked["messages"] = [*asked["messages"], *_told(answer, calls)]
        asked.pop("tool_choice", None)  # else every round would require a call
    if missing := answer.missing:
        raise NoAnswerError(missing)
    return replace(answer, tool_calls=made)


def _describe(tool: Any) -> dict[str, Any]:
    function = {
        "name": tool.__name__,
        "description": inspect.getdoc(tool) or "",
        "parameters": TypeAdapter(tool).json_schema(),
    }
    return {"type": "function", "function": function}


async def _run(functions: Mapping[str, Any], call: ToolCall) -> str:
    """Run a tool call, and return the result as the model gets it."""
    if call.name not in functions:
        return f"Error: there is no tool {call.name}. The tools are {', '.join(functions)}."
    # This knows a function's parameters, and calls it with JSON for them.
    tool: TypeAdapter[Any] = TypeAdapter(functions[call.name])
    try:
        result = await run_sync(tool.validate_json, call.arguments or "{}", abandon_on_cancel=True)
        if inspect.isawaitable(result):
            result = await result
    except ValidationError as error:
        return f"Error: {error}"
    except Exception as error:  # noqa: BLE001 (whatever a user's function raises)
        return f"Error: {error!r}"
    return result if isinstance(result, str) else to_json(result, fallback=str).decode()


def _told(answer: Answer, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    asked = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments or "{}"},
        }
        for call in calls
    ]
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": call.result or ""} for call in calls
    ]
    return [{"role": "assistant", "content": answer.text, "tool_calls": asked}, *results]
