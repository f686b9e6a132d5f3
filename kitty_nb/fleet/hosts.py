"""The machines of a Dask cluster, to borrow their devices."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Client


def rpc_hosts(client: Client) -> tuple[str, ...]:
    """Return the host names of a cluster's workers, for the setting `rpc_hosts`.

    ssh starts a ggml-rpc-server on each, so it must reach them by these names; Dask does nothing
    else. Workers that join later are not included.

    Args:
        client: A client of the cluster.
    """
    return tuple(sorted(set(client.run(socket.gethostname).values())))
