"""The line of what a server does, its chart, and the table of its requests."""

from __future__ import annotations

from typing import Any

import pytest

from kitty_nb.supervisor.events import Ending, PromptProgress, Request, Work
from kitty_nb.widgets.server_work import SHOWN, LiveLine, RequestsTable, describe_work, request_row

READING = Work(2, 4, PromptProgress(1000, 0, 624, 5.0), 0.0)
ANSWERING = Work(1, 4, None, 42.04, 0.81, 0.64)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (Work(), ""),
        (Work(0, 4, cached=0.8), ""),
        (READING, "2 of 4 slots · reading the prompt · 62 % · 4 s left"),
        (Work(1, 4, PromptProgress(0, 0, 0, 12.0)), "1 of 4 slots · reading the prompt · 12 s"),
        (ANSWERING, "1 of 4 slots · 42.0 tok/s · cache hits 81 % · drafts accepted 64 %"),
        (Work(1, None, None, 0.512), "0.5 tok/s"),
    ],
)
def test_work_in_words(work: Work, words: str) -> None:
    assert describe_work(work) == words


class Sent(list[Any]):
    """What goes to the page."""

    def __call__(self, content: Any, buffers: Any = None) -> None:
        self.append(content)


Line = tuple[LiveLine, Sent, list[float]]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    now, sent = [0.0], Sent()
    live = LiveLine(lambda: now[0])
    monkeypatch.setattr(live, "send", sent)
    return live, sent, now


def test_a_server_that_was_never_used_has_no_line(line: Line) -> None:
    live, sent, now = line
    for second in range(0, 20, 2):
        now[0] = second
        live.show(Work(0, 4), 100 << 20, ready=True)
    assert not live.shown
    assert not sent


def test_only_news_travels_and_a_later_page_gets_all(line: Line) -> None:
    live, sent, now = line
    live.show(Work(0, 4), 100 << 20, ready=True)
    now[0] = 2.0
    live.show(ANSWERING, 100 << 20, ready=True)
    assert sent[-1]["points"] == [(0.0, 0.0, 100), (2.0, 42.04, 100)]
    count = len(sent)
    now[0] = 2.5
    live.show(ANSWERING, 100 << 20, ready=True)
    assert len(sent) == count
    now[0] = 4.0
    live.show(ANSWERING, 100 << 20, ready=True)
    assert (sent[-1]["points"], sent[-1]["anew"]) == ([(4.0, 42.04, 100)], False)
    live.receive({"kind": "replay"})
    assert [at for at, *_ in sent[-1]["points"]] == [0.0, 2.0, 4.0]
    assert "42" in sent[-1]["words"]
    assert "42 tok" not in str(live.get_state())
    live.show(Work(), 0, ready=False)
    assert (sent[-1]["points"], sent[-1]["shown"]) == ([], False)


def test_the_chart_has_the_last_ten_minutes(line: Line) -> None:
    live, _, now = line
    for second in range(0, 1400, 2):
        now[0] = second
        live.show(ANSWERING, 1 << 20, ready=True)
    assert live.points[-1][0] - live.points[0][0] == pytest.approx(SHOWN, abs=3)


def test_rows_travel_only_to_somebody_who_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    table, sent = RequestsTable(lambda: None), Sent()
    monkeypatch.setattr(table.rows, "send", sent)
    requests = (Request(1.0, Ending.FINISHED, 54), Request(2.0, Ending.ERROR, error="<b>"))
    table.show(requests)
    assert not sent
    table.selected_index = 0
    table.show(requests)
    table.show(requests)
    assert [[row["at"] for row in one["rows"]] for one in sent] == [[2.0, 1.0]]
    table.rows.receive({"kind": "replay"})
    table.show(requests)
    assert len(sent) == 2


def test_a_request_in_words() -> None:
    request = Request(5.0, Ending.LENGTH, 3415, 30, 1.72, 10.3, 3.386, 0.995)
    assert request_row(request) == {
        "at": 5.0,
        "model": "",
        "prompt": "3,415",
        "answer": "30",
        "first": "1.7 s",
        "speed": "3.4 tok/s",
        "cached": "100%",
        "accepted": "",
        "took": "10 s",
        "ended": "length",
        "error": "",
    }
