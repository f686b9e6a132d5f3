"""A profile on another machine, which is an sshd of the tests' own on loopback."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import MARK, eventually
from other_kernel import runs
from ssh_machine import SshMachine, find_sshd, ssh_machine

from kitty_nb import ModelManager, ServerConfig, ServerStatus
from kitty_nb.config import Places, as_written
from kitty_nb.errors import (
    ConfigError,
    OutOfReachError,
    PortBusyError,
    ServerCrashedError,
    WillNotFitError,
)
from kitty_nb.remote.connection import explain
from kitty_nb.supervisor.events import Activity, Event, LogLines, ProgressMade
from kitty_nb.supervisor.registry import find_server

READY, STOPPED, LOST = ServerStatus.READY, ServerStatus.STOPPED, ServerStatus.OUT_OF_REACH
KITTY = str(Path(sys.executable).with_name("kitty-nb"))


@pytest.fixture(scope="session")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshMachine]:
    if find_sshd() is None:
        if os.environ.get("CI"):
            pytest.fail("there is no sshd")
        pytest.skip("needs sshd: apt-get install openssh-server")
    folder = tmp_path_factory.mktemp("there")
    with ssh_machine(folder, **{MARK: os.environ[MARK], "OMP_WAIT_POLICY": "passive"}) as machine:
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
        assert any("model loaded" in line for line in manager.log_lines)
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
        assert any("The server there goes on." in message for message in told)
        assert any(message == "Reached there again." for message in told)
        manager.stop().wait(60)
    assert not runs(pid)


def test_what_waits_fails_at_once_when_the_connection_breaks(
    misbehaving: Callable[..., ServerConfig], remote: ServerConfig, there: SshMachine
) -> None:
    slow = misbehaving("--load-seconds", "3").replace(ssh=remote.ssh, ssh_config=remote.ssh_config)
    with ModelManager(config=slow) as manager:
        starting = manager.start()
        eventually(lambda: manager.state.pid)
        pid = manager.state.pid
        there.cut()
        began = time.monotonic()
        with pytest.raises(OutOfReachError, match="The connection to there ended"):
            starting.wait(10)
        assert time.monotonic() - began < 5
        eventually(lambda: manager.state.status is READY)
        assert manager.state.pid == pid
        manager.stop().wait(60)


def test_a_machine_that_is_gone_is_a_sentence_and_found_when_it_is_back(
    remote: ServerConfig, tmp_path: Path
) -> None:
    with ssh_machine(tmp_path / "other") as there:
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


def test_a_server_there_is_adopted_and_outlives_this_kernel(remote: ServerConfig) -> None:
    first = ModelManager(config=remote)
    pid = first.start().wait(60).pid
    first._supervisor.detach()
    first.close()
    assert pid
    assert runs(pid)
    with ModelManager(config=remote) as second:
        assert (second.state.status, second.state.pid) == (READY, pid)
        assert second.reveal_api_key()
        eventually(lambda: any("model loaded" in line for line in second.log_lines))
        assert second.start(second.state.config).wait(60).pid == pid
        second.stop().wait(60)


def test_a_cancelled_start_stops_its_server_there(
    misbehaving: Callable[..., ServerConfig], remote: ServerConfig
) -> None:
    slow = misbehaving("--load-seconds", "60").replace(ssh=remote.ssh, ssh_config=remote.ssh_config)
    with ModelManager(config=slow) as manager:
        starting = manager.start()
        eventually(lambda: manager.state.pid)
        starting.cancel()
        eventually(lambda: manager.state.status is STOPPED)


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


def test_a_busy_port_there_offers_another(remote: ServerConfig) -> None:
    import socket  # noqa: PLC0415

    with socket.socket() as other, ModelManager(config=remote) as manager:
        other.bind(("127.0.0.1", remote.port))
        other.listen()
        with pytest.raises(PortBusyError) as refused:
            manager.start().wait(60)
        assert refused.value.free_port


@pytest.mark.parametrize(
    ("code", "said", "sentence"),
    [
        (255, "Host key verification failed.", "Run `ssh red` once and compare"),
        (255, "me@red: Permission denied (publickey,password).", "ssh-copy-id red"),
        (255, "ssh: Could not resolve hostname red: Name or service not known", "no host red"),
        (255, "ssh: connect to host red port 22: Connection timed out", "red does not answer"),
        (127, "", "red has no kitty-nb"),
        (2, "Error: No such command 'serve'.", "red has an older kitty_nb"),
        (None, "", "The connection to red ended."),
    ],
)
def test_why_a_machine_is_out_of_reach(code: int | None, said: str, sentence: str) -> None:
    assert sentence in explain("red", code, (said,))


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
