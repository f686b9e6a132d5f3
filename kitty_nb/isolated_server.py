"""The interface between experiments and servers: an isolated server, and facts about servers.

Of the packages that run servers, experiments import only this module, the manager and the client.
"""

from __future__ import annotations

import asyncio
import atexit
import sys
import time
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event as ThreadEvent
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

import anyio
import httpx
from anyio.from_thread import BlockingPortal
from anyio.to_thread import run_sync

from kitty_nb.client import Access
from kitty_nb.client.protocol import out_of_files
from kitty_nb.config import OnKernelExit, ServerConfig, goes_without_key
from kitty_nb.engine.command_line import SERVER_SETTINGS, accepts, spell
from kitty_nb.engine.devices import list_devices
from kitty_nb.engine.locate import Dialect, Engine, EngineKind, Option, locate_engine
from kitty_nb.errors import (
    EngineError,
    ExperimentError,
    PortBusyError,
    ServerError,
    ServerFailedError,
)
from kitty_nb.network import LOOPBACK, free_port
from kitty_nb.supervisor.events import (
    Broadcast,
    LoadProgress,
    ProgressMade,
    ServerState,
    Stage,
    answer_speed,
)
from kitty_nb.supervisor.external_server import look_once
from kitty_nb.supervisor.forecast import free_memory
from kitty_nb.supervisor.history import (
    LoadHistory,
    LoadRecord,
    gather_facts,
    path_text,
    sample_content,
    this_host,
)
from kitty_nb.supervisor.port_owner import owner_of
from kitty_nb.supervisor.process import peak_memory
from kitty_nb.supervisor.registry import read_record
from kitty_nb.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

    from kitty_nb.supervisor.events import Event

    T = TypeVar("T")

__all__ = [
    "SERVER_SETTINGS",
    "Broadcast",
    "Dialect",
    "Engine",
    "EngineKind",
    "IsolatedServer",
    "LoadProgress",
    "LoadSeconds",
    "Option",
    "ServerState",
    "accepts",
    "access_at_url",
    "answer_speed",
    "find_load",
    "free_memory",
    "gather_facts",
    "has_gpu",
    "in_background",
    "isolated_server",
    "locate_engine",
    "pid_at",
    "sample_content",
    "spell",
    "this_host",
]

_DEATH_WITHIN = 5.0  # seconds until the supervisor has noticed that a silent server has ended
_SAME_MOMENT = 2.0  # seconds from a server's becoming ready to its row in the history
_CLOCKS_APART = 0.05  # seconds; one clock is read a moment after the other
_LOOK_AGAIN = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class LoadSeconds:
    """The duration of a load by stage, in seconds.

    Attributes:
        starting: Until the first sign of loading.
        loading: Until the last weight is read; for a small model, until it is ready.
        preparing: The rest: context and the engine's own warm-up.
        cached: The fraction of the model that was in memory before; None if unknown.
    """

    starting: float
    loading: float
    preparing: float
    cached: float | None = None

    @property
    def total(self) -> float:
        """The seconds from the request to ready."""
        return self.starting + self.loading + self.preparing


class IsolatedServer:
    """A ready server that belongs to one experiment.

    Attributes:
        state: Its state when it became ready.
        memory: The peak RAM of its processes, as sampled, in bytes.
        gpu_memory: The same of GPUs' own memory; None if the driver doesn't report it by process.
    """

    def __init__(self, supervisor: Supervisor, stages: Mapping[Stage, float]) -> None:
        self.state: ServerState = supervisor.state
        self.access = Access(self.state.endpoint, supervisor.api_key)
        ready = stages.get(Stage.READY, 0.0)
        prepared = stages.get(Stage.PREPARING, ready)
        loaded = stages.get(Stage.LOADING, prepared)
        self.load = LoadSeconds(loaded, prepared - loaded, ready - prepared)
        self.memory = 0
        self.gpu_memory: int | None = 0

    async def sample_memory(self) -> None:
        """Measure the server's memory, and keep the peak."""
        pid = self.state.pid or 0
        gpus = (await run_sync(free_memory, pid)).gpus
        held = max(self.gpu_memory or 0, sum(gpu.returned for gpu in gpus))
        # Only NVIDIA's library reports what a process holds on a GPU; a Mac's GPU shares the RAM.
        unknown = self.state.devices and not held and sys.platform != "darwin"
        self.gpu_memory = None if unknown else held
        self.memory = max(self.memory, await run_sync(peak_memory, pid))


def require_here(config: ServerConfig) -> None:
    """Reject a profile whose models, engine and processor are another machine's."""
    if config.ssh:
        raise ExperimentError(
            f"The profile {config.profile!r} runs on {config.ssh}, and this needs a server on its"
            f" own machine. Do it on {config.ssh}, or without LLAMACPP_SSH."
        )


@asynccontextmanager
async def isolated_server(
    config: ServerConfig,
    folder: Path | None = None,
    *,
    anyway: bool = False,
    on_progress: Callable[[LoadProgress], object] = lambda _: None,
) -> AsyncGenerator[IsolatedServer]:
    """Serve a model on a server of its own, which stops at the end of the context.

    It has a free port, needs no key and is never restarted. It also stops if the task is cancelled
    or this process is killed.

    Args:
        config: The settings; the profile names the log.
        folder: The folder for the log; by default a temporary one.
        anyway: Whether to start it even if it will not fit into memory.
        on_progress: Called with each step of the load.

    Raises:
        WillNotFitError: There is not enough memory.
        ConfigError: The settings or the model file can't be used.
        ServerError: The server did not become ready, or stopped answering.
        ExperimentError: The profile runs on another machine.
    """
    require_here(config)
    stages: dict[Stage, float] = {}

    def follow(event: Event) -> None:
        if isinstance(event, ProgressMade):
            if event.progress.elapsed == 0:
                stages.clear()  # another port is tried
            stages.setdefault(event.progress.stage, event.progress.elapsed)
            on_progress(event.progress)

    with TemporaryDirectory(prefix="kitty_nb-", ignore_cleanup_errors=True) as temporary:
        own = config.replace(
            url=None,
            host=LOOPBACK,
            port=free_port(),
            api_key=None,
            log_dir=folder or Path(temporary),
            on_kernel_exit=OnKernelExit.STOP,
            idle_shutdown_seconds=None,
            restart_max=0,
            keep_prompts=False,
        )
        async with Supervisor(own) as supervisor:
            supervisor.subscribe(follow)
            try:
                try:
                    await supervisor.start(own, anyway=anyway)
                except PortBusyError:  # another program took it first
                    await supervisor.start(own.replace(port=free_port()), anyway=anyway)
                yield IsolatedServer(supervisor, stages)
            except httpx.HTTPError as error:
                raise ServerError(await _why_silent(supervisor, error)) from error
            finally:
                with anyio.CancelScope(shield=True):
                    await supervisor.stop(force=True)


async def access_at_url(config: ServerConfig) -> Access:
    """Find the server at the URL of a profile, and the model to ask there."""
    state = await look_once(config)
    if state.error:
        raise ServerFailedError(state.error)
    key = None if goes_without_key(config) else config.api_key
    return Access(state.endpoint, key, state.alias)


def pid_at(access: Access) -> int | None:
    """Return the PID of a llama-server on this machine; None for other servers. Blocking."""
    url = httpx.URL(access.endpoint)
    here = url.host in {LOOPBACK, "::1", "localhost"}
    owner = owner_of(url.host, url.port or 80) if here else None
    return owner.pid if owner and owner.engine else None  # not that of a tunnel


async def has_gpu(config: ServerConfig) -> bool:
    """Return whether the engine has a device to offload layers to; False without an engine."""
    try:
        devices = await list_devices(config)
    except EngineError:
        return False
    return bool((await run_sync(free_memory)).gpus if devices is None else devices)


def ready_at(state: ServerState) -> float:
    """Return when a ready server became so, in seconds since the epoch."""
    record = read_record(state.config)
    if record and record.ready_at is not None and record.local and record.pid == state.pid:
        return record.ready_at
    return time.time() - (state.uptime or 0.0)


async def find_load(state: ServerState) -> LoadRecord | None:
    """Find a ready server's load in the history, whichever program started it."""
    history = LoadHistory(state.config.history, lambda _: None)
    host, path = this_host(), path_text(state.config.model)
    while (uptime := state.uptime) is not None:
        ready = ready_at(state)
        rows = [row for row in await history.recall(host, path) if row.path == path]
        # An older row belongs to a server that became ready shortly before this one.
        after = [row for row in rows if -_CLOCKS_APART < row.at - ready < _SAME_MOMENT]
        if after:
            return min(after, key=lambda row: row.at)
        if uptime > _SAME_MOMENT:
            break
        await anyio.sleep(_LOOK_AGAIN)
    return None


def in_background(work: Callable[[], Awaitable[T]], name: str) -> tuple[Thread, Future[T]]:
    """Run a coroutine function on a new thread; return once it first waits.

    Cancelling the future cancels it. At the program's exit it is cancelled and waited for.

    Raises:
        OSError: There can be no event loop, as without file descriptors.
    """
    begun: Future[BlockingPortal] = Future()
    waits = ThreadEvent()

    async def live() -> None:
        async with BlockingPortal() as portal:
            begun.set_result(portal)
            await portal.sleep_until_stopped()

    async def whole() -> T:
        asyncio.get_running_loop().call_soon(waits.set)  # it runs once the work waits
        try:
            return await work()
        finally:
            await portal.stop()

    def run() -> None:
        try:
            anyio.run(live)
        except BaseException as error:  # out of file descriptors, for one
            if begun.done():
                raise
            begun.set_exception(error)
        finally:
            atexit.unregister(end)

    def end() -> None:
        if thread.is_alive():  # in a forked child it is not
            future.cancel()
            thread.join()

    thread = Thread(target=run, name=name, daemon=True)
    thread.start()
    portal = begun.result()
    atexit.register(end)
    future = portal.start_task_soon(whole)
    waits.wait()
    return thread, future


async def _why_silent(supervisor: Supervisor, error: httpx.HTTPError) -> str:
    """Return why a server did not answer: the cause of its exit, if it exited."""
    if no_files := out_of_files(error):
        return no_files
    with anyio.move_on_after(_DEATH_WITHIN):
        async with aclosing(supervisor.events()) as events:
            while not supervisor.state.status.idle:
                await anext(events)
    if supervisor.state.status.idle and supervisor.state.error:
        return supervisor.state.error
    return f"The server did not answer a request: {str(error) or type(error).__name__}."
