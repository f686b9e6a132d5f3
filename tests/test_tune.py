from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import eventually
from test_sweep import servers

from kitty_nb import ServerConfig, write_demo_model
from kitty_nb.errors import ConfigError, ExperimentError
from kitty_nb.experiments import Outcome, Trial, TrialResult, TuneResult, measure, tune
from kitty_nb.experiments.measure import fingerprint_of
from kitty_nb.experiments.trial import (
    LoadSeconds,
    Measurement,
    OnProgress,
    RequestAnswered,
    RequestTimes,
    Speed,
    SweepEvent,
    TrialEnded,
    TrialStarted,
)
from kitty_nb.operation import Operation

WAIT = 180.0
SPACE = {"batch_size": [32, 64, 128, 256, 512, 1024], "threads": [1, 2]}

Search = Callable[..., Operation[TuneResult]]


def nearness(row: TrialResult) -> float:
    """A known optimum: the middle of the batch sizes, with one thread."""
    settings: dict[str, Any] = dict(row.trial.settings)
    return -abs(settings["batch_size"] - 128) - 10 * settings.get("threads", 1)


@pytest.fixture
def search(config: ServerConfig, tmp_path: Path) -> Search:
    """Searches that share a store."""
    base = config.replace(context_size=1024, parallel=None)

    def make(**more: object) -> Operation[TuneResult]:
        given = {
            "objective": nearness,
            "space": SPACE,
            "budget": 6,
            "prompts": "Hi!",
            "max_tokens": 4,
            "config": base,
            "busy_repeats": 0,
            "store": tmp_path / "tune.journal",
        }
        return tune(**(given | more))  # type: ignore[arg-type]

    return make


def test_it_finds_the_best_with_a_part_of_the_trials(search: Search) -> None:
    found = search(budget=10).wait(WAIT)
    assert found.value >= -74  # one step beside the best at most
    assert len(found.results.rows) <= 10 < len(SPACE["batch_size"]) * len(SPACE["threads"])
    assert f"LLAMACPP_PRIMARY_BATCH_SIZE={found.settings['batch_size']}" in found.env_lines()
    assert found.best.trial.label in found.summary
    assert len(found.study.trials) >= 1
    assert not servers()


def test_it_begins_with_the_settings_in_use(search: Search, config: ServerConfig) -> None:
    space = {"n_gpu_layers": [4, 3, 2, 1, 0], "batch_size": [64, 128, 2048]}
    found = search(space=space, config=config.replace(n_gpu_layers=0), budget=1).wait(WAIT)
    assert found.settings == {"n_gpu_layers": 0, "batch_size": 2048}


def test_a_measured_objective_is_compared_by_its_median(search: Search) -> None:
    found = search(objective="generation_tokens_per_second", budget=5).wait(WAIT)
    assert found.results.rows[-1].trial.repeat == 2  # the winner isn't the luck of one trial
    assert found.value > 0
    assert found.objective == "generation_tokens_per_second"
    assert {row.outcome for row in found.results.rows} <= {Outcome.DONE, Outcome.PRUNED}


def test_what_is_in_vain_is_said_first_and_what_is_too_close_at_the_end(
    config: ServerConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"MODELS_DIR": config.models_dir, "MODEL": config.model, "CONTEXT": 512}
    settings |= {"LOG_DIR": config.log_dir, "HISTORY": config.history, "CTX": 1024}
    lines = (f"LLAMACPP_{name}={value}\n" for name, value in settings.items() if value)
    (tmp_path / ".env").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    warned: list[list[str]] = []

    def note(event: SweepEvent) -> None:
        if isinstance(event, TrialStarted):
            warned.append([record.getMessage() for record in caplog.records])

    space = {"ubatch_size": [256, 1024]}
    found = tune(space=space, budget=2, max_tokens=4, on_event=note).wait(WAIT)
    told = "\n".join(warned[0])
    assert "LLAMACPP_CONTEXT is not a setting" in told
    assert "generation_tokens_per_second of one request at a time doesn't depend on batch" in told
    assert "too close to tell from 1 other" in found.summary
    assert found.env_lines().startswith("# Too close to tell from 1 other")
    assert "UBATCH_SIZE=" not in found.env_lines()  # 20 tokens are in no batch of 256
    assert found.best.config.ubatch_size is None


def test_constraints_on_settings_are_never_broken(search: Search) -> None:
    found = search(constraints={"batch_size>=": 256}, budget=5).wait(WAIT)
    tried = [dict(row.trial.settings)["batch_size"] for row in found.results.rows]
    assert min(tried) >= 256  # type: ignore[type-var]


def test_what_breaks_a_measured_constraint_does_not_win(search: Search) -> None:
    with pytest.raises(ExperimentError, match="memory_gib"):
        search(constraints={"memory_gib": 0.0001}, budget=2).wait(WAIT)


def test_the_same_search_goes_on_where_the_last_one_ended(search: Search) -> None:
    first = search(budget=3).wait(WAIT)
    started: list[SweepEvent] = []
    second = search(budget=5, on_event=started.append).wait(WAIT)
    assert sum(isinstance(event, TrialStarted) for event in started) == 2
    assert second.results.rows[:3] == first.results.rows
    assert second.value >= first.value


def test_rows_of_another_file_of_the_same_name_do_not_count(
    search: Search, config: ServerConfig, tmp_path: Path
) -> None:
    base = config.replace(models_dir=tmp_path, model=None)

    def started() -> int:
        events: list[SweepEvent] = []
        search(model="m.gguf", config=base, budget=2, on_event=events.append).wait(WAIT)
        return sum(isinstance(event, TrialStarted) for event in events)

    write_demo_model(tmp_path / "m.gguf", 2_000_000)
    assert (started(), started()) == (2, 0)
    write_demo_model(tmp_path / "m.gguf", 3_000_000)
    assert started() == 2


def test_each_trial_can_be_recorded(search: Search) -> None:
    search(budget=2).wait(WAIT)
    started: list[SweepEvent] = []
    found = search(budget=2, record=True, on_event=started.append).wait(WAIT)
    assert sum(isinstance(event, TrialStarted) for event in started) == 2
    for row in found.results.rows:
        assert row.record
        assert row.record.config.batch_size == dict(row.trial.settings)["batch_size"]
    assert search(budget=2).wait(WAIT).results.rows == found.results.rows


def test_cancelling_ends_the_server_and_keeps_the_rows(search: Search) -> None:
    ended: list[TrialEnded] = []

    def note(event: SweepEvent) -> None:
        if isinstance(event, TrialEnded):
            ended.append(event)

    operation = search(budget=100, space={"batch_size": (32, 1024)}, on_event=note)
    eventually(lambda: ended, within=60)
    operation.cancel()
    eventually(lambda: not servers(), within=30)
    kept = len(ended)
    more = search(budget=kept + 1, space={"batch_size": (32, 1024)}).wait(WAIT)
    assert len(more.results.rows) == kept + 1


def test_when_nothing_can_be_measured_it_says_why(search: Search) -> None:
    with pytest.raises(ExperimentError, match="larger context"):
        search(prompts="hello " * 3000, budget=2).wait(WAIT)


def test_a_trial_that_fails_unforeseen_is_a_row(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(trial: Trial, *_: object, **__: object) -> TrialResult:
        if dict(trial.settings)["batch_size"] == 64:
            raise RuntimeError("a bug")
        return TrialResult(trial, Outcome.DONE)

    monkeypatch.setattr(measure, "run_trial", run)
    found = search(space={"batch_size": [64, 128], "threads": 1}, budget=2).wait(WAIT)
    assert found.settings["batch_size"] == 128
    assert not found.left_out
    (bad,) = [row for row in found.results.rows if row.outcome is Outcome.FAILED]
    assert "RuntimeError('a bug')" in bad.reason


def test_what_failed_is_tried_again_by_the_next_call(
    search: Search, config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = fingerprint_of(str(config.model), config)
    outcome = Outcome.FAILED

    async def run(trial: Trial, *_: object, **__: object) -> TrialResult:
        ends = outcome if dict(trial.settings)["batch_size"] == 128 else Outcome.DONE
        speed = Speed(1, 1, 1.0, 0.1, None, None, 1.0)
        measured = Measurement(LoadSeconds(0.1, 0.1, 0.1), (speed,), 1)
        return TrialResult(trial, ends, measurement=measured, fingerprint=mark)

    monkeypatch.setattr(measure, "run_trial", run)
    given = {"space": {"batch_size": [32, 128], "threads": 1}, "budget": 2}
    assert search(**given).wait(WAIT).settings["batch_size"] == 32
    outcome = Outcome.DONE
    assert search(**given).wait(WAIT).settings["batch_size"] == 128
    found = search(**given, objective="total_tokens_per_second").wait(WAIT)  # no round to add
    assert "too close to tell from 1 other, measured once" in found.summary


def test_a_long_first_prompt_prunes_no_trial_that_reads_it_as_fast_as_others(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(trial: Trial, on_progress: OnProgress, **_: object) -> TrialResult:
        slow = 2.0 if dict(trial.settings)["batch_size"] == 1024 else 1.0
        times = [RequestTimes(0.0, slow * first, 9.0, 4, 100) for first in (4.0, 0.2, 0.2)]
        for done, one in enumerate(times, 1):
            on_progress(RequestAnswered(trial, done, 3, 1, None, one))
            await anyio.sleep(0)
        speed = Speed(1, 3, 1.0, slow * 0.2, None, None, 1.0, each=tuple(times))
        measured = Measurement(LoadSeconds(0.1, 0.1, 0.1), (speed,), 1)
        return TrialResult(trial, Outcome.DONE, measurement=measured)

    monkeypatch.setattr(measure, "run_trial", run)
    prompts = ["long " * 99, "short", "brief"]
    given = {"objective": "time_to_first_token", "prompts": prompts, "budget": 12}
    rows = search(**given, space=SPACE | {"threads": [1]}).wait(WAIT).results.rows
    ends = {dict(row.trial.settings)["batch_size"]: row.outcome for row in rows}
    assert ends == dict.fromkeys(SPACE["batch_size"], Outcome.DONE) | {1024: Outcome.PRUNED}


def test_trials_with_an_objective_of_nan_are_named(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(trial: Trial, *_: object, **__: object) -> TrialResult:
        return TrialResult(trial, Outcome.DONE)

    def unsure(row: TrialResult) -> float:
        return float("nan") if dict(row.trial.settings)["batch_size"] == 64 else 1.0

    monkeypatch.setattr(measure, "run_trial", run)
    space = {"batch_size": [64, 128], "threads": 1}
    found = search(objective=unsure, space=space, budget=2).wait(WAIT)
    assert "unsure is no finite number: nan for demo.gguf, batch_size 64, " in found.summary


def test_wrong_names_are_refused_before_the_first_trial(search: Search) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        search(space={"batch_sise": [1, 2]}).wait(WAIT)
    with pytest.raises((ConfigError, ExperimentError), match="generation_tokens_per_second"):
        search(objective="generation_token_per_second").wait(WAIT)
    with pytest.raises(ExperimentError, match="budget is 0"):
        search(budget=0).wait(WAIT)
