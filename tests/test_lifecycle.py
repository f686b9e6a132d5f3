from __future__ import annotations

from dataclasses import replace

from kitty_nb.config import ServerConfig
from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.supervisor.lifecycle import (
    Action,
    BecameReady,
    Begin,
    Exited,
    Found,
    GaveUp,
    Lifecycle,
    LoadBegan,
    Refused,
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

A, B, C = (ServerConfig(port=port) for port in (9001, 9002, 9003))


def replay(*history: Stimulus) -> tuple[Lifecycle, list[Action]]:
    now, done = Lifecycle(ServerStatus.STOPPED, A), []
    for stimulus in history:
        now, actions = step(now, stimulus)
        done.extend(actions)
    return now, done


def test_a_whole_life() -> None:
    now, done = replay(
        StartAsked(A),
        Spawned(1, 42),
        LoadBegan(1),
        BecameReady(1, 3.5),
        StopAsked(),
        Exited(1, "done", 100.0),
    )
    assert done == [Begin(1, A), Terminate(1)]
    assert (now.status, now.pid, now.ready_since, now.error) == ("STOPPED", None, None, None)


def test_ready_knows_process_and_time() -> None:
    now, _ = replay(StartAsked(A), Spawned(1, 42), BecameReady(1, 3.5))
    assert (now.status, now.pid, now.ready_since) == (ServerStatus.READY, 42, 3.5)


def test_a_double_click_starts_one_server() -> None:
    _, done = replay(StartAsked(A), StartAsked(A), Spawned(1, 42), StartAsked(A))
    assert done == [Begin(1, A)]


def test_starting_other_settings_replaces_the_server_once_it_is_gone() -> None:
    history = (StartAsked(A), Spawned(1, 42), BecameReady(1, 0.0), StartAsked(B))
    now, done = replay(*history)
    assert (now.status, done) == (ServerStatus.STOPPING, [Begin(1, A), Terminate(1)])
    now, done = replay(*history, Exited(1, "done", 100.0))
    assert (now.status, now.config, now.restart_count) == (ServerStatus.STARTING, B, 1)
    assert done[-1] == Begin(2, B)


def test_a_restart_with_the_same_settings_is_a_fresh_process() -> None:
    _, done = replay(
        StartAsked(A), BecameReady(1, 0.0), StartAsked(A, fresh=True), Exited(1, "", 100.0)
    )
    assert done == [Begin(1, A), Terminate(1), Begin(2, A)]


def test_start_during_stop_waits_for_the_exit() -> None:
    now, done = replay(StartAsked(A), StopAsked(), StartAsked(A), Exited(1, "", 100.0))
    assert done == [Begin(1, A), Terminate(1), Begin(2, A)]
    assert now.generation == 2


def test_the_last_wish_wins_and_the_others_are_overtaken() -> None:
    now, done = replay(StartAsked(A), StartAsked(B, fresh=True), StartAsked(C, fresh=True))
    assert now.superseded(2)
    assert not now.superseded(3)
    now, done = replay(
        StartAsked(A), StartAsked(B, fresh=True), StartAsked(C, fresh=True), Exited(1, "", 100.0)
    )
    assert done == [Begin(1, A), Terminate(1), Begin(3, C)]


def test_a_stop_drops_what_was_to_follow_and_its_number_is_not_reused() -> None:
    history = (StartAsked(A), StartAsked(B, fresh=True), StopAsked(), Exited(1, "", 100.0))
    now, done = replay(*history)
    assert (now.status, done) == (ServerStatus.STOPPED, [Begin(1, A), Terminate(1)])
    assert now.superseded(2)
    now, done = replay(*history, StartAsked(B))
    assert done[-1] == Begin(3, B)
    assert now.superseded(2)


def test_a_forced_stop_does_not_wait_for_the_polite_one() -> None:
    _, done = replay(StartAsked(A), StopAsked(), StopAsked(), StopAsked(force=True))
    assert done == [Begin(1, A), Terminate(1), Terminate(1, force=True)]


def test_dying_by_itself_is_a_crash_and_stopping_then_clears_it() -> None:
    now, _ = replay(StartAsked(A), Spawned(1, 42), Exited(1, "exit code 1", 100.0))
    assert (now.status, now.error, now.pid) == (ServerStatus.CRASHED, "exit code 1", None)
    now, done = step(now, StopAsked())
    assert (now.status, now.error, done) == (ServerStatus.STOPPED, None, ())


def test_a_refusal_is_a_failure() -> None:
    now, _ = replay(StartAsked(A), Refused(1, "port busy"))
    assert (now.status, now.error) == (ServerStatus.FAILED, "port busy")


def test_giving_up_ends_the_process_and_then_is_a_failure() -> None:
    now, done = replay(StartAsked(A), Spawned(1, 42), GaveUp(1, "stalled"))
    assert (now.status, done[-1]) == (ServerStatus.STOPPING, Terminate(1))
    now, _ = step(now, Exited(1, "SIGTERM", 100.0))
    assert (now.status, now.error) == (ServerStatus.FAILED, "stalled")


def test_what_an_older_process_does_is_ignored() -> None:
    now, _ = replay(StartAsked(A), StartAsked(B, fresh=True), Exited(1, "", 100.0), Spawned(2, 43))
    for late in (Exited(1, "late", 100.0), BecameReady(1, 0.0), GaveUp(1, "late"), Spawned(1, 42)):
        assert step(now, late) == (now, ())


def test_ready_after_a_stop_was_asked_is_not_ready() -> None:
    now, _ = replay(StartAsked(A), StopAsked(), BecameReady(1, 0.0))
    assert now.status is ServerStatus.STOPPING


def test_a_refused_start_still_makes_way_for_what_was_asked_next() -> None:
    now, done = replay(StartAsked(A), StartAsked(B, fresh=True), Refused(1, "no engine"))
    assert (now.status, done[-1]) == (ServerStatus.STARTING, Begin(2, B))


def test_stop_when_there_is_nothing_does_nothing() -> None:
    assert replay(StopAsked(), StopAsked(force=True)) == (Lifecycle(ServerStatus.STOPPED, A), [])


def served(config: ServerConfig, ready_at: float = 0.0) -> tuple[Stimulus, ...]:
    return StartAsked(config), Spawned(1, 42), BecameReady(1, ready_at)


def test_a_crash_of_a_server_that_was_ready_is_mended_after_a_back_off() -> None:
    now, done = replay(*served(A), Exited(1, "SIGSEGV", 10.0))
    assert (now.status, now.error, now.retry_at) == (ServerStatus.RESTARTING, "SIGSEGV", 15.0)
    assert done[-1] == Wait(1, 5.0)
    now, done = step(now, WaitOver(1))
    assert (now.status, now.error) == (ServerStatus.STARTING, None)
    assert done == (Begin(2, A, crashes=1),)
    assert now.restart_count == 1


def test_the_back_off_doubles_up_to_its_limit_and_then_it_is_over() -> None:
    config = A.replace(restart_delay_seconds=20, restart_max=3)
    now, waits = replay(*served(config))[0], []
    for generation in (1, 2, 3):
        now, actions = step(now, Exited(generation, "again", 10.0))
        waits.append(actions[0])
        now, _ = step(now, WaitOver(generation))
    assert waits == [Wait(1, 20.0), Wait(2, 40.0), Wait(3, 60.0)]
    now, actions = step(now, Exited(4, "for good", 10.0))
    assert (now.status, now.error, actions) == (ServerStatus.CRASHED, "for good", ())


def test_the_back_off_stays_at_its_limit_however_many_crashes_there_were() -> None:
    now, _ = replay(*served(A.replace(restart_max=10_000)))
    _, actions = step(replace(now, crashes=5_000), Exited(1, "again", 10.0))
    assert actions == (Wait(1, A.restart_delay_max_seconds),)


def test_the_count_begins_anew_once_it_stayed_ready() -> None:
    now, _ = replay(*served(A), Exited(1, "", 10.0), WaitOver(1), BecameReady(2, 20.0))
    assert step(now, Exited(2, "", 79.0))[0].crashes == 2
    assert step(now, Exited(2, "", 80.0))[0].crashes == 1


def test_a_first_load_or_what_will_repeat_is_not_tried_again() -> None:
    now, _ = replay(StartAsked(A), Spawned(1, 42), Exited(1, "bad file", 10.0))
    assert now.status is ServerStatus.CRASHED
    now, _ = replay(*served(A), Exited(1, "bad flag", 10.0, repeats=True))
    assert now.status is ServerStatus.CRASHED
    now, _ = replay(*served(A.replace(restart_max=0)), Exited(1, "", 10.0))
    assert now.status is ServerStatus.CRASHED


def test_a_back_off_can_be_called_off_or_cut_short() -> None:
    waiting, _ = replay(*served(A), Exited(1, "", 10.0))
    stopped, done = step(waiting, StopAsked())
    assert (stopped.status, stopped.retry_at, done) == (ServerStatus.STOPPED, None, ())
    assert step(stopped, WaitOver(1)) == (stopped, ())
    begun, done = step(waiting, StartAsked(A))
    assert (begun.status, done) == (ServerStatus.STARTING, (Begin(2, A),))
    assert step(begun, WaitOver(1)) == (begun, ())


def found(config: ServerConfig, crashes: int = 0) -> Found:
    return Found(ServerRecord(pid=7, create_time=1.0, began=0.0, crashes=crashes, config=config))


def test_crashes_count_whoever_starts_the_server_again() -> None:
    now, _ = replay(found(A), BecameReady(1, 0.0))
    for generation in (1, 2, 3):
        now, _ = step(now, Exited(generation, "again", 10.0))
        assert (now.status, now.crashes) == (ServerStatus.RESTARTING, generation)
        now, _ = step(now, found(A, crashes=generation))  # another program was faster
        now, _ = step(now, BecameReady(generation + 1, 10.0))
    now, _ = step(now, Exited(4, "for good", 10.0))
    assert now.status is ServerStatus.CRASHED
    late, _ = replay(found(A, crashes=3), BecameReady(1, 10.0))
    assert step(late, Exited(1, "again", 69.0))[0].status is ServerStatus.CRASHED
    assert step(late, Exited(1, "", 70.0))[0].crashes == 1
    now, _ = step(now, found(A))  # somebody has started it
    now, _ = step(now, BecameReady(5, 20.0))
    assert step(now, Exited(5, "", 30.0))[0].crashes == 1


def test_a_restart_that_another_program_has_begun_waits_for_that() -> None:
    now, _ = replay(*served(A), Exited(1, "SIGSEGV", 10.0), WaitOver(1))
    waiting, done = step(now, Refused(2, "started elsewhere", elsewhere_at=15.0))
    assert (waiting.status, waiting.retry_at) == (ServerStatus.RESTARTING, 20.0)
    assert (waiting.crashes, done) == (1, (Wait(2, 5.0),))
    assert step(waiting, WaitOver(2))[1] == (Begin(3, A, crashes=1),)
    assert step(now, Refused(2, "port busy"))[0].status is ServerStatus.FAILED
    now, _ = replay(StartAsked(A), Refused(1, "started elsewhere", elsewhere_at=15.0))
    assert now.status is ServerStatus.FAILED
