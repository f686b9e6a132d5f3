"""The two programs that can be a router, llama-server and llama-swap: commands and requests."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
from anyio.to_thread import run_sync

from kitty_nb.catalog.memory import Memory, estimate, plan, read_shape
from kitty_nb.catalog.resolve import routed_profiles
from kitty_nb.config import ServerConfig, goes_without_key
from kitty_nb.engine.command_line import REUSE_PORT, build_router_command, has_router
from kitty_nb.engine.locate import PASSES_KEY, SWAP_HOME, why_swap_unfit
from kitty_nb.errors import KittyError, ServerFailedError
from kitty_nb.formats import Format
from kitty_nb.network import LOOPBACK, free_port
from kitty_nb.supervisor.forecast import Forecaster, Running, free_memory, settings_of
from kitty_nb.supervisor.health import HealthProbe, objects_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anyio.abc import TaskGroup

    from kitty_nb.engine.locate import Engine

_GB = 1e9


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """The plan for the start of a router.

    Attributes:
        profiles: The names of the profiles that it serves.
        command: The command line.
        path: The file that it names: presets, or the settings of llama-swap.
        text: The content of that file.
        notes: Warnings, in sentences.
        by_llama_swap: Whether llama-swap is the router.
        ports: The ports of its servers that must be reserved for this user.
    """

    profiles: tuple[str, ...]
    command: tuple[str, ...]
    path: Path
    text: str
    notes: tuple[str, ...]
    by_llama_swap: bool
    ports: range


def pinned_profiles(config: ServerConfig) -> tuple[str, ...]:
    """Return the profiles that a router keeps loaded. It reads the disk."""
    try:
        return tuple(one.profile for one in routed_profiles(config).profiles if one.pinned)
    except KittyError:  # changed since it was started
        return ()


async def router_command(config: ServerConfig, engine: Engine) -> RouterPlan:
    """Return the plan for a router that loads as many of its profiles as fit into memory together.

    It is llama-server's own router; if a build has none, it is llama-swap.

    Raises:
        ConfigError: The profiles are wrong; it lists all problems.
        UnknownFlagError: This build lacks a flag in `extra_args`.
        ServerFailedError: This build has no router, and llama-swap is missing or too old.
    """
    from kitty_nb.formats import exports  # noqa: PLC0415 - only routers need YAML

    program = None if has_router(engine) else await _find_llama_swap(engine)
    profiles, left_out = await run_sync(routed_profiles, config)
    most, notes = await _most(config, engine, profiles)
    notes += left_out
    ports = range(0)
    if program:
        path = config.log_dir / f"{config.profile}.llama-swap.yaml"
        theirs = {config.port, *(one.port for one in profiles)}
        first = await run_sync(free_port, LOOPBACK, len(profiles), theirs)
        if engine.dialect.option(REUSE_PORT):
            ports = range(first, first + len(profiles))
        exported = await run_sync(exports.export_router, profiles, engine, most, first)
        host = f"[{config.host}]" if ":" in config.host else config.host
        command = [program, "--config", str(path), "--listen", f"{host}:{config.port}"]
        notes += _swap_notes(config, engine)
    else:
        path = config.log_dir / f"{config.profile}.presets.ini"
        exported = await run_sync(exports.export, Format.ROUTER, profiles)
        command = [*build_router_command(engine, config, path, most)]
    # The key that clients need is passed in the environment; other notes are about other programs.
    told = ("left out", "names another")
    notes += [note for note in exported.notes if any(part in note for part in told)]
    names = tuple(one.profile for one in profiles)
    return RouterPlan(
        names, tuple(command), path, exported.text, tuple(notes), bool(program), ports
    )


async def _find_llama_swap(engine: Engine) -> str:
    program = shutil.which("llama-swap")
    if program is None:
        raise ServerFailedError(
            f"This build of llama-server ({engine.version}) has no router. Set LLAMACPP_BIN to a"
            f" current llama-server, or install llama-swap: {SWAP_HOME}"
        )
    lacks = "pass the API key on to its servers"
    if problem := await why_swap_unfit(program, PASSES_KEY, lacks):
        raise ServerFailedError(problem)
    return program


def _swap_notes(config: ServerConfig, engine: Engine) -> list[str]:
    """Return notes on what llama-swap does differently."""
    notes = []
    if goes_without_key(config):
        notes.append(
            "The router has no API key, and llama-swap lets any web page that you open use the"
            " models. Remove LLAMACPP_API_KEY=none."
        )
    if not engine.dialect.option(REUSE_PORT):
        notes.append(
            f"Other users of this machine can take the port of a model that is not loaded, and read"
            f" what clients send, because this build of llama-server ({engine.version}) has no"
            f" {REUSE_PORT}. Update llama.cpp."
        )
    if config.extra_args:
        key = f"LLAMACPP_{config.profile.upper()}_EXTRA_ARGS"
        notes.append(f"{key} is ignored: llama-swap doesn't accept llama-server's flags.")
    return notes


async def _most(
    config: ServerConfig, engine: Engine, profiles: Sequence[ServerConfig]
) -> tuple[int, list[str]]:
    """Return how many of the profiles fit into memory together, and warnings about that."""
    measured = await run_sync(free_memory, None)
    _, memory = await Forecaster().find_memory(config, Running(), measured)
    needs = await run_sync(_needs, profiles, engine, memory or measured)
    free = [pool.free for pool in (memory or measured).pools]
    if config.router_memory_gb is not None:
        free[0] = min(free[0], int(config.router_memory_gb * _GB))
    pinned = [need for one, need in zip(profiles, needs, strict=True) if one.pinned]
    others = [need for one, need in zip(profiles, needs, strict=True) if not one.pinned]
    most = most_together(pinned, others, free)
    if most >= len(pinned) + bool(others):
        return most, []
    too_many = "The largest model does not fit into memory. Lower its context"
    if pinned:
        beside = " and the largest of the others" if others else ""
        too_many = (
            f"The pinned models{beside} do not fit into memory. Pin fewer, lower their context"
        )
    limit = "" if config.router_memory_gb is None else ", or raise LLAMACPP_ROUTER_MEMORY_GB"
    return len(pinned) + bool(others), [f"{too_many}{limit}."]


def most_together(
    pinned: Sequence[Sequence[int]], others: Sequence[Sequence[int]], free: Sequence[int]
) -> int:
    """Return the largest number of models of which any fit together, always including the pinned.

    A router limits the number of models, not their memory. With this limit, memory suffices.

    Args:
        pinned: What each pinned model needs of each pool, in bytes.
        others: What each other model needs of each pool.
        free: What each pool has free.
    """
    most = len(pinned) + len(others)
    for pool, room in enumerate(free):
        room -= sum(need[pool] for need in pinned)  # noqa: PLW2901
        count = len(pinned)
        for need in sorted((need[pool] for need in others), reverse=True):
            room -= need  # noqa: PLW2901
            if room < 0:
                break
            count += 1
        most = min(most, count)
    return most


def _needs(
    profiles: Sequence[ServerConfig], engine: Engine, memory: Memory
) -> list[tuple[int, ...]]:
    """Return what each model needs of each pool, by the formula of the memory preview."""
    needs = []
    for one in profiles:
        shape = read_shape(one.require_model())
        settled = plan(shape, settings_of(one, engine), memory)
        needs.append(tuple(need.known for need in estimate(shape, settled, memory.gpus)))
    return needs


class ModelStatus(StrEnum):
    """The status of one model of a router."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"


class LlamaServer:
    """llama-server without a model; see `tools/server/README.md` of llama.cpp."""

    queues = False  # whether a load may have to wait until another model is unloaded

    def __init__(self, probe: HealthProbe) -> None:
        self._probe = probe

    async def models(self) -> dict[str, ModelStatus]:
        """Return the status of each of its models; none if it is too busy to answer."""
        listed = objects_in(await self._probe.get("/v1/models"), "data")
        return {str(one.get("id")): _model_status(one.get("status")) for one in listed}

    async def order(self, verb: str, model: str) -> str:
        """Have it `load` or `unload` a model; return its reason for refusing, or nothing."""
        return await self._probe.request("POST", f"/models/{verb}", {"model": model})

    async def touch(self, model: str) -> None:
        """Mark a loaded model as used, by the smallest request."""
        request = {"model": model, "content": ""}
        await self._probe.request("POST", "/tokenize?autoload=false", request)


class LlamaSwap:
    """llama-swap: https://github.com/mostlygeek/llama-swap.

    Args:
        probe: Sends it requests.
        tasks: Where the requests that load models wait.
    """

    queues = True

    def __init__(self, probe: HealthProbe, tasks: TaskGroup) -> None:
        self._probe, self._tasks = probe, tasks
        self._names: tuple[str, ...] = ()  # they never change while it runs
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
        """Have it `load` or `unload` a model; return its reason for refusing, or nothing."""
        if verb == "load":
            waiting = self._ordered[model] = anyio.CancelScope()
            self._tasks.start_soon(self._load, model, waiting)
            return ""
        if queued := self._ordered.pop(model, None):
            queued.cancel()  # it may still queue
        path = f"/api/models/{verb}/{quote(model, safe='')}"
        return await self._probe.request("POST", path, within=None)  # it answers when that is done

    async def _load(self, model: str, waiting: anyio.CancelScope) -> None:
        """Send the model's server a request, which starts it. The next look shows the result."""
        try:
            with waiting:
                path = f"/upstream/{quote(model, safe='')}/health"
                await self._probe.request("GET", path, within=None)
        finally:
            if self._ordered.get(model) is waiting:
                del self._ordered[model]

    async def touch(self, model: str) -> None:
        """Do nothing: it keeps the models of its persistent groups by itself."""


RouterApi = LlamaServer | LlamaSwap


async def router_api(probe: HealthProbe, tasks: TaskGroup) -> RouterApi | None:
    """Ask a server which router it is; None if it doesn't serve each model by a child process.

    Requests that last as long as a load wait in `tasks`.
    """
    props = await probe.get("/props")
    if isinstance(props, dict) and props.get("role") == "router":
        return LlamaServer(probe)
    running = await probe.get("/running")
    listed = isinstance(running, dict) and isinstance(running.get("running"), list)
    return LlamaSwap(probe, tasks) if listed else None


def _model_status(told: Any) -> ModelStatus:
    if not isinstance(told, dict):
        return ModelStatus.UNLOADED
    try:
        return ModelStatus(str(told.get("value")))
    except ValueError:  # a request loads a sleeping one again
        return ModelStatus.LOADED
