from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kitty_nb.supervisor.history import cached_share

MB = 1_000_000
honest = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="pages can be dropped on Linux only"
)


def write(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        for _ in range(0, size, MB):
            file.write(os.urandom(MB))
        file.flush()
        os.fsync(file.fileno())  # pages not yet written cannot be dropped
    return path


def drop(path: Path, start: int = 0) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), start, 0, os.POSIX_FADV_DONTNEED)


def dropped(path: Path) -> Path:
    """Drop the file's pages, where its file system has any to drop: tmpfs keeps them."""
    drop(path)
    if cached_share([path]) == 1.0:
        pytest.skip("files here live in memory")
    return path


@honest
@pytest.mark.parametrize("size", [3 * MB, 200 * MB])
def test_what_has_been_read_is_there_and_what_was_dropped_is_not(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "file", size)
    assert cached_share([path]) == pytest.approx(1.0, abs=0.01)
    dropped(path)
    assert cached_share([path]) == pytest.approx(0.0, abs=0.01)
    assert cached_share([path]) == pytest.approx(0.0, abs=0.01)  # looking reads nothing


@honest
def test_a_half_that_is_there_is_a_half(tmp_path: Path) -> None:
    path = write(tmp_path / "file", 200 * MB)
    dropped(path)
    path.read_bytes()
    drop(path, start=100 * MB)
    assert cached_share([path]) == pytest.approx(0.5, abs=0.03)


@honest
def test_shards_count_by_their_size(tmp_path: Path) -> None:
    cold, hot = write(tmp_path / "cold", 30 * MB), write(tmp_path / "hot", 10 * MB)
    dropped(cold)
    assert cached_share([cold, hot]) == pytest.approx(0.25, abs=0.03)


def test_more_shards_than_windows_are_all_looked_at(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(number), MB) for number in range(70)]
    share = cached_share(paths)
    assert share is None or share == pytest.approx(1.0, abs=0.05)


def test_where_there_is_nothing_to_look_at_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert cached_share([]) is None
    assert cached_share([tmp_path / "empty"]) is None
    assert cached_share([tmp_path / "gone"]) is None
    assert cached_share([tmp_path]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone hides others' pages")
def test_a_file_of_somebody_else_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    readable = Path(os.__file__)
    monkeypatch.setattr(os, "geteuid", lambda: readable.stat().st_uid + 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cached_share([readable]) is None


def test_a_hole_is_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 400_000_000_000)
    share = cached_share([path])
    assert share is None or share == pytest.approx(0.0, abs=0.01)
