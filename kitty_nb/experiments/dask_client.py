"""A Dask client, used from another event loop than its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar, cast

from distributed import CancelledError
from distributed.comm.core import CommClosedError

from kitty_nb.errors import ExperimentError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from distributed import Client, Future
    from tornado.platform.asyncio import AsyncIOLoop

    T = TypeVar("T")

RESOURCE = "kitty_trial"


async def count_slots(client: Client) -> int:
    """Return how many trials the workers take at once, 1 at least: more may be on their way.

    That is what they have of the resource `kitty_trial`; where none has it, one each.

    Raises:
        ExperimentError: There is no cluster.
    """
    workers = await on_its_loop(client, workers_of(client))
    return max(1, sum(map(slots_of, workers.values())) or len(workers))


async def on_its_loop(client: Client, work: Coroutine[Any, Any, T]) -> T:
    """Await something on a client's own event loop, which may be another thread's.

    Raises:
        ExperimentError: The client is closed, or closes meanwhile, or has lost its scheduler.
    """
    if client.status != "running":
        work.close()
        raise ExperimentError(_lost(f"its client is {client.status}"))
    loop = cast("AsyncIOLoop", client.loop).asyncio_loop
    done = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
    try:
        await asyncio.wait([done])
    finally:
        done.cancel()
    if done.cancelled():
        raise ExperimentError(_lost("its client was closed"))
    try:
        return done.result()
    except CommClosedError as error:
        raise ExperimentError(_lost(str(error))) from error


async def answer_of(future: Future[Any]) -> Any:
    """Await what a task returns, on the client's loop.

    Raises:
        ExperimentError: The client has lost its scheduler.
    """
    try:
        return await future
    except CancelledError as error:
        raise ExperimentError(_lost(str(error))) from error


async def workers_of(client: Client) -> Mapping[str, Mapping[str, Any]]:
    """Return what the scheduler knows of each worker, by its address. On the client's loop."""
    scheduler: Any = client.scheduler
    workers: Mapping[str, Mapping[str, Any]] = (await scheduler.identity())["workers"]
    return workers


def slots_of(worker: Mapping[str, Any]) -> int:
    """Return how many trials a worker takes at once, by its resource."""
    return int(worker["resources"].get(RESOURCE, 0))


def _lost(why: str) -> str:
    return (
        f"The Dask cluster cannot be reached: {why}. What is done is kept; run the sweep again with"
        " a client of a cluster that runs."
    )
