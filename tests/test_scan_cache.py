"""The catalog's memory between scans, and its reports while it scans."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from model_files import write_header, write_model

from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.safe_files import NO_HOME, Database

OLD = 1_700_000_000_000_000_000
AHEAD = 4_000_000_000_000_000_000


def model(path: Path, title: str, mtime_ns: int = OLD) -> Path:
    """Write a model whose titles are of one length, so that its stamp can stay the same."""
    write_header(path, general__name=title)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def titles(folder: Path, cache: Path) -> list[str | None]:
    return [found.title for found in ModelCatalog(folder, cache).scan()]


def changed(path: Path, title: str, mtime_ns: int = OLD) -> None:
    """Change what a file says, in place: its inode stays."""
    other = model(path.with_suffix(".other"), title)
    path.write_bytes(other.read_bytes())
    other.unlink()
    os.utime(path, ns=(mtime_ns, mtime_ns))


@pytest.mark.parametrize("then", [OLD, AHEAD])
def test_an_unchanged_file_is_not_read_again(tmp_path: Path, then: int) -> None:
    folder, cache = tmp_path / "models", tmp_path / "deep" / "cache.sqlite3"
    path = model(folder / "m.gguf", "one", then)
    whole = ModelCatalog(folder, cache).scan()
    assert ModelCatalog(folder, cache).scan() == whole
    changed(path, "two", then)  # and looks unchanged
    assert titles(folder, cache) == ["one"]
    assert titles(folder, tmp_path / "other") == ["two"]


@pytest.mark.parametrize("by", ["time", "size", "inode"])
def test_a_changed_file_is_read_again(tmp_path: Path, by: str) -> None:
    folder, cache = tmp_path / "models", tmp_path / "cache.sqlite3"
    path = model(folder / "m.gguf", "one")
    assert titles(folder, cache) == ["one"]
    match by:
        case "time":
            changed(path, "two", OLD + 1)
        case "size":
            changed(path, "two".ljust(40))
        case _:
            model(tmp_path / "next", "two").replace(path)
    assert [str(title).strip() for title in titles(folder, cache)] == ["two"]


def test_a_file_written_a_moment_ago_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.catalog.cache._FRESH_NS", 60 * 10**9)  # on a slow machine, too
    folder, cache = tmp_path / "models", tmp_path / "cache.sqlite3"
    path = write_header(folder / "m.gguf", general__name="one")
    before = path.stat().st_mtime_ns
    assert titles(folder, cache) == ["one"]
    changed(path, "two", before)
    assert titles(folder, cache) == ["two"]


def test_what_could_not_be_read_is_tried_again_though_it_looks_unchanged(tmp_path: Path) -> None:
    """As after a disk's error, or a permission given since."""
    folder, cache = tmp_path / "models", tmp_path / "cache.sqlite3"
    folder.mkdir()
    path = write_model(folder / "m.gguf")
    whole = path.read_bytes()
    os.utime(path, ns=(OLD, OLD))
    for content, readable in ((b"x" * len(whole), False), (whole, True)):
        path.write_bytes(content)
        os.utime(path, ns=(OLD, OLD))
        (found,) = ModelCatalog(folder, cache).scan()
        assert (found.problem is None) is readable


@pytest.mark.parametrize("number", [3, (1 << 63) + 3])
def test_a_file_from_the_far_future_with_a_large_number_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder, cache = tmp_path / "models", tmp_path / "cache.sqlite3"
    path = model(folder / "m.gguf", "one")
    stat = Path.stat

    def odd(self: Path, **options: bool) -> os.stat_result:
        status = stat(self, **options)
        if self != path:
            return status
        return SimpleNamespace(  # type: ignore[return-value]
            st_mode=status.st_mode, st_size=status.st_size, st_mtime_ns=1 << 64, st_ino=number
        )

    monkeypatch.setattr(Path, "stat", odd)
    assert titles(folder, cache) == ["one"]
    path.write_bytes(path.read_bytes().replace(b"one", b"two"))
    assert titles(folder, cache) == ["one"]


def test_a_name_that_is_no_text_is_remembered(tmp_path: Path) -> None:
    folder, cache = tmp_path / "models", tmp_path / "cache.sqlite3"
    try:
        path = model(folder / os.fsdecode(b"m\xff.gguf"), "one")
    except OSError:
        pytest.skip("this file system takes text only")
    assert titles(folder, cache) == ["one"]
    changed(path, "two")
    assert titles(folder, cache) == ["one"]


@pytest.mark.parametrize("damage", ["garbage", "rows", "other rows", "schema"])
def test_a_damaged_cache_costs_the_cache_alone(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = tmp_path / "models", tmp_path / "cache.sqlite3"
    path = model(folder / "m.gguf", "one")
    assert titles(folder, cache) == ["one"]
    changed(path, "two")
    if damage == "garbage":
        cache.write_bytes(b"no database" * 1000)
    else:
        with closing(sqlite3.connect(cache)) as files, files:
            (facts,) = files.execute("SELECT facts FROM files").fetchone()
            less = json.dumps([facts]) if damage == "other rows" else "[1, 2"
            files.execute("UPDATE files SET facts = ?", (less,))
            if damage == "schema":
                files.execute("ALTER TABLE files RENAME TO others")
    assert titles(folder, cache) == ["two"]
    assert (str(cache) in caplog.text) == (damage in {"garbage", "schema"})
    if damage != "schema":
        changed(path, "3rd")
        assert titles(folder, cache) == ["two"], "a cache is kept again"


def test_programs_that_create_a_cache_at_once_all_use_it(tmp_path: Path) -> None:
    complaints: list[str] = []
    together = threading.Barrier(8)
    tables = ("DROP TABLE IF EXISTS files", "CREATE TABLE files (name)")

    def use(round_: int) -> None:
        path = tmp_path / f"{round_}.sqlite3"
        database = Database(path, "It", "", complaints.append, tables)
        together.wait()
        database.use(lambda file: file.execute("INSERT INTO files VALUES (1)"), None)

    for round_ in range(8):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(use, [round_] * 8))
        with closing(sqlite3.connect(tmp_path / f"{round_}.sqlite3")) as file:
            assert file.execute("SELECT count(*) FROM files").fetchone() == (8,)
    assert not complaints


def test_a_cache_of_another_version(tmp_path: Path) -> None:
    folder, cache = tmp_path / "models", tmp_path / "cache.sqlite3"
    path = model(folder / "m.gguf", "one")
    titles(folder, cache)
    changed(path, "two")
    with closing(sqlite3.connect(cache)) as files, files:
        files.execute("PRAGMA user_version = 999")
    assert titles(folder, cache) == ["two"]
    with closing(sqlite3.connect(cache)) as files, files:
        assert files.execute("PRAGMA user_version").fetchone() == (999,), "newer: left alone"
        files.execute("PRAGMA user_version = 0")
    changed(path, "3rd")
    assert titles(folder, cache) == ["3rd"], "older: begun anew"


def test_without_a_home_folder_nothing_is_kept_and_nothing_complained_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model(tmp_path / "models" / "m.gguf", "one")
    assert titles(tmp_path / "models", NO_HOME / "cache.sqlite3") == ["one"]
    assert not caplog.text


def test_a_locked_or_impossible_cache_costs_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.safe_files._BUSY_SECONDS", 0.1)
    folder, cache = tmp_path / "models", tmp_path / "cache.sqlite3"
    path = model(folder / "m.gguf", "one")
    titles(folder, cache)
    with closing(sqlite3.connect(cache)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert titles(folder, cache) == ["one"]
    assert titles(folder, path / "below-a-file" / "cache") == ["one"]
    assert titles(folder, tmp_path) == ["one"]


def test_a_scan_reports_as_it_goes(tmp_path: Path) -> None:
    folder, cache = tmp_path / "models", tmp_path / "cache.sqlite3"
    model(folder / "known.gguf", "one")
    catalog = ModelCatalog(folder, cache)
    catalog.scan()
    for number in range(5):
        model(folder / f"{number}.gguf", str(number))
    steps = list(catalog.steps())
    assert (steps[0].done, steps[0].total) == (1, 6)
    assert [found.title for found in steps[0].models] == ["one"]
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert (steps[-1].done, steps[-1].total) == (6, 6)
    assert list(steps[-1].models) == catalog.scan()


def test_a_scan_may_be_left_early(tmp_path: Path) -> None:
    for number in range(20):
        model(tmp_path / "models" / f"{number}.gguf", str(number))
    steps = ModelCatalog(tmp_path / "models", tmp_path / "cache").steps()
    next(steps)
    steps.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("kitty_nb catalog")]
