"""One answer of a model: its words as they come, and what it took."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from kitty_nb.client.protocol import broken_off, stream
from kitty_nb.errors import ServerError
from kitty_nb.supervisor.events import PromptProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True)
class Piece:
    """Some words of an answer.

    Attributes:
        text: The words.
        thinking: Whether the model thinks them to itself, before it answers.
    """

    text: str
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model asked for.

    Attributes:
        id: The server's name for it.
        name: The tool.
        arguments: What to call it with, as JSON.
        result: What it returned, as the model was told; None where it was not run.
    """

    id: str
    name: str
    arguments: str
    result: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of a request; None where the server does not tell.

    Attributes:
        prompt: Tokens of the prompt.
        cached: Those of them that the server had in its cache.
        answer: Tokens of the answer, with those of the thinking.
        drafted: Tokens that speculation proposed.
        accepted: Those of them that the model agreed with.
    """

    prompt: int | None = None
    cached: int | None = None
    answer: int | None = None
    drafted: int | None = None
    accepted: int | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """The time that a request took.

    Attributes:
        first_token: Seconds from the request to its first token, as its client saw it.
        total: Seconds from the request to the end of the answer, likewise.
        prompt_per_second: Tokens of the prompt read per second, as the server says.
        answer_per_second: Tokens of the answer per second, as the server says.
    """

    first_token: float | None = None
    total: float | None = None
    prompt_per_second: float | None = None
    answer_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a model; `str` of it is its text.

    Attributes:
        text: The answer in words.
        thinking: What the model thought before.
        tool_calls: The tools that it called.
        finish_reason: Why it ended: `stop`, `length` or `tool_calls`.
        usage: The tokens that it took.
        timings: The time that it took.
    """

    text: str
    thinking: str = field(default="", repr=False)
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    usage: Usage = field(default=Usage(), repr=False)
    timings: Timings = field(default=Timings(), repr=False)

    def __str__(self) -> str:
        return self.text

    @property
    def missing(self) -> str:
        """A sentence about what came in place of words; empty where the model had its say."""
        if self.text:
            return ""
        if self.tool_calls:
            names = ", ".join(call.name for call in self.tool_calls)
            return (
                f"The model called a tool instead of answering: {names}. To run tools, hand them to"
                " `chat(…, tools=[…])`."
            )
        if self.finish_reason == "length":
            what = "was still thinking" if self.thinking else "had said nothing yet"
            return (
                f"The model {what} when max_tokens or the context ran out. Raise max_tokens, or the"
                " context size."
            )
        thought = "The model gave no answer after thinking. Rephrase the prompt."
        return thought if self.thinking else ""


async def complete(
    http: httpx.AsyncClient,
    request: Mapping[str, Any],
    on_piece: Callable[[Piece], object],
    on_progress: Callable[[PromptProgress], object] | None = None,
) -> Answer:
    """Ask the model once, and hand on its answer in pieces as they come.

    Cancelled, it closes the connection, and the server stops answering.

    Raises:
        ServerError: The server refused the request, broke off, or is no llama-server.
    """
    draft = _Draft(on_piece, on_progress)
    wanted = {**request, "return_progress": True} if on_progress else dict(request)
    try:
        async with aclosing(stream(http, "/v1/chat/completions", wanted)) as parts:
            async for part in parts:
                draft.add(part)
    except httpx.HTTPError as error:
        raise ServerError(broken_off(error)) from None
    return draft.answer()


class _Draft:
    """An answer that is not complete yet."""

    def __init__(
        self,
        on_piece: Callable[[Piece], object],
        on_progress: Callable[[PromptProgress], object] | None,
    ) -> None:
        self._on_piece, self._on_progress = on_piece, on_progress
        self._words: dict[bool, list[str]] = {False: [], True: []}
        self._calls: dict[int, list[str]] = {}
        self._finish: str | None = None
        self._told: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._began = time.perf_counter()
        self._first: float | None = None

    def add(self, part: dict[str, Any]) -> None:
        """Take a part of the stream, or all of an answer that comes whole."""
        if self._on_progress and (told := _numbers(part.get("prompt_progress"))):
            total, cached, done, spent = (
                told.get(name, 0) for name in ("total", "cache", "processed", "time_ms")
            )
            self._on_progress(PromptProgress(total, cached, done, spent / 1000))
        self._told = _numbers(part.get("timings")) or self._told
        self._usage = _numbers(part.get("usage")) or self._usage
        choice = next(iter(_objects(part.get("choices"))), {})
        delta = _object(choice.get("delta") or choice.get("message"))
        # Ollama and newer builds of vLLM call it `reasoning`.
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        for thinking, text in ((True, thought), (False, delta.get("content"))):
            if isinstance(text, str) and text:
                self._begin()
                self._words[thinking].append(text)
                self._on_piece(Piece(text, thinking))
        for place, call in enumerate(_objects(delta.get("tool_calls"))):
            self._begin()
            known = self._calls.setdefault(call.get("index", place), ["", "", ""])
            function = _object(call.get("function"))
            news = call.get("id"), function.get("name"), function.get("arguments")
            known[:] = [old + str(new or "") for old, new in zip(known, news, strict=True)]
        self._finish = choice.get("finish_reason") or self._finish

    def _begin(self) -> None:
        if self._first is None:
            self._first = time.perf_counter() - self._began

    def answer(self) -> Answer:
        """Return the whole answer.

        Raises:
            ServerError: Its end is missing.
        """
        if self._finish is None:
            raise ServerError(broken_off())
        said, told = self._usage, self._told
        fresh, cached = told.get("prompt_n"), told.get("cache_n")
        prompt = said.get("prompt_tokens") if fresh is None else fresh + (cached or 0)
        answered = told.get("predicted_n", said.get("completion_tokens"))
        drafts = told.get("draft_n"), told.get("draft_n_accepted")
        speeds = told.get("prompt_per_second"), told.get("predicted_per_second")
        return Answer(
            text="".join(self._words[False]),
            thinking="".join(self._words[True]),
            tool_calls=tuple(ToolCall(*call) for call in self._calls.values()),
            finish_reason=self._finish,
            usage=Usage(prompt, cached, answered, *drafts),
            timings=Timings(self._first, time.perf_counter() - self._began, *speeds),
        )


def _object(value: Any) -> dict[str, Any]:
    """Return an object of an answer: what answers need not be a llama-server."""
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _numbers(value: Any) -> dict[str, Any]:
    return {name: one for name, one in _object(value).items() if type(one) in {int, float}}
