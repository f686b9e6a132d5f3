"""A profile on another machine, which is an sshd of the tests' own on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import psutil
import pytest
from conftest import MARK, eventually, unused_port
from other_kernel import runs
from ssh_machine import SshMachine, find_sshd, ssh_machine
from terminal import run

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerStatus
from kitty_nb.config.profiles import Places, as_written
from kitty_nb.errors import (
    ConfigError,
    ExperimentError,
    OutOfReachError,
    PortBusyError,
    ServerCrashedError,
    ServerFailedError,
    WillNotFitError,
)
from kitty_nb.experiments import record_run
from kitty_nb.remote.connection import explain
from kitty_nb.remote.protocol import (
    ANSWERS,
    EVENTS,
    PROTOCOL,
    WINDOW,
    Command,
    Snapshot,
    Verb,
    dump,
    line,
    load,
    parse,
)
from kitty_nb.remote.serve import Outbox
from kitty_nb.remote.supervisor import RemoteSupervisor
from kitty_nb.supervisor.events import (
    Activity,
    Event,
    HealthCheckResult,
    LoadProgress,
    LogLines,
    ProgressMade,
    ServerState,
    Stage,
    StateChanged,
    Work,
)
from kitty_nb.supervisor.port_owner import PortOwner
from kitty_nb.supervisor.registry import find_server

READY, STOPPED, LOST = ServerStatus.READY, ServerStatus.STOPPED, ServerStatus.OUT_OF_REACH
HELLO = f"""echo '["hello",{PROTOCOL},{{"version":"0","now":1}}]'"""
KITTY = str(Path(sys.executable).with_name("kitty-nb"))


@pytest.fixture(autouse=True)
def entered_once_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager waits for its first connection: on a cold machine that takes long."""
    monkeypatch.setattr("kitty_nb.remote.supervisor._ENTERED_WITHIN", 60.0)


@pytest.fixture(scope="session")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshMachine]:
    if find_sshd() is None:
        if os.environ.get("CI"):
            pytest.fail("there is no sshd")
        pytest.skip("needs sshd: apt-get install openssh-server")
    folder = tmp_path_factory.mktemp("there")
    with ssh_machine(
        folder, unused_port(), **{MARK: os.environ[MARK], "OMP_WAIT_POLICY": "passive"}
    ) as machine:
        yield machine


@pytest.fixture
def remote(config: ServerConfig, there: SshMachine, tmp_path: Path) -> Iterator[ServerConfig]:
    """The real engine on the demo model, over ssh; what it leaves running is stopped."""
    assert config.model
    folder = tmp_path / "far models"
    folder.mkdir()
    shutil.copy(config.model, folder / "demo.gguf")
    yield config.replace(
        ssh="there",
        ssh_config=there.client,
        models_dir=folder,
        model="demo.gguf",
        allow_absolute_paths=False,
    )
    if record := find_server(config):
        psutil.Process(record.pid).kill()
        eventually(lambda: not runs(record.pid))


def env_file(config: ServerConfig, folder: Path) -> Path:
    env = folder / "remote.env"
    env.write_text(
        f"LLAMACPP_PRIMARY_SSH={config.ssh}\nLLAMACPP_SSH_CONFIG={config.ssh_config}\n"
        f"LLAMACPP_MODELS_DIR={config.models_dir}\nLLAMACPP_PRIMARY_MODEL=demo.gguf\n"
        f"LLAMACPP_PORT={config.port}\nLLAMACPP_LOG_DIR={config.log_dir}\n"
        f"LLAMACPP_HISTORY={config.history}\nLLAMACPP_CTX=512\nLLAMACPP_THREADS=1\n"
        "LLAMACPP_PARALLEL=1\n"
    )
    return env


def test_a_server_elsewhere_is_started_watched_asked_and_stopped_as_one_here(
    remote: ServerConfig,
) -> None:
    heard: list[Event] = []
    with ModelManager(config=remote) as manager:
        assert manager.state.status is STOPPED
        manager.subscribe(heard.append)
        checks: list[int] = []
        state = manager.start(on_progress=lambda _, attempt, __: checks.append(attempt)).wait(60)
        assert state.status is READY
        assert state.pid
        assert runs(state.pid)
        assert state.uptime is not None
        assert 0 <= state.uptime < 60
        assert checks
        assert f"on {remote.ssh}" in state.sentence
        assert state.config.model == remote.models_dir / "demo.gguf"
        assert state.config.ssh == "there"
        with pytest.raises(ExperimentError, match="Do it on there, or without LLAMACPP_SSH"):
            record_run(manager, "Who are you?")
        # Not the server's own port, which here is taken by the server itself.
        assert state.endpoint != remote.endpoint
        assert manager.chat("hello", max_tokens=4).wait(60).text
        key = manager.reveal_api_key()
        assert key
        record = find_server(remote)
        assert record
        assert record.api_key
        assert key == record.api_key.get_secret_value()
        assert key not in repr(heard)
        eventually(lambda: any("model loaded" in line for line in manager.log_lines))
        assert any(isinstance(event, LogLines) for event in heard)
        fractions = [one.progress.fraction for one in heard if isinstance(one, ProgressMade)]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        use = manager.memory_use().wait(60)
        assert use
        assert use.resident > 1_000_000
        assert manager.check_health().wait(60).status is READY
        assert manager.preview_memory().wait(60).allocations
        assert manager.stop().wait(60).status is STOPPED
    assert not runs(state.pid)


@pytest.mark.slow
def test_nobody_sees_a_key_or_a_setting_in_a_list_of_processes(remote: ServerConfig) -> None:
    with ModelManager(config=remote.replace(api_key="sk-of-mine")) as manager:
        manager.start().wait(60)
        assert manager.reveal_api_key() == "sk-of-mine"
        seen = [one.info["cmdline"] or [] for one in psutil.process_iter(["cmdline"])]
        assert not any("sk-of-mine" in word for words in seen for word in words)
        manager.stop().wait(60)


def test_a_broken_connection_leaves_the_server_and_is_made_again(
    remote: ServerConfig, there: SshMachine
) -> None:
    heard: list[Event] = []
    with ModelManager(config=remote) as manager:
        pid = manager.start().wait(60).pid
        assert pid
        endpoint = manager.state.endpoint
        manager.subscribe(heard.append)
        assert there.cut()
        eventually(lambda: any(LOST.value in str(event) for event in heard))
        eventually(lambda: manager.state.status is READY)
        assert manager.state.pid == pid
        assert manager.state.endpoint == endpoint
        assert manager.chat("hello", max_tokens=2).wait(60).text
        told = [event.message for event in heard if isinstance(event, Activity)]
        assert any("does not stop the server there." in message for message in told)
        assert any(message == "Reached there again." for message in told)
        manager.stop().wait(60)
    assert not runs(pid)


def test_what_waits_fails_at_once_when_the_connection_breaks(
    misbehaving: Callable[..., ServerConfig], remote: ServerConfig, there: SshMachine
) -> None:
    slow = misbehaving("--load-seconds", "2").replace(ssh=remote.ssh, ssh_config=remote.ssh_config)
    with ModelManager(config=slow) as manager:
        starting = manager.start()
        eventually(lambda: manager.state.pid)
        pid = manager.state.pid
        server = psutil.Process(pid)
        server.suspend()  # it loads for as long as it takes to cut
        try:
            there.cut()
            began = time.monotonic()
            with pytest.raises(OutOfReachError, match="The connection to there ended"):
                starting.wait(10)
            assert time.monotonic() - began < 5
        finally:
            server.resume()
        eventually(lambda: manager.state.status is READY)
        assert manager.state.pid == pid
        manager.stop().wait(60)


@pytest.mark.slow
def test_a_machine_that_is_gone_is_a_sentence_and_found_when_it_is_back(
    remote: ServerConfig, tmp_path: Path
) -> None:
    with ssh_machine(tmp_path / "other", unused_port()) as there:
        there.stop()
        began = time.monotonic()
        with ModelManager(config=remote.replace(ssh_config=there.client)) as manager:
            assert time.monotonic() - began < 10
            assert manager.state.status is LOST
            assert manager.state.error == (
                "there refuses the connection. Check that sshd runs there."
            )
            with pytest.raises(OutOfReachError, match="refuses the connection"):
                manager.start().wait(10)
            with pytest.raises(OutOfReachError):
                manager.chat("hello")
            assert manager.preview_memory().wait(10).problem
            assert manager.memory_use().wait(10) is None
            there.start()
            eventually(lambda: manager.state.status is STOPPED)


@pytest.mark.slow
def test_a_server_that_ends_meanwhile_is_told(remote: ServerConfig, tmp_path: Path) -> None:
    heard: list[Event] = []
    with (
        ssh_machine(tmp_path / "other", unused_port()) as there,
        ModelManager(config=remote.replace(ssh_config=there.client)) as manager,
    ):
        pid = manager.start().wait(60).pid
        assert pid
        manager.subscribe(heard.append)
        there.stop()
        try:
            eventually(lambda: manager.state.status is LOST)
            psutil.Process(pid).kill()
            eventually(lambda: not runs(pid))
        finally:
            there.start()
        eventually(lambda: manager.state.status is STOPPED)
        told = [event.message for event in heard if isinstance(event, Activity)]
        assert any("exited meanwhile" in message for message in told)


@pytest.mark.slow
def test_a_server_there_is_adopted_and_outlives_this_kernel(remote: ServerConfig) -> None:
    first = ModelManager(config=remote)
    pid = first.start().wait(60).pid
    first._supervisor.detach()
    first.close()
    assert pid
    assert runs(pid)
    with ModelManager(config=remote) as second:
        eventually(lambda: second.state.status is READY)
        assert second.state.pid == pid
        assert second.reveal_api_key()
        eventually(lambda: any("model loaded" in line for line in second.log_lines))
        assert second.start(second.state.config).wait(60).pid == pid
        second.stop().wait(60)


@pytest.mark.slow
def test_a_cancelled_start_stops_its_server_there(
    misbehaving: Callable[..., ServerConfig], remote: ServerConfig
) -> None:
    slow = misbehaving("--load-seconds", "60").replace(ssh=remote.ssh, ssh_config=remote.ssh_config)
    with ModelManager(config=slow) as manager:
        starting = manager.start()
        eventually(lambda: manager.state.pid)
        starting.cancel()
        eventually(lambda: manager.state.status is STOPPED)


@pytest.mark.slow
def test_errors_are_those_of_a_server_here(
    misbehaving: Callable[..., ServerConfig], remote: ServerConfig
) -> None:
    def there(config: ServerConfig) -> ServerConfig:
        return config.replace(ssh=remote.ssh, ssh_config=remote.ssh_config)

    with ModelManager(config=remote) as manager:
        with pytest.raises(ConfigError, match=re.escape(str(remote.models_dir))):
            manager.switch_model("missing.gguf").wait(60)
        endless = remote.replace(context_size=2**40)
        with pytest.raises(WillNotFitError, match="Not enough memory"):
            manager.start(endless).wait(60)
        crashing = misbehaving("--exit-after", "0", "--exit-code", "3", restart_max=0)
        with pytest.raises(ServerCrashedError):
            manager.start(there(crashing)).wait(60)


@pytest.mark.slow
def test_a_busy_port_there_offers_another(remote: ServerConfig) -> None:
    with socket.socket() as other, ModelManager(config=remote) as manager:
        other.bind(("127.0.0.1", remote.port))
        other.listen()
        with pytest.raises(PortBusyError) as refused:
            manager.start().wait(60)
        assert refused.value.free_port


@pytest.mark.slow
def test_the_command_line_works_on_the_other_machine(remote: ServerConfig, tmp_path: Path) -> None:
    env = env_file(remote, tmp_path)

    def kitty(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [KITTY, *words, "--env", str(env)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "No server is running" in kitty("status", code=3)
    assert "demo.gguf" in kitty("scan")
    told = kitty("start")
    assert f"READY: demo at {remote.endpoint} on there (PID" in told
    assert (
        f"ssh -F {remote.ssh_config} -N -L 127.0.0.1:{remote.port}:127.0.0.1:{remote.port} there"
        in told
    )
    record = find_server(remote)
    assert record
    assert record.api_key
    facts = json.loads(kitty("status", "--json"))
    assert (facts["status"], facts["machine"], facts["pid"]) == ("READY", "there", record.pid)
    assert facts["memory"]["ram"] > 1_000_000
    assert kitty("key").strip() == record.api_key.get_secret_value()
    assert "model loaded" in kitty("logs")
    assert "ssh -F" in kitty("connect", "openai")
    assert "ready" in kitty("wait-ready").lower()
    assert "It was already running." in kitty("start")
    assert "ssh there" in kitty("prompts", code=1)
    assert f"Stopped the server (PID {record.pid})." in kitty("stop")
    assert "model loaded" in kitty("logs", "-n", "100")


@pytest.mark.parametrize(("word", "said"), [("status", "No server is running"), ("scan", "demo")])
def test_a_command_waits_for_a_machine_that_connects_slowly(
    fake: Callable[[str], ServerConfig],
    remote: ServerConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    word: str,
    said: str,
) -> None:
    env = env_file(remote, tmp_path)
    slow = fake(f'sleep 0.5; exec {KITTY} "$@"')
    with env.open("a") as file:
        file.write(f"LLAMACPP_SSH_BIN={slow.ssh_bin}\n")
    monkeypatch.setattr("kitty_nb.remote.supervisor._ENTERED_WITHIN", 0.1)
    assert said in run(word, "--env", env).output


def test_the_panel_lists_and_serves_the_models_of_the_other_machine(
    remote: ServerConfig, there: SshMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = env_file(remote, tmp_path)
    shutil.copy(remote.models_dir / "demo.gguf", remote.models_dir / "other.gguf")

    def look(*_: object) -> None:
        pytest.fail("a local file was looked at")

    monkeypatch.setattr("kitty_nb.widgets.control_panel.ensure_models_dir", look)
    monkeypatch.setattr("kitty_nb.catalog.catalog._describe", look)
    monkeypatch.setattr("kitty_nb.catalog.catalog.files_in", look)
    monkeypatch.setattr("kitty_nb.supervisor.forecast.free_memory", look)
    panel = ControlPanel(env)
    try:
        eventually(lambda: panel.picker.model)
        assert panel.picker.model
        assert panel.picker.model.path == remote.models_dir / "demo.gguf"
        both = ["demo.gguf", "other.gguf"]
        eventually(lambda: [model.name for model in panel.picker.models] == both)
        eventually(lambda: panel.memory.preview and panel.memory.preview.allocations)
        panel.buttons.start.click()
        eventually(lambda: "Ready" in panel.status_line.value)
        assert "on there" in panel.status_line.value
        assert panel.load_bar.layout.display == "none"
        assert panel.buttons.restart.layout.display == "none"  # the settings are the server's
        panel.ask.ask("hello")
        eventually(lambda: panel.ask.turns and panel.ask.turns[0].text)
        assert there.cut()
        eventually(lambda: "keeps trying to connect" in panel.status_line.value)
        assert panel.buttons.stop.disabled
        assert panel.memory.layout.display == "none"
        eventually(lambda: "Ready" in panel.status_line.value)
        eventually(lambda: any("model loaded" in line for line in panel.server_log.lines))
        (remote.models_dir / "other.gguf").rename(remote.models_dir / "another.gguf")
        eventually(lambda: "another.gguf" in [model.name for model in panel.picker.models])
        panel.picker.choose(remote.models_dir / "another.gguf")
        panel.settings.save.click()
        assert "LLAMACPP_PRIMARY_MODEL=another.gguf\n" in env.read_text()
        panel.buttons.stop.click()
        eventually(lambda: "Not running" in panel.status_line.value)
    finally:
        panel.close()


@pytest.fixture
def fake(there: SshMachine, tmp_path: Path) -> Callable[[str], ServerConfig]:
    """A profile whose machine runs a script in the place of kitty-nb."""

    def make(script: str) -> ServerConfig:
        program = tmp_path / "a kitty-nb"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return ServerConfig(ssh="there", ssh_config=there.client, ssh_bin=str(program))

    return make


def why(config: ServerConfig) -> str:
    with ModelManager(config=config) as manager:
        assert manager.state.status is LOST
        return manager.state.error or ""


def test_another_version_there_is_a_sentence(fake: Callable[[str], ServerConfig]) -> None:
    said = why(fake("""echo '["hello",99,{"version":"9.9","now":1}]'; sleep 5"""))
    assert said.startswith("there has kitty_nb 9.9 (protocol 99), this machine ")
    assert said.endswith("Install the same version on both.")


@pytest.mark.slow
def test_what_start_files_print_is_passed_over(
    fake: Callable[[str], ServerConfig], remote: ServerConfig
) -> None:
    long = "head -c 3000000 /dev/zero | tr '\\0' x >&2"
    noisy = fake(f"""{long}; echo Welcome; echo '[1]'; exec {KITTY} "$@" """)
    with ModelManager(config=remote.replace(ssh_bin=noisy.ssh_bin)) as manager:
        assert manager.state.status is STOPPED


def test_a_machine_that_prints_without_an_end_is_given_up(
    fake: Callable[[str], ServerConfig],
) -> None:
    endless = fake("head -c 200000 /dev/zero; cat > /dev/null")
    with ModelManager(config=endless) as manager:
        ended = "The connection to there ended"
        eventually(lambda: ended in (manager.state.error or ""), within=20)


def test_a_refusal_there_is_the_reason(remote: ServerConfig, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    assert f"Other users can write to {folder}" in why(remote.replace(log_dir=folder))


def test_settings_for_another_machine_are_refused(
    remote: ServerConfig, config: ServerConfig
) -> None:
    with (
        ModelManager(config=config) as manager,
        pytest.raises(ServerFailedError, match=r"are for there, but .* run on this machine"),
    ):
        manager.start(remote).wait(60)
    with (
        ModelManager(config=remote) as manager,
        pytest.raises(ServerFailedError, match=r"are for elsewhere, but .* run on there"),
    ):
        manager.start(remote.replace(ssh="elsewhere")).wait(60)


@pytest.mark.slow
def test_a_server_there_may_listen_on_an_address_of_ipv6(remote: ServerConfig) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    with ModelManager(config=remote.replace(host="::1")) as manager:
        manager.start().wait(60)
        assert manager.chat("hello", max_tokens=2).wait(60).text
        manager.stop().wait(60)


def test_a_call_and_its_cancellation_may_come_together(config: ServerConfig) -> None:
    """As of somebody who changes his mind at once."""
    config.log_path.parent.mkdir(parents=True, exist_ok=True)
    config.log_path.write_text("a line\n")
    commands = (
        Command(verb=Verb.OPEN, config=config),
        Command(verb=Verb.LOG, follow=True),
        Command(verb=Verb.LOG),
    )
    calls = [line("do", number, dump(one, Command)) for number, one in enumerate(commands)]
    calls.insert(2, line("cancel", 1))
    with subprocess.Popen(
        [KITTY, "serve", "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as far:
        assert far.stdin
        assert far.stdout
        far.stdin.write(b"".join(calls))
        far.stdin.flush()
        while (found := parse(far.stdout.readline()))[:2] != ("answer", 2):
            if found[0] == "told":
                far.stdin.write(line("heard", found[1]))
                far.stdin.flush()
        with config.log_path.open("a") as log:
            log.write("another line\n")
        told: list[tuple[str, Any, Any]] = []
        while sum(kind == "told" for kind, _, _ in told) < 2:  # it would have been told, too
            told.append(parse(far.stdout.readline()))
            if told[-1][0] == "told":
                far.stdin.write(line("heard", told[-1][1]))
                far.stdin.flush()
        far.stdin.close()
    assert not any(kind == "step" and "another line" in data for kind, _, data in told)


def test_a_restart_survives_the_end_of_its_connection(
    misbehaving: Callable[..., ServerConfig], tmp_path: Path
) -> None:
    """As when the lid closes right after the click: the old server takes half a second to stop."""
    config = misbehaving("--tidy-up", str(tmp_path / "tidied"))
    other = config.replace(context_size=1024)
    commands = (
        Command(verb=Verb.OPEN, config=config),
        Command(verb=Verb.START, config=config),
        Command(verb=Verb.RESTART, config=other, wait=False),
    )
    with subprocess.Popen(
        [KITTY, "serve", "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as far:
        assert far.stdin
        assert far.stdout
        for number, command in enumerate(commands):
            far.stdin.write(line("do", number, dump(command, Command)))
            far.stdin.flush()
            while (found := parse(far.stdout.readline()))[:2] != ("answer", number):
                if found[0] == "told":
                    far.stdin.write(line("heard", found[1]))
                    far.stdin.flush()
        far.stdin.close()
    record = find_server(other)
    assert record
    psutil.Process(record.pid).kill()
    assert record.config.context_size == 1024


class Line:
    """A connection that can be opened, but carries no more commands."""

    hello = SimpleNamespace(boot="")

    async def forward(self, *_: object) -> int:
        return 1

    async def send(self, _: bytes) -> None:
        raise OutOfReachError("The connection to there ended.")


@pytest.mark.parametrize("status", [ServerStatus.STARTING, ServerStatus.LOADING])
def test_the_log_of_a_load_is_whole_after_a_new_connection(
    config: ServerConfig, status: ServerStatus
) -> None:
    async def reconnect() -> None:
        supervisor = RemoteSupervisor(config.replace(ssh="there"))
        shown: list[tuple[str, ...]] = []
        supervisor.subscribe(lambda event: shown.append(supervisor.log_lines))
        state = ServerState(status, config, 5)
        snapshot = Snapshot(state, None, Work(), (), ("one", "two"), (), (), "")
        await supervisor._opened(Line(), snapshot)  # type: ignore[arg-type]
        assert set(shown) == {("one", "two")}
        await supervisor._note(Line(), StateChanged(replace(state, status=READY)))  # type: ignore[arg-type]
        assert supervisor.log_lines
        begun = StateChanged(replace(state, status=ServerStatus.STARTING))
        await supervisor._note(Line(), begun)  # type: ignore[arg-type]
        assert shown[-1] == supervisor.log_lines == ()

    anyio.run(reconnect)


def test_a_line_that_breaks_at_a_check_of_health_is_its_result(config: ServerConfig) -> None:
    async def check() -> HealthCheckResult:
        supervisor = RemoteSupervisor(config.replace(ssh="there"))
        supervisor._connection = Line()  # type: ignore[assignment]
        return await supervisor.check_health()

    found = anyio.run(check)
    assert (found.status, found.message) == (LOST, "The connection to there ended.")


def test_lines_that_are_none_of_the_protocol_end_in_a_sentence(
    fake: Callable[[str], ServerConfig],
) -> None:
    nested = f"{HELLO}; printf '[%.0s' $(seq 100000); echo; sleep 5"
    assert "a message that this version of kitty_nb can't parse" in why(fake(nested))


def test_a_temporary_folder_of_any_name_will_do_and_none_is_a_sentence(
    fake: Callable[[str], ServerConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = fake(f"{HELLO}; sleep 0.1; echo we met >&2")
    for name in ("100%h", "x" * 100):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        assert "ended: we met" in why(config)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert "This machine can't connect to there" in why(config)


def test_a_machine_without_kitty_nb_is_a_sentence(there: SshMachine, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    said = why(ServerConfig(ssh="there", ssh_config=there.client, ssh_bin=missing))
    assert said.startswith("there has no kitty-nb")


def test_an_unknown_host_key_is_never_accepted(there: SshMachine, tmp_path: Path) -> None:
    client = tmp_path / "ssh_config"
    mine = there.client.read_text()
    known = mine.replace(str(there.folder / "known_hosts"), str(tmp_path / "known"))
    client.write_text(f"{known}  StrictHostKeyChecking no\n")
    said = why(ServerConfig(ssh="there", ssh_config=client))
    assert "The host key of there is unknown" in said
    assert not (tmp_path / "known").exists()


def test_a_machine_that_wants_a_password_is_a_sentence(there: SshMachine, tmp_path: Path) -> None:
    client, other = tmp_path / "ssh_config", tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    client.write_text(there.client.read_text().replace(str(there.folder / "user"), str(other)))
    assert "ssh-copy-id there" in why(ServerConfig(ssh="there", ssh_config=client))


@pytest.mark.slow
def test_kitty_nb_is_installed_where_it_is_found(
    there: SshMachine, remote: ServerConfig, tmp_path: Path
) -> None:
    with ssh_machine(tmp_path / "bare", unused_port(), PATH="/usr/bin:/bin", REAL=KITTY) as bare:
        config = remote.replace(ssh_config=bare.client)
        assert "kitty-nb install-remote" in why(config)
        env = env_file(config, tmp_path)
        wheel = tmp_path / "kitty_nb-0.1.0-py3-none-any.whl"
        about = "kitty_nb-0.1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as file:  # one that runs the real one
            code = "import os, sys\ndef main(): os.execv(os.environ['REAL'], sys.argv)\n"
            file.writestr("kitty_stand_in.py", code)
            file.writestr(
                f"{about}/METADATA", "Metadata-Version: 2.1\nName: kitty_nb\nVersion: 0.1.0\n"
            )
            file.writestr(
                f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            file.writestr(
                f"{about}/entry_points.txt", "[console_scripts]\nkitty-nb = kitty_stand_in:main\n"
            )
            file.writestr(f"{about}/RECORD", "")
        command = [KITTY, "install-remote", str(wheel), "--env", str(env)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        with ModelManager(config=config) as manager:
            assert manager.state.status is STOPPED


@pytest.mark.slow
def test_a_machine_that_freezes_is_given_up_and_found_again(
    remote: ServerConfig, there: SshMachine
) -> None:
    with ModelManager(config=remote) as manager:
        pid = manager.start().wait(60).pid
        frozen = there.sessions()
        for one in frozen:
            one.suspend()
        try:
            began = time.monotonic()
            eventually(lambda: manager.state.status is LOST)
            assert time.monotonic() - began < 20
            with pytest.raises(OutOfReachError):
                manager.chat("hello")
        finally:
            for one in frozen:
                one.resume()
        eventually(lambda: manager.state.status is READY)
        assert manager.state.pid == pid
        manager.stop().wait(60)


def test_a_state_and_every_event_can_be_sent(config: ServerConfig) -> None:
    state = ServerState(READY, config, 5, external=PortOwner(1, 2, "llama-server"))
    assert load(dump(StateChanged(state), StateChanged), StateChanged).state == state
    for kind in (*EVENTS.values(), *ANSWERS.values()):
        with pytest.raises(ValueError, match="validation error"):
            load(object(), kind)


def test_on_a_slow_line_newer_facts_take_the_place_of_older_ones() -> None:
    async def flood() -> list[tuple[str, Any, Any]]:
        receive, send = os.pipe()
        os.set_blocking(send, False)
        outbox = Outbox(send)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outbox.run)
            for batch in range(2 * WINDOW):  # nobody reads them
                outbox.put_event(Activity.now(f"batch {batch}"))
                await anyio.sleep(0.05)
            for step in range(5_000):
                outbox.put_event(ProgressMade(LoadProgress(Stage.LOADING, step / 5_000, step)))
                outbox.put_event(LogLines((f"line {step}",)))
            await anyio.sleep(0.1)
            sent = [parse(one) for one in os.read(receive, 1 << 20).splitlines()]
            assert sum(kind == "told" for kind, _, _ in sent) == WINDOW
            outbox.heard(WINDOW)
            await anyio.wait_readable(receive)
            await anyio.sleep(0.1)
            rest = [parse(one) for one in os.read(receive, 1 << 20).splitlines()]
            tasks.cancel_scope.cancel()
        os.close(receive)
        os.close(send)
        return rest

    found = anyio.run(flood)
    progress = [data["progress"] for _, name, data in found if name == "ProgressMade"]
    assert [one["elapsed"] for one in progress] == [4_999]
    lines = [line for _, name, data in found if name == "LogLines" for line in data["lines"]]
    assert lines == [f"line {step}" for step in range(5_000)]


@pytest.mark.parametrize(
    ("code", "said", "sentence"),
    [
        (255, "Host key verification failed.", "Run `ssh red` once and compare"),
        (255, "me@red: Permission denied (publickey,password).", "ssh-copy-id red"),
        (255, "me@red: Permission denied (publickey).", "(publickey). Check the user"),
        (255, "sh: 3: /root/x: Permission denied", "red ended: sh: 3"),
        (255, "ssh: Could not resolve hostname jump: Try again", "hostname jump: Try again. Check"),
        (255, "channel 0: open failed: connect failed: Connection refused", "jump host of red"),
        (255, "ssh: connect to host red port 22: Connection timed out", "red does not answer"),
        (255, "Timeout, server red not responding.", "red does not answer"),
        (127, "", "red has no kitty-nb"),
        (126, "sh: 1: exec: /opt/kitty-nb: Permission denied", "red ended: sh: 1: exec"),
        (2, "Error: No such command 'serve'.", "red has an older kitty_nb"),
        (None, "", "The connection to red ended."),
    ],
)
def test_why_a_machine_is_out_of_reach(code: int | None, said: str, sentence: str) -> None:
    of_a_tunnel = "channel 2: open failed: connect failed: Connection refused"
    assert sentence in explain("red", code, (of_a_tunnel, said) if said else ())


def test_paths_are_those_of_the_other_machine(tmp_path: Path) -> None:
    env = tmp_path / "my.env"
    env.write_text(
        "LLAMACPP_SSH=red\nLLAMACPP_MODELS_DIR=~/models\nLLAMACPP_MODEL=big/m.gguf\n"
        "LLAMACPP_SSH_CONFIG=mine\n"
    )
    config = ServerConfig.from_env(env)
    assert config.model == Path("big/m.gguf")
    assert config.ssh_config == tmp_path / "mine"
    home = Path("/home/red")
    places = Places(
        home=home, models_dir=home / "m", log_dir=home / "l", history=home / "h", binary=home / "b"
    )
    there = places.settle(config)
    assert there.models_dir == home / "models"
    assert there.model == home / "models" / "big" / "m.gguf"
    assert (there.log_dir, there.history, there.binary) == (home / "l", home / "h", home / "b")
    assert as_written(there).model == Path("big/m.gguf")
    assert places.settle(there) == there


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "a b", "red;ls", "$(ls)", ""])
def test_a_destination_is_no_option_and_no_command(host: str) -> None:
    with pytest.raises(ConfigError):
        ServerConfig(ssh=host)
