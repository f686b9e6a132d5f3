"""Preconditions of a launch, and the launch itself."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.lowlevel
import anyio.to_thread

from kitty_nb.config import OnKernelExit, server_environment, takes_secret
from kitty_nb.engine.command_line import (
    ORIGINS,
    build_command,
    leaves_out_projector,
    open_to_pages,
    sleeps,
)
from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import PortBusyError, ServerFailedError
from kitty_nb.supervisor.log import rotate
from kitty_nb.supervisor.port_owner import next_free_port, owner_of, port_refusal
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.registry import (
    ServerRecord,
    leaving_server,
    mark_of,
    profile_lock,
    record_of,
    record_path,
    who_owns,
    write_record,
)
from kitty_nb.supervisor.sidecar import Sidecar

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import SecretStr

    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Engine


def refuse_busy_port(config: ServerConfig) -> None:
    """Try the port with a real bind. Run it in a worker thread.

    Raises:
        PortBusyError: Somebody listens there; the message says who, and what can be done.
        ServerFailedError: No port of this address can be listened on.
    """
    if problem := port_refusal(config.host, config.port):
        try:
            free_port = next_free_port(config.host, config.port)
        except ServerFailedError:  # no port will do: the address itself is wrong
            raise ServerFailedError(f"{problem} Correct LLAMACPP_HOST.") from None
        key = f"LLAMACPP_{config.profile.upper()}_PORT"
        owner = owner_of(config.host, config.port)
        record = owner and record_of(owner.pid, config.log_dir)
        whose = f" It serves the profile {record.config.profile!r}." if record else ""
        attachable = owner is not None and owner.attachable
        advice = f"Stop that program, or set {key} to a free port, such as {free_port}."
        raise PortBusyError(f"{problem}{whose} {advice}", free_port, attachable=attachable)


_HIDDEN = "(hidden)"


class Launched(NamedTuple):
    """A server that has just been started.

    Attributes:
        process: Its process.
        record: What is written down of it.
        sidecar: What ends it with this kernel, where that is wanted.
    """

    process: ServerProcess
    record: ServerRecord
    sidecar: Sidecar | None


async def launch(
    config: ServerConfig,
    engine: Engine,
    api_key: SecretStr | None,
    began: float,
    notify: Callable[[str], None],
) -> Launched:
    """Start a profile's server, if nobody else has it. Cancelled, or failing, it leaves none.

    Args:
        config: What to start.
        engine: What to start it with.
        api_key: What it is to ask its clients for.
        began: When the start was asked for, in seconds of the monotonic clock.
        notify: Called with what the user may wait for.

    Raises:
        KittyError: What is in the way, and what to do about it.
        OSError: A file cannot be written, or the engine not be run.
    """
    with profile_lock(config) as ours:
        if owner := await anyio.to_thread.run_sync(who_owns, config, ours):
            raise ServerFailedError(f"{owner}. Wait for it, or stop it.")
        if leaving := await anyio.to_thread.run_sync(leaving_server, config):
            notify(f"Waiting for the previous server (PID {leaving.pid}) to exit.")
            await leaving.terminate(config.stop_grace_seconds)
        command = build_command(engine, config)
        if leaves_out_projector(engine, config):
            notify(
                f"This build of llama-server ({engine.version}) has no --mmproj, so the model"
                " accepts only text. For images and audio, update llama.cpp."
            )
        if open_to_pages(engine, config):
            notify(
                "The server has no API key, and this build of llama-server"
                f" ({engine.version}) has no {ORIGINS}: any web page that you open can use the"
                " model. Remove LLAMACPP_API_KEY=none, or update llama.cpp."
            )
        await anyio.to_thread.run_sync(refuse_busy_port, config)
        # Called off while a thread tried the port, it is told so only now.
        await anyio.lowlevel.checkpoint_if_cancelled()
        rotate(config.log_path, config.log_keep)
        return await _spawn(config, command, api_key, began)


async def public_command(config: ServerConfig) -> tuple[str, ...]:
    """Return the words that would be run. What may be a secret in `extra_args` is replaced.

    The key that clients need is not among them: the server learns it from its environment.

    Raises:
        KittyError: There is no engine, or it does not know a setting.
    """
    command = build_command(await locate_engine(config.binary), config)
    hidden = (_HIDDEN if takes_secret(flag) else word for flag, word in pairwise(command))
    return command[0], *hidden


def start_sidecar(config: ServerConfig, process: ServerProcess, record: ServerRecord) -> Sidecar:
    """Start the helper of a server that runs.

    Raises:
        OSError: It cannot be started.
    """
    guards = config.on_kernel_exit is OnKernelExit.STOP
    sidecar = Sidecar(config, record_path(config), guards=guards)
    sidecar.watch(process, record.idle_seconds)
    return sidecar


async def _spawn(
    config: ServerConfig,
    command: tuple[str, ...],
    api_key: SecretStr | None,
    began: float,
) -> Launched:
    guards = config.on_kernel_exit is OnKernelExit.STOP
    sidecar = Sidecar(config, record_path(config), guards=True) if guards else None
    process: ServerProcess | None = None
    record = ServerRecord(
        began=began,
        api_key=api_key,
        idle_seconds=0 if sleeps(command) else config.idle_shutdown_seconds or 0,
        config=config,
    )
    try:
        if not sidecar:  # were we killed just now, it would be found by its mark
            write_record(record)
        mark = sidecar.environment if sidecar else mark_of(record)
        process = ServerProcess.spawn(command, config.log_path, server_environment(api_key) | mark)
        if sidecar:
            sidecar.watch(process, record.idle_seconds)
        record = record.of(process)
        write_record(record)
    except BaseException:
        with suppress(OSError):
            record_path(config).unlink(missing_ok=True)
        with anyio.CancelScope(shield=True):
            if process:
                process.kill()
                await process.wait()
            if sidecar:
                await sidecar.ended()
        raise
    return Launched(process, record, sidecar)
