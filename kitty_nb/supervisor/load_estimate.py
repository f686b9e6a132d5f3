"""How long a load will take, from loads of the past. Pure."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from math import log
from statistics import median
from typing import TYPE_CHECKING

from kitty_nb.engine.locate import EngineKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kitty_nb.supervisor.history import LoadRecord
    from kitty_nb.supervisor.load_facts import LoadFacts

_RECENT = 5  # loads whose median counts: a disk's mood changes, so does the machine
_SIMILAR = 0.1  # difference of cached shares
_COMPARABLE = 10  # as many times as large, or as small, a model may be to speak for another
# Where nothing is known, the bar needs a shape all the same. These make one, and no number to show.
_STARTING, _STARTING_PYTHON = 0.05, 0.12  # seconds, of a program and of the one inside a wheel
_COLD, _HOT = 2e9, 40e9  # bytes a second off a solid-state disk, and out of the page cache
_PREPARING = 0.02  # seconds, and those in which the processor passes once through all weights:
_WARM_UP = 2e9 * min(os.cpu_count() or 1, 8)  # bytes a second, as measured with dense f16 models


class Basis(StrEnum):
    """What an estimate rests on, the best first."""

    SAME_LOAD = "this model with these settings"
    SAME_MODEL = "this model"
    HOST = "this machine"
    NOTHING = "nothing yet"


@dataclass(frozen=True, slots=True)
class LoadEstimate:
    """The seconds that each stage of a load will take.

    Attributes:
        basis: What it rests on. With NOTHING it is a rule of thumb that gives the bar its shape,
            and no number to show.
        starting: From its process to its first sign of loading.
        loading: Until the last weight is there.
        preparing: Until it is ready.
    """

    basis: Basis
    starting: float
    loading: float
    preparing: float


def estimate_load(
    records: Sequence[LoadRecord], facts: LoadFacts, active: float = 1.0
) -> LoadEstimate:
    """Forecast a load from loads of the past that became ready, newest first.

    The best that there is: this very model by this engine with these settings; this model
    otherwise; else the bytes by this machine's rate. Cold and hot page caches are kept apart.

    Args:
        records: What happened.
        facts: What is to be loaded.
        active: Share of the weights that a token passes through: 1, but for mixtures of experts.
            It matters where nothing else is known.
    """
    same_model = [record for record in records if _model(record) == _model(facts)]
    same_load = [record for record in same_model if _way(record) == _way(facts)]
    on_host = sorted(
        (record for record in records if _comparable(record, facts)),
        key=lambda record: abs(log(record.size / facts.size)),
    )
    pools = ((Basis.SAME_LOAD, same_load), (Basis.SAME_MODEL, same_model), (Basis.HOST, on_host))
    for basis, pool in pools:
        pace = _pace(pool, facts.cached)
        if pace is not None:
            like = [record for record in pool if _similar(record.cached, facts.cached)] or pool
            return LoadEstimate(
                basis,
                _typical(record.starting for record in pool),
                pace * facts.size,
                _typical(record.preparing for record in like),
            )
    rest = same_load or same_model or on_host
    cached = facts.cached or 0.0
    starting = _STARTING_PYTHON if facts.engine == EngineKind.EMBEDDED else _STARTING
    warm_up = _PREPARING + active * facts.size / _WARM_UP
    return LoadEstimate(
        Basis.NOTHING,
        _typical(record.starting for record in rest) if rest else starting,
        facts.size * ((1 - cached) / _COLD + cached / _HOT),
        _typical(record.preparing for record in rest) if rest else warm_up,
    )


def _model(load: LoadFacts) -> tuple[object, ...]:
    return load.path, load.size, load.mtime_ns, load.digest, load.host


def _way(load: LoadFacts) -> tuple[object, ...]:
    return load.engine, load.version, load.settings


def _comparable(record: LoadRecord, facts: LoadFacts) -> bool:
    alike = (record.host, record.engine) == (facts.host, facts.engine) and record.loading > 0
    return alike and facts.size / _COMPARABLE < record.size < facts.size * _COMPARABLE


def _pace(records: Sequence[LoadRecord], cached: float | None) -> float | None:
    """Seconds a byte at this cached share; if need be between those of a cold and a hot cache."""
    like = [record for record in records if _similar(record.cached, cached)]
    if like:
        return _typical(record.loading / record.size for record in like)
    if cached is None or _similar(cached, 0.0) or _similar(cached, 1.0):
        return None
    cold, hot = _pace(records, 0.0), _pace(records, 1.0)
    return None if cold is None or hot is None else cold + (hot - cold) * cached


def _similar(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= _SIMILAR


def _typical(seconds: Iterable[float]) -> float:
    return median(islice(seconds, _RECENT))
