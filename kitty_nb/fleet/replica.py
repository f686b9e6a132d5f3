"""The part on a Dask worker: one supervised server, and the reports that it sends home."""

from __future__ import annotations

import asyncio
import ipaddress
import pickle
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
from anyio.to_thread import run_sync
from distributed import get_worker

from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.config import OnKernelExit
from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import KittyError, PortBusyError, ServerError
from kitty_nb.experiments.cluster import settings_here, stoppable
from kitty_nb.experiments.measure import fingerprint_of
from kitty_nb.network import LOOPBACK, free_port
from kitty_nb.supervisor.events import Event, LoadProgress, ProgressMade, ServerStatus
from kitty_nb.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.trial import ModelFingerprint
    from kitty_nb.supervisor.events import MemoryUse

SLOT = "kitty_replica"
_TELL_EVERY = 0.25  # seconds between two messages of one replica, at least
_MEASURE_EVERY = 10.0  # seconds
_PACE_STEP = 5.0  # tokens a second; smaller changes are not worth a message


@dataclass(frozen=True, slots=True)
class Setup:
    """The data shared by all replicas of a fleet.

    Attributes:
        topic: The topic of the cluster's events that carries their reports.
        config: The settings, with the key that all of them require.
        host: The machine whose settings these are.
    """

    topic: str
    config: ServerConfig
    host: str


@dataclass(frozen=True, slots=True)
class Report:
    """The facts about a replica at one moment.

    Attributes:
        number: The replica's number.
        run: The name of its run; each worker that it moves to begins another.
        worker: The worker's address.
        status: The state of its server.
        url: The server's address.
        alias: The model's name.
        pid: The server's process ID.
        ready_for: Seconds since it became ready; None before.
        progress: The progress of its load, while it loads.
        error: Why it failed.
        slots: Requests that it can process at once; None if the build does not report it.
        busy: Requests that it is processing.
        tokens_per_second: The speed of its answers, rounded.
        restarts: The number of restarts after a crash.
        memory: The memory that it holds.
    """

    number: int
    run: str
    worker: str
    status: ServerStatus
    url: str
    alias: str
    pid: int | None = None
    ready_for: float | None = None
    progress: LoadProgress | None = None
    error: str | None = None
    slots: int | None = None
    busy: int | None = None
    tokens_per_second: float | None = None
    restarts: int = 0
    memory: MemoryUse | None = None


async def look(setup: Setup) -> ModelFingerprint | str:
    """Return the fingerprint of the fleet's model here, or why this worker can't take a replica."""
    try:
        config = await run_sync(settings_here, setup.config, setup.host)
        fingerprint = await run_sync(fingerprint_of, str(config.model), config)
        await locate_engine(config.binary)
    except KittyError as error:
        return str(error)
    return fingerprint


async def grant(dask_worker: Any) -> None:
    """Let a worker take a replica; one that was started with more slots keeps them.

    Args:
        dask_worker: The worker on which this runs; Dask passes it by this name.
    """
    if SLOT not in dask_worker.state.total_resources:
        await dask_worker.set_resources(**{SLOT: 1})


async def serve(setup: Setup, number: int, run: str) -> str | None:
    """Serve a model on this worker until it is stopped.

    It runs on the worker's event loop, so it is cancelled when the worker ends; a worker that is
    killed takes its server with it.

    Args:
        setup: The fleet's setup.
        number: The replica's number.
        run: A unique name, for `stop_job`.

    Returns:
        Why the server ended; None if it was stopped.
    """
    worker: Any = get_worker()
    try:
        with (
            stoppable(run),
            TemporaryDirectory(dir=worker.local_directory, ignore_cleanup_errors=True) as folder,
        ):
            config = await run_sync(settings_here, setup.config, setup.host)
            host = reachable_host(worker.address)
            try:
                port = free_port(host)
            except OSError as error:
                return (
                    f"A server can't listen on {host}, this worker's address ({error.strerror})."
                    " Start the worker with an address of its own machine."
                )
            own = config.replace(
                url=None,
                host=host,
                port=port,
                profile=f"replica_{number}",
                log_dir=Path(folder) / "logs",
                on_kernel_exit=OnKernelExit.STOP,
                idle_shutdown_seconds=None,
                keep_prompts=False,
            )
            return await _supervise(own, _Reporter(worker, setup.topic, number, run))
    except KittyError as error:
        return str(error)
    except OSError as error:
        return f"Can't write to {worker.local_directory}: {error}."
    return None


async def _supervise(config: ServerConfig, reporter: _Reporter) -> str | None:
    config = await run_sync(resolve_model, config)
    async with Supervisor(config) as supervisor, anyio.create_task_group() as tasks:
        supervisor.subscribe(reporter.note)
        tasks.start_soon(reporter.tell_forever, supervisor)
        try:
            try:
                await supervisor.start(config)
            except PortBusyError:  # another program took it first
                await supervisor.start(config.replace(port=free_port(config.host)))
            async with aclosing(supervisor.events()) as events:
                while not supervisor.state.status.idle:
                    await anext(events)
            return supervisor.state.error or "The server was stopped on its machine."
        except ServerError as error:
            return str(error)
        finally:
            tasks.cancel_scope.cancel()
            reporter.tell(supervisor)
    return None


class _Reporter:
    """Reports a replica's facts when they have changed, a few times a second at most."""

    def __init__(self, worker: Any, topic: str, number: int, run: str) -> None:
        self._worker, self._topic = worker, topic
        self._number, self._run = number, run
        self._changed = asyncio.Event()
        self._progress: LoadProgress | None = None
        self._memory: MemoryUse | None = None
        self._measured_at = 0.0
        self._told: Report | None = None

    def note(self, event: Event) -> None:
        """Note an event of the supervisor."""
        if isinstance(event, ProgressMade):
            self._progress = event.progress
        self._changed.set()

    async def tell_forever(self, supervisor: Supervisor) -> None:
        while True:
            self._changed.clear()
            now = time.monotonic()
            if supervisor.state.pid and now - self._measured_at > _MEASURE_EVERY:
                self._measured_at = now
                with suppress(KittyError):
                    self._memory = await supervisor.memory_use()
            self.tell(supervisor)
            await anyio.sleep(_TELL_EVERY)
            await self._changed.wait()

    def tell(self, supervisor: Supervisor) -> None:
        """Send a report, unless it is the same as the last one."""
        state = supervisor.state
        health, loading = state.last_health_check, state.status in _LOADING
        pace = health.tokens_per_second if health else None
        report = Report(
            number=self._number,
            run=self._run,
            worker=self._worker.address,
            status=state.status,
            url=state.endpoint,
            alias=state.alias,
            pid=state.pid,
            progress=self._progress if loading else None,
            error=state.error,
            slots=health.slots_total if health else None,
            busy=health.slots_busy if health else None,
            tokens_per_second=None if pace is None else round(pace / _PACE_STEP) * _PACE_STEP,
            restarts=state.restart_count,
            memory=self._memory,
        )
        if report != self._told:
            self._told = report
            with_time = replace(report, ready_for=state.uptime)
            # As bytes, so that the scheduler, which passes them on, need not have kitty_nb.
            self._worker.log_event(self._topic, pickle.dumps(with_time))


_LOADING = {ServerStatus.STARTING, ServerStatus.LOADING}


def reachable_host(worker: str) -> str:
    """Return the host on which a server must listen to be reachable wherever the worker is.

    Args:
        worker: The worker's address, such as `tcp://10.0.0.7:40123`.
    """
    where = urlsplit(worker)
    host = where.hostname or "localhost"
    if where.scheme == "inproc" or host == "localhost":
        return LOOPBACK
    try:
        return LOOPBACK if ipaddress.ip_address(host).is_loopback else host
    except ValueError:  # a name
        return host
