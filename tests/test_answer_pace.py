from __future__ import annotations

from typing import Any

import pytest

from kitty_nb.supervisor.answer_pace import AnswerPace


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
