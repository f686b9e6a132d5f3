"""The way to a server: its address and key, requests to it, and one reader for all answers."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import aclosing
from dataclasses import dataclass, replace
from http import HTTPStatus
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import httpx
from httpx_sse import EventSource, SSEError

from kitty_nb.errors import RefusedError, ServerError, first_of, not_encodable
from kitty_nb.network import tls_context

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable

    from pydantic import SecretStr

T = TypeVar("T")

_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # a long answer on a slow machine takes minutes


@dataclass(frozen=True, slots=True)
class Access:
    """The address and key of a server."""

    endpoint: str  # its address
    api_key: SecretStr | None  # the key that it requires; None if it requires none
    # The model to ask for, if any OpenAI-compatible server may answer; None for a llama-server.
    model: str | None = None

    @property
    def base_url(self) -> str:
        """The base URL for OpenAI clients."""
        return f"{self.endpoint}/v1"

    def http(self) -> httpx.Client:
        """Create a client for any path, such as `/v1/chat/completions` or `/slots`."""
        return httpx.Client(**self._settings())

    def async_http(self) -> httpx.AsyncClient:
        """Create an asynchronous client for any path."""
        return httpx.AsyncClient(**self._settings())

    def openai(self, http: httpx.Client | httpx.AsyncClient) -> Any:
        """Create an OpenAI client that uses `http`, or return `http` if `openai` is missing."""
        if find_spec("openai") is None:
            return http
        kind = "OpenAI" if isinstance(http, httpx.Client) else "AsyncOpenAI"
        key = self.api_key.get_secret_value() if self.api_key else "none"  # the client requires one
        made = getattr(import_module("openai"), kind)
        return made(base_url=self.base_url, api_key=key, http_client=http)

    def _settings(self) -> dict[str, Any]:
        key = self.api_key
        return {
            "base_url": self.endpoint,
            "headers": {"Authorization": f"Bearer {key.get_secret_value()}"} if key else None,
            "timeout": _TIMEOUT,
            # httpx stops at 100, and has the others wait in the client.
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=20),
            "trust_env": False,  # a proxy for the internet must not see local requests
            "verify": tls_context(self.endpoint),
        }


class Connections:
    """Clients that reuse their connections until another server is asked."""

    def __init__(self) -> None:
        self._http: tuple[tuple[Access, int], httpx.Client] | None = None
        self._requests: tuple[Access, httpx.AsyncClient] | None = None

    def http(self, access: Access) -> httpx.Client:
        """Return the client for the user."""
        # A forked child must not use its parent's connections.
        key = replace(access, model=None), os.getpid()
        if self._http is None or self._http[0] != key:
            self.close()
            self._http = key, access.http()
        return self._http[1]

    async def requests(self, access: Access) -> httpx.AsyncClient:
        """Return the client for this package's own requests, all of them on one event loop."""
        server = replace(access, model=None)  # an answer of another model there may still stream
        if self._requests is None or self._requests[0] != server:
            earlier, http = self._requests, access.async_http()
            self._requests = server, http  # before another request gets a turn
            if earlier:
                await earlier[1].aclose()
            return http
        return self._requests[1]

    def close(self) -> None:
        """Close the client for the user."""
        if self._http:
            self._http[1].close()
            self._http = None

    async def aclose(self) -> None:
        """Close the client for our own requests."""
        if self._requests:
            (_, http), self._requests = self._requests, None
            await http.aclose()


# The statuses with which llama-server refuses a request for its contents, not its key or its time.
_ABOUT_IT = {HTTPStatus.BAD_REQUEST, HTTPStatus.INTERNAL_SERVER_ERROR}
# llama-server promises to keep a connection, but closes it after a stream: reusing it at once, as
# in the next round of tool calls, would fail.
_ONCE = {"Connection": "close"}
_QUOTED = 200  # characters of a response that is not an answer
# llama-server's errors if a prompt, or all concurrent prompts and answers together, are too long.
_TOO_LONG = "exceed_context_size_error"
_FULL = "Context size has been exceeded"
_TOO_LARGE = re.compile(r"input \((\d+) tokens\) is too large.*batch size: (\d+)")


async def post(
    http: httpx.AsyncClient, path: str, request: dict[str, Any], wanted: str
) -> dict[str, Any]:
    """Send a request; return the JSON answer, which always has the key `wanted` from llama-server.

    Raises:
        RefusedError: The server refused the contents of the request.
        ServerError: It is not ready, requires another key, or is not a llama-server.
        httpx.HTTPError: The connection broke.
    """
    response = await http.send(_request(http, path, request))
    # Ollama says 404 of a model that it lacks.
    if response.status_code == HTTPStatus.NOT_FOUND and b"model" not in response.content:
        raise ServerError(
            f"The server has no {path}. If it is a llama-server, update llama.cpp; others lack it."
        )
    if response.is_error:
        error = RefusedError if response.status_code in _ABOUT_IT else ServerError
        raise error(_refusal(response.content, response.status_code))
    return _part(response, response.content, {wanted})


async def ask_each(items: Iterable[T], at_once: int, ask: Callable[[T], Awaitable[None]]) -> None:
    """Call `ask` for each item, several at once; the first error cancels the rest and is raised."""
    left = iter(items)

    async def work() -> None:
        for item in left:
            await ask(item)

    try:
        async with anyio.create_task_group() as tasks:
            for _ in range(at_once):
                tasks.start_soon(work)
    except ExceptionGroup as group:
        error = first_of(group)
        raise error from error.__cause__  # which `broken_off` looks for


async def stream(
    http: httpx.AsyncClient, path: str, request: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """Send a request; yield the answer's JSON objects as they arrive, or the one of a whole answer.

    Raises:
        ServerError: The server refused the request, failed midway, or is not a llama-server.
        httpx.HTTPError: The connection broke.
    """
    asked = _request(http, path, {**request, "stream": True}, _ONCE)
    async with aclosing(await http.send(asked, stream=True)) as response:
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
    """Return the properties that the server reports; empty if it reports none."""
    try:
        said = (await http.get("/props")).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def broken_off(error: httpx.HTTPError | None = None) -> str:
    """Describe an answer that ended early, with the error that cut it short."""
    if no_files := out_of_files(error):
        return no_files
    if isinstance(error, httpx.ReadTimeout):
        return (
            f"Nothing came for {_TIMEOUT.read:g} s: the server is busy, reads a long prompt or"
            " hangs. See its log."
        )
    how = type(error).__name__ if error else "its end is missing"
    return (
        f"The answer ended early ({how}): the server was stopped or crashed, or the connection to"
        " it broke. See its log."
    )


def out_of_files(error: BaseException | None) -> str:
    """Return the remedy if an error's cause is too many open files; empty if it is another one."""
    while error:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            return (
                "Each request takes an open file, and this process may have no more. Try fewer at"
                " once, or raise its limit (ulimit -n)."
            )
        error = error.__cause__ or error.__context__
    return ""


def _request(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> httpx.Request:
    try:
        return http.build_request("POST", path, json=body, headers=headers)
    except UnicodeEncodeError as error:
        raise not_encodable(error) from None


def _part(response: httpx.Response, content: bytes, wanted: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON object in a part of an answer, which must have one of the `wanted` keys."""
    try:
        part = json.loads(content)
    except (ValueError, RecursionError):
        part = None
    if not isinstance(part, dict) or (wanted and not part.keys() & {*wanted, "error"}):
        raise ServerError(_not_an_answer(response, content))
    if part.get("error"):
        raise ServerError(_refusal(content))
    return part


def _not_an_answer(response: httpx.Response, content: bytes) -> str:
    """Describe what was sent instead of an answer of llama-server."""
    kind = response.headers.get("Content-Type", "no content type")
    start = " ".join(content.decode(errors="replace")[:_QUOTED].split())
    return (
        f"{response.url} did not answer like llama-server, but with {response.status_code} and"
        f" {kind}: {start!r}. Check what listens there: a proxy, a login page or another program."
    )


def _refusal(said: bytes, status: int | None = None) -> str:
    """Explain an error of llama-server to the user.

    `status` is None if the error came in the middle of an answer.
    """
    try:
        body = json.loads(said)
    except (ValueError, RecursionError):
        body = str(said, errors="replace").strip()
    error = body.get("error", body) if isinstance(body, dict) else body
    facts = error if isinstance(error, dict) else {"message": error}
    message = str(facts.get("message", error))
    if facts.get("type") == _TOO_LONG:
        return (
            f"A prompt of {facts.get('n_prompt_tokens', '?')} tokens is longer than the context of"
            f" a request, {facts.get('n_ctx', '?')} tokens. Shorten the prompt, or give the server"
            " a larger context (LLAMACPP_CTX) or fewer slots (LLAMACPP_PARALLEL)."
        )
    if too_large := _TOO_LARGE.search(message):
        return (
            f"A text of {too_large[1]} tokens is longer than the model takes in one go,"
            f" {too_large[2]} tokens. Shorten the text, or give the server a larger context and"
            " batches (LLAMACPP_CTX, LLAMACPP_BATCH_SIZE, LLAMACPP_UBATCH_SIZE)."
        )
    if _FULL in message:
        return (
            "The concurrent requests and their answers exceed the server's total context. Send"
            " fewer at once, lower max_tokens, or give the server a larger context (LLAMACPP_CTX)."
        )
    if status is None:
        return f"The server failed midway: {message}"
    return f"The server refused a request with status {status}: {message}"
