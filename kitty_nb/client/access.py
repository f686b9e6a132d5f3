"""The address and key of a server, and the clients made from them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import httpx

from kitty_nb.tls import tls_context

if TYPE_CHECKING:
    from pydantic import SecretStr

_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # a long answer on a slow machine takes minutes


@dataclass(frozen=True, slots=True)
class Access:
    """The address and key of a server."""

    endpoint: str  # its address
    api_key: SecretStr | None  # what it asks for, or None when it asks for nothing
    # The model to ask, where it may be any server of OpenAI's protocol; None for a llama-server.
    model: str | None = None

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

    def _settings(self) -> dict[str, Any]:
        key = self.api_key
        return {
            "base_url": self.endpoint,
            "headers": {"Authorization": f"Bearer {key.get_secret_value()}"} if key else None,
            "timeout": _TIMEOUT,
            "trust_env": False,  # a proxy for the internet must not see local requests
            "verify": tls_context(self.endpoint),
        }


class Connections:
    """Clients whose connections are used again, until another server is asked."""

    def __init__(self) -> None:
        self._http: tuple[tuple[Access, int], httpx.Client] | None = None
        self._requests: tuple[Access, httpx.AsyncClient] | None = None

    def http(self, access: Access) -> httpx.Client:
        """Return the client for the user."""
        key = access, os.getpid()  # a forked child must not use its parent's connections
        if self._http is None or self._http[0] != key:
            self.close()
            self._http = key, access.http()
        return self._http[1]

    async def requests(self, access: Access) -> httpx.AsyncClient:
        """Return the client for this package's own requests, which one event loop makes."""
        if self._requests is None or self._requests[0] != access:
            await self.aclose()
            self._requests = access, access.async_http()
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
