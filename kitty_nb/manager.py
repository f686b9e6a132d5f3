"""`ModelManager`: the notebook's handle on a supervisor that runs in a thread of its own."""

from __future__ import annotations

import atexit
import os
import threading
from contextlib import ExitStack
from functools import partial, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, overload

from anyio.from_thread import start_blocking_portal

from kitty_nb.client import embeddings
from kitty_nb.client.conversation import Form, as_messages, chat_request, converse
from kitty_nb.client.protocol import Access, Connections
from kitty_nb.config import OnKernelExit, ServerConfig, Task, task_by_flags
from kitty_nb.errors import KittyError, OutOfReachError
from kitty_nb.operation import Chat, Operation, Pieces, Pinned
from kitty_nb.remote.supervisor import RemoteSupervisor
from kitty_nb.supervisor.events import (
    Event,
    LoadProgress,
    ProgressMade,
    RouterLoad,
    ServerState,
    ServerStatus,
)
from kitty_nb.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    import httpx
    from typing_extensions import TypeVar

    from kitty_nb.catalog.catalog import ModelCatalog
    from kitty_nb.client import Answer, Piece, PromptProgress
    from kitty_nb.client.conversation import Image, Messages
    from kitty_nb.client.embeddings import Ranked, Vectors
    from kitty_nb.remote.supervisor import RemoteCatalog
    from kitty_nb.supervisor.events import Request, Work

    P = ParamSpec("P")
    T = TypeVar("T", default=Any)


def _command(
    method: Callable[Concatenate[Supervisor, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[ModelManager, P], Operation[T]]:
    """Wrap a method of the supervisor as one of the manager, which returns at once."""

    @wraps(method)
    def command(self: ModelManager, /, *args: P.args, **options: P.kwargs) -> Operation[T]:
        named = getattr(self._supervisor, method.__name__)  # the remote one's, for a remote server
        return self.run(partial(named, *args, **options))

    # `help` shows this one, not the method's own.
    vars(command)["__signature__"] = signature(method).replace(return_annotation=Operation)
    return command


class ModelManager:
    """Starts, stops and watches one llama-server from a notebook or a script.

    Its event loop runs in a background thread until `close`, which also stops the server, as does
    leaving the `with` block. When the kernel ends, `LLAMACPP_ON_KERNEL_EXIT` decides; the profile's
    next manager finds a server that was kept running.

    `start`, `restart`, `switch_model`, `stop`, `attach`, `check_health`, `memory_use` and
    `preview_memory` are the methods of `Supervisor`, but return at once with an `Operation`; their
    callbacks are called on the manager's thread. Requests to the server raise `KittyError` while it
    is not ready.

    Args:
        env: The `.env` file with the settings.
        profile: The named set of settings to use.
        config: Ready-made settings, instead of `env` and `profile`.

    Attributes:
        env: The `.env` file that its settings come from; None for ready-made ones.
        stats: Usage of the models on disk, and whether they fit; `run` its coroutines.

    Raises:
        ConfigError: Settings are wrong; it lists all of them.
    """

    def __init__(
        self,
        env: str | Path = ".env",
        profile: str = "primary",
        *,
        config: ServerConfig | None = None,
    ) -> None:
        self.env: str | Path | None = env if config is None else None
        config = config or ServerConfig.from_env(env, profile)
        self._supervisor = RemoteSupervisor(config) if config.ssh else Supervisor(config)
        self.stats = self._supervisor.stats
        self._progress: LoadProgress | None = None
        self._connections = Connections()
        self._closing = threading.Lock()
        self._supervisor.subscribe(self._remember)
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal(name="kitty_nb"))
            # Whatever still runs when the supervisor has ended, such as a panel, is cancelled.
            stack.callback(lambda: self._portal.call(self._portal.stop, True))
            stack.enter_context(self._portal.wrap_async_context_manager(self._supervisor))
            stack.callback(lambda: self._portal.call(self._connections.aclose))
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
        """True if it was closed, or belongs to the parent process: it accepts no more commands."""
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
        """The address and key for this package's own requests."""
        if self.state.status is ServerStatus.OUT_OF_REACH:
            raise OutOfReachError(self.state.error)
        if self.state.status is not ServerStatus.READY:
            raise KittyError(
                f"The server is {self.state.status}. Start it, or wait until it is READY."
            )
        return self._access

    @property
    def http(self) -> httpx.Client:
        """An HTTP client for the server: `manager.http.post("/v1/chat/completions", json=…)`.

        It sends the server's key, and is closed with the manager.
        """
        return self._connections.http(self.access)

    @property
    def client(self) -> Any:
        """An `openai.OpenAI` for the server, or `http` if `openai` is not installed."""
        return self.access.openai(self.http)

    @property
    def async_client(self) -> Any:
        """An `openai.AsyncOpenAI` or `httpx.AsyncClient`: a new one each time, for you to close."""
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

    @property
    def work(self) -> Work:
        """The requests that the server is processing now."""
        return self._supervisor.work

    @property
    def requests(self) -> tuple[Request, ...]:
        """The newest finished requests, by any client, without their contents.

        Those of a server that was only attached to are unknown.
        """
        return self._supervisor.requests

    def catalog(self, config: ServerConfig) -> ModelCatalog | RemoteCatalog:
        """Return the models that settings may choose from, on the machine of the server."""
        return self._supervisor.catalog(config)

    def settled(self, config: ServerConfig) -> ServerConfig:
        """Return settings with the paths that they stand for on the server's machine."""
        return self._supervisor.settled(config)

    start = _command(Supervisor.start)
    restart = _command(Supervisor.restart)
    switch_model = _command(Supervisor.switch_model)
    stop = _command(Supervisor.stop)
    attach = _command(Supervisor.attach)
    check_health = _command(Supervisor.check_health)
    memory_use = _command(Supervisor.memory_use)
    preview_memory = _command(Supervisor.preview_memory)

    @overload
    def chat(
        self,
        messages: Messages,
        on_piece: Callable[[Piece], object] | None = None,
        on_progress: Callable[[PromptProgress], object] | None = None,
        *,
        response_format: None = None,
        **options: Any,
    ) -> Chat[Answer]: ...

    @overload
    def chat(
        self,
        messages: Messages,
        on_piece: Callable[[Piece], object] | None = None,
        on_progress: Callable[[PromptProgress], object] | None = None,
        *,
        response_format: type[T] | dict[str, Any],
        **options: Any,
    ) -> Chat[T]: ...

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
        """Ask the model; the result is its `Answer`, or the object that `response_format` asks for.

        Await it, wait for it, or iterate over its pieces as they arrive. If it is cancelled, or
        nobody wants the rest, the server stops answering.

        Args:
            messages: A prompt, or a whole conversation in the format of OpenAI's protocol.
            on_piece: Called on the manager's thread with each piece, as it arrives.
            on_progress: Called on the manager's thread while the prompt is read, if the build of
                llama-server reports progress.
            response_format: The type of the result: a pydantic model or another type that pydantic
                knows; or a JSON schema, for plain Python objects.
            images: Pictures for the last message: paths, bytes, Pillow images or data URLs.
            tools: Functions that the model may call, described by their signatures and docstrings;
                they run on threads of their own or, if they are asynchronous, on the manager's.
            max_rounds: How often the model may call tools before it has to answer.
            **options: Other fields of the request, such as `temperature` or `max_tokens`.

        Raises:
            NoAnswerError: The answer has no words, or does not match the schema.
            KittyError: The server accepts no pictures, or doesn't finish its answer.
        """
        access = self._access_for(Task.CHAT)
        form = None if response_format is None else Form(response_format)
        if access.model:  # any OpenAI-compatible server: no fields of llama-server's own
            options, on_progress = {"stream_options": {"include_usage": True}} | options, None
        request = chat_request(self.state, messages, images, form, options)
        pieces = Pieces(on_piece)

        async def work() -> Any:
            http = await self._connections.requests(access)
            answer = await converse(http, request, pieces.add, on_progress, tools, max_rounds)
            return form.read(answer) if form else answer

        return Chat(self._start(work), lambda: self._progress, pieces)

    def embed(
        self,
        texts: Sequence[str],
        batch_size: int = 32,
        on_progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> Operation[Vectors]:
        """Turn texts into vectors; the result is an array of shape (texts, dimensions), float32.

        Args:
            texts: The texts.
            batch_size: The number of texts per request.
            on_progress: Called on the manager's thread with the number of texts that are done,
                and of all.

        Raises:
            KittyError: The model does not embed, or a text is too long.
        """
        if isinstance(texts, str):
            raise KittyError("embed takes a list of texts: embed([text]).")
        return self._ask(Task.EMBED, embeddings.embed, [*texts], batch_size, on_progress)

    def rerank(
        self, query: str, documents: Sequence[str], top_n: int | None = None
    ) -> Operation[list[Ranked]]:
        """Rank documents by how well they answer a query, the best first.

        Args:
            query: The question.
            documents: The texts to rank.
            top_n: The number of documents to return; None for all.

        Raises:
            KittyError: The model does not rank, or a text is too long.
        """
        return self._ask(Task.RANK, embeddings.rerank, query, [*documents], top_n)

    def pinned(self, name: str, text: str) -> Pinned:
        """Have the server read a text once, to ask about it in this and all later kernels.

        Args:
            name: The name under which it is kept on disk, as `kitty-nb prompts list` shows it.
            text: The text. It replaces any other text that is kept under that name.

        Raises:
            KittyError: The server keeps no prompts, or refused the text; raised by waiting for it.
        """
        return Pinned(text, self.run(self._supervisor.pin, name, text), self.chat)

    def tokenize(self, text: str) -> Operation[list[int]]:
        """Return the tokens of a text, without the special ones that the model adds around it."""
        return self._ask(None, embeddings.tokenize, text)

    def count_tokens(self, messages: Messages) -> Operation[int]:
        """Count the tokens of a prompt or conversation, including the model's chat template."""
        return self._ask(None, embeddings.count_tokens, as_messages(messages))

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call back with each event on the manager's thread; calling the result unsubscribes."""
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
            self._connections.close()
        atexit.unregister(self._close_at_exit)

    def _ask(
        self, task: Task | None, function: Callable[..., Coroutine[Any, Any, T]], *args: object
    ) -> Operation[T]:
        access = self._access_for(task)
        fields = {"model": access.model} if access.model and task else {}

        async def work() -> T:
            return await function(await self._connections.requests(access), *args, **fields)

        return self.run(work)

    def _access_for(self, task: Task | None) -> Access:
        """Return the access to a server that was started for a task, if that matters."""
        access, state = self.access, self.state
        if task and not (state.external or state.router) and state.task is not task:
            fix = _BY_FLAG if task_by_flags(state.config.extra_args) else _STARTED_FOR[task]
            raise KittyError(f"{state.alias} was started to {state.task}, not to {task}. {fix}")
        return access

    @property
    def _access(self) -> Access:
        state = self.state
        model = state.alias if state.config.url else None
        return Access(state.endpoint, self._supervisor.api_key, model)

    def _close_at_exit(self) -> None:
        if self._forked:
            _left.append(self._resources)  # freeing them would wait for the thread
            return
        if self.state.config.on_kernel_exit is OnKernelExit.KEEP:
            self._supervisor.detach()
        self.close()

    @property
    def _forked(self) -> bool:
        """True in a forked child: the thread and the server are its parent's."""
        return os.getpid() != self._pid

    def _remember(self, event: Event) -> None:
        if isinstance(event, ProgressMade | RouterLoad):
            self._progress = event.progress


_BY_FLAG = "A flag in LLAMACPP_EXTRA_ARGS decides that: correct it, and restart the server."
_OR_THIS = "Start a model that was made for it, or this one with {} in LLAMACPP_EXTRA_ARGS."
_STARTED_FOR = {
    Task.CHAT: "Start a model that was made to chat.",
    Task.EMBED: _OR_THIS.format("--embedding --pooling mean"),
    Task.RANK: _OR_THIS.format("--rerank"),
}
_left: list[ExitStack] = []
