"""Repeating a recorded run, with a server of its own."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio.to_thread import run_sync
from rich.filesize import decimal

from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.config import ServerConfig, salvage_settings
from kitty_nb.errors import RunRecordError
from kitty_nb.experiments.background import in_background
from kitty_nb.experiments.comparison import compare
from kitty_nb.experiments.model_files import digest_model
from kitty_nb.experiments.recording import ask, describe_run
from kitty_nb.isolated_server import SERVER_SETTINGS, gather_facts, isolated_server
from kitty_nb.manager import Operation

if TYPE_CHECKING:
    from pathlib import Path

    from kitty_nb import LoadProgress
    from kitty_nb.experiments.comparison import Comparison
    from kitty_nb.experiments.run_record import RunRecord

_DIGITS = 12  # of a digest, enough to tell by


def replay(
    record: RunRecord, *, model: str | Path | None = None, config: ServerConfig | None = None
) -> Operation[Comparison]:
    """Ask a fresh server what was asked in a recorded run, and compare.

    The server gets the recorded settings, a port and folders of its own, and ends with the replay;
    servers that run are not touched. Cancelling the operation ends it too.

    Args:
        record: The run.
        model: The model to ask instead of the recorded one. Without it that is looked for where it
            was, then by its digest in the models folder.
        config: The settings of this machine: models folder, engine, history of loads. Without it
            those of `.env`.

    Raises:
        ConfigError: `.env` cannot be read. Waiting for the result raises RunRecordError when the
            recorded model is not to be found, and what starting a server and asking it raises.
    """
    here = config or salvage_settings(profile=record.profile)[0]
    progress: deque[LoadProgress] = deque(maxlen=1)

    async def repeat() -> Comparison:
        own = await run_sync(_own_settings, record, here)
        asked = await (_choose(own, model) if model else _find(record, own))
        async with isolated_server(asked, anyway=True, on_progress=progress.append) as server:
            exchanges = await ask(server.access, (one.request for one in record.exchanges))
            repeated = await describe_run(server.state, server.access, exchanges, record.seed)
            return compare(record, repeated)

    _, future = in_background(repeat, "kitty_nb replay")
    return Operation(future, lambda: progress[-1] if progress else None)


def _own_settings(record: RunRecord, here: ServerConfig) -> ServerConfig:
    """The recorded settings on this machine."""
    return here.replace(
        **record.config.model_dump(include=set(SERVER_SETTINGS)),
        profile=record.profile,
        alias=record.config.alias,
        model=None,
        allow_absolute_paths=True,
    )


async def _choose(own: ServerConfig, model: str | Path) -> ServerConfig:
    return await run_sync(partial(own.replace, model=model))


async def _find(record: RunRecord, own: ServerConfig) -> ServerConfig:
    """The settings with the recorded model, wherever it is now."""
    wanted, recorded = record.model, record.config.model
    fate = "is gone"
    if recorded and await anyio.Path(recorded).is_file():
        config = await _choose(own, recorded)
        if (await digest_model(config)).shards == wanted.shards:
            return config
        fate = "is another one now"
    for path in await run_sync(_alike, record, own):
        config = await _choose(own, path)
        found = (await digest_model(config)).shards
        if [one.sha256 for one in found] == [one.sha256 for one in wanted.shards]:
            return config
    digest = wanted.shards[0].sha256[:_DIGITS] if wanted.shards else "unknown"
    raise RunRecordError(
        f"The recorded model {fate}: {recorded}, of {decimal(wanted.size)}, whose SHA-256 begins"
        f" with {digest}. It is not in {own.models_dir} either. Put it back, set"
        " LLAMACPP_MODELS_DIR to the folder that has it, or compare with another model:"
        " replay(record, model=…)."
    )


def _alike(record: RunRecord, own: ServerConfig) -> list[Path]:
    """Models of the folder that are as long as the recorded one, and begin as it does."""
    return [
        model.path
        for model in ModelCatalog(own.models_dir).scan()
        if model.startable
        and model.size == record.model.size
        and gather_facts(own.replace(model=model.path)).digest == record.header
    ]
