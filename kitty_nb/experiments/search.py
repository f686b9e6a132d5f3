"""A search for the best settings: propose, measure or break off, keep the row, and again."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import ResultStoreError
from kitty_nb.experiments.model_files import check_models, fingerprints_here
from kitty_nb.experiments.objective import glimpses, why_behind
from kitty_nb.experiments.propose import propose
from kitty_nb.experiments.run_trial import row_of, this_machine
from kitty_nb.experiments.settings import check_flags, in_use
from kitty_nb.experiments.standing import Standing
from kitty_nb.experiments.trial import (
    Outcome,
    StoreFailed,
    Trial,
    TrialEnded,
    TrialProgressed,
    TrialResult,
    TrialSeconds,
    TrialStarted,
)
from kitty_nb.supervisor.load_facts import this_host

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.metrics import Constraint
    from kitty_nb.experiments.objective import Objective
    from kitty_nb.experiments.space import Space
    from kitty_nb.experiments.store import ResultStore
    from kitty_nb.experiments.trial import Execute, ModelFingerprint, SweepEvent
    from kitty_nb.experiments.workload import Workload
    from kitty_nb.supervisor.events import LoadProgress

__all__ = ["Search"]

_CONFIRMING = 8  # each so many trials, one measures again what is best so far
_PEERS = 4  # combinations from which on it is known how long one takes
_PATIENCE = 4.0  # times as long as others a trial may take
_log = logging.getLogger(__name__)


@dataclass
class Search:
    """A search under way. For one event loop.

    Attributes:
        model: As trials name it.
        space: What to choose from.
        objective: What should be best.
        bounds: The constraints.
        budget: How many rows there shall be.
        seconds: After how long no further trial begins.
        seed: Of all chance.
        config: What trials change.
        workload: What each server is asked.
        kept: Where rows are kept.
        logs: Where the servers' logs go.
        on_event: Called with what happens.
        rows: Those there are by now.
        load: How far the latest load is.
        fingerprint: Of the model, once it was seen.
    """

    model: str
    space: Space
    objective: Objective
    bounds: Sequence[Constraint]
    budget: int
    seconds: float | None
    seed: int
    config: ServerConfig
    workload: Workload
    kept: ResultStore
    logs: Path | None
    on_event: Callable[[SweepEvent], None]
    rows: list[TrialResult] = field(default_factory=list)
    load: LoadProgress | None = None
    fingerprint: ModelFingerprint | None = None

    @property
    def standing(self) -> Standing:
        """What is known by now."""
        return Standing(tuple(self.rows), self.config, self.objective, self.bounds)

    async def run(self) -> None:
        """Search until the budget is spent or everything is tried.

        Raises:
            ConfigError: The engine does not know a flag of the space, or the model is not here.
            EngineNotFoundError: There is no engine.
            ResultStoreError: The file of results cannot be used.
            ExperimentError: The user's objective failed.
        """
        began = time.monotonic()
        await self._check_flags()
        await anyio.to_thread.run_sync(check_models, [self.model], self.config)
        here = await anyio.to_thread.run_sync(fingerprints_here, [self.model], self.config)
        self.fingerprint = here.get(self.model)
        self.rows = [own for row in await self.kept.recall() if (own := self._own(row))]
        try:
            async with this_machine(self.config, self.workload, self.logs) as execute:
                while len(self.rows) < self.budget:
                    passed = time.monotonic() - began
                    late = self.seconds is not None and passed > self.seconds
                    trial = None if late and self.rows else self._next()
                    if trial is None:
                        break
                    await self._try(trial, execute)
        finally:
            with anyio.CancelScope(shield=True), suppress(ResultStoreError):
                await self.kept.add()

    async def _check_flags(self) -> None:
        engine = await locate_engine(self.config.binary)
        values = ((name, value) for name, axis in self.space.items() for value in axis.samples)
        check_flags([Trial(self.model, (one,)) for one in values], engine.dialect)

    def _own(self, row: TrialResult) -> TrialResult | None:
        """A row of the store as this search would have it; None where it is no part of it."""
        settings = dict(row.trial.settings)
        if row.trial.model != self.model or settings.keys() != self.space.keys():
            return None
        if not all(settings[name] in axis for name, axis in self.space.items()):
            return None
        if not self.workload.satisfied_by(row) or not row.may_be_of(self.fingerprint):
            return None
        if row.outcome is Outcome.PRUNED and not row.reason.startswith(self._pruned):
            return None
        ordered = tuple((name, settings[name]) for name in self.space)
        return replace(row, trial=replace(row.trial, settings=ordered))

    @property
    def _pruned(self) -> str:
        return f"Pruned for {self.objective.name}: "

    def _next(self) -> Trial | None:
        standing = self.standing
        unsure = standing.unsure
        if unsure and (len(self.rows) + 1) % _CONFIRMING == 0:
            return unsure
        first = {name: in_use(name, self.config) for name in self.space}
        smaller = self.objective.smaller
        settings = propose(self.space, standing.known, first, smaller, self.seed)
        return Trial(self.model, settings) if settings else unsure

    async def _try(self, trial: Trial, execute: Execute) -> None:
        self._publish(TrialStarted(trial))
        row = await self._measured(trial, execute)
        self.rows.append(row)
        self._publish(TrialEnded(row))
        with anyio.CancelScope(shield=True):
            try:
                await self.kept.add([row])
            except ResultStoreError as error:
                self._publish(StoreFailed(str(error)))

    async def _measured(self, trial: Trial, execute: Execute) -> TrialResult:
        """Its row; the trial is broken off where it cannot win any more."""
        began, why = time.monotonic(), ""
        peers = {one.combination.trial: one.value for one in self.standing.peers}
        values = [value for value in peers.values() if value is not None]
        usual = [row.seconds.overall for row in self.rows if row.trial.combination in peers]
        sofar: list[float] = []

        def tell(event: SweepEvent) -> None:
            nonlocal why
            self._publish(event)
            found = dict(glimpses(event, self.workload.levels[0])).get(self.objective.name)
            if found is None or trial.repeat > 1:
                return
            sofar.append(found)
            typical = found if isinstance(event, TrialProgressed) else median(sofar)
            why = why or why_behind(self.objective, typical, values)
            if why:
                scope.cancel()

        row: TrialResult | None = None
        with anyio.CancelScope() as scope:
            if self.objective.tells_speed and len(peers) >= _PEERS and trial.repeat == 1:
                scope.deadline = anyio.current_time() + _PATIENCE * median(usual)
            row = await row_of(trial, execute, tell)
        if row:
            return row
        passed = time.monotonic() - began
        why = why or f"it took {passed:.1f} s by then, and {median(usual):.1f} s is usual."
        return TrialResult(
            trial,
            Outcome.PRUNED,
            f"{self._pruned}{why}",
            seconds=TrialSeconds(overall=passed),
            host=this_host(),
            at=time.time(),
            fingerprint=self.fingerprint,
        )

    def _publish(self, event: SweepEvent) -> None:
        if isinstance(event, TrialProgressed):
            self.load = event.progress
        try:
            self.on_event(event)
        except Exception:  # noqa: BLE001 (whatever a user's callback raises)
            _log.exception("on_event failed; the search goes on.")
