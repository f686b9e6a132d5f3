"""The finished and active requests of a server, according to its log and its slots."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import printable
from kitty_nb.supervisor.events import (
    Ending,
    PromptProgress,
    Request,
    Restored,
    Work,
    answer_speed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


KEPT = 200  # finished requests
_PROBE_PROMPT, _PROBE_ANSWER = 16, 1  # tokens; the maximum of the request that proves READY
_TELLING = 32  # tokens; a pace measured on fewer is that of a batch's overhead
_LATE = 0.3  # seconds; lines are read within this time of being written
_RECENT = 20  # requests whose cache hits and drafts are reported
_END_WITHIN = 1.0  # seconds after which a request that no slot shows has ended
_BATCH = 2048  # tokens; llama.cpp's default
_COMPUTES = 0.5  # CPU seconds per second; with less, a GPU computes
_PACE_HOLDS = 5.0  # seconds; an older speed says nothing about now
_PACED_OVER = 0.4  # seconds; the shortest time over which a pace is measured
_SURE = 0.9  # the part of a batch that is shown at the expected pace


@dataclass(frozen=True, slots=True)
class Held:
    """The contents of a slot after a request."""

    task: int  # the number of the request
    tokens: int  # those of its prompt and answer
    cached: int | None = None  # how many of them were there before; None if the log doesn't say
    # Whether the request continued where the slot's contents ended, as far as known.
    extends: bool = False


@dataclass(slots=True)
class ActiveRequest:
    """A request that the server is still processing; times are in seconds of one clock."""

    began: float  # when work on it began
    read_at: float  # when the prompt had been read as far as now
    prompt: int | None = None  # tokens of its whole prompt, once known
    cached: int | None = None  # how many of them came from the cache
    read: int = 0  # how many of them have been read, including the cached ones
    # Tokens a second in the last batch of the prompt; None before the first.
    pace: float | None = None
    load: float = 0.0  # CPU seconds per second in that batch
    spent: float = 0.0  # CPU seconds that the server had used at `read_at`
    rest: int = 0  # tokens that were left when all but the last few were read
    shown: int = 0  # how many tokens were last shown as read
    decoded: int | None = None  # tokens of the answer
    # Where the current batch ends, in tokens of the prompt, if slots tell.
    batch: int | None = None
    limit: int | None = None  # the maximum tokens of the answer, if slots tell
    # How many of the answer's tokens slots reported first, and when.
    begun: tuple[int, float] | None = None
    reading: float | None = None  # seconds that reading the prompt took
    computed: int | None = None  # tokens of the prompt that were read, without the cached ones
    speed: float | None = None  # tokens of the answer a second
    seconds: float | None = None  # seconds that it took
    accepted: float | None = None  # the share of drafted tokens that were accepted
    cancelled: bool = False  # whether its client has gone
    shifted: bool = False  # whether the oldest tokens of the context were dropped for it
    full: bool = False  # whether the context was full
    error: str = ""  # the error that the server reports
    extends: bool = False  # whether it continues where the slot's contents end
    logged: bool = False  # whether the log has reported its beginning, and so will its end
    missed: float = math.inf  # since when slots have not shown it

    def advance(self, read: int, at: float, spent: float) -> None:
        """Note that a batch is read, and the CPU seconds that the server has used so far."""
        step, seconds = read - self.read, at - self.read_at
        if step >= _TELLING and seconds > 0:
            self.pace, self.load = step / seconds, (spent - self.spent) / seconds
        if self.prompt and self.prompt - read >= _TELLING:
            self.rest = self.prompt - read
        self.read, self.read_at, self.spent = read, at, spent

    def finish(self, held: int, at: float) -> Request:
        """Return the record of the finished request, on the same clock.

        Args:
            held: Tokens that its slot holds: those of the prompt, and all of the answer but one.
            at: When it ended.
        """
        prompt = self.prompt
        if prompt is None and self.computed is not None:
            prompt = max(held - max((self.decoded or 0) - 1, 0), self.computed)
        elif prompt is None and not (self.error or self.cancelled):
            prompt = held  # an embedding has no timings
        cached = None
        if prompt and self.computed is not None:
            cached = 1 - self.computed / prompt
        elif prompt and self.cached is not None:
            cached = self.cached / prompt
        if self.error:
            ended = Ending.ERROR
        elif self.cancelled:
            ended = Ending.CANCELLED
        elif self.full or (self.limit and (self.decoded or 0) >= self.limit):
            ended = Ending.LENGTH
        else:
            ended = Ending.FINISHED
        return Request(
            self.began,
            ended,
            prompt,
            self.decoded,
            self.reading,
            self.seconds if self.seconds is not None else at - self.began,
            self.speed,
            cached,
            self.accepted,
            self.error,
        )


# A number as logs write it, of limited length.
_NUMBER = r"\d{1,12}(?:\.\d{1,12})?"
# `minutes.seconds.milliseconds.microseconds` since the server's start; old builds write none.
_CLOCK = re.compile(r"(\d{1,9})\.(\d\d)\.(\d{3})\.(\d{3}) ")
_SLOT = re.compile(r"\bid +(\d{1,9}) \| task (\d{1,12}) \|(.*)")
_BEGUN = re.compile(r"processing task")
_SELECTED = re.compile(r"\bid +(\d{1,9}) \| task -1 \| selected slot by.*?(f_keep = 1\.000|$)")
_PROMPT = re.compile(r"new prompt,.*?(?:task\.n_tokens|n_prompt_tokens) = (\d{1,12})\b")
_HELD = re.compile(r"(?:cached n_tokens|n_past) = (\d{1,12}), memory_seq_rm")
_READ = re.compile(
    rf"prompt processing[^=]*, n_tokens = +(\d{{1,12}}),[^/]*?progress = ({_NUMBER})"
    rf"(?:,[^/]*/ +({_NUMBER}) tokens per second)?"
)
_READ_ALL = re.compile(rf"prompt eval time = +({_NUMBER}) ms / +(\d{{1,12}}) tokens")
_ANSWERED = re.compile(rf"^ *eval time = +({_NUMBER}) ms / +(\d{{1,12}}) (?:tokens|runs)")
_TOOK = re.compile(rf"total time = +({_NUMBER}) ms")
_DRAFTED = re.compile(rf"draft acceptance(?: rate)? = ({_NUMBER})\b")
_SHIFTED = re.compile(r"slot context shift|input truncated")
_ENDED = re.compile(
    r"stop processing: (?:n_tokens|n_past) = (\d{1,12})\b(?P<full>, truncated = 1)?"
)
_CANCELLED = re.compile(r"cancel task, id_task = (\d{1,12})\b")
_SLEEPS = re.compile(r": (?:server is )?entering sleeping state$")
_FAILED = re.compile(r"send_error: task id = (\d{1,12}), error: (.*)")
# A router's log: the servers of its models, each with a port, and the lines of each.
_SPAWNED = re.compile(r"spawning server instance with name=(.*) on port (\d{1,5})$")
_OF_CHILD = re.compile(r"\[ *(\d{1,5})\] (.*)")
_EXITED = re.compile(r"instance name=(.*) exited with status")


class RequestLog:
    """Follows the requests through a server's log.

    Args:
        began: When the server's process began, in seconds of the clock that `read` uses; `dated`
            corrects it.
        model: The model, if a router started the server.
        wall: Seconds since the epoch.
    """

    def __init__(
        self, began: float = 0.0, model: str = "", wall: Callable[[], float] = time.time
    ) -> None:
        self.finished: deque[Request] = deque(maxlen=KEPT)  # the newest, oldest first
        self.active: dict[tuple[int, int], ActiveRequest] = {}  # by slot and number
        # By slot, since its last request; none once the server has freed them to sleep.
        self.held: dict[int, Held] = {}
        self.ended: deque[tuple[int, int]] = deque(maxlen=KEPT)  # the last keys of `active`
        self.heard = False  # whether this build's log has reported a finished request
        # When the server became ready, on the clock of `read`: infinite before, and minus
        # infinity if no request proves it, as of a router's model.
        self.ready = -math.inf
        # Of the last prompt: tokens per second, None before the first, and CPU seconds per second,
        # 0 if unknown.
        self.prompt_speed: float | None = None
        self.load = 0.0
        self.rest = 0  # tokens at the end of a prompt that are read separately, as far as known
        self.spent = 0.0  # CPU seconds of the server so far, set by whoever reads its log
        self._proof: tuple[int, int] | None = None  # tokens of the request that proved READY
        self._model, self._wall = model, wall
        self._children: dict[str, RequestLog] = {}  # of a router's models, by port
        # The server's own clock began a moment after its process. Reading its lines as they arrive
        # shows when; earlier lines are dated by the process.
        self._zero, self._live = began, False
        self._last: tuple[int, int] | None = None
        self._extended: set[int] = set()  # the slots whose contents the next request extends

    @property
    def tasks(self) -> tuple[ActiveRequest, ...]:
        """The active requests, those of a router's models included."""
        children = (task for child in self._children.values() for task in child.tasks)
        return *self.active.values(), *children

    def dated(self, began: float, lines: Sequence[str] = (), written: float = 0.0) -> None:
        """Correct when the server's process began, before its first lines are read.

        The last of `lines` with a clock, and when that was written, tell it better than `began`.
        """
        last = next(filter(None, map(_CLOCK.match, reversed(lines))), None)
        self._zero = written - _seconds(last) if last else began

    def read(self, lines: Iterable[str], at: float) -> tuple[Request, ...]:
        """Process lines, as `readable` returns them; return the requests that they finish.

        A read without lines has reached the end: later lines are read as they are written.
        """
        lines = tuple(lines)
        epoch = self._wall() - at  # not constant: the other clock stands still in suspend
        found = (request for line in lines for request in self._read_line(line, at))
        ended = tuple(replace(request, at=request.at + epoch) for request in found)
        for log in () if lines else (self, *self._children.values()):
            log._live = True
        self.finished.extend(ended)
        return ended

    def _read_line(self, line: str, at: float) -> Iterator[Request]:
        if of_child := _OF_CHILD.match(line):
            # The line that names its model may be lost: logs are rotated.
            child = self._children.setdefault(of_child[1], RequestLog(at))
            yield from child._read_line(of_child[2], at)
            return
        at = self._when(line, at)
        if spawned := _SPAWNED.search(line):
            self._children[spawned[2]] = RequestLog(at, printable(spawned[1]))
        elif exited := _EXITED.search(line):
            gone = printable(exited[1])
            self._children = {
                port: one for port, one in self._children.items() if one._model != gone
            }
        elif failed := _FAILED.search(line):
            for task in self._numbered(failed[1]):
                task.error = printable(failed[2])
        elif cancelled := _CANCELLED.search(line):
            for task in self._numbered(cancelled[1]):
                task.cancelled = True
        elif _SLEEPS.search(line):
            self.held.clear()
        elif selected := _SELECTED.search(line):
            number = int(selected[1])
            (self._extended.add if selected[2] else self._extended.discard)(number)
        elif slot := _SLOT.search(line):
            self._last = key = int(slot[1]), int(slot[2])
            if _BEGUN.search(slot[3]):
                extends = key[0] in self._extended
                self.active[key] = ActiveRequest(
                    at, at, spent=self.spent, extends=extends, logged=True
                )
            yield from self._read_task(key, slot[3], at)
        elif self._last:  # old builds write the timings on lines of their own
            yield from self._read_task(self._last, line, at)

    def _read_task(self, key: tuple[int, int], words: str, at: float) -> Iterator[Request]:
        task = self.active.get(key)
        if task is None:
            return
        if ended := _ENDED.search(words):
            del self.active[key]
            self.ended.append(key)
            self.held[key[0]] = Held(key[1], int(ended[1]), task.cached, task.extends)
            task.full = bool(ended["full"]) and not task.shifted
            request = task.finish(int(ended[1]), at)
            proves, self.heard = self._proves(request), True
            if not proves:
                yield replace(request, model=self._model)
        elif found := _PROMPT.search(words):
            task.prompt = int(found[1])
        elif found := _HELD.search(words):
            if task.cached is None:
                task.cached = int(found[1])
            task.read, task.read_at, task.spent = int(found[1]), at, self.spent
        elif found := _READ.search(words):
            if task.prompt is None and float(found[2]):
                task.prompt = max(round(int(found[1]) / float(found[2])), int(found[1]))
            if int(found[1]) >= _TELLING and float(found[3] or 0):
                self.prompt_speed = float(found[3])
            task.advance(int(found[1]), at, self.spent)
        elif _SHIFTED.search(words):
            task.shifted = True
        else:
            self._read_timings(task, words)

    def _read_timings(self, task: ActiveRequest, words: str) -> None:
        if found := _READ_ALL.search(words):
            task.reading, task.computed = float(found[1]) / 1000, int(found[2])
            if task.cached is None:  # then it was derived from a rounded share
                task.prompt = None
            if task.computed >= _TELLING and task.reading:
                self.prompt_speed = task.computed / task.reading
                self.load = task.load
            self.rest = task.rest or (self.rest if task.computed <= self.rest else 0)
        elif found := _ANSWERED.search(words):
            task.decoded = int(found[2])
            task.speed = answer_speed(task.decoded, float(found[1])) or task.speed
        elif found := _TOOK.search(words):
            task.seconds = float(found[1]) / 1000
        elif found := _DRAFTED.search(words):
            task.accepted = float(found[1])

    def _proves(self, request: Request) -> bool:
        """Return whether this is the request by which the server proved to be ready.

        Each program that watches a load sends one such request, all of the same size, among those
        of clients that don't wait for READY.
        """
        size = request.prompt_tokens or 0, request.answer_tokens or 0
        small = size[0] <= _PROBE_PROMPT and size[1] <= _PROBE_ANSWER
        if request.ended is not Ending.FINISHED or not small:
            return False
        early = request.at <= self.ready + _LATE
        first = not self.heard and self.ready > -math.inf
        if self._proof is None and (early or first):
            self._proof = size
            return True
        return early and size == self._proof

    def _numbered(self, number: str) -> Iterator[ActiveRequest]:
        return (task for (_, one), task in self.active.items() if one == int(number))

    def _when(self, line: str, at: float) -> float:
        """Return when a line was written."""
        if not (clock := _CLOCK.match(line)):
            return at
        since = _seconds(clock)
        if self._live:
            self._zero = min(at - since, max(self._zero, at - since - _LATE))
        return min(self._zero + since, at)


def _seconds(clock: re.Match[str]) -> float:
    minutes, seconds, thousandths, millionths = map(int, clock.groups())
    return minutes * 60 + seconds + thousandths / 1e3 + millionths / 1e6


class AnswerPace:
    """The tokens per second between two reads of `/slots`.

    The server counts the tokens of a request anyway, so this costs it no more than the read. Tokens
    between the last read and the end of a request are not seen.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[Any, Any], int] = {}
        self._at: float | None = None
        self._pace = 0.0
        self._waits: dict[tuple[Any, Any], float] = {}  # since when a request has no token

    def measure(self, slots: list[dict[str, Any]], at: float) -> float | None:
        """Return the tokens per second since the last ones; None at the first read, or if untold.

        A slow server's next token may take several reads: until then the pace is the last one, or
        that of a token that arrives now, whichever is lower. Nor is a pace measured between two
        reads in quick succession: one token would look like hundreds a second. `at` is in seconds
        of any clock.
        """
        busy = {
            (slot.get("id"), slot.get("id_task")): decoded(slot)
            for slot in slots
            if slot.get("is_processing")
        }
        before, since = self._counts, self._at
        counts = {slot: count for slot, count in busy.items() if count is not None}
        untold = len(counts) < len(busy)
        silent = () if untold or any(counts.values()) else busy
        self._waits = {task: self._waits.get(task, at) for task in silent}
        if untold or since is None:
            self._counts, self._at = counts, at
            return None
        if counts and at - since < _PACED_OVER:
            return self._pace
        if at <= since:
            return None
        self._counts = counts
        # A falling count is that of another request, in a build that does not number them.
        risen = {slot: count - before.get(slot, 0) for slot, count in counts.items()}
        fresh = sum(counts[slot] if rise < 0 else rise for slot, rise in risen.items())
        if not fresh and any(counts.values()):
            return min(self._pace, 1 / (at - since))
        self._pace, self._at = fresh / (at - since), at
        return self._pace

    def silence(self, at: float) -> float:
        """Return the seconds that the longest request has waited, if none has a first token."""
        return at - min(self._waits.values(), default=at)


def decoded(slot: dict[str, Any]) -> int | None:
    """Return the answer's tokens so far. Builds differ in whether `next_token` is a list."""
    tokens = slot.get("next_token")
    if isinstance(tokens, list):
        tokens = tokens[0] if tokens else None
    count = tokens.get("n_decoded") if isinstance(tokens, dict) else None
    return count if isinstance(count, int) else None


class WorkMeter:
    """Combines what a server's log and its slots report.

    What only the slots report is added to the log's tasks. At most `batch` tokens of a prompt are
    read at once. A router shows no slots, which would tell when an answer begins.
    """

    def __init__(self, log: RequestLog, batch: int | None = None, *, routes: bool = False) -> None:
        self.log, self._routes = log, routes
        self._batch = batch or _BATCH
        self._restored: tuple[float, Restored] | None = None
        self._slots: int | None = None
        self._pace: float | None = None
        self._paced_at = 0.0

    @property
    def busy(self) -> bool:
        """True if requests are being processed."""
        return bool(self.log.tasks)

    def look(self, slots: Iterable[dict[str, Any]], pace: float | None, at: float) -> None:
        """Process the answer of `/slots`; an empty one changes nothing.

        `pace` is the tokens per second since the last one, `at` in seconds of the log's clock.
        """
        slots = tuple(slots)
        if not slots:
            return
        self._slots, self._pace, self._paced_at = len(slots), pace, at
        working = {}
        for slot in slots:
            number, task = slot.get("id"), slot.get("id_task", 0)
            if slot.get("is_processing") and isinstance(number, int) and isinstance(task, int):
                working[number, task] = slot
        for key, task in tuple(self.log.active.items()):
            task.missed = math.inf if key in working else min(task.missed, at)
            # A line arrives later than an answer does, unless it is lost when the log is rotated.
            if at - task.missed >= (_END_WITHIN if task.logged else 0):
                del self.log.active[key]
        for key, slot in working.items():
            if key not in self.log.ended:  # the log reports an end by now
                _note(self.log.active.setdefault(key, ActiveRequest(at, at)), slot, at)

    def note_restored(self, restored: Restored, at: float) -> None:
        """Note a kept prompt that was restored; it is reported until the next request."""
        self._restored = at, restored

    def work(self, at: float) -> Work:
        """Return the work at a time."""
        tasks = self.log.tasks
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
            reading=self._reading(min(reading, key=attrgetter("began")), at) if reading else None,
            tokens_per_second=self._pace if tasks and at - self._paced_at < _PACE_HOLDS else None,
            cached=cached / whole if whole else None,
            accepted=sum(drafted) / len(drafted) if drafted else None,
            restored=self._restored and self._restored[1],
        )

    def _reading(self, task: ActiveRequest, at: float) -> PromptProgress:
        """Estimate a prompt's progress: what is read, and part of the current batch.

        The pace is that of this prompt's last batch; in the first, that of the last prompt. If the
        CPU computes, its time counts, because a token takes as much of it on a busy machine.
        """
        seconds, speed = max(at - task.began, 0.0), task.pace or self.log.prompt_speed
        if not (speed and task.prompt and task.prompt >= _TELLING):
            return PromptProgress(0, 0, 0, seconds)
        ends = task.batch or 0, task.read + self._batch, task.prompt - self.log.rest
        batch = min((end for end in ends if task.read < end < task.prompt), default=task.prompt)
        since, load = max(at - task.read_at, 0.0), task.load if task.pace else self.log.load
        if load >= _COMPUTES:
            since = (self.log.spent - task.spent) / load
        share = speed * since / max(batch - task.read, 1)
        if share > _SURE:  # slower than expected: approach the end of the batch ever more slowly
            share = 1 - (1 - _SURE) * _SURE / share
        done = min(task.read + int(share * (batch - task.read)), task.prompt - 1)
        task.shown = max(task.shown, done)
        return PromptProgress(task.prompt, min(task.cached or 0, task.shown), task.shown, seconds)


def _note(task: ActiveRequest, slot: dict[str, Any], at: float) -> None:
    """Note what a slot reports about its task at a time."""
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
    # A slot that has not begun still reports its last request.
    if slot.get("n_prompt_tokens_processed") and isinstance(batch, int) and not told:
        task.batch = batch
