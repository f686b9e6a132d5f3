from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import anyio
import psutil
import pytest
from conftest import MARK, eventually
from model_files import write_model
from optuna.storages.journal import JournalFileOpenLock

from kitty_nb import ServerConfig, write_demo_model
from kitty_nb.errors import ConfigError, ExperimentError, ResultStoreError, WaitTimeoutError
from kitty_nb.experiments import (
    Divergence,
    ExactMatch,
    Outcome,
    Perplexity,
    Sweep,
    Trial,
    TrialResult,
    replay,
)
from kitty_nb.experiments.measure import fingerprint_of, run_trial, this_machine
from kitty_nb.experiments.store import RowStore
from kitty_nb.experiments.sweep import seconds_left
from kitty_nb.experiments.trial import (
    Execute,
    OnProgress,
    RequestAnswered,
    StoreFailed,
    SweepEnded,
    SweepEvent,
    SweepPaused,
    SweepResumed,
    TrialEnded,
    TrialProgressed,
    TrialSeconds,
    TrialStarted,
    Workload,
)
from kitty_nb.isolated_server import this_host

WAIT = 120.0
MODEL = "demo.gguf"
PROMPT = "Who are you?"
NO_ONE = "No such demo."


@pytest.fixture
def base(config: ServerConfig) -> ServerConfig:
    return config.replace(context_size=1024, parallel=None)


@pytest.fixture
def sweep(base: ServerConfig, tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    """Makes sweeps that share a store, and ends them."""
    made: list[Sweep] = []

    def make(**more: object) -> Sweep:
        given = {"config": base, "store": tmp_path / "sweep.journal"}
        given |= {"prompts": "Hi!", "max_tokens": 2, "repeats": 1, "busy_repeats": 0}
        made.append(Sweep(**(given | more)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def servers() -> list[psutil.Process]:
    """The engines of trials that run, of this test run alone."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        words, environ = process.info["cmdline"] or [], process.info["environ"] or {}
        trial = any(word.startswith("trial_") for word in words) and "--model" in words
        ours = environ.get(MARK) == os.environ[MARK]
        if trial and ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def heard(sweep: Sweep) -> list[SweepEvent]:
    events: list[SweepEvent] = []
    sweep.subscribe(events.append)
    return events


def test_two_by_two(sweep: Callable[..., Sweep], base: ServerConfig) -> None:
    grid = {"threads": [1, 2], "cache_type_k": ["f16", "q8_0"]}
    asked = {"prompts": [PROMPT, "And then?"], "max_tokens": 8, "parallel": (1, 4)}
    one = sweep(grid=grid, repeats=2, **asked)
    events = heard(one)
    operation = one.run()
    results = operation.wait(WAIT)
    assert operation.done
    assert [row.reason for row in results.rows] == [""] * 8
    assert [row.outcome for row in results.rows] == [Outcome.DONE] * 8
    assert [row.trial for row in results.rows] == list(one.trials)
    assert [row.trial.repeat for row in results.rows] == [1] * 4 + [2] * 4
    for row in results.rows:
        measured = row.measurement
        assert measured
        assert measured.load.total == pytest.approx(row.seconds.load)
        assert [(speed.parallel, speed.requests) for speed in measured.speeds] == [(1, 2), (4, 4)]
        for speed in measured.speeds:
            assert 0 < speed.time_to_first_token < speed.seconds
            assert (speed.prompt_tokens_per_second or 0) > 0
            assert (speed.generation_tokens_per_second or 0) > 0
            assert speed.total_tokens_per_second * speed.seconds == pytest.approx(
                speed.requests * 8
            )
        assert 5_000_000 < measured.speeds[0].memory <= measured.speeds[1].memory
        assert measured.memory == measured.speeds[1].memory
        assert measured.context == 1024
        assert len(measured.answers) == 2
        assert measured.answers[0].strip().startswith("Hello!")
        assert 0 < row.seconds.own < row.seconds.overall
        assert row.engine
        assert row.host
    kinds = [type(event) for event in events]
    assert kinds.count(TrialStarted) == kinds.count(TrialEnded) == 8
    assert kinds.count(RequestAnswered) == 8 * 6
    assert TrialProgressed in kinds
    assert events[-1] == SweepEnded(complete=True)
    assert (one.progress.done, one.progress.total, one.progress.eta) == (8, 8, 0)
    assert results.best().done == 2
    for one in results.combinations:
        assert one.value("memory_gib_1") <= one.value("memory_gib_4") <= one.value("memory_gib")
    # Nothing of the user's own profile is touched; only the history of loads is shared.
    assert not base.log_dir.exists()
    assert base.history.exists()
    assert not servers()


def test_a_sweep_made_again_repeats_nothing_and_may_grow(sweep: Callable[..., Sweep]) -> None:
    first = sweep(grid={"threads": [1]}).run().wait(WAIT)
    again = sweep(grid={"threads": [1]})
    assert (again.progress.done, again.progress.eta) == (1, 0)  # before it is run
    assert again.results.rows == first.rows
    events = heard(again)
    assert again.run().wait(WAIT).rows == first.rows
    assert events == [SweepEnded(complete=True)]
    grown = sweep(grid={"threads": [1, 2]}, repeats=2)
    events = heard(grown)
    rows = grown.run().wait(WAIT).rows
    assert rows[0] == first.rows[0]
    assert len(rows) == 4
    assert sum(isinstance(event, TrialStarted) for event in events) == 3
    other = sweep(grid={"threads": [1]}, max_tokens=9)
    assert not other.results.rows


def test_rows_of_another_file_of_the_same_name_are_not_taken(
    sweep: Callable[..., Sweep], base: ServerConfig, tmp_path: Path
) -> None:
    def of(folder: str, size: int = 0) -> Sweep:
        if size:
            write_demo_model(tmp_path / folder / "model.gguf", size)
        config = base.replace(models_dir=tmp_path / folder, model=None)
        return sweep(models=["model.gguf"], config=config)

    (row,) = of("one", 2_000_000).run().wait(WAIT).rows
    assert row.outcome is Outcome.DONE, row.reason
    assert of("one").results.rows == (row,)
    (tmp_path / "one").rename(tmp_path / "moved")
    assert of("moved").results.rows == (row,)
    assert of("other", 3_000_000).progress.done == 0
    path = tmp_path / "moved" / "model.gguf"
    before = path.read_bytes()
    with path.open("rb+") as file:  # a fine-tune changes some matrices, but no header
        file.seek(1_000_000)
        file.write(b"x" * 100_000)
    assert of("moved").progress.done == 0
    path.write_bytes(before)
    one = of("moved")
    assert one.progress.done == 1
    of("moved", 4_000_000)
    (now,) = one.run().wait(WAIT).rows
    assert now.at > row.at


def test_rows_of_another_reference_of_the_same_name_are_not_taken(
    sweep: Callable[..., Sweep], base: ServerConfig, tmp_path: Path
) -> None:
    model, reference = (write_demo_model(tmp_path / f"{name}.gguf") for name in "mr")
    config = base.replace(models_dir=tmp_path, model=model)
    given = {"config": config, "quality": Divergence(reference.name, {"Hi!": "Hello!"})}
    sweep(**given).run(no_server()).wait(WAIT)
    assert sweep(**given).progress.done == 1
    write_demo_model(reference, 3_000_000)
    assert sweep(**given).progress.done == 0


def test_rows_that_do_not_say_which_file_it_was_count(sweep: Callable[..., Sweep]) -> None:
    one = sweep()
    one.run(no_server()).wait(WAIT)
    one.store.write_text(re.sub(r',"fingerprint":(null|{.*?})', "", one.store.read_text()))
    assert "fingerprint" not in one.store.read_text()
    assert sweep().progress.done == 1


def test_results_of_another_engine_are_told_when_more_are_added(
    sweep: Callable[..., Sweep], caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def earlier() -> AsyncIterator[Execute]:
        async def execute(trial: Trial, on_progress: OnProgress) -> TrialResult:
            return TrialResult(trial, Outcome.DONE, host=this_host(), engine="b1234")

        yield execute

    sweep(grid={"threads": [1]}).run(earlier()).wait(WAIT)
    sweep(grid={"threads": [1]}).run(no_server()).wait(WAIT)
    assert "b1234" not in caplog.text  # nothing is added
    one = sweep(grid={"threads": [1, 2]})
    one.run(no_server()).wait(WAIT)
    assert f"{one.store} has results of engine b1234, and this machine has" in caplog.text
    assert "name another store" in caplog.text


def test_failures_in_a_folder_that_was_wrong_do_not_count_in_the_right_one(
    sweep: Callable[..., Sweep], base: ServerConfig, tmp_path: Path
) -> None:
    def of(folder: str) -> Sweep:
        return sweep(
            models=["m.gguf"], config=base.replace(models_dir=tmp_path / folder, model=None)
        )

    here = of("wrong").run(this_machine(of("wrong").config, Workload(), tmp_path))
    (failed,) = here.wait(WAIT).rows
    assert "wrong" in failed.reason
    assert of("wrong").progress.done == 1
    write_demo_model(tmp_path / "right" / "m.gguf")
    assert of("right").progress.done == 0
    (row,) = of("right").run().wait(WAIT).rows
    assert row.outcome is Outcome.DONE, row.reason


def test_every_model_that_is_not_here_is_told_before_the_first_trial(
    sweep: Callable[..., Sweep], base: ServerConfig
) -> None:
    one = sweep(models=[base.model, "misstyped.gguf", "gone.gguf"])
    events = heard(one)
    with pytest.raises(ConfigError) as caught:
        one.run().wait(WAIT)
    assert [problem.value for problem in caught.value.problems] == ["misstyped.gguf", "gone.gguf"]
    assert not any(isinstance(event, TrialStarted) for event in events)


def test_what_is_to_be_tried_again_is_not_done_until_it_was(
    sweep: Callable[..., Sweep], base: ServerConfig
) -> None:
    mark = fingerprint_of(str(base.model), base)

    @asynccontextmanager
    async def failing() -> AsyncIterator[Execute]:
        async def execute(trial: Trial, on_progress: OnProgress) -> TrialResult:
            return TrialResult(trial, Outcome.FAILED, "a crash", fingerprint=mark)

        yield execute

    @asynccontextmanager
    async def lost() -> AsyncIterator[Execute]:
        async def execute(trial: Trial, on_progress: OnProgress) -> TrialResult:
            raise ExperimentError("The cluster is lost.")

        yield execute

    grid = {"threads": [1, 2]}
    sweep(grid=grid).run(failing()).wait(WAIT)
    assert sweep(grid=grid).progress.done == 2
    with pytest.raises(ExperimentError, match="lost"):
        sweep(grid=grid).run(lost(), retry=True).wait(WAIT)
    assert sweep(grid=grid).progress.done == 0


def test_what_the_environment_says_in_vain_is_told(
    tmp_path: Path,
    demo_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = f"LLAMACPP_MODELS_DIR={demo_model.parent}\nLLAMACPP_PRIMARY_MODEL={demo_model.name}\n"
    (tmp_path / ".env").write_text(lines)
    monkeypatch.setenv("LLAMACPP_THREADS", "3")
    with Sweep(repeats=1) as one:
        assert "LLAMACPP_THREADS" in " ".join(one.warnings)
        one.run(no_server()).wait(WAIT)
    assert "LLAMACPP_THREADS" in caplog.text
    with Sweep(repeats=1, config=ServerConfig.from_env()) as one:
        assert not one.warnings


def test_names_in_another_order_are_the_same_combinations(sweep: Callable[..., Sweep]) -> None:
    grid: dict[str, list[object]] = {"threads": [1], "batch_size": [64, 128]}
    sweep(grid=grid).run().wait(WAIT)
    one = sweep(grid=dict(reversed(grid.items())), repeats=2)
    results = one.run().wait(WAIT)
    assert [combination.done for combination in results.combinations] == [2, 2]
    assert {row.trial for row in results.rows} == set(one.trials)


def test_it_can_be_run_again_as_soon_as_it_has_ended(sweep: Callable[..., Sweep]) -> None:
    one = sweep(models=["gone.gguf"])
    for _ in range(20):
        (row,) = one.run(no_server(), retry=True).wait(WAIT).rows
        assert row.outcome is Outcome.DONE


_KILLED = """
import sys
from kitty_nb import ServerConfig
from kitty_nb.experiments import Sweep
given = {"config": ServerConfig.model_validate_json(sys.argv[1]), "store": sys.argv[2]}
given |= {"grid": {"threads": [1, 2]}, "repeats": 2, "prompts": "Hi!", "max_tokens": 2}
with Sweep(**given) as sweep:
    sweep.subscribe(lambda event: print(type(event).__name__, flush=True))
    sweep.run().wait()
"""


def test_a_killed_sweep_goes_on_where_it_was(
    sweep: Callable[..., Sweep], base: ServerConfig
) -> None:
    one = sweep(grid={"threads": [1, 2]}, repeats=2)
    command = [sys.executable, "-c", _KILLED, base.model_dump_json(), str(one.store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        assert any(line == "TrialEnded\n" for line in program.stdout)
        eventually(servers, within=WAIT)
        program.kill()
    eventually(lambda: not servers(), within=30, why="the killed sweep's server lives on")
    before = one.results.rows
    assert 1 <= len(before) < 4
    events = heard(one)
    rows = one.run().wait(WAIT).rows
    assert rows[: len(before)] == before
    assert [row.trial for row in rows] == list(one.trials)
    started = [event.trial for event in events if isinstance(event, TrialStarted)]
    assert not {row.trial for row in before} & set(started)
    assert {row.outcome for row in rows} == {Outcome.DONE}


def test_cancel_stops_the_server_and_keeps_what_is_done(sweep: Callable[..., Sweep]) -> None:
    one = sweep(grid={"threads": [1, 2]}, repeats=2)
    ended = threading.Event()
    one.subscribe(lambda event: ended.set() if isinstance(event, TrialEnded) else None)
    operation = one.run()
    assert ended.wait(WAIT)
    with pytest.raises(ExperimentError, match="running"):
        one.run()
    one.cancel()
    results = operation.wait(WAIT)
    assert 1 <= len(results.rows) < 4
    assert not servers()
    assert len(one.run().wait(WAIT).rows) == 4


def test_a_cancelled_operation_ends_the_run_too(sweep: Callable[..., Sweep]) -> None:
    one = sweep(repeats=4)
    events = heard(one)
    operation = one.run()
    eventually(lambda: any(isinstance(event, TrialProgressed) for event in events), within=WAIT)
    operation.cancel()
    eventually(lambda: events[-1:] == [SweepEnded(complete=False)], within=30)
    assert not one.running
    assert not servers()


def test_a_paused_sweep_ends_its_trial_and_waits(sweep: Callable[..., Sweep]) -> None:
    one = sweep(repeats=3)
    events = heard(one)

    def pause_once(event: SweepEvent) -> None:
        if isinstance(event, RequestAnswered) and SweepPaused() not in events:
            one.pause()

    one.subscribe(pause_once)
    operation = one.run()
    eventually(lambda: any(isinstance(event, TrialEnded) for event in events), within=WAIT)
    assert one.progress.paused
    assert one.progress.running == ()
    assert one.progress.eta is not None
    assert one.progress.eta > 0
    assert sum(isinstance(event, TrialStarted) for event in events) == 1
    assert not operation.done
    one.resume()
    assert len(operation.wait(WAIT).rows) == 3
    assert SweepResumed() in events


@asynccontextmanager
async def no_server(seconds: float = 0.0) -> AsyncIterator[Execute]:
    """Runs trials that take no server, only their time."""

    async def execute(trial: Trial, on_progress: OnProgress) -> TrialResult:
        await anyio.sleep(seconds)
        return TrialResult(trial, Outcome.DONE)

    yield execute


def test_a_sweep_can_be_cancelled_as_soon_as_it_is_told_to_run(
    sweep: Callable[..., Sweep],
) -> None:
    one = sweep(repeats=100)
    for _ in range(10):
        operation = one.run(no_server(WAIT))
        assert one.running
        one.cancel()
        assert not operation.wait(WAIT / 2).rows
    with one:
        one.run(no_server(WAIT))
    assert not one.running


def test_a_paused_sweep_can_be_cancelled_run_again_and_resumed(
    sweep: Callable[..., Sweep],
) -> None:
    one = sweep(repeats=2)
    one.subscribe(lambda event: one.pause() if isinstance(event, TrialStarted) else None)
    operation = one.run(no_server())
    eventually(lambda: len(one.results) == 1, within=WAIT)
    with pytest.raises(WaitTimeoutError):  # the second trial waits
        operation.wait(0.1)
    one.cancel()
    assert len(operation.wait(WAIT).rows) == 1
    operation = one.run(no_server())
    assert one.progress.paused
    with pytest.raises(WaitTimeoutError):
        operation.wait(0.1)
    one.resume()
    assert len(operation.wait(WAIT).rows) == 2


def test_a_server_that_dies_is_a_row(sweep: Callable[..., Sweep]) -> None:
    one = sweep(repeats=2, prompts=[PROMPT] * 3)

    def kill_first(event: SweepEvent) -> None:
        if isinstance(event, RequestAnswered) and event.trial.repeat == 1:
            for server in servers():
                server.send_signal(signal.SIGKILL)

    one.subscribe(kill_first)
    dead, alive = one.run().wait(WAIT).rows
    assert dead.outcome is Outcome.FAILED
    assert "SIGKILL" in dead.reason
    assert dead.measurement is None
    assert alive.outcome is Outcome.DONE


def test_a_server_that_never_gets_ready_is_a_row_with_its_diagnosis(
    misbehaving: Callable[..., ServerConfig], tmp_path: Path
) -> None:
    config = misbehaving("--never-ready", "--exit-after", "0.1", "--exit-code", "5")
    store = tmp_path / "sweep.journal"
    with Sweep(config=config, store=store, repeats=1, logs=tmp_path / "trials") as one:
        (row,) = one.run().wait(WAIT).rows
        assert row.outcome is Outcome.FAILED
        assert "exit code 5" in row.reason
        assert list((tmp_path / "trials").glob("trial_*.log"))
        events = heard(one)
        one.run(retry=True).wait(WAIT)
        assert sum(isinstance(event, TrialStarted) for event in events) == 1


def test_a_model_that_no_formula_knows_is_tried(
    misbehaving: Callable[..., ServerConfig], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "odd.gguf", context_length=None)
    config = misbehaving("--never-ready", "--exit-after", "0.1", model=model)
    with Sweep(config=config, store=tmp_path / "sweep.journal", repeats=1) as one:
        (row,) = one.run().wait(WAIT).rows
    assert "exit code" in row.reason


def test_a_model_that_goes_away_is_a_row(
    sweep: Callable[..., Sweep], base: ServerConfig, tmp_path: Path
) -> None:
    assert base.model
    copy = Path(shutil.copy(base.model, tmp_path / "copy.gguf"))
    one = sweep(models=[base.model, copy], repeats=2)

    def take_away(event: SweepEvent) -> None:
        if isinstance(event, TrialEnded) and event.result.trial.repeat == 1:
            copy.unlink(missing_ok=True)

    one.subscribe(take_away)
    rows = one.run().wait(WAIT).rows
    assert len(rows) == 4
    for row in rows:
        gone = row.trial.model == str(copy) and row.trial.repeat > 1
        if row.trial.repeat > 1:
            assert row.outcome is (Outcome.FAILED if gone else Outcome.DONE)
        if gone:
            assert "no such file" in row.reason.lower()


def test_a_prompt_longer_than_the_context_is_a_row(sweep: Callable[..., Sweep]) -> None:
    one = sweep(grid={"context_size": [256, 1024]}, prompts=["word " * 100], seed=1)
    rows = {dict(row.trial.settings)["context_size"]: row for row in one.run().wait(WAIT).rows}
    assert rows[1024].outcome is Outcome.DONE
    assert rows[256].outcome is Outcome.FAILED
    assert "longer than the context" in rows[256].reason
    assert "256 tokens" in rows[256].reason


@pytest.mark.parametrize(
    ("more", "finish"),
    [({}, "length"), ({"max_tokens": 64, "quality": ExactMatch({PROMPT: ""})}, "stop")],
)
def test_a_trial_can_be_recorded_and_replayed(
    sweep: Callable[..., Sweep], base: ServerConfig, more: dict[str, object], finish: str
) -> None:
    given = {"grid": {"batch_size": [64]}, "prompts": [PROMPT], **more}
    (row,) = sweep(**given, record=True).run().wait(WAIT).rows
    record = row.record
    assert record
    assert record.config.batch_size == 64
    assert [one.finish_reason for one in record.exchanges] == [finish]
    assert record.outputs == row.measurement.answers  # type: ignore[union-attr]
    assert len(record.model.shards[0].sha256) == 64
    assert sweep(**given).results.rows[0].record == record
    assert "api_key" not in row.document
    again = replay(record, config=base).wait(WAIT)
    assert again.same_outputs, str(again)
    assert not again.differences, str(again)


def test_what_was_measured_without_a_record_is_measured_again_for_one(
    sweep: Callable[..., Sweep], demo_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(demo_model.read_bytes()[:200_000])
    without = sweep(repeats=2, models=[MODEL, broken]).run().wait(WAIT)
    assert [row.record for row in without.rows] == [None] * 4
    one = sweep(repeats=2, models=[MODEL, broken], record=True)
    assert [row.outcome for row in one.results.rows] == [Outcome.FAILED] * 2
    rows = one.run().wait(WAIT).rows
    assert [bool(row.record) for row in rows] == [row.outcome is Outcome.DONE for row in rows]
    assert sweep(repeats=2, models=[MODEL, broken]).results.rows == rows


def test_more_requests_than_slots_are_called_a_queue(sweep: Callable[..., Sweep]) -> None:
    one = sweep(grid={"parallel": [2, 3]}, parallel=(1, 3), prompts=PROMPT)
    rows = {dict(row.trial.settings)["parallel"]: row for row in one.run().wait(WAIT).rows}
    assert rows[2].outcome is rows[3].outcome is Outcome.DONE
    assert "3 requests at once waited for the server's 2 slots" in rows[2].reason
    assert not rows[3].reason
    measured = rows[3].measurement
    assert measured
    assert measured.slots == 3
    assert 0 <= (measured.machine_load or 0) <= 1


def test_answers_too_long_together_are_a_row(sweep: Callable[..., Sweep]) -> None:
    one = sweep(grid={"context_size": [1024]}, max_tokens=900, parallel=8)
    (row,) = one.run().wait(WAIT).rows
    assert row.outcome is Outcome.FAILED
    assert "larger context (LLAMACPP_CTX)" in row.reason


def test_what_will_not_fit_is_skipped_with_the_reason(sweep: Callable[..., Sweep]) -> None:
    one = sweep(grid={"context_size": [1024, 2_000_000_000]})
    rows = {dict(row.trial.settings)["context_size"]: row for row in one.run().wait(WAIT).rows}
    assert rows[1024].outcome is Outcome.DONE
    skipped = rows[2_000_000_000]
    assert skipped.outcome is Outcome.SKIPPED
    assert skipped.reason.startswith("Not enough memory: needs ")
    assert "GB of RAM" in skipped.reason
    assert skipped.seconds.load == 0


def test_a_flag_that_the_engine_lacks_is_refused_before_the_first_trial(
    sweep: Callable[..., Sweep],
) -> None:
    one = sweep(grid={"cache_typ_k": ["f16"]})
    events = heard(one)
    with pytest.raises(ConfigError, match="cache_type_k"):
        one.run().wait(WAIT)
    (ended,) = events
    assert isinstance(ended, SweepEnded)
    assert not ended.complete
    assert "Did you mean cache_type_k?" in ended.problem


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": ["", "a"]}, "empty"),
        ({"max_tokens": 1}, "from 2 to"),
        ({"parallel": (0, 1)}, "from 1 to"),
        ({"repeats": 0}, "repeats is 0"),
        ({"quality": "exact"}, "ExactMatch.* or a function"),
        ({"quality": ExactMatch({"Who?": "I"})}, "ExactMatch lacks this prompt"),
        ({"quality": Perplexity({"Who?": "I"})}, "text for none of the prompts"),
    ],
)
def test_what_cannot_be_run_is_refused(
    sweep: Callable[..., Sweep], more: dict[str, object], told: str
) -> None:
    with pytest.raises((ConfigError, ExperimentError), match=told):
        sweep(**more)


def test_quality_is_a_mean_over_the_answers(sweep: Callable[..., Sweep]) -> None:
    answer = sweep(prompts=PROMPT, max_tokens=64, quality=ExactMatch({PROMPT: ""})).run().wait(WAIT)
    (row,) = answer.rows
    assert row.measurement
    assert row.measurement.quality == 0
    (text,) = row.measurement.answers
    assert text.strip().endswith("conversation.")  # where the model ends, not the limit
    expected = ExactMatch({PROMPT: f" {text}\n", NO_ONE: "nothing"})
    (row,) = sweep(prompts=[PROMPT, NO_ONE], max_tokens=64, quality=expected).run().wait(WAIT).rows
    assert row.measurement
    assert row.measurement.quality == 0.5


def _number_of_words(prompt: str, answer: str) -> float:
    return len(answer.split()) / len(prompt.split())


_QUALITIES = """
import re
from functools import lru_cache, partial
from kitty_nb.experiments.suite import Kind, Suite, Task

class Near:
    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, prompt: str, answer: str) -> float:
        return min(self.most, len(answer))

    def doubled(self, prompt: str, answer: str) -> float:
        return 2 * self(prompt, answer)

def near(most: int):
    return lambda prompt, answer: min(most, len(answer))

def at_most(most: int, prompt: str, answer: str, *, least: int = 0) -> float:
    return max(least, min(most, len(answer)))

def inner(word: str):
    def has(answer: str) -> float:
        return float(word in answer)
    return lambda prompt, answer: has(answer)

def matches(pattern: re.Pattern[str]):
    return lambda prompt, answer: float(bool(pattern.search(answer)))

def counted(step: float):
    def count(prompt: str, answer: str) -> float:
        return step + count(prompt, answer[1:]) if answer else 0.0
    return count

def chosen(pick):
    return lambda prompt, answer: pick(map(len, answer.split()))

qualities = [
    inner("sky"),
    inner("sea"),
    matches(re.compile("sky")),
    matches(re.compile("sea")),
    matches(re.compile("sea", re.IGNORECASE)),
    counted(1.0),
    counted(2.0),
    chosen(max),
    chosen(min),
    lru_cache(lambda prompt, answer: 1.0),
    lru_cache(lambda prompt, answer: 2.0),
    lru_cache(near(1)),
    lru_cache(near(2)),
    lambda prompt, answer: 1.0,
    lambda prompt, answer: 2.0,
    lambda prompt, answer: len(answer),
    lambda prompt, answer: hash(answer),
    lambda prompt, answer: answer in {"yes", "no", "perhaps"},
    lambda prompt, answer: answer in {"yes", "no", "maybe"},
    lambda prompt, answer: sum(len(word) > 1 for word in answer.split()),
    lambda prompt, answer: sum(len(word) > 2 for word in answer.split()),
    lambda prompt, answer, most=3: most,
    lambda prompt, answer, most=4: most,
    partial(at_most, 1),
    partial(at_most, 2),
    partial(at_most, 2, least=1),
    partial(max),
    partial(min),
    max,
    near(1),
    near(2),
    Near(1),
    Near(2),
    Near(2).doubled,
    Suite([Task(Kind.NEEDLE, "Where?", "here")]),
    Suite([Task(Kind.NEEDLE, "Where?", "there")]),
]
"""


def test_a_quality_that_was_edited_is_another_one_in_every_process() -> None:
    code = (
        f"{_QUALITIES}\n"
        "from kitty_nb.experiments.quality import identity\n"
        "print(*map(identity, qualities), sep='\\n')"
    )
    first, again = (
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for seed in ("1", "2")
    )
    assert first == again
    assert len(set(first)) == len(first) > 20


def test_rows_of_a_quality_that_was_edited_are_not_taken(sweep: Callable[..., Sweep]) -> None:
    (row,) = sweep(quality=lambda _, answer: len(answer) > 1).run().wait(WAIT).rows
    assert row.measurement
    assert row.measurement.quality == 1.0
    same = sweep(quality=lambda _, answer: len(answer) > 1)
    edited = sweep(quality=lambda _, answer: len(answer) > 999)
    assert (same.progress.done, edited.progress.done) == (1, 0)


def _fails(prompt: str, answer: str) -> float:
    raise ValueError(answer[:0] or prompt)


def test_quality_may_be_a_function(sweep: Callable[..., Sweep]) -> None:
    (row,) = sweep(max_tokens=64, quality=_number_of_words).run().wait(WAIT).rows
    assert row.measurement
    assert (row.measurement.quality or 0) > 2
    (row,) = sweep(prompts=[PROMPT], quality=_fails).run().wait(WAIT).rows
    assert row.outcome is Outcome.DONE
    assert row.measurement
    assert row.measurement.quality is None
    assert f"ValueError('{PROMPT}')" in row.reason


def test_a_script_without_a_thread(sweep: Callable[..., Sweep]) -> None:
    async def script() -> None:
        async with sweep(repeats=2) as one:
            results = await one.run_here()
            assert len(results) == 2
        async with sweep(repeats=3) as one:
            assert len(await one.run()) == 3

    anyio.run(script)


def test_leaving_the_context_ends_the_run(sweep: Callable[..., Sweep]) -> None:
    with sweep(repeats=5) as one:
        operation = one.run()
        eventually(servers, within=WAIT)
    assert operation.done
    assert not servers()


def test_trials_run_on_whatever_machine_the_executor_has(sweep: Callable[..., Sweep]) -> None:
    """Two slots, and trials that take no server: the order holds, rows come as they end."""
    running: list[int] = []
    most = 0

    async def execute(trial: Trial, on_progress: OnProgress) -> TrialResult:
        nonlocal most
        running.append(trial.repeat)
        most = max(most, len(running))
        await anyio.sleep(0.01 * (trial.repeat % 3))
        running.remove(trial.repeat)
        if trial.repeat == 5:
            raise RuntimeError("a bug")
        return TrialResult(trial, Outcome.DONE, seconds=TrialSeconds(overall=1.0))

    class Machines:
        async def __aenter__(self) -> object:
            return execute

        async def __aexit__(self, *_: object) -> None:
            running.append(0)

    rows = sweep(repeats=9).run(Machines(), slots=2).wait(WAIT).rows  # type: ignore[arg-type]
    assert most == 2
    assert running == [0]
    assert {row.trial.repeat for row in rows} == set(range(1, 10))
    (bad,) = [row for row in rows if row.outcome is Outcome.FAILED]
    assert "RuntimeError('a bug')" in bad.reason


def test_a_trial_can_be_sent_to_another_process(base: ServerConfig, tmp_path: Path) -> None:
    workload = Workload(prompts=(PROMPT,), max_tokens=8, quality=ExactMatch({PROMPT: "x"}))
    trial = Trial("demo.gguf", (("threads", 1), ("extra_args", ("--mlock",))))
    given = {"config": base, "workload": workload, "folder": tmp_path / "logs"}
    call = partial(run_trial, trial, print, **given)
    (tmp_path / "call.pickle").write_bytes(pickle.dumps(call))
    code = (
        "import anyio, pickle, sys; from pathlib import Path\n"
        "call = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "Path(sys.argv[2]).write_bytes(pickle.dumps(anyio.run(call)))"
    )
    names = [str(tmp_path / name) for name in ("call.pickle", "row.pickle")]
    subprocess.run([sys.executable, "-c", code, *names], check=True, timeout=WAIT)
    row = pickle.loads((tmp_path / "row.pickle").read_bytes())
    assert row.trial == trial
    assert row.outcome is Outcome.DONE, row.reason
    assert row.measurement.quality == 0


def test_the_time_left_is_that_of_like_trials() -> None:
    def ended(model: str, threads: int, seconds: float) -> TrialResult:
        trial = Trial(model, (("threads", threads),))
        return TrialResult(trial, Outcome.DONE, seconds=TrialSeconds(overall=seconds))

    rows = [ended("a", 1, 10), ended("a", 2, 20), ended("a", 2, 30)]
    assert seconds_left(rows, []) == 0
    assert seconds_left([], [Trial("a")]) is None
    assert seconds_left(rows, [Trial("a", (("threads", 1),), 2)]) == 10
    assert seconds_left(rows, [Trial("a", (("threads", 3),))]) == 20
    assert seconds_left(rows, [Trial("b")], passed=4) == 16
    assert seconds_left(rows, [Trial("b")], passed=40) == 0


def test_more_requests_at_once_than_files_can_be_open_are_a_row(
    sweep: Callable[..., Sweep],
) -> None:
    one = sweep(grid={"threads": [1]}, repeats=1, parallel=300)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/dev/fd").iterdir()]) + 60, hard))
    try:
        (row,) = one.run().wait(WAIT).rows
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert row.reason.startswith("Each request takes an open file"), row.reason


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let every write beyond this many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def rows_of(count: int) -> list[TrialResult]:
    return [TrialResult(Trial("a", (), n), Outcome.DONE, "x" * 4000, at=n) for n in range(count)]


def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path: Path) -> None:
    async def write() -> None:
        store = RowStore(tmp_path / "sub" / "rows.journal", "conditions")
        rows = rows_of(50)
        await store.add(rows[:2])
        with full_disk(20_000), pytest.raises(ResultStoreError, match="results are kept in memory"):
            await store.add(rows[2:40])
        assert 0 < store.unwritten <= 38
        written = 40 - store.unwritten
        assert [row.trial.repeat for row in store.read()] == [*range(written)]
        await store.add(rows[40:])
        assert store.unwritten == 0
        assert store.read() == tuple(rows)

    anyio.run(write)


def test_a_line_that_a_killed_program_left_half_written_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.journal"
    anyio.run(RowStore(path, "conditions").add, rows_of(2))
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x","stu')
    store = RowStore(path, "conditions")
    assert len(store.read()) == 2
    anyio.run(store.add, rows_of(3))
    assert len(RowStore(path, "conditions").read()) == 3


_WRITES = """
import sys, anyio
from pathlib import Path
from kitty_nb.experiments import Outcome, Trial, TrialResult
from kitty_nb.experiments.store import RowStore
store = RowStore(Path(sys.argv[1]), "conditions")
for n in range(20):
    anyio.run(store.add, [TrialResult(Trial(sys.argv[2], (), n), Outcome.DONE)])
"""


def test_two_programs_can_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.journal"
    programs = [
        subprocess.Popen([sys.executable, "-c", _WRITES, str(path), name]) for name in ("a", "b")
    ]
    assert [program.wait(WAIT) for program in programs] == [0, 0]
    rows = RowStore(path, "conditions").read()
    assert sorted(row.trial.key for row in rows) == sorted(
        Trial(model, (), n).key for model in ("a", "b") for n in range(20)
    )


def test_the_lock_of_a_program_that_was_killed_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "rows.journal"
    store = RowStore(path, "conditions")
    anyio.run(store.add, rows_of(1))
    path.with_name("rows.journal.lock").touch()
    anyio.run(store.add, rows_of(2))
    assert len(store.read()) == 2


def test_a_lock_that_another_program_took_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.journal"
    store = RowStore(path, "conditions")
    release = JournalFileOpenLock.release

    def lose(lock: JournalFileOpenLock) -> None:
        path.with_name("rows.journal.lock").unlink()
        release(lock)

    monkeypatch.setattr(JournalFileOpenLock, "release", lose)
    with pytest.raises(ResultStoreError, match="1 results are kept in memory"):
        anyio.run(store.add, rows_of(1))
    monkeypatch.undo()
    anyio.run(store.add)
    assert len(store.read()) == 1


def test_a_file_that_cannot_be_written_costs_no_row(sweep: Callable[..., Sweep]) -> None:
    one = sweep(repeats=2)
    events = heard(one)
    aside = one.store.with_suffix(".aside")

    def hold(event: SweepEvent) -> None:
        if isinstance(event, StoreFailed):
            one.store.rmdir()
            aside.rename(one.store)
        elif isinstance(event, TrialStarted) and event.trial == one.trials[0]:
            one.store.rename(aside)
            one.store.mkdir()

    one.subscribe(hold)
    assert len(one.run(no_server()).wait(WAIT).rows) == 2
    (failed,) = [event for event in events if isinstance(event, StoreFailed)]
    assert "kept in memory" in failed.problem
    assert one.store_problem == ""
    assert len(sweep(repeats=2).results.rows) == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no journal" * 100, "isn't a file of results"),
        (b"SQLite format 3\0" + bytes(100), "an earlier version of kitty_nb wrote it"),
        (b'{"op_code":0}\n{"op_code":9}\n', "results file"),
        (b'{"op_code":0\nnothing\n{}\n', "results file"),
        (b'{"op_code":' + b"[" * 200_000 + b"\n", "results file"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_before_the_first_trial(
    sweep: Callable[..., Sweep], content: bytes, told: str
) -> None:
    one = sweep()
    events = heard(one)
    one.store.write_bytes(content)
    with pytest.raises(ResultStoreError, match=f"{told}.*name another file"):
        one.run().wait(WAIT)
    with pytest.raises(ResultStoreError, match="name another file"):
        _ = one.results
    assert one.progress.done == 0
    assert one.store.read_bytes() == content
    assert not any(isinstance(event, TrialStarted) for event in events)


def test_results_of_an_earlier_version_are_spoken_of(sweep: Callable[..., Sweep]) -> None:
    one = sweep()
    assert not one.warnings
    one.store.with_suffix(".sqlite3").touch()
    (warning,) = sweep().warnings
    assert "sweep.sqlite3 holds results of an earlier version" in warning
    anyio.run(RowStore(one.store, "conditions").add, rows_of(1))
    assert not sweep().warnings


def test_no_key_is_in_the_store(sweep: Callable[..., Sweep], base: ServerConfig) -> None:
    one = sweep(config=base.replace(api_key="my-own-secret"))
    one.run().wait(WAIT)
    assert b"my-own-secret" not in one.store.read_bytes()
    assert "my-own-secret" not in json.dumps([str(row) for row in one.results.rows])
    assert os.access(one.store, os.W_OK)
