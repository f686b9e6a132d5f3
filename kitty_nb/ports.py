"""Ports of this machine."""

from __future__ import annotations

import errno
import random
import socket

LOOPBACK = "127.0.0.1"
# Below those that systems give to connections: one of these may have a port before the server that
# it was chosen for. ip_local_port_range in ip(7).
_PORTS = (20_000, 32_000)
_TRIES = 1000


def free_port(host: str = LOOPBACK, count: int = 1) -> int:
    """Return a port that nothing listens on, of so many in a row the first.

    Another program may be faster to take it.

    Raises:
        OSError: `host` is no address of this machine, or a thousand tries found none.
    """
    taken = OSError(errno.EADDRINUSE, "no free port")
    for _ in range(_TRIES):
        first = random.SystemRandom().randrange(*_PORTS)  # whatever seed a notebook sets
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
