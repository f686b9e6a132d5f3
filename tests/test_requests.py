"""What a server's log and slots tell of its requests."""

from __future__ import annotations

import math
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import eventually

from kitty_nb import ModelManager, ServerConfig
from kitty_nb.supervisor import health, requests, server
from kitty_nb.supervisor.events import Ending, Event, StateChanged, Working
from kitty_nb.supervisor.health import NOT_IN_TIME
from kitty_nb.supervisor.requests import RequestLog, WorkMeter

LOGS = {
    name: text.strip().split("\n")
    for name, text in tomllib.loads(Path(__file__).with_name("requests.toml").read_text()).items()
}
EPOCH, LATER = 1_000_000.0, 1_000.0


def lines(engine: str, task: int) -> list[str]:
    return [line for line in LOGS[engine] if f"task {task} |" in line]


def slot(decoded: int, **told: Any) -> dict[str, Any]:
    tokens = [{"n_decoded": decoded, "n_remain": 30 - decoded}]
    return {"id": 3, "id_task": 1, "is_processing": True, "next_token": tokens, **told}


def test_finished_requests_of_the_native_engine() -> None:
    log = RequestLog(wall=lambda: EPOCH + LATER)
    first, again, failed, left = log.read(LOGS["native"], LATER)
    assert first.at == pytest.approx(EPOCH + 5.64, abs=0.01)
    assert (first.prompt_tokens, first.answer_tokens, first.cached) == (3414, 30, 0)
    assert first.first_token == pytest.approx(91.92, abs=0.01)
    assert first.seconds == pytest.approx(112.42, abs=0.01)
    assert first.tokens_per_second == pytest.approx(29 / 20.499, abs=0.01)
    assert (again.prompt_tokens, again.cached) == (3415, pytest.approx(3399 / 3415))
    assert (first.ended, left.ended) == (Ending.FINISHED, Ending.CANCELLED)
    assert failed.ended is Ending.ERROR
    assert failed.error.startswith("request (5515 tokens) exceeds")
    assert tuple(log.finished) == (first, again, failed, left)
    assert not log.active


def test_a_request_after_the_machine_slept_has_its_true_time() -> None:
    now = EPOCH
    log = RequestLog(wall=lambda: now)
    log.read(lines("native", 1), 119.0)
    now += 8 * 3600  # meanwhile, the clock of server and log stood still
    (request,) = log.read(lines("native", 934), 130.0)
    assert request.at == pytest.approx(now - (130.0 - 118.077), abs=0.01)


def test_finished_requests_of_the_embedded_engine() -> None:
    log = RequestLog()
    (first,) = log.read(LOGS["embedded"], LATER)
    assert (first.prompt_tokens, first.answer_tokens, first.cached) == (54, 10, 0)
    assert first.seconds == pytest.approx(25.74, abs=0.01)
    (again,) = log.active.values()  # when the recording ended
    assert (again.prompt, again.cached, again.read) == (54, 49, 50)


def test_the_requests_of_a_routers_models_are_told_apart() -> None:
    alone = RequestLog(wall=lambda: EPOCH).read(LOGS["native"], LATER)
    router = RequestLog(wall=lambda: EPOCH)
    spawned = "0.00.000.000 I srv          load: spawning server instance with name={} on port {}"
    models = {"small": 3001, "large": 40002}
    said = [spawned.format(*one) for one in models.items()]
    both = [f"[{port:5d}] {line}" for line in LOGS["native"] for port in models.values()]
    told = router.read(said + both, LATER)
    for name in models:
        assert [one for one in told if one.model == name] == [
            replace(one, model=name) for one in alone
        ]
    router.read((f"[ 3001] {lines('native', 1)[0]}",), LATER)
    assert WorkMeter(router, routes=True).work(LATER).busy == 1
    router.read(("srv operator(): instance name=small exited with status 9",), LATER)
    assert not router.tasks


PROBE = (
    "0.01.000.000 I slot launch_slot_: id  0 | task 0 | processing task, is_child = 0",
    "0.01.100.000 I slot print_timing: id  0 | task 0 | prompt eval time = 99.0 ms / 2 tokens",
    "0.01.100.000 I slot print_timing: id  0 | task 0 |        eval time = 0.01 ms / 1 tokens",
    "0.01.100.000 I slot      release: id  0 | task 0 | stop processing: n_tokens = 2, trunc",
)


def test_the_request_by_which_a_server_proves_itself_is_not_counted() -> None:
    log = RequestLog()
    log.ready = 0.5
    assert log.read(PROBE, LATER) == ()
    again = [line.replace("task 0", "task 2") for line in PROBE]
    assert len(log.read(again, LATER)) == 1


def test_nor_are_those_of_others_that_watch_the_load() -> None:
    log = RequestLog()
    log.ready = math.inf
    large = [line.replace("task 0", "task 1").replace("/ 2 tok", "/ 90 tok") for line in PROBE]
    second = [line.replace("task 0", "task 2") for line in PROBE]
    assert len(log.read(large, LATER)) == 1  # of a client that does not wait for READY
    assert log.read(PROBE, LATER) == ()
    log.ready = 1.05
    assert log.read(second, LATER) == ()
    user = [line.replace("0.01.", "0.02.").replace("task 0", "task 3") for line in PROBE]
    assert len(log.read(user, LATER)) == 1


def test_the_first_request_to_a_routers_model_is_counted_however_small() -> None:
    log = RequestLog()
    log.ready = 0.5
    (request,) = log.read([f"[ 3001] {line}" for line in PROBE], LATER)
    assert request.prompt_tokens == 2


def test_what_the_log_says_is_stripped_of_controls() -> None:
    log = RequestLog()
    launch, *_, release = lines("native", 1)
    error = "srv send_error: task id = 1, error: \x1b[31mbad\x07"
    (request,) = log.read((launch, error, release), LATER)
    assert request.error.isprintable()


def test_drafts_are_told() -> None:
    launch, *_, release = lines("native", 1)
    drafts = "slot print_timing: id  3 | task 1 | draft acceptance = 0.57576 (171 accepted / 297"
    (request,) = RequestLog().read((launch, drafts, release), LATER)
    assert request.accepted == pytest.approx(0.576, abs=0.001)


def test_an_answer_that_its_limit_cut_is_told_from_a_finished_one() -> None:
    meter = WorkMeter(RequestLog())
    launch, *rest = lines("native", 1)
    meter.log.read((launch,), 6.0)
    meter.look([slot(12)], 1.4, 100.0)
    (request,) = meter.log.read(rest, 119.0)
    assert request.ended is Ending.LENGTH


@pytest.mark.parametrize("shifts", [False, True])
def test_so_is_one_that_the_context_s_end_cut(shifts: bool) -> None:
    launch, *_, release = lines("native", 1)
    shift = "slot  pre_decode: id  3 | task 1 | slot context shift, n_keep = 1, n_left = 2046"
    told = (launch, *[shift] * shifts, release.replace("truncated = 0", "truncated = 1"))
    (request,) = RequestLog().read(told, LATER)
    assert request.ended is (Ending.FINISHED if shifts else Ending.LENGTH)


def test_a_cancelled_request_has_the_speed_that_its_slot_told() -> None:
    meter = WorkMeter(RequestLog())
    launch, *_, release = lines("native", 1)
    meter.log.read((launch,), 6.0)
    for decoded, at in ((0, 7.0), (2, 100.0), (2, 101.0), (12, 105.0)):
        meter.look([slot(decoded)], None, at)
    cancel = "1.50.000.000 W srv          stop: cancel task, id_task = 1"
    (request,) = meter.log.read((cancel, release), 119.0)
    assert (request.ended, request.answer_tokens) == (Ending.CANCELLED, 12)
    assert request.tokens_per_second == pytest.approx(2.0)


def test_a_prompt_is_followed_between_its_batches() -> None:
    meter = WorkMeter(RequestLog())
    launch, half, *rest = lines("native", 1)
    meter.log.read((launch,), 5.7)
    reading = meter.work(7.0).reading
    assert reading
    assert not reading.total
    assert WorkMeter(meter.log, routes=True).work(7.0).reading is None
    meter.log.read((half,), 51.7)
    found = [meter.work(at).reading for at in (52.0, 60.0, 70.0)]
    assert all(one and one.fraction and one.seconds_left for one in found)
    truth = [(at - 5.64) / 91.9 for at in (52.0, 60.0, 70.0)]
    assert [one.fraction for one in found if one] == pytest.approx(truth, abs=0.16)
    slow = meter.work(300.0).reading
    assert slow
    assert slow.fraction
    assert slow.fraction < 1
    meter.look([slot(1)], 0.0, 98.0)
    assert meter.work(98.0).reading is None
    meter.log.read(rest, 119.0)
    assert meter.work(119.0).busy == 0


def test_the_whole_prompt_is_known_at_once_where_the_log_tells() -> None:
    meter = WorkMeter(RequestLog())
    meter.log.read(lines("native", 1), 119.0)
    meter.log.read((), 119.0)
    meter.log.read(lines("embedded", 0)[:3], 120.0)
    reading = meter.work(120.0).reading
    assert reading
    later = meter.work(121.0).reading
    assert later
    assert later.done == pytest.approx(37.1 * (121 - meter.log.active[1, 0].began), abs=1)


def prompt_lines(
    task: int, began: float, speed: float, total: int = 1000
) -> list[tuple[float, str]]:
    """What a build logs that reads 400 tokens at once, and 116 at the end apart."""
    lines = [(began, "processing task"), (began, f"new prompt, task.n_tokens = {total}")]
    lines.append((began, "cached n_tokens = 0, memory_seq_rm [0, end)"))
    for read in (400, 800, total - 116, total - 4):
        share = f"prompt processing, n_tokens = {read}, progress = {read / total:.2f}"
        lines.append((began + read / speed, share))
    end = began + total / speed
    took = f"prompt eval time = {total / speed * 1000:.2f} ms / {total} tokens"
    lines += [(end, took), (end, f"stop processing: n_tokens = {total}, truncated = 0")]
    return [(at, f"slot a: id  0 | task {task} | {words}") for at, words in lines]


@pytest.mark.parametrize("slower", [1.0, 2.0, 5.0])
def test_on_a_busy_machine_the_processor_s_time_tells(slower: float) -> None:
    meter = WorkMeter(RequestLog())

    def follow(task: int, began: float, slower: float) -> list[tuple[float, float]]:
        """Read a prompt; two processors compute it where nothing else is to be done."""
        lines, seconds = prompt_lines(task, began, 100.0 / slower), 10.0 * slower
        shown: list[tuple[float, float]] = []
        for moment in range(101):
            now = began + moment / 100 * seconds
            meter.log.spent = task * 100 + (now - began) * 2 / slower
            while lines and lines[0][0] <= now:
                meter.log.read((lines.pop(0)[1],), now)
            if (reading := meter.work(now).reading) and reading.total:
                shown.append((moment / 100, reading.fraction))
        return shown

    follow(1, -20.0, 1.0)
    assert max(abs(truth - told) for truth, told in follow(2, 0.0, slower)) < 0.1


@pytest.mark.parametrize(("slower", "error"), [(1.0, 0.05), (1.2, 0.1), (3.0, 0.25), (0.5, 0.25)])
def test_a_prompt_that_is_read_at_another_pace_is_corrected_batch_by_batch(
    slower: float, error: float
) -> None:
    meter = WorkMeter(RequestLog(), 400)
    for at, line in prompt_lines(1, -20.0, 100.0, 900):
        meter.log.read((line,), at)
    lines, seconds = prompt_lines(3, 0.0, 100.0 / slower), 10.0 * slower
    shown: list[tuple[float, float]] = []
    for moment in range(1, 100):
        now = moment / 100 * seconds
        while lines and lines[0][0] <= now:
            meter.log.read((lines.pop(0)[1],), now)
        reading = meter.work(now).reading
        assert reading
        shown.append((moment / 100, reading.fraction))
    assert max(abs(truth - told) for truth, told in shown) < error
    assert [told for _, told in shown] == sorted(told for _, told in shown)
    assert shown[-1][1] == pytest.approx(1, abs=0.05)


def test_what_is_lost_with_a_rotated_log_does_not_look_busy_for_ever() -> None:
    meter = WorkMeter(RequestLog())
    meter.log.read(lines("native", 1)[:1], 6.0)
    for at in (8.0, 9.5):
        meter.look([{"id": 3, "is_processing": False}], 0.0, at)
    assert not meter.busy


@pytest.mark.parametrize("began", [5.0, 90.0])
def test_a_request_that_slots_no_longer_show_is_told_once_its_log_arrives(began: float) -> None:
    meter = WorkMeter(RequestLog())
    launch, *rest = lines("native", 1)
    meter.log.read((launch,), began)
    meter.look([slot(3)], 0.0, 100.0)
    meter.look([{"id": 3, "is_processing": False}], 0.0, 118.0)
    (request,) = meter.log.read(rest, 118.1)
    assert request.answer_tokens == 30
    assert not meter.busy


def test_a_request_that_began_while_the_slots_answered_is_told() -> None:
    meter = WorkMeter(RequestLog())
    launch, *rest = lines("native", 1)  # dated by the process, seconds before it is read
    meter.log.read((launch,), 60.0)
    meter.look([{"id": 3, "is_processing": False}], 0.0, 60.0)
    assert meter.busy
    assert meter.log.read(rest, 120.0)


def test_a_request_that_ended_while_the_slots_answered_does_not_begin_again() -> None:
    meter = WorkMeter(RequestLog())
    first = lines("native", 1)
    meter.log.read(first, 119.0)
    meter.look([slot(30)], 1.4, 119.0)
    assert not meter.busy
    meter.log.read([line.replace("task 1 |", "task 2 |") for line in first], 119.0)
    meter.look([slot(30)], 1.4, 119.0)  # another one has ended since on its slot
    assert not meter.busy


def test_a_request_stays_while_the_server_does_not_answer(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_PATIENCE", 0.3)
    monkeypatch.setattr(server, "_ASK_READY", 0.1)
    monkeypatch.setattr(server, "_SLOTS_ASKED", 60.0)
    monkeypatch.setattr(requests, "_END_WITHIN", 0.1)
    silent = 0

    def count(event: Event) -> None:
        nonlocal silent
        silent += isinstance(event, StateChanged) and event.state.last_health_check is NOT_IN_TIME

    with ModelManager(config=config) as manager:
        process = psutil.Process(manager.start().wait(60).pid)
        manager.chat("Hello", max_tokens=1).wait(60)
        eventually(lambda: manager.requests and not manager.work.busy)
        manager.check_health().wait(60)  # sees idle slots
        process.suspend()
        try:
            with config.log_path.open("a") as log:
                log.write("slot launch_slot_: id  0 | task 900 | processing task, is_child = 0\n")
            eventually(lambda: manager.work.busy == 1)
            manager.subscribe(count)
            eventually(lambda: silent > 3)
            assert manager.work.busy == 1
        finally:
            process.resume()
        eventually(lambda: manager.work.busy == 0, why="its slots tell that it is gone")


def test_the_work_of_a_server_that_logs_nothing_is_published(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_ASK_READY", 0.02)
    told: list[Event] = []
    with ModelManager(config=config.replace(extra_args="-lv 0")) as manager:
        manager.start().wait(60)
        manager.subscribe(told.append)

        def published() -> bool:
            manager.chat("Hello", max_tokens=400).wait(60)
            return any(isinstance(event, Working) and event.work.busy for event in told)

        eventually(published, within=20)
        eventually(lambda: [one for one in told if isinstance(one, Working)][-1].work.busy == 0)


def test_the_work_of_a_server_without_a_log_is_told_by_its_slots() -> None:
    meter = WorkMeter(RequestLog())
    meter.look([slot(0), {"id": 0, "is_processing": False}], 0.0, 10.0)
    work = meter.work(12.0)
    assert (work.busy, work.slots) == (1, 2)
    assert work.reading
    assert work.reading.seconds == 2
    meter.look([slot(3), {"id": 0, "is_processing": False}], 4.5, 13.0)
    work = meter.work(13.0)
    assert (work.reading, work.tokens_per_second) == (None, 4.5)
    assert meter.work(19.0).tokens_per_second is None  # it has not answered since


@pytest.mark.parametrize(
    "words",
    [
        "prompt processing, n_tokens = 50, progress = 1.2.3",
        "prompt eval time = 1.2.3 ms / 5 tokens",
        "new prompt, n_prompt_tokens = " + "9" * 5000,
        "prompt processing, n_tokens = " + "9" * 400 + ", progress = 0.5",
        "prompt processing, n_tokens = 40, progress = 0." + "0" * 310 + "1",
        "prompt processing, n_tokens = 1," * 500,
    ],
)
def test_whatever_a_log_says_is_survived(words: str) -> None:
    log = RequestLog()
    log.read(["slot launch_slot_: id  0 | task 1 | processing task"], 1.0)
    began = time.monotonic()
    log.read([f"slot update_slots: id  0 | task 1 | {words}", words], 2.0)
    log.read([f"send_error: task id = {'9' * 5000}, error: x", "9" * 5000 + ".00.000.000 hi"], 3.0)
    assert time.monotonic() - began < 5
    assert len(log.active) == 1
