"""A question until it is answered: its pictures, the tools that the model calls, its form."""

from __future__ import annotations

import inspect
from base64 import b64encode
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from anyio.to_thread import run_sync
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from kitty_nb.client.chat import complete
from kitty_nb.errors import KittyError, NoAnswerError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import httpx

    from kitty_nb.client.chat import Answer, Piece, ToolCall
    from kitty_nb.supervisor.events import PromptProgress

    Messages = str | list[dict[str, Any]]
    Tools = Sequence[Callable[..., Any]]


class Savable(Protocol):
    """A picture of Pillow's, or one like it."""

    def save(self, fp: BytesIO, format: str) -> object:  # noqa: A002 (Pillow's name)
        """Write the picture to a file."""


Image = str | Path | bytes | Savable
# How the formats that llama.cpp reads begin.
_BEGINNINGS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"BM": "bmp"}


def data_url(image: Image) -> str:
    """Return a picture as a data URL.

    Args:
        image: A path, the bytes of a file, a picture of Pillow's, or a data URL.

    Raises:
        KittyError: The file cannot be read, or holds no picture that llama.cpp reads.
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
        data, name = image, "The bytes"
    else:
        buffer = BytesIO()
        image.save(buffer, "PNG")
        data, name = buffer.getvalue(), "The picture"
    kind = next((kind for start, kind in _BEGINNINGS.items() if data.startswith(start)), None)
    if kind is None:
        raise KittyError(f"{name} is no PNG, JPEG, GIF or BMP picture. Convert it first.")
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def with_images(
    messages: Sequence[dict[str, Any]], images: Sequence[Image]
) -> list[dict[str, Any]]:
    """Return messages with pictures in the last one, before its words.

    Raises:
        KittyError: There is no message to put them in, or one of them is no picture.
    """
    if not images:
        return [*messages]
    if not messages:
        raise KittyError("Pictures need a message to go with: say what to do with them.")
    *before, last = messages
    said = last.get("content") or []
    parts = [{"type": "text", "text": said}] if isinstance(said, str) else [*said]
    pictures = [{"type": "image_url", "image_url": {"url": data_url(one)}} for one in images]
    return [*before, {**last, "content": [*pictures, *parts]}]


class Server(Protocol):
    """What a request depends on."""

    @property
    def alias(self) -> str:
        """The name of the model to ask."""

    @property
    def to_choose(self) -> tuple[str, ...]:
        """The models of a router that has loaded none."""

    @property
    def sees(self) -> bool:
        """False if it is known to take no pictures."""


@dataclass(frozen=True, slots=True)
class Form:
    """The form of an answer: a type that pydantic knows, such as a model, or a JSON schema."""

    wanted: Any

    @property
    def request(self) -> dict[str, Any]:
        """The request fields that hold the model to this form."""
        schema = self.wanted
        if not isinstance(schema, dict):
            schema = TypeAdapter(schema).json_schema()
        form = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": form}}

    def read(self, answer: Answer) -> Any:
        """Return the object in an answer.

        Raises:
            NoAnswerError: It is cut short, or has another form.
        """
        if answer.finish_reason == "length":
            raise NoAnswerError(
                "The answer was cut short before its JSON was complete. Raise max_tokens, or the"
                " context size."
            )
        try:
            if isinstance(self.wanted, dict):
                return from_json(answer.text)
            return TypeAdapter(self.wanted).validate_json(answer.text)
        except ValueError as error:  # pydantic's too
            raise NoAnswerError(f"The answer does not have the form asked for: {error}") from None


def as_messages(messages: Messages) -> list[dict[str, Any]]:
    """Return a conversation, or one that a prompt begins."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def chat_request(
    server: Server,
    messages: Messages,
    images: Sequence[Image],
    form: Form | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what `/v1/chat/completions` takes.

    Raises:
        KittyError: The server has no model for it, or takes no pictures.
    """
    if server.to_choose and "model" not in options:
        raise KittyError(
            "The router has not loaded a model yet. Name one with chat(…, model=…) or"
            f" switch_model(…): {', '.join(server.to_choose)}."
        )
    if images and not server.sees:
        raise KittyError(
            f"{server.alias} runs without a projector, so it sees no pictures. Start a model"
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

    A tool that blocks has a thread of its own; what it raises is told to the model.

    Returns:
        The last answer, with the calls of all.

    Raises:
        NoAnswerError: The model did not answer in words.
        ServerError: The server refused the request, broke off, or is no llama-server.
    """
    functions = {tool.__name__: tool for tool in tools}
    asked = dict(request)
    if functions:
        asked["tools"] = [*map(_describe, functions.values()), *asked.get("tools", ())]
    made: tuple[ToolCall, ...] = ()
    for _ in range(max_rounds + 1):
        answer = await complete(http, asked, on_piece, on_progress)
        if not answer.tool_calls or not functions:
            break
        calls = [replace(call, result=await _run(functions, call)) for call in answer.tool_calls]
        made += tuple(calls)
        asked["messages"] = [*asked["messages"], *_told(answer, calls)]
        asked.pop("tool_choice", None)  # else a call that was demanded would be demanded for ever
    else:
        raise NoAnswerError(
            f"The model called tools {max_rounds} times without answering. Raise max_rounds, or say"
            " in the prompt when to stop."
        )
    if missing := answer.missing:
        raise NoAnswerError(missing)
    return replace(answer, tool_calls=made)


def _describe(tool: Callable[..., Any]) -> dict[str, Any]:
    function = {
        "name": tool.__name__,
        "description": inspect.getdoc(tool) or "",
        "parameters": _adapter(tool).json_schema(),
    }
    return {"type": "function", "function": function}


def _adapter(tool: Any) -> TypeAdapter[Any]:
    """Return what knows a function's parameters, and calls it with JSON for them."""
    return TypeAdapter(tool)


async def _run(functions: Mapping[str, Callable[..., Any]], call: ToolCall) -> str:
    """Return what the model is told of a call's result."""
    if call.name not in functions:
        return f"Error: there is no tool {call.name}. There are {', '.join(functions)}."
    run = partial(_adapter(functions[call.name]).validate_json, call.arguments or "{}")
    try:
        result = await run_sync(run, abandon_on_cancel=True)
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
