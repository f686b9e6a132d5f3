"""Clients that know a server's address and key, for code in a notebook."""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import httpx

from kitty_nb.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import SecretStr

_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # a long answer on a slow machine takes minutes


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
    """How to reach a server.

    Attributes:
        endpoint: Its address.
        api_key: What it asks for, or None when it asks for nothing.
    """

    endpoint: str
    api_key: SecretStr | None

    @property
    def base_url(self) -> str:
        """Where clients of OpenAI's protocol find it."""
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
            ServerError: The server refused the request, or broke off.
        """
        answer = []
        try:
            async with (
                httpx.AsyncClient(**self._settings()) as http,
                http.stream(
                    "POST", "/v1/chat/completions", json={**request, "stream": True}
                ) as response,
            ):
                if response.is_error:
                    raise ServerError(f"The server refused this: {_reason(await response.aread())}")
                async for line in response.aiter_lines():
                    for piece in _pieces(line):
                        on_piece(piece)
                        answer += [] if piece.thinking else [piece.text]
        except httpx.HTTPError as error:
            raise ServerError(
                f"The server broke off its answer ({type(error).__name__}). See its log: it was"
                " stopped, or has crashed."
            ) from None
        return "".join(answer)

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


def _pieces(line: str) -> list[Piece]:
    """What a line of a streamed answer says.

    Raises:
        ServerError: It says that the server cannot go on.
    """
    kind, _, data = line.partition(": ")
    if kind not in {"data", "error"} or data == "[DONE]":
        return []
    event = json.loads(data)
    if kind == "error" or "error" in event:
        raise ServerError(f"The server could not go on: {_reason(data.encode())}")
    pieces = []
    for choice in event["choices"]:
        delta = choice["delta"]
        if thought := delta.get("reasoning_content"):
            pieces.append(Piece(thought, thinking=True))
        if text := delta.get("content"):
            pieces.append(Piece(text))
    return pieces


def _reason(body: bytes) -> str:
    """What an error's body says: llama-server puts the sentence at `error.message`."""
    try:
        said = json.loads(body)
        error = said.get("error", said)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return body.decode(errors="replace")
