"""A server over loopback ssh against one here: ready lag, bar, first token; and 50 cut connections.

Each figure is measured beside its yardstick in one run: `python -m benchmarks.remote [--engine
PATH] [--model PATH]`. It needs sshd (Debian's `openssh-server`), which runs on loopback with its
own keys. Long loads, for the bar and for cuts during a load, are those of the tests' stand-in
server, which reads its model at an even pace.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING

import psutil

from benchmarks.subject import read_subject, row, stand_in
from kitty_nb import ModelManager, ServerStatus
from kitty_nb.errors import KittyError
from kitty_nb.network import free_port
from kitty_nb.supervisor.events import ProgressMade, StateChanged
from kitty_nb.supervisor.registry import find_server
from tests.ssh_machine import SshMachine, ssh_machine

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from kitty_nb import ServerConfig
    from kitty_nb.operation import Operation
    from kitty_nb.supervisor.events import Event

_RUNS, _BARS, _REQUESTS, _CUTS = 15, 5, 100, 50
_HANG = 10.0  # seconds


def main() -> None:
    """Print the table."""
    subject = read_subject(__doc__)
    with subject.folder() as folder, ssh_machine(folder / "there", free_port()) as there:
        config = subject.config(folder, 100_000_000, context_size=2048, threads=1, parallel=1)
        remote = config.replace(ssh="there", ssh_config=there.client)
        slow = config.replace(
            binary=stand_in(folder), extra_args=("--load-seconds", "2"), log_dir=folder / "slow"
        )
        far = slow.replace(ssh="there", ssh_config=there.client)
        _lags(config, remote)
        _bars(slow, far)
        _first_tokens(remote)
        _cuts(remote, far, there)


def _lags(here: ServerConfig, there: ServerConfig) -> None:
    """Compare how late each learns that a server is ready, by the clock that both share."""
    lags: dict[bool, list[float]] = {False: [], True: []}
    starts: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(_RUNS):
        for remote, config in ((False, here), (True, there)):
            with ModelManager(config=config) as manager:
                seen: list[float] = []

                def note(event: Event, seen: list[float] = seen) -> None:
                    if isinstance(event, StateChanged) and event.state.status == "READY":
                        seen.append(time.monotonic())

                manager.subscribe(note)
                began = time.monotonic()
                manager.start().wait(60)
                starts[remote].append(time.monotonic() - began)
                record = find_server(here)
                assert record
                assert record.ready
                lags[remote].append(seen[0] - record.ready)
                manager.stop().wait(60)
    own, other = (statistics.median(lags[one]) * 1000 for one in (False, True))
    row("delay of READY, here", f"{own:.1f} ms (median of {_RUNS})")
    row("delay of READY, over ssh", f"{other:.1f} ms: + {other - own:.1f} ms")
    own, other = (statistics.median(starts[one]) for one in (False, True))
    row("start to READY", f"{own:.3f} s here, {other:.3f} s over ssh (medians)")


def _bars(here: ServerConfig, there: ServerConfig) -> None:
    _bar(here), _bar(there)  # from here on the history knows how long it takes
    found = [(_bar(here), _bar(there)) for _ in range(_BARS)]
    own, other = (statistics.median(rates) for rates in zip(*found, strict=True))
    row("bar updates per second", f"{own:.1f} here, {other:.1f} over ssh (medians of {_BARS})")


def _bar(config: ServerConfig) -> float:
    told: list[float] = []
    with ModelManager(config=config) as manager:
        manager.subscribe(
            lambda event: told.append(time.monotonic()) if isinstance(event, ProgressMade) else None
        )
        manager.start().wait(60)
        manager.stop().wait(60)
    return (len(told) - 1) / (told[-1] - told[0])


def _first_tokens(config: ServerConfig) -> None:
    """Ask one server alternately, directly and through the tunnel."""
    with ModelManager(config=config) as manager:
        manager.start().wait(60)
        tunnel = manager.access
        direct = type(tunnel)(config.endpoint, tunnel.api_key)
        found: dict[str, list[float]] = {"direct": [], "tunnel": []}
        with direct.http() as one, tunnel.http() as other:
            for _ in range(_REQUESTS):
                for name, http in (("direct", one), ("tunnel", other)):
                    found[name].append(_first_token(http))
        manager.stop().wait(60)
    medians = {name: statistics.median(times) * 1000 for name, times in found.items()}
    added = medians["tunnel"] - medians["direct"]
    row("first token, direct", f"{medians['direct']:.1f} ms (median of {_REQUESTS})")
    row("first token, through ssh", f"{medians['tunnel']:.1f} ms: + {added:.1f} ms")


def _first_token(http: httpx.Client) -> float:
    request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}
    began, first = time.monotonic(), 0.0
    with http.stream("POST", "/v1/chat/completions", json=request) as answer:
        for line in answer.iter_lines():
            told = json.loads(line[6:]) if not first and line.startswith("data: {") else None
            if told and told["choices"][0]["delta"].get("content"):
                first = time.monotonic() - began
    return first


class _Cuts:
    """The outcome of cuts: seconds until each was noticed and repaired, and the failures."""

    def __init__(self, manager: ModelManager, there: SshMachine) -> None:
        self._manager, self._there = manager, there
        self.back: list[float] = []
        self.hangs = self.lost = 0

    def cut(self, under_way: Operation[object] | None = None) -> None:
        """Kill ssh, and wait until the server is watched again."""
        pid, changes = self._manager.state.pid, []
        unsubscribe = self._manager.subscribe(
            lambda event: changes.append(event) if isinstance(event, StateChanged) else None
        )
        began = time.monotonic()
        assert self._there.cut()
        if under_way:
            try:
                under_way.wait(_HANG)
            except KittyError:
                self.hangs += time.monotonic() - began >= _HANG
        lost = ServerStatus.OUT_OF_REACH
        _until(lambda: any(one.state.status is lost for one in changes))
        _until(lambda: self._manager.state.status is not lost)
        self.back.append(time.monotonic() - began)
        unsubscribe()
        alive = pid is not None and psutil.pid_exists(pid)
        self.lost += not (alive and self._manager.state.pid == pid)


def _cuts(config: ServerConfig, slow: ServerConfig, there: SshMachine) -> None:
    for what, some in (("load", slow), ("ready", config), ("chat", config)):
        with ModelManager(config=some) as manager:
            cuts = _Cuts(manager, there)
            if what != "load":
                manager.start().wait(60)
            for _ in range(_CUTS // 3 + (what == "chat") * 2):
                if what == "load":
                    start = manager.start()
                    _until(lambda: manager.state.pid)
                    cuts.cut(start)
                    _until(lambda: manager.state.status is ServerStatus.READY)
                    manager.stop().wait(60)
                elif what == "ready":
                    cuts.cut(manager.check_health())
                else:
                    pieces: list[object] = []
                    chat = manager.chat("Tell a story.", pieces.append, max_tokens=1000)
                    _until(lambda pieces=pieces: pieces)
                    cuts.cut(chat)
            if what != "load":
                manager.stop().wait(60)
        row(
            f"{len(cuts.back)} cuts during {what}",
            f"back after {statistics.median(cuts.back):.2f} s, at most {max(cuts.back):.2f} s;"
            f" {cuts.hangs} hangs, {cuts.lost} servers lost",
        )


def _until(condition: Callable[[], object]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 60
        time.sleep(0.002)


if __name__ == "__main__":
    main()
