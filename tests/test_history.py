from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from threading import Event as ThreadEvent
from typing import Any

import anyio
import pytest
from conftest import eventually
from other_kernel import runs

from kitty_nb import ModelManager, ServerConfig, ServerStatus, Supervisor
from kitty_nb.errors import ServerCrashedError, ServerFailedError
from kitty_nb.safe_files import Database
from kitty_nb.supervisor.events import Activity, Event, ProgressMade
from kitty_nb.supervisor.history import (
    LoadHistory,
    LoadRecord,
    Outcome,
    cached_share,
    gather_facts,
)

RECORD = LoadRecord(
    path="/m.gguf",
    size=1000,
    mtime_ns=1,
    digest="d",
    engine="embedded",
    version="1",
    host="here",
    settings="{}",
    cached=0.0,
    starting=0.1,
    loading=2.0,
    preparing=0.5,
    loaded=1000,
    outcome=Outcome.READY,
    at=100.0,
)


def test_how_a_prompt_was_read_is_remembered_with_its_settings(tmp_path: Path) -> None:
    async def run() -> None:
        history = LoadHistory(tmp_path / "history.sqlite3", pytest.fail)
        assert await history.prompt_pace(RECORD) == (None, 0)
        await history.set_prompt_pace(RECORD, 90.0, 0)
        await history.set_prompt_pace(RECORD, 120.5, 516)
        assert await history.prompt_pace(RECORD) == (120.5, 516)
        other = replace(RECORD, settings='{"threads": 1}')
        assert await history.prompt_pace(other) == (None, 0)

    anyio.run(run)


def rows(path: Path) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT outcome, loading, cached, path FROM loads").fetchall()
    finally:
        connection.close()


def use(path: Path, *records: LoadRecord) -> tuple[tuple[LoadRecord, ...], list[str]]:
    """Add records, recall what there is, and return that with the complaints."""
    told: list[str] = []

    async def run() -> tuple[LoadRecord, ...]:
        history = LoadHistory(path, told.append)
        for record in records:
            await history.add(record)
        return await history.recall(RECORD.host, RECORD.path)

    return anyio.run(run), told


def test_loads_are_remembered_this_models_first(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.sqlite3"
    other = replace(RECORD, path="/other.gguf")
    failed = replace(RECORD, outcome=Outcome.CRASHED)
    elsewhere = replace(RECORD, host="there")
    found, told = use(path, RECORD, other, failed, elsewhere)
    assert (found, told) == ((RECORD, other), [])
    assert len(rows(path)) == 4


@pytest.mark.parametrize(
    "content", [b"not a database at all" * 100, b"SQLite format 3\x00" + b"x" * 4096]
)
def test_a_damaged_file_is_set_aside_and_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"history-{len(content)}.sqlite3"
    path.write_bytes(content)
    found, told = use(path, RECORD)
    assert found == (RECORD,)
    assert "is damaged" in told[0]
    assert [p.read_bytes() for p in tmp_path.glob("*.damaged-*")] == [content]


def test_of_two_that_find_it_damaged_one_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = tmp_path / "history.sqlite3", b"not a database at all" * 100
    path.write_bytes(content)
    both, written, begin_anew = Barrier(2, timeout=30), ThreadEvent(), Database._begin_anew

    def begin(database: Database, *opened: Any) -> None:
        if both.wait():
            assert written.wait(30)
        begin_anew(database, *opened)

    def keep(_: int) -> None:
        use(path, RECORD)
        written.set()

    monkeypatch.setattr(Database, "_begin_anew", begin)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(keep, range(2)))
    assert len(rows(path)) == 2
    assert [p.read_bytes() for p in tmp_path.glob("*.damaged-*")] == [content]


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "newer.sqlite3"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    found, told = use(path, RECORD)
    assert (found, path.read_bytes()) == ((), before)
    assert "newer version" in told[0]


def test_a_locked_file_costs_the_history_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "locked.sqlite3"
    use(path, RECORD)
    monkeypatch.setattr("kitty_nb.safe_files._BUSY_SECONDS", 0.1)
    connection = sqlite3.connect(path)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        _, told = use(path, RECORD)
    finally:
        connection.close()
    assert any("locked" in sentence for sentence in told)
    assert len(rows(path)) == 1


def test_a_folder_that_cannot_be_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found, told = use(tmp_path / "file" / "history.sqlite3", RECORD, RECORD)
    assert found == ()
    assert len(told) == 1


def load(config: ServerConfig) -> list[Event]:
    events: list[Event] = []

    async def run() -> None:
        async with Supervisor(config) as supervisor:
            supervisor.subscribe(events.append)
            await supervisor.start()

    anyio.run(run)
    return events


def test_a_load_writes_its_row_and_the_next_one_is_foreseen(
    misbehaving: Callable[..., ServerConfig],
) -> None:
    config = misbehaving("--load-seconds", "2", "--prepare-seconds", "1")
    first = load(config)
    [(outcome, loading, _, path)] = rows(config.history)
    assert (outcome, path) == ("ready", str(config.model))
    assert isinstance(loading, float)
    second = load(config)
    seen = [event.progress for event in second if isinstance(event, ProgressMade)]
    foreseen = next(progress for progress in seen if progress.eta is not None)
    assert foreseen.fraction < 0.5
    began = [event.progress for event in first if isinstance(event, ProgressMade)][1]
    assert began.eta is None
    assert len(rows(config.history)) == 2


def test_a_crash_is_written_too_and_foresees_nothing(
    misbehaving: Callable[..., ServerConfig],
) -> None:
    config = misbehaving("--never-ready", "--exit-after", "0.2", "--exit-code", "1")
    with pytest.raises(ServerCrashedError):
        load(config)
    assert [outcome for outcome, *_ in rows(config.history)] == ["crashed"]


def test_a_history_that_fails_never_fails_a_load(config: ServerConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    events = load(config.replace(history=tmp_path / "file" / "h.sqlite3"))
    said = [event.message for event in events if isinstance(event, Activity)]
    assert any("load history" in message for message in said)
    assert any(message.startswith("Model loaded") for message in said)


def test_a_model_replaced_under_its_name_is_another(config: ServerConfig, tmp_path: Path) -> None:
    assert config.model
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(config.model.read_bytes())
    before = gather_facts(config.replace(model=copy))
    copy.write_bytes(config.model.read_bytes().replace(b"kitty demo", b"other demo"))
    after = gather_facts(config.replace(model=copy))
    assert before.size == after.size
    assert before.digest != after.digest


def test_the_cached_share_is_between_nothing_and_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3_000_000)
    share = cached_share([path])
    assert share is None or share == pytest.approx(1.0, abs=0.01)
    assert cached_share([]) is None
    assert cached_share([tmp_path / "gone"]) is None
    (tmp_path / "empty").touch()
    assert cached_share([tmp_path / "empty"]) is None


def change(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("value", ["'soon'", "NULL", "-1", "9e999", "x'00'"])
def test_what_is_no_number_is_passed_over(tmp_path: Path, value: str) -> None:
    path = tmp_path / "history.sqlite3"
    use(path, RECORD, RECORD)
    change(path, f"UPDATE loads SET loading = {value} WHERE id = 1")
    assert use(path) == ((RECORD,), [])


def test_a_table_of_another_shape_costs_the_history_only(tmp_path: Path) -> None:
    path = tmp_path / "shape.sqlite3"
    change(path, "CREATE TABLE loads (id INTEGER PRIMARY KEY, what)")
    found, told = use(path, RECORD)
    assert found == ()
    assert "cannot be used" in told[0]


def test_only_the_newest_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitty_nb.supervisor.history._ROWS_KEPT", 3)
    records = [replace(RECORD, at=float(number)) for number in range(5)]
    found, _ = use(tmp_path / "history.sqlite3", *records)
    assert [record.at for record in found] == [4.0, 3.0, 2.0]


def test_many_programs_can_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitty_nb.safe_files._BUSY_SECONDS", 30)
    path = tmp_path / "history.sqlite3"
    told: list[str] = []

    async def write() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(LoadHistory(path, told.append).add, RECORD)

    use(path, RECORD)
    anyio.run(write)
    assert told == []
    assert len(rows(path)) == 21


def test_a_file_that_may_not_be_written_can_still_be_read(tmp_path: Path) -> None:
    path = tmp_path / "readonly.sqlite3"
    use(path, RECORD)
    change(path, "PRAGMA journal_mode = DELETE")
    (tmp_path / "readonly.sqlite3").chmod(0o400)
    if os.access(path, os.W_OK):
        pytest.skip("root may write everything")
    found, told = use(path, RECORD)
    assert found == (RECORD,)
    assert "cannot be used" in told[0]


def test_how_a_load_ended_is_written(misbehaving: Callable[..., ServerConfig]) -> None:
    config = misbehaving("--never-ready", stall_seconds=0.5)
    with pytest.raises(ServerFailedError, match="stalled"):
        load(config)

    async def stop() -> None:
        events: list[Event] = []
        async with Supervisor(config.replace(stall_seconds=60)) as supervisor:
            supervisor.subscribe(events.append)
            await supervisor.start(wait_for_ready=False)
            # Until the model's files have been looked at, there is nothing to write.
            while not any(isinstance(e, ProgressMade) and e.progress.elapsed for e in events):
                await anyio.sleep(0.01)
            await supervisor.stop()

    anyio.run(stop)
    assert [outcome for outcome, *_ in rows(config.history)] == ["failed", "stopped"]


def test_a_load_that_another_program_stops_has_not_crashed(
    misbehaving: Callable[..., ServerConfig],
) -> None:
    config = misbehaving("--never-ready")
    with ModelManager(config=config) as first, ModelManager(config=config) as second:
        first.start()
        eventually(lambda: second.state.pid is not None)
        eventually(lambda: first.progress and first.progress.elapsed)  # what to write is known
        second.stop().wait(20)
        eventually(lambda: first.state.status is ServerStatus.STOPPED)
    assert [outcome for outcome, *_ in rows(config.history)] == ["stopped"]


def test_a_history_in_use_does_not_delay_a_crash(
    misbehaving: Callable[..., ServerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.safe_files._BUSY_SECONDS", 5)
    config = misbehaving("--never-ready", "--exit-after", "0.3", "--exit-code", "1")
    use(config.history, RECORD)
    connection = sqlite3.connect(config.history)
    ended: list[float] = []

    async def run() -> None:
        async with Supervisor(config) as supervisor:
            connection.execute("BEGIN EXCLUSIVE")  # the forecast waits for it, too
            await supervisor.start(wait_for_ready=False)
            while supervisor.state.pid is None:
                await anyio.sleep(0.005)
            pid = supervisor.state.pid
            while runs(pid):
                await anyio.sleep(0.005)
            died = time.monotonic()
            with anyio.fail_after(10):
                while supervisor.state.status is not ServerStatus.CRASHED:
                    await anyio.sleep(0.005)
            ended.append(time.monotonic() - died)

    try:
        anyio.run(run)
    finally:
        connection.close()
    assert ended[0] < 3  # less than the history waits for its lock
