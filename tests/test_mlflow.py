"""A sweep as runs of MLflow, read back from its store."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_results import row

from kitty_nb import ServerConfig
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments import Outcome, Results, Trial, TrialResult
from kitty_nb.isolated_server import this_host

pytestmark = pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow-skinny")
RATE = "generation_tokens_per_second"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's store
def test_a_sweep_is_a_run_with_one_for_each_combination(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # its thread lives on
    monkeypatch.chdir(tmp_path)
    from mlflow import MlflowClient  # noqa: PLC0415 - reads the environment

    quality = {"quality": 0.8, "intervals": {"quality": (0.6, 0.9)}}
    rows = (
        row(demo_model.name, 2, 1, 20.0, 4, **quality),
        row(demo_model.name, 2, 2, 22.0, 4, **quality),
        row(demo_model.name, 4, 1, 31.0, 6, **quality),
        TrialResult(Trial(demo_model.name, (("threads", 8),)), Outcome.SKIPPED, "too big"),
    )
    rows = tuple(replace(one, host=this_host(), engine="b1-abc") for one in rows)
    results = Results(ServerConfig(models_dir=demo_model.parent, model=demo_model), rows)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    results.to_mlflow("caches", tracking_uri=store, title="First")
    parent = results.to_mlflow("caches", tracking_uri=store, title="Second")

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("caches")
    run = client.get_run(parent)
    assert run.info.run_name == "Second"
    assert run.data.params["threads"] == "4"
    assert run.data.metrics[RATE] == 31
    page = Path(client.download_artifacts(parent, "report.html", str(tmp_path))).read_text()
    assert "<title>Second</title>" in page
    nested = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    by_threads = {one.data.params["threads"]: one for one in nested}
    assert set(by_threads) == {"2", "4", "8"}
    two, four, eight = (by_threads[threads] for threads in "248")
    assert two.data.params == {
        "model": demo_model.name,
        "threads": "2",
        "cache_type_k": "q8_0",
    }
    ends = [two.data.metrics[f"{RATE}{end}"] for end in ("_low", "", "_high")]
    assert ends == [20, 21, 22]
    assert [two.data.metrics[f"quality_ci_{end}"] for end in ("low", "high")] == [0.6, 0.9]
    assert two.data.tags["model_sha256"] == hashlib.sha256(demo_model.read_bytes()).hexdigest()
    assert two.data.tags["engine"] == "b1-abc"
    assert two.data.tags["machine"] == this_host()
    assert [one.data.tags["best"] for one in (two, four, eight)] == ["false", "true", "false"]
    assert (eight.info.status, eight.data.tags["notes"]) == ("FAILED", "too big")

    with pytest.raises(ExperimentError, match="MLflow rejected the results"):
        results.to_mlflow(tracking_uri="nonsense://here")
