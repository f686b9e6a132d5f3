from __future__ import annotations

import gc
import json
import os
import pty
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from conftest import eventually
from hub_server import MB, ONE, Hub, Repo
from model_files import write_header
from terminal import run
from typer.testing import Result

from kitty_nb import ModelManager, ServerConfig, ServerStatus
from kitty_nb.catalog.gguf import read_header
from kitty_nb.cli.commands import read_status
from kitty_nb.cli.doctor import Verdict, examine
from kitty_nb.supervisor.history import Outcome
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.registry import ServerRecord, find_server, write_record

_COMMAND = (sys.executable, "-m", "kitty_nb.cli")


def write_env(folder: Path, config: ServerConfig, *lines: str) -> Path:
    path = folder / "my.env"
    text = (
        f"LLAMACPP_MODELS_DIR={config.models_dir}\nLLAMACPP_PRIMARY_MODEL={config.model}\n"
        f"LLAMACPP_ALIAS=demo\nLLAMACPP_PORT={config.port}\nLLAMACPP_LOG_DIR={config.log_dir}\n"
        f"LLAMACPP_HISTORY={config.history}\nLLAMACPP_CTX=512\nLLAMACPP_THREADS=1\n"
        f"LLAMACPP_PARALLEL=1\n"
    )
    path.write_text(text + "".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def env(tmp_path: Path, config: ServerConfig) -> Iterator[Path]:
    """The real engine on the demo model."""
    path = write_env(tmp_path, config)
    yield path
    run("stop", "--env", path, "--force")
    gc.collect()  # what is left of the commands goes while its warnings are expected


@pytest.fixture
def slow_env(tmp_path: Path, config: ServerConfig, stand_in: Path) -> Iterator[Path]:
    """A server that loads for ever."""
    lines = (f"LLAMACPP_BIN={stand_in}", "LLAMACPP_EXTRA_ARGS=--never-ready")
    path = write_env(tmp_path, config, *lines)
    yield path
    run("stop", "--env", path, "--force")
    gc.collect()  # what is left of the commands goes while its warnings are expected


def facts(env: Path) -> dict[str, object]:
    return dict(json.loads(run("status", "--json", "--env", env).stdout))


def test_a_server_started_in_a_terminal_is_seen_and_stopped_by_a_panel(env: Path) -> None:
    started = run("start", "--env", env)
    assert started.exit_code == 0, started.stderr
    assert started.stdout.startswith("READY: demo at http://127.0.0.1:")
    assert "Server starting…\n" in started.stderr
    pid = facts(env)["pid"]
    with ModelManager(env) as manager:
        eventually(lambda: manager.state.status is ServerStatus.READY)
        assert manager.state.pid == pid
        assert manager.http.get("/health").status_code == 200
        manager.stop().wait(30)
    result = run("status", "--env", env)
    assert (result.exit_code, result.stdout) == (
        3,
        "No server is running for the profile 'primary'.\n",
    )


def test_a_server_started_by_a_panel_is_watched_and_stopped_in_a_terminal(
    env: Path, config: ServerConfig
) -> None:
    with ModelManager(env) as manager:
        state = manager.start().wait(30)
        found = facts(env)
        memory = found.pop("memory")
        assert isinstance(memory, dict)
        assert memory["ram"] == pytest.approx(psutil.Process(state.pid).memory_info().rss, rel=0.2)
        assert {**found, "uptime_seconds": None} == {
            "profile": "primary",
            "status": "READY",
            "model": str(config.model),
            "projector": None,
            "alias": "demo",
            "endpoint": state.endpoint,
            "pid": state.pid,
            "uptime_seconds": None,
            "devices": [],
            "machine": None,
            "error": None,
            "log": str(config.log_path),
            "tokens_per_second": 0.0,
        }
        assert 0 < float(str(found["uptime_seconds"])) < 60
        assert run("wait-ready", "--env", env, "--profile", "PRIMARY").exit_code == 0
        last = run("logs", "--env", env, "-n", "2").stdout.splitlines()
        assert len(last) == 2
        assert run("stop", "--env", env).stdout == f"Stopped the server (PID {state.pid}).\n"
        eventually(lambda: manager.state.status is ServerStatus.STOPPED)
    again = run("stop", "--env", env)
    assert again.exit_code == 0
    assert "No server" in again.stdout


def test_the_key_that_clients_need_is_printed_by_a_command_that_the_start_names(env: Path) -> None:
    assert run("key", "--env", env).exit_code == 3
    (hint,) = run("start", "--env", env).stdout.splitlines()[1:]
    command = hint.partition("To print it: kitty-nb ")[2]
    with ModelManager(env) as manager:
        assert run(*shlex.split(command)).stdout.strip() == manager.reveal_api_key()
    env.write_text(f"{env.read_text()}LLAMACPP_API_KEY=none\n")
    assert len(run("restart", "--env", env).stdout.splitlines()) == 1
    keyless = run("key", "--env", env)
    assert (keyless.exit_code, keyless.stdout) == (0, "")
    assert "No API key is set" in keyless.stderr


def test_the_status_of_all_profiles(env: Path, config: ServerConfig) -> None:
    env.write_text(f"{env.read_text()}LLAMACPP_CODER_PORT=1\nLLAMACPP_ZZZ=1\n")
    nobody = run("status", "--all", "--env", env)
    assert nobody.exit_code == 3
    assert nobody.stderr.count("LLAMACPP_ZZZ is not a setting") == 1
    assert [line.partition(":")[0] for line in nobody.stdout.splitlines()] == ["primary", "coder"]
    with ModelManager(env) as manager:
        manager.start().wait(30)
        told = run("status", "--all", "--json", "--env", env)
        assert told.exit_code == 0
        statuses = {facts["profile"]: facts["status"] for facts in json.loads(told.stdout)}
        assert statuses == {"primary": "READY", "coder": "STOPPED"}


def test_looking_at_a_server_does_not_tie_it_to_the_terminal(env: Path) -> None:
    env.write_text(f"{env.read_text()}LLAMACPP_ON_KERNEL_EXIT=stop\n")
    with ModelManager(env) as manager:
        pid = manager.start().wait(30).pid
        for command in ("wait-ready", "status", "start"):
            done = run(command, "--env", env)
            assert done.exit_code == 0, done.stderr
        assert manager.state.status is ServerStatus.READY
        assert manager.state.pid == pid
        assert psutil.pid_exists(pid or 0)


def test_what_is_started_in_a_terminal_stays_whatever_is_to_be_done_at_a_kernels_exit(
    env: Path,
) -> None:
    env.write_text(f"{env.read_text()}LLAMACPP_ON_KERNEL_EXIT=stop\n")
    assert run("start", "--env", env).exit_code == 0
    pid = facts(env)["pid"]
    again = run("start", "--env", env)
    assert again.exit_code == 0
    assert "It was already running." in again.stdout
    assert "Model loaded" not in again.stderr
    assert facts(env)["pid"] == pid
    assert facts(env)["status"] == "READY"


def test_a_load_is_remembered_after_the_command_has_ended(env: Path, config: ServerConfig) -> None:
    assert run("start", "--env", env).exit_code == 0
    with closing(sqlite3.connect(config.history)) as loads:
        assert loads.execute("SELECT outcome FROM loads").fetchall() == [(Outcome.READY.value,)]


def test_restart_and_switch_replace_the_server(env: Path, demo_model: Path) -> None:
    other = demo_model.with_name("other.gguf")
    other.write_bytes(demo_model.read_bytes())
    pids = set()
    for words in (("start",), ("restart",), ("switch", "other.gguf", "--alias", "second")):
        done = run(*words, "--env", env)
        assert done.exit_code == 0, done.stderr
        pids.add(facts(env)["pid"])
    assert len(pids) == 3
    assert (facts(env)["alias"], facts(env)["model"]) == ("second", str(other))
    missing = run("switch", "none.gguf", "--env", env)
    assert missing.exit_code == 1
    assert "There is no such file" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert facts(env)["alias"] == "second"
    other.unlink()


def test_no_wait_returns_during_the_load_and_wait_ready_gives_up(slow_env: Path) -> None:
    started = run("start", "--no-wait", "--env", slow_env)
    assert started.exit_code == 0, started.stderr
    assert "STARTING" in started.stdout
    eventually(lambda: facts(slow_env)["status"] == "LOADING")
    waited = run("wait-ready", "--timeout", "0.5", "--env", slow_env)
    assert waited.exit_code == 1
    assert "not ready after 0.5 s; it is still loading" in waited.stderr
    assert facts(slow_env)["status"] == "LOADING"
    assert run("stop", "--force", "--env", slow_env).exit_code == 0
    assert run("wait-ready", "--env", slow_env).exit_code == 3


def test_a_load_is_a_bar_in_a_terminal_and_ctrl_c_ends_it(tmp_path: Path, slow_env: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*_COMMAND, "start", "--env", str(slow_env)]
    terminal = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=terminal, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        seen = ""
        while "loading" not in seen:
            seen += os.read(ours, 4096).decode(errors="replace")
        assert "━" in seen
        assert "%" in seen
        pid = facts(slow_env)["pid"]
        assert isinstance(pid, int)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                seen += os.read(ours, 4096).decode(errors="replace")
            except OSError:  # its end, on Linux
                break
        assert process.wait(30) == 130
    os.close(ours)
    assert "Traceback" not in seen
    assert not psutil.pid_exists(pid)
    assert run("status", "--env", slow_env).exit_code == 3


def test_a_start_that_fails_says_why(env: Path, config: ServerConfig) -> None:
    env.write_text(f"{env.read_text()}LLAMACPP_EXTRA_ARGS=--no-such-flag\n")
    done = run("start", "--env", env)
    assert done.exit_code == 1
    assert done.stderr.count("--no-such-flag") == 1
    assert "Traceback" not in done.stderr
    empty = run("start", "--env", env, "--profile", "coder")
    assert empty.exit_code == 1
    assert "set LLAMACPP_CODER_MODEL" in empty.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--no-such-flag", "--no-such-flag"),  # refused before there is a process
        ("--never-ready --exit-after 0 --exit-code 7", "exit code 7"),
        ("--never-ready", "stalled"),
    ],
)
def test_why_a_start_failed_is_known_until_the_next_one(
    env: Path, stand_in: Path, flags: str, says: str
) -> None:
    good = f"{env.read_text()}LLAMACPP_BIN={stand_in}\n"
    patience = 1 if says == "stalled" else 60
    env.write_text(f"{good}LLAMACPP_STALL_SECONDS={patience}\nLLAMACPP_EXTRA_ARGS={flags}\n")
    failed = run("start", "--env", env)
    assert failed.exit_code == 1
    reason = failed.stderr.partition("kitty-nb: ")[2].splitlines()[0]
    assert says in reason
    if hint := failed.stderr.partition("To see the end of its log: kitty-nb ")[2]:
        assert run(*shlex.split(hint)).exit_code == 0
        assert str(env) in hint
    assert bool(hint) == ("flag" not in says)
    asked = run("status", "--env", env)
    assert asked.exit_code == 3
    assert asked.stdout.rstrip().endswith(f": {reason}")
    env.write_text(f"{good}LLAMACPP_CTX=2000000000\n")
    assert "Not enough memory" in run("start", "--env", env).stderr
    assert "Not enough memory" in run("status", "--env", env).stdout
    env.write_text(good)
    assert run("start", "--env", env).exit_code == 0
    assert run("stop", "--env", env).exit_code == 0
    assert run("status", "--env", env).stdout.startswith("No server")


def test_tokens_a_second_are_told_while_it_answers(env: Path) -> None:
    idle = facts(env)
    assert (idle["memory"], idle["tokens_per_second"]) == (None, None)
    env.write_text(f"{env.read_text()}LLAMACPP_EXTRA_ARGS='--ignore-eos --context-shift'\n")
    with ModelManager(env) as manager:
        manager.start().wait(30)
        endless = manager.chat("Who are you?")
        eventually(lambda: float(str(facts(env)["tokens_per_second"])) > 0)
        endless.cancel()


def test_the_command_is_printed_for_a_shell_and_nothing_is_started(
    tmp_path: Path, config: ServerConfig, stand_in: Path, demo_model: Path
) -> None:
    model = tmp_path / "a model's name.gguf"
    shutil.copy(demo_model, model)
    more = ("LLAMACPP_ALLOW_ABSOLUTE_PATHS=1", f"LLAMACPP_BIN={stand_in}")
    env = write_env(tmp_path, config, *more, "LLAMACPP_API_KEY=very-secret")
    env.write_text(f'{env.read_text()}LLAMACPP_PRIMARY_MODEL="{model}"\n')
    printed = run("start", "--print-command", "--env", env)
    assert printed.exit_code == 0
    assert "very-secret" not in printed.output
    words = shlex.split(printed.stdout)
    assert words[:3] == [str(stand_in), "--model", str(model)]
    assert words[words.index("--ctx-size") + 1] == "512"
    assert not config.log_dir.exists()
    env.write_text(f"{env.read_text()}LLAMACPP_EXTRA_ARGS=--no-such-flag\n")
    refused = run("start", "--print-command", "--env", env)
    assert refused.exit_code == 1
    assert "--no-such-flag" in refused.stderr


def test_a_secret_among_other_flags_is_not_printed(tmp_path: Path, config: ServerConfig) -> None:
    program = tmp_path / "llama-server"
    flags = "--model FNAME  x", "-hft, --hf-token TOKEN  x", "--mcp-servers-json JSON  x"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{flag}'\n" for flag in flags))
    program.chmod(0o755)
    env = write_env(
        tmp_path, config, f"LLAMACPP_BIN={program}", "LLAMACPP_CTX=", "LLAMACPP_THREADS="
    )
    env.write_text(
        env.read_text() + "LLAMACPP_PARALLEL=\nLLAMACPP_EXTRA_ARGS=--hf-token hf_secret\n"
    )
    printed = run("start", "--print-command", "--env", env)
    assert printed.stdout.endswith("--hf-token '(hidden)'\n")
    env.write_text(env.read_text().replace("--hf-token", "-hft"))
    assert run("start", "--print-command", "--env", env).stdout.endswith("-hft '(hidden)'\n")
    with_key = """--mcp-servers-json '{"env": {"KEY": "hf_secret"}}'"""
    env.write_text(env.read_text().replace("-hft hf_secret", with_key))
    printed = run("start", "--print-command", "--env", env)
    assert printed.stdout.endswith("--mcp-servers-json '(hidden)'\n")


def test_what_will_not_fit_is_refused_unless_wanted_anyway(env: Path, stand_in: Path) -> None:
    env.write_text(f"{env.read_text()}LLAMACPP_BIN={stand_in}\n")
    assert run("start", "--env", env).exit_code == 0
    pid = facts(env)["pid"]
    env.write_text(f"{env.read_text()}LLAMACPP_PRIMARY_CTX=2000000000\n")
    for verb in ("start", "restart"):
        refused = run(verb, "--env", env)
        assert refused.exit_code == 1
        assert "Not enough memory: needs" in refused.stderr
        assert "--anyway" in refused.stderr
    assert facts(env)["pid"] == pid
    assert run("restart", "--anyway", "--env", env).exit_code == 0
    assert facts(env)["pid"] != pid


def test_a_hung_server_is_not_said_to_serve(
    env: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.supervisor.health._ANSWER_WITHIN", 0.5)
    env.write_text(f"{env.read_text()}LLAMACPP_BIN={stand_in}\n")
    assert run("start", "--env", env).exit_code == 0
    os.kill(int(str(facts(env)["pid"])), signal.SIGSTOP)
    assert "is not responding" in run("status", "--env", env).stdout


def test_a_server_that_died_unwatched_is_said_to_have_crashed(env: Path) -> None:
    assert run("start", "--env", env).exit_code == 0
    pid = facts(env)["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: facts(env)["status"] == "CRASHED")
    result = run("status", "--env", env)
    assert result.exit_code == 3
    assert result.stdout.startswith("CRASHED: The server ended")


def test_a_server_that_starts_while_its_status_is_read_has_not_crashed(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.log_dir.mkdir(mode=0o700)
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        server = ServerProcess(process.pid, None)
        starts = iter([ServerRecord(began=time.monotonic(), config=config).of(server)])

        def find(config: ServerConfig) -> ServerRecord | None:
            for record in starts:
                write_record(record)
                return None  # what was so before
            return find_server(config)

        monkeypatch.setattr("kitty_nb.cli.commands.find_server", find)
        state, _ = read_status(config)
        process.kill()
    assert (state.status, state.pid) == (ServerStatus.STARTING, process.pid)


def test_a_log_is_followed_into_the_next_one(
    tmp_path: Path, env: Path, config: ServerConfig
) -> None:
    config.log_dir.mkdir()
    config.log_path.write_text("one\ntwo\nthree\n")
    assert run("logs", "--env", env).stdout == "one\ntwo\nthree\n"
    command = [*_COMMAND, "logs", "--follow", "-n", "1", "--env", str(env)]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "three\n"
        with config.log_path.open("a") as log:
            log.write("four\n")
            log.flush()
            assert process.stdout.readline() == "four\n"
            log.write("five")
        config.log_path.rename(tmp_path / "old")
        assert process.stdout.readline() == "five\n"
        config.log_path.write_text("six\n")
        assert process.stdout.readline() == "six\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_a_missing_log_is_explained(env: Path) -> None:
    result = run("logs", "--env", env)
    assert result.exit_code == 1
    assert "no server of this profile has been started" in result.stderr


def test_a_wrong_setting_is_told_and_not_in_the_way_of_looking(env: Path) -> None:
    env.write_text(f"{env.read_text()}LLAMACPP_PRIMARY_MODEL=gone.gguf\n")
    result = run("status", "--env", env)
    assert result.exit_code == 3
    assert "gone.gguf" in result.stderr
    started = run("start", "--env", env)
    assert started.exit_code == 1
    assert "There is no such file" in started.stderr
    env.write_text(f"{env.read_text()}LLAMACPP_MODEL=gone-too.gguf\n")
    for verb, code in {"status": 3, "stop": 0, "scan": 0}.items():
        result = run(verb, "--env", env)
        assert result.exit_code == code
        assert "LLAMACPP_PRIMARY_MODEL='gone.gguf'" in result.stderr
        assert "LLAMACPP_MODEL='gone-too.gguf'" in result.stderr


def test_the_doctor_finds_nothing_wrong_where_all_is_well(env: Path, config: ServerConfig) -> None:
    with ModelManager(env) as manager:
        pid = manager.start().wait(30).pid
        result = run("doctor", "--env", env)
    assert result.exit_code == 0, result.stdout
    words = " ".join(result.stdout.split())
    for what in ("kitty_nb 0", "ipykernel", "llama-server", "can be served", f"PID {pid}", "RAM"):
        assert what in words
    assert "wrong" not in words


def test_the_doctor_says_what_to_do_about_everything_that_is_wrong(
    tmp_path: Path, config: ServerConfig
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "broken.gguf").write_bytes(b"no model")
    path = tmp_path / "my.env"
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        path.write_text(
            f"LLAMACPP_MODELS_DIR=models\nLLAMACPP_PORT={port}\nLLAMACPP_BIN={tmp_path}/none\n"
            f"LLAMACPP_PRIMARY_MODEL=gone.gguf\nLLAMACPP_LOG_DIR={path}/logs\n"
        )
        findings = {finding.what: finding for finding in examine(path)}
    bad = {what for what, finding in findings.items() if finding.verdict is Verdict.ERROR}
    assert bad == {".env", "Engine", "Port of primary", "Disk"}
    assert "gone.gguf" in findings[".env"].found
    assert "LLAMACPP_BIN" in findings["Engine"].advice
    assert "set LLAMACPP_PRIMARY_PORT" in findings["Port of primary"].found
    assert f"PID {os.getpid()}" in findings["Port of primary"].found
    assert "LLAMACPP_LOG_DIR" in findings["Disk"].advice
    assert "broken.gguf" in findings["Models"].advice
    assert "LLAMACPP_PRIMARY_MODEL" in findings["Model"].advice
    result = run("doctor", "--env", path)
    assert result.exit_code == 1
    path.write_text("LLAMACPP_PORT='open\n")
    assert "close every quote" in examine(path)[-1].found


def test_the_doctor_forecasts_memory_and_compares_the_ports_of_profiles(
    tmp_path: Path, config: ServerConfig, free_port: int
) -> None:
    path = write_env(tmp_path, config, "LLAMACPP_PRIMARY_CTX=2000000000")
    lines = (f"LLAMACPP_PORT={free_port}", "LLAMACPP_CODER_CTX=512", "LLAMACPP_Q4_PORT=99999")
    path.write_text(path.read_text() + "".join(f"{line}\n" for line in lines))
    findings = {finding.what: finding for finding in examine(path)}
    assert findings["Model"].verdict is Verdict.ERROR
    assert "Not enough memory" in findings["Model"].advice
    for name, other in (("primary", "coder"), ("coder", "primary")):
        shared = findings[f"Port of {name}"]
        assert shared.verdict is Verdict.WARNING
        assert shared.found.endswith(f"also the port of {other}.")
        assert f"LLAMACPP_{name.upper()}_PORT" in shared.advice
    assert findings["Port of q4"].verdict is Verdict.ERROR
    assert "LLAMACPP_Q4_PORT='99999'" in findings["Port of q4"].found
    for served, verdict in (("all", Verdict.OK), ("coder", Verdict.WARNING)):
        lines = (f"LLAMACPP_FRONT_MODELS={served}", f"LLAMACPP_FRONT_PORT={free_port + 1}")
        path.write_text(path.read_text() + "".join(f"{line}\n" for line in lines))
        findings = {finding.what: finding for finding in examine(path)}
        for name in ("primary", "coder"):
            assert findings[f"Port of {name}"].verdict is verdict


def test_the_doctor_knows_flags_that_the_engine_does_not(
    tmp_path: Path, config: ServerConfig, stand_in: Path
) -> None:
    path = write_env(tmp_path, config, f"LLAMACPP_BIN={stand_in}", "LLAMACPP_EXTRA_ARGS=--nope")
    engine = next(one for one in examine(path) if one.what == "Engine")
    assert engine.verdict is Verdict.ERROR
    assert "--nope" in engine.advice


def test_models_are_listed_and_a_demo_model_is_written_among_them(
    tmp_path: Path, config: ServerConfig
) -> None:
    folder = tmp_path / "a folder with a name that no terminal of eighty columns can show in a row"
    env = tmp_path / "my.env"
    env.write_text(f"LLAMACPP_MODELS_DIR='{folder}'\n")
    assert f"kitty-nb demo-model --env {env}" in run("scan", "--env", env).stdout
    assert f"There are no models in {folder}." in run("start", "--env", env).stderr
    assert run("demo-model", "--env", env).exit_code == 0
    for options in ((), ("--print-command",)):
        none = run("start", *options, "--env", env)
        assert none.exit_code == 1
        assert none.stderr == (
            "kitty-nb: 1 setting is wrong:\n- LLAMACPP_PRIMARY_MODEL='': No model is chosen. Choose"
            f" one, or set LLAMACPP_PRIMARY_MODEL. Models in {folder}: kitty-demo.gguf.\n"
        )
    long = folder / f"{'x' * 90}.gguf"
    long.write_bytes((folder / "kitty-demo.gguf").read_bytes())
    (folder / "broken.gguf").write_bytes(b"no model")
    listed = run("scan", "--env", env).stdout
    assert long.name in listed
    assert "F16" in listed
    assert "1.0 MB" in listed
    assert "broken.gguf" in listed


def test_a_demo_model_of_the_wanted_size(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "demo.gguf"
    result = run("demo-model", path, "--size", "0.01")
    assert result.exit_code == 0
    assert path.stat().st_size == pytest.approx(10_000_000, rel=0.01)
    assert read_header(path).architecture == "llama"
    assert str(path) in result.stdout


def test_an_error_is_one_sentence(tmp_path: Path) -> None:
    result = run("demo-model", tmp_path / "demo.gguf", "--size", "0.0001")
    assert result.exit_code == 1
    assert result.stderr.startswith("kitty-nb: A demo model of 100000 bytes is too small")


@pytest.mark.parametrize("size", ["nan", "inf", "1e300", "-1"])
def test_a_size_that_is_no_number_is_refused(tmp_path: Path, size: str) -> None:
    result = run("demo-model", tmp_path / "demo.gguf", f"--size={size}")
    assert result.exit_code == 2
    assert "Write a number of gigabytes" in result.stderr


def test_a_log_is_read_from_its_beginning_by_a_program_that_stops_reading(
    env: Path, config: ServerConfig
) -> None:
    config.log_dir.mkdir()
    config.log_path.write_text("a line\n" * 200_000)
    command = [*_COMMAND, "logs", "--env", str(env)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_model_whose_name_is_no_text_is_listed(
    tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    try:
        shutil.copy(demo_model, os.fsencode(tmp_path / "models") + b"/caf\xe9.gguf")
    except OSError:
        pytest.skip("this file system takes text only")
    (tmp_path / ".env").write_text("LLAMACPP_MODELS_DIR=models\nLLAMACPP_OTHER_STORES=0\n")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    listed = subprocess.check_output([*_COMMAND, "scan"], cwd=tmp_path, text=True)
    assert "caf\\udce9.gguf" in listed


def test_a_file_with_a_byte_that_no_path_can_have_is_explained(tmp_path: Path) -> None:
    env = tmp_path / "my.env"
    env.write_bytes(b"LLAMACPP_PORT=1\nLLAMACPP_MODELS_DIR=mo\0dels\n")
    for verb in ("scan", "status", "doctor"):
        result = run(verb, "--env", env)
        assert result.exit_code == 1
        assert "line 2" in result.output
        assert "LLAMACPP_MODELS_DIR=…" in result.output


def test_wrong_arguments_are_refused() -> None:
    result = run("demo-model", "x.gguf", "--sise", "1")
    assert result.exit_code == 2
    assert "--sise" in result.stderr


def test_the_help_names_every_verb_and_the_exit_codes() -> None:
    told = run("--help").stdout
    for word in ("scan", "start", "stop", "restart", "switch", "status", "wait-ready", "logs"):
        assert word in told
    assert "130 interrupted" in " ".join(told.split())


def test_lab_hands_other_options_on_and_keeps_a_notebook_that_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "experiments.ipynb").write_text("mine")
    version = subprocess.check_output([*_COMMAND, "lab", "--version"], cwd=tmp_path, text=True)
    assert version[0].isdigit()
    assert "ControlPanel" in (folder / "control_panel.ipynb").read_text()
    assert (folder / "experiments.ipynb").read_text() == "mine"


@pytest.fixture
def download(tmp_path: Path, hub: Hub) -> Callable[..., Result]:
    """The verb, asking the Hub on loopback."""
    env = tmp_path / "hub.env"
    env.write_text("LLAMACPP_MODELS_DIR=models\n")
    return lambda *words: run("download", *words, "--env", env)


def test_a_model_is_downloaded_and_its_setting_printed(
    download: Callable[..., Result], tmp_path: Path
) -> None:
    listed = download(ONE, "--list").stdout
    for words in ("Q4_K_M", "tiny-Q8_0.gguf", "5.0 MB"):
        assert words in listed
    assert not (tmp_path / "models").exists()
    done = download(ONE, "--quant", "q8_0")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"LLAMACPP_PRIMARY_MODEL={ONE}/tiny-Q8_0.gguf\n"
    assert (tmp_path / "models" / ONE / "tiny-Q8_0.gguf").stat().st_size == 5 * MB
    failed = download("nobody/nothing")
    assert failed.exit_code == 1
    assert failed.stderr.startswith("kitty-nb: The Hub has no repository nobody/nothing")


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9", "socksio"),
        ("HTTPS_PROXY", "foo://127.0.0.1:9", "Unknown scheme for proxy"),
        ("HF_TOKEN", "t\u00f6ken", "the token is not plain ASCII"),
        ("SSL_CERT_FILE", "/nowhere.pem", "No such file or directory. Check the name"),
        ("SSL_CERT_FILE", __file__, "SSL_CERT_FILE and SSL_CERT_DIR"),
    ],
)
def test_surroundings_that_keep_the_hub_away_are_named(
    download: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    says: str,
) -> None:
    monkeypatch.setenv(variable, value)
    asked = download(ONE, "--list")
    assert asked.exit_code == 1
    assert asked.stderr.startswith("kitty-nb: ")
    assert says in asked.stderr


def test_a_proxy_is_not_asked_for_what_is_on_this_machine(
    env: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    assert run("start", "--env", env).exit_code == 0
    assert run("status", "--env", env).stdout.startswith("READY")
    with ModelManager(env) as manager:
        assert manager.chat("Who are you?", max_tokens=4).wait(30)
        assert manager.http.get("/health").status_code == 200


def test_a_download_that_is_no_model_to_serve_says_so(
    download: Callable[..., Result], hub: Hub, tmp_path: Path
) -> None:
    painter = write_header(tmp_path / "source.gguf", "flux").read_bytes()
    hub.repos["maker/Paint-GGUF"] = Repo({"paint-Q4_0.gguf": painter})
    done = download("maker/Paint-GGUF")
    assert done.exit_code == 0
    assert "paint-Q4_0.gguf is an image model (flux)" in done.stderr
    assert "paint-Q4_0.gguf" in done.stdout


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_resumes(
    download: Callable[..., Result], hub: Hub, tmp_path: Path, ending: signal.Signals
) -> None:
    hub.rate = 1 * MB
    command = [*_COMMAND, "download", f"{ONE}:Q8_0", "--env", str(tmp_path / "hub.env")]
    there = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    process = subprocess.Popen(command, env=there, stderr=subprocess.PIPE, text=True)
    eventually(
        lambda: any(p.stat().st_size > MB for p in tmp_path.rglob("*.incomplete")), within=60
    )
    process.send_signal(ending)
    _, err = process.communicate(timeout=30)
    if ending is signal.SIGINT:
        assert process.returncode == 130
        assert "resumes" in err
    hub.rate = None
    hub.asked.clear()
    assert download(f"{ONE}:Q8_0").exit_code == 0
    assert [asked.first > MB for asked in hub.asked] == [True]
