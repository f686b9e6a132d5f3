"""Whatever is asked of a server and whatever befalls it, in any order: what always holds."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import anyio
import psutil
import pytest
from conftest import STAND_IN, words_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from other_kernel import runs

from kitty_nb import ServerConfig, ServerStatus, Supervisor, write_demo_model
from kitty_nb.errors import ServerCrashedError, StartCancelledError
from kitty_nb.supervisor.lifecycle import (
    BecameReady,
    Begin,
    Exited,
    Found,
    GaveUp,
    Lifecycle,
    LoadBegan,
    Refused,
    Report,
    Spawned,
    StartAsked,
    Stimulus,
    StopAsked,
    Terminate,
    Wait,
    WaitOver,
    step,
)
from kitty_nb.supervisor.registry import ServerRecord

CONFIGS = [ServerConfig(port=port, restart_max=2) for port in (9001, 9002)]
RECORD = ServerRecord(pid=7, create_time=1.0, began=0.0, config=CONFIGS[1])
SETTLING = 10


class World(RuleBasedStateMachine):
    """Carries the lifecycle's actions out, at any time and with any luck."""

    def __init__(self) -> None:
        super().__init__()
        self.now = Lifecycle(ServerStatus.STOPPED, CONFIGS[0])
        self.clock = 0.0
        self.preparing: int | None = None  # the generation that is on its way
        self.running: int | None = None  # the one that has a process
        self.told_to_end: set[int] = set()
        self.timers: set[int] = set()
        self.awaited: set[int] = set()

    def feed(self, stimulus: Stimulus) -> None:
        issued = self.now.issued
        self.now, actions = step(self.now, stimulus)
        assert self.now.issued >= issued
        for action in actions:
            match action:
                case Begin(generation, _, None):
                    assert self.alive is None, "a second process of one profile"
                    self.preparing = generation
                case Begin(generation):
                    assert self.alive is None, "a second process of one profile"
                    self.running = generation
                case Terminate(generation):
                    assert generation == self.alive, "it ends what is not there"
                    self.told_to_end.add(generation)
                case Wait(generation):
                    self.timers.add(generation)

    @property
    def alive(self) -> int | None:
        return self.preparing or self.running

    @rule(config=st.sampled_from(CONFIGS), again=st.booleans())
    def start(self, config: ServerConfig, again: bool) -> None:
        self.feed(StartAsked(config, fresh=True) if again else StartAsked(config))
        self.awaited.add(self.now.latest)

    @rule(force=st.booleans())
    def stop(self, force: bool) -> None:
        self.feed(StopAsked(force))

    @precondition(lambda self: self.alive is None)
    @rule()
    def another_kernel_starts_one(self) -> None:
        self.feed(Found(RECORD))

    @precondition(lambda self: self.preparing)
    @rule()
    def spawned(self) -> None:
        assert self.preparing
        self.preparing, self.running = None, self.preparing
        self.feed(Spawned(self.running, 42))

    @precondition(lambda self: self.preparing)
    @rule(elsewhere=st.booleans())
    def refused(self, elsewhere: bool) -> None:
        assert self.preparing
        generation, self.preparing = self.preparing, None
        at = self.clock if elsewhere else None
        self.feed(Refused(generation, "refused", elsewhere_at=at))

    @precondition(lambda self: self.running)
    @rule(kind=st.sampled_from(["loads", "ready", "hangs"]), after=st.floats(0, 100))
    def lives(self, kind: str, after: float) -> None:
        assert self.running
        self.clock += after
        reports: dict[str, Report] = {
            "loads": LoadBegan(self.running),
            "ready": BecameReady(self.running, self.clock),
            "hangs": GaveUp(self.running, "stalled"),
        }
        self.feed(reports[kind])

    @precondition(lambda self: self.alive)
    @rule(repeats=st.booleans(), asked=st.booleans(), after=st.floats(0, 100))
    def ends(self, repeats: bool, asked: bool, after: float) -> None:
        assert self.alive
        self.clock += after
        generation, self.preparing, self.running = self.alive, None, None
        self.feed(Exited(generation, "it ended", self.clock, repeats, asked))

    @precondition(lambda self: self.timers)
    @rule(data=st.data())
    def timer_fires(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(sorted(self.timers)))
        self.timers.remove(generation)
        self.feed(WaitOver(generation))

    @rule(back=st.integers(1, 5), kind=st.sampled_from([Spawned, LoadBegan, BecameReady, Exited]))
    def an_older_process_reports_late(self, back: int, kind: Callable[..., Report]) -> None:
        before = self.now
        words = {Spawned: (42,), BecameReady: (self.clock,), Exited: ("late", self.clock)}
        self.feed(kind(self.now.generation - back, *words.get(kind, ())))
        assert self.now == before

    @invariant()
    def what_is_shown_is_there(self) -> None:
        now = self.now
        assert now.generation <= now.issued
        assert self.alive in {None, now.generation}
        if now.status is ServerStatus.READY:
            assert self.running == now.generation
            assert now.ready_since is not None
        else:
            assert now.ready_since is None or now.status is ServerStatus.STOPPING
        if now.pid is not None:
            assert self.running == now.generation
        if now.status.idle or now.status is ServerStatus.RESTARTING:
            assert self.alive is None
            assert now.pending is None
        else:
            assert self.alive is not None
        if now.status in {ServerStatus.FAILED, ServerStatus.CRASHED, ServerStatus.RESTARTING}:
            assert now.error
        assert now.crashes <= now.config.restart_max

    @invariant()
    def something_will_end_every_wait(self) -> None:
        now = self.now
        assert now.pending is None or now.status is ServerStatus.STOPPING
        if now.status is ServerStatus.STOPPING:
            assert now.generation in self.told_to_end
        if now.status is ServerStatus.RESTARTING:
            assert now.generation in self.timers
            assert now.retry_at is not None
        else:
            assert now.retry_at is None

    def teardown(self) -> None:
        """Left to itself, the world comes to rest, and whoever waits is told."""
        for _ in range(SETTLING):
            if self.now.status.settled:
                break
            if self.now.status is ServerStatus.RESTARTING:
                self.feed(WaitOver(self.now.generation))
            elif self.now.status is ServerStatus.STOPPING:
                self.ends(repeats=False, asked=False, after=0)
            elif self.preparing:
                self.spawned()
            else:
                self.lives("ready", 0)
        assert self.now.status.settled
        for generation in self.awaited:
            assert generation == self.now.generation or self.now.superseded(generation)


TestLifecycle = World.TestCase
TestLifecycle.settings = settings(
    max_examples=100, stateful_step_count=60, derandomize=True, database=None, deadline=None
)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_any_commands_and_kills_leave_one_server_or_none(
    misbehaving: Callable[..., ServerConfig], tmp_path: Path, seed: int
) -> None:
    config = misbehaving(
        *("--load-seconds", "0.05"),
        restart_delay_seconds=0.02,
        restart_max=1000,
        stop_grace_seconds=0.5,
    )
    other = write_demo_model(tmp_path / "other.gguf")
    deaf = config.replace(extra_args=("--ignore-sigterm", "--prepare-seconds", "0.2"))
    dice = random.Random(seed)

    async def scenario() -> None:
        async with Supervisor(config) as supervisor:
            scopes: list[anyio.CancelScope] = []

            async def ask(command: Callable[..., object], *words: object) -> None:
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    try:
                        with anyio.fail_after(20):
                            state = await command(*words)
                        if command != supervisor.stop:
                            assert state.status is ServerStatus.READY
                    except StartCancelledError:
                        pass
                    except ServerCrashedError as error:
                        if "SIGKILL" not in str(error):
                            raise

            commands = [
                (supervisor.start, config),
                (supervisor.start, deaf),
                (supervisor.restart,),
                (supervisor.switch_model, other),
                (supervisor.stop,),
                (supervisor.stop, True),
            ]
            async with anyio.create_task_group() as tasks:
                for _ in range(100):
                    match dice.choice(["ask", "ask", "ask", "kill", "cancel"]):
                        case "ask":
                            tasks.start_soon(ask, *dice.choice(commands))
                        case "kill" if pid := supervisor.state.pid:
                            with suppress(ProcessLookupError):
                                os.kill(pid, signal.SIGKILL)
                        case "cancel" if scopes:
                            dice.choice(scopes).cancel()
                    for _ in range(dice.randrange(6)):
                        assert len(servers()) <= 1
                        await ready_is_alive(supervisor)
                        await anyio.sleep(dice.choice([0, 0.01, 0.03]))
            assert (await supervisor.stop()).status is ServerStatus.STOPPED
            assert not servers()

    anyio.run(scenario)


def servers() -> list[int]:
    found = (
        child.pid
        for child in psutil.Process().children()
        if {str(STAND_IN), "--port"} <= {*words_of(child)}
    )
    return [pid for pid in found if runs(pid)]


async def ready_is_alive(supervisor: Supervisor) -> None:
    """A death is noticed, within seconds at most."""
    seen, deadline = supervisor.state, time.monotonic() + 5
    while seen.status is ServerStatus.READY and not runs(seen.pid or 0):
        assert time.monotonic() < deadline, "READY without a process"
        await anyio.sleep(0.005)
        seen = supervisor.state
