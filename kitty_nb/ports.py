"""Ports of this machine."""

from __future__ import annotations

import errno
import random
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

LOOPBACK = "127.0.0.1"
# Below those that systems give to connections: one of these may have a port before the server that
# it was chosen for. ip_local_port_range in ip(7).
_PORTS = (20_000, 32_000)
_TRIES = 1000


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
