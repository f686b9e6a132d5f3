"""The placement of a fleet's replicas: Dask finds workers, this handles replicas without one."""

from __future__ import annotations

import logging
import pickle
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import httpx
from anyio.to_thread import run_sync

from kitty_nb.errors import KittyError, first_of
from kitty_nb.experiments.cluster import ask_each, connected, listed, stop_job, why_not, workers_of
from kitty_nb.experiments.measure import fingerprints_here
from kitty_nb.fleet.replica import SLOT, Setup, grant, look, serve
from kitty_nb.isolated_server import this_host
from kitty_nb.supervisor.events import ServerStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup
    from distributed import Client

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.trial import ModelFingerprint
    from kitty_nb.fleet.replica import Report

_log = logging.getLogger(__name__)
_LOOK_EVERY = 2.0  # seconds
_AGAIN = "Its replicas end with it. Create a fleet with a client of a running cluster."
# Seconds. A worker that doesn't answer by then has ended, or stops its server when it resumes.
_STOP_WITHIN = 9.0
_REACHED_WITHIN = 5.0  # seconds
_OVER = {"finished", "cancelled", "lost"}  # Dask's names for states of a task's future


@dataclass(frozen=True, slots=True)
class Replica:
    """One server of a fleet, as known here.

    Attributes:
        number: Its number, from 0.
        status: Its state; OUT_OF_REACH if its worker is gone, or its address can't be reached.
        report: Its latest report; None before the first.
        problem: What is wrong, in a sentence.
        at: When the report arrived, in seconds of the monotonic clock.
    """

    number: int
    status: ServerStatus
    report: Report | None = None
    problem: str | None = None
    at: float = 0.0

    @property
    def url(self) -> str | None:
        """Its address."""
        return self.report.url if self.report else None

    @property
    def worker(self) -> str | None:
        """The address of its worker."""
        return self.report.worker if self.report else None

    @property
    def uptime(self) -> float | None:
        """Seconds since it became ready; None if it is not."""
        told = self.report.ready_for if self.report else None
        ready = self.status is ServerStatus.READY
        return None if told is None or not ready else told + time.monotonic() - self.at


@dataclass(slots=True)
class _Place:
    """A replica's task, and what is known about it."""

    number: int
    wanted: bool = True
    run: str = ""
    future: Any = None
    report: Report | None = None
    at: float = 0.0
    ended: str | None = None
    lost: str | None = None
    seen: bool | None = None  # whether it can be reached from here
    stale: set[str] = field(default_factory=set)  # former runs, which may go on

    @property
    def state(self) -> Replica:
        status = self.report.status if self.report else ServerStatus.STOPPED
        error = self.report.error if self.report else None
        problem = self.ended or self.lost or error
        if not self.wanted:
            status, problem = ServerStatus.STOPPED, None
        elif self.ended:
            status = ServerStatus.FAILED
        elif self.lost:
            status = ServerStatus.OUT_OF_REACH if self.report else ServerStatus.STOPPED
        elif status is ServerStatus.READY and self.seen is False:
            status = ServerStatus.OUT_OF_REACH
            problem = f"It is ready, but {self.report and self.report.url} can't be reached here."
        return Replica(self.number, status, self.report, problem, self.at)


class Placement:
    """The placement of replicas on a cluster's workers, from `run` until it is cancelled.

    Everything happens on one event loop.

    Args:
        client: A client of the cluster; it stays open.
        config: The settings, with the key that all replicas require.
        replicas: The number of replicas.
        on_change: Called at each change.

    Attributes:
        problem: Why replicas can't be placed, in a sentence; None if nothing prevents it.
        ended: Whether it has given up, for that reason.
    """

    def __init__(
        self,
        client: Client,
        config: ServerConfig,
        replicas: int,
        on_change: Callable[[], object],
    ) -> None:
        self._client, self._on_change = client, on_change
        self._setup = Setup(f"kitty_nb-{uuid.uuid4().hex}", config, this_host())
        self._places = [_Place(number) for number in range(replicas)]
        self._workers: dict[str, ModelFingerprint | str | Exception] = {}
        self._fingerprint: ModelFingerprint | None = None
        self.problem: str | None = None
        self.ended = False
        self._wake = anyio.Event()
        self._own: Any
        self._tasks: TaskGroup

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """The replicas as they are now."""
        return tuple(place.state for place in self._places)

    async def run(self) -> None:
        """Keep the replicas placed until cancelled; then stop them."""
        try:
            async with (
                connected(self._client, _AGAIN) as self._own,
                anyio.create_task_group() as self._tasks,
            ):
                self._own.subscribe_topic(self._setup.topic, self._on_event)
                try:
                    while True:
                        self._wake = anyio.Event()
                        await self._look()
                        with anyio.move_on_after(_LOOK_EVERY):
                            await self._wake.wait()
                finally:
                    with anyio.CancelScope(shield=True):
                        await self.stop(*range(len(self._places)))
        except* Exception as group:  # noqa: BLE001 (nobody waits for it)
            error, self.ended = first_of(group), True
            self.problem = str(error)
            if not isinstance(error, KittyError | OSError):
                _log.error("Placing replicas failed.", exc_info=error)
                self.problem = f"Internal error in kitty_nb: {error!r}. Please report this."
            self._on_change()

    async def start(self, *numbers: int) -> None:
        """Start replicas that have ended or were stopped."""
        for number in numbers:
            place = self._places[number]
            if place.ended or not place.wanted:
                place.wanted, place.ended, place.report = True, None, None
        self._wake.set()

    async def stop(self, *numbers: int) -> None:
        """Stop replicas, and wait until they have ended."""
        async with anyio.create_task_group() as tasks:
            for number in numbers:
                tasks.start_soon(self._stop, self._places[number])

    async def rescan(self) -> None:
        """Ask all workers again whether they can take a replica."""
        told = self._workers.items()
        self._workers = {w: one for w, one in told if not isinstance(one, str | Exception)}
        self._wake.set()

    async def _look(self) -> None:
        """Admit new workers, and handle each replica that has no worker or has ended."""
        asked = time.monotonic()
        workers = await workers_of(self._own)
        self._workers = {w: one for w, one in self._workers.items() if w in workers}
        fresh = await self._admit(sorted(workers.keys() - self._workers.keys()))
        for place in self._places:
            self._tasks.start_soon(self._stop_stale, place)
            await self._see_to(place, set(workers), asked, fresh=fresh)
        self._on_change()

    async def _admit(self, new: list[str]) -> bool:
        """Give a slot to each new worker that can serve the model; return whether one can."""
        if not new:
            return False
        if self._fingerprint is None:
            config = self._setup.config
            model = str(config.model)
            here = await run_sync(fingerprints_here, [model], config)
            self._fingerprint = here.get(model)
        answers = await ask_each(self._own, new, look, self._setup)
        # A worker that did not answer is leaving, or is asked again.
        self._workers |= {w: one for w, one in answers.items() if not isinstance(one, OSError)}
        if self._fingerprint is None:
            answered = self._workers.values()
            known = (one for one in answered if not isinstance(one, str | Exception))
            self._fingerprint = next(known, None)
        unfit = {}
        for worker, one in self._workers.items():
            if reason := why_not(one, self._fingerprint):
                unfit[worker] = self._workers[worker] = reason
        fit = [worker for worker in new if worker in self._workers and worker not in unfit]
        self.problem = listed(unfit) or None
        refused = {w for w, one in (await ask_each(self._own, fit, grant)).items() if one}
        for worker in refused:  # it is asked again
            del self._workers[worker]
        return len(refused) < len(fit)

    async def _see_to(self, place: _Place, workers: set[str], asked: float, *, fresh: bool) -> None:
        report = place.report
        # A worker whose report is newer than the list may have joined since.
        lost = report is not None and report.worker not in workers and place.at < asked
        placed = report is not None and report.run == place.run and not lost
        if lost and report:
            place.lost = f"Its worker {report.worker} is gone. Dask restarts it on another one."
        elif not placed and place.wanted:
            place.lost = "It waits for a worker that can serve the model and has no replica yet."
        future = place.future
        status = future.status if future is not None else None
        if status == "finished":
            place.ended = await future.result()
        elif status == "error":
            place.ended = _why_lost(await future.exception())
        if place.ended or not place.wanted:
            place.future = None
        elif future is None or status in _OVER or (fresh and not placed):
            # Dask does not reconsider a task that no worker could run when one gets a slot.
            self._submit(place)

    def _submit(self, place: _Place) -> None:
        self._give_up(place)
        place.run = uuid.uuid4().hex
        place.future = self._own.submit(
            serve,
            self._setup,
            place.number,
            place.run,
            key=f"kitty_nb-replica-{place.number}-{place.run}",
            pure=False,
            resources={SLOT: 1},
        )

    def _give_up(self, place: _Place) -> None:
        """Release a replica's task; leave its run, wherever Dask began it, to `_stop_stale`."""
        if place.future is not None:
            place.future.release()
            place.future = None
            place.stale.add(place.run)

    def _on_event(self, event: tuple[float, bytes]) -> None:
        """Record a replica's report."""
        report: Report = pickle.loads(event[1])  # noqa: S301 (Dask's results are pickles, too)
        place = self._places[report.number]
        if report.run != place.run:
            place.stale.add(report.run)
            return
        before = place.report
        place.report, place.at, place.lost = report, time.monotonic(), None
        if before is None or before.url != report.url:
            place.seen = None
        if report.status is ServerStatus.READY and place.seen is None:
            place.seen = True  # until the check below fails
            self._tasks.start_soon(self._reach, place, report.url)
        self._on_change()

    async def _reach(self, place: _Place, url: str) -> None:
        """Try to reach a replica from here until that succeeds, or it is elsewhere."""
        seen = False
        while not seen:
            try:
                async with httpx.AsyncClient(timeout=_REACHED_WITHIN, trust_env=False) as http:
                    seen = (await http.get(f"{url}/health")).is_success
            except httpx.HTTPError:
                seen = False
            if not (place.wanted and place.report and place.report.url == url):
                return
            place.seen = seen
            self._on_change()
            await anyio.sleep(_LOOK_EVERY)

    async def _stop(self, place: _Place) -> None:
        place.wanted = False
        self._give_up(place)
        await self._stop_stale(place)
        self._on_change()

    async def _stop_stale(self, place: _Place) -> None:
        """Stop former runs on whichever workers have them, and wait until they have ended."""
        async with anyio.create_task_group() as tasks:
            for run in place.stale:
                tasks.start_soon(self._order_stop, place, run)

    async def _order_stop(self, place: _Place, run: str) -> None:
        if self._own.status != "running":  # waiting for a scheduler that is gone takes long
            return
        with suppress(OSError, ValueError):
            with anyio.move_on_after(_STOP_WITHIN):
                await self._own.run(stop_job, run, on_error="ignore")
            place.stale.discard(run)


def _why_lost(error: BaseException | None) -> str:
    count = getattr(error, "allowed_failures", None)
    if count is not None:
        return (
            f"Workers died {count + 1} times with this replica. Check their logs; too little memory"
            " is the usual cause."
        )
    return f"Dask could not run it: {error!r}."
