"""Time that runs faster: the waits and the clock of a supervisor together."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from kitty_nb import ServerConfig, Supervisor
from kitty_nb.supervisor.events import Event

RATE = 10  # that many seconds in one


def clock() -> float:
    """Seconds, as `time.monotonic` counts them, but faster."""
    return time.monotonic() * RATE


class _Selector(selectors.DefaultSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout if timeout is None else timeout / RATE)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__(_Selector())

    def time(self) -> float:
        return clock()


def supervised_fast(
    config: ServerConfig, scenario: Callable[[Supervisor, list[Event]], Coroutine[Any, Any, None]]
) -> list[Event]:
    """Run a scenario on a supervisor whose time runs fast; return all events, in order."""
    events: list[Event] = []

    async def run() -> None:
        with anyio.fail_after(60 * RATE):
            async with Supervisor(config, clock=clock) as supervisor:
                supervisor.subscribe(events.append)
                await scenario(supervisor, events)

    anyio.run(run, backend_options={"loop_factory": _Loop})
    return events
