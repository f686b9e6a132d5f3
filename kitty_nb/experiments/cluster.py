"""Trials on a Dask cluster: Dask picks the worker, which uses its own engine, models and folders.

Workers are started by the user. Each runs as many trials at once as it has slots of the resource
`kitty_trial`; where none has it, one.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
import uuid
from collections import defaultdict
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio
from anyio.to_thread import run_sync
from distributed import CancelledError, get_worker
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker, NoValidWorkerError

from kitty_nb.config import ServerConfig, load_lenient
from kitty_nb.errors import ConfigError, ExperimentError, KittyError
from kitty_nb.experiments.measure import engine_of, fingerprint_of, run_trial
from kitty_nb.experiments.trial import Outcome, TrialResult
from kitty_nb.isolated_server import this_host

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Mapping

    from distributed import Client, Worker
    from tornado.platform.asyncio import AsyncIOLoop

    from kitty_nb.experiments.trial import (
        Execute,
        ModelFingerprint,
        OnProgress,
        SweepEvent,
        Trial,
    )
    from kitty_nb.experiments.workload import Workload

    T = TypeVar("T")
    Workers = Mapping[str, Mapping[str, Any]]

_RESOURCE = "kitty_trial"
_STOP_WITHIN = 30.0  # seconds; a worker that does not answer has ended, and so has its server
_LOOK_AFTER = 3.0  # seconds
_LOOKS = 10  # until nobody takes the place of a worker that is gone
_LOST_AT_MOST = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A trial on its way to a worker.

    Attributes:
        name: Unique.
        topic: Of the cluster's events; carries the progress of the trial.
        config: The sweep's settings.
        host: The machine on which those settings hold as they are.
        model: What the model must be; None while nobody knows.
        alone: Whether to wait until the worker has no other trial.
        keep_log: Whether the server's log is sent back.
    """

    name: str
    topic: str
    trial: Trial
    config: ServerConfig
    workload: Workload
    host: str
    model: ModelFingerprint | None
    alone: bool
    keep_log: bool


@dataclass(frozen=True, slots=True)
class JobResult:
    """A worker's result: the trial's row and the server's log."""

    worker: str
    row: TrialResult
    log: bytes = b""


@dataclass(frozen=True, slots=True)
class JobRejected:
    """A worker's reason why it cannot run a trial, which another may."""

    worker: str
    reason: str


async def count_slots(client: Client) -> int:
    """Return how many trials the workers take at once, 1 at least: more may be on their way.

    Raises:
        ExperimentError: There is no cluster.
    """
    workers = await _on_its_loop(client, _workers(client))
    return max(1, sum(map(_slots, workers.values())) or len(workers))


@asynccontextmanager
async def dask_cluster(
    client: Client, config: ServerConfig, workload: Workload, logs: Path | None = None
) -> AsyncGenerator[Execute]:
    """Run trials on the workers of a cluster.

    On other machines than this one a worker's own `.env` says where models and engine are. A trial
    goes to a worker that has its model, and the same file as here where there is one here. The
    trials of a worker that dies go to another, as often as `distributed.scheduler.allowed-failures`
    says.

    Args:
        client: Of the cluster; it stays open.
        config: The settings that trials change.
        workload: What to ask each server.
        logs: A folder here for the servers' logs; without it they go with the trial.

    Raises:
        ExperimentError: There is no cluster, or none of its workers has kitty_nb.
    """
    cluster = _Cluster(client, config, workload, logs)
    await _on_its_loop(client, cluster.open())
    try:
        yield cluster.run
    finally:
        with suppress(ExperimentError), anyio.CancelScope(shield=True):
            await _on_its_loop(client, cluster.close())


class _Cluster:
    """A cluster during one run. `open`, `close` and `_submit` run on the client's loop."""

    def __init__(
        self, client: Client, config: ServerConfig, workload: Workload, logs: Path | None
    ) -> None:
        self._client = client
        self._config = config.model_copy(update={"api_key": None})
        self._workload = workload
        self._logs = logs
        self._topic = f"kitty_nb-{uuid.uuid4().hex}"
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[str, OnProgress] = {}
        self._known: set[str] = set()
        self._unfit: dict[str, str] = {}  # workers for any trial, with the reason
        self._rejected: defaultdict[object, dict[str, str]] = defaultdict(dict)  # for some trials
        self._models: dict[str, ModelFingerprint | None] = {}
        self._resources: dict[str, float] = {}

    async def open(self) -> None:
        """Look at the workers, and listen to them."""
        workers = await _workers(self._client)
        if any(map(_slots, workers.values())) or not workers:
            self._resources = {_RESOURCE: 1}
        self._known = set(workers)
        answers = await self._client.run(ready, on_error="return")
        for worker, answer in answers.items():
            if isinstance(answer, Exception):
                self._unfit[worker] = f"{answer}. Install kitty_nb[dask] there, as it is here."
        if answers and self._unfit.keys() == answers.keys():
            raise ExperimentError(f"No worker can run trials. {_listed(self._unfit)}")
        self._client.subscribe_topic(self._topic, self._on_event)

    async def close(self) -> None:
        """Listen no more."""
        self._client.unsubscribe_topic(self._topic)

    async def run(self, trial: Trial, on_progress: OnProgress) -> TrialResult:
        """Return a trial's row, from whichever worker can run it."""
        if trial.model not in self._models:
            self._models[trial.model] = await run_sync(_fingerprint_here, trial, self._config)
        needs = trial.model, dict(trial.settings).get("binary")
        lost = 0
        while lost < _LOST_AT_MOST:
            unfit = self._unfit | self._rejected[needs]
            workers = await self._fit(unfit)
            if workers == []:
                died = [_died(lost)] if lost else []
                return _failed(trial, *died, f"No worker can run this trial. {_listed(unfit)}")
            try:
                answer = await self._send(trial, workers, on_progress)
            except KilledWorker as killed:
                return _failed(trial, _died(killed.allowed_failures + 1))
            except NoValidWorkerError as error:
                return _failed(trial, f"No worker took this trial. Dask says: {error}")
            if isinstance(answer, JobRejected):
                self._rejected[needs][answer.worker] = answer.reason
            elif answer is None:
                lost += 1
            elif self._is_expected(trial, answer.row):
                await self._keep(trial, answer.log)
                return answer.row
            else:
                reason = "Its file of that name differs from the others'."
                self._rejected[needs][answer.worker] = reason
        return _failed(trial, _died(lost))

    async def _fit(self, unfit: Mapping[str, str]) -> list[str] | None:
        """Return the workers that may take a trial; None where all may."""
        workers: Workers = {}
        fit: list[str] = []
        for _ in range(_LOOKS if unfit else 0):
            workers = await _on_its_loop(self._client, _workers(self._client))
            fit = [
                address
                for address, worker in workers.items()
                if address not in unfit and (_slots(worker) or not self._resources)
            ]
            if fit or not self._known - workers.keys() - unfit.keys():
                break
            await anyio.sleep(_LOOK_AFTER)  # others may take the places of those that are gone
        self._known |= workers.keys()
        return fit if workers else None

    async def _send(
        self, trial: Trial, workers: list[str] | None, on_progress: OnProgress
    ) -> JobResult | JobRejected | None:
        """Have a worker run a trial; None where all that could are gone."""
        job = Job(
            name=uuid.uuid4().hex,
            topic=self._topic,
            trial=trial,
            config=self._config,
            workload=self._workload,
            host=this_host(),
            model=self._models[trial.model],
            alone=not self._resources,
            keep_log=self._logs is not None,
        )
        self._listeners[job.name] = on_progress
        try:
            return await _on_its_loop(self._client, self._submit(job, workers))
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(_STOP_WITHIN, shield=True), suppress(ExperimentError):
                await _on_its_loop(self._client, _stop(self._client, job.name))
            raise
        finally:
            del self._listeners[job.name]

    async def _submit(self, job: Job, workers: list[str] | None) -> JobResult | JobRejected | None:
        """Hand a job to the scheduler, and wait for its result.

        None when it can only go to workers that are all gone: those that took their places have
        other addresses, and the scheduler does not know that they are as good.
        """
        future = self._client.submit(
            run_job, job, pure=False, resources=self._resources or None, workers=workers
        )
        answer: asyncio.Future[JobResult | JobRejected] = asyncio.ensure_future(future)
        try:
            while not answer.done():
                await asyncio.wait([answer], timeout=_LOOK_AFTER if workers else None)
                if workers and not set(workers) & (await _workers(self._client)).keys():
                    break
            return answer.result() if answer.done() else None
        finally:
            answer.cancel()
            future.release()

    def _is_expected(self, trial: Trial, row: TrialResult) -> bool:
        """True if the model was the one of the other trials; the first to be measured decides."""
        self._models[trial.model] = expected = self._models[trial.model] or row.fingerprint
        return row.fingerprint in {expected, None}

    async def _keep(self, trial: Trial, log: bytes) -> None:
        if self._logs and log:
            folder = anyio.Path(self._logs)
            try:
                await folder.mkdir(parents=True, exist_ok=True)
                await (folder / f"trial_{trial.key}.log").write_bytes(log)
            except OSError as error:
                _log.warning("Can't write the log of %s: %s.", trial.label, error)

    def _on_event(self, event: tuple[float, tuple[str, bytes]]) -> None:
        """Hand a worker's event over to the sweep's loop."""
        with suppress(RuntimeError):  # the sweep has ended
            self._loop.call_soon_threadsafe(self._notify, *event[1])

    def _notify(self, name: str, pickled: bytes) -> None:
        if listener := self._listeners.get(name):
            listener(pickle.loads(pickled))  # noqa: S301 (Dask's results are pickles, too)


async def _on_its_loop(client: Client, work: Coroutine[Any, Any, T]) -> T:
    """Await something on a client's own event loop, which may be another thread's.

    Raises:
        ExperimentError: The client is closed, or closes meanwhile, or has lost its scheduler.
    """
    if client.status != "running":
        work.close()
        raise ExperimentError(_unreachable(f"its client is {client.status}"))
    loop = cast("AsyncIOLoop", client.loop).asyncio_loop
    done = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
    try:
        await asyncio.wait([done])
    finally:
        done.cancel()
    if done.cancelled():
        raise ExperimentError(_unreachable("its client was closed"))
    try:
        return done.result()
    except (CommClosedError, CancelledError) as error:
        raise ExperimentError(_unreachable(str(error))) from error


async def _workers(client: Client) -> Workers:
    """Return what the scheduler knows of each worker, by its address."""
    scheduler: Any = client.scheduler
    workers: Workers = (await scheduler.identity())["workers"]
    return workers


def _slots(worker: Mapping[str, Any]) -> int:
    return int(worker["resources"].get(_RESOURCE, 0))


async def _stop(client: Client, name: str) -> None:
    await client.run(stop_job, name, on_error="ignore")


def _fingerprint_here(trial: Trial, config: ServerConfig) -> ModelFingerprint | None:
    with suppress(ConfigError):  # only the workers may have it
        return fingerprint_of(trial.model, config)
    return None


def _failed(trial: Trial, *reasons: str) -> TrialResult:
    return TrialResult(trial, Outcome.FAILED, " ".join(reasons), at=time.time())


def _died(count: int) -> str:
    return (
        f"Workers died {count} times while running this trial. Check their logs; too little memory"
        " is the usual cause."
    )


def _unreachable(why: str) -> str:
    return (
        f"The Dask cluster cannot be reached: {why}. Rows so far are kept; run the sweep again with"
        " a client of a running cluster."
    )


def _listed(reasons: Mapping[str, str]) -> str:
    """Name each reason once, with its workers."""
    workers: dict[str, list[str]] = {}
    for worker, reason in reasons.items():
        workers.setdefault(reason, []).append(worker)
    return " ".join(f"{', '.join(names)}: {reason}" for reason, names in workers.items())


# What follows runs on the workers.


_running: dict[str, tuple[anyio.CancelScope, anyio.Event]] = {}
_stopped: set[str] = set()
_turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)


def ready() -> None:
    """Do nothing: a worker that can be asked for this has kitty_nb."""


async def run_job(job: Job) -> JobResult | JobRejected | None:
    """Run a trial on this worker; None when it was stopped.

    It runs on the worker's event loop: there it can be cancelled, also by the worker's own end.
    """
    worker = get_worker()
    turn = _turns[worker.address] if job.alone else nullcontext()
    scope, ended = _running[job.name] = anyio.CancelScope(), anyio.Event()
    if job.name in _stopped:  # the request to stop came before the job
        scope.cancel()
    try:
        with scope:
            async with turn:
                return await _measure(job, worker)
    finally:
        del _running[job.name]
        ended.set()
    return None


async def stop_job(name: str) -> None:
    """End a trial and its server, if it runs on this worker, and wait for that."""
    _stopped.add(name)
    if name in _running:
        scope, ended = _running[name]
        scope.cancel()
        await ended.wait()


async def _measure(job: Job, worker: Worker) -> JobResult | JobRejected:
    def on_progress(event: SweepEvent) -> None:
        worker.log_event(job.topic, (job.name, pickle.dumps(event)))

    try:
        config = job.config
        if job.host != this_host():
            config = await run_sync(_settings_here, config)
        fingerprint = await run_sync(fingerprint_of, job.trial.model, config)
        await engine_of(job.trial, config)
    except KittyError as error:
        return JobRejected(worker.address, str(error))
    if job.model not in {None, fingerprint}:
        return JobRejected(worker.address, "It has another file of that name.")
    try:
        with TemporaryDirectory(
            prefix="kitty_nb-", dir=worker.local_directory, ignore_cleanup_errors=True
        ) as name:
            folder = Path(name)
            row = await run_trial(
                job.trial, on_progress, config=config, workload=job.workload, folder=folder
            )
            log = await run_sync(_read_logs, folder) if job.keep_log else b""
    except OSError as error:
        return JobRejected(worker.address, f"Can't write to {worker.local_directory}: {error}.")
    return JobResult(worker.address, row, log)


def _settings_here(config: ServerConfig) -> ServerConfig:
    """Return a sweep's settings with the places that this machine's own `.env` names.

    A models folder that it does not name is the sweep's, where there is one, as on a shared disk.

    Raises:
        ConfigError: The file cannot be read.
    """
    own, _ = load_lenient(profile=config.profile)
    shared = "models_dir" not in own.model_fields_set and config.models_dir.is_dir()
    binary = config.binary if config.binary and config.binary.exists() else None
    return config.model_copy(
        update={
            "models_dir": config.models_dir if shared else own.models_dir,
            "binary": own.binary or binary,
            "history": own.history,
        }
    )


def _read_logs(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.log")))
