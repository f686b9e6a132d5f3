"""Logging results to MLflow."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.plots import labels_of
from kitty_nb.experiments.report import files_of, machine_of, report_of

if TYPE_CHECKING:
    from kitty_nb.experiments.analysis import Analysis
    from kitty_nb.experiments.combination import Combination


def log_to_mlflow(
    results: Analysis, experiment: str, tracking_uri: str | None, objective: str, title: str
) -> str:
    """Log a run with a nested run per combination, and return its ID; see `Results.to_mlflow`."""
    best, report = results.best(objective), report_of(results, objective, title)
    try:
        return _log(results, best, report, MlflowClient(tracking_uri), experiment, title)
    except MlflowException as error:
        raise ExperimentError(
            f"MLflow rejected the results: {error}. Check tracking_uri and MLFLOW_TRACKING_URI."
        ) from error


def _log(
    results: Analysis,
    best: Combination,
    report: str,
    client: MlflowClient,
    experiment: str,
    title: str,
) -> str:
    found = client.get_experiment_by_name(experiment)
    where = found.experiment_id if found else client.create_experiment(experiment)
    files, drawn = files_of(results), results.combinations
    parent: str = client.create_run(where, tags=_facts(results), run_name=title).info.run_id
    client.log_batch(parent, _metrics(best), _params(best))
    for one, label in zip(drawn, labels_of(drawn), strict=True):
        rows = tuple(row for row in results.rows if row.trial.combination == one.trial)
        tags = {
            **_facts(replace(results, rows=rows)),
            MLFLOW_PARENT_RUN_ID: parent,
            "best": str(one.trial == best.trial).lower(),
            "model_sha256": " ".join(file.sha256 for file in files[one.trial.model]),
            "notes": " ".join(one.reasons),
            "trials": str(one.done),
        }
        run = client.create_run(where, tags=tags, run_name=label).info.run_id
        client.log_batch(run, _metrics(one), _params(one))
        client.set_terminated(run, "FINISHED" if one.done else "FAILED")
    with TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        page.write_text(report, encoding="utf-8")
        client.log_artifact(parent, str(page))
    client.set_terminated(parent)
    return parent


def _facts(results: Analysis) -> dict[str, str]:
    """Return machines and engines as tags, joining those of the same name."""
    tags: dict[str, str] = {}
    for name, text in machine_of(results):
        tags[name] = f"{tags[name]}; {text}" if name in tags else text
    return tags


def _params(one: Combination) -> list[Param]:
    return [Param(name, str(value)) for name, value in one.trial.columns.items()]


def _metrics(one: Combination) -> list[Metric]:
    """Return the medians, with minimum `…_low` and maximum `…_high` of the repeats."""
    now = int(time.time() * 1000)
    return [
        Metric(name + end, value, now, 0)
        for name, spread in one.metrics.items()
        for end, value in (("", spread.median), ("_low", spread.low), ("_high", spread.high))
    ]
