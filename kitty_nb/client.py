"""Clients that know a server's address and key, for code in a notebook."""

from __future__ import annotations

import json
import ssl
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import httpx
from httpx_sse import EventSource, SSEError

from kitty_nb.errors import NoAnswerError, ServerError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection

    from pydantic import SecretStr

_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # a long answer on a slow machine takes minutes
_QUOTED = 200  # characters of what came in place of an answer
# What llama-server says of a prompt, and of all prompts and answers at once, that are too long.
_TOO_LONG = "exceed_context_size_error"
_FULL = "Context size has been exceeded"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some words of an answer.

    Attributes:
        text: The words.
        thinking: Whether the model thinks them to itself, before it answers.
    """

    text: str
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class Access:
    """The address and key of a server.

    Attributes:
        endpoint: Its address.
        api_key: What it asks for, or None when it asks for nothing.
    """

    endpoint: str
    api_key: SecretStr | None

    @property
    def base_url(self) -> str:
        """The base URL for OpenAI clients."""
        return f"{self.endpoint}/v1"

    def http(self) -> httpx.Client:
        """Make a client for any of its paths, such as `/v1/chat/completions` or `/slots`."""
        return httpx.Client(**self._settings())

    def async_http(self) -> httpx.AsyncClient:
        """Make an asynchronous client for any of its paths."""
        return httpx.AsyncClient(**self._settings())

    def openai(self, http: httpx.Client | httpx.AsyncClient) -> Any:
        """Make an OpenAI client that uses `http`, or return `http` where `openai` is missing."""
        if find_spec("openai") is None:
            return http
        kind = "OpenAI" if isinstance(http, httpx.Client) else "AsyncOpenAI"
        key = self.api_key.get_secret_value() if self.api_key else "none"  # it insists on one
        made = getattr(import_module("openai"), kind)
        return made(base_url=self.base_url, api_key=key, http_client=http)

    async def chat(self, request: dict[str, Any], on_piece: Callable[[Piece], object]) -> str:
        """Ask the model, hand on its answer in pieces as they come, and return it whole.

        Cancelled, it closes the connection, and the server stops answering.

        Args:
            request: What `/v1/chat/completions` takes.
            on_piece: Called with each piece.

        Raises:
            NoAnswerError: The model said nothing: it only thought, or called a tool.
            ServerError: The server refused the request, broke off, or is no llama-server.
        """
        said, thought, finish = "", False, None
        tools: dict[int, str] = {}
        try:
            async with (
                self.async_http() as http,
                aclosing(stream(http, "/v1/chat/completions", request)) as parts,
            ):
                async for part in parts:
                    choice: dict[str, Any] = next(iter(part.get("choices") or ()), {})
                    delta = choice.get("delta") or choice.get("message") or {}
                    if thinking := delta.get("reasoning_content"):
                        thought = True
                        on_piece(Piece(thinking, thinking=True))
                    if text := delta.get("content"):
                        said += text
                        on_piece(Piece(text))
                    for place, call in enumerate(delta.get("tool_calls") or ()):
                        number, function = call.get("index", place), call.get("function", {})
                        tools.setdefault(number, function.get("name", ""))
                    finish = choice.get("finish_reason") or finish
        except httpx.HTTPError as error:
            raise ServerError(broken_off(error)) from None
        if finish is None:
            raise ServerError(broken_off())
        if not said and (missing := _missing(tuple(tools.values()), finish, thought=thought)):
            raise NoAnswerError(missing)
        return said

    def _settings(self) -> dict[str, Any]:
        key = self.api_key
        return {
            "base_url": self.endpoint,
            "headers": {"Authorization": f"Bearer {key.get_secret_value()}"} if key else None,
            "timeout": _TIMEOUT,
            "trust_env": False,  # a proxy for the internet must not see local requests
            # Without certificates, which are not needed here and take 30 ms to load.
            "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        }


async def post(
    http: httpx.AsyncClient, path: str, request: dict[str, Any], wanted: str
) -> dict[str, Any]:
    """Ask, and return the JSON object of the whole answer.

    Args:
        http: A client of the server.
        path: Where to ask.
        request: What to send.
        wanted: A key that every answer of llama-server has there.

    Raises:
        ServerError: The server refused the request, or is no llama-server.
        httpx.HTTPError: The server broke off.
    """
    response = await http.post(path, json=request)
    if response.status_code == HTTPStatus.NOT_FOUND:
        raise ServerError(f"This build of llama-server has no {path}. Update llama.cpp.")
    if response.is_error:
        raise ServerError(_refusal(response.content, response.status_code))
    return _part(response, response.content, {wanted})


async def stream(
    http: httpx.AsyncClient, path: str, request: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """Ask, and yield the JSON objects of the answer as they come, also of one that comes whole.

    Raises:
        ServerError: The server refused the request, could not go on, or is no llama-server.
        httpx.HTTPError: The server broke off.
    """
    async with http.stream("POST", path, json={**request, "stream": True}) as response:
        if response.is_error:
            raise ServerError(_refusal(await response.aread(), response.status_code))
        if response.headers.get("Content-Type", "").startswith("application/json"):
            yield _part(response, await response.aread(), {"choices", "content"})
            return
        empty = True
        try:
            async with aclosing(EventSource(response).aiter_sse()) as events:
                async for event in events:
                    if event.data and event.data != "[DONE]":
                        empty = False
                        yield _part(response, event.data.encode())
        except SSEError:
            raise ServerError(_not_an_answer(response, await response.aread())) from None
        if empty:
            raise ServerError(_not_an_answer(response, b""))


async def props(http: httpx.AsyncClient) -> dict[str, Any]:
    """Return what the server says of itself; nothing where it does not."""
    try:
        said = (await http.get("/props")).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def broken_off(error: httpx.HTTPError | None = None) -> str:
    """Say that an answer has no end, and the error that cut it short."""
    how = type(error).__name__ if error else "its end is missing"
    return f"The answer ended early ({how}): the server was stopped or crashed. See its log."


def _part(response: httpx.Response, content: bytes, wanted: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON object in a part of an answer, which has one of the keys that are wanted."""
    try:
        part = json.loads(content)
    except ValueError:
        part = None
    if not isinstance(part, dict) or (wanted and not part.keys() & {*wanted, "error"}):
        raise ServerError(_not_an_answer(response, content))
    if part.get("error"):
        raise ServerError(_refusal(content))
    return part


def _not_an_answer(response: httpx.Response, content: bytes) -> str:
    """Say what came where an answer of llama-server should."""
    kind = response.headers.get("Content-Type", "no content type")
    start = " ".join(content.decode(errors="replace")[:_QUOTED].split())
    return (
        f"{response.url} sent no answer of llama-server, but {response.status_code} with {kind}:"
        f" {start!r}. Check what listens there: a proxy, a login page or another program."
    )


def _missing(tools: tuple[str, ...], finish: str, *, thought: bool) -> str:
    """Say what came in place of an answer in words; empty where the model chose to say nothing."""
    if tools:
        return (
            f"The model called a tool instead of answering: {', '.join(tools)}. To run tools, send"
            " the request with `manager.client` or `manager.http`."
        )
    if finish == "length":
        what = "was still thinking" if thought else "had said nothing yet"
        return (
            f"The model {what} when max_tokens or the context ran out. Raise max_tokens, or the"
            " context size."
        )
    return "The model gave no answer after thinking. Rephrase the prompt." if thought else ""


def _refusal(said: bytes, status: int | None = None) -> str:
    """Return what an error of llama-server means for the user.

    Args:
        said: What the server sent.
        status: That of the answer; None where the error came in the middle of one.
    """
    try:
        body = json.loads(said)
    except ValueError:
        body = str(said, errors="replace").strip()
    error = body.get("error", body) if isinstance(body, dict) else body
    facts = error if isinstance(error, dict) else {"message": error}
    message = str(facts.get("message", error))
    if facts.get("type") == _TOO_LONG:
        return (
            f"A prompt of {facts.get('n_prompt_tokens', '?')} tokens is longer than the context of"
            f" a request, {facts.get('n_ctx', '?')} tokens. Raise context_size, lower parallel, or"
            " shorten the prompt."
        )
    if _FULL in message:
        return (
            "The concurrent requests and their answers exceed the server's total context. Raise"
            " context_size, or lower max_tokens or parallel."
        )
    if status is None:
        return f"The server could not go on: {message}"
    return f"The server refused a request with status {status}: {message}"
