"""`Results`: the results of a sweep, and the files they are written to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kitty_nb.experiments.analysis import Analysis
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.metrics import OBJECTIVE
from kitty_nb.experiments.output import write_file, write_parquet

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, repr=False)
class Results(Analysis):
    """An immutable snapshot of a sweep's results, to analyse or to write to files.

    Methods raise ExperimentError if a file can't be written or a library is missing.

    Attributes:
        config: The base settings.
        rows: The rows of finished trials, in order.
        workload: The requests of each trial, if known.
    """

    def __repr__(self) -> str:
        return f"Results({len(self.rows)} trials of {len(self.combinations)} combinations)"

    def _repr_html_(self) -> str:
        return str(self.frame.to_html())

    def to_parquet(self, path: str | Path, *, requests: bool = False) -> Path:
        """Write the trials, or the requests, as Parquet, and return the path.

        Columns of mixed types are written as text.
        """
        return write_parquet(self.requests if requests else self.frame, path)

    def report(
        self, path: str | Path, *, objective: str = OBJECTIVE, title: str = "Sweep of llama-server"
    ) -> Path:
        """Write the report, a self-contained HTML page without scripts, and return the path.

        It contains a table, verdicts, figures, machine, engine, the SHA-256 of the models on this
        machine, and the code to repeat the sweep.

        Args:
            path: The file to write.
            objective: The metric to compare by.
            title: The page's title.

        Raises:
            ExperimentError: Nothing was measured, or the metric is unknown.
        """
        extra("matplotlib")
        from kitty_nb.experiments.report import report_of  # noqa: PLC0415 (of an extra)

        return write_file(path, report_of(self, objective, title).encode())

    def to_csv(self, path: str | Path) -> Path:
        """Write the trials as CSV, and return the path."""
        return write_file(path, self.frame.to_csv(index=False).encode())

    def to_mlflow(
        self,
        experiment: str = "kitty_nb",
        *,
        tracking_uri: str | None = None,
        objective: str = OBJECTIVE,
        title: str = "Sweep of llama-server",
    ) -> str:
        """Log the results to MLflow, and return the run's ID.

        The run has the best combination's metrics and the report. Nested runs, one per combination,
        have its settings as parameters, the values of `summary` as metrics, and its machines,
        engine and model's SHA-256 as tags. Like the report, they reveal files and prompts.

        Args:
            experiment: The name of MLflow's experiment, which is created if missing.
            tracking_uri: The tracking server or store, such as `sqlite:///mlflow.db`; by default
                MLflow's own setting.
            objective: The metric to compare by.
            title: The name of the run and title of the report.

        Raises:
            ExperimentError: MLflow rejects the results, or there is no report of them.
        """
        extra("mlflow", "mlflow")
        extra("matplotlib")
        from kitty_nb.experiments.mlflow_log import log_to_mlflow  # noqa: PLC0415 (of an extra)

        return log_to_mlflow(self, experiment, tracking_uri, objective, title)
