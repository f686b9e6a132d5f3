"""The work of a ready server: its slots' requests, and how far their prompts are read."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from kitty_nb.supervisor.events import PromptReading, Work
from kitty_nb.supervisor.health import decoded
from kitty_nb.supervisor.requests import RequestLog, Task

if TYPE_CHECKING:
    from collections.abc import Iterable

_RECENT = 20  # requests, whose cache hits and drafts are told
_SEEN_AFTER = 1.0  # seconds; from here on, slots and log know of the same requests
_NEARLY = 0.99  # the most that is told of a prompt before its first token


class WorkMeter:
    """Combines what a server's log and its slots tell.

    Args:
        log: The requests by its log. What only the slots tell of is added to its tasks.
    """

    def __init__(self, log: RequestLog) -> None:
        self.log = log
        self._slots: int | None = None
        self._pace: float | None = None

    @property
    def busy(self) -> bool:
        """True if requests are worked on."""
        return bool(self.log.tasks)

    def look(self, slots: Iterable[dict[str, Any]], pace: float | None, at: float) -> None:
        """Take the answer of `/slots`; an empty one changes nothing.

        Args:
            slots: The answer.
            pace: The tokens a second since the last one, where that is told.
            at: When it came, in seconds of the log's clock.
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
        for key, task in tuple(self.log.tasks.items()):
            # Its end may stand in lines that were lost when the log was rotated.
            if key not in working and at - task.began > _SEEN_AFTER:
                del self.log.tasks[key]
        for key, slot in working.items():
            _note(self.log.tasks.setdefault(key, Task(at)), slot)

    def work(self, at: float) -> Work:
        """Return the work at a time."""
        tasks = self.log.tasks.values()
        reading = [task for task in tasks if not task.decoded]
        latest = list(islice(reversed(self.log.finished), _RECENT))
        drafted = [request.accepted for request in latest if request.accepted is not None]
        prompts = [
            (request.cached * request.prompt_tokens, request.prompt_tokens)
            for request in latest
            if request.cached is not None and request.prompt_tokens
        ]
        cached, whole = map(sum, zip(*prompts, strict=True)) if prompts else (0, 0)
        return Work(
            busy=len(tasks),
            slots=self._slots,
            reading=self._reading(min(reading, key=_age), at) if reading else None,
            tokens_per_second=self._pace if tasks else None,
            cached=cached / whole if whole else None,
            accepted=sum(drafted) / len(drafted) if drafted else None,
        )

    def _reading(self, task: Task, at: float) -> PromptReading:
        """Estimate a prompt's progress between two batches by the speed of those before."""
        elapsed, speed = max(at - task.began, 0.0), self.log.prompt_speed
        if not (task.prompt and speed):
            return PromptReading(elapsed)
        since = max(at - (task.read_at or task.began), 0.0)
        batch = min(task.batch or task.prompt, task.prompt)
        if batch > task.read and task.read + speed * since > batch:
            speed = (batch - task.read) / since  # slower than the last ones
        left = max(task.prompt - task.read - speed * since, 0.0) / speed
        fraction = elapsed / (elapsed + left) if elapsed + left else 0.0
        return PromptReading(elapsed, min(fraction, _NEARLY), left)


def _age(task: Task) -> float:
    return task.began


def _note(task: Task, slot: dict[str, Any]) -> None:
    """Note what a slot tells of its task."""
    told = decoded(slot)
    if told is None:
        return
    task.decoded = told
    tokens = slot["next_token"]
    left = (tokens[0] if isinstance(tokens, list) else tokens).get("n_remain")
    if isinstance(left, int) and left >= 0:
        task.limit = told + left
    batch = slot.get("n_prompt_tokens")
    # A slot that has not begun still tells of its last request.
    if slot.get("n_prompt_tokens_processed") and isinstance(batch, int) and not told:
        task.batch = batch
