"""One piece of asynchronous work on an event loop in a thread of its own, which ends with it."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    T = TypeVar("T")


def in_background(work: Callable[[], Awaitable[T]], name: str) -> tuple[Thread, Future[T]]:
    """Start the work, and return when it first waits. Cancelling the future cancels it.

    Args:
        work: A coroutine function.
        name: Of the thread. It is a daemon: whoever starts it sees to its end.
    """
    begun: Future[tuple[BlockingPortal, Callable[[], Awaitable[T]]]] = Future()
    waits = Event()

    async def live() -> None:
        ended = anyio.Event()

        async def whole() -> T:
            asyncio.get_running_loop().call_soon(waits.set)  # its turn is when the work waits
            try:
                return await work()
            finally:
                ended.set()

        async with BlockingPortal() as portal:
            begun.set_result((portal, whole))
            await ended.wait()

    thread = Thread(target=anyio.run, args=(live,), name=name, daemon=True)
    thread.start()
    portal, whole = begun.result()
    future = portal.start_task_soon(whole)
    waits.wait()
    return thread, future
