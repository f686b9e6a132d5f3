"""Servers that kitty_nb did not start, on a port or at a URL: watched, never stopped."""

from __future__ import annotations

import json
import re
import time
from contextlib import aclosing, suppress
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import psutil

from kitty_nb.catalog.model import name_some
from kitty_nb.config import ServerConfig, goes_without_key
from kitty_nb.errors import KittyError, ServerFailedError
from kitty_nb.supervisor.events import (
    Activity,
    Endpoint,
    HealthCheckResult,
    Level,
    ServerState,
    ServerStatus,
    Working,
)
from kitty_nb.supervisor.health import HealthProbe, Late, Probe
from kitty_nb.supervisor.lifecycle import BecameReady, Exited, LoadBegan, OutOfReach
from kitty_nb.supervisor.port_owner import PortOwner, owner_of
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.registry import record_of
from kitty_nb.supervisor.requests import RequestLog, WorkMeter
from kitty_nb.supervisor.router import RouterModels
from kitty_nb.supervisor.router_program import LlamaServer, router_api

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from pathlib import Path

    import httpx
    from anyio.abc import TaskGroup

    from kitty_nb.supervisor.lifecycle import Emit
else:
    httpx = Late("httpx")

_LOOK_EVERY = 1.0  # seconds, on a port
_ASK_EVERY, _ASK_AT_LEAST_EVERY = 2.0, 30.0  # seconds, at a URL: usually, and while none answers
_MODELS, _GUARDED = "/v1/models", "/props"
_LOADING = b"loading"  # in the 503 of a llama-server; a proxy's tells that none is behind it
_CONNECT_WITHIN, _WHOLE_WITHIN = 5.0, 10.0  # seconds for the connection, and for all
_MISSES = 2  # of a server that answered before; after a single one, it may just be busy
_LARGEST = 8_000_000  # bytes of a list of models; the answer of a wrong address may never end
_LONGEST = 500  # characters of a name
_SHOWN = 8


async def find_external_server(config: ServerConfig) -> PortOwner:
    """Find the llama-server that listens where the profile's own would.

    Raises:
        ServerFailedError: Nothing listens there, or something that cannot be used.
    """
    owner = await anyio.to_thread.run_sync(owner_of, config.host, config.port)
    if owner is None:
        raise ServerFailedError(f"Nothing you have access to is listening on port {config.port}.")
    if owner.engine is None:
        raise ServerFailedError(f"{owner.sentence} Its name is not that of a llama-server.")
    if owner.unspoken:
        raise ServerFailedError(
            f"{owner.sentence} It was started with {owner.unspoken}, but kitty_nb supports only"
            " plain HTTP without a prefix. Restart it without that flag, or use it directly."
        )
    if owner.user:
        raise ServerFailedError(
            f"{owner.sentence} Its owner could read your prompts. Start your own server on another"
            " port."
        )
    return owner


class WatchedServer:
    """Base of the servers that are only watched, and detached from rather than stopped.

    Args:
        generation: The number that its reports carry.
        emit: Called with each event, report and answer to a health check.
        probe: Sends it requests.
    """

    def __init__(self, generation: int, emit: Emit, probe: Probe) -> None:
        self.probe, self.api_key = probe, probe.api_key
        self.devices: tuple[str, ...] = ()
        self.lines: tuple[str, ...] = ()  # its log is its owner's
        self.work = WorkMeter(RequestLog())  # by its slots alone
        self.router: RouterModels | None = None  # once it turns out to be one
        self._generation, self._emit = generation, emit
        self._watching = anyio.CancelScope()

    def stop(self, _force: bool) -> None:
        """Detach from it."""
        self._watching.cancel()

    async def _until_detached(self, watch: Awaitable[None]) -> None:
        try:
            with self._watching:
                await watch
        finally:
            with anyio.CancelScope(shield=True):
                if self.router:
                    await self.router.close()
                await self.probe.aclose()

    def _exited(self, reason: str) -> None:
        self._emit(Exited(self._generation, reason, time.monotonic(), asked=True))

    def _notify(self, message: str, level: Level = Level.INFO) -> None:
        self._emit(Activity.now(message, level))


class ExternalServer(WatchedServer):
    """Watches the owner of a port until it ends or is detached from."""

    probe: HealthProbe

    def __init__(self, generation: int, config: ServerConfig, owner: PortOwner, emit: Emit) -> None:
        # The key of another profile's server is on record; any other may have the configured one.
        record = record_of(owner.pid, config.log_dir)
        key = record.api_key if record else config.api_key
        probe = HealthProbe(
            config, key, trusted=True, sleeps=owner.sleeps, on_slots=self._note_work
        )
        super().__init__(generation, emit, probe)
        self.devices = (record and record.devices) or ()
        self._owner, self._config = owner, config

    @property
    def owner(self) -> PortOwner:
        """The server, with what it serves now."""
        if router := self.router:
            facts = {"alias": router.alias, "model": router.model, "models": router.names}
            return replace(self._owner, **facts)  # type: ignore[arg-type]
        return self._owner

    async def run(self) -> None:
        """Watch it until it exits or is detached from; then it counts as stopped."""
        self._notify(f"Attached to {self._owner.who}, which this profile did not start.")
        await self._until_detached(self._watch_process())
        going = "detached; it keeps running" if self._watching.cancel_called else "exited"
        self._notify(f"{self._owner.who}: {going}.")
        self._exited(going)

    async def _watch_process(self) -> None:
        async with anyio.create_task_group() as tasks:
            with suppress(psutil.Error, OSError):  # it has ended
                await self._watch(ServerProcess(self._owner.pid, None), tasks)
            tasks.cancel_scope.cancel()

    async def _watch(self, process: ServerProcess, tasks: TaskGroup) -> None:
        status = ServerStatus.STARTING
        while process.runs():
            health = await self.probe.check_activity()
            health = self.router.doubt(health) if self.router else health
            self._emit(health)
            if health.status is not status:
                status = health.status
                if status is ServerStatus.LOADING:
                    self._emit(LoadBegan(self._generation))
                elif status is ServerStatus.READY:
                    api = None if self.router else await router_api(self.probe, tasks)
                    if isinstance(api, LlamaServer):
                        owner = self._owner
                        router = RouterModels(owner.pid, owner.who, self._config, api, self._emit)
                        await router.watch(tasks)  # before it is used
                        self.router = router
                    self._emit(BecameReady(self._generation, time.monotonic() - process.age))
            await anyio.sleep(_LOOK_EVERY)

    def _note_work(self, slots: list[dict[str, Any]], pace: float | None) -> None:
        was_busy, now = self.work.busy, time.monotonic()
        self.work.look(slots, pace, now)
        if was_busy or self.work.busy:
            self._emit(Working(self.work.work(now)))


class UrlProbe(Probe):
    """Asks a server for its models, which every OpenAI-compatible server lists.

    Args:
        config: Settings of the profile.

    Attributes:
        models: The names that the last answer listed.
    """

    def __init__(self, config: ServerConfig) -> None:
        key = None if goes_without_key(config) else config.api_key
        super().__init__(config.endpoint, key, _CONNECT_WITHIN)
        self.models: tuple[str, ...] = ()
        self._known = False  # whether the key has been accepted where one is required
        self._settings = f"LLAMACPP_{config.profile.upper()}"

    async def check_activity(self) -> HealthCheckResult:
        """Ask it: READY if it lists models, LOADING if it says so, else STARTING."""
        began, content = time.perf_counter(), b""
        try:
            with anyio.fail_after(_WHOLE_WITHIN):
                async with self._client.stream("GET", _MODELS, headers=self._key) as response:
                    async for chunk in response.aiter_bytes():
                        content += chunk
                        if len(content) > _LARGEST:
                            break
                if response.is_success and not await self._admitted(response):
                    self.models = ()
                    return HealthCheckResult(ServerStatus.STARTING, message=self._why_refused())
        except KittyError as error:
            return HealthCheckResult(ServerStatus.STARTING, message=str(error).rstrip("."))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            return HealthCheckResult(ServerStatus.STARTING, message=self._why_silent(error))
        latency = time.perf_counter() - began
        if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE and _LOADING in content.lower():
            return HealthCheckResult(ServerStatus.LOADING, latency, "it is loading a model")
        if response.is_success and (models := _names(content)) is not None:
            self.models = models
            return HealthCheckResult(ServerStatus.READY, latency, "ok")
        return HealthCheckResult(ServerStatus.STARTING, latency, self._why_useless(response))

    async def _admitted(self, listed: httpx.Response) -> bool:
        """Return whether the key opens more than the list, which llama-server shows to anyone."""
        if not self._known and listed.headers.get("Server") == "llama.cpp":
            async with self._client.stream("GET", _GUARDED, headers=self._key) as asked:
                self._known = asked.is_success
                return asked.status_code != HTTPStatus.UNAUTHORIZED
        return True

    def _why_refused(self) -> str:
        what = "refuses the key in" if self.api_key else "requires a key. Set"
        return f"it {what} {self._settings}_API_KEY"

    def _why_silent(self, error: Exception) -> str:
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            return "no answer in time"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            problem = f"its certificate can't be verified ({error})"
            if re.search("issuer|self.signed", problem):  # else it may have expired
                problem += (
                    ". In the environment of this program, set SSL_CERT_FILE to the file with its"
                    " authority's certificate"
                )
            return problem
        why = str(error) or type(error).__name__
        return f"the connection failed ({why}). Check that it runs there, and {self._settings}_URL"

    def _why_useless(self, response: httpx.Response) -> str:
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            return self._why_refused()
        if response.has_redirect_location:
            to = httpx.URL(response.headers["Location"]).copy_with(query=None, fragment=None)
            where = response.url.join(to).copy_with(username=None, password=None)
            server = str(where).removesuffix(_MODELS)  # else it may be a page to log in
            fix = f". Set {self._settings}_URL to {server}" if server != str(where) else ""
            return f"it redirects to {where}{fix}"
        said = f"{response.status_code} {response.reason_phrase}".strip()
        forbidden = response.status_code == HTTPStatus.FORBIDDEN
        what = "API_KEY, and whether this machine is admitted" if forbidden else "URL"
        return f"{_MODELS} answered {said} without a list of models. Check {self._settings}_{what}"


class UrlServer(WatchedServer):
    """Watches a server at a URL until it is detached from.

    Args:
        generation: The number that its reports carry.
        config: Settings of the profile.
        emit: Called with each event, report and answer to a health check.

    Attributes:
        owner: The server, with what it serves now.
    """

    probe: UrlProbe

    def __init__(self, generation: int, config: ServerConfig, emit: Emit) -> None:
        super().__init__(generation, emit, UrlProbe(config))
        self.owner = Endpoint(config.endpoint, alias=config.alias)
        self._chosen, self._profile = config.alias, config.profile

    def use(self, name: str | Path) -> None:
        """Use another of its models from now on; the server loads it itself, if necessary.

        Raises:
            ServerFailedError: It has no such model.
        """
        if str(name) not in self.owner.models:
            there = name_some(self.owner.models, _SHOWN) or "none"
            raise ServerFailedError(
                f"{self.owner.url} has no model {str(name)!r}. Its models: {there}."
            )
        self._chosen = str(name)
        self.owner = replace(self.owner, alias=self._chosen)
        self._notify(f"Requests now go to the model {name}.")

    async def run(self) -> None:
        """Watch it until it is detached from; then it counts as stopped."""
        await self._until_detached(self._watch())
        self._exited("detached")

    async def _watch(self) -> None:
        status: ServerStatus | None = None
        misses = 0
        while True:
            health = await self.probe.check_activity()
            ready = health.status is ServerStatus.READY
            loading = health.status is ServerStatus.LOADING
            misses = 0 if ready else misses + 1
            if ready:
                self._choose()
            self._emit(health)
            if ready and status is not ServerStatus.READY:
                self._emit(BecameReady(self._generation, time.monotonic()))
                self._greet()
            elif not ready and (status is not ServerStatus.READY or misses >= _MISSES):
                if not loading or status is ServerStatus.READY:
                    why = why_unreachable(self.owner.url, health)
                    self._emit(OutOfReach(self._generation, why))
                if loading:
                    self._emit(LoadBegan(self._generation))
            if ready or status is not ServerStatus.READY or misses >= _MISSES:
                status = health.status
            doublings = 0 if loading or misses < _MISSES else min(misses - 1, 4)
            await anyio.sleep(min(_ASK_EVERY * 2**doublings, _ASK_AT_LEAST_EVERY))

    def _choose(self) -> None:
        models, before = self.probe.models, self.owner.alias
        alias = self._chosen or (before if before in models else chat_model(models) or before)
        self.owner = replace(self.owner, models=models, alias=alias)
        if before not in {None, alias}:
            self._notify(
                f"{self.owner.url} no longer lists {before}. Requests now go to the model {alias}.",
                Level.WARNING,
            )

    def _greet(self) -> None:
        url, models = self.owner.url, name_some(self.owner.models, _SHOWN) or "no model"
        if doubt := self.owner.doubt(self._profile):
            self._notify(f"{url} answers. {doubt}", Level.WARNING)
        else:
            self._notify(f"{url} answers. It serves {models}.", Level.SUCCESS)


def why_unreachable(url: str, health: HealthCheckResult) -> str:
    """Return why a server at a URL can't be used, in a sentence."""
    return f"{url} can't be used: {health.message}."


async def look_once(config: ServerConfig) -> ServerState:
    """Check the server of a profile with a URL once."""
    async with aclosing(UrlProbe(config)) as probe:
        health = await probe.check_activity()
    alias = config.alias or chat_model(probe.models)
    owner = Endpoint(config.endpoint, probe.models, alias)
    found = ServerState(health.status, config, last_health_check=health, external=owner)
    if health.status is not ServerStatus.STARTING:
        return found
    why = why_unreachable(config.endpoint, health)
    return replace(found, status=ServerStatus.OUT_OF_REACH, error=why)


def chat_model(models: tuple[str, ...]) -> str | None:
    """Return the model to ask if nobody has chosen one; None if there is none.

    It is the first whose name doesn't say that it is for embeddings, else the first.
    """
    return next((name for name in models if "embed" not in name.lower()), next(iter(models), None))


def _names(content: bytes) -> tuple[str, ...] | None:
    """Return the displayable names in a list of models; None if it is not such a list."""
    try:
        said: Any = json.loads(content)
        listed = said["data"] or ()  # Ollama has null there before its first model
        names = (str(one["id"]) for one in listed)
        return tuple(name for name in names if name.isprintable() and len(name) <= _LONGEST)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
