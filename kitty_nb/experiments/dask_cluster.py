"""Running trials on a Dask cluster: which worker takes which is Dask's to decide."""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
import uuid
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from distributed.scheduler import KilledWorker, NoValidWorkerError

from kitty_nb.errors import ConfigError, ExperimentError
from kitty_nb.experiments.dask_client import (
    RESOURCE,
    answer_of,
    on_its_loop,
    slots_of,
    workers_of,
)
from kitty_nb.experiments.dask_worker import (
    Delivery,
    Order,
    Refusal,
    ready,
    run_order,
    stop_order,
)
from kitty_nb.experiments.model_files import fingerprint_of
from kitty_nb.experiments.trial import Outcome, TrialResult
from kitty_nb.isolated_server import this_host

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping
    from pathlib import Path

    from distributed import Client

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.trial import Execute, ModelFingerprint, OnProgress, Trial
    from kitty_nb.experiments.workload import Workload

_STOP_WITHIN = 30.0  # seconds; a worker that does not answer has ended, and so has its server
_LOOK_AFTER = 3.0  # seconds
_LOST_AT_MOST = 3
_log = logging.getLogger(__name__)


@asynccontextmanager
async def dask_cluster(
    client: Client, config: ServerConfig, workload: Workload, logs: Path | None = None
) -> AsyncGenerator[Execute]:
    """Give what runs trials on the workers of a cluster.

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
    await on_its_loop(client, cluster.open())
    try:
        yield cluster.run
    finally:
        with suppress(ExperimentError), anyio.CancelScope(shield=True):
            await on_its_loop(client, cluster.close())


class _Cluster:
    """What is known of a cluster during one run."""

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
        self._useless: dict[str, str] = {}
        self._refused: dict[tuple[object, ...], dict[str, str]] = {}
        self._marks: dict[str, ModelFingerprint | None] = {}
        self._resources: dict[str, float] = {}

    async def open(self) -> None:
        """Look at the workers, and listen to them. On the client's loop."""
        workers = await workers_of(self._client)
        if any(map(slots_of, workers.values())) or not workers:
            self._resources = {RESOURCE: 1}
        self._known = set(workers)
        answers = await self._client.run(ready, on_error="return")
        for worker, answer in answers.items():
            if isinstance(answer, Exception):
                self._useless[worker] = f"{answer}. Install kitty_nb[dask] there, as it is here."
        if answers and self._useless.keys() == answers.keys():
            raise ExperimentError(f"No worker can run trials. {_listed(self._useless)}")
        self._client.subscribe_topic(self._topic, self._pass_on)

    async def close(self) -> None:
        """Listen no more. On the client's loop."""
        self._client.unsubscribe_topic(self._topic)

    async def run(self, trial: Trial, on_progress: OnProgress) -> TrialResult:
        """Return a trial's row, from whichever worker can run it."""
        if trial.model not in self._marks:
            self._marks[trial.model] = await self._mark_here(trial)
        lost = 0
        while lost < _LOST_AT_MOST:
            workers = await self._able(trial)
            if workers == []:
                reason = f"No worker can run this trial. {_listed(self._refusals(trial))}"
                return _failed(trial, f"{_died(lost)} {reason}" if lost else reason)
            answer = await self._order(trial, workers, on_progress)
            if isinstance(answer, TrialResult):
                return answer
            if answer is None:
                lost += 1
                continue
            if isinstance(answer, Delivery):
                expected = self._marks[trial.model] = self._marks[trial.model] or answer.model
                if expected == answer.model:
                    await self._keep(trial, answer.log)
                    return answer.result
                answer = Refusal(answer.worker, "Its file of that name differs from the others'.")
            self._refused.setdefault(_needs(trial), {})[answer.worker] = answer.reason
        return _failed(trial, _died(lost))

    async def _order(
        self, trial: Trial, workers: list[str] | None, on_progress: OnProgress
    ) -> Delivery | Refusal | TrialResult | None:
        order = Order(
            name=uuid.uuid4().hex,
            topic=self._topic,
            trial=trial,
            config=self._config,
            workload=self._workload,
            host=this_host(),
            model=self._marks[trial.model],
            alone=not self._resources,
            keep_log=self._logs is not None,
        )
        self._listeners[order.name] = on_progress
        try:
            return await on_its_loop(self._client, self._submit(order, workers))
        except KilledWorker as killed:
            return _failed(trial, _died(killed.allowed_failures + 1))
        except NoValidWorkerError as error:
            return _failed(trial, f"No worker took this trial. Dask says: {error}")
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(_STOP_WITHIN, shield=True), suppress(ExperimentError):
                await on_its_loop(self._client, self._stop(order.name))
            raise
        finally:
            del self._listeners[order.name]

    async def _submit(self, order: Order, workers: list[str] | None) -> Delivery | Refusal | None:
        """Hand an order to the scheduler, and wait for what comes of it. On the client's loop.

        None when it can only go to workers that are all gone: those that took their places have
        other addresses, for which the scheduler would not know that they are as good.
        """
        future = self._client.submit(
            run_order, order, pure=False, resources=self._resources or None, workers=workers
        )
        answer: asyncio.Future[Delivery | Refusal] = asyncio.ensure_future(answer_of(future))
        try:
            while not answer.done():
                await asyncio.wait([answer], timeout=_LOOK_AFTER if workers else None)
                if workers and not set(workers) & (await workers_of(self._client)).keys():
                    break
            return answer.result() if answer.done() else None
        finally:
            answer.cancel()
            future.release()

    async def _stop(self, name: str) -> None:
        await self._client.run(stop_order, name, on_error="ignore")

    def _refusals(self, trial: Trial) -> dict[str, str]:
        return self._useless | self._refused.get(_needs(trial), {})

    async def _able(self, trial: Trial) -> list[str] | None:
        """Workers that have not refused such a trial; None when all may take it."""
        refused = self._refusals(trial)
        while refused:
            workers = await on_its_loop(self._client, workers_of(self._client))
            able = [
                address
                for address, worker in workers.items()
                if address not in refused and (slots_of(worker) or not self._resources)
            ]
            gone = self._known - workers.keys() - refused.keys()
            self._known = set(workers)
            if not workers:
                break
            if able or not gone:
                return able
            await anyio.sleep(_LOOK_AFTER)  # others may take the places of those that are gone
        return None

    async def _mark_here(self, trial: Trial) -> ModelFingerprint | None:
        try:
            return await anyio.to_thread.run_sync(fingerprint_of, trial.model, self._config)
        except ConfigError:  # only the workers have it
            return None

    async def _keep(self, trial: Trial, log: bytes) -> None:
        if self._logs and log:
            folder = anyio.Path(self._logs)
            try:
                await folder.mkdir(parents=True, exist_ok=True)
                await (folder / f"trial_{trial.key}.log").write_bytes(log)
            except OSError as error:
                _log.warning("The log of %s is not kept: %s.", trial.label, error)

    def _pass_on(self, event: tuple[float, tuple[str, bytes]]) -> None:
        """Bring a worker's event home. On the client's loop."""
        name, pickled = event[1]
        with suppress(RuntimeError):  # the sweep has ended
            self._loop.call_soon_threadsafe(partial(self._hear, name, pickled))

    def _hear(self, name: str, pickled: bytes) -> None:
        if tell := self._listeners.get(name):
            tell(pickle.loads(pickled))  # noqa: S301 (from where the results come from, as pickles)


def _needs(trial: Trial) -> tuple[object, ...]:
    """What a worker may lack."""
    return trial.model, dict(trial.settings).get("binary")


def _failed(trial: Trial, reason: str) -> TrialResult:
    return TrialResult(trial, Outcome.FAILED, reason, at=time.time())


def _died(count: int) -> str:
    return (
        f"Workers died while they had this trial, {count} times. Their logs may say why; too little"
        " memory is the usual reason."
    )


def _listed(refused: Mapping[str, str]) -> str:
    """Each reason once, with the workers that have it."""
    workers: dict[str, list[str]] = {}
    for worker, reason in refused.items():
        workers.setdefault(reason, []).append(worker)
    return " ".join(f"{', '.join(names)}: {reason}" for reason, names in workers.items())
