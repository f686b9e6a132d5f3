"""`Supervisor`: owns the state of one llama-server and carries out its lifecycle's actions."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Self

import anyio
import anyio.to_thread

from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.catalog.stores import model_stores
from kitty_nb.config import OnKernelExit, ServerConfig, choose_api_key
from kitty_nb.errors import (
    PortBusyError,
    ServerCrashedError,
    ServerError,
    ServerFailedError,
    StartCancelledError,
    WillNotFitError,
    another_machine,
    first_of,
)
from kitty_nb.supervisor import lifecycle
from kitty_nb.supervisor.events import (
    Activity,
    Broadcast,
    Endpoint,
    Event,
    HealthChecked,
    HealthCheckResult,
    Level,
    LoadProgress,
    MemoryUse,
    ProgressMade,
    RouterState,
    ServerState,
    ServerStatus,
    Stage,
    StateChanged,
    Work,
)
from kitty_nb.supervisor.external_server import ExternalServer, UrlServer, find_external_server
from kitty_nb.supervisor.forecast import Forecaster, ModelStats, Running
from kitty_nb.supervisor.port_owner import PortOwner
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.registry import (
    ServerRecord,
    find_server,
    who_owns,
    will_not_restart,
    withdraw_crashed,
)
from kitty_nb.supervisor.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from anyio.abc import TaskGroup, TaskStatus
    from pydantic import SecretStr

    from kitty_nb.catalog.memory import MemoryPreview
    from kitty_nb.supervisor.events import Request
    from kitty_nb.supervisor.prompt_keeper import Pin
    from kitty_nb.supervisor.router import RouterModels

    OnProgress = Callable[[HealthCheckResult, int, int], None]
    OnPreview = Callable[[MemoryPreview], object]

_log = logging.getLogger(__name__)
_LOOK_EVERY = 1.0  # seconds
_SETTLED_WITHIN = 1.0  # seconds; a server that hangs is shown before it answers
_STOPPED = "The server was stopped before it was ready."
_SUPERSEDED = "The start was superseded by a later start, switch or stop."
_KEEPS_NONE = (
    "This server keeps no prompts. To keep them, it needs LLAMACPP_KEEP_PROMPTS=on, a current"
    " llama.cpp, a LLAMACPP_LOG_DIR that only you can write to, and a single chat model, without"
    " LLAMACPP_RPC_HOSTS or a --slot-save-path in LLAMACPP_EXTRA_ARGS."
)
_LAUNCHED_WITHIN = 90.0  # seconds; of a server that is to outlive its supervisor
_PREVIEW_PAUSE = 0.3  # seconds that a setting must rest before the engine lists its devices


class Supervisor:
    """Starts, watches and stops one llama-server. An async context manager; leaving it stops it.

    Everything here happens on one event loop. From a notebook use `ModelManager`, which keeps one
    in a thread of its own.

    Args:
        config: What to serve unless `start` is told otherwise.
        clock: Seconds, as `time.monotonic` counts them.
        processes: Spawns the server's processes, or attaches to them.

    Attributes:
        stats: Usage of the models on disk, and whether they fit.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        processes: type[ServerProcess] = ServerProcess,
    ) -> None:
        self._clock, self._processes = clock, processes
        self._now = lifecycle.Lifecycle(ServerStatus.STOPPED, config)
        self._health: HealthCheckResult | None = None
        self._server: Server | ExternalServer | UrlServer | None = None
        self._leaving = self._ended = False
        self._turn = anyio.Lock()  # starts and switches take effect in the order they arrive in
        self._stops = 0
        self._forecaster = Forecaster()
        self.stats = ModelStats(lambda: self._now.pid)
        self._changed = anyio.Event()
        self._broadcast: Broadcast[Event] = Broadcast()
        self._host: TaskGroup
        self._tasks: TaskGroup

    async def __aenter__(self) -> Self:
        self._host = anyio.create_task_group()
        await self._host.__aenter__()
        with anyio.CancelScope(shield=True):  # cancelled here, it would wait forever
            await self._host.start(self._live)
        try:
            found = await self._look_for_server()
            if self._now.config.url:
                self._feed(lifecycle.StartAsked(self._now.config))
            if (found and found.ready is not None) or self._now.config.url:
                # Whoever finds it may use it at once.
                with anyio.move_on_after(_SETTLED_WITHIN):
                    await self._until(lambda: self._now.status.settled)
        except BaseException:
            self.detach()  # a server that was only found is not ours to stop
            await self.__aexit__()
            raise
        self._tasks.start_soon(self._look_forever)
        return self

    async def __aexit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        if self._leaving and error is None:
            with anyio.move_on_after(_LAUNCHED_WITHIN, shield=True), suppress(ServerFailedError):
                async with self._turn:
                    await self._look_again()
                    self._feed(lifecycle.WaitOver(self._now.generation))  # of a back-off
                    await self._until(lambda: not self._awaits_process)
        being_ended = self._now.status is ServerStatus.STOPPING
        if being_ended or not (self._leaving or self._now.status.idle):
            with anyio.CancelScope(shield=True), suppress(ServerFailedError):
                await self._stop(force=False)
        self._tasks.cancel_scope.cancel()
        # Without the user's error, the task group does not wrap it in an exception group.
        await self._host.__aexit__(None, None, None)

    @property
    def _awaits_process(self) -> bool:
        """True while the next process of a start or restart does not exist yet."""
        now = self._now
        starting = now.status is ServerStatus.STARTING and now.pid is None and not now.config.url
        return starting or now.pending is not None

    async def _live(self, task_status: TaskStatus[None]) -> None:
        """Host the tasks that watch the server, until the context has been left.

        A caller that is cancelled leaves the context, which stops the server; they must see that.
        """
        try:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as self._tasks:
                    task_status.started()
                    await anyio.sleep_forever()
        finally:
            self._ended = True
            self._changed.set()

    def detach(self) -> None:
        """Leave the server running when this context ends; the next supervisor finds it.

        Leaving the context then waits, at most 90 s, until a server that is being started or
        restarted has its process. If an error leaves it, such a start is cancelled.

        Called before the context is entered, it also applies to a server that
        `LLAMACPP_ON_KERNEL_EXIT` would stop.
        """
        self._leaving = True

    @property
    def state(self) -> ServerState:
        """A snapshot of the server as it is now."""
        now = self._now
        shown = {field.name: getattr(now, field.name) for field in fields(ServerState)}
        shown["last_health_check"] = self._health
        if self._server and not now.status.idle:
            shown["external"], router = self._server.owner, self._server.router
            if router and not self._server.owner:
                shown["router"] = RouterState(router.models, router.alias, router.model)
            shown["devices"] = self._server.devices if now.pid else ()
        return ServerState(**shown)

    @property
    def api_key(self) -> SecretStr | None:
        """The API key that clients must send; None if none is needed, or there is no server."""
        return self._server.api_key if self._server else None

    @property
    def work(self) -> Work:
        """The requests that the server is processing now; none without a server."""
        return self._server.work.work(self._clock()) if self._server and self._now.pid else Work()

    @property
    def requests(self) -> tuple[Request, ...]:
        """The newest requests that the server has finished since its start, oldest first.

        Those of a server that was only attached to are unknown, because its log is its owner's.
        """
        return tuple(self._server.work.log.finished) if self._server else ()

    @property
    def log_lines(self) -> tuple[str, ...]:
        """The newest lines of the server's log."""
        return tuple(self._server.lines) if self._server else ()

    def catalog(self, config: ServerConfig) -> ModelCatalog:
        """Return the models that settings may choose from."""
        return ModelCatalog(model_stores(config))

    def settled(self, config: ServerConfig) -> ServerConfig:
        """Return settings with the paths that they stand for on the server's machine: this one."""
        return config

    async def start(
        self,
        config: ServerConfig | None = None,
        wait_for_ready: bool = True,
        on_progress: OnProgress | None = None,
        *,
        anyway: bool = False,
    ) -> ServerState:
        """Serve a model. A server that already runs with these settings is left as it is.

        If the settings contain the URL of a server, that one is used, and none is started.

        Args:
            config: The settings; by default those of the last start.
            wait_for_ready: Whether to return only when the server answers requests.
            on_progress: Called with each once-a-second health check of the start, its number and
                the highest number, beyond which a load that progresses continues. An error in it is
                logged.
            anyway: Start a model even if the memory forecast says that it will not fit.

        Raises:
            ConfigError: The settings can't be used, or the model file no longer can.
            WillNotFitError: There is not enough memory; whatever ran before still runs.
            ServerFailedError: The start was refused, or given up before the server was ready.
            ServerCrashedError: The process exited on its own.
            StartCancelledError: It was stopped or superseded before the server was ready.
        """
        wanted = config or self._now.wanted
        if wanted.url:
            again = self._now.status is ServerStatus.OUT_OF_REACH
            return await self._ask(lifecycle.StartAsked(wanted, fresh=again), wait_for_ready)
        if config and (server := self._attached(config)):
            other = config.replace() != self._now.wanted.replace()
            if other or server.owner.models is not None:
                return await self._load_there(config.model, wait_for_ready)
        return await self._launch(config, wait_for_ready, on_progress, fresh=False, anyway=anyway)

    async def restart(
        self,
        config: ServerConfig | None = None,
        wait_for_ready: bool = True,
        on_progress: OnProgress | None = None,
        *,
        anyway: bool = False,
    ) -> ServerState:
        """Like `start`, but always with a fresh process."""
        self._refuse_at_url("restart", config)
        if self._attached(config):
            model = config.model if config else None
            return await self._load_there(model, wait_for_ready, fresh=True)
        return await self._launch(config, wait_for_ready, on_progress, fresh=True, anyway=anyway)

    async def switch_model(
        self,
        model: str | Path,
        alias: str | None = None,
        wait_for_ready: bool = True,
        on_progress: OnProgress | None = None,
        *,
        anyway: bool = False,
    ) -> ServerState:
        """Serve another model with the same settings.

        Args:
            model: Its file, absolute or relative to the models folder; its name on a router, or on
                a server at a URL.
            alias: The name that clients ask for; by default the configured one. A router has names
                of its own.
            wait_for_ready: As for `start`.
            on_progress: As for `start`.
            anyway: As for `start`.
        """
        if server_at_url := self._at_url:
            server_at_url.use(model)
            self._broadcast.publish(StateChanged(self.state))
            return self.state
        if self._now.wanted.models is not None and not self._router:
            await self._launch(None, True, on_progress, fresh=False, anyway=anyway)
        if self._attached() or self._router:
            return await self._load_there(model, wait_for_ready)
        changes = {"model": model} if alias is None else {"model": model, "alias": alias}
        return await self._launch(
            None, wait_for_ready, on_progress, fresh=True, anyway=anyway, **changes
        )

    async def stop(self, force: bool = False) -> ServerState:
        """Stop the server, even while it loads, and wait until its process is gone.

        Args:
            force: Kill it immediately instead of shutting it down gracefully.

        Raises:
            ServerFailedError: It is a server at a URL.
        """
        self._refuse_at_url("stop")
        return await self._stop(force)

    async def _stop(self, force: bool) -> ServerState:
        self._stops += 1
        if self._now.status.absent:
            withdraw_crashed(self._now.config)  # others may be about to restart it
        self._feed(lifecycle.StopAsked(force))
        generation = self._now.issued
        await self._until(lambda: self._now.status.idle or self._now.issued > generation)
        return self.state

    async def attach(self) -> ServerState:
        """Watch and use the llama-server that somebody else has started on the profile's port.

        kitty_nb never stops it: `stop` detaches from it.

        Raises:
            ServerFailedError: There is none, or the profile has a server already.
            StartCancelledError: It was stopped meanwhile.
        """
        if not self._now.status.idle:
            raise ServerFailedError(f"The profile's server is {self._now.status}. Stop it first.")
        stops = self._stops
        found = lifecycle.Found(await find_external_server(self._now.config))
        if stops != self._stops:
            raise StartCancelledError(_STOPPED)
        return await self._ask(found)

    async def check_health(self) -> HealthCheckResult:
        """Check the server's health now."""
        if self._server is None or self._now.status.absent:
            return HealthCheckResult(ServerStatus.STOPPED, message="no server is running")
        self._health = await self._server.probe.check_activity()
        return self._health

    async def memory_use(self) -> MemoryUse | None:
        """Measure the memory that the server holds; None without a server."""
        return await self.stats.memory_use()

    async def preview_memory(
        self, config: ServerConfig | None = None, on_preview: OnPreview | None = None
    ) -> MemoryPreview:
        """Forecast the memory that a model needs, and whether it fits.

        A formula answers at once. After a moment, in which this can be cancelled because the
        settings changed again, the engine lists its devices, which may change the answer. What the
        running server would release counts as free.

        Args:
            config: The settings to start with; by default those of the last start.
            on_preview: Called with the first forecast, and with the second if that differs.

        Returns:
            The last forecast. Its `problem` says why nothing is known.
        """
        return await self._forecaster.preview(
            config or self._now.wanted,
            self._running,
            on_preview or (lambda _: None),
            _PREVIEW_PAUSE,
        )

    async def pin(self, name: str, text: str) -> Pin:
        """Have the server read a text to ask questions about, or restore it if it was read before.

        Args:
            name: The name under which the prompt is kept on disk, for all profiles that run the
                same model with the same settings.
            text: The text, which is to be the system message of the questions.

        Raises:
            ServerError: The server is not ready, keeps no prompts, or refused the text.
        """
        server = self._server
        if not (isinstance(name, str) and name.strip() and text):
            raise ServerError("A pinned prompt needs a name and a text.")
        if self._now.status is not ServerStatus.READY:
            raise ServerFailedError(f"The server is {self._now.status}, not READY.")
        if not isinstance(server, Server):
            raise ServerError("This profile did not start the server, so it keeps no prompts.")
        if server.prompts is None:
            raise ServerError(_KEEPS_NONE)
        try:
            return await server.prompts.pin(name, text)
        except ServerError as error:
            raise ServerError(f"{name!r} can't be pinned: {error}") from None

    def events(self) -> AsyncGenerator[Event, None]:
        """Yield events from now on. A reader that is too far behind loses the newest ones."""
        return self._broadcast.stream()

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call back with each event on the supervisor's loop; calling the result unsubscribes."""
        return self._broadcast.subscribe(callback)

    async def _launch(
        self,
        config: ServerConfig | None,
        wait_for_ready: bool,
        on_progress: OnProgress | None,
        *,
        fresh: bool,
        anyway: bool,
        **changes: object,
    ) -> ServerState:
        stops = self._stops
        async with self._turn:
            idle = self._now.status.idle
            wanted = (config or self._now.wanted).replace(**changes)
            if wanted.ssh:
                raise another_machine(wanted.ssh, None)
            config = await anyio.to_thread.run_sync(resolve_model, wanted)  # files may go
            there = not fresh and not self._now.status.absent and self._now.wanted == config
            fits = anyway or there
            if not fits and (reason := await self._forecaster.why_not(config, self._running)):
                raise WillNotFitError(reason)
            if stops != self._stops:  # a stop was requested meanwhile
                raise StartCancelledError(_STOPPED)
            if idle and not self._now.status.idle and (fresh or self._now.wanted != config):
                # It was found or attached to meanwhile: whoever asked did not mean to replace it.
                if owner := await anyio.to_thread.run_sync(who_owns, self._now.config, True):
                    raise ServerFailedError(owner)
                raise StartCancelledError(_SUPERSEDED)
            self._feed(lifecycle.StartAsked(config, fresh))
        generation = self._now.latest
        if not wait_for_ready:
            return self.state

        def relay(event: Event) -> None:
            stopping = self._now.status is ServerStatus.STOPPING
            present = self._now.generation == generation and not stopping
            if on_progress and present and isinstance(event, HealthChecked):
                on_progress(event.result, event.attempt, event.max_attempts)

        unsubscribe = self.subscribe(relay)
        try:
            return await self._outcome(generation)
        except anyio.get_cancelled_exc_class():
            if self._now.latest == generation:
                self._feed(lifecycle.StopAsked())
            raise
        finally:
            unsubscribe()

    async def _ask(self, wish: lifecycle.Stimulus, wait: bool = True) -> ServerState:
        """Feed a request for a server that is only watched, and wait for its outcome.

        Raises:
            ServerFailedError: It does not answer.
            StartCancelledError: Another start took its place.
        """
        self._feed(wish)
        return await self._outcome(self._now.latest) if wait else self.state

    def _refuse_at_url(self, verb: str, config: ServerConfig | None = None) -> None:
        """Reject what only whoever started a server can do with it.

        Raises:
            ServerFailedError: The server in use, or the one that is requested, is at a URL.
        """
        wanted = config or self._now.wanted
        if wanted.url and not self._now.status.idle:
            raise ServerFailedError(
                f"kitty_nb did not start the server at {wanted.url}, so it can't {verb} it. Do that"
                " where it runs, or remove its URL from the settings to start one here."
            )

    def _attached(self, config: ServerConfig | None = None) -> ExternalServer | None:
        """Return the attached server, if it is where the settings want one."""
        here = config is None or config.endpoint == self._now.config.endpoint
        ready = here and self._now.status is ServerStatus.READY
        return self._server if ready and isinstance(self._server, ExternalServer) else None

    @property
    def _router(self) -> RouterModels | None:
        ready = self._now.status is ServerStatus.READY
        return self._server.router if ready and self._server else None

    async def _load_there(
        self, model: str | Path | None, wait: bool, fresh: bool = False
    ) -> ServerState:
        """Make the router serve a model.

        Raises:
            ServerFailedError: It is not a router, has no such model, or did not load it.
        """
        router = self._router
        if router is None:
            who = self._external.who if self._external else "the server"
            raise ServerFailedError(
                f"This profile did not start {who}, so it can only detach from it, not restart it"
                " or switch its model."
            )
        name = router.named(model)
        if wait:
            await router.load(name, fresh=fresh)
        else:
            self._begin_task(self._load_later, router, name, fresh)
        return self.state

    async def _load_later(self, server: RouterModels, name: str, fresh: bool) -> None:
        with suppress(ServerError):  # it has been reported
            await server.load(name, fresh=fresh)

    def _is_over(self, generation: int) -> bool:
        status = self._now.status
        over = status.settled or status is ServerStatus.OUT_OF_REACH
        present = self._now.generation == generation
        return (present and over) or self._now.superseded(generation)

    async def _outcome(self, generation: int) -> ServerState:
        """Wait until a start has succeeded, or raise why it has not."""
        await self._until(lambda: self._is_over(generation))
        now = self._now
        if now.superseded(generation):
            raise StartCancelledError(_SUPERSEDED)
        match now.status:
            case ServerStatus.FAILED if now.free_port:
                raise PortBusyError(now.error or "", now.free_port, attachable=now.attachable)
            case ServerStatus.FAILED | ServerStatus.OUT_OF_REACH:
                raise ServerFailedError(now.error)
            case ServerStatus.CRASHED:
                raise ServerCrashedError(now.error)
            case ServerStatus.STOPPED:
                raise StartCancelledError(_STOPPED)
        return self.state

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._ended:
                raise ServerFailedError("This manager is closed. Create another one.")
            await self._changed.wait()

    def _begin_task(self, work: Callable[..., Awaitable[object]], *args: object) -> None:
        """Run something in the background. Its failure is reported and ends nothing else."""
        generation = self._now.generation

        async def guarded() -> None:
            try:
                await work(*args)
            except Exception as error:  # noqa: BLE001 (a supervisor that fails must not look alive)
                _log.exception("Supervising the server failed.")
                reason = (
                    f"Internal error while supervising the server: {first_of(error)!r}. Please"
                    " report this. The server was stopped, unless it was started elsewhere."
                )
                self._feed(
                    lifecycle.Exited(generation, reason, self._clock(), repeats=True, broken=True)
                )

        self._tasks.start_soon(guarded)

    def _feed(self, stimulus: lifecycle.Stimulus) -> None:
        before = self._now
        self._now, actions = lifecycle.step(before, stimulus)
        for action in actions:
            match action:
                case lifecycle.Begin() as coming:
                    self._begin(coming)
                case lifecycle.Terminate(_, force):
                    if self._server:
                        self._server.stop(force)
                case lifecycle.Wait(generation, seconds):
                    self._begin_task(self._wait, generation, seconds)
        if self._now != before:
            self._broadcast.publish(StateChanged(self.state))
            if self._now.status is not before.status:
                self._announce()
            self._changed.set()
            self._changed = anyio.Event()

    def _begin(self, coming: lifecycle.Begin) -> None:
        generation, config, found = coming.generation, coming.config, coming.found
        self._health = None
        if config.url:
            self._server = UrlServer(generation, config, self._on_fact)
        elif isinstance(found, PortOwner):
            self._server = ExternalServer(generation, config, found, self._on_fact)
        else:
            if self._leaving:
                config = config.model_copy(update={"on_kernel_exit": OnKernelExit.KEEP})
            self._server = Server(
                generation,
                config,
                self._choose_key(config),
                self._on_fact,
                found,
                crashes=coming.crashes,
                clock=self._clock,
                processes=self._processes,
            )
            self._broadcast.publish(ProgressMade(LoadProgress(Stage.STARTING, 0.0, 0.0)))
        self._begin_task(self._server.run)

    def _choose_key(self, config: ServerConfig) -> SecretStr | None:
        """Return the key for the next server: the last one's, so that its clients can keep it."""
        last = self._server
        if config.api_key is None and isinstance(last, Server) and last.was_ready:
            return last.api_key or choose_api_key(config)
        return choose_api_key(config)

    @property
    def _running(self) -> Running:
        """The server that a start would stop."""
        now = self._now
        return Running(now.pid, now.config if now.pid and not self._external else None)

    @property
    def _at_url(self) -> UrlServer | None:
        """The server at a URL, if one is in use."""
        server = self._server
        return server if isinstance(server, UrlServer) and not self._now.status.idle else None

    @property
    def _external(self) -> PortOwner | Endpoint | None:
        return self._server.owner if self._server else None

    async def _look_forever(self) -> None:
        while True:
            await anyio.sleep(_LOOK_EVERY)
            await self._look_again()

    async def _look_again(self) -> None:
        try:
            await self._look_for_server()
        except Exception:  # noqa: BLE001 (the next look may succeed)
            _log.exception("Looking for a server started elsewhere failed.")

    async def _look_for_server(self) -> ServerRecord | None:
        """Find the server that another program or kernel has started for this profile.

        If such a program has stopped one that was to be restarted, it stays stopped.
        """
        if not self._now.status.absent or self._now.config.url:
            return None
        record = await anyio.to_thread.run_sync(find_server, self._now.config)
        if record:
            self._feed(lifecycle.Found(record))
        elif self._now.status is ServerStatus.RESTARTING and will_not_restart(self._now.config):
            self._feed(lifecycle.StopAsked())
        return record

    async def _wait(self, generation: int, seconds: float) -> None:
        await anyio.sleep(seconds)
        await self._look_again()
        self._feed(lifecycle.WaitOver(generation))

    def _announce(self) -> None:
        now = self._now
        delay = max(0.0, (now.retry_at or 0.0) - self._clock())
        retry = f"Restarting in {delay:.0f} s ({now.crashes} of {now.config.restart_max})."
        message, level = {
            ServerStatus.STOPPING: ("Server stopping…", Level.INFO),
            ServerStatus.STOPPED: ("Server stopped.", Level.INFO),
            ServerStatus.RESTARTING: (f"{now.error} {retry}", Level.WARNING),
            ServerStatus.FAILED: (now.error, Level.ERROR),
            ServerStatus.CRASHED: (now.error, Level.ERROR),
            ServerStatus.OUT_OF_REACH: (now.error, Level.WARNING),
        }.get(now.status, (None, Level.INFO))
        if message:
            self._broadcast.publish(Activity.now(message, level))

    def _on_fact(self, fact: Event | lifecycle.Report | HealthCheckResult) -> None:
        """Handle a report of the server."""
        if isinstance(fact, HealthCheckResult):
            self._health = fact
            self._broadcast.publish(StateChanged(self.state))
        elif isinstance(fact, Event):
            self._broadcast.publish(fact)
        else:
            self._feed(fact)
