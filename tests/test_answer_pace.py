from __future__ import annotations

from typing import Any

import pytest

from kitty_nb.supervisor.requests import AnswerPace


def busy(slot: int, task: int, decoded: int) -> dict[str, Any]:
    tokens = [{"n_decoded": decoded}]
    return {"id": slot, "id_task": task, "is_processing": True, "next_token": tokens}


IDLE = {"id": 9, "is_processing": False}


def test_tokens_of_all_slots_count_and_those_of_new_requests() -> None:
    pace = AnswerPace()
    assert pace.measure([IDLE], 0.0) is None
    assert pace.measure([IDLE], 2.0) == 0
    assert pace.measure([busy(0, 1, 20), IDLE], 4.0) == 10
    assert pace.measure([busy(0, 1, 50), busy(1, 2, 10)], 6.0) == 20
    assert pace.measure([busy(0, 3, 4), busy(1, 2, 14)], 8.0) == 4
    assert pace.measure([IDLE, IDLE], 10.0) == 0


@pytest.mark.parametrize("tokens", [None, [], {}, [{}], {"n_decoded": None}])
def test_a_build_that_does_not_count_is_not_guessed_at(tokens: object) -> None:
    pace = AnswerPace()
    pace.measure([IDLE], 0.0)
    slot = {"id": 0, "id_task": 1, "is_processing": True, "next_token": tokens}
    assert pace.measure([slot], 2.0) is None


def test_builds_of_before_have_no_list_and_no_numbers() -> None:
    pace = AnswerPace()
    pace.measure([IDLE], 0.0)

    def slot(decoded: int) -> dict[str, Any]:
        return {"id": 0, "is_processing": True, "next_token": {"n_decoded": decoded}}

    assert pace.measure([slot(8)], 2.0) == 4
    assert pace.measure([slot(6)], 4.0) == 3


def test_a_token_that_takes_longer_than_a_look_counts() -> None:
    """A token every five seconds, looked at every two."""
    pace = AnswerPace()
    pace.measure([IDLE], 0.0)
    told = [pace.measure([busy(0, 1, second // 5)], second) for second in range(2, 42, 2)]
    assert told[:2] == [0, 0]
    assert told[2] == 1 / 2
    assert all(rate == pytest.approx(0.2, abs=0.06) for rate in told[4:])


def test_two_looks_in_a_row_do_not_hide_a_pace() -> None:
    """A panel looks, and a moment later a program does."""
    pace = AnswerPace()
    pace.measure([busy(0, 1, 0)], 0.0)
    assert pace.measure([busy(0, 1, 3)], 2.0) == 1.5
    assert pace.measure([busy(0, 1, 3)], 2.1) == 1.5
    assert pace.measure([busy(0, 1, 6)], 4.0) == 1.5


def test_two_looks_in_a_row_do_not_exaggerate_a_pace() -> None:
    """A token arrives between two looks a few milliseconds apart."""
    pace = AnswerPace()
    pace.measure([busy(0, 1, 0)], 0.0)
    assert pace.measure([busy(0, 1, 5)], 0.5) == 10
    assert pace.measure([busy(0, 1, 6)], 0.503) == 10
    assert pace.measure([busy(0, 1, 10)], 1.0) == 10
    assert pace.measure([IDLE], 1.003) == 0


def test_it_is_known_how_long_the_first_token_is_waited_for() -> None:
    pace = AnswerPace()
    for at in range(0, 60, 2):
        pace.measure([busy(0, 1, 0), IDLE], at)
    assert pace.silence(60) == 60
    pace.measure([busy(0, 1, 1), IDLE], 62)
    assert pace.silence(62) == 0
    pace.measure([IDLE, IDLE], 64)
    assert pace.silence(64) == 0
    for at in range(66, 90, 2):  # requests without tokens, such as those for embeddings
        pace.measure([busy(0, at, 0), busy(1, at // 4, 0)], at)
        assert pace.silence(at) <= 4
