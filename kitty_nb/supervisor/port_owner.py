"""The owner of a port, and the search for a free one."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import anyio
import psutil
from anyio.to_thread import run_sync

from kitty_nb.config import ServerConfig, Task, task_by_flags
from kitty_nb.config.flags import FLAG_PREFIX, spelled, value_of
from kitty_nb.engine import embedded
from kitty_nb.engine.command_line import UNSPOKEN_FLAGS, sleeps
from kitty_nb.engine.locate import EngineKind
from kitty_nb.errors import PortBusyError, ServerFailedError
from kitty_nb.supervisor.process import is_ours
from kitty_nb.supervisor.registry import record_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


_LAST_PORT = 65535
_USUAL_PORT = 8082  # not reserved for administrators, as those above one of theirs are
_PORTS_TRIED = 100
_RELEASED_WITHIN, _LOOK_AGAIN = 1.0, 0.02  # seconds
_MODEL = {"-m", "--model"}
_ALIAS = {"-a", "--alias"}

_ANY = {"0.0.0.0", "::"}  # the latter includes IPv4 by default


@dataclass(frozen=True, slots=True)
class PortOwner:
    """The process that listens on a port."""

    port: int
    pid: int
    name: str  # the system's name for its program
    engine: EngineKind | None = None  # the kind of llama-server it is; None for anything else
    model: str | None = None  # the file name of the model that a llama-server was started with
    alias: str | None = None  # the name under which it serves that model
    # The names of the models it can load, if it is a router that was asked; None for others.
    models: tuple[str, ...] | None = None
    # Whether it frees an idle model by itself, and frequent requests would keep it awake.
    sleeps: bool = False
    # The flag that prevents kitty_nb from talking to it, such as one for TLS.
    unspoken: str | None = None
    user: str | None = None  # the user who owns the process; None for this user
    task: Task = Task.CHAT  # what it was started for

    @property
    def attachable(self) -> bool:
        """True for a llama-server of this user that kitty_nb can talk to."""
        return self.engine is not None and self.unspoken is None and self.user is None

    @property
    def who(self) -> str:
        """A description, e.g. `llama-server (PID 4242) serving qwen.gguf as kitty-primary`."""
        name = "the embedded llama-server" if self.engine is EngineKind.EMBEDDED else self.name
        serving = f" serving {self.model}" if self.model else ""
        known_as = f" as {self.alias}" if self.alias else ""
        of = f" of user {self.user}" if self.user else ""
        return f"{name} (PID {self.pid}){of}{serving}{known_as}"

    @property
    def sentence(self) -> str:
        """The port's owner, as a sentence."""
        return f"Port {self.port} is in use by {self.who}."


def owner_of(host: str, port: int) -> PortOwner | None:
    """Find the process that listens where a server on `host` and `port` would.

    This asks the system about every process: tens of milliseconds. Run it in a worker thread.

    Returns:
        None if nobody listens any more, or the system doesn't tell: Linux and macOS hide other
        users' processes.
    """
    try:
        wanted = {address[0] for _, address in _resolve(host, port)}
    except OSError:
        return None
    pids = {
        pid
        for pid, connection in _connections()
        if pid and connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        if connection.laddr.ip in wanted | _ANY or wanted & _ANY
    }
    owners = [owner for pid in sorted(pids) if (owner := _describe(pid, port))]
    return next((one for one in owners if one.engine), owners[0] if owners else None)


def port_refusal(host: str, port: int) -> str | None:
    """Return in a sentence why no server can listen on a port; None if one can.

    It takes a real bind, and the time of `owner_of` if the port is in use.
    """
    problem = bind_problem(host, port)
    return _refusal(problem, host, port, _owner_behind(problem, host, port)) if problem else None


def _owner_behind(problem: OSError, host: str, port: int) -> PortOwner | None:
    return owner_of(host, port) if problem.errno == errno.EADDRINUSE else None


def _refusal(problem: OSError, host: str, port: int, owner: PortOwner | None) -> str:
    if isinstance(problem, socket.gaierror):
        return f"The host name {host} does not resolve; 127.0.0.1 is this machine only."
    if problem.errno == errno.EADDRINUSE:
        unseen = "a process that does not listen yet, or that you have no access to"
        who = owner.who if owner else unseen
        return f"Port {port} on {host} is in use by {who}."
    if problem.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine; 127.0.0.1 is this machine only."
    if problem.errno == errno.EACCES:
        return f"Port {port} is reserved for administrators; choose one above 1023."
    return f"Cannot use port {port} on {host}: {problem.strerror or problem}."


async def await_release(host: str, port: int) -> None:
    """Wait, for at most a second, while a port is busy and no owner is seen.

    Linux 6.18 was seen to free a port some 50 ms after the process that listened there had exited.
    """
    with anyio.move_on_after(_RELEASED_WITHIN):
        while await run_sync(_looks_unowned, host, port):  # noqa: ASYNC110 (nothing tells)
            await anyio.sleep(_LOOK_AGAIN)


def _looks_unowned(host: str, port: int) -> bool:
    problem = bind_problem(host, port)
    busy = problem is not None and problem.errno == errno.EADDRINUSE
    return busy and owner_of(host, port) is None


def refuse_busy_port(config: ServerConfig) -> None:
    """Try the port with a real bind. Run it in a worker thread.

    Raises:
        PortBusyError: Another program listens there; the message says which, and what to do.
        ServerFailedError: No server can listen on any port of this address.
    """
    host, port = config.host, config.port
    if problem := bind_problem(host, port):
        owner = _owner_behind(problem, host, port)
        refusal = _refusal(problem, host, port, owner)
        try:
            free_port = next_free_port(host, port)
        except ServerFailedError:  # no port will do: the address itself is wrong
            raise ServerFailedError(f"{refusal} Correct LLAMACPP_HOST.") from None
        record = owner and record_of(owner.pid, config.log_dir)
        whose = f" It serves the profile {record.config.profile!r}." if record else ""
        attachable = owner is not None and owner.attachable
        stop = "Stop that program, or set" if problem.errno == errno.EADDRINUSE else "Set"
        key = f"LLAMACPP_{config.profile.upper()}_PORT"
        advice = f"{stop} {key} to a free port, such as {free_port}."
        raise PortBusyError(f"{refusal}{whose} {advice}", free_port, attachable=attachable)


def next_free_port(host: str, port: int) -> int:
    """Return the first port above `port`, or from the usual one on, that a server could listen on.

    Raises:
        ServerFailedError: A hundred ports in a row are busy both times, or `host` is not an address
            of this machine.
    """
    above = range(port + 1, min(port + _PORTS_TRIED, _LAST_PORT) + 1)
    for candidate in chain(above, range(_USUAL_PORT, _USUAL_PORT + _PORTS_TRIED)):
        problem = bind_problem(host, candidate)
        if problem is None:
            return candidate
        if problem.errno not in {errno.EADDRINUSE, errno.EACCES}:
            raise ServerFailedError(f"Cannot listen on {host}: {problem.strerror or problem}.")
    raise ServerFailedError(
        f"Ports {port + 1} to {above.stop - 1} on {host} are all in use. Choose another port."
    )


def bind_problem(host: str, port: int) -> OSError | None:
    """Try to bind a port as llama-server would, and return the error, if any.

    A name with several addresses, such as `localhost`, must be free on all that this machine has:
    clients may try any of them.
    """
    try:
        addresses = _resolve(host, port)
    except OSError as error:
        return error
    problems = []
    for family, address in addresses:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(address)
        except OSError as error:
            problems.append(error)
    taken = next((one for one in problems if one.errno == errno.EADDRINUSE), None)
    return taken or (problems[0] if len(problems) == len(addresses) else None)


@contextmanager
def keep_ports(ports: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Reserve loopback ports for this user; yield descriptors for a process to inherit.

    While that process lives, only servers of this user can listen there, and only those that share
    a port: see SO_REUSEPORT in socket(7).

    Raises:
        ServerFailedError: One of them is already in use.
    """
    with ExitStack() as stack:
        kept = []
        for port in ports:
            kept.append(stack.enter_context(socket.socket()))
            kept[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            try:
                kept[-1].bind(("127.0.0.1", port))
            except OSError as error:
                raise ServerFailedError(
                    f"Another program took port {port}, which was chosen for a model"
                    f" ({error.strerror}). Start the router again."
                ) from error
        yield tuple(one.fileno() for one in kept)


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [(family, address) for family, _, _, _, address in found]


def _connections() -> Iterator[tuple[int | None, Any]]:
    try:
        yield from ((one.pid, one) for one in psutil.net_connections("tcp"))
    except psutil.AccessDenied:  # macOS shows ordinary users only their own processes
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                yield from ((process.pid, one) for one in process.net_connections("tcp"))


def _describe(pid: int, port: int) -> PortOwner | None:
    try:
        process = psutil.Process(pid)
        name = process.name()
        user = None if is_ours(pid) else process.username()
    except psutil.Error:  # gone meanwhile
        return None
    words: list[str] = []
    with suppress(psutil.Error):
        words = process.cmdline()
    engine = _engine(words)
    if engine is None:
        return PortOwner(port, pid, name, user=user)
    words = own_words(words)
    if engine is EngineKind.NATIVE:
        words = [*_from_environment(process), *words]
    model, alias = served_by(words)
    return PortOwner(
        port,
        pid,
        name,
        engine,
        model=PurePath(model).name if model else None,
        alias=alias,
        sleeps=sleeps(words),
        user=user,
        unspoken=next((flag for flag in UNSPOKEN_FLAGS if value_of(words, {flag})), None),
        task=task_by_flags(words) or Task.CHAT,
    )


def _from_environment(process: psutil.Process) -> Iterator[str]:
    """Yield the flags in a llama-server's environment, which its command line overrides."""
    with suppress(psutil.Error):
        for name, value in process.environ().items():
            if name.startswith(FLAG_PREFIX):
                flag = name.removeprefix(FLAG_PREFIX).lower()
                yield from (spelled(f"--{flag}"), value)


def _engine(words: list[str]) -> EngineKind | None:
    program = [PurePath(word).name for word in words[:1]] + words[1:2]
    if program[:1] == ["llama-server"] or program in (["llama", "serve"], ["llama", "server"]):
        return EngineKind.NATIVE
    return EngineKind.EMBEDDED if embedded.__name__ in words else None


def own_words(words: list[str]) -> list[str]:
    """Return a llama-server's own words in a command line: Python has an -m too."""
    return words[words.index(embedded.__name__) :] if embedded.__name__ in words else words


def served_by(words: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the model and the alias that a llama-server's command line names."""
    return value_of(words, _MODEL), value_of(words, _ALIAS)
