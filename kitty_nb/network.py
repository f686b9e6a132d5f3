"""The network: which ports are free, how ssh is run, what certificates are verified with."""

from __future__ import annotations

import errno
import random
import socket
from typing import TYPE_CHECKING

from kitty_nb.errors import KittyError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Collection

LOOPBACK = "127.0.0.1"
# Below those that systems give to connections: one of these may have a port before the server that
# it was chosen for. ip_local_port_range in ip(7).
_PORTS = (20_000, 32_000)
_TRIES = 1000
# Nobody is there to answer ssh, and nothing is believed that nobody has checked.
_SSH_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "8",  # seconds
    # A line that is dead is noticed, also while nobody asks anything.
    "ServerAliveInterval": "2",
    "ServerAliveCountMax": "3",
    # Whatever the user's configuration says of the connections that a person makes.
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "ControlPersist": "no",
}


def free_port(host: str = LOOPBACK, count: int = 1, but: Collection[int] = ()) -> int:
    """Return the first of `count` free ports in a row, none of them in `but`.

    Another program may take one before it is used.

    Raises:
        OSError: `host` is not an address of this machine, or a thousand tries found none.
    """
    taken = OSError(errno.EADDRINUSE, "no free port")
    for _ in range(_TRIES):
        first = random.SystemRandom().randrange(*_PORTS)  # whatever seed a notebook sets
        if not set(but).isdisjoint(range(first, first + count)):
            continue
        try:
            for port in range(first, first + count):
                with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
                    trial.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            taken = error
        else:
            return first
    raise taken


def ssh_command(host: str, remote: str, file: object, *words: str) -> tuple[str, ...]:
    """Return the command that runs another one on another machine.

    Args:
        host: The machine, as ssh knows it.
        remote: What the shell there runs.
        file: The file with ssh's configuration; None for the user's own.
        *words: More options of ssh.
    """
    own = ("-F", str(file)) if file else ()
    options = (f"-o{name}={value}" for name, value in _SSH_OPTIONS.items())
    return ("ssh", *own, *options, *words, "--", host, remote)


def tls_context(url: str) -> ssl.SSLContext:
    """Return what verifies the certificate of a server.

    The authorities are those of Mozilla and of the system, or of the file that `SSL_CERT_FILE`
    names. For plain HTTP there are none: loading them takes 30 ms of every start.

    Args:
        url: The server's address.

    Raises:
        KittyError: That file can't be used.
    """
    # A start should wait neither for these nor for settings.
    if not url.startswith("https:"):
        import ssl  # noqa: PLC0415

        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    import httpx  # noqa: PLC0415

    try:
        context = httpx.create_ssl_context()
        context.load_default_certs()
    except OSError as error:
        from kitty_nb.config import user_variables  # noqa: PLC0415

        named = user_variables(("SSL_CERT_FILE", "SSL_CERT_DIR")).items()
        variable, place = next(iter(named), ("the system", "the usual place"))
        problem = f"There are no certificates in {place}, which {variable} names ({error})."
        raise KittyError(problem) from None
    return context
