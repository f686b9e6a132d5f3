"""The boxes of a panel in which a user asks the ready model, or has it embed a text."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pprint import pformat
from typing import TYPE_CHECKING, Any, ClassVar

from ipywidgets import HTML, HBox, Text

from kitty_nb.client.conversation import with_images
from kitty_nb.config import Task, task_by_flags
from kitty_nb.config.flags import value_of
from kitty_nb.errors import KittyError
from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.widgets.display import Page, asset, button, duration, show_if
from kitty_nb.widgets.server_view import SNIPPETS, describe_reading
from kitty_nb.widgets.session import ActionRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kitty_nb.client import Answer, Piece, PromptProgress
    from kitty_nb.client.embeddings import Vectors
    from kitty_nb.manager import ModelManager
    from kitty_nb.operation import Operation
    from kitty_nb.supervisor.events import ServerState


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in a question, as data URLs."""

    url: str  # what the model sees
    thumbnail: str = ""  # what a page that opens later shows; empty for none


@dataclass(eq=False)
class Turn:
    """A question and its answer, which the manager's thread writes as it arrives."""

    question: str  # what the user asks
    pictures: tuple[Picture, ...] = ()  # what the user asks about
    # How much of the prompt the server has read, if it reports that.
    progress: PromptProgress | None = None
    problem: str = ""  # what went wrong, in a sentence
    ended: bool = False  # whether no more will follow
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
        return self._said(thinking=False)

    @property
    def thinking(self) -> str:
        """The thoughts of the model before it answered."""
        return self._said(thinking=True)

    @property
    def message(self) -> dict[str, Any]:
        """The question, in OpenAI's format."""
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
        """Note how the answer ended; only the first end counts."""
        if not self.ended:
            self._answer, self.problem, self.ended = answer, problem, True

    @property
    def thought(self) -> str:
        """The time spent thinking; empty if there was none."""
        if not self.thinking:
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
        answer, first = self._answer, (self._first_at or 0.0) - self._asked_at
        tokens = (answer and answer.usage.answer) or len(self._pieces)
        seconds = self._last_at - (self._first_at or 0.0)
        speed = (tokens - 1) / seconds if seconds else None
        if answer:
            first = answer.timings.first_token or first
            speed = answer.timings.answer_per_second or speed
        stopped = ["Stopped"] if self.ended and not answer and not self.problem else []
        pace = [f"{speed:,.1f} tok/s"] if speed else []
        return [*stopped, f"first token after {duration(first)}", *pace, f"{tokens:,} tokens"]

    def news(self) -> dict[str, Any]:
        """Return what is new to pages that have followed the answer."""
        first, self._sent = self._sent, len(self._pieces)
        return self._since(first, self._sent)

    def whole(self) -> dict[str, Any]:
        """Return everything that those pages know, for a page that knows nothing."""
        thumbnails = [picture.thumbnail for picture in self.pictures]
        said = {"question": self.question, "thumbnails": thumbnails}
        return {**said, **self._since(0, self._sent)}

    def _since(self, first: int, end: int) -> dict[str, Any]:
        """Describe the pieces from one number to another, and all short facts."""
        said = {
            "text": self._said(first, end, thinking=False),
            "thinking": self._said(first, end, thinking=True),
        }
        facts = {"thought": self.thought, "status": self.status, "problem": self.problem}
        return {"first": first, "next": end, **said, **facts, "busy": not self.ended}

    def _said(self, first: int = 0, end: int | None = None, *, thinking: bool) -> str:
        pieces = self._pieces[first:end]
        return "".join(piece.text for piece in pieces if piece.thinking is thinking)


_SEND_EVERY = 0.1  # seconds; jupyter_server drops messages that come too often
_KEPT = 1_000_000  # characters of a chat
_PICTURES_KEPT = 20_000_000  # characters of their data URLs
_NO_TEMPLATE = " (its file has no chat template, so answers may run on)"
_ANSWER_LIMIT = {"-n", "--predict", "--n-predict"}
_FULL = "This chat is too long to be kept. Press New chat."


def _cut_short(answer: Answer, state: ServerState) -> str:
    """Return what ended an answer before the model did, in sentences; empty if nothing did."""
    if answer.finish_reason != "length":
        return ""
    # Something else than the profile's setting may limit answers.
    other = state.external or state.router or value_of(state.config.extra_args, _ANSWER_LIMIT)
    limit = None if other else state.config.n_predict
    if limit is not None and 0 <= limit <= (answer.usage.answer or 0):
        key = f"LLAMACPP_{state.config.profile.upper()}_N_PREDICT"
        return (
            f"The answer ends here because {key} limits answers to {limit:,} tokens. Raise it and"
            " restart the server, or ask the model to continue."
        )
    if other:
        return (
            "The answer ends here because the context is full, or the server limits the length of"
            " answers. Ask the model to continue, or start a new chat."
        )
    return (
        "The answer ends here because the context is full. Raise the context size, or start a new"
        " chat."
    )


class _Verbatim(str):
    """Code within a literal: its `repr` has no quotes."""

    __slots__ = ()
    __repr__ = str.__str__


class Ask(Page):
    """A chat with the ready model.

    The chat is kept here. Messages contain only new words, and number the pieces of an answer: a
    page that opens later, or misses some, asks for a replay. A later box continues the chat of an
    `earlier` one.
    """

    _esm: ClassVar[str] = asset("page.js", "clipboard.js", "answer_text.js", "ask.js")
    _css: ClassVar[str] = asset("ask.css")

    def __init__(
        self, manager: ModelManager, name: Callable[[], str], earlier: Ask | None = None
    ) -> None:
        super().__init__("kitty-ask")
        self._manager, self._name = manager, name
        if earlier:
            earlier.stop()
        self._turns = [*earlier.turns] if earlier else []
        self._chat = 0  # pages drop the contents of another one
        # Held from reading what to send until it is sent, as two threads do: pages take what
        # arrives last for the newest.
        self._sending = threading.RLock()
        self._facts: dict[str, object] = {}
        self._answering: Operation[Answer] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sent_at = 0.0

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The chat's questions and answers, oldest first."""
        return tuple(self._turns)

    @property
    def pictures(self) -> tuple[str, ...]:
        """The pictures of the chat as data URLs, oldest first."""
        return tuple(picture.url for turn in self._turns for picture in turn.pictures)

    @property
    def code(self) -> str:
        """A cell that asks the last question again, with the chat that led to it."""
        panel, messages = self._name(), _messages(self._turns)
        for part in (part for one in messages if one["role"] == "user" for part in one["content"]):
            if isinstance(part, dict) and "image_url" in part:
                place = self.pictures.index(part["image_url"]["url"])
                part["image_url"]["url"] = _Verbatim(f"{panel}.ask.pictures[{place}]")
        return SNIPPETS["ask"].format(
            messages=pformat(messages, width=96, sort_dicts=False), panel=panel
        )

    def ask(self, question: str, pictures: Sequence[Picture] = ()) -> None:
        """Ask the model; do nothing while it is answering."""
        if (self._answering and not self._answering.done) or not (question.strip() or pictures):
            return
        turn = Turn(question, tuple(pictures))
        self._turns.append(turn)
        self._tell(turn, whole=True)
        try:
            self._check_size()
            self._answering = self._manager.chat(
                _messages(self._turns), partial(self._hear, turn), partial(self._read, turn)
            )
            self._manager.run(self._follow, turn, self._answering)
        except KittyError as error:
            turn.end(problem=str(error))
            self._tell(turn)

    def stop(self) -> None:
        """Stop the current answer, and the server's work on it."""
        if self._answering:
            self._answering.cancel()

    def new_chat(self) -> None:
        """Forget the chat, and begin another one."""
        self.stop()
        with self._sending:
            self._turns, self._chat = [], self._chat + 1
            self._tell()

    def show(self, state: ServerState, *, template: bool = True) -> None:
        """Show the box while a chat model is ready; without one, only the chat so far."""
        up, hint = state.status is ServerStatus.READY, ""
        ready = up and state.task is Task.CHAT
        if not up:
            hint = "The server is not ready: start it, or wait for it, to continue."
        elif not ready:
            hint = "This model doesn't chat. Choose another one above and press Switch."
            if task_by_flags(state.config.extra_args) and not state.external:
                hint = (
                    "A flag in LLAMACPP_EXTRA_ARGS keeps this server from chatting. Correct it, and"
                    " press Rescan, then Restart."
                )
        elif state.to_choose:
            press = " and press Switch" if state.external else ""
            hint = f"The router has no model loaded. Choose one above{press}."
            models = state.router.models if state.router else {}
            if loading := [name for name, one in models.items() if one.status == "loading"]:
                hint = f"The router is loading {' and '.join(loading)}."
        prompt = f"Ask {state.alias}{'' if template else _NO_TEMPLATE}"
        facts = {"ready": ready, "hint": hint, "prompt": prompt, "sees": state.sees}
        if facts != self._facts:
            self._tell_facts(facts)

    def receive(self, message: Any) -> None:
        """Handle a message from a page."""
        match message:
            case {"kind": "ask", "text": str(text), "pictures": list(pictures)}:
                self.ask(text, [Picture(one["url"], one["thumbnail"]) for one in pictures])
            case {"kind": "stop"}:
                self.stop()
            case {"kind": "new"}:
                self.new_chat()
            case {"kind": "code", "for": str(asker)}:
                self.send_text(asker, lambda: self.code)
            case {"kind": "replay"}:
                with self._sending:
                    self._tell_facts(self._facts)
                    self._tell(*self._turns, whole=True)

    async def _follow(self, turn: Turn, answering: Operation[Answer]) -> None:
        try:
            answer = await answering
            turn.end(answer, _cut_short(answer, self._manager.state))
        except KittyError as error:
            turn.end(problem=str(error))
        finally:
            turn.end()  # it was stopped, unless it has already ended
            self._tell(turn)

    def _check_size(self) -> None:
        size = sum(len(turn.question) + len(turn.text) + len(turn.thinking) for turn in self._turns)
        if size > _KEPT or sum(map(len, self.pictures)) > _PICTURES_KEPT:
            raise KittyError(_FULL)

    def _hear(self, turn: Turn, piece: Piece) -> None:
        turn.add(piece)
        self._tell_soon(turn)

    def _read(self, turn: Turn, progress: PromptProgress) -> None:
        turn.progress = progress
        self._tell_soon(turn)

    def _tell_soon(self, turn: Turn) -> None:
        """Send what is new, at once or together with what follows within a moment."""
        if self._timer is None:
            pause = max(0.0, self._sent_at + _SEND_EVERY - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(pause, self._tell, turn)

    def _tell_facts(self, facts: dict[str, object]) -> None:
        with self._sending:
            self._facts = facts
            self.send({"kind": "facts", **facts})

    def _tell(self, *turns: Turn, whole: bool = False) -> None:
        if not whole:
            self._timer, self._sent_at = None, time.monotonic()
        with self._sending:
            places = {turn: place for place, turn in enumerate(self._turns)}
            news = [
                {"turn": places[turn], **(turn.whole() if whole else turn.news())}
                for turn in turns
                if turn in places  # else it belongs to an earlier chat
            ]
            self.send({"kind": "turns", "chat": self._chat, "turns": news})


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return a chat in OpenAI's format, without earlier questions that were never answered."""
    *before, last = turns
    answered = [
        message
        for turn in before
        if (text := turn.text)
        for message in (turn.message, {"role": "assistant", "content": text})
    ]
    return [*answered, last.message]


_SHOWN = 4  # numbers


class EmbedBox(HBox):
    """A text, its vector in a few words, and its similarity to the previous text."""

    def __init__(self, manager: ModelManager, show_problem: Callable[[str | None], None]) -> None:
        self._manager = manager
        self._asked: Operation[Vectors] | None = None
        self._before: Vectors | None = None
        self._server: tuple[int | None, str] | None = None  # whose vector that is
        self.text = Text(placeholder="A text to embed", continuous_update=False)
        self.text.add_class("kitty-grow")
        self.embed = button("Embed", "", "Show the vector of this text", "primary")
        self.vector = HTML().add_class("kitty-fact")
        super().__init__([self.text, self.embed, self.vector])
        self.add_class("kitty-embed")
        actions = ActionRunner(manager.run, show_problem)
        self.embed.on_click(lambda _: actions.run(self._ask))
        self.show(manager.state)

    def show(self, state: ServerState) -> None:
        """Show the box while an embedding model is ready; another server begins anew."""
        ready = state.status is ServerStatus.READY and state.task is Task.EMBED
        if ready and self._server != (server := (state.pid, state.alias)):
            self._server, self._before, self.vector.value = server, None, ""
        show_if(self, ready)

    def _ask(self) -> Operation[None]:
        if self._asked:
            self._asked.cancel()
        self._asked = self._manager.embed([self.text.value])
        return self._manager.run(self._tell, self._asked)

    async def _tell(self, asked: Operation[Vectors]) -> None:
        (vector,) = await asked
        self.vector.value, self._before = describe_vector(vector, self._before), vector


def describe_vector(vector: Vectors, before: Vectors | None = None) -> str:
    """Describe a vector, e.g. `768 numbers · length 1.00 · 0.012, -0.340, … · 0.83 similar`.

    The similarity to the previous vector is the cosine of the angle between the two.
    """
    length = float(vector @ vector) ** 0.5
    numbers = ", ".join(f"{number:.3f}" for number in vector[:_SHOWN])
    parts = [f"{len(vector)} numbers", f"length {length:.2f}", f"{numbers}, …"]
    if before is not None and before.shape == vector.shape:
        other = float(before @ before) ** 0.5
        cosine = float(vector @ before) / max(length * other, 1e-12)
        parts.append(f"{cosine:.2f} similar to the previous text")
    return " · ".join(parts)
