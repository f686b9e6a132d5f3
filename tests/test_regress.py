"""Other builds of the engine beside the one in use: wrappers that spoil the real engine."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import anyio
import pytest
from conftest import demo_config, unused_port
from terminal import run
from test_cli import write_env

from kitty_nb import ModelManager, ServerConfig
from kitty_nb.errors import ExperimentError, RunRecordError
from kitty_nb.experiments import Regression, RunRecord, Verdict, record_run, regress
from kitty_nb.experiments.bench import BenchClient, BenchTest

WAIT = 300
# Batches of one token, and plain attention: the same answers, but prompts take three times as long.
SLOW = ("--ubatch-size", "1", "--flash-attn", "off")
OTHER = ("--grammar", 'root ::= "Hello!" " I am" " written"')
ANSWER = "Hello! I am the kitty_nb demo model,"

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def record(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    config = demo_config(demo_model, tmp_path_factory.mktemp("record"), unused_port())
    with ModelManager(config=config) as manager:
        manager.start().wait(60)
        return record_run(manager, ["Who are you?"], max_tokens=6).wait(60)


@pytest.fixture
def build(tmp_path: Path, config: ServerConfig) -> Build:
    """Make a build of the engine in use that adds flags of its own."""

    def make(name: str, *flags: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        engine = shlex.join((sys.executable, "-P", "-m", "kitty_nb.engine.embedded"))
        if config.binary:
            engine = shlex.quote(str(config.binary))
        program = folder / "llama-server"
        program.write_text(f'#!/bin/sh\nexec {engine} "$@" {shlex.join(flags)}\n')
        program.chmod(0o755)
        return program

    return make


def compared(record: RunRecord, *engines: Path, config: ServerConfig, **more: object) -> Regression:
    shape = {"prompt": 192, "answer": 0, "rounds": 5, **more}
    return regress([record], engines, config=config, **shape).wait(WAIT)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_slower_build_is_told(config: ServerConfig, record: RunRecord, build: Build) -> None:
    program = build("slow", *SLOW)
    found = compared(record, program, config=config)
    if not found.regressed:  # a machine this busy takes more rounds
        found = compared(record, program, config=config, rounds=15)
    (slow,) = found.builds
    assert not slow.answers
    assert not slow.problem
    assert slow.speeds["pp192"].verdict is Verdict.SLOWER, str(found)
    assert slow.speeds["pp192"].ratio < 0.7
    assert (slow.regressed, found.regressed) == (True, True)
    assert "pp192: slower: -" in str(found)
    assert "answers compared: 1, all the same" in str(slow)


def test_another_answer_is_told_with_its_first_token(
    config: ServerConfig, record: RunRecord, build: Build
) -> None:
    found = compared(record, build("other", *OTHER), config=config, rounds=3, prompt=0)
    (other,) = found.builds[0].answers
    assert found.builds[0].compared == 1
    unsteady = replace(found.builds[0], answers=(), compared=0)
    assert "no answer could be compared" in str(unsteady)
    assert record.outputs == (ANSWER,)
    assert (other.answer, other.token) == (1, 3)
    assert other.before == ANSWER.removeprefix("Hello! I am ")
    assert "written".startswith(other.now)
    assert "answer 1 of record 1 differs from token 3 on: 'wri" in str(found)
    assert "answer 1 of record 1 differs: 'wri" in str(replace(other, token=None))
    assert found.regressed


def test_a_build_that_cannot_serve_says_why(
    config: ServerConfig, record: RunRecord, build: Build, tmp_path: Path
) -> None:
    broken = build("broken", "--no-such-flag")
    found = compared(record, broken, tmp_path / "gone", config=config, rounds=3, prompt=0)
    assert [one.regressed for one in found.builds] == [True, True]
    assert not found.builds[0].speeds
    assert "no-such-flag" in found.builds[0].problem
    assert "gone" in found.builds[1].problem


@pytest.mark.slow
def test_an_environment_stands_for_the_engine_in_it(
    config: ServerConfig, record: RunRecord
) -> None:
    for engine in (Path(sys.prefix), Path(sys.executable)):
        (found,) = compared(record, engine, config=config, rounds=3).builds
        assert not found.problem
        assert not found.answers
        assert found.version
        assert set(found.speeds) == {"pp192"}


@pytest.mark.slow
def test_a_bisection_finds_the_first_bad_build_with_few_tries(
    config: ServerConfig, record: RunRecord, build: Build
) -> None:
    builds = [build(f"{number}", *(OTHER if number >= 3 else ())) for number in range(7)]
    # Answers alone: of builds that are as fast, a measurement of few rounds calls some slower.
    shape = {"rounds": 3, "prompt": 0, "bisect": True}
    found = compared(record, *builds, config=config, **shape)
    assert found.first_bad == builds[3], str(found)
    assert len(found.builds) <= 4
    assert str(builds[3]) in str(found).splitlines()[-1]
    fine = compared(record, *builds[:2], config=config, **shape)
    assert (fine.first_bad, len(fine.builds)) == (None, 1)


@pytest.mark.slow
def test_an_answer_that_is_not_as_recorded_is_a_note_and_no_regression(
    config: ServerConfig, record: RunRecord, build: Build
) -> None:
    old = record.exchanges[0].model_copy(update={"output": "Something else"})
    found = compared(
        record.model_copy(update={"exchanges": (old,)}), build("same"), config=config, rounds=3
    )
    (same,) = found.builds
    assert not same.answers
    assert not same.problem
    assert 0.3 < same.speeds["pp192"].ratio < 3
    assert "answers compared: 1, all the same" in str(same)
    assert found.notes == ("answer 1 of record 1 no longer matches the record",)


@pytest.mark.slow
def test_answers_alone_can_be_compared(
    config: ServerConfig, record: RunRecord, build: Build
) -> None:
    found = compared(record, build("same"), config=config, rounds=3, prompt=0)
    assert (found.builds[0].speeds, found.regressed) == ({}, False)
    engine = build("broken", "--no-such-flag")
    with pytest.raises(
        ExperimentError, match=r"The engine in use can.t serve a record: .*no-such-fl"
    ):
        compared(record, engine, config=config.replace(binary=engine), rounds=3)


def test_there_must_be_something_to_compare(config: ServerConfig, record: RunRecord) -> None:
    for records, engines in (([], ["a"]), ([record], [])):
        with pytest.raises(ExperimentError, match="at least one record and one engine"):
            regress(records, engines, config=config)
    with pytest.raises(ExperimentError, match="rounds is 2"):
        regress([record], ["a"], rounds=2, config=config)
    with pytest.raises(RunRecordError, match=r"gone\.json"):
        regress("gone.json", "a", config=config)


@pytest.mark.slow
def test_the_terminal_ends_with_1_if_a_build_regresses(
    config: ServerConfig, record: RunRecord, build: Build, tmp_path: Path
) -> None:
    env, path = write_env(tmp_path, config), record.save(tmp_path / "run.json")
    words = ("--rounds", 3, "--pp", 64, "--tg", 0, "--env", env)
    done = run("regress", path, "--engine", build("other", *OTHER), *words)
    assert done.exit_code == 1, done.stderr
    assert f"answer 1 of {path} differs from token 3 on" in done.stdout
    assert run("regress", path, "--engine", path, "--rounds", 1, "--env", env).exit_code == 1


def test_ctrl_c_prints_the_rounds_so_far(
    config: ServerConfig,
    record: RunRecord,
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warm_up, servers = BenchClient.warm_up, count(1)

    async def interrupted(client: BenchClient, test: BenchTest) -> None:
        if next(servers) == 4:  # the first of the second round
            os.kill(os.getpid(), signal.SIGINT)
            await anyio.sleep(WAIT)
        await warm_up(client, test)

    monkeypatch.setattr(BenchClient, "warm_up", interrupted)
    env, path = write_env(tmp_path, config), record.save(tmp_path / "run.json")
    other = build("other", *OTHER)
    words = ("--rounds", 3, "--pp", 16, "--tg", 0, "--env", env)
    done = run("regress", path, "--engine", other, *words)
    assert done.exit_code == 130
    assert f"{other} " in done.stdout
    assert "pp16: too close to tell, because a verdict takes 3 rounds" in done.stdout
    assert f"answer 1 of {path} differs from token 3 on" in done.stdout


@pytest.mark.native
def test_a_slower_native_build_is_told(
    config: ServerConfig, record: RunRecord, native_engine: Path, tmp_path: Path
) -> None:
    slow = tmp_path / "llama-server"
    slow.write_text(f'#!/bin/sh\nexec {native_engine} "$@" {shlex.join(SLOW)}\n')
    slow.chmod(0o755)
    config = config.replace(binary=native_engine)
    found = compared(record, slow, config=config)
    if not found.regressed:  # a machine this busy takes more rounds
        found = compared(record, slow, config=config, rounds=15)
    assert found.builds[0].speeds["pp192"].verdict is Verdict.SLOWER, str(found)
    assert not found.builds[0].answers
