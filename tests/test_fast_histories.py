"""Histories of minutes, on a clock that runs faster than the machine's."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable

import anyio
import pytest
from fast_time import RATE, clock, supervised_fast

from kitty_nb import HealthCheckResult, ServerConfig, ServerState, ServerStatus, Supervisor
from kitty_nb.errors import ServerFailedError
from kitty_nb.supervisor.events import Activity, Event, StateChanged

Misbehaving = Callable[..., ServerConfig]


async def reach(supervisor: Supervisor, condition: Callable[[ServerState], bool]) -> None:
    with anyio.fail_after(30 * RATE):
        while not condition(supervisor.state):
            await anyio.sleep(0.05)


def said(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Activity)]


def test_a_load_under_sigstop_is_given_up_and_killed_after_its_grace(
    misbehaving: Misbehaving,
) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start(wait_for_ready=False)
        await reach(supervisor, lambda state: state.status is ServerStatus.LOADING)
        pid, began = supervisor.state.pid, clock()
        assert pid
        os.kill(pid, signal.SIGSTOP)
        await reach(supervisor, lambda state: state.status is ServerStatus.FAILED)
        assert clock() - began >= 30 + 12
        assert "stalled in the stage" in (supervisor.state.error or "")

    supervised_fast(misbehaving("--never-ready", stall_seconds=30, stop_grace_seconds=12), scenario)


def test_a_ready_server_under_sigstop_is_said_to_hang_and_to_serve_again(
    misbehaving: Misbehaving,
) -> None:
    async def scenario(supervisor: Supervisor, events: list[Event]) -> None:
        pid = (await supervisor.start()).pid
        assert pid

        async def told(words: str) -> None:
            await reach(supervisor, lambda _: any(words in line for line in said(events)))

        os.kill(pid, signal.SIGSTOP)
        await told("not responding (no answer in time)")
        os.kill(pid, signal.SIGCONT)
        await told("The server is responding again.")

    supervised_fast(misbehaving(), scenario)


def test_a_crashed_server_waits_out_its_back_off_and_serves_again(
    misbehaving: Misbehaving,
) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        first = await supervisor.start()
        assert first.pid
        os.kill(first.pid, signal.SIGKILL)
        await reach(supervisor, lambda state: state.status is ServerStatus.RESTARTING)
        crashed = clock()
        await reach(supervisor, lambda state: state.status is ServerStatus.READY)
        assert clock() - crashed > 15

    events = supervised_fast(misbehaving(restart_delay_seconds=20), scenario)
    assert any("Restarting in 20 s (1 of 3)." in line for line in said(events))
    assert [e.state.status for e in events if isinstance(e, StateChanged)][-1] == "STOPPED"


def test_the_count_of_checks_never_exceeds_its_highest_and_the_load_goes_on(
    misbehaving: Misbehaving,
) -> None:
    counts: list[int] = []

    def counted(_: HealthCheckResult, attempt: int, highest: int) -> None:
        assert highest == 2
        counts.append(attempt)

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start(on_progress=counted)

    config = misbehaving("--load-seconds", "1.5", health_max_attempts=2, stall_seconds=300)
    events = supervised_fast(config, scenario)
    assert len(counts) >= 4
    assert max(counts) == 2
    assert any(re.fullmatch(r"Loading model… \(\d+s elapsed\)", line) for line in said(events))


def test_a_server_that_never_listens_is_given_up(misbehaving: Misbehaving) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        with pytest.raises(ServerFailedError, match="stalled in the stage 'starting'"):
            await supervisor.start()

    supervised_fast(misbehaving("--bind-after", "60", stall_seconds=40), scenario)
