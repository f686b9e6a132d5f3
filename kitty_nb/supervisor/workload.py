"""The work of a ready server: its slots' requests, and how far their prompts are read."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from kitty_nb.supervisor.events import PromptProgress, Work
from kitty_nb.supervisor.health import decoded
from kitty_nb.supervisor.requests import TELLING, ActiveRequest, RequestLog

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kitty_nb.supervisor.events import Restored

_RECENT = 20  # requests, whose cache hits and drafts are told
_SEEN_AFTER = 1.0  # seconds; from here on, slots and log know of the same requests
_BATCH = 2048  # tokens; llama.cpp's default
_COMPUTES = 0.5  # processor seconds a second; less, and a GPU computes
_SURE = 0.9  # the part of a batch that is told at the expected pace


class WorkMeter:
    """Combines what a server's log and its slots tell.

    What only the slots tell of is added to the log's tasks. Of a prompt, at most `batch` tokens are
    read at once. A server that routes shows no slots, which would tell when an answer begins.
    """

    def __init__(self, log: RequestLog, batch: int | None = None, *, routes: bool = False) -> None:
        self.log, self._routes = log, routes
        self._batch = batch or _BATCH
        self._restored: tuple[float, Restored] | None = None
        self._slots: int | None = None
        self._pace: float | None = None

    @property
    def busy(self) -> bool:
        """True if requests are worked on."""
        return bool(self.log.active)

    def look(self, slots: Iterable[dict[str, Any]], pace: float | None, at: float) -> None:
        """Take the answer of `/slots`; an empty one changes nothing.

        `pace` is the tokens a second since the last one, `at` in seconds of the log's clock.
        """
        slots = tuple(slots)
        if not slots:
            return
        self._slots, self._pace = len(slots), pace
        working = {}
        for slot in slots:
            number, task = slot.get("id"), slot.get("id_task", 0)
            if slot.get("is_processing") and isinstance(number, int) and isinstance(task, int):
                working[number, task] = slot
        for key, task in tuple(self.log.active.items()):
            # Its end may stand in lines that were lost when the log was rotated.
            if key not in working and at - task.began > _SEEN_AFTER:
                del self.log.active[key]
        for key, slot in working.items():
            _note(self.log.active.setdefault(key, ActiveRequest(at, at)), slot, at)

    def note_restored(self, restored: Restored, at: float) -> None:
        """Take a kept prompt that was restored; it is told of until something else is asked."""
        self._restored = at, restored

    def work(self, at: float) -> Work:
        """Return the work at a time."""
        tasks = self.log.active.values()
        reading = [task for task in tasks if not (task.decoded or self._routes)]
        latest = list(islice(reversed(self.log.finished), _RECENT))
        drafted = [request.accepted for request in latest if request.accepted is not None]
        prompts = [
            (request.cached * request.prompt_tokens, request.prompt_tokens)
            for request in latest
            if request.cached is not None and request.prompt_tokens
        ]
        cached, whole = map(sum, zip(*prompts, strict=True)) if prompts else (0, 0)
        if self._restored and any(task.began > self._restored[0] for task in tasks):
            self._restored = None
        return Work(
            busy=len(tasks),
            slots=self._slots,
            reading=self._reading(min(reading, key=_age), at) if reading else None,
            tokens_per_second=self._pace if tasks else None,
            cached=cached / whole if whole else None,
            accepted=sum(drafted) / len(drafted) if drafted else None,
            restored=self._restored and self._restored[1],
        )

    def _reading(self, task: ActiveRequest, at: float) -> PromptProgress:
        """Estimate a prompt's progress: what is read, and part of the batch under way.

        The pace is that of this prompt's last batch; in the first, that of the last prompt. Where
        the processor computes, its time counts: of that, a token takes as much on a busy machine.
        """
        seconds, speed = max(at - task.began, 0.0), task.pace or self.log.prompt_speed
        if not (speed and task.prompt and task.prompt >= TELLING):
            return PromptProgress(0, 0, 0, seconds)
        ends = task.batch or 0, task.read + self._batch, task.prompt - self.log.rest
        batch = min((end for end in ends if task.read < end < task.prompt), default=task.prompt)
        since, load = max(at - task.read_at, 0.0), task.load if task.pace else self.log.load
        if load >= _COMPUTES:
            since = (self.log.spent - task.spent) / load
        share = speed * since / max(batch - task.read, 1)
        if share > _SURE:  # slower than expected: come closer and closer to the end of the batch
            share = 1 - (1 - _SURE) * _SURE / share
        done = min(task.read + int(share * (batch - task.read)), task.prompt - 1)
        task.shown = max(task.shown, done)
        return PromptProgress(task.prompt, min(task.cached or 0, task.shown), task.shown, seconds)


def _age(task: ActiveRequest) -> float:
    return task.began


def _note(task: ActiveRequest, slot: dict[str, Any], at: float) -> None:
    """Note what a slot tells of its task at a time."""
    told = decoded(slot)
    if told is None:
        return
    if told and task.begun is None:
        task.begun = told, at
    elif task.begun and told > (task.decoded or 0) and at > task.begun[1]:
        # The log tells the speed of an answer only if nobody cancels it.
        task.speed = (told - task.begun[0]) / (at - task.begun[1])
    task.decoded = told
    tokens = slot["next_token"]
    left = (tokens[0] if isinstance(tokens, list) else tokens).get("n_remain")
    if isinstance(left, int) and left >= 0:
        task.limit = told + left
    batch = slot.get("n_prompt_tokens")
    # A slot that has not begun still tells of its last request.
    if slot.get("n_prompt_tokens_processed") and isinstance(batch, int) and not told:
        task.batch = batch
