"""Work of the verbs for a profile on another machine: asked there, over ssh."""

from __future__ import annotations

import shlex
import subprocess
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio

from kitty_nb.errors import KittyError, OutOfReachError
from kitty_nb.ports import LOOPBACK
from kitty_nb.remote.connection import ENVIRONMENT, PLAIN
from kitty_nb.remote.protocol import Verb
from kitty_nb.remote.supervisor import RemoteSupervisor
from kitty_nb.ssh import ssh_command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from pydantic import SecretStr

    from kitty_nb.catalog.catalog import ScanStep
    from kitty_nb.catalog.model import Model
    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.events import MemoryUse, ServerState


@asynccontextmanager
async def _reached(config: ServerConfig) -> AsyncIterator[RemoteSupervisor]:
    """Connect, and leave the server as it is.

    Raises:
        OutOfReachError: The machine can't be reached.
    """
    supervisor = RemoteSupervisor(config)
    supervisor.detach()
    async with supervisor:
        if not supervisor.reached:
            raise OutOfReachError(supervisor.state.error)
        yield supervisor


async def read_status(config: ServerConfig) -> tuple[ServerState, MemoryUse | None]:
    """Read the state of a profile's server and its memory; OUT_OF_REACH where that fails."""
    supervisor = RemoteSupervisor(config)
    supervisor.detach()
    async with supervisor:
        state = replace(supervisor.state, address=None)  # this connection's
        return state, await supervisor.memory_use()


async def read_key(config: ServerConfig) -> tuple[ServerState, SecretStr | None]:
    """Return the state of a profile's server, and its API key."""
    async with _reached(config) as supervisor:
        return supervisor.state, supervisor.api_key


async def show_log(
    config: ServerConfig, show: Callable[[str], object], last: int | None, follow: bool
) -> None:
    """Show the log of a profile's server; with `follow`, until cancelled."""

    def step(lines: tuple[str, ...]) -> None:
        for line in lines:
            show(line)

    async with _reached(config) as supervisor:
        asked = {"follow": follow, "last": last, "config": config}
        step(await supervisor.call(Verb.LOG, step, within=None, **asked))


async def list_models(config: ServerConfig) -> tuple[list[Model], ServerConfig]:
    """List the models of the other machine; return the settings as that machine has them, too."""
    models: list[Model] = []
    async with _reached(config) as supervisor:
        config = supervisor.settled(config)
        with anyio.CancelScope() as scope:

            def step(found: ScanStep) -> None:
                models[:] = found.models
                if found.done == found.total:
                    scope.cancel()

            await supervisor.call(Verb.SCAN, step, within=None, config=config)
    return models, config


def install(config: ServerConfig, source: str) -> None:
    """Install kitty_nb on the other machine, into an environment of its own; pip says how it goes.

    Args:
        config: The settings that name the machine.
        source: A wheel of this machine, which is sent; or what pip there installs. Either may end
            in extras, such as `[embedded]`.

    Raises:
        KittyError: It failed.
    """
    name, extras, rest = source.partition("[")
    wheel = Path(name)
    sent = wheel.read_bytes() if wheel.suffix == ".whl" and wheel.is_file() else b""
    script = f'set -e; d="$HOME/{ENVIRONMENT}"; python3 -m venv "$d"; '
    what = shlex.quote(source)
    if sent:
        script += f'cat > "$d"/{shlex.quote(wheel.name)}; '
        what = f'"$d"/{shlex.quote(wheel.name + extras + rest)}'
    pip = '"$d/bin/pip" install --disable-pip-version-check'
    script += f"{pip} --upgrade {what}"
    if sent:  # pip takes one of the same version for the same
        script += f"; {pip} --force-reinstall --no-deps --quiet {what}"
    remote = f"exec sh -c {shlex.quote(script)}"
    command = ssh_command(config.ssh or "", remote, config.ssh_config, *PLAIN, "-S", "none")
    if subprocess.run(command, input=sent, check=False).returncode:
        raise KittyError(
            f"{config.ssh} did not install {source}: see above. It needs Python 3.11 or later, with"
            " venv."
        )


def tunnel_command(config: ServerConfig) -> str:
    """Return the command that brings the port of a server on another machine here."""
    tunnel = f"{LOOPBACK}:{config.port}:{urlsplit(config.endpoint).netloc}"
    return _by_hand(config, "-N", "-L", tunnel)


def doctor_command(config: ServerConfig) -> str:
    """Return the command that runs `kitty-nb doctor` on the machine of a profile."""
    program = config.ssh_bin or f"PATH=$PATH:$HOME/.local/bin:$HOME/{ENVIRONMENT}/bin kitty-nb"
    return f"{_by_hand(config)} {shlex.quote(f'{program} doctor')}"


def _by_hand(config: ServerConfig, *options: str) -> str:
    own = ("-F", str(config.ssh_config)) if config.ssh_config else ()
    return shlex.join(("ssh", *own, *options, config.ssh or ""))
