"""Answers of a real model: whole, in pieces, as objects."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any

import pytest
from conftest import demo_config, eventually, unused_port
from pydantic import BaseModel, Field

from kitty_nb import ModelManager, operation
from kitty_nb.client import Piece, PromptProgress
from kitty_nb.errors import KittyError, NoAnswerError, RefusedError

GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(autouse=True)
def nothing_leaks() -> None:
    """The manager of all these tests keeps its connections until the last of them."""


@pytest.fixture(scope="module")
def manager(
    real_model: Path, engine: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelManager]:
    config = demo_config(real_model, tmp_path_factory.mktemp("chat"), unused_port())
    config = config.replace(
        binary=engine, context_size=4096, parallel=1, batch_size=128, tool_calling=True
    )
    with ModelManager(config=config) as manager:
        manager.start().wait(120)
        yield manager


def raw(manager: ModelManager, prompt: str, **options: object) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    request = {"messages": messages, **GREEDY, **options}
    answer: dict[str, object] = manager.http.post("/v1/chat/completions", json=request).json()
    return answer


def idle(manager: ModelManager) -> bool:
    slots = manager.http.get("/slots").json()
    return not any(slot["is_processing"] for slot in slots)


def test_an_answer_tells_what_it_took(manager: ModelManager) -> None:
    alone = raw(manager, "Name a colour.")
    answer = manager.chat("Name a colour.", **GREEDY).wait(60)

    assert str(answer) == answer.text == alone["choices"][0]["message"]["content"]
    assert answer.usage.prompt == alone["usage"]["prompt_tokens"]
    assert manager.count_tokens("Name a colour.").wait(60) == answer.usage.prompt
    assert answer.usage.answer == alone["usage"]["completion_tokens"]
    assert 0 < (answer.usage.cached or 0) < (answer.usage.prompt or 0)  # the same prompt again
    assert 0 < (answer.timings.first_token or 0) < (answer.timings.total or 0)
    assert answer.timings.answer_per_second
    assert answer.finish_reason in {"stop", "length"}


def test_its_pieces_are_iterated_as_they_come(manager: ModelManager) -> None:
    whole = manager.chat("Name a colour.", **GREEDY).wait(60).text
    assert "".join(piece.text for piece in manager.chat("Name a colour.", **GREEDY)) == whole

    async def read() -> list[Piece]:
        return [piece async for piece in manager.chat("Name a colour.", **GREEDY)]

    pieces = asyncio.run(read())
    assert len(pieces) > 1
    assert "".join(piece.text for piece in pieces) == whole


def test_the_model_stops_when_nobody_wants_the_rest(manager: ModelManager) -> None:
    endless = {"max_tokens": 4000, "ignore_eos": True}
    for _ in manager.chat("Tell me a story.", **endless):
        break
    eventually(lambda: idle(manager), within=20)

    async def leave() -> None:
        async for _ in manager.chat("Tell me a story.", **endless):
            break

    asyncio.run(leave())
    eventually(lambda: idle(manager), within=20)

    async def lose_patience() -> None:
        await asyncio.wait_for(manager.chat("Tell me a story.", **endless), 0.5)

    with pytest.raises(TimeoutError):
        asyncio.run(lose_patience())
    eventually(lambda: idle(manager), within=20)


def test_a_piece_that_comes_as_the_answer_is_cancelled_leaves_no_loop_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow(Future[Any]):
        """The canceller's thread is about to resolve it when the manager's adds a piece."""

        def set_result(self, result: Any) -> None:
            if result is None:
                pieces.add(late)
            super().set_result(result)

    monkeypatch.setattr(operation, "Future", Slow)
    heard: list[Piece] = []
    late = Piece("late")
    pieces = operation.Pieces(heard.append)
    pieces.end()
    assert pieces.first.result(timeout=0) is None
    assert not heard


def test_answers_follow_each_other_at_once(manager: ModelManager) -> None:
    said = [manager.chat("Hello", temperature=0, max_tokens=1).wait(60) for _ in range(30)]
    assert all(answer.usage.answer == 1 for answer in said)


def test_an_error_ends_the_loop_over_its_pieces(manager: ModelManager) -> None:
    with pytest.raises(KittyError, match="refused"):
        list(manager.chat("Hello", temperature="hot"))


@pytest.mark.parametrize("ask", ["chat", "tokenize", "count_tokens"])
def test_half_a_surrogate_pair_is_refused(manager: ModelManager, ask: str) -> None:
    with pytest.raises(RefusedError, match=r"half a surrogate pair \(U\+D83D\)"):
        getattr(manager, ask)("torn \ud83d").wait(60)


class Colour(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    red: Annotated[int, Field(ge=0, le=255)]
    warm: bool


def test_an_answer_becomes_an_object(manager: ModelManager) -> None:
    options = {"temperature": 0, "max_tokens": 200}
    colour = manager.chat("Describe a colour.", response_format=Colour, **options).wait(60)
    assert isinstance(colour, Colour)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    plain = manager.chat("Count.", response_format=schema, **options).wait(60)
    assert isinstance(plain["n"], int)
    with pytest.raises(NoAnswerError, match="answer reached a limit"):
        manager.chat("Describe a colour.", response_format=Colour, max_tokens=2).wait(60)


def test_a_long_prompt_shows_its_progress(manager: ModelManager) -> None:
    seen: list[PromptProgress] = []
    manager.chat("word " * 300, on_progress=seen.append, max_tokens=1).wait(120)
    assert len(seen) > 1
    shares = [step.fraction for step in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert seen[-1].total > 300


def test_pictures_need_a_projector_and_be_pictures(manager: ModelManager, tmp_path: Path) -> None:
    with pytest.raises(KittyError, match="without a projector"):
        manager.chat("What is this?", images=[tmp_path / "cat.png"])
