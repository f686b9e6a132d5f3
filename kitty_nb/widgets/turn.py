"""`Turn`: a question in a chat, its answer so far, and what is said about it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kitty_nb.client.images import with_images
from kitty_nb.widgets.display import duration
from kitty_nb.widgets.server_view import describe_reading

if TYPE_CHECKING:
    from kitty_nb.client import Answer, Piece, PromptProgress

_CUT_SHORT = (
    "The answer ends here because the context is full. Raise the context size, or start a new chat."
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a question, as data URLs."""

    url: str  # what the model sees
    thumbnail: str = ""  # what a page that opens later shows; empty for none


@dataclass(eq=False)
class Turn:
    """A question and its answer. It is written on the manager's thread while that comes."""

    question: str  # what the user asks
    pictures: tuple[Picture, ...] = ()  # what the user asks about
    # How much of the prompt the server has read, where it tells.
    progress: PromptProgress | None = None
    problem: str = ""  # what went wrong, in a sentence
    ended: bool = False  # whether there is no more to come
    _pieces: list[Piece] = field(default_factory=list)
    _sent: int = 0  # pieces
    _asked_at: float = field(default_factory=time.monotonic)
    _first_at: float | None = None
    _spoke_at: float | None = None
    _last_at: float = 0.0
    _answer: Answer | None = None

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(piece.text for piece in tuple(self._pieces) if not piece.thinking)

    @property
    def thinking(self) -> str:
        """The thoughts of the model before it answered."""
        return "".join(piece.text for piece in tuple(self._pieces) if piece.thinking)

    @property
    def message(self) -> dict[str, Any]:
        """The question, in the form of OpenAI's protocol."""
        said = {"role": "user", "content": self.question}
        return with_images([said], [picture.url for picture in self.pictures])[0]

    def add(self, piece: Piece) -> None:
        """Add a piece of the answer."""
        self._last_at = time.monotonic()
        self._first_at = self._first_at or self._last_at
        if not piece.thinking:
            self._spoke_at = self._spoke_at or self._last_at
        self._pieces.append(piece)

    def end(self, answer: Answer | None = None, problem: str = "") -> None:
        """Note how the answer has ended; only the first end counts."""
        if not self.ended:
            cut_short = answer is not None and answer.finish_reason == "length"
            self._answer, self.problem = answer, problem or (_CUT_SHORT if cut_short else "")
            self.ended = True

    @property
    def thought(self) -> str:
        """The time spent thinking; empty where there was none."""
        if not any(piece.thinking for piece in tuple(self._pieces)):
            return ""
        if self._spoke_at is None and not self.ended:
            return "Thinking…"
        return f"Thought for {duration((self._spoke_at or self._last_at) - (self._first_at or 0))}"

    @property
    def status(self) -> str:
        """The progress of the answer, or its speed."""
        if self._first_at is not None:
            return " · ".join(self._figures())
        if self.ended:
            return "" if self.problem or self._answer else "Stopped"
        if self.progress is None:
            return "Waiting for the model"
        words = describe_reading(self.progress)
        return words[0].upper() + words[1:]

    def _figures(self) -> list[str]:
        first, tokens = (self._first_at or 0.0) - self._asked_at, len(self._pieces)
        seconds = self._last_at - (self._first_at or 0.0)
        speed = (tokens - 1) / seconds if seconds else None
        if answer := self._answer:
            first, tokens = answer.timings.first_token or first, answer.usage.answer or tokens
            speed = answer.timings.answer_per_second or speed
        stopped = ["Stopped"] if self.ended and not answer and not self.problem else []
        pace = [f"{speed:.1f} tok/s"] if speed else []
        return [*stopped, f"first token after {duration(first)}", *pace, f"{tokens:,} tokens"]

    def news(self) -> dict[str, Any]:
        """Return what a page that has followed does not know yet."""
        first, self._sent = self._sent, len(self._pieces)
        return self._since(first, self._sent)

    def whole(self) -> dict[str, Any]:
        """Return what those that have followed know, for a page that knows nothing."""
        thumbnails = [picture.thumbnail for picture in self.pictures]
        said = {"question": self.question, "thumbnails": thumbnails}
        return {**said, **self._since(0, self._sent)}

    def _since(self, first: int, end: int) -> dict[str, Any]:
        """Describe the pieces from one number to another, and all that is short."""
        words = {"text": "", "thinking": ""}
        for piece in self._pieces[first:end]:
            words["thinking" if piece.thinking else "text"] += piece.text
        facts = {"thought": self.thought, "status": self.status, "problem": self.problem}
        return {"first": first, "next": end, **words, **facts, "busy": not self.ended}
