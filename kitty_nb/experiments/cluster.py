"""Trials on a Dask cluster, whose workers use their own engines, models and folders.

The user starts the workers. Each runs as many trials at once as it has slots of the resource
`kitty_trial`; if no worker has any, one at a time.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
import uuid
from collections import defaultdict
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from anyio.to_thread import run_sync
from distributed import CancelledError, Client, get_worker
from distributed.scheduler import KilledWorker, NoValidWorkerError

from kitty_nb.config.profiles import load_lenient
from kitty_nb.errors import ExperimentError, KittyError, first_of
from kitty_nb.experiments.measure import (
    engine_of,
    fingerprint_of,
    fingerprints_here,
    run_trial,
    why_not_written,
)
from kitty_nb.experiments.trial import ModelFingerprint, Outcome, TrialResult
from kitty_nb.isolated_server import this_host

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.trial import Execute, OnProgress, SweepEvent, Trial, Workload

    Workers = Mapping[str, Mapping[str, Any]]

_RESOURCE = "kitty_trial"
_STOP_WITHIN = 30.0  # seconds; a worker that doesn't answer is gone, and so is its server
_LOOK_AFTER, _ALIVE_WITHIN = 3.0, 20.0  # seconds
_LOOKS = 20  # polls before a lost worker counts as not replaced, even on a busy machine
_LOST_AT_MOST = 3
_NO_SLOT = f"It has no slot: start it with --resources {_RESOURCE}=1."
_RUN_AGAIN = "Results so far are kept; run the sweep again with a client of a running cluster."
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Setup:
    """The data shared by all trials of a run.

    Attributes:
        topic: The topic of the cluster's events that carries the trials' progress.
        host: The machine whose settings these are.
        alone: Whether each worker runs one trial at a time.
        keep_logs: Whether workers send the servers' logs back.
    """

    topic: str
    config: ServerConfig
    workload: Workload
    host: str
    alone: bool
    keep_logs: bool


async def count_slots(client: Client) -> int:
    """Wait for a worker, and return how many trials all of them run at once, at least 1."""
    async with connected(client) as own:
        await own.wait_for_workers(1)
        workers = await workers_of(own)
    return max(1, sum(map(_slots, workers.values())) or len(workers))


@asynccontextmanager
async def dask_cluster(
    client: Client, config: ServerConfig, workload: Workload, logs: Path | None = None
) -> AsyncGenerator[Execute]:
    """Run trials on the workers of a cluster.

    On other machines, the worker's own `.env` locates models and engine. A trial runs on a worker
    that has its model; if the model is also on this machine, the files must be identical. When a
    worker dies, its trials move to another one, up to `distributed.scheduler.allowed-failures`
    times. The servers' logs come to a local folder, if given.
    """
    async with connected(client) as own:
        await own.wait_for_workers(1)  # which tells whether workers have slots
        workers = await workers_of(own)
        setup = Setup(
            topic=f"kitty_nb-{uuid.uuid4().hex}",
            config=config.model_copy(update={"api_key": None, "url": None}),
            workload=workload,
            host=this_host(),
            alone=not any(map(_slots, workers.values())),
            keep_logs=logs is not None,
        )
        cluster = _Cluster(own, setup, logs)
        own.subscribe_topic(setup.topic, cluster.on_event)
        yield cluster.run


@dataclass
class _Cluster:
    """A cluster during one run, with its own client on the run's event loop."""

    client: Any
    setup: Setup
    logs: Path | None
    listeners: dict[str, OnProgress] = field(default_factory=dict)
    models: dict[str, ModelFingerprint | None] = field(default_factory=dict)
    # By model and engine: each worker's fingerprint of the model, or why it can't run it.
    found: defaultdict[object, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))

    async def run(self, trial: Trial, on_progress: OnProgress) -> TrialResult:
        """Run a trial on a suitable worker."""
        try:
            for _ in range(_LOST_AT_MOST):
                fit, unfit = await self._look(trial)
                if not fit:
                    return _failed(trial, f"No worker can run this trial. {listed(unfit)}")
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
        """Return the workers that can run a trial, and the reasons why others can't.

        If model files of the same name differ, the one on this machine is used, or else that of the
        first worker that has one.
        """
        model = trial.model
        if model not in self.models:
            here = await run_sync(fingerprints_here, [model], self.setup.config)
            self.models[model] = here.get(model)
        found = self.found[model, dict(trial.settings).get("binary")]
        unfit: dict[str, str] = {}
        for _ in range(_LOOKS):
            await self.client.wait_for_workers(1)
            workers = await workers_of(self.client)
            if new := sorted(workers.keys() - found.keys()):
                answers = await ask_each(self.client, new, look, self.setup, trial)
                # A worker that did not answer is leaving, or is asked again.
                found |= {w: one for w, one in answers.items() if not isinstance(one, OSError)}
            if self.models[model] is None:
                seen = (one for one in found.values() if isinstance(one, ModelFingerprint))
                self.models[model] = next(seen, None)
            slotless = {
                w: _NO_SLOT for w, one in workers.items() if not (self.setup.alone or _slots(one))
            }
            reasons = {
                w: why_not(one, self.models[model]) or slotless.get(w, "")
                for w, one in found.items()
            }
            unfit = {worker: reason for worker, reason in reasons.items() if reason}
            if found and all(isinstance(one, Exception) for one in found.values()):
                raise ExperimentError(f"No worker can run trials. {listed(unfit)}")
            able = found.keys() - unfit.keys()
            fit = [worker for worker in workers if worker in able]
            if fit or able <= workers.keys() <= found.keys():
                return fit, unfit
            await anyio.sleep(_LOOK_AFTER)  # lost workers may be replaced
        return [], unfit | dict.fromkeys(able, "It left the cluster.")

    async def _send(
        self, trial: Trial, workers: list[str], on_progress: OnProgress
    ) -> tuple[TrialResult, bytes] | None:
        """Run a trial on one of the workers, and return its row and the server's log.

        None if all of them left: the scheduler doesn't know that their replacements, which have
        other addresses, would do.
        """
        name = uuid.uuid4().hex
        self.listeners[name] = on_progress
        slot = None if self.setup.alone else {_RESOURCE: 1}
        future = self.client.submit(
            run_job, self.setup, trial, name, pure=False, resources=slot, workers=workers
        )
        answer: asyncio.Future[tuple[TrialResult, bytes]] = asyncio.ensure_future(future.result())
        try:
            while not answer.done():
                await asyncio.wait([answer], timeout=_LOOK_AFTER)
                if not set(workers) & (await workers_of(self.client)).keys():
                    break
            return answer.result() if answer.done() else None
        except anyio.get_cancelled_exc_class():
            future.release()
            with anyio.move_on_after(_STOP_WITHIN, shield=True), suppress(OSError):
                await self.client.run(stop_job, name, on_error="ignore")
            raise
        finally:
            answer.cancel()
            future.release()
            del self.listeners[name]

    async def _keep(self, trial: Trial, log: bytes) -> None:
        if self.logs and log:
            folder = anyio.Path(self.logs)
            try:
                await folder.mkdir(parents=True, exist_ok=True)
                await (folder / f"trial_{trial.key}.log").write_bytes(log)
            except OSError as error:
                _log.warning("Can't write the log of %s: %s.", trial.label, error)

    def on_event(self, event: tuple[float, tuple[str, bytes]]) -> None:
        """Pass a worker's event to the listener of its trial."""
        name, pickled = event[1]
        if listener := self.listeners.get(name):
            listener(pickle.loads(pickled))  # noqa: S301 (Dask's results are pickles, too)


@asynccontextmanager
async def connected(client: Client, remedy: str = _RUN_AGAIN) -> AsyncGenerator[Any]:
    """Connect to a client's cluster from the running event loop, which the client may not share.

    If the cluster can't be reached, the error ends with the remedy, a sentence.
    """
    if client.status != "running":
        raise ExperimentError(_unreachable(f"its client is {client.status}", remedy))
    scheduler: Any = client.scheduler
    own: Any = Client(  # typed for blocking calls only
        scheduler.address, security=client.security, asynchronous=True, set_as_default=False
    )
    try:
        await own
        yield own
    except OSError as error:
        raise ExperimentError(_unreachable(str(error), remedy)) from error
    finally:
        with anyio.CancelScope(shield=True):
            await own.close()


async def workers_of(client: Any) -> Workers:
    """Return the scheduler's information on each worker, by address."""
    workers: Workers = (await client.scheduler.identity())["workers"]
    return workers


async def ask_each(
    client: Any, workers: Iterable[str], function: Callable[..., object], *arguments: object
) -> dict[str, Any]:
    """Run a function on each worker; return its results, or the errors by which it failed.

    The function may take any time, in a coroutine. A worker that hangs has a sentence in place of a
    result.
    """
    answers: dict[str, Any] = {}

    async def ask(worker: str) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, worker, tasks.cancel_scope)
            said = await client.run(function, *arguments, workers=[worker], on_error="return")
            answers.update(said)
            tasks.cancel_scope.cancel()

    async def watch(worker: str, asking: anyio.CancelScope) -> None:
        while True:
            with anyio.move_on_after(_ALIVE_WITHIN) as ping:
                await client.run(int, workers=[worker], on_error="return")
            if ping.cancelled_caught:
                break
            await anyio.sleep(_LOOK_AFTER)
        await anyio.lowlevel.checkpoint()  # an answer that came meanwhile counts
        answers[worker] = (
            f"It has not answered for {_ALIVE_WITHIN:.0f} s: it hangs or is paused. Restart it."
        )
        asking.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            for worker in workers:
                tasks.start_soon(ask, worker)
    except ExceptionGroup as group:
        raise first_of(group) from None
    return answers


def _slots(worker: Mapping[str, Any]) -> int:
    return int(worker["resources"].get(_RESOURCE, 0))


def why_not(answer: object, model: ModelFingerprint | None) -> str:
    """Say why a worker that gave this answer can't run a trial; empty if it can."""
    if isinstance(answer, ModelFingerprint):
        return "" if answer == model else "Its file of that name is a different one."
    installed = "Install the same version of kitty_nb[dask] there."
    return f"{answer}. {installed}" if isinstance(answer, Exception) else str(answer)


def _failed(trial: Trial, reason: str) -> TrialResult:
    return TrialResult(trial, Outcome.FAILED, reason, at=time.time())


def _died(count: int) -> str:
    return (
        f"Workers died or left {count} times while running this trial. Check their logs; too little"
        " memory and a batch job's time limit are the usual causes."
    )


def _unreachable(why: str, remedy: str = _RUN_AGAIN) -> str:
    return f"Can't reach the Dask cluster: {why}. {remedy}"


def listed(reasons: Mapping[str, str]) -> str:
    """Return each reason once, with its workers."""
    workers: dict[str, list[str]] = {}
    for worker, reason in reasons.items():
        workers.setdefault(reason, []).append(worker)
    return " ".join(f"{', '.join(names)}: {reason}" for reason, names in workers.items())


# The functions below run on the workers.


_running: dict[str, tuple[anyio.CancelScope, anyio.Event]] = {}
_stopped: set[str] = set()
_turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)


async def look(setup: Setup, trial: Trial) -> ModelFingerprint | str:
    """Return the fingerprint of this worker's model, or why it can't run the trial."""
    try:
        config = await run_sync(settings_here, setup.config, setup.host)
        fingerprint = await run_sync(fingerprint_of, trial.model, config)
        await engine_of(trial, config)
    except KittyError as error:
        return str(error)
    except OSError as error:  # which its caller would take for a lost connection
        return f"{error}."
    return fingerprint


async def run_job(setup: Setup, trial: Trial, name: str) -> tuple[TrialResult, bytes] | None:
    """Run a trial on this worker; return None if it was stopped.

    The trial runs on the worker's event loop, so that it can be cancelled, also by a shutdown. Its
    unique name is used by `stop_job` and progress events. The server's log comes with the row.
    """
    worker = get_worker()

    def on_progress(event: SweepEvent) -> None:
        worker.log_event(setup.topic, (name, pickle.dumps(event)))

    try:
        with (
            stoppable(name),
            TemporaryDirectory(dir=worker.local_directory, ignore_cleanup_errors=True) as temporary,
        ):
            folder = Path(temporary)
            async with _turns[worker.address] if setup.alone else nullcontext():
                config = await run_sync(settings_here, setup.config, setup.host)
                row = await run_trial(
                    trial, on_progress, config=config, workload=setup.workload, folder=folder
                )
            log = await run_sync(_read_logs, folder) if setup.keep_logs else b""
            return row, log
    except OSError as error:
        return _failed(trial, why_not_written(error, worker.local_directory)), b""
    return None


@contextmanager
def stoppable(name: str) -> Iterator[None]:
    """Let `stop_job` end, by a unique name, what runs inside the block."""
    scope, ended = _running[name] = anyio.CancelScope(), anyio.Event()
    if name in _stopped:  # `stop_job` was faster than the job
        scope.cancel()
    try:
        with scope:
            yield
    finally:
        del _running[name]
        ended.set()


async def stop_job(name: str) -> None:
    """Stop a job if it runs on this worker, and wait for the end."""
    _stopped.add(name)
    if name in _running:
        scope, ended = _running[name]
        scope.cancel()
        await ended.wait()


def settings_here(config: ServerConfig, host: str) -> ServerConfig:
    """Return settings with the paths of this machine's own `.env`.

    If that sets no models folder, the given one is used if it exists here, as on a shared disk. On
    their own host, the settings hold as they are.
    """
    if host == this_host():
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
