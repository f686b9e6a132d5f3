"""`Fleet`: replicas of one model on the workers of a Dask cluster, used as one server."""

from __future__ import annotations

import atexit
import pickle
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio
import httpx
from anyio.from_thread import start_blocking_portal
from anyio.to_thread import run_sync
from pydantic import SecretStr

from kitty_nb.client import Access
from kitty_nb.client.conversation import Form, chat_request, converse
from kitty_nb.config import ServerConfig, choose_api_key, goes_without_key
from kitty_nb.errors import (
    ExperimentError,
    KittyError,
    ServerFailedError,
    WaitTimeoutError,
    first_of,
)
from kitty_nb.experiments.extras import extra
from kitty_nb.fleet.balancing import BlockingTransport, LeastBusyTransport, Target
from kitty_nb.isolated_server import Broadcast, this_host
from kitty_nb.operation import Chat, Operation, Pieces
from kitty_nb.supervisor.events import ServerStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence
    from concurrent.futures import Future

    from anyio.abc import TaskGroup
    from distributed import Client

    from kitty_nb.client import Piece, PromptProgress
    from kitty_nb.client.conversation import Messages
    from kitty_nb.client.images import Image
    from kitty_nb.experiments.trial import ModelFingerprint
    from kitty_nb.fleet.front import Front
    from kitty_nb.fleet.replica import Report, Setup

T = TypeVar("T")

_LOOK_EVERY = 2.0  # seconds
_AGAIN = "Its replicas end with it. Make a fleet with a client of a running cluster."
_STOP_WITHIN = 30.0  # seconds; a worker that does not answer has ended, and so has its server
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
_REACHED_WITHIN = 5.0  # seconds
_OVER = {"finished", "cancelled", "lost"}  # as Dask calls the states of a task's future


@dataclass(frozen=True, slots=True)
class Replica:
    """One server of a fleet, as it is known here.

    Attributes:
        number: Its number, from 0.
        status: Its state; OUT_OF_REACH where its worker is gone, or its address can't be reached.
        report: Its latest facts; None before the first.
        problem: What is wrong, in a sentence.
        at: When the report came, in seconds of the monotonic clock.
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
        """Seconds since it became ready; None when it is not."""
        told = self.report.ready_for if self.report else None
        ready = self.status is ServerStatus.READY
        return None if told is None or not ready else told + time.monotonic() - self.at


@dataclass(slots=True)
class _Place:
    """A replica's task, and what is known of it."""

    number: int
    wanted: bool = True
    run: str = ""
    future: Any = None
    report: Report | None = None
    at: float = 0.0
    ended: str | None = None
    lost: str | None = None
    seen: bool | None = None  # whether it can be reached from here
    stale: set[tuple[str, str]] = field(default_factory=set)

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


class Fleet:
    """Replicas of one model, each a supervised server on a worker of a Dask cluster.

    Dask places them, one on each worker, and starts one elsewhere when its worker dies; requests go
    straight to the servers. `chat`, `client` and `http` ask the least busy one.

    Made by `Fleet.run`; a context manager, which stops them at its end.

    Attributes:
        problem: What keeps replicas from being placed, in a sentence; None where nothing does.
    """

    def __init__(self, client: Client, config: ServerConfig, replicas: int) -> None:
        self._client, self._config = client, config
        self._key = config.api_key
        self._places = [_Place(number) for number in range(replicas)]
        self._workers: dict[str, ModelFingerprint | str | Exception] = {}
        self._fingerprint: ModelFingerprint | None = None
        self.problem: str | None = None
        self._broadcast: Broadcast[None] = Broadcast()
        self._fronts: list[Front] = []
        self._own: Any = None
        self._tasks: TaskGroup
        self._wake = anyio.Event()
        self._transport = LeastBusyTransport(self._targets, self._key)
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal(name="kitty_nb fleet"))
            # Whatever still runs, such as a balancer or a panel, ends too.
            stack.callback(lambda: self._portal.call(self._portal.stop, True))
            stack.callback(lambda: self._portal.call(self._transport.aclose))
            self._control_task = self._portal.start_task_soon(self._control)
            stack.callback(self._end_control)
            self._resources = stack.pop_all()
        self._closed = False
        self._http: httpx.Client | None = None
        atexit.register(self.close)

    @classmethod
    def run(
        cls,
        client: Client,
        model: object = None,
        replicas: int = 1,
        *,
        config: ServerConfig | None = None,
        **settings: Any,
    ) -> Self:
        """Start replicas, and return at once.

        Args:
            client: A `dask.distributed.Client`. It stays open; as long as the replicas run, each
                takes one of its worker's threads.
            model: The file, absolute or in the models folder; by default the one in `config`.
            replicas: How many; those without a worker wait for one.
            config: The servers' settings; by default those of `.env`. On other machines, the `.env`
                in the worker's folder says where models and engine are.
            **settings: Settings to change, by their names in `ServerConfig`.

        Raises:
            ConfigError: A setting is wrong.
            ExperimentError: `client` is none, or Dask is missing.
        """
        if not isinstance(client, extra("distributed", "dask").Client):
            raise ExperimentError(
                f"client is {client!r}, not a dask.distributed.Client. Create one from a cluster or"
                " a scheduler's address: Client('tcp://…:8786')."
            )
        base = config or ServerConfig.from_env()
        if base.ssh:
            raise KittyError(
                f"The profile {base.profile!r} runs on {base.ssh}. Start a Dask worker there, and"
                " use a profile without LLAMACPP_SSH."
            )
        if model is not None:
            settings |= {"model": model, "allow_absolute_paths": True}
        base = base.replace(url=None, **settings)
        base.require_model()
        if replicas < 1:
            raise KittyError(f"replicas is {replicas}. Write 1 or more.")
        # One key for all: whatever balances them need not know it.
        if base.api_key is None or goes_without_key(base):
            made = choose_api_key(base.replace(api_key=None))
            base = base.model_copy(update={"api_key": made})
        return cls(client, base, replicas)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        ready = sum(one.status is ServerStatus.READY for one in self.replicas)
        return f"Fleet({ready} of {len(self._places)} replicas ready)"

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """The replicas as they are now."""
        return tuple(place.state for place in self._places)

    @property
    def alias(self) -> str:
        """The name by which clients ask for the model."""
        return self._config.served_alias

    @property
    def to_choose(self) -> tuple[str, ...]:
        """No models: replicas serve one."""
        return ()

    @property
    def sees(self) -> bool:
        """True: a model that takes no pictures says so itself."""
        return True

    def reveal_api_key(self) -> str | None:
        """Return the key that all replicas ask for. It is a secret: a notebook keeps outputs."""
        return self._key.get_secret_value() if self._key else None

    def subscribe(self, callback: Callable[[None], object]) -> Callable[[], None]:
        """Call back on the fleet's thread at each change, until the result is called."""
        return self._broadcast.subscribe(callback)

    def begin(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run a coroutine function on the fleet's thread, and return at once."""
        return self._portal.start_task_soon(work)

    def wait_ready(self, count: int | None = None, timeout: float | None = None) -> Self:
        """Wait until so many replicas are ready, all by default.

        Args:
            count: How many.
            timeout: Seconds; None waits as long as it takes.

        Raises:
            WaitTimeoutError: They are not ready in time; they go on.
            ServerFailedError: Too many have failed, with their reasons.
        """
        wanted = len(self._places) if count is None else count

        async def wait() -> None:
            with anyio.fail_after(timeout):
                while True:
                    states = self.replicas
                    if sum(one.status is ServerStatus.READY for one in states) >= wanted:
                        return
                    failed = [one for one in states if one.status is ServerStatus.FAILED]
                    if len(states) - len(failed) < wanted or self._control_task.done():
                        reasons = {one.problem for one in failed} | {self.problem}
                        raise ServerFailedError(" ".join(filter(None, reasons)))
                    changed = anyio.Event()
                    unsubscribe = self.subscribe(partial(_set, changed))
                    try:
                        with anyio.move_on_after(_LOOK_EVERY):
                            await changed.wait()
                    finally:
                        unsubscribe()

        try:
            Operation(self._portal.start_task_soon(wait), lambda: None).wait()
        except TimeoutError:
            why = f" {self.problem}" if self.problem else ""
            raise WaitTimeoutError(f"{self!r} after {timeout} s; they go on.{why}") from None
        return self

    def start(self, number: int) -> None:
        """Start a replica that has ended or was stopped."""

        async def begin() -> None:
            place = self._places[number]
            place.wanted, place.ended = True, None
            self._wake.set()

        self._portal.call(begin)

    def stop(self, number: int) -> None:
        """Stop one replica; the others take its requests."""
        self._portal.call(self._stop, self._places[number])

    def rescan(self) -> None:
        """Ask all workers again whether they can take a replica."""

        async def forget() -> None:
            told = self._workers.items()
            self._workers = {w: one for w, one in told if not isinstance(one, str | Exception)}
            self._wake.set()

        self._portal.call(forget)

    @property
    def http(self) -> httpx.Client:
        """An HTTP client, each request of which the least busy replica answers."""
        if self._http is None:
            self._http = httpx.Client(
                base_url="http://fleet",
                timeout=_TIMEOUT,
                transport=BlockingTransport(self._transport, self._portal),
            )
        return self._http

    @property
    def client(self) -> Any:
        """An `openai.OpenAI` for the fleet, or `http` if `openai` is not installed."""
        return Access("http://fleet", SecretStr("of-the-fleet")).openai(self.http)

    def chat(
        self,
        messages: Messages,
        on_piece: Callable[[Piece], object] | None = None,
        on_progress: Callable[[PromptProgress], object] | None = None,
        *,
        response_format: Any = None,
        images: Sequence[Image] = (),
        tools: Sequence[Callable[..., Any]] = (),
        max_rounds: int = 10,
        **options: Any,
    ) -> Chat[Any]:
        """Ask the least busy replica, as `ModelManager.chat` asks its server.

        If it dies before the first word, another one answers.

        Raises:
            NoAnswerError: The model did not answer in words, or in the form asked for.
            KittyError: No replica is ready, or the one that answered broke off.
        """
        form = None if response_format is None else Form(response_format)
        request = chat_request(self, messages, images, form, options)
        pieces = Pieces(on_piece)

        async def work() -> Any:
            async with self._async_http() as http:
                answer = await converse(http, request, pieces.add, on_progress, tools, max_rounds)
            return form.read(answer) if form else answer

        return Chat(self._portal.start_task_soon(work), lambda: None, pieces)

    def balance(self, program: str = "nginx", port: int | None = None) -> Front:
        """Put a balancer in front of the replicas, on this machine, until the fleet is closed.

        Args:
            program: `nginx` or `llama-swap`.
            port: Where it listens, on loopback; by default a free port from 8100 on.

        Returns:
            The balancer: clients ask at its `url`, with the key that `reveal_api_key` returns.

        Raises:
            ServerFailedError: It is not installed.
        """
        front = _kind(program)(self._key, self.alias, port)
        self._portal.start_task_soon(self._run_front, front)
        return front

    def configuration(self, program: str = "nginx", port: int = 8100) -> str:
        """Return the configuration of a balancer for the replicas that are ready; no key is in it.

        Args:
            program: `nginx` or `llama-swap`, whose key is the variable `KITTY_FLEET_KEY`.
            port: Where nginx listens.

        Raises:
            ServerFailedError: No replica is ready.
        """
        from kitty_nb.fleet.front import llama_swap_text, nginx_text  # noqa: PLC0415 (of an extra)

        _kind(program)
        targets = self._targets()
        if not targets:
            raise ServerFailedError("No replica is ready. Wait for one: fleet.wait_ready(1).")
        if program == "nginx":
            return nginx_text(targets, port, Path("/var/lib/nginx"))
        return llama_swap_text(targets, self.alias)

    def close(self) -> None:
        """Stop all replicas and balancers. Closing twice does no harm."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._resources.close()

    def _async_http(self) -> httpx.AsyncClient:
        keep = _Kept(self._transport)
        return httpx.AsyncClient(base_url="http://fleet", timeout=_TIMEOUT, transport=keep)

    def _targets(self) -> list[Target]:
        return [
            Target(one.report.url, one.report.slots)
            for one in self.replicas
            if one.status is ServerStatus.READY and one.report
        ]

    async def _run_front(self, front: Front) -> None:
        self._fronts.append(front)
        front.use(self._targets())
        try:
            await front.run()
        except Exception as error:  # noqa: BLE001 (nobody waits for it)
            front.problem = f"{front.program} can't be run: {first_of(error)}"
            self._tell()

    def _end_control(self) -> None:
        if self._http:
            self._http.close()
        self._control_task.cancel()

    def _tell(self) -> None:
        targets = self._targets()
        for front in self._fronts:
            front.use(targets)
        self._broadcast.publish(None)

    async def _control(self) -> None:
        """Keep the replicas placed, until it is cancelled; then stop them."""
        from kitty_nb.experiments.cluster import connected  # noqa: PLC0415 (of an extra)
        from kitty_nb.fleet.replica import Setup  # noqa: PLC0415 (of an extra)

        setup = Setup(f"kitty_nb-{uuid.uuid4().hex}", self._config, this_host())
        try:
            async with (
                connected(self._client, _AGAIN) as own,
                anyio.create_task_group() as self._tasks,
            ):
                self._own = own
                own.subscribe_topic(setup.topic, self._on_event)
                try:
                    while True:
                        self._wake = anyio.Event()
                        await self._look(setup)
                        with anyio.move_on_after(_LOOK_EVERY):
                            await self._wake.wait()
                finally:
                    with anyio.CancelScope(shield=True), anyio.move_on_after(_STOP_WITHIN):
                        async with anyio.create_task_group() as tasks:
                            for place in self._places:
                                tasks.start_soon(self._stop, place)
        except* (KittyError, OSError) as error:
            self.problem = str(first_of(error))
            self._tell()

    async def _look(self, setup: Setup) -> None:
        """Admit new workers, and see to each replica that has no worker or has ended."""
        from kitty_nb.experiments.cluster import workers_of  # noqa: PLC0415 (of an extra)

        workers = await workers_of(self._own)
        self._workers = {w: one for w, one in self._workers.items() if w in workers}
        fresh = await self._admit(setup, sorted(workers.keys() - self._workers.keys()))
        for place in self._places:
            await self._see_to(setup, place, set(workers), fresh=fresh)
        self._tell()

    async def _admit(self, setup: Setup, new: list[str]) -> bool:
        """Give a slot to each new worker that can serve the model; return whether one can."""
        from kitty_nb.experiments.cluster import listed, why_not  # noqa: PLC0415 (of an extra)
        from kitty_nb.experiments.measure import fingerprints_here  # noqa: PLC0415 (of an extra)
        from kitty_nb.fleet.replica import grant, look  # noqa: PLC0415 (of an extra)

        if not new:
            return False
        if self._fingerprint is None:
            model = str(self._config.model)
            here = await run_sync(fingerprints_here, [model], self._config)
            self._fingerprint = here.get(model)
        answers = await self._own.run(look, setup, workers=new, on_error="return")
        # One that did not answer at all is on its way out, or is asked again.
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
        granted = await self._own.run(grant, workers=fit, on_error="ignore") if fit else {}
        for worker in set(fit) - granted.keys():  # it is asked again
            del self._workers[worker]
        return bool(granted)

    async def _see_to(self, setup: Setup, place: _Place, workers: set[str], *, fresh: bool) -> None:
        report = place.report
        lost = report is not None and report.worker not in workers
        placed = report is not None and report.run == place.run and not lost
        if lost and report:
            place.lost = f"Its worker {report.worker} is gone. Dask starts it on another one."
        elif not placed and place.wanted:
            place.lost = "It waits for a worker that can serve the model and has no replica yet."
        for worker, run in [*place.stale]:
            place.stale.discard((worker, run))
            await self._order_stop(run, worker)
        future = place.future
        status = future.status if future is not None else None
        if status == "finished":
            place.ended = await future.result()
        elif status == "error":
            place.ended = _why_lost(await future.exception())
        if place.ended or not place.wanted:
            place.future = None
        elif future is None or status in _OVER or (fresh and not placed):
            # A task that no worker could run is not looked at again when one gets a slot.
            self._submit(setup, place)

    def _submit(self, setup: Setup, place: _Place) -> None:
        from kitty_nb.fleet.replica import SLOT, serve  # noqa: PLC0415 (of an extra)

        if place.future is not None:
            place.future.release()
        place.run = uuid.uuid4().hex
        place.future = self._own.submit(
            serve,
            setup,
            place.number,
            place.run,
            key=f"kitty_nb-replica-{place.number}-{place.run}",
            pure=False,
            resources={SLOT: 1},
        )

    def _on_event(self, event: tuple[float, bytes]) -> None:
        """Take a replica's report."""
        report: Report = pickle.loads(event[1])  # noqa: S301 (Dask's results are pickles, too)
        place = self._places[report.number]
        if report.run != place.run:
            place.stale.add((report.worker, report.run))
            return
        before = place.report
        place.report, place.at, place.lost = report, time.monotonic(), None
        if before is None or before.url != report.url:
            place.seen = None
        if report.status is ServerStatus.READY and place.seen is None:
            place.seen = True  # until it is known better
            self._tasks.start_soon(self._reach, place, report.url)
        self._tell()

    async def _reach(self, place: _Place, url: str) -> None:
        """Find out whether a replica that is ready can be reached from here."""
        try:
            async with httpx.AsyncClient(timeout=_REACHED_WITHIN, trust_env=False) as http:
                seen = (await http.get(f"{url}/health")).is_success
        except httpx.HTTPError:
            seen = False
        if place.report and place.report.url == url:
            place.seen = seen
            self._tell()

    async def _stop(self, place: _Place) -> None:
        place.wanted = False
        future, place.future = place.future, None
        if future is not None:
            worker = place.report.worker if place.report else None
            with anyio.move_on_after(_STOP_WITHIN):
                await self._order_stop(place.run, worker)
            future.release()
        self._tell()

    async def _order_stop(self, run: str, worker: str | None) -> None:
        from kitty_nb.fleet.replica import stop  # noqa: PLC0415 (of an extra)

        workers: Iterable[str] | None = [worker] if worker else None
        with suppress(OSError, ValueError):
            await self._own.run(stop, run, workers=workers, on_error="ignore")


class _Kept(httpx.AsyncBaseTransport):
    """A transport that outlives the clients which use it."""

    def __init__(self, transport: LeastBusyTransport) -> None:
        self.handle_async_request = transport.handle_async_request  # type: ignore[method-assign]


def _set(event: anyio.Event, _: None) -> None:
    event.set()


def _kind(program: str) -> type[Front]:
    from kitty_nb.fleet.front import FRONTS  # noqa: PLC0415 (of an extra)

    if program not in FRONTS:
        raise KittyError(f"There is no balancer {program!r}. Choose one of {', '.join(FRONTS)}.")
    return FRONTS[program]


def _why_lost(error: BaseException | None) -> str:
    count = getattr(error, "allowed_failures", None)
    if count is not None:
        return (
            f"Workers died {count + 1} times with this replica. Check their logs; too little memory"
            " is the usual cause."
        )
    return f"Dask could not run it: {error!r}."
