"""Asking a server how it is until it is ready, and from then on."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio

from kitty_nb.supervisor.events import (
    Activity,
    Event,
    HealthChecked,
    HealthCheckResult,
    Level,
    ServerStatus,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from kitty_nb.supervisor.health import HealthProbe
    from kitty_nb.supervisor.load_progress import LoadMeter

# Seconds. The log announces ready first: health is asked when the log hints at news, else ever
# more rarely, each pause so many times the last.
_POLL_FIRST = 0.01
_POLL_LONGEST = 1.0
_POLL_FACTOR = 4
_POLL_READY = 2.0
_ATTEMPT_EVERY = 1.0
_AT_ONCE = 0.3  # a first answer that takes no longer is not worth a word
_SILENT = 10.0  # from here on, a request without a first token is worth a word
_FIRST_ANSWER = "no first answer yet"


class HealthWatch:
    """Follows one server's health.

    Args:
        probe: What asks the server.
        meter: Told of every sign of life.
        elapsed: The clock: seconds since the start was asked for.
        attempts: How many once-a-second checks are counted.
        enter: Called with each other status, and when it was entered; returns what the load has
            taken by then, which is less where it ended before this watch began.
        publish: Called with each event for the user.
        note: Called with every answer.
        doubt: Asked before ready is believed: why it is not our server that answers, in words.
        prove: Asked after that: whether the server answers a request, once it does.
        ending: Asked before anything is told: whether somebody is ending the server.
    """

    def __init__(
        self,
        probe: HealthProbe,
        meter: LoadMeter,
        elapsed: Callable[[], float],
        attempts: int,
        enter: Callable[[ServerStatus, float], float],
        publish: Callable[[Event], None],
        note: Callable[[HealthCheckResult], None],
        doubt: Callable[[], Awaitable[str | None]],
        prove: Callable[[], Awaitable[bool]],
        ending: Callable[[], bool],
    ) -> None:
        self._probe = probe
        self._meter = meter
        self._elapsed = elapsed
        self._attempts = attempts
        self._enter = enter
        self._publish = publish
        self._note = note
        self._doubt = doubt
        self._prove = prove
        self._ending = ending
        self._proving = False
        self._proven = anyio.Event()
        self._asking = anyio.CancelScope()
        self._tasks: TaskGroup
        self._news = anyio.Event()

    def hint(self) -> None:
        """Ask soon: there is reason to expect another answer."""
        self._news.set()

    async def run(self) -> None:
        """Ask until the server is ready, then until `stop`."""
        with self._asking:
            async with anyio.create_task_group() as self._tasks:
                await self._until_ready()
            await self._ever_after()

    def stop(self) -> None:
        """Hang up: some builds wait for those who still ask before they end."""
        self._asking.cancel()

    async def _ever_after(self) -> None:
        answering, silent_for = True, 0.0
        while True:
            result = await self._probe.check_activity()
            self._note(result)
            silent_before, silent_for = silent_for, result.silent_for
            if silent_before < _SILENT <= silent_for:
                self._say(
                    f"A request has been worked on for {silent_for:.0f} s without a first token:"
                    " its prompt is long, or the device compiles its programs for it."
                )
            elif silent_for < _SILENT <= silent_before:
                self._say(f"The server answers, after more than {silent_before:.0f} s.")
            answered, answering = answering, result.status is ServerStatus.READY
            if answered and not answering and not self._ending():
                self._say(
                    f"The server runs but does not serve ({result.message}): it hangs, or somebody"
                    " has paused it. Restart it if it does not come back.",
                    Level.WARNING,
                )
            elif answering and not answered:
                self._say("The server serves again.", Level.SUCCESS)
            await anyio.sleep(_POLL_READY)

    async def _until_ready(self) -> None:
        attempt, next_attempt, pause = 0, 0.0, _POLL_FIRST
        status = ServerStatus.STARTING
        while status is not ServerStatus.READY:
            result = await self._check()
            elapsed = self._elapsed()
            if result.status is not status:
                status = result.status
                self._meter.touch(elapsed)
                elapsed = self._enter(status, elapsed)
            self._note(result)
            due = elapsed >= next_attempt
            if due:
                attempt = min(attempt + 1, self._attempts)
            if due or status is ServerStatus.READY:
                # Not one for each second missed: the load may be older than this watch.
                whole = elapsed // _ATTEMPT_EVERY * _ATTEMPT_EVERY
                next_attempt = max(next_attempt, whole) + _ATTEMPT_EVERY
                if not self._ending():
                    self._tell(result, max(attempt, 1), elapsed)
            if self._news.is_set():
                pause = _POLL_FIRST
            self._news = anyio.Event()
            with anyio.move_on_after(min(pause, max(0.0, next_attempt - elapsed))):
                await self._news.wait()
            pause = min(pause * _POLL_FACTOR, _POLL_LONGEST)

    async def _check(self) -> HealthCheckResult:
        result = await self._probe.check()
        if result.status is not ServerStatus.READY:
            return result
        if not self._proving:
            if doubt := await self._doubt():
                return replace(result, status=ServerStatus.STARTING, message=doubt)
            self._proving = True
            self._tasks.start_soon(self._note_first_answer)
            with anyio.move_on_after(_AT_ONCE):
                await self._proven.wait()
        if self._proven.is_set():
            return result
        return replace(result, status=ServerStatus.LOADING, message=_FIRST_ANSWER)

    async def _note_first_answer(self) -> None:
        if await self._prove():
            self._proven.set()
            self.hint()

    def _tell(self, result: HealthCheckResult, attempt: int, elapsed: float) -> None:
        self._publish(HealthChecked(result, attempt, self._attempts))
        if result.status is ServerStatus.READY:
            checks = "1 check" if attempt == 1 else f"{attempt} checks"
            self._say(f"Model loaded ({checks}, {elapsed:.0f}s elapsed)", Level.SUCCESS)
        elif result.message == _FIRST_ANSWER:
            self._say(
                "The model is loaded; waiting for its first answer, before which some devices"
                f" compile their programs for minutes… ({elapsed:.0f}s elapsed)"
            )
        elif result.status is ServerStatus.LOADING:
            count = f"{attempt}/{self._attempts}, " if elapsed < self._attempts else ""
            self._say(f"Loading model… ({count}{elapsed:.0f}s elapsed)")
        elif attempt > 1:
            self._say(f"Server starting… ({result.message}, {elapsed:.0f}s elapsed)")

    def _say(self, message: str, level: Level = Level.INFO) -> None:
        self._publish(Activity(message, level, time.time()))
