"""Simulated time and processes: a history of minutes replays in milliseconds."""

from __future__ import annotations

import asyncio
import itertools
import selectors
import signal
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from kitty_nb import HealthCheckResult, ServerConfig, ServerStatus, Supervisor
from kitty_nb.engine.locate import locate_engine
from kitty_nb.supervisor.events import Event
from kitty_nb.supervisor.health import NOT_IN_TIME, NOT_YET, HealthProbe, Identity
from kitty_nb.supervisor.process import ServerProcess, Usage
from kitty_nb.supervisor.server import Server

_NUMBERS = itertools.count(1 << 23)  # more than a system gives


class _Selector(selectors.DefaultSelector):
    """Jumps to the next timer when nothing else is to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.threads: anyio.CapacityLimiter | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout and not (self.threads and self.threads.borrowed_tokens):
            self.now += timeout
            timeout = 0.0
        return super().select(timeout)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.selector = _Selector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def clock() -> float:
    """Seconds of the simulation."""
    return asyncio.get_running_loop().time()


class SimulatedProcess(ServerProcess):
    """A server that is there on the loop alone. It loads for a while and is READY from then on."""

    listens_after = 0.1  # seconds
    ready_after = 0.5
    latest: SimulatedProcess

    def __init__(self) -> None:
        self.pid, self.create_time = next(_NUMBERS), 0.0
        self.paused = False
        self._began = clock()
        self._over = anyio.Event()
        self._code = 0

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        descriptors: Collection[int] = (),
    ) -> Self:
        log_path.touch()
        SimulatedProcess.latest = process = cls()
        return process

    def end(self, code: int) -> None:
        self._code = self._code if self._over.is_set() else code
        self._over.set()

    def answer(self) -> HealthCheckResult:
        age = clock() - self._began
        if self.paused:
            return NOT_IN_TIME
        if age < self.listens_after:
            return NOT_YET
        if age < self.ready_after:
            return HealthCheckResult(ServerStatus.LOADING, 0.0, "loading model")
        return HealthCheckResult(ServerStatus.READY, 0.0, "ok")

    async def wait(self) -> int | None:
        await self._over.wait()
        return self._code

    async def terminate(self, grace: float) -> None:
        if self.paused:
            await anyio.sleep(grace)
            self.kill()
        self.end(0)

    def kill(self) -> None:
        self.end(-signal.SIGKILL)

    def runs(self) -> bool:
        return not self._over.is_set()

    def usage(self) -> Usage | None:
        return Usage(0, 0)

    def listens_on(self, port: int) -> bool | None:
        return True


async def _answer(probe: HealthProbe, **_: object) -> HealthCheckResult:
    await anyio.lowlevel.checkpoint()
    assert isinstance(probe.process, SimulatedProcess)
    return probe.process.answer()


def simulated(
    config: ServerConfig,
    scenario: Callable[[Supervisor, list[Event]], Coroutine[Any, Any, None]],
    processes: type[SimulatedProcess] = SimulatedProcess,
) -> list[Event]:
    """Run a scenario in simulated time, on simulated processes; return all events, in order."""
    events: list[Event] = []

    async def nothing(_: object) -> None:
        await anyio.lowlevel.checkpoint()

    async def identify(_: object) -> Identity:
        return Identity.OURS

    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, _Loop)
        loop.selector.threads = anyio.to_thread.current_default_thread_limiter()
        with anyio.fail_after(3600):
            async with Supervisor(config, clock=clock, processes=processes) as supervisor:
                supervisor.subscribe(events.append)
                await scenario(supervisor, events)

    anyio.run(locate_engine, config.binary)  # asked once, in real time
    with pytest.MonkeyPatch.context() as patch:
        for name in ("check", "check_activity"):
            patch.setattr(HealthProbe, name, _answer)
        patch.setattr(HealthProbe, "identify", identify)
        for name in ("_tend_sidecar", "_name_devices"):
            patch.setattr(Server, name, nothing)
        patch.setattr(HealthProbe, "first_answer", nothing)
        patch.setattr("kitty_nb.supervisor.server._LOG_LOADING", 0.5)  # there is no log to read
        anyio.run(run, backend_options={"loop_factory": _Loop})
    return events
