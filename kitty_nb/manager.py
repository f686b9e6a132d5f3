"""`ModelManager`: the notebook's handle on a supervisor that lives in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import ExitStack
from functools import partial, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import nest_asyncio2
from anyio.from_thread import start_blocking_portal

from kitty_nb.client import Access
from kitty_nb.config import OnKernelExit, ServerConfig
from kitty_nb.errors import KittyError, WaitTimeoutError
from kitty_nb.supervisor.events import (
    Event,
    LoadProgress,
    ProgressMade,
    RouterLoad,
    ServerState,
    ServerStatus,
)
from kitty_nb.supervisor.forecast import ModelStats
from kitty_nb.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from pathlib import Path

    import httpx

    from kitty_nb.client import Piece

P = ParamSpec("P")
T = TypeVar("T")


class Operation(Generic[T]):
    """Work in progress on the supervisor's thread.

    `await` it in a cell, or `wait` for it. Neither ending the wait nor dropping this object ends
    the work; `cancel` does.
    """

    def __init__(self, future: Future[T], progress: Callable[[], LoadProgress | None]) -> None:
        self._future = future
        self._progress = progress

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()

    def __repr__(self) -> str:
        return f"Operation(done={self.done})"

    def wait(self, timeout: float | None = None) -> T:
        """Block until the result is there, and return it.

        In a cell, the kernel's own tasks continue meanwhile.

        Args:
            timeout: Seconds, or None to wait as long as it takes.

        Raises:
            WaitTimeoutError: It is not done in time; it continues.
            KittyError: The operation's own error.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            wait_for([self._future], timeout)
        else:
            nest_asyncio2.apply(loop)
            future = asyncio.wrap_future(self._future)
            # Its error is raised below; asyncio would report it again as never retrieved.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            loop.run_until_complete(asyncio.wait([future], timeout=timeout))
        if not self._future.done():
            raise WaitTimeoutError(f"Not done after {timeout} s; it continues in the background.")
        return self._future.result()

    def cancel(self) -> None:
        """Cancel it. A cancelled start stops its server."""
        self._future.cancel()

    @property
    def done(self) -> bool:
        """True if it has ended, whatever the result."""
        return self._future.done()

    @property
    def progress(self) -> LoadProgress | None:
        """The progress of the current load; None before the first."""
        return self._progress()


class _Answer(Operation[str]):
    """An answer on its way. The model stops when nobody awaits it any more: a cell interrupted."""

    def __await__(self) -> Generator[Any, None, str]:
        return asyncio.wrap_future(self._future).__await__()


def _command(
    method: Callable[Concatenate[Supervisor, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[ModelManager, P], Operation[T]]:
    """Make a method of the supervisor one of the manager, which returns at once."""

    @wraps(method)
    def command(self: ModelManager, /, *args: P.args, **options: P.kwargs) -> Operation[T]:
        return self.run(partial(method, self._supervisor, *args, **options))

    # `help` shows this one, not the method's own.
    vars(command)["__signature__"] = signature(method).replace(return_annotation=Operation)
    return command


class ModelManager:
    """Starts, stops and watches one llama-server from a notebook or a script.

    Its event loop runs in a background thread until `close`, which also stops the server, as does
    leaving the `with` block. When the kernel ends, `LLAMACPP_ON_KERNEL_EXIT` decides; a server
    that is kept is found by the next manager of the profile.

    `start`, `restart`, `switch_model`, `stop`, `attach`, `check_health`, `memory_use` and
    `preview_memory` are the methods of `Supervisor`, but return at once with an `Operation`; their
    callbacks are called on the manager's thread.

    Args:
        env: The `.env` file with the settings.
        profile: The named set of settings to use.
        config: Ready-made settings, instead of `env` and `profile`.

    Attributes:
        env: The `.env` file that its settings come from; None for ready-made ones.
        stats: Usage of the models on disk, and whether they fit; `run` its coroutines.

    Raises:
        ConfigError: Listing every wrong setting.
    """

    def __init__(
        self,
        env: str | Path = ".env",
        profile: str = "primary",
        *,
        config: ServerConfig | None = None,
    ) -> None:
        self._supervisor = Supervisor(config or ServerConfig.from_env(env, profile))
        self.env: str | Path | None = env if config is None else None
        self.stats = ModelStats(lambda: self.state.pid)
        self._progress: LoadProgress | None = None
        self._http: tuple[tuple[Access, int], httpx.Client] | None = None
        self._closing = threading.Lock()
        self._supervisor.subscribe(self._remember)
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal(name="kitty_nb"))
            # Whatever still runs when the supervisor has ended, such as a panel, ends too.
            stack.callback(lambda: self._portal.call(self._portal.stop, True))
            stack.enter_context(self._portal.wrap_async_context_manager(self._supervisor))
            self._resources = stack.pop_all()
        self._closed, self._pid = False, os.getpid()
        atexit.register(self._close_at_exit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ModelManager(profile={self.state.config.profile!r})"

    @property
    def state(self) -> ServerState:
        """A snapshot of the server as it is now."""
        return self._supervisor.state

    @property
    def closed(self) -> bool:
        """True if it was closed, or belongs to the parent process: it takes no more commands."""
        return self._closed or self._forked

    @property
    def progress(self) -> LoadProgress | None:
        """The progress of the current or latest load; None before the first."""
        return self._progress

    @property
    def base_url(self) -> str:
        """The base URL for OpenAI clients."""
        return self._access.base_url

    @property
    def access(self) -> Access:
        """The address and key for this package's own requests.

        Raises:
            KittyError: The server is not ready.
        """
        if self.state.status is not ServerStatus.READY:
            raise KittyError(
                f"The server is {self.state.status}. Start it, and wait until it is READY."
            )
        return self._access

    @property
    def http(self) -> httpx.Client:
        """An HTTP client of the server: `manager.http.post("/v1/chat/completions", json=…)`.

        It sends the server's key, and is closed with the manager.

        Raises:
            KittyError: The server is not ready.
        """
        access = self.access
        key = access, os.getpid()  # a forked child must not use its parent's connections
        if self._http is None or self._http[0] != key:
            self._close_http()
            self._http = key, access.http()
        return self._http[1]

    @property
    def client(self) -> Any:
        """An `openai.OpenAI` for the server, or `http` if `openai` is not installed.

        Raises:
            KittyError: The server is not ready.
        """
        return self.access.openai(self.http)

    @property
    def async_client(self) -> Any:
        """An `openai.AsyncOpenAI` or `httpx.AsyncClient`: a new one each time, for you to close.

        Raises:
            KittyError: The server is not ready.
        """
        access = self.access
        return access.openai(access.async_http())

    def reveal_api_key(self) -> str | None:
        """Return the server's API key, to set it in another program; None if it has none.

        It is a secret: what a cell displays is saved in the notebook.
        """
        key = self._access.api_key
        return key.get_secret_value() if key else None

    @property
    def log_lines(self) -> tuple[str, ...]:
        """The newest lines of the server's log."""
        return self._supervisor.log_lines

    start = _command(Supervisor.start)
    restart = _command(Supervisor.restart)
    switch_model = _command(Supervisor.switch_model)
    stop = _command(Supervisor.stop)
    attach = _command(Supervisor.attach)
    check_health = _command(Supervisor.check_health)
    memory_use = _command(Supervisor.memory_use)
    preview_memory = _command(Supervisor.preview_memory)

    def chat(
        self,
        messages: str | list[dict[str, Any]],
        on_piece: Callable[[Piece], object] | None = None,
        **options: Any,
    ) -> Operation[str]:
        """Ask the model; the result is its answer.

        If it is cancelled, or an `await` of it is interrupted, the server stops answering.

        Args:
            messages: A prompt, or a whole conversation in the form of OpenAI's protocol.
            on_piece: Called on the manager's thread with each piece, as it arrives.
            **options: Other fields of the request, such as `temperature` or `max_tokens`.

        Raises:
            KittyError: The server is not ready, or doesn't finish its answer.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        access, state = self.access, self.state
        router = state.external if state.external and not state.external.alias else None
        if router and router.models and "model" not in options:
            raise KittyError(
                "The router has not loaded a model yet. Name one with chat(…, model=…) or"
                f" switch_model(…): {', '.join(router.models)}."
            )
        request = {"model": state.alias, "messages": messages, **options}
        asked = self._start(access.chat, request, on_piece or (lambda _: None))
        return _Answer(asked, lambda: self._progress)

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call back with each event, on the manager's thread, until the result is called."""
        return self._supervisor.subscribe(callback)

    def run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: object) -> Operation[T]:
        """Run a coroutine function on the manager's event loop.

        Raises:
            KittyError: The manager is closed.
        """
        return Operation(self._start(function, *args), lambda: self._progress)

    def _start(self, function: Callable[..., Coroutine[Any, Any, T]], *args: object) -> Future[T]:
        if self._forked:
            raise KittyError(
                "This manager belongs to the parent process. Create one in this process:"
                " ModelManager()."
            )
        if self._closed:
            raise KittyError("This manager is closed. Run the cell that created it again.")
        return self._portal.start_task_soon(function, *args)

    def close(self) -> None:
        """Stop the server and end the thread. Closing twice does no harm."""
        if self._forked:
            return
        with self._closing:
            self._closed = True
            self._resources.close()
            self._close_http()
        atexit.unregister(self._close_at_exit)

    @property
    def _access(self) -> Access:
        return Access(self.state.endpoint, self._supervisor.api_key)

    def _close_http(self) -> None:
        if self._http:
            self._http[1].close()
            self._http = None

    def _close_at_exit(self) -> None:
        if self._forked:
            _left.append(self._resources)  # what is freed would wait for the thread
            return
        if self.state.config.on_kernel_exit is OnKernelExit.KEEP:
            self._supervisor.detach()
        self.close()

    @property
    def _forked(self) -> bool:
        """True in a child that was forked: the thread and the server are its parent's."""
        return os.getpid() != self._pid

    def _remember(self, event: Event) -> None:
        if isinstance(event, ProgressMade | RouterLoad):
            self._progress = event.progress


_left: list[ExitStack] = []
