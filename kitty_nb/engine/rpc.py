"""A command that borrows devices of other machines, through a `ggml-rpc-server` on each.

The protocol of `ggml-rpc-server` is open to whoever reaches its port. So it listens on the other
machine's loopback, and is reached through an ssh tunnel. Run as a program, this module starts the
workers, and becomes the command once they answer; a child of it stays with the ssh processes.
Together they are one session, which outlives a kernel, and ends as a whole: a server without a
worker is killed rather than left to hang, and workers without a server end when their terminal
hangs up.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import socket
import sys
import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from threading import Event, Thread
from typing import TYPE_CHECKING, NamedTuple

import psutil

from kitty_nb.network import LOOPBACK, free_port, ssh_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kitty_nb.config import ServerConfig

_PORT = 50052  # ggml-rpc-server's own default
# Seconds.
_ANSWERS_WITHIN = 15.0  # a start tries twice, and the first time wakes a GPU's driver
_LOOK_EVERY = 0.2
_ENDS_WITHIN = 10.0  # a worker that can't listen; it inspects its devices first
_REFUSED_WITHIN = 0.2  # for ssh to close a connection that leads nowhere
_WITHOUT_KEY = ("env", "-u", "LLAMA_API_KEY")
_ON_PATH = """\
if p=$(command -v ggml-rpc-server || command -v rpc-server)
then "$p" --threads "$(getconf _NPROCESSORS_ONLN)" {where}
else echo no ggml-rpc-server on the PATH
fi"""
_ACCEPTED = "Accepted client"  # what a ggml-rpc-server logs for each connection
_END = "kitty_nb: end of the worker"  # ssh stays while something uses the tunnel
_AT = re.compile(r"^kitty_nb: RPC worker (?P<host>\S+) is at (?P<at>\S+)\r?$", re.MULTILINE)


class Worker(NamedTuple):
    """A machine whose devices are borrowed.

    Attributes:
        name: Its name in the settings: a machine as ssh knows it, optionally with the port on its
            loopback on which its ggml-rpc-server should listen.
        command: The command that starts it there, without its address; None for the one on the
            PATH.
        ssh_config: An ssh configuration file; None for the user's own.
    """

    name: str
    command: str | None
    ssh_config: str | None

    def ssh(self, here: int) -> tuple[str, ...]:
        """Return the command that starts it, with a tunnel to it from a port here."""
        host, _, port = self.name.partition(":")
        where = f"--host {LOOPBACK} --port {port or _PORT}"
        script = f"{self.command} {where}" if self.command else _ON_PATH.format(where=where)
        remote = shlex.join(("exec", "sh", "-c", f'{script}\necho "{_END}"'))
        # With a terminal, which hangs up on the worker when the connection ends.
        alone = "-tt", "-S", "none", "-oExitOnForwardFailure=yes"
        tunnel = "-L", f"{LOOPBACK}:{here}:{LOOPBACK}:{port or _PORT}"
        return (*_WITHOUT_KEY, *ssh_command(host, remote, self.ssh_config, *alone, *tunnel))


class _Started(NamedTuple):
    """A worker's ssh, with a tunnel from a port here; `accepted` is set when it says so."""

    name: str
    program: Popen[bytes]
    port: int
    accepted: Event


def with_workers(config: ServerConfig, command: tuple[str, ...]) -> tuple[str, ...]:
    """Return a command of llama-server that starts the workers of some settings first, if any."""
    words = shlex.join(config.rpc_command) or None
    ssh_config = str(config.ssh_config) if config.ssh_config else None
    workers = [Worker(name, words, ssh_config) for name in config.rpc_hosts]
    if not workers:
        return command
    return (sys.executable, "-P", "-m", __name__, json.dumps(workers), *command)


def by_host(text: str) -> str:
    """Replace the addresses of tunnels in a text with the names of the machines."""
    for found in _AT.finditer(text):
        text = text.replace(found["at"], found["host"])
    return text


def main(words: Sequence[str]) -> None:
    """Start the workers, and become the command, with their addresses."""
    workers = [Worker(*fields) for fields in json.loads(words[0])]
    first = free_port(count=len(workers))
    ports = range(first, first + len(workers))
    server, (ready, tell) = os.getpid(), os.pipe()
    if os.fork() == 0:
        os.close(ready)
        _attend(workers, ports, server, tell)
        os._exit(0)
    os.close(tell)
    if not os.read(ready, 1):
        sys.exit(1)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec keeps that
    addresses = ",".join(f"{LOOPBACK}:{port}" for port in ports)
    program, *arguments = words[1:]
    os.execvp(program, (program, "--rpc", addresses, *arguments))  # noqa: S606 (no shell)


def _attend(workers: Sequence[Worker], ports: Sequence[int], server: int, tell: int) -> None:
    """Run the workers while the server runs, and kill the server if one of them ends."""
    ended: SimpleQueue[str] = SimpleQueue()
    started: list[_Started] = []
    try:
        for worker, port in zip(workers, ports, strict=True):
            program = Popen(worker.ssh(port), stdin=DEVNULL, stdout=PIPE, stderr=STDOUT)
            started.append(_Started(worker.name, program, port, Event()))
            Thread(target=_relay, args=(started[-1], ended), daemon=True).start()
            _say(f"RPC worker {worker.name} is at {LOOPBACK}:{port}")
        for one in started:
            if problem := _why_silent(one, ended, server):
                return _say(problem)
        os.write(tell, b"1")
        while os.getppid() == server:
            if how := _next(ended, _LOOK_EVERY):
                _say(f"RPC worker {how}")
                os.kill(server, signal.SIGABRT)  # as llama.cpp does, if it notices
    finally:
        for one in started:
            one.program.terminate()


def _relay(worker: _Started, ended: SimpleQueue[str]) -> None:
    """Copy a worker's output into the log, and report how it ended."""
    assert worker.program.stdout  # noqa: S101 (it was asked for)
    said = ""
    for line in worker.program.stdout:
        words = line.decode(errors="replace").strip()
        if words == _END:
            break
        if words.startswith(_ACCEPTED):
            worker.accepted.set()
        _print(f"{worker.name}: {words}")
        if words and not words.startswith("Connection to "):  # ssh's own message at every end
            said = words
    ended.put(f"{worker.name} ended: {said}")


def _why_silent(worker: _Started, ended: SimpleQueue[str], server: int) -> str | None:
    """Wait until a worker answers; return why it doesn't.

    Another program on its port there answers, too. In that case, the worker ends once it has
    inspected its devices; a worker that accepts the connection says so.
    """
    deadline, answered_at = time.monotonic() + _ANSWERS_WITHIN, math.inf
    while os.getppid() == server and time.monotonic() < deadline:
        answers = _listens(worker.program.pid, worker.port) and _answers(worker.port)
        if how := _next(ended, 0.0 if answers else _LOOK_EVERY):
            return f"RPC worker {how}"
        if answers:
            answered_at = min(answered_at, time.monotonic())
            if worker.accepted.wait(_LOOK_EVERY) or time.monotonic() - answered_at > _ENDS_WITHIN:
                return None
    return f"RPC worker {worker.name} ended: no answer in {_ANSWERS_WITHIN:.0f} s"


def _listens(pid: int, port: int) -> bool:
    """Return whether it is this process that listens: a faster one would get the model."""
    with suppress(psutil.Error):
        found = psutil.Process(pid).net_connections("tcp")
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in found)
    return False


def _answers(port: int) -> bool:
    """Return whether a tunnel leads to a worker: ssh closes a connection that leads nowhere."""
    with suppress(OSError), socket.create_connection((LOOPBACK, port), _REFUSED_WITHIN) as one:
        one.settimeout(_REFUSED_WITHIN)
        try:
            return bool(one.recv(1))
        except TimeoutError:
            return True
    return False


def _next(ended: SimpleQueue[str], seconds: float) -> str | None:
    with suppress(Empty):
        return ended.get(timeout=seconds)
    return None


def _say(sentence: str) -> None:
    _print(f"kitty_nb: {sentence}")


def _print(line: str) -> None:
    with suppress(OSError):  # a full disk must not stop the watch over the workers
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
