from __future__ import annotations

from pathlib import Path

from kitty_nb.supervisor.log import LogTail, rotate


def test_only_whole_new_lines_come(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntw")
    with LogTail(path) as tail, path.open("ab") as log:
        assert tail.read() == ("one",)
        assert tail.read() == ()
        log.write(b"o\r\nthr\xffee")
        log.flush()
        assert tail.read() == ("two",)
        assert tail.read(to_end=True) == ("thr\N{REPLACEMENT CHARACTER}ee",)


def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 1_000_000)
    with LogTail(path) as tail:
        lines = [line for _ in range(10) for line in tail.read()]
    assert lines
    assert max(map(len, lines)) <= 1 << 14


def test_too_far_behind_it_skips_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"early\n" + b"flood\n" * 2_000_000 + b"late\n")
    with LogTail(path) as tail:
        first, *rest = tail.read()
    assert "bytes skipped" in first
    assert "early" not in rest
    assert rest[-1] == "late"


def test_an_emptied_log_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("a long first line\nhalf")
    with LogTail(path) as tail:
        tail.read()
        path.write_text("again\n")
        assert tail.read()[1:] == ("again",)


def test_a_log_emptied_by_hand_does_not_bring_back_the_server_before(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("of the server before\n" * 10)
    rotate(path, kept=1)
    path.write_text("one\n")
    with LogTail(path) as tail:
        assert tail.read() == ("one",)
        path.write_text("")
        assert [line for line in tail.read() if "server before" in line] == []


def test_the_previous_log_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "primary.log"
    rotate(path, kept=1)
    path.write_text("first")
    rotate(path, kept=1)
    assert not path.exists()
    assert path.with_name("primary.log.1").read_text() == "first"
