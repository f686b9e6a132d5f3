"""Another program that manages servers, as a second notebook does."""

from __future__ import annotations

import subprocess
import sys

import psutil

from kitty_nb import ServerConfig

_KERNEL = """
import os, sys, time
from kitty_nb import ModelManager, ServerConfig
from kitty_nb.supervisor.sidecar import Sidecar
if sys.argv[2] == "die":
    def die(sidecar, process, idle_seconds):
        print(process.pid, flush=True)
        os.kill(os.getpid(), 9)
    Sidecar.watch = die
config = ServerConfig.model_validate_json(sys.argv[1])
manager = ModelManager(config=config)
start = manager.start()
while sys.argv[2] == "load" and manager.state.pid is None:
    time.sleep(0.01)
print(manager.state.pid if sys.argv[2] == "load" else start.wait(60).pid, flush=True)
if sys.argv[2] != "end":
    sys.stdin.read()  # as long as the test's process
"""


def runs(pid: int) -> bool:
    """True if it does; an orphan that has ended may stay listed until init looks."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Kernel:
    """Another program that manages the same profile.

    Args:
        config: What it starts.
        then: "end" once the server is ready, "stay", or "load": stay, and do not wait for ready;
            or "die": be killed before it can tell anybody which process its server is.
        under: The words of a program that runs it.

    Attributes:
        server: The process id of its server.
    """

    def __init__(self, config: ServerConfig, then: str, under: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*under, sys.executable, "-c", _KERNEL, config.model_dump_json(), then],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "it has started no server; why is above, in what it wrote to stderr"
        self.server = int(line)

    def end(self, number: int | None = None) -> None:
        if number is not None:
            self.process.send_signal(number)
        self.process.communicate(timeout=30)
