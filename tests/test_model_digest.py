"""The identity of a model: the SHA-256 of its files, read once."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import anyio
import platformdirs
import pytest

from kitty_nb import ServerConfig
from kitty_nb.catalog.cache import FileDigest
from kitty_nb.errors import ModelFileError
from kitty_nb.experiments.recording import digest_model
from kitty_nb.experiments.run_record import ModelDigest

OLD = 1_700_000_000_000_000_000


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)


def write(path: Path, content: bytes, mtime_ns: int = OLD) -> Path:
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def settings(model: Path, *extra_args: str) -> ServerConfig:
    return ServerConfig().model_copy(update={"model": model, "extra_args": extra_args})


def digest(config: ServerConfig) -> tuple[ModelDigest, list[tuple[int, int]]]:
    """The digest, and the progress that was told."""
    told: list[tuple[int, int]] = []
    return anyio.run(digest_model, config, lambda *progress: told.append(progress)), told


def expected(path: Path) -> FileDigest:
    content = path.read_bytes()
    return FileDigest(name=path.name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_all_files_that_a_server_reads_count(tmp_path: Path) -> None:
    shards = [write(tmp_path / f"m-{n:05d}-of-00003.gguf", b"shard %d" % n) for n in (1, 2, 3)]
    companions = [write(tmp_path / f"{name}.gguf", name.encode()) for name in ("eye", "a", "b")]
    eye, *adapters = map(str, companions)
    config = settings(shards[0], "--mmproj", eye, "--lora", ",".join(adapters), "--keep", "3")
    found, told = digest(config)
    assert found.shards == tuple(map(expected, shards))
    assert found.companions == tuple(map(expected, companions))
    assert found.name == shards[0].name
    assert found.size == sum(shard.stat().st_size for shard in shards)
    total = found.size + sum(path.stat().st_size for path in companions)
    assert told[-1] == (total, total)
    assert told == sorted(told)


@pytest.mark.parametrize("flag", ["--lora-scaled", "--control-vector-scaled"])
def test_files_that_are_given_with_a_scale_count(tmp_path: Path, flag: str) -> None:
    model, *others = (write(tmp_path / f"{name}.gguf", name.encode()) for name in "abc")
    found, _ = digest(settings(model, flag, f"{others[0]}:0.5,{others[1]}:-1e-1"))
    assert found.companions == tuple(map(expected, others))


def test_an_unchanged_file_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", b"one")
    first, _ = digest(settings(path))
    write(path, b"two")  # and looks unchanged
    again, told = digest(settings(path))
    assert again == first
    assert told == []


@pytest.mark.parametrize("by", ["time", "size", "inode"])
def test_a_changed_file_is_read_again(tmp_path: Path, by: str) -> None:
    path = write(tmp_path / "m.gguf", b"one")
    digest(settings(path))
    match by:
        case "time":
            write(path, b"two", OLD + 1)
        case "size":
            write(path, b"three")
        case _:
            write(tmp_path / "next", b"two").replace(path)
    found, told = digest(settings(path))
    assert found.shards == (expected(path),)
    assert told


def test_a_file_written_a_moment_ago_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.catalog.cache._FRESH_NS", 60 * 10**9)  # on a slow machine, too
    now = time.time_ns()
    path = write(tmp_path / "m.gguf", b"one", now)
    digest(settings(path))
    write(path, b"two", now)
    assert digest(settings(path))[0].shards == (expected(path),)


def test_a_damaged_cache_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "m.gguf", b"one")
    cache = tmp_path / "cache" / "kitty_nb" / "files.sqlite3"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"no database" * 100)
    assert digest(settings(path))[0].shards == (expected(path),)
    assert "files.sqlite3" in caplog.text
    digest(settings(path))
    assert digest(settings(path))[1] == []


def test_cancelling_ends_it_at_once_and_loses_no_finished_file(tmp_path: Path) -> None:
    first = write(tmp_path / "m-00001-of-00002.gguf", b"one")
    large = tmp_path / "m-00002-of-00002.gguf"
    large.touch()
    os.truncate(large, 64 << 30)  # a hole: no byte of it is on the disk
    config = settings(first)

    async def cancel() -> float:
        seen = anyio.Event()
        cancelled = 0.0

        def watch(done: int, _: int) -> None:
            if done > 1 << 24:
                anyio.from_thread.run_sync(seen.set)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(digest_model, config, watch)
            await seen.wait()
            cancelled = time.monotonic()
            tasks.cancel_scope.cancel()
        return time.monotonic() - cancelled

    assert anyio.run(cancel) < 5
    write(first, b"two")  # and looks unchanged
    os.truncate(large, 3)
    os.utime(large, ns=(OLD, OLD))
    found, told = digest(config)
    assert found.shards[0].sha256 == hashlib.sha256(b"one").hexdigest()
    assert told[-1] == (3, 3)


def test_a_file_that_is_missing_or_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", b"one")
    with pytest.raises(ModelFileError, match=r"eye\.gguf is missing"):
        digest(settings(path, "--mmproj", str(tmp_path / "eye.gguf")))
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    with pytest.raises(ModelFileError, match=r"Can't read .*folder\.gguf"):
        digest(settings(folder))


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", b"one")

    def grow(*_: int) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    async def run() -> None:
        await digest_model(settings(path), grow)

    with pytest.raises(ModelFileError, match=r"m\.gguf changed while it was read"):
        anyio.run(run)
