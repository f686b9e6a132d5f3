"""One load's dealings with the history: what to expect of it, and its row when it has ended."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import anyio
from anyio.to_thread import run_sync

from kitty_nb.supervisor.events import Stage
from kitty_nb.supervisor.history import LoadHistory, LoadRecord
from kitty_nb.supervisor.load_estimate import Basis, estimate_load
from kitty_nb.supervisor.load_facts import (
    LoadFacts,
    active_share,
    gather_facts,
    header_bytes,
    path_text,
    this_host,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Engine
    from kitty_nb.supervisor.history import Outcome
    from kitty_nb.supervisor.load_progress import LoadMeter

# Bytes from which a model's rise in memory stands out from that of the engine itself.
_TELLING = 32 << 20
_LAST_LOOK = 1.0  # seconds; a network drive may hang


class LoadJournal:
    """Looks up what is known of a load, and writes down how it went.

    Args:
        config: What is to be started.
        tell: Called with a sentence about what is wrong with the history.
        whole: Whether the load is watched from its beginning; only then its row is true.
    """

    def __init__(self, config: ServerConfig, tell: Callable[[str], None], *, whole: bool) -> None:
        self._config = config
        self._whole = whole
        self._history = LoadHistory(config.history, tell)
        self._engine: Engine | None = None
        self._closed = False
        self._facts: LoadFacts | None = None
        self._records: tuple[LoadRecord, ...] = ()
        self._active = 1.0

    async def look(self, meter: LoadMeter) -> None:
        """Look at the model's files and their past, and tell the meter what to expect."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._recall)
            # Abandoned when cancelled: a network drive that hangs must not hold the supervisor.
            facts = await run_sync(gather_facts, self._config, abandon_on_cancel=True)
        self._facts = facts
        self._expect(meter)
        model = self._config.model
        if model and meter.total:
            meter.header = await run_sync(header_bytes, model, abandon_on_cancel=True)
        if meter.expected.basis is Basis.NOTHING and model:
            self._active = await run_sync(active_share, model, abandon_on_cancel=True)
            self._expect(meter)

    async def _recall(self) -> None:
        self._records = await self._history.recall(this_host(), path_text(self._config.model))

    def take(self, meter: LoadMeter, engine: Engine) -> None:
        """Note by which engine the model will be loaded, which changes what to expect."""
        self._engine = engine
        self._expect(meter)

    def _expect(self, meter: LoadMeter) -> None:
        if self._facts is None:
            return
        self._facts = self._by_engine(self._facts)
        meter.total = self._facts.size if self._facts.size >= _TELLING else 0
        meter.expected = estimate_load(self._records, self._facts, self._active)

    def _by_engine(self, facts: LoadFacts) -> LoadFacts:
        if self._engine is None:
            return facts
        return replace(facts, engine=self._engine.kind.value, version=self._engine.version)

    async def close(self, meter: LoadMeter, elapsed: float, outcome: Outcome) -> None:
        """Write the load's row, once, and let nothing stop that."""
        if self._closed or not self._whole:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            facts = self._facts or await self._look_late()
            if facts is None:
                return
            record = LoadRecord(
                **asdict(facts),
                starting=meter.seconds(Stage.STARTING, elapsed),
                loading=meter.seconds(Stage.LOADING, elapsed),
                preparing=meter.seconds(Stage.PREPARING, elapsed),
                loaded=meter.loaded,
                outcome=outcome.value,
                at=time.time(),
            )
            await self._history.add(record)

    async def _look_late(self) -> LoadFacts | None:
        """Look at the files of a load that has ended before that; None where it takes too long."""
        with anyio.move_on_after(_LAST_LOOK):
            facts = await run_sync(gather_facts, self._config, abandon_on_cancel=True)
            # What was in the page cache before the load, nobody knows any more.
            return self._by_engine(replace(facts, cached=None))
        return None
