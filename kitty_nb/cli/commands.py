"""Start, stop, restart, switch and wait: a supervisor for as long as a command takes."""

from __future__ import annotations

import shlex
import sys
from contextlib import aclosing, asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING

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
    WillNotFitError,
    printable,
)
from kitty_nb.supervisor.events import Activity, Event, Level, ProgressMade, ServerStatus
from kitty_nb.supervisor.launch import public_command
from kitty_nb.supervisor.registry import note_failure, refuse_open_folder
from kitty_nb.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from rich.progress import Progress

    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.events import LoadProgress, ServerState

_DRAWN_AFTER = 0.2  # seconds; a small model is ready by then, and rich is not imported for it


async def command_text(config: ServerConfig) -> str:
    """Return the command line that would start a server, quoted for a shell, without secrets.

    Raises:
        KittyError: There is no model or engine, or it does not know a setting.
    """
    config = await anyio.to_thread.run_sync(resolve_model, config)
    return shlex.join(await public_command(config))


async def start(config: ServerConfig, env: Path, wait: bool, anyway: bool) -> str:
    """Start a profile's server unless it runs with these settings, and leave it running.

    Args:
        config: The settings.
        env: The file they come from, for commands to suggest.
        wait: Return when the server is ready, not as soon as its process exists.
        anyway: Start the model even if it does not fit into memory.

    Returns:
        The state of the server, in sentences.

    Raises:
        KittyError: The start failed; the message names the next command to try.
    """
    async with _supervise(config, env) as supervisor:
        running = supervisor.state
        if not running.status.idle and _kept(running.config) == _kept(config):
            config = running.config
        await supervisor.start(config, wait, anyway=anyway)
        return await _report(supervisor, env)


async def restart(config: ServerConfig, env: Path, wait: bool, anyway: bool) -> str:
    """Like `start`, but always with a fresh process."""
    async with _supervise(config, env) as supervisor:
        await supervisor.restart(config, wait, anyway=anyway)
        return await _report(supervisor, env)


async def switch(
    config: ServerConfig, env: Path, model: str, alias: str | None, wait: bool, anyway: bool
) -> str:
    """Like `restart`, with another model and the other settings of the running server."""
    async with _supervise(config, env) as supervisor:
        await supervisor.switch_model(model, alias, wait, anyway=anyway)
        return await _report(supervisor, env)


async def stop(config: ServerConfig, env: Path, force: bool) -> str:
    """Stop a profile's server, whoever started it; return what was done, in a sentence."""
    async with _supervise(config, env) as supervisor:
        pid = supervisor.state.pid
        state = await supervisor.stop(force)
    return state.sentence if pid is None else f"Stopped the server (PID {pid})."


async def wait_ready(config: ServerConfig, env: Path, within: float | None) -> str | None:
    """Wait until a profile's server is ready; return its state, or None if none is running.

    Raises:
        WaitTimeoutError: It was not ready within so many seconds; it is still loading.
        KittyError: It ended before it was ready.
    """
    async with _supervise(config, env) as supervisor:
        if supervisor.state.status.idle:
            return None
        with anyio.move_on_after(within):
            await _until(supervisor, lambda state: state.status.settled)
        state = supervisor.state
        if state.status is ServerStatus.READY:
            return state.sentence
        if state.status.idle and state.error:
            raise ServerCrashedError(state.error)
        if state.status.idle:
            raise StartCancelledError("The server was stopped before it was ready.")
        raise WaitTimeoutError(f"The server is not ready after {within:g} s; it is still loading.")


def same_profile(env: Path, profile: str, *words: str) -> str:
    """Return another kitty-nb command for the same profile, quoted for a shell."""
    where = () if env == Path(".env") else ("--env", str(env))
    which = () if profile == "primary" else ("--profile", profile)
    return shlex.join(("kitty-nb", *words, *where, *which))


@asynccontextmanager
async def _supervise(config: ServerConfig, env: Path) -> AsyncIterator[Supervisor]:
    """Supervise a profile's server and show its load; it keeps running when the command ends."""
    await anyio.to_thread.run_sync(refuse_open_folder, config)
    supervisor = Supervisor(config)
    supervisor.detach()
    try:
        with closing(_LoadDisplay()) as display:
            supervisor.subscribe(display.show)
            async with supervisor:
                yield supervisor
    except WillNotFitError as error:
        if supervisor.state.status.idle:  # `status` repeats it until the next start
            await anyio.to_thread.run_sync(note_failure, config, str(error))
        raise KittyError(f"{error} To start anyway, add --anyway.") from None
    except (ServerFailedError, ServerCrashedError) as error:
        if not supervisor.log_lines:
            raise
        logs = same_profile(env, config.profile, "logs", "-n", "20")
        raise KittyError(f"{error}\nTo see the end of its log: {logs}") from None


async def _report(supervisor: Supervisor, env: Path) -> str:
    """Describe the server that a command has started, once its process exists."""
    state = await _until(supervisor, _has_begun)
    if state.status.idle:
        raise ServerFailedError(state.error)
    if not supervisor.api_key or state.config.api_key:  # who set a key knows it
        return state.sentence
    key = same_profile(env, state.config.profile, "key")
    return f"{state.sentence}\nClients must send its API key. To print it: {key}"


def _has_begun(state: ServerState) -> bool:
    running = state.pid is not None and state.status is not ServerStatus.STOPPING
    return running or state.status.idle


def _kept(config: ServerConfig) -> ServerConfig:
    """The settings as a server has them that outlives whoever started it."""
    return config.model_copy(update={"on_kernel_exit": OnKernelExit.KEEP})


async def _until(supervisor: Supervisor, condition: Callable[[ServerState], bool]) -> ServerState:
    async with aclosing(supervisor.events()) as events:
        if not condition(supervisor.state):
            async for _ in events:
                if condition(supervisor.state):
                    break
    return supervisor.state


class _LoadDisplay:
    """Shows a load on stderr: a bar in a terminal, lines anywhere else."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()

    def show(self, event: Event) -> None:
        """Show a step of the load; an error is left to the command's last words."""
        match event:
            case ProgressMade(progress) if sys.stderr.isatty():
                self._draw(progress)
            case Activity(level=Level.ERROR):
                pass
            case Activity(message, level) if level is not Level.INFO or not sys.stderr.isatty():
                if self._bar:
                    self._bar.console.print(message, soft_wrap=True)
                else:
                    print(printable(message), file=sys.stderr, flush=True)

    def _draw(self, progress: LoadProgress) -> None:
        if not self._bar:
            if progress.elapsed < _DRAWN_AFTER:
                return
            from kitty_nb.cli.console import load_bar

            self._bar = load_bar()
        left = "" if progress.eta is None else f", about {progress.eta:.0f} s left"
        self._bar.update(
            self._bar.task_ids[0],
            completed=progress.fraction,
            description=progress.stage.label,
            time=f"{progress.elapsed:.0f} s{left}",
            refresh=True,
        )
