"""The models of another machine, and what is known of them there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import anyio
from anyio.to_thread import run_sync

from kitty_nb.catalog.catalog import ScanStep
from kitty_nb.errors import KittyError, OutOfReachError
from kitty_nb.remote.protocol import Verb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
    from pathlib import Path

    from kitty_nb.catalog.memory import Verdict
    from kitty_nb.catalog.model import Model, ModelNote
    from kitty_nb.catalog.stores import Store
    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.events import MemoryUse


class FarEnd(Protocol):
    """The supervisor of the other machine, as far as its models are concerned."""

    stores: tuple[Store, ...]

    @property
    def reached(self) -> bool:
        """True while there is a connection."""

    async def connected(self) -> None:
        """Wait until the machine is reached."""

    async def call(
        self,
        verb: Verb,
        on_step: Callable[[Any], object] | None = None,
        *,
        within: float | None = ...,
        **takes: Any,
    ) -> Any:
        """Have the far end do something, and return its answer."""

    def host(self, work: Callable[[], Awaitable[object]]) -> anyio.CancelScope:
        """Run something beside the connection, until it is cancelled or the context ends."""

    async def memory_use(self) -> MemoryUse | None:
        """Measure what the server holds; None without one, or while it is out of reach."""


class RemoteCatalog:
    """The list of another machine's models, with what a `ModelPicker` takes of a `ModelCatalog`.

    Args:
        supervisor: The connection to that machine.
        config: The settings that say where models are.
    """

    def __init__(self, supervisor: FarEnd, config: ServerConfig) -> None:
        self._supervisor, self._config = supervisor, config

    @property
    def stores(self) -> tuple[Store, ...]:
        """The folders there."""
        return self._supervisor.stores

    def describe(self, _path: Path) -> Model | None:
        """Return None: a model that comes there is listed soon, by its own machine."""
        return None

    async def watch(self, *, on_step: Callable[[ScanStep], object]) -> AsyncGenerator[list[Model]]:
        """Yield the list, and again whenever it has changed or the machine is reached again.

        Args:
            on_step: Called, in a worker thread, with each step of each scan.
        """
        send, receive = anyio.create_memory_object_stream[ScanStep](math.inf)
        refusal: KittyError | None = None

        async def ask() -> None:
            nonlocal refusal
            while refusal is None:
                await self._supervisor.connected()
                try:
                    await self._supervisor.call(
                        Verb.SCAN, send.send_nowait, within=None, config=self._config
                    )
                except OutOfReachError:
                    continue
                except KittyError as error:
                    refusal = error
            send.close()

        scope = self._supervisor.host(ask)
        try:
            with send, receive:
                async for step in receive:
                    await run_sync(on_step, step)
                    if step.done == step.total:
                        yield list(step.models)
            if refusal:
                raise refusal
        finally:
            scope.cancel()


class RemoteStats:
    """Usage and memory of another machine's models; nothing is known while it is out of reach.

    Args:
        supervisor: The connection to that machine.
    """

    def __init__(self, supervisor: FarEnd) -> None:
        self._supervisor = supervisor

    def history(self, config: ServerConfig, _warn: object) -> RemoteHistory:
        """Return the history of loads and favourites there."""
        return RemoteHistory(self._supervisor, config)

    async def memory_use(self) -> MemoryUse | None:
        """Measure what the server holds now; None without one."""
        return await self._supervisor.memory_use()

    async def fits(self, models: Sequence[Path], config: ServerConfig) -> dict[Path, Verdict]:
        """Judge which models would fit into the memory that is free there now."""
        takes = {"models": tuple(models), "config": config}
        found: dict[Path, Verdict] = await _asked(self._supervisor, Verb.FITS, {}, **takes)
        return found


class RemoteHistory:
    """See `LoadHistory`.

    Args:
        supervisor: The connection to that machine.
        config: The settings that name the history.
    """

    def __init__(self, supervisor: FarEnd, config: ServerConfig) -> None:
        self._supervisor, self._config = supervisor, config

    async def notes(self, models: Iterable[Path]) -> dict[Path, ModelNote]:
        """Return the usage of those models that were loaded there or are favourites."""
        takes = {"models": tuple(models), "config": self._config}
        found: dict[Path, ModelNote] = await _asked(self._supervisor, Verb.NOTES, {}, **takes)
        return found

    async def set_favorite(self, model: Path, favorite: bool) -> None:
        """Remember there whether a model is a favourite."""
        takes = {"models": (model,), "favorite": favorite, "config": self._config}
        await _asked(self._supervisor, Verb.FAVORITE, None, **takes)


async def _asked(supervisor: FarEnd, verb: Verb, otherwise: Any, **takes: Any) -> Any:
    """Ask, but not by a new attempt to connect: it is for drawing, and will be asked again."""
    if not supervisor.reached:
        return otherwise
    try:
        return await supervisor.call(verb, **takes)
    except OutOfReachError:
        return otherwise
