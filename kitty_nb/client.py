"""Clients that know a server's address and key, for code in a notebook."""

from __future__ import annotations

import json
import ssl
from contextlib import aclosing
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import httpx
from httpx_sse import EventSource, SSEError

from kitty_nb.errors import NoAnswerError, ServerError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

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

    def openai(self, http: httpx.Client) -> Any:
        """Make an `openai.OpenAI` that uses `http`, or return `http` where that is missing."""
        if find_spec("openai") is None:
            return http
        return import_module("openai").OpenAI(**self._credentials(), http_client=http)

    def asynchronous(self) -> Any:
        """Make an `openai.AsyncOpenAI`, or an `httpx.AsyncClient` where that is missing."""
        http = self.async_http()
        if find_spec("openai") is None:
            return http
        return import_module("openai").AsyncOpenAI(**self._credentials(), http_client=http)

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
        part: dict[str, Any] = {}
        try:
            async with (
                self.async_http() as http,
                http.stream(
                    "POST", "/v1/chat/completions", json={**request, "stream": True}
                ) as response,
                aclosing(answer_parts(response)) as parts,
            ):
                if response.is_error:
                    raise ServerError(refusal(await response.aread(), response.status_code))
                async for part in parts:
                    if part.get("error"):
                        raise ServerError(refusal(part))
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
            raise ServerError(_broken_off(type(error).__name__)) from None
        if finish is None and not (said or thought or tools):
            raise ServerError(not_an_answer(response, json.dumps(part) if part else ""))
        if finish is None:
            raise ServerError(_broken_off("its end is missing"))
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

    def _credentials(self) -> dict[str, str]:
        key = self.api_key.get_secret_value() if self.api_key else "none"  # it insists on one
        return {"base_url": self.base_url, "api_key": key}


async def answer_parts(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the JSON objects of a streamed answer, also of one that comes whole.

    Raises:
        ServerError: What came is no answer of llama-server.
        httpx.HTTPError: The server broke off.
    """
    if response.headers.get("Content-Type", "").startswith("application/json"):
        yield _part(response, (await response.aread()).decode(errors="replace"))
        return
    try:
        async with aclosing(EventSource(response).aiter_sse()) as events:
            async for event in events:
                if event.data == "[DONE]":
                    return
                if event.data:
                    yield _part(response, event.data)
    except SSEError:
        text = (await response.aread()).decode(errors="replace")
        raise ServerError(not_an_answer(response, text)) from None


def _broken_off(how: str) -> str:
    """Say that an answer has no end."""
    return f"The answer ended early ({how}): the server was stopped or crashed. See its log."


def _part(response: httpx.Response, text: str) -> dict[str, Any]:
    try:
        part = json.loads(text)
    except ValueError:
        part = None
    if isinstance(part, dict):
        return part
    raise ServerError(not_an_answer(response, text))


def not_an_answer(response: httpx.Response, text: str) -> str:
    """Say what came where an answer of llama-server should."""
    kind = response.headers.get("Content-Type", "no content type")
    start = " ".join(text[:_QUOTED].split())
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


def refusal(said: Any, status: int | None = None) -> str:
    """Return what an error of llama-server means for the user.

    Args:
        said: The body of its answer, as bytes or as JSON.
        status: That of the answer; None where the error came in the middle of one.
    """
    if isinstance(said, bytes):
        try:
            said = json.loads(said)
        except ValueError:
            said = str(said, errors="replace").strip()
    error = said.get("error", said) if isinstance(said, dict) else said
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
