"""ssh to another machine: lines to `kitty-nb serve` there, a tunnel, and what is run by hand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from collections import deque
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from subprocess import PIPE
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream

from kitty_nb.errors import KittyError, OutOfReachError, first_of, printable
from kitty_nb.network import LOOPBACK, free_port, ssh_command
from kitty_nb.remote.protocol import LONGEST, PROTOCOL, SILENT_FOR, Hello, load, parse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from anyio.abc import Process

    from kitty_nb.config import ServerConfig

# Seconds.
_HELLO_WITHIN = 30.0  # including the connection; Python starts there, maybe from a slow disk
_FORWARD_WITHIN = 5.0
_ENDS_WITHIN = 2.0
_GREETINGS = 1 << 16  # bytes that a shell's startup files may print first
_LONGEST_FOLDER = 64  # bytes; a socket's path is limited to 104 on macOS; ssh and we need 40
# The places where kitty-nb may be, besides the other machine's PATH.
_ENVIRONMENT = ".local/share/kitty_nb/env"  # in the home folder, where `install-remote` creates it
_KNOWN = ("$HOME/.local/bin/kitty-nb", f"$HOME/{_ENVIRONMENT}/bin/kitty-nb")
_LATE = "{} did not answer in time"
_NOT_FOUND = 127
_SSH_FAILED = 255
_PLAIN = ("-T", "-oClearAllForwardings=yes")  # no terminal, and none of the user's tunnels


class Connection:
    """An open connection.

    Attributes:
        hello: The other machine's first line.
    """

    def __init__(self, process: Process, control: str, host: str) -> None:
        assert process.stdin  # noqa: S101 (opened as a pipe)
        assert process.stdout  # noqa: S101 (likewise)
        self.hello: Hello
        self._process, self._host = process, host
        self._control = control
        self._send, self._receive, self._held = process.stdin, process.stdout, bytearray()
        self._said: deque[str] = deque(maxlen=20)
        self._tunnels: dict[tuple[str, int], int] = {}
        self._sending = anyio.Lock()

    async def greet(self) -> None:
        """Wait for the other machine's first line.

        Raises:
            OutOfReachError: There is none, or it is from another version.
        """
        left = _GREETINGS
        with anyio.move_on_after(_HELLO_WITHIN) as waiting:
            while (text := await self._read(_HELLO_WITHIN, left)) is not None:
                with suppress(ValueError):
                    kind, protocol, data = parse(text)
                    if kind == "hello" and protocol != PROTOCOL:
                        raise OutOfReachError(_other_version(self._host, protocol, data))
                    if kind == "hello":
                        self.hello = load(data, Hello)
                        return
                left -= len(text) + 1
        if waiting.cancelled_caught:
            self._give_up(_LATE)
        raise OutOfReachError(await self.why_ended())

    async def line(self) -> tuple[str, Any, Any] | None:
        """Return the other machine's next line; None if it has ended or fallen silent."""
        text = await self._read(SILENT_FOR, LONGEST)
        return None if text is None else parse(text)

    async def _read(self, silent_for: float, longest: int) -> bytes | None:
        """Return a line; None if no more come. A long one on a slow connection is not silence."""
        looked = 0
        while (end := self._held.find(b"\n", looked)) < 0:
            looked = len(self._held)
            if looked > longest:
                self._give_up(
                    "{} prints text before kitty-nb's own. Check the shell's startup files there"
                )
                return None
            with anyio.move_on_after(silent_for) as waiting:
                try:
                    self._held += await self._receive.receive()
                except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
                    return None
            if waiting.cancelled_caught:
                self._give_up(_LATE)
                return None
        text = bytes(self._held[:end])
        del self._held[: end + 1]
        return text

    def _give_up(self, why: str) -> None:
        self._said.append(why.format(self._host))
        with suppress(ProcessLookupError):  # if it is suspended, nothing else ends it
            self._process.kill()

    async def send(self, text: bytes) -> None:
        """Send a line.

        Raises:
            OutOfReachError: The connection has ended, or accepts no more data.
        """
        try:
            with anyio.fail_after(SILENT_FOR):
                async with self._sending:
                    await self._send.send(text)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, TimeoutError, OSError):
            raise OutOfReachError(f"The connection to {self._host} ended.") from None

    async def forward(self, host: str, port: int, preferred: int) -> int:
        """Forward a port of this machine's loopback to one of the other machine.

        Args:
            host: The server's address there.
            port: The server's port there.
            preferred: The port here, if it is free; 0 for any.

        Returns:
            The port here.

        Raises:
            OutOfReachError: ssh can't forward the port.
        """
        if found := self._tunnels.get((host, port)):
            return found
        said, there = "", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for here in (preferred or free_port(), free_port(), free_port()):
            where = f"{LOOPBACK}:{here}:{there}"
            command = ("ssh", "-F", "none", "-S", self._control, "-O", "forward", "-L", where)
            with anyio.move_on_after(_FORWARD_WITHIN):
                done = await anyio.run_process((*command, "--", "other"), check=False)
                if done.returncode == 0:
                    self._tunnels[host, port] = here
                    return here
                said = done.stderr.decode(errors="replace").strip()
        if self._process.returncode is not None:
            raise OutOfReachError(f"The connection to {self._host} ended.")
        raise OutOfReachError(f"ssh can't forward a port to {self._host}: {said or 'no answer'}.")

    async def listen(self, on_line: Callable[[str], object]) -> None:
        """Read ssh's own messages until it ends."""
        assert self._process.stderr  # noqa: S101 (opened as a pipe)
        said = BufferedByteReceiveStream(self._process.stderr)
        with suppress(anyio.IncompleteRead, anyio.EndOfStream, anyio.ClosedResourceError):
            while True:
                try:
                    text = await said.receive_until(b"\n", _GREETINGS)
                except anyio.DelimiterNotFound:  # read on: a full pipe would block ssh
                    text = await said.receive(_GREETINGS)
                words = printable(text.decode(errors="replace").rstrip("\r"))
                self._said.append(words)
                on_line(words)

    async def why_ended(self) -> str:
        """Return why the connection ended, once it has."""
        with anyio.move_on_after(_ENDS_WITHIN):
            await self._process.wait()
            await anyio.sleep(0.05)  # for its last lines to be read
        return explain(self._host, self._process.returncode, tuple(self._said))

    async def aclose(self) -> None:
        """End the connection."""
        with anyio.CancelScope(shield=True):
            with suppress(ProcessLookupError):
                self._process.terminate()
            with anyio.move_on_after(_ENDS_WITHIN):
                await self._process.wait()
            if self._process.returncode is None:
                with suppress(ProcessLookupError):
                    self._process.kill()
            await self._process.aclose()


@asynccontextmanager
async def connect(
    config: ServerConfig, on_line: Callable[[str], object]
) -> AsyncGenerator[Connection]:
    """Connect to the machine of a profile; leaving the context ends the connection.

    Args:
        config: The profile's settings.
        on_line: Called with each line of ssh's own messages.

    Raises:
        OutOfReachError: It can't be reached, or has no usable kitty_nb.
    """
    assert config.ssh  # noqa: S101 (callers check this)
    short = len(os.fsencode(gettempdir())) <= _LONGEST_FOLDER
    with TemporaryDirectory(prefix="kitty_nb-", dir=None if short else "/tmp") as folder:  # noqa: S108
        control = "-M", "-S", _socket(folder)
        command = ssh_command(config.ssh, _serve(config), config.ssh_config, *_PLAIN, *control)
        try:
            process = await anyio.open_process(
                command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True
            )
        except OSError as error:
            problem = f"Can't run ssh ({error.strerror}). Install OpenSSH's client."
            raise OutOfReachError(problem) from None
        connection = Connection(process, _socket(folder), config.ssh)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(connection.listen, on_line)
                await connection.greet()
                yield connection
                tasks.cancel_scope.cancel()
        except ExceptionGroup as group:
            raise first_of(group) from None
        finally:
            await connection.aclose()


def _socket(folder: str) -> str:
    """Return the path of ssh's control socket, with each % escaped: to ssh it has a meaning."""
    return f"{folder}/ssh".replace("%", "%%")


def _serve(config: ServerConfig) -> str:
    """Return the command for the other machine's shell, whichever shell that is."""
    words = f"serve --stdio --profile {config.profile}"
    if config.ssh_bin:
        return f"exec {_quoted(config.ssh_bin)} {words}"
    places = " ".join(f'"{place}"' for place in ("kitty-nb", *_KNOWN))
    script = (
        f'for k in {places}; do command -v "$k" >/dev/null 2>&1 && exec "$k" {words}; done;'
        f" exit {_NOT_FOUND}"
    )
    return f"exec sh -c {shlex.quote(script)}"


def _quoted(path: str) -> str:
    home = "~/"
    return home + shlex.quote(path[len(home) :]) if path.startswith(home) else shlex.quote(path)


_OF_TUNNELS = re.compile(r"channel [1-9]")  # whose server may have ended
FORWARDING_REFUSED = re.compile(r"^channel [1-9]\d*: open failed: administratively prohibited")
_MISSING = (
    "{host} has no kitty-nb on its PATH (or at LLAMACPP_SSH_BIN, if that is set). Install kitty_nb"
    " there (kitty-nb install-remote), or set LLAMACPP_SSH_BIN to the path of kitty-nb there."
)


def explain(host: str, code: int | None, said: tuple[str, ...]) -> str:
    """Explain why a connection ended, and name the remedy.

    Args:
        host: The machine.
        code: ssh's exit code; None while it runs.
        said: The last lines of its messages.
    """
    last = next((words for words in reversed(said) if re.search("[a-z]", words)), "").rstrip(".")
    if code == _NOT_FOUND:
        return _MISSING.format(host=host)
    if re.search("No such command 'serve'|No such option", last):
        return f"{host} has an older kitty_nb. Update it there."
    by_ssh = [words for words in said if not _OF_TUNNELS.match(words)]
    table = Path(__file__).with_name("ssh_failures.toml").read_text(encoding="utf-8")
    for row in tomllib.loads(table)["failure"] if code == _SSH_FAILED else ():
        if found := next((words for words in by_ssh if re.search(row["said"], words)), None):
            sentence: str = row["sentence"]
            return sentence.format(host=host, said=found.rstrip("."))
    return f"The connection to {host} ended{f': {last}' if last else ''}."


def _other_version(host: str, protocol: object, hello: object) -> str:
    theirs = hello.get("version", "?") if isinstance(hello, dict) else "?"
    return (
        f"{host} has kitty_nb {theirs} (protocol {protocol}), this machine {version('kitty_nb')}"
        f" (protocol {PROTOCOL}). Install the same version on both."
    )


def install(config: ServerConfig, source: str) -> None:
    """Install kitty_nb on the other machine, into an environment of its own; pip shows progress.

    Args:
        config: The settings that name the machine.
        source: A local wheel, which is sent; or anything that pip there can install. Either may end
            in extras, such as `[embedded]`.

    Raises:
        KittyError: The installation failed.
    """
    name, extras, rest = source.partition("[")
    wheel = Path(name)
    sent = wheel.read_bytes() if wheel.suffix == ".whl" and wheel.is_file() else b""
    script = f'set -e; d="$HOME/{_ENVIRONMENT}"; python3 -m venv "$d"; '
    what = shlex.quote(source)
    if sent:
        script += f'cat > "$d"/{shlex.quote(wheel.name)}; '
        what = f'"$d"/{shlex.quote(wheel.name + extras + rest)}'
    pip = '"$d/bin/pip" install --disable-pip-version-check'
    script += f"{pip} --upgrade {what}"
    if sent:  # else pip would keep an installed wheel of the same version
        script += f"; {pip} --force-reinstall --no-deps --quiet {what}"
    remote = f"exec sh -c {shlex.quote(script)}"
    command = ssh_command(config.ssh or "", remote, config.ssh_config, *_PLAIN, "-S", "none")
    if subprocess.run(command, input=sent, check=False).returncode:
        raise KittyError(
            f"{config.ssh} did not install {source}: see above. It needs Python 3.11 or later, with"
            " venv."
        )


def tunnel_command(config: ServerConfig) -> str:
    """Return the command that forwards the port of a server on another machine to this one."""
    tunnel = f"{LOOPBACK}:{config.port}:{urlsplit(config.endpoint).netloc}"
    return _by_hand(config, "-N", "-L", tunnel)


def doctor_command(config: ServerConfig) -> str:
    """Return the command that runs `kitty-nb doctor` on the machine of a profile."""
    program = config.ssh_bin or f"PATH=$PATH:$HOME/.local/bin:$HOME/{_ENVIRONMENT}/bin kitty-nb"
    return f"{_by_hand(config)} {shlex.quote(f'{program} doctor')}"


def _by_hand(config: ServerConfig, *options: str) -> str:
    own = ("-F", str(config.ssh_config)) if config.ssh_config else ()
    return shlex.join(("ssh", *own, *options, config.ssh or ""))
