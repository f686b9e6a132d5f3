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
from typing import TYPE_CHECKING, Any

import anyio
from anyio.to_thread import run_sync
from distributed import CancelledError, Client, get_worker
from distributed.scheduler import KilledWorker, NoValidWorkerError

from kitty_nb.config import ServerConfig, load_lenient
from kitty_nb.errors import ExperimentError, KittyError
from kitty_nb.experiments.measure import engine_of, fingerprint_of, fingerprints_here, run_trial
from kitty_nb.experiments.trial import ModelFingerprint, Outcome, TrialResult
from kitty_nb.isolated_server import this_host

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from kitty_nb.experiments.trial import Execute, OnProgress, SweepEvent, Trial, Workload

    Workers = Mapping[str, Mapping[str, Any]]

_RESOURCE = "kitty_trial"
_STOP_WITHIN = 30.0  # seconds; a worker that does not answer has ended, and so has its server
_LOOK_AFTER = 3.0  # seconds
_LOOKS = 20  # until nobody takes the place of a worker that is gone: on a busy machine too
_LOST_AT_MOST = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that the trials of a run have in common.

    Attributes:
        topic: The topic of the cluster's events that carries the progress of trials.
        config: The sweep's settings.
        host: The machine on which those settings hold as they are.
        alone: Whether a trial waits until its worker has no other.
        keep_logs: Whether the servers' logs are sent back.
    """

    topic: str
    config: ServerConfig
    workload: Workload
    host: str
    alone: bool
    keep_logs: bool


async def count_slots(client: Client) -> int:
    """Return how many trials the workers take at once, 1 at least: more may be on their way.

    Raises:
        ExperimentError: There is no cluster.
    """
    async with _connected(client) as own:
        workers = await _workers(own)
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
        client: A client of the cluster; it stays open.
        config: The settings that trials change.
        workload: What to ask each server.
        logs: A folder here for the servers' logs; without it they go with the trial.

    Raises:
        ExperimentError: There is no cluster.
    """
    async with _connected(client) as own:
        workers = await _workers(own)
        setup = Setup(
            topic=f"kitty_nb-{uuid.uuid4().hex}",
            config=config.model_copy(update={"api_key": None}),
            workload=workload,
            host=this_host(),
            alone=bool(workers) and not any(map(_slots, workers.values())),
            keep_logs=logs is not None,
        )
        cluster = _Cluster(own, setup, logs)
        own.subscribe_topic(setup.topic, cluster.on_event)
        yield cluster.run


class _Cluster:
    """A cluster during one run, by a client of its own on the loop of the run."""

    def __init__(self, client: Any, setup: Setup, logs: Path | None) -> None:
        self._client = client
        self._setup = setup
        self._logs = logs
        self._listeners: dict[str, OnProgress] = {}
        self._models: dict[str, ModelFingerprint | None] = {}
        # By model and engine of a trial: what each worker has, or why it cannot run it.
        self._found: defaultdict[object, dict[str, Any]] = defaultdict(dict)

    async def run(self, trial: Trial, on_progress: OnProgress) -> TrialResult:
        """Return a trial's row, from whichever worker can run it."""
        try:
            for _ in range(_LOST_AT_MOST):
                fit, unfit = await self._look(trial)
                if not fit:
                    return _failed(trial, f"No worker can run this trial. {_listed(unfit)}")
                if answer := await self._send(trial, fit, on_progress):
                    row, log = answer
                    await self._keep(trial, log)
                    return row
        except KilledWorker as killed:
            return _failed(trial, _died(killed.allowed_failures + 1))
        except NoValidWorkerError as error:
            return _failed(trial, f"No worker took this trial. Dask says: {error}")
        except (OSError, CancelledError) as error:
            raise ExperimentError(_unreachable(str(error))) from error
        return _failed(trial, _died(_LOST_AT_MOST))

    async def _look(self, trial: Trial) -> tuple[list[str], dict[str, str]]:
        """Return the workers that can run a trial, and why the others cannot.

        If files of the same name differ, the one in the notebook's folder is the model, otherwise
        that of the first worker that has one.

        Raises:
            ExperimentError: No worker has kitty_nb.
        """
        model = trial.model
        if model not in self._models:
            here = await run_sync(fingerprints_here, [model], self._setup.config)
            self._models[model] = here.get(model)
        found = self._found[model, dict(trial.settings).get("binary")]
        unfit: dict[str, str] = {}
        for _ in range(_LOOKS):
            await self._client.wait_for_workers(1)
            workers = await _workers(self._client)
            if new := sorted(workers.keys() - found.keys()):
                answers = await self._client.run(
                    look, self._setup, trial, workers=new, on_error="return"
                )
                # A worker that did not answer at all is on its way out, or asked again.
                found |= {w: one for w, one in answers.items() if not isinstance(one, OSError)}
            if self._models[model] is None:
                seen = (one for one in found.values() if isinstance(one, ModelFingerprint))
                self._models[model] = next(seen, None)
            reasons = {w: _why_not(one, self._models[model]) for w, one in found.items()}
            unfit = {worker: reason for worker, reason in reasons.items() if reason}
            if found and all(isinstance(one, Exception) for one in found.values()):
                raise ExperimentError(f"No worker can run trials. {_listed(unfit)}")
            able = found.keys() - unfit.keys()
            fit = [w for w in workers if w in able and (_slots(workers[w]) or self._setup.alone)]
            if fit or able <= workers.keys() <= found.keys():
                return fit, unfit
            await anyio.sleep(_LOOK_AFTER)  # others may take the places of those that are gone
        return [], unfit | dict.fromkeys(able, "It is gone.")

    async def _send(
        self, trial: Trial, workers: list[str], on_progress: OnProgress
    ) -> tuple[TrialResult, bytes] | None:
        """Have a worker run a trial, and return its row and the server's log.

        None when all workers that could are gone: those that took their places have other
        addresses, and the scheduler does not know that they are as good.
        """
        name = uuid.uuid4().hex
        self._listeners[name] = on_progress
        slot = None if self._setup.alone else {_RESOURCE: 1}
        future = self._client.submit(
            run_job, self._setup, trial, name, pure=False, resources=slot, workers=workers
        )
        answer: asyncio.Future[tuple[TrialResult, bytes]] = asyncio.ensure_future(future.result())
        try:
            while not answer.done():
                await asyncio.wait([answer], timeout=_LOOK_AFTER)
                if not set(workers) & (await _workers(self._client)).keys():
                    break
            return answer.result() if answer.done() else None
        except anyio.get_cancelled_exc_class():
            future.release()
            with anyio.move_on_after(_STOP_WITHIN, shield=True), suppress(OSError):
                await self._client.run(stop_job, name, on_error="ignore")
            raise
        finally:
            answer.cancel()
            future.release()
            del self._listeners[name]

    async def _keep(self, trial: Trial, log: bytes) -> None:
        if self._logs and log:
            folder = anyio.Path(self._logs)
            try:
                await folder.mkdir(parents=True, exist_ok=True)
                await (folder / f"trial_{trial.key}.log").write_bytes(log)
            except OSError as error:
                _log.warning("Can't write the log of %s: %s.", trial.label, error)

    def on_event(self, event: tuple[float, tuple[str, bytes]]) -> None:
        """Hand a worker's event to the listener of its trial."""
        name, pickled = event[1]
        if listener := self._listeners.get(name):
            listener(pickle.loads(pickled))  # noqa: S301 (Dask's results are pickles, too)


@asynccontextmanager
async def _connected(client: Client) -> AsyncGenerator[Any]:
    """Connect to a client's cluster from the loop that runs now; the client may have another.

    Raises:
        ExperimentError: The client is closed, or the cluster cannot be reached.
    """
    if client.status != "running":
        raise ExperimentError(_unreachable(f"its client is {client.status}"))
    scheduler: Any = client.scheduler
    own: Any = Client(  # declared by the types of blocking calls
        scheduler.address, security=client.security, asynchronous=True, set_as_default=False
    )
    try:
        await own
        yield own
    except OSError as error:
        raise ExperimentError(_unreachable(str(error))) from error
    finally:
        with anyio.CancelScope(shield=True):
            await own.close()


async def _workers(client: Any) -> Workers:
    """Return what the scheduler knows of each worker, by its address."""
    workers: Workers = (await client.scheduler.identity())["workers"]
    return workers


def _slots(worker: Mapping[str, Any]) -> int:
    return int(worker["resources"].get(_RESOURCE, 0))


def _why_not(answer: object, model: ModelFingerprint | None) -> str:
    """Say why a worker with this answer cannot run a trial of a model; empty where it can."""
    if isinstance(answer, ModelFingerprint):
        return "" if answer == model else "It has another file of that name."
    installed = "Install kitty_nb[dask] there, as it is here."
    return f"{answer}. {installed}" if isinstance(answer, Exception) else str(answer)


def _failed(trial: Trial, reason: str) -> TrialResult:
    return TrialResult(trial, Outcome.FAILED, reason, at=time.time())


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


async def look(setup: Setup, trial: Trial) -> ModelFingerprint | str:
    """Return the model that this worker has for a trial, or why it cannot run it."""
    try:
        config = await run_sync(_settings_here, setup)
        fingerprint = await run_sync(fingerprint_of, trial.model, config)
        await engine_of(trial, config)
    except KittyError as error:
        return str(error)
    return fingerprint


async def run_job(setup: Setup, trial: Trial, name: str) -> tuple[TrialResult, bytes] | None:
    """Run a trial on this worker; None when it was stopped.

    It runs on the worker's event loop: there it can be cancelled, also by the worker's own end.

    Args:
        setup: The run's setup.
        trial: The trial.
        name: A unique name for `stop_job` and for progress events.

    Returns:
        The trial's row and the server's log.
    """
    worker = get_worker()

    def on_progress(event: SweepEvent) -> None:
        worker.log_event(setup.topic, (name, pickle.dumps(event)))

    scope, ended = _running[name] = anyio.CancelScope(), anyio.Event()
    if name in _stopped:  # the request to stop came before the job
        scope.cancel()
    try:
        with (
            scope,
            TemporaryDirectory(dir=worker.local_directory, ignore_cleanup_errors=True) as temporary,
        ):
            folder = Path(temporary)
            async with _turns[worker.address] if setup.alone else nullcontext():
                config = await run_sync(_settings_here, setup)
                row = await run_trial(
                    trial, on_progress, config=config, workload=setup.workload, folder=folder
                )
            log = await run_sync(_read_logs, folder) if setup.keep_logs else b""
            return row, log
    except OSError as error:
        return _failed(trial, f"Can't write to {worker.local_directory}: {error}."), b""
    finally:
        del _running[name]
        ended.set()
    return None


async def stop_job(name: str) -> None:
    """End a trial and its server, if it runs on this worker, and wait for that."""
    _stopped.add(name)
    if name in _running:
        scope, ended = _running[name]
        scope.cancel()
        await ended.wait()


def _settings_here(setup: Setup) -> ServerConfig:
    """Return a sweep's settings with the places that this machine's own `.env` names.

    A models folder that it does not name is the sweep's, where there is one, as on a shared disk.

    Raises:
        ConfigError: The file cannot be read.
    """
    config = setup.config
    if setup.host == this_host():
        return config
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
