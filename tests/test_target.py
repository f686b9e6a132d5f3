from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from test_sweep import servers

from kitty_nb import ServerConfig, write_demo_model
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments import Outcome, Trial, TrialResult, TuneResult, Verdict, measure, tune
from kitty_nb.experiments.bounds import Constraint, read_bound
from kitty_nb.experiments.measure import fingerprint_of
from kitty_nb.experiments.proof import reached_in_reruns
from kitty_nb.experiments.target import family_of
from kitty_nb.experiments.trial import (
    LoadSeconds,
    Measurement,
    Speed,
    SweepEvent,
    TrialStarted,
)
from kitty_nb.operation import Operation

WAIT = 240.0
SPEED = "generation_tokens_per_second"
_QUANTIZABLE = 26_000_000  # bytes of a demo model whose rows are whole blocks of 32
TEXT = "Hello! I am the kitty_nb demo model, written on the spot without any training."

Search = Callable[..., Operation[TuneResult]]


def quantized(
    source: Path, path: Path, kind: gguf.GGMLQuantizationType, number: int, sure: float = 1.0
) -> None:
    """Write the same model with its matrices in fewer bits, and more `sure` of wrong tokens."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            kinds = field.types
            part = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kinds[0], part)
    writer.add_file_type(number)
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            factor = sure if tensor.name == "output.weight" else 1.0
            data = gguf.quants.quantize(tensor.data.astype(np.float32) * factor, kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def family(config: ServerConfig, tmp_path: Path) -> ServerConfig:
    """Settings for the largest of three quants of the demo model, one of them very lossy."""
    folder = tmp_path / "family"
    largest = write_demo_model(folder / "demo-f16.gguf", _QUANTIZABLE)
    quantized(largest, folder / "demo-q8_0.gguf", gguf.GGMLQuantizationType.Q8_0, 7)
    quantized(largest, folder / "demo-q4_0.gguf", gguf.GGMLQuantizationType.Q4_0, 2, 1.1)
    write_demo_model(tmp_path / "elsewhere.gguf")
    return config.replace(models_dir=folder, model=largest, context_size=512, parallel=None)


@pytest.fixture
def search(family: ServerConfig, tmp_path: Path) -> Search:
    def make(**more: object) -> Operation[TuneResult]:
        given = {
            "target": f"{SPEED} >= 1",
            "space": {"threads": [1]},
            "budget": 3,
            "prompts": "Hi!",
            "max_tokens": 8,
            "proof_rounds": 3,
            "busy_repeats": 0,
            "config": family,
            "store": tmp_path / "tune.journal",
        }
        return tune(**(given | more))  # type: ignore[arg-type]

    return make


def test_a_family_has_the_quants_of_one_model_on_disk(family: ServerConfig) -> None:
    models, largest = family_of(None, family)
    assert [path.name for path in models] == ["demo-f16.gguf", "demo-q4_0.gguf", "demo-q8_0.gguf"]
    assert largest.name == "demo-f16.gguf"
    models, largest = family_of("demo-q8_0.gguf", family)
    assert (models[0].name, largest.name) == ("demo-q8_0.gguf", "demo-f16.gguf")


@pytest.mark.parametrize(
    ("text", "name", "bound"),
    [
        (f"{SPEED} >= 30", "", Constraint(SPEED, ">=", 30)),
        ("time_to_first_token_p90<2.5", "", Constraint("time_to_first_token_p90", "<", 2.5)),
        ("<= 2 %", "quality_loss", Constraint("quality_loss", "<=", 0.02)),
        ("top_token_agreement >= 98 %", "", Constraint("top_token_agreement", ">=", 0.98)),
        ("quality >= 0.9", "", Constraint("quality", ">=", 0.9)),
        ("<= 20 GB", "memory_gib", Constraint("memory_gib", "<=", 20e9 / 2**30)),
        ("<= 512 MiB", "memory_gib", Constraint("memory_gib", "<=", 0.5)),
    ],
)
def test_bounds_are_read_as_people_write_them(text: str, name: str, bound: Constraint) -> None:
    found = read_bound(text, name)
    assert (found.name, found.sign, found.bound) == (
        bound.name,
        bound.sign,
        pytest.approx(bound.bound),
    )


@pytest.mark.parametrize("text", ["fast", "30", ">= 30", "speed >= many"])
def test_a_target_that_cannot_be_read_shows_one_that_can(text: str) -> None:
    with pytest.raises(ExperimentError, match="Write it like 'generation_tokens_per_second >= 30'"):
        read_bound(text)


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        (f"{SPEED} >= 30 GB", "", "takes no unit"),
        ("time_to_first_token <= 200 %", "", "takes no unit"),
        ("<= 20 %", "memory_gib", "takes GiB or GB"),
        ("<= 2", "quality_loss", "takes %"),
        ("<= 2 GB", "quality_loss", "takes %"),
        (">= 2 %", "quality_loss", "Write it like '<= 2 %'"),
        ("perplexity <= 3", "quality_loss", "Write it like '<= 2 %'"),
        (f"{SPEED} >= 2", "memory_gib", "Write it like '<= 20 GB'"),
    ],
)
def test_a_bound_on_something_else_is_refused(text: str, name: str, told: str) -> None:
    with pytest.raises(ExperimentError, match=told):
        read_bound(text, name)


def test_nineteen_of_twenty_reruns_reach_what_is_foretold() -> None:
    kept = []
    for seed in range(300):
        random = np.random.default_rng(seed)
        *measured, again = np.exp(random.normal(math.log(30), 0.05, 6))
        kept.append(again >= reached_in_reruns(measured, at_least=True))
        assert reached_in_reruns(measured, at_least=False) > np.mean(measured)
    assert 0.92 <= np.mean(kept) <= 0.98


@pytest.mark.slow
def test_the_cheapest_that_reaches_the_target_is_proved(search: Search) -> None:
    goal = {"quality_loss": "<= 100000 %", "memory": "<= 20 GB"}
    found = search(**goal).wait(WAIT)
    assert found.best.trial.model == "demo-q4_0.gguf"
    assert found.objective == "memory_gib"
    proof = found.proof
    assert proof
    assert (proof.rounds, proof.kept) == (3, 3)
    assert proof.reached >= 1
    assert proof.memory_in_use
    assert proof.memory_gib < proof.memory_in_use
    assert proof.quality_loss is not None
    assert proof.against_in_use
    assert proof.against_in_use.rounds == 3
    assert proof.against_in_use.verdict in Verdict
    assert proof.against_runner_up
    assert str(proof) in found.summary
    assert "less memory" in found.summary
    assert "LLAMACPP_PRIMARY_MODEL=demo-q4_0.gguf" in found.env_lines()
    assert {row.trial.model for row in found.results.rows} == {
        "demo-f16.gguf",
        "demo-q8_0.gguf",
        "demo-q4_0.gguf",
    }
    assert not servers()
    started: list[SweepEvent] = []
    again = search(**goal, on_event=started.append).wait(WAIT)
    assert not any(isinstance(event, TrialStarted) for event in started)
    assert again.proof == proof


@pytest.mark.slow
def test_a_quant_that_loses_too_much_is_not_chosen(search: Search) -> None:
    found = search(quality_loss="<= 1 %", text=TEXT).wait(WAIT)
    loss = {
        row.trial.model: row.measurement.perplexity
        for row in found.results.rows
        if row.measurement and row.outcome is Outcome.DONE
    }
    reference = loss["demo-f16.gguf"]
    kept = {name for name, value in loss.items() if value <= reference * 1.01}  # type: ignore[operator]
    assert kept == {"demo-f16.gguf", "demo-q8_0.gguf"}
    assert found.best.trial.model == "demo-q8_0.gguf"


@pytest.mark.slow
def test_it_says_so_when_nothing_is_gained(search: Search, family: ServerConfig) -> None:
    family = family.replace(model="demo-q4_0.gguf", threads=1)
    found = search(config=family).wait(WAIT)
    assert found.best.trial.model == "demo-q4_0.gguf"
    assert found.proof
    assert found.proof.gain == "There is no gain over the settings in use."
    assert found.proof.against_in_use is None


def measured(trial: Trial, rate: float = 30.0, gpu: int | None = 0) -> TrialResult:
    speed = Speed(1, 1, 1.0, 0.1, 100.0, rate, rate)
    size = 1 << (30 + int("f16" in trial.model))
    found = Measurement(LoadSeconds(0.1, 0.1, 0.1), (speed,), size, gpu, perplexity=2.0)
    return TrialResult(trial, Outcome.DONE, measurement=found)


def test_a_gpu_that_does_not_report_memory_does_not_spoil_the_proof(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(trial: Trial, *_: object, **__: object) -> TrialResult:
        return measured(trial, gpu=0 if trial.settings else None)

    monkeypatch.setattr(measure, "run_trial", run)
    found = search(space={"n_gpu_layers": [0]}).wait(WAIT)
    assert found.proof
    assert found.proof.memory_in_use is None
    assert found.proof.gain.endswith("The memory that the settings in use take is unknown.")


def test_what_reaches_the_target_with_unknown_memory_is_named(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(trial: Trial, *_: object, **__: object) -> TrialResult:
        on_gpu = dict(trial.settings).get("n_gpu_layers") == 4
        return measured(trial, *((90.0, None) if on_gpu else (30.0, 0)))

    monkeypatch.setattr(measure, "run_trial", run)
    with pytest.raises(ExperimentError, match=r"layers 4 satisfies .*memory_gib is .*\[gpu\]"):
        search(target=f"{SPEED} >= 60", space={"n_gpu_layers": [0, 4]}, budget=6).wait(WAIT)


def test_the_rounds_of_a_proof_are_measured_side_by_side(
    search: Search, family: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = 30.0
    rounds: list[int] = []

    async def run(trial: Trial, *_: object, **__: object) -> TrialResult:
        rounds.append(trial.repeat)
        return measured(trial, pace)

    monkeypatch.setattr(measure, "run_trial", run)
    config = family.replace(threads=2)
    first = search(config=config, budget=1).wait(WAIT)
    pace = 28.2  # a hot day
    second = search(config=config, budget=3).wait(WAIT)
    assert first.best.trial != second.best.trial
    assert second.proof
    assert second.proof.against_in_use
    assert second.proof.against_in_use.rounds == 3
    assert second.proof.against_in_use.verdict is Verdict.TOO_CLOSE
    assert f"{SPEED} too close to tell (" in second.proof.gain
    rounds.clear()
    assert search(config=config, budget=3).wait(WAIT).proof == second.proof
    assert not rounds


@pytest.mark.parametrize("failing", ["the reference", "a round of the proof"])
def test_what_failed_is_tried_again_by_the_next_call(
    search: Search, family: ServerConfig, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    mark = {one: fingerprint_of(str(one), family) for one in family.models_dir.iterdir()}
    enough = False

    async def run(trial: Trial, *_: object, **__: object) -> TrialResult:
        chosen = not trial.settings if failing == "the reference" else trial.repeat > 1
        row = measured(trial)
        if chosen and not enough:
            row = TrialResult(trial, Outcome.SKIPPED, "Not enough memory.")
        return replace(row, fingerprint=mark[family.models_dir / trial.model])

    monkeypatch.setattr(measure, "run_trial", run)
    with pytest.raises(ExperimentError, match="Not enough memory"):
        search(quality_loss="<= 2 %").wait(WAIT)
    enough = True
    assert search(quality_loss="<= 2 %").wait(WAIT).proof


def test_a_proof_that_fails_names_the_bound(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(trial: Trial, *_: object, **__: object) -> TrialResult:
        row = measured(trial, 30.0 + trial.repeat % 2)
        assert row.measurement
        more = trial.repeat >= 1000  # the proof
        return replace(row, measurement=replace(row.measurement, memory=1 << (30 + more)))

    monkeypatch.setattr(measure, "run_trial", run)
    said = r"(?s)3 of 3 combinations .*the proof.*:(\n- \S+, threads 1: memory_gib 2\n?){3}L"
    with pytest.raises(ExperimentError, match=said):
        search(memory="<= 1.5 GiB").wait(WAIT)


def test_what_cannot_be_reached_names_the_nearest(search: Search) -> None:
    with pytest.raises(ExperimentError, match="None of 3 combinations satisfies"):
        search(target=f"{SPEED} >= 1000000000").wait(WAIT)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"target": None, "memory": "<= 2 GB"}, "need a target"),
        ({"target": None, "text": "Hi!"}, "need a target"),
        ({"target": "speed >= 3"}, "No.* 'speed'|speed"),
        ({"objective": "memory_gib"}, "Leave objective out"),
        ({"quality_loss": "<= 2 %", "quality": len}, "measured by perplexity"),
        ({"quality_loss": "little"}, "<= 2 %"),
        ({"proof_rounds": 2}, "proof_rounds is 2"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"budget": 1.5}, "budget is 1.5"),
    ],
)
def test_a_goal_that_cannot_be_meant_is_refused(
    search: Search, more: dict[str, object], told: str
) -> None:
    with pytest.raises(ExperimentError, match=told):
        search(**more)
