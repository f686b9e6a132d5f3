from __future__ import annotations

import asyncio
import errno
import gc
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import psutil
import pytest
from other_kernel import runs

from kitty_nb import (
    HealthCheckResult,
    ServerConfig,
    ServerState,
    ServerStatus,
    Supervisor,
    write_demo_model,
)
from kitty_nb.errors import (
    ConfigError,
    PortBusyError,
    ServerFailedError,
    StartCancelledError,
    WillNotFitError,
)
from kitty_nb.supervisor.events import (
    Activity,
    Broadcast,
    Event,
    LogLines,
    ProgressMade,
    Stage,
    StateChanged,
)
from kitty_nb.supervisor.log import readable
from kitty_nb.supervisor.registry import find_server

Misbehaving = Callable[..., ServerConfig]


def supervised(
    config: ServerConfig, scenario: Callable[[Supervisor, list[Event]], Coroutine[Any, Any, None]]
) -> list[Event]:
    """Run a scenario on a supervisor and return all events, in order."""
    events: list[Event] = []

    async def run() -> None:
        with anyio.fail_after(60):
            async with Supervisor(config) as supervisor:
                supervisor.subscribe(events.append)
                await scenario(supervisor, events)

    anyio.run(run)
    return events


async def reach(supervisor: Supervisor, condition: Callable[[ServerState], bool]) -> None:
    with anyio.fail_after(60):
        while not condition(supervisor.state):
            await anyio.sleep(0.005)


def statuses(events: list[Event]) -> list[str]:
    """The states passed through, without repetition."""
    found: list[str] = []
    for event in events:
        if isinstance(event, StateChanged) and event.state.status not in found[-1:]:
            found.append(event.state.status)
    return found


def latest(state: ServerState) -> HealthCheckResult:
    assert state.last_health_check
    return state.last_health_check


def messages(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Activity)]


def key(supervisor: Supervisor) -> dict[str, str]:
    assert supervisor.api_key
    return {"Authorization": f"Bearer {supervisor.api_key.get_secret_value()}"}


def test_the_real_engine_loads_answers_and_stops(config: ServerConfig) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        state = await supervisor.start()
        assert state.status is ServerStatus.READY
        assert state.pid is not None
        assert psutil.pid_exists(state.pid)
        assert state.uptime is not None
        async with httpx.AsyncClient(trust_env=False, headers=key(supervisor)) as client:
            request = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
            url = f"{state.endpoint}/v1/chat/completions"
            answer = (await client.post(url, json=request, timeout=30)).json()
        assert answer["choices"][0]["message"]["content"].startswith("Hello! I am")
        health = await supervisor.check_health()
        assert (health.status, health.slots_busy, health.slots_total) == ("READY", 0, 1)
        stopped = await supervisor.stop()
        assert (stopped.status, stopped.pid, stopped.uptime) == ("STOPPED", None, None)
        assert not psutil.pid_exists(state.pid)
        assert (await supervisor.check_health()).status is ServerStatus.STOPPED

    events = supervised(config, scenario)
    expected = ["STARTING", "LOADING", "READY", "STOPPING", "STOPPED"]
    # A load of milliseconds may be over before it is first seen.
    assert [s for s in statuses(events) if s != "LOADING"] == [
        s for s in expected if s != "LOADING"
    ]
    said = messages(events)
    assert said[0] == "Server starting…"
    assert any(re.match(r"Model loaded \(\d+ checks?, ", message) for message in said)
    lines = [line for event in events if isinstance(event, LogLines) for line in event.lines]
    assert any("model loaded" in line for line in lines)
    assert list(map(readable, config.log_path.read_text().splitlines())) == lines


def test_the_real_engine_restarts_and_switches(config: ServerConfig, tmp_path: Path) -> None:
    other = write_demo_model(tmp_path / "other.gguf", size=3_000_000)

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        first = await supervisor.start()
        assert (await supervisor.start()).pid == first.pid
        second = await supervisor.restart()
        assert second.pid != first.pid
        third = await supervisor.switch_model(other, alias="other")
        assert third.config.model == other
        assert third.restart_count == 2
        async with httpx.AsyncClient(trust_env=False) as client:
            models = (
                await client.get(f"{third.endpoint}/v1/models", headers=key(supervisor))
            ).json()
        assert models["data"][0]["id"] == "other"

    supervised(config, scenario)


def test_what_will_not_fit_is_refused_and_leaves_the_server_alone(
    misbehaving: Misbehaving,
) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        before = await supervisor.start()
        too_large = before.config.replace(context_size=2_000_000_000)
        for launch in (supervisor.start, supervisor.restart):
            with pytest.raises(WillNotFitError, match="Not enough memory"):
                await launch(too_large)
        assert (supervisor.state.pid, supervisor.state.config) == (before.pid, before.config)
        after = await supervisor.start(too_large, anyway=True)
        assert (after.status, after.config) == (ServerStatus.READY, too_large)

    supervised(misbehaving(), scenario)


def test_the_context_ends_with_the_server(config: ServerConfig) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start()

    events = supervised(config, scenario)
    pids = {event.state.pid for event in events if isinstance(event, StateChanged)} - {None}
    assert statuses(events)[-1] == "STOPPED"
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_slow_load_shows_every_stage_and_never_falls(misbehaving: Misbehaving) -> None:
    config = misbehaving("--load-seconds", "2", "--prepare-seconds", "3")
    checks: list[tuple[HealthCheckResult, int, int]] = []

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        big = write_demo_model(config.log_dir / "big.gguf", size=200_000_000)
        await supervisor.start(
            config.replace(model=big), on_progress=lambda *check: checks.append(check)
        )

    events = supervised(config, scenario)
    progress = [event.progress for event in events if isinstance(event, ProgressMade)]
    fractions = [p.fraction for p in progress]
    assert fractions == sorted(fractions)
    assert [f for f in fractions if f == 1.0] == [1.0]
    assert list(dict.fromkeys(p.stage for p in progress)) == list(Stage)
    loading = [p.fraction for p in progress if p.stage is Stage.LOADING]
    assert len(set(loading)) >= 5
    ready_at = next(
        i for i, e in enumerate(events) if isinstance(e, StateChanged) and e.state.status == "READY"
    )
    full_at = next(
        i for i, e in enumerate(events) if isinstance(e, ProgressMade) and e.progress.fraction == 1
    )
    assert ready_at < full_at
    assert [attempt for _, attempt, _ in checks][:2] == [1, 2]
    assert {maximum for *_, maximum in checks} == {120}
    assert checks[-1][0].status is ServerStatus.READY
    counted = re.compile(r"Loading model… \(\d+/120, \d+s elapsed\)")
    assert any(map(counted.search, messages(events)))


def test_ready_is_noticed_from_the_log(
    misbehaving: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Unless the log hints at news, health is asked twice a minute: only the hint can be quick.
    for name, value in (("_ASK_LONGEST", 30), ("_ASK_FACTOR", 10_000)):
        monkeypatch.setattr(f"kitty_nb.supervisor.server.{name}", value)
    mark = tmp_path / "mark"
    config = misbehaving("--prepare-seconds", "1", "--ready-mark", str(mark))

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start()
        assert time.time() - mark.stat().st_mtime < 5

    supervised(config, scenario)


def test_a_crashed_server_is_started_again(misbehaving: Misbehaving) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        first = await supervisor.start()
        assert first.pid
        os.kill(first.pid, signal.SIGKILL)
        await reach(supervisor, lambda state: state.status is ServerStatus.RESTARTING)
        assert supervisor.state.retry_in is not None
        assert (await supervisor.check_health()).status is ServerStatus.STOPPED
        await reach(supervisor, lambda state: state.status is ServerStatus.READY)
        assert supervisor.state.pid != first.pid
        assert supervisor.state.restart_count == 1

    events = supervised(misbehaving(restart_delay_seconds=0.2), scenario)
    assert any("Restarting in 0 s (1 of 3)." in message for message in messages(events))


def test_a_restart_can_be_called_off(misbehaving: Misbehaving) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        state = await supervisor.start()
        assert state.pid
        os.kill(state.pid, signal.SIGKILL)
        await reach(supervisor, lambda state: state.status is ServerStatus.RESTARTING)
        assert (await supervisor.stop()).status is ServerStatus.STOPPED

    events = supervised(misbehaving(restart_delay_seconds=30), scenario)
    assert statuses(events)[-2:] == ["RESTARTING", "STOPPED"]


@pytest.mark.slow
def test_a_server_that_works_without_a_word_has_not_stalled(misbehaving: Misbehaving) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start()

    supervised(misbehaving("--compile", "6", stall_seconds=3), scenario)


def test_a_failing_callback_does_not_fail_the_start(
    config: ServerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("user's mistake")

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        assert (await supervisor.start(on_progress=fail)).status is ServerStatus.READY

    supervised(config, scenario)
    assert "user's mistake" in caplog.text


def test_a_stop_during_a_load_cancels_the_start(misbehaving: Misbehaving) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        async with anyio.create_task_group() as tasks:

            async def start() -> None:
                with pytest.raises(StartCancelledError, match="stopped before it was ready"):
                    await supervisor.start()

            tasks.start_soon(start)
            await reach(supervisor, lambda state: state.status is ServerStatus.LOADING)
            assert (await supervisor.stop()).status is ServerStatus.STOPPED

    supervised(misbehaving("--never-ready"), scenario)


def test_a_stop_before_the_process_is_there_calls_it_off(misbehaving: Misbehaving) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start(wait_for_ready=False)
        assert (await supervisor.stop()).status is ServerStatus.STOPPED

    events = supervised(misbehaving("--never-ready"), scenario)
    assert statuses(events) == ["STARTING", "STOPPING", "STOPPED"]


def test_a_stop_while_the_port_is_tried_calls_it_off(
    misbehaving: Misbehaving, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, go_on = threading.Event(), threading.Event()

    def slow(_: ServerConfig) -> None:
        tried.set()
        go_on.wait(20)

    monkeypatch.setattr("kitty_nb.supervisor.server.refuse_busy_port", slow)

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start(wait_for_ready=False)
        assert await anyio.to_thread.run_sync(tried.wait, 20)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(supervisor.stop)
            await reach(supervisor, lambda state: state.status is ServerStatus.STOPPING)
            go_on.set()
        assert supervisor.state.status is ServerStatus.STOPPED

    assert supervised(misbehaving("--never-ready"), scenario)


def test_what_is_asked_during_a_switch_builds_on_the_switch(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        other = write_demo_model(tmp_path / "other.gguf")
        await supervisor.start()
        await supervisor.switch_model(other, wait_for_ready=False)
        assert (await supervisor.start()).model_name == "other.gguf"
        config = supervisor.state.config.replace(context_size=1024)
        await supervisor.start(config, wait_for_ready=False)
        demo = config.models_dir / "demo.gguf"
        state = await supervisor.switch_model(demo)
        assert (state.model_name, state.config.context_size) == ("demo.gguf", 1024)

    supervised(misbehaving(), scenario)


def test_a_cancelled_start_stops_its_server(misbehaving: Misbehaving) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(supervisor.start)
            await reach(supervisor, lambda state: state.status is ServerStatus.LOADING)
            tasks.cancel_scope.cancel()
        await reach(supervisor, lambda state: state.status is ServerStatus.STOPPED)

    supervised(misbehaving("--never-ready"), scenario)


def test_a_caller_that_is_cancelled_stops_its_server(config: ServerConfig) -> None:
    async def run() -> ServerState:
        with anyio.CancelScope() as caller:
            async with Supervisor(config) as supervisor:
                pid = (await supervisor.start()).pid
                caller.cancel()
                await anyio.sleep_forever()
        assert pid is not None
        assert not psutil.pid_exists(pid)
        return supervisor.state

    async def within(seconds: float) -> ServerState:
        with anyio.fail_after(seconds):
            return await run()

    assert anyio.run(within, 60).status is ServerStatus.STOPPED


def test_a_later_start_overtakes(misbehaving: Misbehaving, config: ServerConfig) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        async with anyio.create_task_group() as tasks:

            async def start() -> None:
                with pytest.raises(StartCancelledError, match="superseded"):
                    await supervisor.start()

            tasks.start_soon(start)
            await reach(supervisor, lambda state: state.status is ServerStatus.LOADING)
            state = await supervisor.start(config)
        assert (state.status, state.config) == (ServerStatus.READY, config)

    supervised(misbehaving("--never-ready"), scenario)


def test_many_starts_at_once_are_one_server(config: ServerConfig) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        states: list[ServerState] = []

        async def start() -> None:
            states.append(await supervisor.start())

        async with anyio.create_task_group() as tasks:
            for _n in range(5):
                tasks.start_soon(start)
        assert len({state.pid for state in states}) == 1

    events = supervised(config, scenario)
    assert messages(events).count("Server starting…") == 1


def test_a_deaf_server_is_forced_after_the_grace(misbehaving: Misbehaving) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        state = await supervisor.start()
        began = time.monotonic()
        await supervisor.stop()
        assert time.monotonic() - began >= 0.3
        assert state.pid
        assert not psutil.pid_exists(state.pid)

    supervised(misbehaving("--ignore-sigterm", stop_grace_seconds=0.3), scenario)


def test_a_deaf_server_is_forced_also_when_its_supervisor_is_left(
    misbehaving: Misbehaving,
) -> None:
    pids: list[int] = []

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        state = await supervisor.start()
        assert state.pid
        pids.append(state.pid)
        supervisor.detach()
        with anyio.move_on_after(0):
            await supervisor.stop()
        assert supervisor.state.status is ServerStatus.STOPPING

    supervised(misbehaving("--ignore-sigterm", stop_grace_seconds=0.3), scenario)
    assert not runs(pids[0])


@pytest.mark.parametrize("wish", ["start", "restart", "restart, still checked", "retry"])
def test_a_server_that_is_only_wished_for_outlives_its_supervisor(
    config: ServerConfig, wish: str
) -> None:
    other = config.replace(context_size=1024, restart_delay_seconds=60)

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        supervisor.detach()
        if wish == "start":
            await supervisor.start(other, wait_for_ready=False)
            return
        pid = (await supervisor.start(other if wish == "retry" else config)).pid
        assert pid
        if wish == "restart":
            await supervisor.restart(other, wait_for_ready=False)
        elif wish == "retry":
            os.kill(pid, signal.SIGKILL)
            await reach(supervisor, lambda now: now.status is ServerStatus.RESTARTING)
        else:
            asyncio.get_running_loop().create_task(supervisor.restart(other, wait_for_ready=False))
            await anyio.lowlevel.checkpoint()
            assert supervisor.state.status is ServerStatus.READY

    began = time.monotonic()
    supervised(config, scenario)
    assert time.monotonic() - began < 45  # nobody waits for a back-off to end
    record = find_server(other)
    assert record
    psutil.Process(record.pid).kill()
    assert record.config.context_size == 1024


def test_an_interrupted_start_outlives_nothing(config: ServerConfig) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        supervisor.detach()
        await supervisor.start(wait_for_ready=False)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        supervised(config, scenario)
    assert find_server(config) is None


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_an_end_is_noticed_where_the_system_forbids_to_wait_for_it(
    misbehaving: Misbehaving, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """As in some sandboxes, and before Linux 5.3."""

    def refuse(_pid: int) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start()
        assert (await supervisor.stop()).status is ServerStatus.STOPPED

    supervised(misbehaving(), scenario)


def test_a_forced_stop_does_not_wait(misbehaving: Misbehaving) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start()
        with anyio.fail_after(5):
            await supervisor.stop(force=True)

    supervised(misbehaving("--ignore-sigterm", stop_grace_seconds=60), scenario)


def test_what_the_server_started_ends_with_it(misbehaving: Misbehaving, tmp_path: Path) -> None:
    child_file = tmp_path / "child"

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        state = await supervisor.start()
        child = int(child_file.read_text())
        assert runs(child)
        assert state.pid
        os.kill(state.pid, signal.SIGKILL)
        await reach(supervisor, lambda now: now.status is ServerStatus.RESTARTING)
        with anyio.fail_after(5):
            while runs(child):
                await anyio.sleep(0.01)

    supervised(misbehaving("--spawn-child", str(child_file)), scenario)


def test_a_busy_port_is_found_before_launch(config: ServerConfig) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        with socket.create_server(("127.0.0.1", config.port)):
            with pytest.raises(PortBusyError, match=rf"Port {config.port} .* in use"):
                await supervisor.start()
            assert supervisor.state.status is ServerStatus.FAILED
            assert "LLAMACPP_PRIMARY_PORT" in (supervisor.state.error or "")
            free_port = supervisor.state.free_port
            assert free_port
            elsewhere = supervisor.state.config.replace(port=free_port)
            assert (await supervisor.start(elsewhere)).config.port == free_port
            await supervisor.stop()
        assert (await supervisor.start(config)).status is ServerStatus.READY
        assert supervisor.state.free_port is None

    assert statuses(supervised(config, scenario))[:2] == ["STARTING", "FAILED"]


def test_a_stranger_on_the_port_is_not_taken_for_our_server(
    misbehaving: Misbehaving, stand_in: Path
) -> None:
    """It came between the look at the port and our server's bind, and has the same alias."""
    config = misbehaving("--bind-after", "30", stall_seconds=8)

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start(wait_for_ready=False)
        await reach(supervisor, lambda now: now.pid is not None)
        words = ("--model", config.model, "--host", config.host, "--port", config.port)
        command = (stand_in, *words, "--alias", config.served_alias)
        stranger = await anyio.open_process([*map(str, command)], stdout=None, stderr=None)
        try:
            await reach(supervisor, lambda now: now.status is ServerStatus.FAILED)
            assert stranger.returncode is None
        finally:
            stranger.kill()
            await stranger.aclose()

    events = supervised(config, scenario)
    assert "READY" not in statuses(events)
    assert any(
        re.search(r"is now in use by .*\(PID \d+\)", message) for message in messages(events)
    )


def test_no_model_is_said_before_anything_happens(config: ServerConfig) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        with pytest.raises(ConfigError, match="LLAMACPP_PRIMARY_MODEL"):
            await supervisor.start()

    assert statuses(supervised(config.replace(model=None), scenario)) == []


def test_events_can_be_iterated(config: ServerConfig) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        seen: list[str] = []

        async def read() -> None:
            async for event in supervisor.events():
                if isinstance(event, StateChanged):
                    seen.append(event.state.status)
                    if event.state.status is ServerStatus.READY:
                        return

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await anyio.lowlevel.checkpoint()
            await supervisor.start()
        assert (seen[0], seen[-1]) == ("STARTING", "READY")

    supervised(config, scenario)


def test_who_hears_of_ready_hears_with_it_what_the_server_answered(config: ServerConfig) -> None:
    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start()

    events = supervised(config, scenario)
    states = [event.state for event in events if isinstance(event, StateChanged)]
    ready = [state for state in states if state.status is ServerStatus.READY]
    assert {latest(state).status for state in ready} == {ServerStatus.READY}
    assert not [state.sentence for state in ready if "not responding" in state.sentence]


def test_events_are_those_since_they_were_asked_for() -> None:
    async def scenario() -> None:
        broadcast: Broadcast[str] = Broadcast()
        events = broadcast.stream()
        broadcast.publish("READY")
        async with aclosing(events):
            with anyio.fail_after(5):
                assert await anext(events) == "READY"
        assert not broadcast._subscribers

    anyio.run(scenario)


def test_events_that_nobody_reads_are_not_kept() -> None:
    broadcast: Broadcast[str] = Broadcast()
    unread = broadcast.stream()
    assert broadcast._subscribers
    del unread
    gc.collect()
    assert not broadcast._subscribers


def test_much_that_a_server_says_at_once_is_read_to_its_end(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    words = tmp_path / "words"
    words.write_text("".join(f"word {number:06} {'~' * 80}\n" for number in range(20_000)))

    async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
        await supervisor.start()
        with anyio.fail_after(20):
            while "word 019999" not in "".join(supervisor.log_lines[-1:]):
                await anyio.sleep(0.01)

    supervised(misbehaving("--blurt", str(words)), scenario)


@pytest.mark.parametrize("steps", range(8))
def test_called_off_while_it_begins_it_ends(config: ServerConfig, steps: int) -> None:
    async def begin(scope: anyio.CancelScope) -> None:
        with scope:
            async with Supervisor(config):
                await anyio.sleep_forever()

    async def scenario() -> None:
        scope = anyio.CancelScope()
        task = asyncio.create_task(begin(scope))
        for _ in range(steps):
            await asyncio.sleep(0)
        scope.cancel()
        ended, _ = await asyncio.wait({task}, timeout=20)
        assert ended

    anyio.run(scenario)


def test_a_server_open_to_the_network_is_warned_of(config: ServerConfig) -> None:
    def warnings(host: str) -> list[str]:
        async def scenario(supervisor: Supervisor, _: list[Event]) -> None:
            with suppress(ServerFailedError):
                await supervisor.start()

        told = supervised(config.replace(host=host), scenario)
        return [one.message for one in told if isinstance(one, Activity) if one.level == "warning"]

    # Nothing here has this address, so that nothing is opened.
    (warning,) = warnings("192.0.2.1")
    assert "open to the network (192.0.2.1)" in warning
    assert "LLAMACPP_HOST=127.0.0.1" in warning
    assert warnings("127.0.0.1") == []
