"""`Fleet`: replicas of one model on the workers of a Dask cluster, used as one server."""

from __future__ import annotations

import atexit
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx
from anyio.from_thread import start_blocking_portal
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
from kitty_nb.fleet.front import FRONTS, Front
from kitty_nb.isolated_server import Broadcast
from kitty_nb.operation import Chat, Operation, Pieces
from kitty_nb.supervisor.events import ServerStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from concurrent.futures import Future

    from distributed import Client

    from kitty_nb.client import Piece, PromptProgress
    from kitty_nb.client.conversation import Image, Messages
    from kitty_nb.fleet.placement import Replica

T = TypeVar("T")

_URL = "http://fleet"
_CLIENT: dict[str, Any] = {"base_url": _URL, "timeout": httpx.Timeout(600.0, connect=5.0)}


class Fleet:
    """Replicas of one model, each a supervised server on a worker of a Dask cluster.

    Dask places them, one on each worker, and restarts one elsewhere if its worker dies; requests go
    straight to the servers. `chat`, `client` and `http` ask the least busy one.

    Created by `Fleet.run`; a context manager, which stops them on exit.
    """

    def __init__(self, client: Client, config: ServerConfig, replicas: int) -> None:
        from kitty_nb.fleet.placement import Placement  # noqa: PLC0415 (of an extra)

        self._config, self._key = config, config.api_key
        self._placement = Placement(client, config, replicas, self._tell)
        self._broadcast: Broadcast[None] = Broadcast()
        self._fronts: list[Front] = []
        self._transport = LeastBusyTransport(self._targets, self._key)
        self._requests = httpx.AsyncClient(transport=self._transport, **_CLIENT)
        self._closed = False
        self._http: httpx.Client | None = None
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal(name="kitty_nb fleet"))
            # This ends whatever still runs, such as a balancer or a panel.
            stack.callback(lambda: self._portal.call(self._portal.stop, True))
            stack.callback(lambda: self._portal.call(self._requests.aclose))
            stack.callback(self._portal.start_task_soon(self._placement.run).cancel)
            self._resources = stack.pop_all()
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
            client: A `dask.distributed.Client`. It stays open; while the replicas run, each takes
                one of its worker's threads.
            model: The file, absolute or in the models folder; by default the one in `config`.
            replicas: The number of replicas; those without a worker wait for one.
            config: The servers' settings; by default those of `.env`. On other machines, the `.env`
                in the worker's folder locates models and engine.
            **settings: Settings to change, by their names in `ServerConfig`.

        Raises:
            ConfigError: A setting is invalid.
            ExperimentError: `client` is not a Dask client, or Dask is missing.
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
        if not isinstance(replicas, int) or replicas < 1:
            raise KittyError(f"replicas is {replicas!r}. Write a whole number, 1 or more.")
        # One key for all, so that a balancer need not know it.
        if base.api_key is None or goes_without_key(base):
            made = choose_api_key(base.replace(api_key=None))
            base = base.model_copy(update={"api_key": made})
        return cls(client, base, replicas)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fleet({self._ready} of {len(self.replicas)} replicas ready)"

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """The replicas as they are now."""
        return self._placement.replicas

    @property
    def problem(self) -> str | None:
        """Why replicas can't be placed, in a sentence; None if nothing prevents it."""
        return self._placement.problem

    @property
    def _ready(self) -> int:
        return sum(one.status is ServerStatus.READY for one in self.replicas)

    @property
    def alias(self) -> str:
        """The model name that clients use."""
        return self._config.served_alias

    @property
    def to_choose(self) -> tuple[str, ...]:
        """Empty: all replicas serve one model."""
        return ()

    @property
    def sees(self) -> bool:
        """True: a model that takes no pictures reports that itself."""
        return True

    def reveal_api_key(self) -> str | None:
        """Return the key that all replicas require. It is a secret: notebooks keep outputs."""
        return self._key.get_secret_value() if self._key else None

    def subscribe(self, callback: Callable[[None], object]) -> Callable[[], None]:
        """Call back on the fleet's thread at each change, until the result is called."""
        return self._broadcast.subscribe(callback)

    def begin(self, work: Callable[..., Coroutine[Any, Any, T]], *args: object) -> Future[T]:
        """Run a coroutine function on the fleet's thread, and return at once.

        Raises:
            KittyError: The fleet is closed.
        """
        if self._closed:
            raise KittyError("This fleet is closed. Create another one with Fleet.run.")
        return self._portal.start_task_soon(work, *args)

    def wait_ready(self, count: int | None = None, timeout: float | None = None) -> Self:
        """Wait until a number of replicas are ready, by default all of them.

        Args:
            count: The number of replicas.
            timeout: Seconds; None waits as long as it takes.

        Raises:
            WaitTimeoutError: They are not ready in time; their starts continue.
            ServerFailedError: Too many have failed; the message has their reasons.
        """
        wanted = len(self.replicas) if count is None else count

        async def wait() -> None:
            async with aclosing(self._broadcast.stream()) as changes:
                while self._ready < wanted:
                    states = self.replicas
                    failed = [one for one in states if one.status is ServerStatus.FAILED]
                    if len(states) - len(failed) < wanted or self._placement.ended:
                        reasons = {one.problem for one in failed} | {self.problem}
                        raise ServerFailedError(" ".join(filter(None, reasons)))
                    await anext(changes)

        waiting = Operation(self.begin(wait))
        try:
            waiting.wait(timeout)
        except WaitTimeoutError:
            waiting.cancel()
            why = f" {self.problem}" if self.problem else ""
            raise WaitTimeoutError(f"{self!r} after {timeout} s; still starting.{why}") from None
        return self

    def start(self, *numbers: int) -> Operation[None]:
        """Start replicas that have ended or were stopped."""
        return Operation(self.begin(self._placement.start, *numbers))

    def stop(self, *numbers: int) -> Operation[None]:
        """Stop some replicas; the others take their requests."""
        return Operation(self.begin(self._placement.stop, *numbers))

    def rescan(self) -> Operation[None]:
        """Ask all workers again whether they can take a replica."""
        return Operation(self.begin(self._placement.rescan))

    @property
    def http(self) -> httpx.Client:
        """An HTTP client that sends each request to the least busy replica."""
        if self._http is None:
            transport = BlockingTransport(self._transport, self._portal)
            self._http = httpx.Client(transport=transport, **_CLIENT)
        return self._http

    @property
    def client(self) -> Any:
        """An `openai.OpenAI` for the fleet, or `http` if `openai` is not installed."""
        return Access(_URL, SecretStr("of-the-fleet")).openai(self.http)

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
            NoAnswerError: The answer has no words, or does not match the schema.
            KittyError: No replica is ready, or the one that answered broke off.
        """
        form = None if response_format is None else Form(response_format)
        request = chat_request(self, messages, images, form, options)
        pieces = Pieces(on_piece)

        async def work() -> Any:
            http = self._requests
            answer = await converse(http, request, pieces.add, on_progress, tools, max_rounds)
            return form.read(answer) if form else answer

        return Chat(self.begin(work), lambda: None, pieces)

    def balance(self, program: str = "nginx", port: int | None = None) -> Front:
        """Put a balancer in front of the replicas, on this machine, until the fleet is closed.

        Args:
            program: `nginx` or `llama-swap`.
            port: Its port on loopback; by default a free one from 8100 on.

        Returns:
            The balancer: clients use its `url`, and the key that `reveal_api_key` returns.

        Raises:
            ServerFailedError: It is not installed, or can't listen there.
        """
        front = _kind(program)(self._key, self.alias, port)
        self.begin(self._run_front, front)
        return front

    def configuration(self, program: str = "nginx", port: int = 8100) -> str:
        """Return the configuration of a balancer for the ready replicas; it contains no key.

        Args:
            program: `nginx`, or `llama-swap`, which reads its key from `KITTY_FLEET_KEY`.
            port: The port on which nginx listens.

        Raises:
            ServerFailedError: No replica is ready.
        """
        kind, targets = _kind(program), self._targets()
        if not targets:
            raise ServerFailedError("No replica is ready. Wait for one: fleet.wait_ready(1).")
        return kind.text(targets, self.alias, port, Path("/var/lib/nginx"))

    def close(self) -> None:
        """Stop all replicas and balancers. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._http:
            self._http.close()
        self._resources.close()

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

    def _tell(self) -> None:
        targets = self._targets()
        for front in self._fronts:
            front.use(targets)
        self._broadcast.publish(None)


def _kind(program: str) -> type[Front]:
    if program not in FRONTS:
        raise KittyError(f"There is no balancer {program!r}. Choose one of {', '.join(FRONTS)}.")
    return FRONTS[program]
