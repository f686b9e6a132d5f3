"""Searches for the best settings, and repeatable runs.

Names are imported when they are first used: a worker that runs trials should not wait for what
shows them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kitty_nb.experiments.replaying import Comparison, compare, replay
    from kitty_nb.experiments.results import Combination, Results
    from kitty_nb.experiments.run_record import Exchange, Request, RunRecord, record_run
    from kitty_nb.experiments.sweep import Sweep, SweepProgress
    from kitty_nb.experiments.trial import Measurement, Outcome, Trial, TrialResult
    from kitty_nb.experiments.tuning import TuneResult, tune
    from kitty_nb.experiments.workload import ExactMatch, Perplexity, Workload

_HOMES = {
    "replaying": ("Comparison", "compare", "replay"),
    "results": ("Combination", "Results"),
    "run_record": ("Exchange", "Request", "RunRecord", "record_run"),
    "sweep": ("Sweep", "SweepProgress"),
    "trial": ("Measurement", "Outcome", "Trial", "TrialResult"),
    "tuning": ("TuneResult", "tune"),
    "workload": ("ExactMatch", "Perplexity", "Workload"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Combination",
    "Comparison",
    "ExactMatch",
    "Exchange",
    "Measurement",
    "Outcome",
    "Perplexity",
    "Request",
    "Results",
    "RunRecord",
    "Sweep",
    "SweepProgress",
    "Trial",
    "TrialResult",
    "TuneResult",
    "Workload",
    "compare",
    "record_run",
    "replay",
    "tune",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
