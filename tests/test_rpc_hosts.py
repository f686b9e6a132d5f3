"""Devices of other machines: `ggml-rpc-server`s that ssh starts on an sshd of the tests' own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest
from conftest import MARK, eventually, marked, unused_port
from ssh_machine import SshMachine, find_sshd, ssh_machine

from kitty_nb import ModelManager, ServerConfig, ServerStatus
from kitty_nb.engine import rpc
from kitty_nb.engine.rpc import with_workers
from kitty_nb.errors import ConfigError, ServerFailedError
from kitty_nb.network import LOOPBACK
from kitty_nb.supervisor.events import Activity, Event

# Listens where it is told, and answers nothing, as long as it lives.
STAND_IN = """
import socket, sys
one = socket.create_server(("127.0.0.1", int(sys.argv[-1])))
print("Starting", flush=True)
held = []
while True:
    held.append(one.accept())
    print("Accepted client connection", flush=True)
"""


@pytest.fixture
def there(tmp_path: Path) -> Iterator[SshMachine]:
    if find_sshd() is None:
        if os.environ.get("CI"):
            pytest.fail("there is no sshd")
        pytest.skip("needs sshd: apt-get install openssh-server")
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    with ssh_machine(
        tmp_path / "there", unused_port(), PATH=path, **{MARK: os.environ[MARK]}
    ) as machine:
        yield machine
        eventually(lambda: not workers())


@pytest.fixture
def lent(config: ServerConfig, there: SshMachine) -> ServerConfig:
    """Settings that borrow the devices of one machine twice."""
    hosts = [f"there:{unused_port()}" for _ in range(2)]
    return config.replace(ssh_config=there.client, rpc_hosts=hosts)


@pytest.fixture
def stood_in(lent: ServerConfig) -> ServerConfig:
    return lent.replace(rpc_command=(sys.executable, "-c", STAND_IN))


def workers() -> list[psutil.Process]:
    """The workers that the tests have started and that still run."""
    return [
        one
        for one in marked(os.environ[MARK])
        if one.info["name"] == "ggml-rpc-server" or STAND_IN in (one.info["cmdline"] or ())
    ]


def launch(config: ServerConfig, program: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        command = with_workers(config, (program,))
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def test_a_command_gets_the_addresses_of_its_workers(stood_in: ServerConfig) -> None:
    done = subprocess.run(
        with_workers(stood_in, ("echo", "more")), capture_output=True, text=True, check=True
    )
    at = r"127\.0\.0\.1:\d+"
    assert re.search(rf"^--rpc {at},{at} more$", done.stdout, re.MULTILINE), done.stdout
    eventually(lambda: not workers())


def test_without_a_worker_its_command_ends(stood_in: ServerConfig, tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.write_text("#!/bin/sh\nexec sleep 60\n")
    server.chmod(0o755)
    running = launch(stood_in, str(server), tmp_path / "log")
    try:
        eventually(lambda: running.poll() is None and b"sleep" in cmdline(running.pid))
        next(iter(workers())).kill()
        assert running.wait(60) == -signal.SIGABRT
        assert re.search(
            r"^kitty_nb: RPC worker there:\d+ ended", (tmp_path / "log").read_text(), re.MULTILINE
        )
        eventually(lambda: not workers())
    finally:
        running.kill()
        running.wait()


def test_without_its_command_no_worker_stays(stood_in: ServerConfig, tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.write_text("#!/bin/sh\nexec sleep 60\n")
    server.chmod(0o755)
    running = launch(stood_in, str(server), tmp_path / "log")
    eventually(lambda: b"sleep" in cmdline(running.pid) and len(workers()) == 2)
    running.kill()
    running.wait()
    eventually(lambda: not workers())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rpc_command": ["/nowhere/rpc"]}, "RPC worker there:[0-9]+ ended: .*/nowhere/rpc"),
        ({"rpc_command": ["false"]}, "RPC worker there:[0-9]+ ended"),
        ({"rpc_hosts": ["elsewhere.invalid"]}, r"RPC worker elsewhere\.invalid ended: .*resolve"),
    ],
)
def test_a_worker_that_does_not_start_is_named(
    stood_in: ServerConfig, change: dict[str, list[str]], said: str
) -> None:
    command = with_workers(stood_in.replace(**change), ("echo",))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(f"^kitty_nb: {said}", done.stdout, re.MULTILINE), done.stdout


def test_whoever_takes_the_port_first_gets_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the choice of a port and ssh's listening there, another user may take it."""
    monkeypatch.setattr(rpc, "_ANSWERS_WITHIN", 0.5)
    with socket.create_server((LOOPBACK, 0)) as stranger:
        port = stranger.getsockname()[1]
        with subprocess.Popen(["sleep", "60"]) as ssh:
            started = rpc._Started("there", ssh, port, threading.Event())
            assert "no answer" in str(rpc._why_silent(started, SimpleQueue(), os.getppid()))
            ssh.kill()
        started.accepted.set()
        mine = started._replace(program=psutil.Process())
        assert rpc._why_silent(mine, SimpleQueue(), os.getppid()) is None


def test_who_has_the_port_of_a_worker_gets_no_model(stood_in: ServerConfig, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        slow = f"sleep 1; exec {shlex.quote(sys.executable)} -c {shlex.quote(STAND_IN)} $4"
        config = stood_in.replace(
            rpc_hosts=[f"there:{other.getsockname()[1]}"], rpc_command=("sh", "-c", slow, "sh")
        )
        begun = tmp_path / "begun"
        done = subprocess.run(
            with_workers(config, ("touch", str(begun))), capture_output=True, text=True, check=False
        )
    assert "ended: OSError: [Errno 98] Address already in use" in done.stdout
    assert not begun.exists()


def test_wrong_machines_are_refused(config: ServerConfig) -> None:
    for wrong in ("-oProxyCommand=x", "red:port", "red;ls"):
        with pytest.raises(ConfigError, match="machines as ssh knows them"):
            config.replace(rpc_hosts=wrong)
    assert config.replace(rpc_hosts="red, me@green:50053").rpc_hosts == ("red", "me@green:50053")


def test_the_embedded_engine_borrows_nothing(config: ServerConfig) -> None:
    with (
        ModelManager(config=config.replace(rpc_hosts="red")) as manager,
        pytest.raises(
            ServerFailedError, match=r"embedded engine .* has no --rpc.* Set LLAMACPP_BIN"
        ),
    ):
        manager.start().wait(60)


@pytest.mark.native
def test_a_model_on_borrowed_devices(
    lent: ServerConfig, native_engine: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ggml-rpc-server").symlink_to(native_engine.with_name("ggml-rpc-server"))
    events: list[Event] = []
    config = lent.replace(binary=native_engine, restart_delay_seconds=0.1, stop_grace_seconds=3)
    with ModelManager(config=config) as manager:
        manager.subscribe(events.append)
        preview = manager.preview_memory().wait(60)
        pools = [one.pool.name for one in preview.allocations]
        names = tuple(f"RPC{number} ({host})" for number, host in enumerate(config.rpc_hosts))
        assert pools == ["RAM", *names], preview.problem
        manager.start().wait(90)
        assert str(manager.chat("Hello", max_tokens=4).wait(60))
        eventually(lambda: manager.state.devices == names)
        assert len(workers()) == 2
        workers()[0].kill()
        eventually(lambda: manager.state.restart_count == 1)
        eventually(lambda: manager.state.status is ServerStatus.READY)
        assert str(manager.chat("Hello", max_tokens=4).wait(60))
        said = [event.message for event in events if isinstance(event, Activity)]
        assert any(re.search(r"RPC worker there:\d+ ended", one) for one in said), said
        manager.stop().wait(30)
    eventually(lambda: not workers())


@pytest.mark.native
def test_two_ways_to_borrow_are_one_too_many(config: ServerConfig, native_engine: Path) -> None:
    both = config.replace(
        binary=native_engine, rpc_hosts="red", extra_args=["--rpc", "127.0.0.1:1"]
    )
    with (
        ModelManager(config=both) as manager,
        pytest.raises(ServerFailedError, match="has --rpc, and LLAMACPP_RPC_HOSTS is set"),
    ):
        manager.start().wait(60)


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
