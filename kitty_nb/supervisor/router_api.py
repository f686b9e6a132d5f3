"""Clients of the two routers: llama-server's own, and llama-swap."""

from __future__ import annotations

from enum import Enum, StrEnum, auto
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import anyio

from kitty_nb.supervisor.health import HealthProbe, objects_in

if TYPE_CHECKING:
    from anyio.abc import TaskGroup


class RouterKind(Enum):
    """The program that a router is."""

    LLAMA_SERVER = auto()
    LLAMA_SWAP = auto()


class ModelStatus(StrEnum):
    """The status of one model of a router."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"


class RouterApi(Protocol):
    """One router.

    Attributes:
        queues: Whether a load may have to wait until another model has ended.
    """

    queues: bool

    async def models(self) -> dict[str, ModelStatus]:
        """Return the status of each of its models; none if it is too busy to answer."""

    async def order(self, verb: str, model: str) -> str:
        """Make it `load` or `unload` a model; return its reason to refuse, or nothing."""

    async def touch(self, model: str) -> None:
        """Mark a loaded model as used, by the smallest request."""


async def kind_of(probe: HealthProbe) -> RouterKind | None:
    """Ask a server whether it serves many models, each by a child of its own."""
    props = await probe.get("/props")
    if isinstance(props, dict) and props.get("role") == "router":
        return RouterKind.LLAMA_SERVER
    running = await probe.get("/running")
    listed = isinstance(running, dict) and isinstance(running.get("running"), list)
    return RouterKind.LLAMA_SWAP if listed else None


class LlamaServer:
    """llama-server without a model; `tools/server/README.md` of llama.cpp."""

    queues = False

    def __init__(self, probe: HealthProbe) -> None:
        self._probe = probe

    async def models(self) -> dict[str, ModelStatus]:
        """Return the status of each of its models; none if it is too busy to answer."""
        listed = objects_in(await self._probe.get("/v1/models"), "data")
        return {str(one.get("id")): _model_status(one.get("status")) for one in listed}

    async def order(self, verb: str, model: str) -> str:
        """Make it `load` or `unload` a model; return its reason to refuse, or nothing."""
        return await self._probe.request("POST", f"/models/{verb}", {"model": model})

    async def touch(self, model: str) -> None:
        """Mark a loaded model as used, by the smallest request."""
        request = {"model": model, "content": ""}
        await self._probe.request("POST", "/tokenize?autoload=false", request)


class LlamaSwap:
    """llama-swap: https://github.com/mostlygeek/llama-swap.

    Args:
        probe: Asks it.
        tasks: Where the request that loads a model waits for that.
    """

    queues = True

    def __init__(self, probe: HealthProbe, tasks: TaskGroup) -> None:
        self._probe, self._tasks = probe, tasks
        self._names: tuple[str, ...] = ()  # while it runs, always the same
        self._ordered: dict[str, anyio.CancelScope] = {}

    async def models(self) -> dict[str, ModelStatus]:
        """Return the status of each of its models; none if it is too busy to answer."""
        running = await self._probe.get("/running")
        if not isinstance(running, dict):
            return {}
        states = {one.get("model"): one.get("state") for one in objects_in(running, "running")}
        if not self._names:
            listed = objects_in(await self._probe.get("/v1/models"), "data")
            self._names = tuple(str(one.get("id")) for one in listed)
        return {name: self._status(name, states.get(name)) for name in self._names}

    def _status(self, name: str, state: object) -> ModelStatus:
        if state == "ready":
            return ModelStatus.LOADED
        loading = state == "starting" or name in self._ordered
        return ModelStatus.LOADING if loading else ModelStatus.UNLOADED

    async def order(self, verb: str, model: str) -> str:
        """Make it `load` or `unload` a model; return its reason to refuse, or nothing."""
        if verb == "load":
            waiting = self._ordered[model] = anyio.CancelScope()
            self._tasks.start_soon(self._load, model, waiting)
            return ""
        if queued := self._ordered.pop(model, None):
            queued.cancel()  # it may still queue
        path = f"/api/models/{verb}/{quote(model, safe='')}"
        return await self._probe.request("POST", path, within=None)  # it answers when that is done

    async def _load(self, model: str, waiting: anyio.CancelScope) -> None:
        """Ask the model's server for something: it is started for that. The look tells how."""
        try:
            with waiting:
                path = f"/upstream/{quote(model, safe='')}/health"
                await self._probe.request("GET", path, within=None)
        finally:
            if self._ordered.get(model) is waiting:
                del self._ordered[model]

    async def touch(self, model: str) -> None:
        """Do nothing: it keeps the models of its persistent groups by itself."""


def _model_status(told: Any) -> ModelStatus:
    if not isinstance(told, dict):
        return ModelStatus.UNLOADED
    try:
        return ModelStatus(str(told.get("value")))
    except ValueError:  # one that sleeps is loaded again by a request
        return ModelStatus.LOADED
