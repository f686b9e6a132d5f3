"""The progress of a load: measured, estimated and recorded."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import anyio
from anyio.to_thread import run_sync

from kitty_nb.catalog.model_shape import read_layouts
from kitty_nb.errors import ModelFileError
from kitty_nb.supervisor.events import LoadProgress, Stage
from kitty_nb.supervisor.history import (
    Basis,
    LoadEstimate,
    LoadFacts,
    LoadHistory,
    LoadRecord,
    estimate_load,
    gather_facts,
    path_text,
    this_host,
)
from kitty_nb.supervisor.process import AT_WORK

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Engine
    from kitty_nb.supervisor.history import Outcome
    from kitty_nb.supervisor.process import Usage


_STAGES = list(Stage)
# All bytes are there when this share of the files is: the engine leaves out what it does not need.
_COMPLETE = 0.985
_INSTANT = 1e-9  # seconds, instead of none in a division
_UNKNOWN = LoadEstimate(Basis.NOTHING, 0.0, 0.0, 0.0)
# Up to this share of them, bytes may be the engine's own, before it reads the first weight; and it
# reads the model's header, with a large vocabulary for most of a small load, up to so many times.
_TRICKLE, _HEADERS = 0.005, 4
# What the estimate's rate is worth against the bytes seen so far, as a share of all bytes. It is
# worth less the less the two agree, once more than that share was to be there.
_WORTH = {Basis.SAME_LOAD: 1.0, Basis.SAME_MODEL: 0.3, Basis.HOST: 0.15, Basis.NOTHING: 0.04}
_AGREED = 0.05
# A stage that lasts as long as it should, or longer, goes on for this share of what it has lasted.
_OVERDUE = {Basis.SAME_LOAD: 0.1, Basis.SAME_MODEL: 0.15, Basis.HOST: 0.2, Basis.NOTHING: 0.3}
# Where nothing is known: before the first byte so many times what has passed is still to come, but
# where bytes tell nothing so many times its square root, which moves on for ever; and preparing
# takes this share of the weights' time on top of the rule of thumb.
_BLIND, _BLIND_ROOT, _PREPARING = 6.0, 2.0, 0.05
# Where nothing is known, bytes of a header a second: a vocabulary is read twice, and sorted.
_VOCABULARY = 7e6
# From this share of the bytes on, their rate alone gives an ETA.
_EARLIEST_ETA = 0.05
# Before ready, the bar is due to show no more than the first of these, and creeps on up to the
# second.
_FULL, _HIGHEST = 0.98, 0.99
# It corrects half of its error while this share of the load passes, and where it has run ahead
# still moves at this share of its pace.
_HALVED, _SLOWEST = 0.02, 0.2
# It moves in so many steps, of these seconds. Before the load begins they are short, because what
# the process has by then is what its bytes are counted from. From the longest on, it moves once a
# second, together with the health check.
_STEPS = 16
_SHORTEST, _STARTING, _LONGEST = 0.005, 0.02, 0.6
# Processor time is looked at over so many seconds: a single health check takes a burst of it.
_WORKING = 1.0


@dataclass(slots=True)
class LoadMeter:
    """Folds measurements of one load into a fraction that only grows.

    The fraction is the time passed over the time passed and left. What is left is, for a stage to
    come, what the estimate says; for the stage under way, that less what it has lasted; for the
    weights, the bytes left by a rate that is the estimate's at first and the observed one as more
    of them are there.

    Bytes are what the process has in memory or has read since it began to load, or what the server
    says itself, whichever is more and at its highest: a GPU build's memory falls again once the
    weights are copied.

    Attributes:
        total: Bytes of the model, all files; 0 where they tell nothing, and the clock alone does.
        header: Bytes of the files that are no weights.
        expected: How long the stages should take.
        stage: The stage reached.
        moved_at: When it last showed life, in seconds after the start.
        loaded: Bytes seen to come in.
    """

    total: int = 0
    header: int = 0
    expected: LoadEstimate = _UNKNOWN
    stage: Stage = Stage.STARTING
    moved_at: float = 0.0
    loaded: int = 0
    _began: dict[Stage, float] = field(default_factory=dict)
    _flowing: float | None = None
    _measured: float = 0.0
    _base: Usage | None = None
    _worked: tuple[float, float] = (0.0, 0.0)
    _fraction: float = 0.0
    _shown: float = 0.0

    def enter_stage(self, stage: Stage, elapsed: float) -> None:
        """Note that the load is in this stage, or past it, `elapsed` seconds after the start.

        Reaching STARTING is having a process.
        """
        if stage not in self._began and _STAGES.index(stage) >= _STAGES.index(self.stage):
            self.stage, self._began[stage], self.moved_at = stage, elapsed, elapsed

    def heartbeat(self, elapsed: float) -> None:
        """Note a sign of life: a new log line, another answer."""
        self.moved_at = elapsed

    def measure(self, usage: Usage, elapsed: float) -> None:
        """Note the process's usage.

        The rise of its bytes since loading began is what has been loaded; work is a sign of life.
        """
        if self.stage is Stage.STARTING:
            self._base = usage
        else:
            self._base = self._base or usage
            rise = max(usage.resident - self._base.resident, usage.read - self._base.read)
            self._see(rise, elapsed)
        self._measured = elapsed
        processor, since = self._worked
        if elapsed - since >= _WORKING:
            if usage.processor - processor > AT_WORK * (elapsed - since):
                self.moved_at = elapsed
            self._worked = usage.processor, elapsed

    def _see(self, loaded: int, elapsed: float) -> None:
        if loaded > self.loaded:
            self.loaded, self.moved_at = loaded, elapsed
        trickle = max(self.total * _TRICKLE, min(self.header * _HEADERS, self.total / 2))
        if self._flowing is None and self.loaded > trickle > 0:
            self._flowing = max(self._measured, elapsed - self._flow_seconds())
        if self.stage is Stage.LOADING and self.loaded >= self.total * _COMPLETE > 0:
            self.enter_stage(Stage.PREPARING, elapsed)

    def seconds(self, stage: Stage, elapsed: float) -> float:
        """Return how long a stage lasted, or has lasted so far; 0 when it was not reached."""
        if stage not in self._began:
            return 0.0
        later = _STAGES[_STAGES.index(stage) + 1 :]
        ends = [self._began[other] for other in later if other in self._began]
        return min(ends, default=elapsed) - self._began[stage]

    def left(self, elapsed: float) -> float:
        """Return how many seconds the load should still take."""
        match self.stage:
            case Stage.STARTING:
                left = self._rest(self.expected.starting, elapsed) + self._loading
            case Stage.LOADING:
                left = self._loading_left(elapsed)
            case Stage.PREPARING:
                return self._rest(self._preparing(self._began[Stage.PREPARING]), elapsed)
            case Stage.READY:
                return 0.0
        left += self._preparing(elapsed + left)
        if self._guessing and self._flowing is None:
            passed = max(elapsed - self._vocabulary, 0.0)
            blind = passed * _BLIND if self.total else math.sqrt(elapsed) * _BLIND_ROOT
            return max(left, blind)
        return left

    def pause(self, elapsed: float) -> float:
        """Return for how many seconds the load need not be looked at."""
        whole = elapsed + self.left(elapsed)
        if self._guessing:
            whole = min(whole, elapsed * 2)
        pause = max(whole / _STEPS, _SHORTEST)
        if self.stage is Stage.STARTING:
            pause = min(pause, _STARTING)
        return pause if pause <= _LONGEST else 1.0 - elapsed % 1.0

    def progress(self, elapsed: float, lasting: float = 0.0) -> LoadProgress:
        """Return where the load is, `elapsed` seconds after the start.

        Args:
            elapsed: Now.
            lasting: Seconds for which this will be shown; the fraction is that in their middle.
        """
        left = self.left(elapsed)
        if self.stage is Stage.READY:
            return LoadProgress(self.stage, 1.0, elapsed, left)
        middle, whole = elapsed + lasting / 2, max(elapsed + left, _INSTANT)
        passed = max(middle - self._shown, 0.0)
        self._shown += passed
        due = min(middle / whole, _FULL)
        step = (_HIGHEST - self._fraction) * passed / max(passed + whole - middle, passed, _INSTANT)
        ahead = self._fraction + step
        corrected = due + (ahead - due) * 0.5 ** (passed / whole / _HALVED)
        self._fraction = max(self._fraction + step * _SLOWEST, corrected)
        flows = self._flowing is not None and self.loaded > self.total * _EARLIEST_ETA > 0
        known = not self._guessing or flows
        return LoadProgress(self.stage, self._fraction, elapsed, left if known else None)

    @property
    def _guessing(self) -> bool:
        return self.expected.basis is Basis.NOTHING

    @property
    def _vocabulary(self) -> float:
        """The seconds until the first weight, which a load of the past would tell."""
        return self.header / _VOCABULARY if self._guessing else 0.0

    @property
    def _loading(self) -> float:
        return self.expected.loading + self._vocabulary

    def _flow_seconds(self) -> float:
        """How long the first bytes seen have come: at the known rate, else since the last look."""
        if self._guessing:
            return math.inf
        return self.expected.loading * min(self.loaded / max(self.total, 1), 1.0)

    def _loading_left(self, elapsed: float) -> float:
        expected = self.expected.loading
        if self._flowing is None or self.total == 0:
            return self._rest(self._loading, elapsed)
        share, passed = min(self.loaded / self.total, 1.0), elapsed - self._flowing
        due, seen = expected * (share + _AGREED), passed + expected * _AGREED
        agreement = min(due, seen) / max(due, seen, _INSTANT)
        worth = _WORTH[self.expected.basis] * agreement**4
        # Loads alike have the same rest by the clock, loads at another rate the same by the bytes.
        foreseen = (max(expected - passed, 0.0) + expected * (1.0 - share)) / 2
        return (worth * foreseen + passed * (1.0 - share)) / (worth + share)

    def _preparing(self, loaded_at: float) -> float:
        """How long preparing should take, if the last byte is there then."""
        expected = self.expected.preparing
        if self._guessing:
            expected += (loaded_at - self._began.get(Stage.LOADING, loaded_at)) * _PREPARING
        return expected

    def _rest(self, expected: float, elapsed: float) -> float:
        """The seconds left of the current stage, by the clock alone; never 0."""
        lasted = elapsed - self._began.get(self.stage, elapsed)
        overdue = max(lasted * _OVERDUE[self.expected.basis], lasted - expected)
        return max(expected - lasted, overdue)


# Bytes from which a model's rise in memory stands out from that of the engine itself.
_TELLING = 32 << 20


class LoadRecorder:
    """Tells a meter what to expect of a load, and records how it went.

    Args:
        config: What is to be started.
        meter: What measures the load.
        warn: Called with a sentence about what is wrong with the history.
        whole: Whether the load is watched from its beginning; only then its row is true.
    """

    def __init__(
        self, config: ServerConfig, meter: LoadMeter, warn: Callable[[str], None], *, whole: bool
    ) -> None:
        self._config, self._meter, self._whole = config, meter, whole
        self._history = LoadHistory(config.history, warn)
        self._engine: Engine | None = None
        self._facts: LoadFacts | None = None
        self._records: tuple[LoadRecord, ...] = ()
        self._active = 1.0

    async def forecast(self) -> None:
        """Look at the model's files and their past, and tell the meter what to expect."""
        model = self._config.model
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._recall)
            # Abandoned when cancelled: a network drive that hangs must not hold the supervisor.
            facts = await run_sync(gather_facts, self._config, abandon_on_cancel=True)
        self._facts = facts
        self._expect()
        if model and (self._meter.total or self._meter.expected.basis is Basis.NOTHING):
            header = await run_sync(_read_header, model, abandon_on_cancel=True)
            self._meter.header, self._active = header
            self._expect()

    async def _recall(self) -> None:
        self._records = await self._history.recall(this_host(), path_text(self._config.model))

    def set_engine(self, engine: Engine) -> None:
        """Note by which engine the model will be loaded, which changes what to expect."""
        self._engine = engine
        self._expect()

    def _expect(self) -> None:
        if self._facts is None:
            return
        if self._engine:
            kind, version = self._engine.kind.value, self._engine.version
            self._facts = replace(self._facts, engine=kind, version=version)
        self._meter.total = self._facts.size if self._facts.size >= _TELLING else 0
        self._meter.expected = estimate_load(self._records, self._facts, self._active)

    async def record(self, elapsed: float, outcome: Outcome) -> None:
        """Write the load's row, once, and let nothing stop that."""
        if self._facts is None or not self._whole:
            return
        self._whole = False
        meter = self._meter
        record = LoadRecord(
            **asdict(self._facts),
            starting=meter.seconds(Stage.STARTING, elapsed),
            loading=meter.seconds(Stage.LOADING, elapsed),
            preparing=meter.seconds(Stage.PREPARING, elapsed),
            loaded=meter.loaded,
            outcome=outcome.value,
            at=time.time(),
        )
        with anyio.CancelScope(shield=True):
            await self._history.add(record)


def _read_header(model: Path) -> tuple[int, float]:
    """The bytes before the weights, and the share of the weights that a token passes through.

    That is less than 1 for a mixture of experts; what all tokens share is left out of account.
    """
    try:
        layout = read_layouts(model)[0]
    except ModelFileError:
        return 0, 1.0
    header = layout.header
    used, count = (
        header.metadata.get(f"{header.architecture}.{key}")
        for key in ("expert_used_count", "expert_count")
    )
    share = used / count if isinstance(used, int) and isinstance(count, int) and count else 1.0
    return layout.data_at, share
