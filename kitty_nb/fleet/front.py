"""A balancer in front of replicas: nginx or llama-swap, configured and supervised."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

import anyio
import httpx

from kitty_nb.config import ServerConfig, server_environment
from kitty_nb.engine.locate import SPREADS, SWAP_HOME, why_swap_unfit
from kitty_nb.errors import ServerFailedError
from kitty_nb.safe_files import write_atomic
from kitty_nb.supervisor.port_owner import next_free_port, port_refusal
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.registry import record_path
from kitty_nb.supervisor.sidecar import Sidecar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import SecretStr

    from kitty_nb.fleet.balancing import Target

    Targets = Sequence[Target]

_HOST = "127.0.0.1"
_FIRST_PORT, _LAST_PORT = 8100, 65535
_KEY_VARIABLE = "KITTY_FLEET_KEY"
_TEMPORARY = ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")
_GRACE, _POLL = 5.0, 0.1  # seconds
_BACK_OFF, _BACK_OFF_MOST, _RESTARTS, _STABLE = 0.5, 30.0, 5, 60.0
_SHOWN = 5  # lines of its log

# A template, as `str.format` takes it.
_NGINX = Path(__file__).with_name("nginx.conf").read_text(encoding="utf-8")


def _why_not(port: object) -> str | None:
    if not isinstance(port, int) or not 0 < port <= _LAST_PORT:
        return f"The port {port!r} is not a whole number from 1 to {_LAST_PORT}."
    return port_refusal(_HOST, port)


def _reserve(port: int | None) -> tuple[int, socket.socket]:
    """Bind a port, by default a free one, so that nobody else chooses it; return its socket too.

    A given port may stay unbound: connections that ended a moment ago prevent binding without
    SO_REUSEADDR, which the balancer sets.
    """
    bound, chosen = socket.socket(), _FIRST_PORT - 1
    if port is not None:
        with suppress(OSError):
            bound.bind((_HOST, port))
        return port, bound
    while True:
        chosen = next_free_port(_HOST, chosen)
        with suppress(OSError):
            bound.bind((_HOST, chosen))
            return chosen, bound


class Front(ABC):
    """A balancer on this machine, from `run` until it is cancelled.

    Its configuration is in a folder that only this user can read, no key is on its command line,
    and it ends with this process, however that ends.

    Args:
        key: The key that the replicas require.
        alias: The name of their model.
        port: The port on which it listens; by default a free one from 8100 on.

    Attributes:
        problem: Why it does not run; None while it runs, or is about to.
        restarts: The number of restarts.

    Raises:
        ServerFailedError: It is not installed, or can't listen there.
    """

    program: ClassVar[str]
    install: ClassVar[str]
    _without = ""  # what nginx says of its build

    def __init__(self, key: SecretStr | None, alias: str, port: int | None = None) -> None:
        found = self.find()
        if found is None:
            raise ServerFailedError(
                f"{self.program} is not installed. {self.install} To write its configuration for"
                f" another machine: fleet.configuration({self.program!r})."
            )
        if port is not None and (problem := _why_not(port)):  # clients would send it the key
            raise ServerFailedError(f"{problem} Choose another port, or leave it out.")
        self._path, self._key, self.alias = found, key, alias
        self.port, self._reserved = _reserve(port)
        self.problem: str | None = None
        self.restarts = 0
        self._targets: tuple[Target, ...] = ()
        self._changed = anyio.Event()

    @classmethod
    def find(cls) -> str | None:
        """Return the path of the program; None if it is not installed."""
        beside = "/usr/sbin:/usr/local/sbin"  # Debian's place for servers, not on every PATH
        return shutil.which(cls.program) or shutil.which(cls.program, path=beside)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{_HOST}:{self.port}"

    def use(self, targets: Targets) -> None:
        """Send requests to these replicas from now on; called on the loop that runs it."""
        if targets and tuple(targets) != self._targets:
            self._targets = tuple(targets)
            self._changed.set()

    async def run(self) -> None:
        """Run the balancer. It starts with the first replica, and restarts when it exits."""
        with self._reserved:
            self.problem = await self._examine()
            if self.problem:
                return
            await self._changed.wait()
        with TemporaryDirectory(prefix="kitty_nb-front-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            crashes = 0
            while crashes < _RESTARTS:
                began = time.monotonic()
                await self._run_once(folder)
                crashes = 1 if time.monotonic() - began > _STABLE else crashes + 1
                self.restarts += 1
                await anyio.sleep(min(_BACK_OFF * 2**crashes, _BACK_OFF_MOST))
            lines = deque(self._log(folder).read_text(errors="replace").splitlines(), _SHOWN)
            self.problem = f"{self.program} exited {crashes} times: {' '.join(lines)}"

    async def _run_once(self, folder: Path) -> None:
        self._write(folder)
        config = ServerConfig(profile="front", log_dir=folder)
        sidecar = Sidecar(config, record_path(config), guards=True)
        try:
            environment = {**server_environment(None), **sidecar.environment, **self._secrets()}
            process = ServerProcess.spawn(self._command(folder), self._log(folder), environment)
            sidecar.watch(process, 0)
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._follow, folder)
                    await process.wait()
                    tasks.cancel_scope.cancel()
            finally:
                with anyio.CancelScope(shield=True):
                    await process.terminate(_GRACE)
                    await process.wait()
        finally:
            await sidecar.ended()

    async def _follow(self, folder: Path) -> None:
        # Between reading its configuration and listening, llama-swap would miss a change.
        while not await self._listens():  # noqa: ASYNC110
            await anyio.sleep(_POLL)
        while True:
            await self._changed.wait()
            self._write(folder)
            await self._reload(folder)

    async def _listens(self) -> bool:
        try:
            async with await anyio.connect_tcp(_HOST, self.port):
                return True
        except OSError:
            return False

    def _write(self, folder: Path) -> None:
        self._changed = anyio.Event()
        text = self.text(self._targets, self.alias, self.port, folder, self._without)
        write_atomic(self._file(folder), text.encode(), durable=False)

    def _file(self, folder: Path) -> Path:
        return folder / f"{self.program}.conf"

    def _log(self, folder: Path) -> Path:
        return folder / "front.log"

    def _secrets(self) -> dict[str, str]:
        """Return the environment variables that contain a key."""
        return {}

    @staticmethod
    @abstractmethod
    def text(targets: Targets, alias: str, port: int, folder: Path, without: str = "") -> str:
        """Return its configuration for some replicas; no key is in it.

        Args:
            targets: The replicas; one or more.
            alias: The model name that clients use.
            port: Where it listens, on this machine alone.
            folder: Where it writes.
            without: What `nginx -V` says of the build.
        """

    @abstractmethod
    async def _examine(self) -> str | None:
        """Examine the program, and return why it can't be used; None if it can."""

    @abstractmethod
    def _command(self, folder: Path) -> list[str]:
        """Return its command line."""

    async def _reload(self, folder: Path) -> None:
        """Have it reload its configuration, if it does not do so by itself."""
        return


class Nginx(Front):
    """nginx: the replica with the fewest requests is next."""

    program: ClassVar[str] = "nginx"
    install: ClassVar[str] = "Install it: apt-get install nginx-light, or brew install nginx."

    @staticmethod
    def text(targets: Targets, alias: str, port: int, folder: Path, without: str = "") -> str:
        """See `Front.text`."""
        # Its worker would be another user, who can't use the folder; others may not choose, and a
        # container may have no name for them.
        user = pwd.getpwuid(0).pw_name if os.geteuid() == 0 else None
        parts = [name for name in _TEMPORARY if f"--without-http_{name}_module" not in without]
        return _NGINX.format(
            folder=folder,
            host=_HOST,
            port=port,
            user=f"user {user} {user};\n" if user else "",
            temporary="\n".join(f'    {name}_temp_path "{folder}/{name}";' for name in parts),
            servers="\n".join(
                f"        server {httpx.URL(one.url).netloc.decode()} max_fails=1 fail_timeout=5s;"
                for one in targets
            ),
        )

    async def _examine(self) -> str | None:
        built = await anyio.run_process([self._path, "-V"], check=False)
        self._without = built.stderr.decode(errors="replace")
        return None

    def _command(self, folder: Path) -> list[str]:
        # -e: until it has read its configuration, it would write to a system log.
        return [self._path, "-p", str(folder), "-e", "stderr", "-c", str(self._file(folder))]

    async def _reload(self, folder: Path) -> None:
        command = [*self._command(folder), "-s", "reload"]
        with anyio.move_on_after(_GRACE):  # it has not written its PID yet, or never accepts this
            while (await anyio.run_process(command, check=False)).returncode:  # noqa: ASYNC110
                await anyio.sleep(_POLL)


class LlamaSwap(Front):
    """llama-swap: replicas are its peers, filled slot by slot in their order."""

    program: ClassVar[str] = "llama-swap"
    install: ClassVar[str] = f"Get it from {SWAP_HOME}."

    async def _examine(self) -> str | None:
        lacks = "spread requests over replicas"
        return await why_swap_unfit(self._path, SPREADS, lacks)

    @staticmethod
    def text(targets: Targets, alias: str, port: int, folder: Path, without: str = "") -> str:
        """See `Front.text`. It is JSON, which is YAML, too; the key is an environment variable.

        Each replica is a peer. A request for the model goes to the first one that has a slot left.
        """
        key = f"${{env.{_KEY_VARIABLE}}}"
        peers = {f"replica-{number}": target for number, target in enumerate(targets)}
        spread = {
            "strategy": "spillover",
            "targets": [f"{name}/{alias}" for name in peers],
            "settings": {"spillover": min(target.slots or 1 for target in targets)},
        }
        settings = {
            "apiKeys": [key],
            "models": {},
            "peers": {
                name: {"proxy": target.url, "apiKey": key, "models": [alias]}
                for name, target in peers.items()
            },
            "selectors": {alias: spread},
        }
        return json.dumps(settings, indent=2)

    def _command(self, folder: Path) -> list[str]:
        file, listen = str(self._file(folder)), f"{_HOST}:{self.port}"
        return [self._path, "--config", file, "--listen", listen, "--watch-config"]

    def _secrets(self) -> dict[str, str]:
        return {_KEY_VARIABLE: self._key.get_secret_value()} if self._key else {}


FRONTS: dict[str, type[Front]] = {kind.program: kind for kind in (Nginx, LlamaSwap)}
