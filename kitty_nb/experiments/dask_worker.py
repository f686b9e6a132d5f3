"""Trials on a worker of a Dask cluster: with its own engine, its own models, its own folders."""

from __future__ import annotations

import asyncio
import pickle
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from distributed import get_worker

from kitty_nb.config import ServerConfig, salvage_settings
from kitty_nb.errors import KittyError
from kitty_nb.experiments.model_files import fingerprint_of
from kitty_nb.experiments.run_trial import engine_of, run_trial
from kitty_nb.isolated_server import this_host

if TYPE_CHECKING:
    from distributed import Worker

    from kitty_nb.experiments.trial import ModelFingerprint, SweepEvent, Trial, TrialResult
    from kitty_nb.experiments.workload import Workload


@dataclass(frozen=True, slots=True)
class Order:
    """A trial on its way to a worker.

    Attributes:
        name: Unlike that of any other order.
        topic: Of the cluster's events, under which the trial's own are told.
        trial: What to try.
        config: The sweep's settings.
        workload: What to ask.
        host: The machine on which those settings hold as they are.
        model: What the model must be; None while nobody knows.
        alone: Whether to wait until the worker has no other trial.
        keep_log: Whether the server's log is sent home.
    """

    name: str
    topic: str
    trial: Trial
    config: ServerConfig
    workload: Workload
    host: str
    model: ModelFingerprint | None
    alone: bool
    keep_log: bool


@dataclass(frozen=True, slots=True)
class Delivery:
    """What comes home of a trial.

    Attributes:
        result: Its row.
        worker: Address of the worker.
        model: What the model was there.
        log: The server's log, where it is wanted.
    """

    result: TrialResult
    worker: str
    model: ModelFingerprint
    log: bytes = b""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A worker that cannot run a trial, which another may.

    Attributes:
        worker: Its address.
        reason: In a sentence.
    """

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Running:
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


_running: dict[str, _Running] = {}
_stopped: set[str] = set()
_turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)


async def run_order(order: Order) -> Delivery | Refusal | None:
    """Run a trial on this worker; None when it was stopped.

    It runs on the worker's event loop: there it can be cancelled, also by the worker's own end.
    """
    worker = get_worker()
    _running[order.name] = running = _Running()
    if order.name in _stopped:  # the word came before the order
        running.scope.cancel()
    try:
        with running.scope:
            async with AsyncExitStack() as stack:
                if order.alone:
                    await stack.enter_async_context(_turns[worker.address])
                return await _carry_out(order, worker)
    finally:
        del _running[order.name]
        running.ended.set()
    return None


async def stop_order(name: str) -> None:
    """End a trial and its server, if it runs on this worker, and wait for that."""
    _stopped.add(name)
    if running := _running.get(name):
        running.scope.cancel()
        await running.ended.wait()


def ready() -> None:
    """Do nothing: a worker that can be asked for this has kitty_nb."""


def settings_here(config: ServerConfig) -> ServerConfig:
    """Return a sweep's settings with the places that this machine's own `.env` names.

    A models folder that it does not name is the sweep's, where there is one, as on a shared disk.

    Raises:
        ConfigError: The file cannot be read.
    """
    own, _ = salvage_settings(profile=config.profile)
    shared = "models_dir" not in own.model_fields_set and config.models_dir.is_dir()
    binary = config.binary if config.binary and config.binary.exists() else None
    return config.model_copy(
        update={
            "models_dir": config.models_dir if shared else own.models_dir,
            "binary": own.binary or binary,
            "history": own.history,
        }
    )


async def _carry_out(order: Order, worker: Worker) -> Delivery | Refusal:
    def tell(event: SweepEvent) -> None:
        worker.log_event(order.topic, (order.name, pickle.dumps(event)))

    try:
        config = order.config
        if order.host != this_host():
            config = await anyio.to_thread.run_sync(settings_here, config)
        mark = await anyio.to_thread.run_sync(fingerprint_of, order.trial.model, config)
        await engine_of(order.trial, config)
    except KittyError as error:
        return Refusal(worker.address, str(error))
    if order.model not in {None, mark}:
        return Refusal(worker.address, "It has another file of that name.")
    try:
        with TemporaryDirectory(
            prefix="kitty_nb-", dir=worker.local_directory, ignore_cleanup_errors=True
        ) as name:
            folder = Path(name)
            result = await run_trial(
                order.trial, tell, config=config, workload=order.workload, folder=folder
            )
            log = await anyio.to_thread.run_sync(_read, folder) if order.keep_log else b""
    except OSError as error:
        return Refusal(worker.address, f"{worker.local_directory} cannot be used: {error}.")
    return Delivery(result, worker.address, mark, log)


def _read(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.log")))
