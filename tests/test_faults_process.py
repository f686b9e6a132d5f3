"""Faults of a server's process, its kernel and its clock: each row on the real engine,
unless only the stand-in can produce it."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import eventually
from faults import CRASHED, FAILED, LOADING, READY, STOPPED, Case, Fault
from other_kernel import Kernel, runs

from kitty_nb import ServerConfig, ServerStatus
from kitty_nb.config import OnKernelExit

Strike = Callable[[Case], object]
DAY = 86_400.0
STUCK = ("--never-ready",)

_KILLED = r"killed by SIGKILL\. (Something|Another program or a person|The system) killed it"


def send(number: signal.Signals) -> Strike:
    return lambda case: case.signal(number)


def pause(case: Case) -> None:
    process = psutil.Process(case.pid)
    case.heal.callback(lambda: process.is_running() and process.resume())
    process.suspend()


def stop_paused(case: Case) -> None:
    pause(case)
    case.manager.stop()


def kill_while_it_stops(case: Case) -> None:
    case.manager.stop()
    eventually(lambda: case.manager.state.status is ServerStatus.STOPPING)
    case.signal(signal.SIGKILL)


def hang_drive(case: Case) -> None:
    """Opening the model waits for ever, as on a network drive that is gone."""

    def hang() -> None:
        case.model.unlink()
        os.mkfifo(case.model)

    case.at_spawn(hang)


def die_again_and_again(case: Case) -> None:
    dead: set[int | None] = set()

    def lives() -> bool:
        state = case.manager.state
        return state.status is ServerStatus.READY and state.pid not in dead

    for _ in range(1 + case.config.restart_max):
        eventually(lives)
        dead.add(case.pid)
        case.signal(signal.SIGSEGV)


def die_and_lose_port(case: Case) -> None:
    case.signal(signal.SIGKILL)
    eventually(lambda: case.manager.state.status is ServerStatus.RESTARTING)
    case.heal.enter_context(socket.create_server(("127.0.0.1", case.config.port)))


def die_and_lose_model(case: Case) -> None:
    case.signal(signal.SIGKILL)
    eventually(lambda: case.manager.state.status is ServerStatus.RESTARTING)
    case.model.unlink()


def set_clock(by: float) -> Strike:
    """The system's clock is set; it is also what psutil takes the time of boot from."""

    def jump(case: Case) -> None:
        patch = case.heal.enter_context(pytest.MonkeyPatch.context())
        now = time.time
        patch.setattr(time, "time", lambda: now() + by)
        if psutil.LINUX:
            booted = psutil._pslinux.boot_time
            patch.setattr(psutil._pslinux, "boot_time", lambda: booted() + by)

    return jump


def is_the_others(case: Case) -> None:
    assert case.pid == case.other
    uptime_is_true(case)


def uptime_is_true(case: Case) -> None:
    uptime = case.manager.state.uptime
    assert uptime is not None
    assert 0 <= uptime < 60


def set_clock_while_ready(case: Case) -> None:
    set_clock(DAY)(case)
    uptime_is_true(case)
    assert case.manager.restart().wait(10).status is READY
    uptime_is_true(case)


def delete_log(case: Case) -> None:
    case.config.log_path.unlink()


def killed_kernel(then: str, server_ends: bool, and_then: Strike | None = None) -> Strike:
    def kill(case: Case) -> None:
        kernel = Kernel(case.config, then)
        case.other = kernel.server
        case.last.callback(lambda: runs(kernel.server) and os.kill(kernel.server, signal.SIGKILL))
        kernel.end(signal.SIGKILL)
        if server_ends:
            eventually(lambda: not runs(kernel.server), why="the server outlives its kernel")
        else:
            assert runs(kernel.server)
        if and_then:
            and_then(case)

    return kill


DEATHS = [
    Fault(
        "kill -9 while loading",
        CRASHED,
        _KILLED,
        before=hang_drive,
        at=LOADING,
        strike=send(signal.SIGKILL),
        within=5,
    ),
    *(
        Fault(
            f"{number.name} while ready",
            CRASHED,
            f"{says}",
            at=READY,
            strike=send(number),
            within=5,
        )
        for number, says in (
            (
                signal.SIGKILL,
                _KILLED,
            ),
            (signal.SIGSEGV, "SIGSEGV.* because of a bug"),
            (signal.SIGABRT, "SIGABRT.* aborted on an internal error"),
            (signal.SIGBUS, "SIGBUS.* disk became unavailable"),
            (signal.SIGTERM, "program or a person asked it to exit"),
            (signal.SIGINT, "program or a person asked it to exit"),
        )
    ),
    Fault(
        "kill -9 while stopping",
        STOPPED,
        at=READY,
        strike=kill_while_it_stops,
        flags=("--ignore-sigterm",),
        changes={"stop_grace_seconds": 30},
        within=5,
    ),
    Fault(
        "memory runs out while loading",
        CRASHED,
        "exit code 1: failed to allocate buffer for kv",
        flags=(
            *STUCK,
            "--exit-after",
            "0.2",
            "--exit-code",
            "1",
            "--last-words",
            "failed to allocate buffer for kv cache",
        ),
    ),
    Fault(
        "disk fails while loading",
        CRASHED,
        "disk that holds the model cannot be read",
        flags=(
            *STUCK,
            "--exit-after",
            "0.2",
            "--exit-code",
            "1",
            "--last-words",
            "read error: Input/output error",
        ),
    ),
    Fault(
        "it dies again and again",
        CRASHED,
        "SIGSEGV",
        at=READY,
        strike=die_again_and_again,
        flags=(),
        changes={"restart_max": 2, "restart_delay_seconds": 0.1},
        within=30,
    ),
    Fault(
        "it dies and its port is taken",
        FAILED,
        "in use by",
        at=READY,
        strike=die_and_lose_port,
        changes={"restart_max": 3, "restart_delay_seconds": 3},
    ),
    Fault(
        "it dies and its model is deleted",
        CRASHED,
        "File not found",
        at=READY,
        strike=die_and_lose_model,
        changes={"restart_max": 3, "restart_delay_seconds": 3},
    ),
]
HANGS = [
    Fault(
        "drive of the model hangs",
        FAILED,
        "stalled in the stage",
        before=hang_drive,
        changes={"stall_seconds": 1},
    ),
    Fault(
        "SIGSTOP while loading",
        FAILED,
        "stalled in the stage",
        before=hang_drive,
        at=LOADING,
        strike=pause,
        changes={"stall_seconds": 5},
        within=30,
    ),
    Fault(
        "SIGSTOP while ready",
        READY,
        r"not responding \(no answer in time\)",
        at=READY,
        strike=pause,
        within=15,
    ),
    Fault("stop of a server under SIGSTOP", STOPPED, at=READY, strike=stop_paused, within=5),
    Fault(
        "it never listens",
        FAILED,
        "stalled in the stage 'starting'",
        flags=("--bind-after", "60"),
        changes={"stall_seconds": 1},
    ),
    Fault(
        "it never becomes ready",
        FAILED,
        "stalled in the stage 'loading weights'",
        flags=STUCK,
        changes={"stall_seconds": 4},
    ),
    Fault(
        "another model answers",
        FAILED,
        "it answers, but not as",
        flags=("--answer-as", "stranger"),
        changes={"stall_seconds": 4},
    ),
]
KERNEL = [
    Fault(
        "kill -9 of the kernel while loading",
        READY,
        flags=("--prepare-seconds", "5"),
        before=killed_kernel("load", server_ends=False),
        at=LOADING,
        strike=lambda case: eventually(lambda: case.pid == case.other),
    ),
    Fault(
        "kill -9 of the kernel while ready",
        READY,
        before=killed_kernel("stay", server_ends=False),
        at=READY,
        strike=is_the_others,
    ),
    Fault(
        "kill -9 of the kernel and its log deleted",
        READY,
        before=killed_kernel("stay", server_ends=False, and_then=delete_log),
        at=READY,
        strike=is_the_others,
    ),
    Fault(
        "kill -9 of a kernel that takes its server with it",
        READY,
        "Server starting",
        before=killed_kernel("stay", server_ends=True),
        changes={"on_kernel_exit": OnKernelExit.STOP},
    ),
]
CLOCK = [
    Fault(
        "clock set a day on while loading",
        READY,
        r"Model loaded \(\d+ checks?, \d{1,3}s",
        flags=("--prepare-seconds", "5"),
        at=LOADING,
        strike=set_clock(DAY),
        within=20,
    ),
    Fault("clock set a day on while ready", READY, at=READY, strike=set_clock_while_ready),
    *(
        Fault(
            f"clock set by {jump:+.0f} s between two kernels",
            READY,
            before=killed_kernel("stay", server_ends=False, and_then=set_clock(jump)),
            at=READY,
            strike=is_the_others,
        )
        for jump in (DAY, -DAY, 3600)
    ),
]


# Their waits are replayed on a faster clock in test_fast_histories.py.
SLOW = {"SIGSTOP while loading", "SIGSTOP while ready", "it never becomes ready"}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.name, marks=[pytest.mark.slow] * (fault.name in SLOW))
        for fault in (*DEATHS, *HANGS, *KERNEL, *CLOCK)
    ],
)
def test_what_happens_to_a_server_is_told_as_it_is(
    fault: Fault, config: ServerConfig, tmp_path: Path, stand_in: Path
) -> None:
    pytest.importorskip("xllamacpp")
    fault.check(config, tmp_path, stand_in)
