"""Requests to the least busy replica, and to another one if it dies before it answers."""

from __future__ import annotations

import random
import re
from collections import Counter
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from kitty_nb.errors import ServerFailedError
from kitty_nb.network import tls_context

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence

    from anyio.from_thread import BlockingPortal
    from pydantic import SecretStr

_ASKED = 4  # replicas that are asked for their slots per request, however many there are
_SLOTS_WITHIN = 0.25  # seconds; one that does not answer by then is busy with a prompt
# A part of a streamed answer that contains words.
_WORDS = re.compile(rb'"(?:content|reasoning_content|text|arguments)"\s*:\s*"[^"]')
_BLANK = b"\n\n"


@dataclass(frozen=True, slots=True)
class Target:
    """A replica that is ready.

    Attributes:
        url: Its address.
        slots: Requests that it can process at once; None if the build does not report it.
    """

    url: str
    slots: int | None = None


class LeastBusyTransport(httpx.AsyncBaseTransport):
    """A transport that sends each request to the replica with the most free slots.

    It knows which slots its own requests occupy, and asks a few replicas for the others. If a
    replica breaks off before any word of its answer has arrived, another one takes over.

    Args:
        targets: Returns the replicas that are ready.
        key: The key that they require.
    """

    def __init__(self, targets: Callable[[], Sequence[Target]], key: SecretStr | None) -> None:
        self._targets = targets
        self._headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        limits = httpx.Limits(max_connections=None)
        self._pool = httpx.AsyncHTTPTransport(verify=tls_context("http:"), limits=limits)
        self._under_way: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Have a replica answer a request.

        Raises:
            ServerFailedError: No replica is ready, or none is left to try.
        """
        await request.aread()
        answer = _Answer(self, request)
        response = await answer.begin()
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=answer,
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._pool.aclose()

    async def pick(self, tried: set[str]) -> str:
        """Return the address of the least busy replica, and count a request to it."""
        targets = [target for target in self._targets() if target.url not in tried]
        if not targets:
            raise ServerFailedError(
                f"All {len(tried)} replicas that were ready failed to answer. See `fleet.replicas`."
                if tried
                else "No replica is ready. Wait for one: fleet.wait_ready(1)."
            )
        busy: dict[str, int] = {}

        def share(target: Target, unknown: int = 0) -> float:
            known = max(busy.get(target.url, unknown), self._under_way[target.url])
            return known / (target.slots or 1)

        random.shuffle(targets)
        targets = sorted(targets, key=share)[:_ASKED]
        if len(targets) > 1:
            with anyio.move_on_after(_SLOTS_WITHIN):
                async with anyio.create_task_group() as tasks:

                    async def ask(target: Target) -> None:
                        busy[target.url] = count = await self._slots_busy(target.url)
                        if not count and not self._under_way[target.url]:
                            tasks.cancel_scope.cancel()  # none is less busy

                    for target in targets:
                        tasks.start_soon(ask, target)
        late = max((target.slots or 1) for target in targets)
        url = min(targets, key=lambda target: share(target, late)).url
        self._under_way[url] += 1
        return url

    def done(self, url: str) -> None:
        """Stop counting a request."""
        self._under_way[url] -= 1

    async def send(self, request: httpx.Request, url: str) -> httpx.Response:
        """Send a request to one replica."""
        base = httpx.URL(url)
        target = request.url.copy_with(scheme=base.scheme, host=base.host, port=base.port)
        headers = request.headers.copy()
        headers.update({"Host": base.netloc.decode(), "Connection": "close", **self._headers})
        return await self._pool.handle_async_request(
            httpx.Request(
                request.method,
                target,
                headers=headers,
                content=request.content,
                extensions=request.extensions,
            )
        )

    async def _slots_busy(self, url: str) -> int:
        """Return how many busy slots a replica reports; 0 if its build reports none."""
        request = httpx.Request("GET", f"{url}/slots", headers=self._headers)
        request.extensions = {"timeout": httpx.Timeout(_SLOTS_WITHIN).as_dict()}
        try:
            response = await self._pool.handle_async_request(request)
            try:
                await response.aread()
                slots: Any = response.json()
            finally:
                await response.aclose()
            return sum(bool(slot.get("is_processing")) for slot in slots)
        except (httpx.HTTPError, ValueError, AttributeError, TypeError):
            return 0


class _Answer(httpx.AsyncByteStream):
    """The answer to one request; until its first word, another replica can begin it again."""

    def __init__(self, transport: LeastBusyTransport, request: httpx.Request) -> None:
        self._transport, self._request = transport, request
        self._response: httpx.Response
        self._tried: set[str] = set()
        self._at: str | None = None  # the replica that has the request

    async def begin(self) -> httpx.Response:
        """Have the next replica begin to answer."""
        while True:
            self._leave()
            self._at = await self._transport.pick(self._tried)
            self._tried.add(self._at)
            try:
                self._response = response = await self._transport.send(self._request, self._at)
            except BaseException as error:
                broken = isinstance(error, httpx.TransportError)
                if broken and not isinstance(error, httpx.ReadTimeout):
                    continue
                self._leave()  # an answer that is late may be as late anywhere
                raise
            if response.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                return response
            await response.aclose()  # it is loading, as after a crash

    def _leave(self) -> None:
        if self._at:
            self._transport.done(self._at)
        self._at = None

    @property
    def _is_stream(self) -> bool:
        kind = str(self._response.headers.get("Content-Type", ""))
        return kind.startswith("text/event-stream")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        begun = False
        while True:
            try:
                async with aclosing(self._parts()) as parts:
                    async for part in parts:
                        begun = begun or not self._is_stream or bool(_WORDS.search(part))
                        yield part
            except httpx.TransportError as error:
                if begun or isinstance(error, httpx.TimeoutException):
                    raise
                with suppress(httpx.HTTPError):
                    await self._response.aclose()
                await self.begin()
            else:
                return

    async def _parts(self) -> AsyncGenerator[bytes]:
        """Yield whole events: a truncated one must not be joined to another replica's answer."""
        stream: Any = self._response.stream
        rest = b""
        async for chunk in stream:
            if self._is_stream:
                whole, blank, rest = (rest + chunk).rpartition(_BLANK)
            else:
                whole, blank = chunk, b""
            if whole or blank:
                yield whole + blank
        if rest:
            yield rest

    async def aclose(self) -> None:
        self._leave()
        await self._response.aclose()


class BlockingTransport(httpx.BaseTransport):
    """An adapter from clients that block to a transport on another thread's event loop.

    Args:
        transport: The transport.
        portal: The portal to its loop.
    """

    def __init__(self, transport: LeastBusyTransport, portal: BlockingPortal) -> None:
        self._transport, self._portal = transport, portal

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and wait until an answer begins."""
        request.read()
        response = self._portal.call(self._transport.handle_async_request, request)
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=_BlockingStream(response, self._portal),
        )


class _BlockingStream(httpx.SyncByteStream):
    def __init__(self, response: httpx.Response, portal: BlockingPortal) -> None:
        self._response, self._portal = response, portal

    def __iter__(self) -> Iterator[bytes]:
        stream: Any = self._response.stream
        yield from iter(partial(self._portal.call, anext, aiter(stream), None), None)

    def close(self) -> None:
        self._portal.call(self._response.aclose)
