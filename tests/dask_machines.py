"""A Dask cluster in a process of its own, until its input ends. It prints where it is."""

from __future__ import annotations

import json
import sys

from distributed import LocalCluster


def main() -> None:
    options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "threads_per_worker": 1}
    with LocalCluster(**options | json.loads(sys.argv[1])) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
