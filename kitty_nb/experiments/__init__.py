"""Searches for the best settings, and repeatable runs.

Optuna, pandas and Matplotlib are imported by what needs them: a replay, or a worker that runs
trials, should not wait for them.
"""

from kitty_nb.experiments.bench import Bench, BenchTable
from kitty_nb.experiments.combination import Combination
from kitty_nb.experiments.comparison import ResultsComparison, compare_results
from kitty_nb.experiments.load_test import Load, LoadTest, load_test
from kitty_nb.experiments.quality import Divergence, ExactMatch, HarnessTask, Perplexity
from kitty_nb.experiments.recording import record_run, replay
from kitty_nb.experiments.regress import Regression, regress
from kitty_nb.experiments.results import Results
from kitty_nb.experiments.run_record import Comparison, Exchange, Request, RunRecord, compare
from kitty_nb.experiments.search_run import TuneResult
from kitty_nb.experiments.statistics import (
    Difference,
    Verdict,
    compare_paired,
    own_spread,
    proportion_interval,
)
from kitty_nb.experiments.suite import Suite, Task
from kitty_nb.experiments.sweep import Sweep, SweepProgress
from kitty_nb.experiments.trial import (
    Measurement,
    Outcome,
    RequestTimes,
    Trial,
    TrialResult,
    Workload,
)
from kitty_nb.experiments.tuning import tune

__all__ = [
    "Bench",
    "BenchTable",
    "Combination",
    "Comparison",
    "Difference",
    "Divergence",
    "ExactMatch",
    "Exchange",
    "HarnessTask",
    "Load",
    "LoadTest",
    "Measurement",
    "Outcome",
    "Perplexity",
    "Regression",
    "Request",
    "RequestTimes",
    "Results",
    "ResultsComparison",
    "RunRecord",
    "Suite",
    "Sweep",
    "SweepProgress",
    "Task",
    "Trial",
    "TrialResult",
    "TuneResult",
    "Verdict",
    "Workload",
    "compare",
    "compare_paired",
    "compare_results",
    "load_test",
    "own_spread",
    "proportion_interval",
    "record_run",
    "regress",
    "replay",
    "tune",
]
