"""Starting, stopping and waiting: a supervisor for as long as a command takes."""

from __future__ import annotations

import shlex
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.config import OnKernelExit
from kitty_nb.errors import (
    KittyError,
    ServerCrashedError,
    ServerFailedError,
    StartCancelledError,
    WaitTimeoutError,
)
from kitty_nb.supervisor.events import ServerState, ServerStatus
from kitty_nb.supervisor.launch import public_command
from kitty_nb.supervisor.registry import note_failure, refuse_open_folder
from kitty_nb.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kitty_nb.config import ServerConfig
    from kitty_nb.terminal.load_display import LoadDisplay

T = TypeVar("T")


async def command_text(config: ServerConfig) -> str:
    """Return the command that would start a server, quoted for a shell and without secrets.

    Raises:
        KittyError: There is no model or engine, or it does not know a setting.
    """
    config = await anyio.to_thread.run_sync(resolve_model, config)
    return shlex.join(await public_command(config))


async def start(
    config: ServerConfig, display: LoadDisplay, wait: bool, anyway: bool
) -> ServerState:
    """Start a profile's server, unless it runs with these settings, and leave it running.

    Args:
        config: The settings.
        display: Shows the load.
        wait: Return only when it is ready; else once its process is there.
        anyway: Whether to start what will not fit into memory.

    Raises:
        KittyError: As `Supervisor.start`, or it will not fit.
    """

    async def work(supervisor: Supervisor) -> ServerState:
        running, wanted = supervisor.state, _kept(config)
        if not running.status.idle and _kept(running.config) == wanted:
            wanted = running.config
        else:
            await _agree(supervisor, wanted, anyway)
        return await _load(supervisor, display, supervisor.start(wanted, wait, anyway=True))

    return await _with_supervisor(config, work)


async def restart(
    config: ServerConfig, display: LoadDisplay, wait: bool, anyway: bool
) -> ServerState:
    """Like `start`, but always with a fresh process."""

    async def work(supervisor: Supervisor) -> ServerState:
        await _agree(supervisor, config, anyway)
        return await _load(
            supervisor, display, supervisor.restart(_kept(config), wait, anyway=True)
        )

    return await _with_supervisor(config, work)


async def switch(
    config: ServerConfig,
    display: LoadDisplay,
    model: str,
    alias: str | None,
    wait: bool,
    anyway: bool,
) -> ServerState:
    """Serve another model with the settings of the server that runs, or else with those given.

    Raises:
        KittyError: As `Supervisor.switch_model`, or it will not fit.
    """

    async def work(supervisor: Supervisor) -> ServerState:
        await _agree(supervisor, supervisor.state.config.replace(model=model), anyway)
        return await _load(
            supervisor, display, supervisor.switch_model(model, alias, wait, anyway=True)
        )

    return await _with_supervisor(config, work)


async def stop(config: ServerConfig, force: bool) -> int | None:
    """Stop a profile's server, whoever started it; return its process id, None without one."""

    async def work(supervisor: Supervisor) -> int | None:
        pid = supervisor.state.pid
        await supervisor.stop(force)
        return pid

    return await _with_supervisor(config, work)


async def wait_ready(
    config: ServerConfig, display: LoadDisplay, within: float | None
) -> ServerState | None:
    """Wait until the server that was started for a profile answers; None when there is none.

    Args:
        config: The settings of the profile.
        display: Shows the load.
        within: Seconds, or None for as long as it takes.

    Raises:
        WaitTimeoutError: It was not ready in time; its load goes on.
        ServerError: It ended before it was ready.
    """

    async def work(supervisor: Supervisor) -> ServerState | None:
        if supervisor.state.status.idle:
            return None
        supervisor.subscribe(display.show)
        with anyio.move_on_after(within):
            await _until(supervisor, lambda state: state.status.settled)
        state = supervisor.state
        match state.status:
            case ServerStatus.READY:
                return state
            case ServerStatus.STOPPED:
                raise StartCancelledError("The server was stopped before it was ready.")
            case ServerStatus.CRASHED | ServerStatus.FAILED:
                raise ServerCrashedError(state.error)
        raise WaitTimeoutError(f"The server is not ready after {within:g} s; its load goes on.")

    return await _with_supervisor(config, work)


async def _with_supervisor(config: ServerConfig, work: Callable[[Supervisor], Awaitable[T]]) -> T:
    """Do some work with a supervisor, and leave the server as it is then."""
    refuse_open_folder(config)
    supervisor = Supervisor(config)
    supervisor.leave()
    async with supervisor:
        return await work(supervisor)


async def _load(
    supervisor: Supervisor, display: LoadDisplay, launch: Awaitable[ServerState]
) -> ServerState:
    """Show a load until what was asked for is there; called off, it ends the server."""
    supervisor.subscribe(display.show)
    try:
        await launch
        state = await _until(supervisor, _has_begun)
    except anyio.get_cancelled_exc_class():
        with anyio.CancelScope(shield=True):
            await supervisor.stop()
        raise
    if state.status.idle:
        raise ServerFailedError(state.error)
    return state


async def _agree(supervisor: Supervisor, config: ServerConfig, anyway: bool) -> None:
    if not anyway and (refusal := await supervisor.refusal(config)):
        if supervisor.state.status.idle:
            await anyio.to_thread.run_sync(note_failure, config, refusal)
        raise KittyError(f"{refusal} To start it all the same, say --anyway.")


def _kept(config: ServerConfig) -> ServerConfig:
    """The settings with which a server outlives who started it."""
    return config.model_copy(update={"on_kernel_exit": OnKernelExit.KEEP})


def _has_begun(state: ServerState) -> bool:
    running = state.pid is not None and state.status is not ServerStatus.STOPPING
    return running or state.status.idle


async def _until(supervisor: Supervisor, condition: Callable[[ServerState], bool]) -> ServerState:
    async with aclosing(supervisor.events()) as events:
        if not condition(supervisor.state):
            async for _ in events:
                if condition(supervisor.state):
                    break
    return supervisor.state
