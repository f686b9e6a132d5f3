"""Health checks: requests to a server, and the decision that it is ready."""

from __future__ import annotations

import http.client
import time
from contextlib import suppress
from dataclasses import replace
from enum import Enum, auto
from functools import cached_property
from http import HTTPStatus
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio

from kitty_nb.engine.command_line import sleeps as frees_itself
from kitty_nb.errors import RefusedError, ServerCrashedError, ServerError, not_encodable
from kitty_nb.network import tls_context
from kitty_nb.supervisor.events import (
    Activity,
    Event,
    HealthChecked,
    HealthCheckResult,
    Level,
    ServerStatus,
)
from kitty_nb.supervisor.requests import AnswerPace, decoded


class Late(ModuleType):
    """A module that is imported on first use, while a server already loads."""

    def __getattr__(self, name: str) -> object:
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx
    from pydantic import SecretStr

    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.process import ServerProcess

    OnSlots = Callable[[list[dict[str, Any]], float | None], object]
else:
    httpx = Late("httpx")


_ANSWER_WITHIN = 5.0  # seconds
NOT_IN_TIME = HealthCheckResult(ServerStatus.STARTING, message="no answer in time")
NOT_YET = HealthCheckResult(ServerStatus.STARTING, message="no answer yet")


def read_answer(status: int, reason: str, latency: float) -> HealthCheckResult:
    """Interpret an answer: 503 is LOADING, 200 is READY."""
    if status == HTTPStatus.OK:
        return HealthCheckResult(ServerStatus.READY, latency, "ok")
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return HealthCheckResult(ServerStatus.LOADING, latency, "loading model")
    elsewhere = status == HTTPStatus.NOT_FOUND
    why = "; a script may have set --api-prefix" if elsewhere else ""
    return HealthCheckResult(
        ServerStatus.STARTING, latency, f"/health answered {status} {reason}{why}"
    )


def ask_once(endpoint: str) -> HealthCheckResult:
    """Ask a base URL's `/health`, without a key or a proxy. It blocks.

    It avoids httpx, whose import takes several times as long as the request.
    """
    began = time.perf_counter()
    where = urlsplit(endpoint)
    connection = http.client.HTTPConnection(
        where.hostname or "", where.port, timeout=_ANSWER_WITHIN
    )
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
    except TimeoutError:
        return NOT_IN_TIME
    except (OSError, http.client.HTTPException):
        return NOT_YET
    finally:
        connection.close()
    return read_answer(answer.status, answer.reason, time.perf_counter() - began)


_KEY_REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_PATIENCE, _CONNECT_WITHIN = 5.0, 1.0  # seconds
# The smallest request to a server, for each kind of model.
_FIRST_REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/completion", {"prompt": "Hello", "n_predict": 1, "cache_prompt": False}),
    ("/v1/embeddings", {"input": "Hello"}),
    ("/v1/rerank", {"query": "Hello", "documents": ["Hello"]}),
)
_ANOTHER_KIND = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)
_ENCODES_ONLY = "logits computation"  # what a model that only encodes lacks
_ASK_AGAIN, _LOOK_AGAIN = 0.2, 1.0  # seconds


class Identity(Enum):
    """The identity of a server, by the model that it names."""

    OURS = auto()
    OTHER_MODEL = auto()
    KEY_REFUSED = auto()


class Probe:
    """Asks one server. It holds a connection: close it with `aclose`.

    Its key goes nowhere else: redirects are not followed.

    Args:
        endpoint: The server's base URL.
        api_key: The key that it requires.
        connect_within: The seconds within which it must accept the connection.
    """

    def __init__(
        self, endpoint: str, api_key: SecretStr | None, connect_within: float = _CONNECT_WITHIN
    ) -> None:
        self.api_key = api_key
        self._endpoint, self._connect_within = endpoint, connect_within
        self._key = {"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else None

    @cached_property
    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._endpoint,
            timeout=httpx.Timeout(_PATIENCE, connect=self._connect_within),
            trust_env=False,  # a proxy for the internet must not see local requests
            verify=tls_context(self._endpoint),
        )

    async def aclose(self) -> None:
        """Close the connection."""
        if "_client" in vars(self):
            await self._client.aclose()


class HealthProbe(Probe):
    """Asks one llama-server.

    Args:
        config: The settings that the server was started with.
        api_key: The key that it requires.
        trusted: Whether the process that listens on its port is known to be that server.
        sleeps: Whether it frees an idle model by itself; None if the settings tell.
        on_slots: Called with each answer of its `/slots` as it comes, and the tokens per second
            since the one before, if reported.

    Attributes:
        trusted: Likewise. Until it is, only `/health` is requested, without the key.
        process: The server's process, by which it becomes trusted.
    """

    def __init__(
        self,
        config: ServerConfig,
        api_key: SecretStr | None = None,
        *,
        trusted: bool = False,
        sleeps: bool | None = None,
        on_slots: OnSlots = lambda *_: None,
    ) -> None:
        super().__init__(config.endpoint, api_key)
        self.trusted = trusted
        self.process: ServerProcess | None = None
        self._slots: list[dict[str, Any]] = []  # the last answer; empty if it gives none
        self._on_slots = on_slots
        self._port = config.port
        self._news = anyio.Event()
        self._alias = config.served_alias
        by_settings = config.idle_shutdown_seconds is not None or frees_itself(config.extra_args)
        self._sleeps = by_settings if sleeps is None else sleeps
        self._pace = AnswerPace()

    @cached_property
    def _health(self) -> httpx.Request:
        """The request, built once: building it is much of the cost of a check."""
        return self._client.build_request("GET", "/health")

    def hint(self) -> None:
        """Wake the health check: the log hints that the answer has changed."""
        self._news.set()

    async def hinted(self, *, within: float) -> bool:
        """Wait for the next hint; return whether one came."""
        with anyio.move_on_after(within):
            await self._news.wait()
        hinted = self._news.is_set()
        self._news = anyio.Event()
        return hinted

    async def find_listener(self) -> bool:
        """Find out whether our process is the one that listens: then it is until it exits."""
        if not self.trusted and self.process:
            listens = await anyio.to_thread.run_sync(self.process.listens_on, self._port)
            self.trusted = self.trusted or listens is not False
        return self.trusted

    async def check(self) -> HealthCheckResult:
        """Ask `/health`: no answer is STARTING, 503 is LOADING, 200 is READY."""
        began = time.perf_counter()
        try:
            response = await self._client.send(self._health)
        except httpx.TimeoutException:
            return NOT_IN_TIME
        except httpx.HTTPError:
            return NOT_YET
        latency = time.perf_counter() - began
        return read_answer(response.status_code, response.reason_phrase, latency)

    async def check_activity(self, *, idle: bool = False) -> HealthCheckResult:
        """Like `check`, but with what is known about its slots, or about its sleep.

        If its log says that it is idle, slots that were idle are not read again, because some
        builds log a line for each request.
        """
        result = await self.check()
        if result.status is not ServerStatus.READY:
            return result
        if not self.trusted:
            unknown = "not yet identified as the server that kitty_nb started"
            return replace(result, status=ServerStatus.STARTING, message=unknown)
        if self._sleeps:  # reading its slots would keep it awake
            props = await self.get("/props")
            asleep = isinstance(props, dict) and bool(props.get("is_sleeping"))
            return replace(result, asleep=asleep)
        if idle and self._slots and not _busy(self._slots):
            pace = self._pace.measure(self._slots, time.monotonic())
        else:
            pace = await self.look_at_slots()
        if not self._slots:
            return result
        return replace(
            result,
            slots_busy=_busy(self._slots),
            slots_total=len(self._slots),
            tokens_per_second=pace,
            silent_for=self._pace.silence(time.monotonic()),
        )

    async def look_at_slots(self) -> float | None:
        """Read `/slots`; return the tokens per second since the last look, if reported."""
        self._slots = slots = await self.ask_slots()
        pace = self._pace.measure(slots, time.monotonic()) if slots else None
        if slots:
            self._on_slots(slots, pace)
        return pace

    async def identify(self) -> Identity:
        """Ask for the model's name, which distinguishes our own server from another.

        Builds that don't list their models get the benefit of the doubt.
        """
        models = await self.get("/v1/models")
        if models in _KEY_REFUSED:
            return Identity.KEY_REFUSED
        named = [(one.get("id"), *(one.get("aliases") or ())) for one in objects_in(models, "data")]
        ours = not named or any(self._alias in names for names in named)
        return Identity.OURS if ours else Identity.OTHER_MODEL

    async def first_answer(self) -> str | None:
        """Have it compute one token, or the embedding of one word, however long that takes.

        A device that failed while the model was loaded may leave a server whose `/health` is good.
        A faster client may occupy all slots for long: the tokens that it gets are proof as well.

        Returns:
            The error that the server reports; None if it has answered.
        """
        said = None
        async with anyio.create_task_group() as tasks:

            async def look_at_slots() -> None:
                while True:
                    await anyio.sleep(_LOOK_AGAIN)
                    slots = await self.ask_slots()
                    if any(slot.get("is_processing") and decoded(slot) for slot in slots):
                        tasks.cancel_scope.cancel()

            tasks.start_soon(look_at_slots)
            said = await self._first_failure()
            tasks.cancel_scope.cancel()
        return said

    async def _first_failure(self) -> str | None:
        for path, request in _FIRST_REQUESTS:
            response = await self._post(path, request)
            if response.status_code not in _ANOTHER_KIND and _ENCODES_ONLY not in response.text:
                # A refusal is an answer, too.
                return _failure(response) if response.is_server_error else None
        return None

    async def _post(self, path: str, request: dict[str, Any]) -> httpx.Response:
        while True:
            with suppress(httpx.HTTPError):  # an exit is noticed elsewhere
                response = await self._send("POST", path, json=request)
                if response.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                    return response
            await anyio.sleep(_ASK_AGAIN)

    async def _send(
        self, method: str, path: str, within: float | None = None, **options: Any
    ) -> httpx.Response:
        """Send a request, and wait for its answer, by default however long that takes."""
        patience = httpx.Timeout(_PATIENCE, connect=_CONNECT_WITHIN, read=within)
        return await self._client.request(
            method, path, headers=self._key, timeout=patience, **options
        )

    async def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        within: float | None = _PATIENCE,
    ) -> str:
        """Send a request; return why it failed, or an empty string.

        Args:
            method: The HTTP method.
            path: The path.
            body: The body, sent as JSON.
            within: The seconds to wait for an answer; None for no limit.
        """
        try:
            response = await self._send(method, path, within, json=body)
        except httpx.HTTPError as error:
            return f"it does not answer ({type(error).__name__})"
        return "" if response.is_success else _failure(response)

    async def ask_slots(self) -> list[dict[str, Any]]:
        """Return the current answer of `/slots`; nothing if it gives none."""
        return objects(await self.get("/slots"))

    async def post(
        self, path: str, request: dict[str, Any], asked: anyio.Event | None = None
    ) -> dict[str, Any]:
        """Have the server do something, however long that takes, and return its answer.

        `asked` is set once the request is sent.

        Raises:
            RefusedError: It can't do that, now or later.
            ServerCrashedError: It broke off.
            ServerError: It won't do it now, or has not been identified as ours.
        """
        if not self.trusted:
            raise ServerError("it has not been identified as the server that kitty_nb started")

        async def trace(step: str, _: object) -> None:
            if asked and step == "http11.send_request_body.complete":
                asked.set()

        try:
            response = await self._send("POST", path, json=request, extensions={"trace": trace})
            said = response.json()
        except UnicodeEncodeError as error:
            raise not_encodable(error) from None
        except (httpx.HTTPError, ValueError) as error:
            raise ServerCrashedError(f"it does not answer ({type(error).__name__})") from None
        if response.is_error or not isinstance(said, dict):
            never = response.status_code == HTTPStatus.NOT_IMPLEMENTED
            raise (RefusedError if never else ServerError)(_failure(response))
        return said

    async def get(self, path: str) -> Any:
        """Return its answer to a GET request, or the status with which it rejects our key.

        None without an answer, or until it has been identified as ours.
        """
        if not self.trusted:
            return None
        try:
            response = await self._client.get(path, headers=self._key)
            if response.status_code in _KEY_REFUSED:
                return HTTPStatus(response.status_code)
            return response.json() if response.status_code == HTTPStatus.OK else None
        except (httpx.HTTPError, ValueError):
            return None


def _busy(slots: list[dict[str, Any]]) -> int:
    return sum(bool(slot.get("is_processing")) for slot in slots)


def _failure(response: httpx.Response) -> str:
    """Return the error that a server reports."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"answered {response.status_code} {response.reason_phrase}"


def objects_in(answer: Any, key: str) -> list[dict[str, Any]]:
    """Return the list of objects in an answer, if it is one: it need not be a llama-server's."""
    return objects(answer.get(key)) if isinstance(answer, dict) else []


def objects(answer: Any) -> list[dict[str, Any]]:
    """Return the objects of a list, if it is one."""
    return [one for one in answer if isinstance(one, dict)] if isinstance(answer, list) else []


_SILENT = 10.0  # seconds after which a request without a first token is reported
FIRST_ANSWER = "no first answer yet"


class HealthReporter:
    """Turns the answers of a server into events for the user.

    Args:
        attempts: The number at which the count of a load's checks, one a second, stops.
        routes: Whether the server is a router, which loads no model itself.
        silent: Whether to leave out the sentences, because the server was ready when found.
    """

    def __init__(self, attempts: int, *, routes: bool, silent: bool) -> None:
        self._attempts, self._routes, self._silent = attempts, routes, silent
        self._attempt, self._due = 0, 0.0
        self._loaded_at: float | None = None

    def load_news(self, result: HealthCheckResult, elapsed: float) -> tuple[Event, ...]:
        """Return this second's check of a load, if it is due or the last, and what it says."""
        due = elapsed >= self._due
        if due:
            self._attempt = min(self._attempt + 1, self._attempts)
            # Not one for each second missed: the load may have begun before this watch.
            self._due = max(self._due, elapsed // 1.0) + 1.0
        if not due and result.status is not ServerStatus.READY:
            return ()
        attempt = max(self._attempt, 1)
        check = HealthChecked(result, attempt, self._attempts)
        sentence = self._sentence(result, attempt, elapsed)
        if self._silent or not sentence:
            return (check,)
        level = Level.SUCCESS if result.status is ServerStatus.READY else Level.INFO
        return check, Activity.now(sentence, level)

    def _sentence(self, result: HealthCheckResult, attempt: int, elapsed: float) -> str:
        if result.status is ServerStatus.READY:
            checks = "1 check" if attempt == 1 else f"{attempt} checks"
            done = "The router is ready" if self._routes else "Model loaded"
            return f"{done} ({checks}, {elapsed:.0f}s elapsed)"
        if self._routes and result.status is ServerStatus.LOADING:
            return ""
        if result.message == FIRST_ANSWER:
            self._loaded_at = elapsed if self._loaded_at is None else self._loaded_at
            slow = elapsed - self._loaded_at >= _SILENT
            why = " (some devices compile kernels for minutes first)" if slow else ""
            said = f"The model is loaded; waiting for its first answer{why}…"
            return f"{said} ({elapsed:.0f}s elapsed)"
        if result.status is ServerStatus.LOADING:
            count = f"{attempt}/{self._attempts}, " if elapsed < self._attempts else ""
            return f"Loading model… ({count}{elapsed:.0f}s elapsed)"
        if attempt > 1:
            return f"Server starting… ({result.message}, {elapsed:.0f}s elapsed)"
        return ""

    @staticmethod
    def serving_news(before: HealthCheckResult, now: HealthCheckResult) -> tuple[Event, ...]:
        """Return what has changed about a server that was ready."""
        sentence, level = "", Level.INFO
        if before.status is ServerStatus.READY is not now.status:
            level = Level.WARNING
            sentence = (
                f"The server is running but not responding ({now.message}): it hangs or is paused."
                " Restart it if it does not recover."
            )
        elif now.status is ServerStatus.READY is not before.status:
            sentence, level = "The server is responding again.", Level.SUCCESS
        elif before.silent_for < _SILENT <= now.silent_for:
            sentence = (
                f"A request has produced no token for {now.silent_for:.0f} s: its prompt is long,"
                " or the device is compiling kernels."
            )
        elif now.silent_for < _SILENT <= before.silent_for:
            sentence = f"The server is answering again after more than {before.silent_for:.0f} s."
        return (Activity.now(sentence, level),) if sentence else ()
