"""The network: free ports, ssh commands, and the verification of certificates."""

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
# Below those that systems assign to connections, which might take a port before the server that it
# was chosen for. See ip_local_port_range in ip(7).
_PORTS = (20_000, 32_000)
_TRIES = 1000
# Nobody is there to answer ssh's questions, and no host key is accepted that nobody has checked.
_SSH_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "8",  # seconds
    # A dead connection is noticed, even while it is idle.
    "ServerAliveInterval": "2",
    "ServerAliveCountMax": "3",
    # Whatever the user's configuration says about connections made by people.
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
        first = random.SystemRandom().randrange(*_PORTS)  # regardless of a notebook's seed
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
    """Return the command that runs a command on another machine.

    Args:
        host: The machine, as ssh knows it.
        remote: What the shell there runs.
        file: The ssh configuration file; None for the user's own.
        *words: Further options of ssh.
    """
    own = ("-F", str(file)) if file else ()
    options = (f"-o{name}={value}" for name, value in _SSH_OPTIONS.items())
    return ("ssh", *own, *options, *words, "--", host, remote)


def tls_context(url: str) -> ssl.SSLContext:
    """Return the context that verifies a server's certificate.

    The authorities are Mozilla's and the system's, or those in the file that `SSL_CERT_FILE` names.
    For plain HTTP there are none: loading them would take 30 ms of every start.

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
        variable, place = next(iter(named), ("", "the usual place"))
        fix = f"Correct {variable}." if variable else "Set SSL_CERT_FILE to a file with some."
        raise KittyError(f"There are no certificates in {place} ({error}). {fix}") from None
    return context
