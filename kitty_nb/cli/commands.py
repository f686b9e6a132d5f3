"""The work of the commands: to supervise a server while a command runs, or only read its status."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from kitty_nb.errors import (
    KittyError,
    OutOfReachError,
    ServerCrashedError,
    ServerFailedError,
    StartCancelledError,
    WaitTimeoutError,
    WillNotFitError,
    printable,
)
from kitty_nb.formats import Format
from kitty_nb.supervisor.events import Activity, Level, ProgressMade, ServerState, ServerStatus
from kitty_nb.supervisor.health import HealthProbe, ask_once
from kitty_nb.supervisor.log import has_log, log_lines
from kitty_nb.supervisor.registry import (
    find_server,
    last_failure,
    note_failure,
    read_record,
    refuse_open_folder,
    served_elsewhere,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence

    from pydantic import SecretStr
    from rich.progress import Progress

    from kitty_nb.catalog.catalog import ScanStep
    from kitty_nb.catalog.model import Model
    from kitty_nb.config import ServerConfig
    from kitty_nb.formats import Source
    from kitty_nb.formats.exports import Exported
    from kitty_nb.formats.imports import Imported
    from kitty_nb.remote.supervisor import RemoteSupervisor
    from kitty_nb.supervisor.events import Event, LoadProgress, MemoryUse
    from kitty_nb.supervisor.registry import ServerRecord
    from kitty_nb.supervisor.supervisor import Supervisor

    AnySupervisor = Supervisor | RemoteSupervisor
    Begin = Callable[[AnySupervisor, ServerConfig], Awaitable[object]]

_DRAWN_AFTER = 0.2  # seconds; a small model is ready by then, and rich is not imported for it
_MEASURED_OVER = 0.5  # seconds


async def command_text(config: ServerConfig) -> str:
    """Return the command line that would start a server, quoted for a shell, without secrets.

    Raises:
        KittyError: There is no model or engine, or the engine does not support a setting.
    """
    from kitty_nb.catalog.resolve import resolve_model
    from kitty_nb.config.flags import takes_secret
    from kitty_nb.engine.command_line import build_command
    from kitty_nb.engine.locate import locate_engine
    from kitty_nb.supervisor.router_program import router_command

    config = await anyio.to_thread.run_sync(resolve_model, config)
    engine = await locate_engine(config.binary)
    # The key that clients need is not in it: the server gets that from its environment.
    if config.models is None:
        command = build_command(engine, config)
    else:
        command = (await router_command(config, engine)).command
    public = ("(hidden)" if takes_secret(flag) else word for flag, word in pairwise(command))
    return shlex.join((command[0], *public))


async def load(config: ServerConfig, env: Path, begin: Begin) -> str:
    """Start a profile's server, show its load, and leave it running.

    Args:
        config: The settings.
        env: The file they come from, for the commands that messages suggest.
        begin: Starts the server with given settings: a running server's own if they are the same.

    Returns:
        The state of the server, in sentences, once its process exists.

    Raises:
        KittyError: The start failed; the message names the next command to try.
    """
    async with _supervise(config, env) as supervisor:
        before, config = supervisor.state, supervisor.settled(config)
        same = before.config.model_copy(update={"on_kernel_exit": config.on_kernel_exit})
        if not before.status.idle and same == config:
            config = before.config
        await begin(supervisor, config)
        state = await _until(supervisor, _has_begun)
        if state.status.idle:
            raise ServerFailedError(state.error)
        state = replace(state, address=None)  # valid for this connection only
        there = before.pid is not None or before.status is ServerStatus.READY  # the latter at a URL
        already = " It was already running." if there and state.pid == before.pid else ""
        told = [f"{state.sentence}{already}"]
        if config.ssh:
            from kitty_nb.remote.connection import tunnel_command

            told.append(f"To use it from here: {tunnel_command(state.config)}")
        if supervisor.api_key and not state.config.api_key:  # whoever set a key knows it
            key = same_profile(env, state.config.profile, "key")
            told.append(f"Clients must send its API key. To print it: {key}")
        return "\n".join(told)


async def stop(config: ServerConfig, env: Path, force: bool) -> str:
    """Stop a profile's server, whoever started it; return what was done, in a sentence."""
    async with _supervise(config, env) as supervisor:
        pid = supervisor.state.pid
        state = await supervisor.stop(force)
    if pid is None:
        return served_elsewhere(config) or state.sentence
    return f"Stopped the server (PID {pid})."


async def wait_ready(config: ServerConfig, env: Path, within: float | None) -> str | None:
    """Wait until a profile's server is ready; return its state, or None if none is running.

    Raises:
        WaitTimeoutError: It was not ready within that many seconds; it is still loading.
        KittyError: It exited before it was ready.
    """
    async with _supervise(config, env) as supervisor:
        if supervisor.state.status.idle:
            return None
        with anyio.move_on_after(within):
            await _until(supervisor, lambda state: state.status.settled)
        state = replace(supervisor.state, address=None)  # valid for this connection only
        if state.status is ServerStatus.READY:
            return state.sentence
        if state.status.idle and state.error:
            raise ServerCrashedError(state.error)
        if state.status.idle:
            raise StartCancelledError("The server was stopped before it was ready.")
        why = state.error or "it is still loading."
        raise WaitTimeoutError(f"The server is not ready after {within:g} s; {why}")


async def export(
    to: Format, configs: Sequence[ServerConfig], image: str | None, left_out: Sequence[str]
) -> Exported:
    """Write profiles for another program.

    Args:
        to: The program's format.
        configs: The profiles.
        image: The container image; None for llama.cpp's own.
        left_out: Why others are left out, for the notes.

    Raises:
        KittyError: A profile has no model, or the format can't express these profiles. A server at
            a URL that does not answer is an error only if there is no other profile.
    """
    from kitty_nb.catalog.resolve import resolve_model
    from kitty_nb.engine.locate import locate_engine
    from kitty_nb.formats import exports

    notes = [*left_out]
    found: list[ServerConfig] = []
    models: dict[str, Sequence[str]] = {}
    for config in configs:
        if config.ssh:
            raise KittyError(f"{config.profile} runs on {config.ssh}. Run kitty-nb export there.")
        if config.url:
            if to is Format.LLAMA_SWAP:
                try:
                    models[config.profile] = await _models_at(config)
                except KittyError as error:
                    if len(configs) == 1:
                        raise
                    notes.append(f"{config.profile} is left out: {error}")
                    continue
            found.append(config)
        else:
            found.append(await anyio.to_thread.run_sync(resolve_model, config))
    own = [config.binary for config in found if not config.url]
    engine = await locate_engine(own[0]) if own and to.runs_here else None
    if not found:
        raise KittyError("\n".join(("There is no profile to export.", *notes)))
    exported = exports.export(to, found, engine, image or exports.IMAGE, models)
    return replace(exported, notes=(*notes, *exported.notes))


def exportable(env: Path, profiles: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the profiles that a file for another program can hold, and why the others are not."""
    from kitty_nb.catalog.resolve import load_profile

    names, notes = list[str](), list[str]()
    for name in profiles:
        config, _ = load_profile(env, name)
        if config.ssh:
            notes.append(f"{name} runs on {config.ssh} and is left out: run kitty-nb export there.")
        elif config.models is not None:
            notes.append(f"{name} is a router and is left out; its models are in other profiles.")
        else:
            names.append(name)
    return names, notes


async def _models_at(config: ServerConfig) -> Sequence[str]:
    from kitty_nb.supervisor.external_server import look_once

    if config.alias:
        return [config.alias]
    state = await look_once(config)
    if state.error or not state.external:
        key = f"LLAMACPP_{config.profile.upper()}_ALIAS"
        raise KittyError(f"{state.error} To export it without asking it for its models, set {key}.")
    return state.external.models or ()


async def read_profiles(
    file: Path, env: Path, source: Source | None, name: str | None, model: Path | None
) -> Imported:
    """Read the profiles in another program's file; see `import_profiles`."""
    from kitty_nb.engine.locate import locate_engine
    from kitty_nb.errors import EngineError
    from kitty_nb.formats.imports import import_profiles

    dialect = None
    with suppress(EngineError):  # without an engine, fewer switches are recognised
        dialect = (await locate_engine()).dialect
    return import_profiles(file, env, source, name=name, model=model, dialect=dialect)


@asynccontextmanager
async def _supervise(config: ServerConfig, env: Path) -> AsyncIterator[AnySupervisor]:
    """Supervise a profile's server and show its load; it keeps running when the command ends."""
    if config.ssh:
        supervisor: AnySupervisor = _far_end(config)
    else:
        from kitty_nb.supervisor.supervisor import Supervisor

        await anyio.to_thread.run_sync(refuse_open_folder, config)
        supervisor = Supervisor(config)
        supervisor.detach()
    try:
        with _load_display() as show:
            async with supervisor:
                _refuse_lost(supervisor.state)
                supervisor.subscribe(show)  # only now: earlier events are not news
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


@contextmanager
def _load_display() -> Iterator[Callable[[Event], None]]:
    """Show a load on stderr: a bar in a terminal, lines anywhere else.

    The result shows a step of the load; an error is left to the command's last words.
    """
    bar: Progress | None = None

    def draw(progress: LoadProgress) -> None:
        nonlocal bar
        if not bar:
            from kitty_nb.cli.console import load_bar

            bar = drawn.enter_context(load_bar())
        left = "" if progress.eta is None else f", about {progress.eta:.0f} s left"
        left += ", longer than usual" if progress.overdue else ""
        bar.update(
            bar.task_ids[0],
            completed=progress.fraction,
            description=progress.stage,
            time=f"{progress.elapsed:.0f} s{left}",
            refresh=True,
        )

    def show(event: Event) -> None:
        match event:
            case ProgressMade(progress) if sys.stderr.isatty():
                if progress.elapsed >= _DRAWN_AFTER:
                    draw(progress)
            case Activity(level=Level.ERROR):
                pass
            case Activity(message, level) if level is not Level.INFO or not sys.stderr.isatty():
                print(printable(message), file=sys.stderr, flush=True)  # rich puts it above its bar

    with ExitStack() as drawn:
        yield show


def _far_end(config: ServerConfig) -> RemoteSupervisor:
    from kitty_nb.remote.supervisor import RemoteSupervisor

    supervisor = RemoteSupervisor(config, patient=True)
    supervisor.detach()
    return supervisor


@asynccontextmanager
async def _reached(config: ServerConfig) -> AsyncIterator[RemoteSupervisor]:
    async with _far_end(config) as supervisor:
        _refuse_lost(supervisor.state)
        yield supervisor


async def read_far_key(config: ServerConfig) -> tuple[ServerState, SecretStr | None]:
    """Return the state of a profile's server on another machine, and its API key."""
    async with _reached(config) as supervisor:
        return supervisor.state, supervisor.api_key


async def show_far_log(
    config: ServerConfig, show: Callable[[str], object], last: int | None, follow: bool
) -> None:
    """Show the log of a profile's server on another machine; with `follow`, until cancelled."""
    from kitty_nb.remote.protocol import Verb

    def step(lines: tuple[str, ...]) -> None:
        for line in lines:
            show(line)

    async with _reached(config) as supervisor:
        asked = {"follow": follow, "last": last, "config": config}
        step(await supervisor.call(Verb.LOG, step, within=None, **asked))


async def list_far_models(config: ServerConfig) -> tuple[list[Model], ServerConfig]:
    """List the models of another machine; return the settings as that machine has them, too."""
    from kitty_nb.remote.protocol import Verb

    async with _reached(config) as supervisor:
        config = supervisor.settled(config)
        models: list[Model] = []
        with anyio.CancelScope() as scope:

            def step(found: ScanStep) -> None:
                models[:] = found.models
                if found.done == found.total:
                    scope.cancel()

            await supervisor.call(Verb.SCAN, step, within=None, config=config)
    return models, config


def same_profile(env: Path, profile: str, *words: str) -> str:
    """Return another kitty-nb command for the same profile, quoted for a shell."""
    where = () if env == Path(".env") else ("--env", str(env))
    which = () if profile == "primary" else ("--profile", profile)
    return shlex.join(("kitty-nb", *words, *where, *which))


def key_command(env: Path, profile: str) -> tuple[str, ...]:
    """Return the command that prints a profile's key, in any folder and environment."""
    from kitty_nb.config.env_file import read_env

    beside = Path(sys.executable).with_name("kitty-nb")
    program = (str(beside),) if beside.exists() else (sys.executable, "-Pm", str(__package__))
    found = read_env(env).path
    where = ("--env", str(found)) if found.exists() else ()
    which = () if profile == "primary" else ("--profile", profile)
    return (*program, "key", *where, *which)


def _has_begun(state: ServerState) -> bool:
    exists = state.pid is not None or state.config.url is not None
    return (exists and state.status is not ServerStatus.STOPPING) or state.status.idle


async def _until(
    supervisor: AnySupervisor, condition: Callable[[ServerState], bool]
) -> ServerState:
    async with aclosing(supervisor.events()) as events:
        while not condition(supervisor.state):
            await anext(events)
            _refuse_lost(supervisor.state)
    return supervisor.state


def _refuse_lost(state: ServerState) -> None:
    # A server at a URL is waited for: it may be about to start.
    if state.status is ServerStatus.OUT_OF_REACH and not state.config.url:
        raise OutOfReachError(state.error)


def read_status(config: ServerConfig) -> tuple[ServerState, MemoryUse | None]:
    """Read the state of a profile's server, and why it exited if it did so by itself.

    Returns:
        The state, and the memory of a server on another machine.
    """
    if config.url:
        from kitty_nb.supervisor.external_server import look_once

        return anyio.run(look_once, config), None
    if config.ssh:
        return anyio.run(_read_far_status, config)
    return _read_status(config), None


def _read_status(config: ServerConfig) -> ServerState:
    refuse_open_folder(config)
    known = read_record(config)
    if running := find_server(config):
        health = ask_once(running.config.endpoint)
        return ServerState(
            health.status if running.ready is None else ServerStatus.READY,
            running.config,
            running.pid,
            running.ready,
            last_health_check=health,
            devices=running.devices or (),
        )
    if there := served_elsewhere(config):
        return ServerState(ServerStatus.STOPPED, config, error=there)
    failure, record = last_failure(config), read_record(config)
    if record != known:  # a server has just been started or stopped
        return _read_status(config)
    if record is None:
        status = ServerStatus.FAILED if failure else ServerStatus.STOPPED
        return ServerState(status, config, error=failure)
    if failure is None:  # nobody watched it exit
        from kitty_nb.supervisor.diagnosis import diagnose

        path = config.log_path
        failure = str(diagnose(None, [*log_lines(path)] if has_log(path) else []))
    return ServerState(ServerStatus.CRASHED, record.config, error=failure)


async def _read_far_status(config: ServerConfig) -> tuple[ServerState, MemoryUse | None]:
    supervisor = _far_end(config)
    async with supervisor:
        state = replace(supervisor.state, address=None)  # valid for this connection only
        return state, await supervisor.memory_use()


async def status_facts(state: ServerState, memory: MemoryUse | None) -> dict[str, Any]:
    """Return a state as JSON, with the memory that the server holds and its present speed.

    `memory` is None without a server, and so are facts that its build does not report.
    """
    from kitty_nb.supervisor.forecast import memory_use

    health = state.last_health_check
    speed = health.tokens_per_second if health else None
    record = None if state.config.ssh or state.config.url else find_server(state.config)
    if record and record.pid == state.pid:
        memory = await anyio.to_thread.run_sync(memory_use, record.pid)
        speed = None if record.ready is None else await _tokens_per_second(record)
    return {
        "profile": state.config.profile,
        "status": state.status.value,
        "model": str(state.config.model) if state.config.model else None,
        "projector": str(state.projector) if state.projector else None,
        "alias": (state.alias if state.external else state.config.served_alias) or None,
        "machine": state.config.ssh,
        "endpoint": state.endpoint,
        "pid": state.pid,
        "uptime_seconds": state.uptime,
        "devices": list(state.devices),
        "error": state.error,
        "log": None if state.config.url else str(state.config.log_path),
        "memory": memory and {"ram": memory.resident, "gpu": memory.gpu},
        "tokens_per_second": speed,
    }


async def _tokens_per_second(record: ServerRecord) -> float | None:
    async with aclosing(HealthProbe(record.config, record.api_key, trusted=True)) as probe:
        health = await probe.check_activity()
        if health.slots_busy:
            await anyio.sleep(_MEASURED_OVER)
            health = await probe.check_activity()
    return 0.0 if health.slots_busy == 0 else health.tokens_per_second
