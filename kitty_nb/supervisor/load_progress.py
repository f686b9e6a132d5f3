"""The progress of a load: measurements become a fraction and an ETA."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from kitty_nb.supervisor.events import LoadProgress, Stage
from kitty_nb.supervisor.process import AT_WORK, Usage


class Basis(StrEnum):
    """The basis of an estimate, the best first."""

    SAME_LOAD = "this model with these settings"
    SAME_MODEL = "this model"
    HOST = "this machine"
    NOTHING = "nothing yet"


@dataclass(frozen=True, slots=True)
class LoadEstimate:
    """The seconds that each stage of a load will take."""

    # What it is based on. With NOTHING, it is a rule of thumb that gives the bar its shape, but no
    # number to show.
    basis: Basis
    starting: float  # from its process to its first sign of loading
    loading: float  # until the last weight is loaded
    preparing: float  # until it is ready

    @property
    def total(self) -> float:
        """Seconds of all stages together."""
        return self.starting + self.loading + self.preparing


_STAGES = list(Stage)
# This share of the files counts as all bytes, because the engine skips what it does not need.
_COMPLETE = 0.985
_INSTANT = 1e-9  # seconds, so that nothing is divided by 0
_UNKNOWN = LoadEstimate(Basis.NOTHING, 0.0, 0.0, 0.0)
# Up to this share of them, bytes may be the engine's own, before it reads the first weight; and it
# reads the model's header up to so many times, with a large vocabulary for most of a small load.
_TRICKLE, _HEADERS = 0.005, 4
# The weight of the estimate's rate against the bytes seen so far, as a share of all bytes. The less
# the two agree, the lower it is, once more than the share below was expected.
_WORTH = {Basis.SAME_LOAD: 1.0, Basis.SAME_MODEL: 0.3, Basis.HOST: 0.15, Basis.NOTHING: 0.04}
_AGREED = 0.05
# A stage that takes as long as expected, or longer, is due to take this share of its time more.
_OVERDUE = {Basis.SAME_LOAD: 0.1, Basis.SAME_MODEL: 0.15, Basis.HOST: 0.2, Basis.NOTHING: 0.3}
# If nothing is known: before the first byte, the time left is so many times the time passed or, if
# bytes tell nothing, so many times its square root, with which the bar never stops; and preparing
# takes this share of the weights' time on top of the rule of thumb.
_BLIND, _BLIND_ROOT, _PREPARING = 6.0, 2.0, 0.05
# If nothing is known, bytes of a header per second: a vocabulary is read twice, and sorted.
_VOCABULARY = 7e6
# From this share of the bytes on, their rate alone gives an ETA.
_EARLIEST_ETA = 0.05
# Before READY, the bar should show no more than the first of these, and creeps up to the second.
_FULL, _HIGHEST = 0.98, 0.99
# It corrects half of its error while this share of the load passes, and if it has run ahead, it
# still moves at this share of its pace.
_HALVED, _SLOWEST = 0.02, 0.2
# A load that takes so many times as long as expected takes longer than usual.
_UNUSUAL = 1.1
# It moves in so many steps, of these seconds. Before the load begins they are short, because its
# bytes are counted from what the process has by then. Beyond the longest, it moves once a second,
# together with the health check.
_STEPS = 16
_SHORTEST, _STARTING, _LONGEST = 0.005, 0.02, 0.6
# CPU time is measured over so many seconds, because a single health check takes a burst of it.
_WORKING = 1.0
_UNSEEN = Usage(0, 0)  # what a process had before, if it was not measured then


@dataclass(slots=True)
class LoadMeter:
    """Folds measurements of one load into a fraction that only grows.

    The fraction is the time passed divided by the time passed and left. The time left is, for a
    future stage, the estimate; for the current stage, the estimate less the time it has taken; for
    the weights, the bytes left divided by a rate that is the estimate's at first and becomes the
    observed one as more of them are loaded. If both stages before it are slower than estimated, or
    both faster, as on a busy or an idle machine, preparing is assumed to be so too.

    Bytes are what the process has in memory or has read since it began to load, whichever is more,
    and at its peak: a GPU build's memory falls again once the weights are copied.
    """

    # Bytes of all files of the model; 0 if they tell nothing, so that only the clock counts.
    total: int = 0
    header: int = 0  # bytes of the files that are not weights
    expected: LoadEstimate = _UNKNOWN  # how long the stages should take
    stage: Stage = Stage.STARTING  # the stage reached
    moved_at: float = 0.0  # when it last showed a sign of life, in seconds after the start
    loaded: int = 0  # bytes seen to be loaded
    _began: dict[Stage, float] = field(default_factory=dict)
    _flowing: float | None = None
    _measured: float = 0.0
    _base: Usage = _UNSEEN
    _worked: tuple[float, float] = (0.0, 0.0)
    _fraction: float = 0.0
    _shown: float = 0.0
    _slack: float = math.inf  # the least by which the time left has exceeded the time passed

    def enter_stage(self, stage: Stage, elapsed: float) -> None:
        """Note that the load is in this stage, or past it, `elapsed` seconds after the start.

        A load reaches STARTING when there is a process.
        """
        if stage not in self._began and _STAGES.index(stage) >= _STAGES.index(self.stage):
            self.stage, self._began[stage], self.moved_at = stage, elapsed, elapsed

    def heartbeat(self, elapsed: float) -> None:
        """Note a sign of life: a new log line, a different answer."""
        self.moved_at = elapsed

    def measure(self, usage: Usage, elapsed: float) -> None:
        """Note the process's usage.

        The growth of its bytes since loading began counts as loaded; work is a sign of life.
        """
        if self.stage is Stage.STARTING:
            self._base = usage
        else:
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
        """Return how long a stage took, or has taken so far; 0 if it was not reached."""
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
        """Return how many seconds to wait before the next measurement."""
        whole = elapsed + self.left(elapsed)
        if self._guessing:
            whole = min(whole, elapsed * 2)
        pause = max(whole / _STEPS, _SHORTEST)
        if self.stage is Stage.STARTING:
            pause = min(pause, _STARTING)
        return pause if pause <= _LONGEST else 1.0 - elapsed % 1.0

    def progress(self, elapsed: float, lasting: float = 0.0) -> LoadProgress:
        """Return the load's progress `elapsed` seconds after the start.

        If it is shown for `lasting` seconds, the fraction is the one halfway through them.
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
        if self._guessing and not flows:
            return LoadProgress(self.stage, self._fraction, elapsed)
        self._slack = min(self._slack, left - elapsed)
        eta = max(self._slack + elapsed, 0.0)
        held_back = self._outlasts(elapsed) if self._guessing else left > eta * _UNUSUAL
        late = held_back or elapsed > self.expected.total * _UNUSUAL
        shown, overdue = None if held_back else eta, late and not self._guessing
        return LoadProgress(self.stage, self._fraction, elapsed, shown, overdue)

    @property
    def _guessing(self) -> bool:
        return self.expected.basis is Basis.NOTHING

    @property
    def _vocabulary(self) -> float:
        """The seconds until the first weight, which an earlier load would tell."""
        return self.header / _VOCABULARY if self._guessing else 0.0

    @property
    def _loading(self) -> float:
        return self.expected.loading + self._vocabulary

    def _flow_seconds(self) -> float:
        """Return the seconds for the bytes so far: at the known rate, else since the last look."""
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
        # The clock tells the rest of a load like earlier ones, the bytes that of a load at another
        # rate.
        foreseen = (max(expected - passed, 0.0) + expected * (1.0 - share)) / 2
        return (worth * foreseen + passed * (1.0 - share)) / (worth + share)

    def _preparing(self, loaded_at: float) -> float:
        """Return the seconds that preparing should take, if the last byte is loaded then."""
        loading_at = self._began.get(Stage.LOADING, loaded_at)
        starting, loading = self.seconds(Stage.STARTING, loaded_at), loaded_at - loading_at
        if self._guessing:
            return self.expected.preparing + loading * _PREPARING
        if loading_at == loaded_at:  # nothing is measured yet
            return self.expected.preparing
        slower = median(
            (1.0, _ratio(starting, self.expected.starting), _ratio(loading, self.expected.loading))
        )
        return self.expected.preparing * slower

    def _outlasts(self, elapsed: float) -> bool:
        """Return whether preparing takes longer than it should: the time left would only grow."""
        began = self._began.get(Stage.PREPARING, elapsed)
        return elapsed - began > self._preparing(began)

    def _rest(self, expected: float, elapsed: float) -> float:
        """Return the seconds left in the current stage, by the clock alone; never 0."""
        lasted = elapsed - self._began.get(self.stage, elapsed)
        overdue = max(lasted * _OVERDUE[self.expected.basis], lasted - expected)
        return max(expected - lasted, overdue)


def _ratio(seconds: float, expected: float) -> float:
    """Return a time as a multiple of the expected one; 1 if nothing was expected."""
    return seconds / expected if expected > 0 else 1.0
