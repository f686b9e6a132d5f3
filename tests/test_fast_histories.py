"""Histories of minutes, in simulated time and on simulated processes."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

import anyio
import pytest
from fast_time import SimulatedProcess, clock, simulated

from kitty_nb import HealthCheckResult, ServerConfig, ServerState, ServerStatus, Supervisor
from kitty_nb.errors import ServerCrashedError, ServerFailedError
from kitty_nb.supervisor.events import Activity, Event, StateChanged
from kitty_nb.supervisor.health import NOT_IN_TIME
from kitty_nb.supervisor.registry import last_failure, record_path
from kitty_nb.supervisor.sidecar import withdraw

Misbehaving = Callable[..., ServerConfig]


class NeverReady(SimulatedProcess):
    ready_after = 1e9


class NeverListening(NeverReady):
    listens_after = 1e9


class SlowLoad(SimulatedProcess):
    ready_after = 15.0


class LogsAsItEnds(SimulatedProcess):
    log_path: Path

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        descriptors: Collection[int] = (),
    ) -> Self:
        process = super().spawn(command, log_path, environment, descriptors)
        process.log_path = log_path
        process.end(7)
        return process

    async def wait(self) -> int | None:
        code = await super().wait()
        self.log_path.write_text("loading model\n")
        return code


async def reach(supervisor: Supervisor, condition: Callable[[ServerState], bool]) -> None:
    with anyio.fail_after(300):
        while not condition(supervisor.state):
            await anyio.sleep(0.5)


def said(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Activity)]


def test_a_load_that_hangs_is_given_up_and_killed_after_its_grace(
    misbehaving: Misbehaving,
) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start(wait_for_ready=False, anyway=True)
        await reach(supervisor, lambda state: state.status is ServerStatus.LOADING)
        began = clock()
        SimulatedProcess.latest.paused = True
        await reach(supervisor, lambda state: state.status is ServerStatus.FAILED)
        assert clock() - began >= 30 + 12
        assert "stalled in the stage" in (supervisor.state.error or "")

    simulated(misbehaving(stall_seconds=30, stop_grace_seconds=12), scenario, NeverReady)


def test_a_load_that_is_being_stopped_has_not_stalled(misbehaving: Misbehaving) -> None:
    config = misbehaving(stall_seconds=30, stop_grace_seconds=60)

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start(wait_for_ready=False, anyway=True)
        await reach(supervisor, lambda state: state.status is ServerStatus.LOADING)
        SimulatedProcess.latest.paused = True
        began = clock()
        assert (await supervisor.stop()).status is ServerStatus.STOPPED
        assert clock() - began > config.stall_seconds

    simulated(config, scenario, NeverReady)
    assert last_failure(config) is None


def test_a_ready_server_that_hangs_is_said_to_hang_and_to_serve_again(
    misbehaving: Misbehaving,
) -> None:
    async def scenario(supervisor: Supervisor, events: list[Event]) -> None:
        await supervisor.start(anyway=True)

        async def told(words: str) -> None:
            await reach(supervisor, lambda _: any(words in line for line in said(events)))

        SimulatedProcess.latest.paused = True
        await told("not responding (no answer in time)")
        SimulatedProcess.latest.paused = False
        await told("The server is responding again.")

    simulated(misbehaving(), scenario)


def test_a_crashed_server_waits_out_its_back_off_and_serves_again(
    misbehaving: Misbehaving,
) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        for crashes, seconds in ((1, 20), (2, 40), (3, 60)):
            await reach(supervisor, lambda state: state.status is not ServerStatus.RESTARTING)
            await supervisor.start(anyway=True)
            SimulatedProcess.latest.end(-signal.SIGSEGV)
            await reach(supervisor, lambda state: state.status is ServerStatus.RESTARTING)
            crashed = clock()
            await reach(supervisor, lambda state: state.status is ServerStatus.READY)
            assert crashes == supervisor.state.restart_count
            assert seconds <= clock() - crashed < seconds + 2
        SimulatedProcess.latest.end(-signal.SIGSEGV)
        await reach(supervisor, lambda state: state.status is ServerStatus.CRASHED)

    config = misbehaving(restart_delay_seconds=20, restart_delay_max_seconds=60)
    events = simulated(config, scenario)
    assert any("Restarting in 20 s (1 of 3)." in line for line in said(events))
    assert [e.state.status for e in events if isinstance(e, StateChanged)][-1] == "CRASHED"


def test_the_count_of_checks_never_exceeds_its_highest_and_the_load_goes_on(
    misbehaving: Misbehaving,
) -> None:
    counts: list[int] = []

    def counted(_: HealthCheckResult, attempt: int, highest: int) -> None:
        assert highest == 2
        counts.append(attempt)

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start(on_progress=counted, anyway=True)

    events = simulated(misbehaving(health_max_attempts=2, stall_seconds=300), scenario, SlowLoad)
    assert len(counts) >= 15
    assert max(counts) == 2
    assert any(re.fullmatch(r"Loading model… \(\d+s elapsed\)", line) for line in said(events))


def test_a_server_that_never_listens_is_given_up(misbehaving: Misbehaving) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        with pytest.raises(ServerFailedError, match="stalled in the stage 'starting'"):
            await supervisor.start(anyway=True)

    simulated(misbehaving(stall_seconds=40), scenario, NeverListening)


def test_a_server_whose_load_is_read_only_after_its_end_has_crashed(
    misbehaving: Misbehaving,
) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        with pytest.raises(ServerCrashedError, match="exit code 7"):
            await supervisor.start(anyway=True)

    simulated(misbehaving(), scenario, LogsAsItEnds)


def test_a_server_that_is_being_stopped_is_not_said_to_hang(misbehaving: Misbehaving) -> None:
    config = misbehaving()

    async def scenario(supervisor: Supervisor, events: list[Event]) -> None:
        await supervisor.start(anyway=True)
        SimulatedProcess.latest.paused = True
        withdraw(record_path(config))  # as another program does that stops it
        await reach(supervisor, lambda state: state.last_health_check == NOT_IN_TIME)
        await supervisor.stop(force=True)
        assert not any("not responding" in line for line in said(events))

    simulated(config, scenario)
