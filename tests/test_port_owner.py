from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import eventually

from kitty_nb import ModelManager, ServerConfig
from kitty_nb.engine import embedded
from kitty_nb.engine.locate import EngineKind
from kitty_nb.errors import PortBusyError, ServerFailedError
from kitty_nb.supervisor.port_owner import (
    PortOwner,
    bind_problem,
    next_free_port,
    owner_of,
    port_refusal,
    refuse_busy_port,
)

LISTEN = "import socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); input()"


def has_ipv6() -> bool:
    return bind_problem("::1", 0) is None


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def listening(host: str, *, dual_stack: bool = False) -> Iterator[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, dualstack_ipv6=dual_stack) as server:
        yield server.getsockname()[1]


def test_the_embedded_server_is_told_with_its_model_and_alias(
    demo_model: Path, free_port: int
) -> None:
    command = (sys.executable, "-P", "-m", embedded.__name__, "--port", str(free_port))
    with running(
        *command, "--model", str(demo_model), "--alias", "kitty", "--api-key", "secret"
    ) as server:
        eventually(lambda: owner_of("127.0.0.1", free_port))

        owner = owner_of("127.0.0.1", free_port)
        assert owner
        assert (owner.pid, owner.engine) == (server.pid, EngineKind.EMBEDDED)
        assert owner.sentence == (
            f"Port {free_port} is in use by the embedded llama-server (PID {server.pid})"
            " serving demo.gguf as kitty."
        )
        assert "secret" not in repr(owner)
    assert owner_of("127.0.0.1", free_port) is None


def test_a_llama_server_is_told_by_its_program(tmp_path: Path, free_port: int) -> None:
    program = tmp_path / "llama-server"
    program.symlink_to(Path(sys.executable).resolve())
    script = (str(program), "-ISc", LISTEN, str(free_port))
    with running(*script, "--api-key", "secret", "-m", "/m/qwen.gguf", "-a", "main") as server:
        eventually(lambda: owner_of("127.0.0.1", free_port))

        owner = owner_of("127.0.0.1", free_port)
        assert owner == PortOwner(
            free_port, server.pid, "llama-server", EngineKind.NATIVE, "qwen.gguf", "main"
        )
        assert port_refusal("127.0.0.1", free_port) == (
            f"Port {free_port} on 127.0.0.1 is in use by llama-server (PID {server.pid})"
            " serving qwen.gguf as main."
        )


@pytest.mark.parametrize(
    ("flags", "environment", "unspoken", "sleeps"),
    [
        ((), {}, None, False),
        (("--api-prefix", "/api"), {}, "--api-prefix", False),
        (("--ssl_key_file", "k.pem"), {}, "--ssl-key-file", False),
        ((), {"LLAMA_ARG_SSL_CERT_FILE": "c.pem"}, "--ssl-cert-file", False),
        (("--sleep_idle_seconds", "5"), {}, None, True),
        ((), {"LLAMA_ARG_SLEEP_IDLE_SECONDS": "5"}, None, True),
        (("--sleep-idle-seconds", "-1"), {"LLAMA_ARG_SLEEP_IDLE_SECONDS": "5"}, None, False),
    ],
)
def test_how_a_llama_server_is_to_be_treated_is_told_by_its_flags(
    tmp_path: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    environment: dict[str, str],
    unspoken: str | None,
    sleeps: bool,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    program = tmp_path / "llama-server"
    program.symlink_to(Path(sys.executable).resolve())
    with running(str(program), "-ISc", LISTEN, str(free_port), *flags):
        eventually(lambda: owner_of("127.0.0.1", free_port))
        owner = owner_of("127.0.0.1", free_port)
        assert owner
        assert (owner.unspoken, owner.sleeps) == (unspoken, sleeps)
        assert owner.attachable is (unspoken is None)
        config = ServerConfig(port=free_port, log_dir=tmp_path, history=tmp_path / "history")
        if unspoken:
            with (
                ModelManager(config=config) as manager,
                pytest.raises(ServerFailedError, match=f"with {unspoken}, but .* plain HTTP"),
            ):
                manager.attach().wait(30)


def test_the_programs_own_flags_are_not_the_servers(free_port: int) -> None:
    script = (sys.executable, "-ISc", LISTEN, str(free_port), "-m", "/m/qwen.gguf")
    with running(*script) as server:
        eventually(lambda: owner_of("127.0.0.1", free_port))

        owner = owner_of("127.0.0.1", free_port)
        name = psutil.Process(server.pid).name()
        assert owner == PortOwner(free_port, server.pid, name)
        assert owner.sentence == f"Port {free_port} is in use by {name} (PID {server.pid})."


@pytest.mark.parametrize(
    ("held", "wanted"),
    [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")],
)
def test_a_listener_in_the_way_is_found(held: str, wanted: str) -> None:
    with listening(held) as port:
        owner = owner_of(wanted, port)

        assert owner
        assert owner.pid == os.getpid()
        if held == wanted or sys.platform == "linux":  # macOS lets one stand beside the other
            assert isinstance(problem := bind_problem(wanted, port), OSError)
            assert problem.errno == errno.EADDRINUSE


@needs_ipv6
@pytest.mark.parametrize(
    ("held", "dual_stack", "wanted", "in_the_way"),
    [
        ("::1", False, "::1", True),
        ("::1", False, "::", True),
        ("::1", False, "127.0.0.1", False),
        ("127.0.0.1", False, "::1", False),
        ("127.0.0.1", False, "::", True),
        ("::", True, "127.0.0.1", True),
        ("::", True, "::1", True),
    ],
)
def test_both_families_are_seen(held: str, dual_stack: bool, wanted: str, in_the_way: bool) -> None:
    with listening(held, dual_stack=dual_stack) as port:
        assert (owner_of(wanted, port) is not None) == in_the_way
        if held == wanted or sys.platform == "linux":
            assert (bind_problem(wanted, port) is not None) == in_the_way


def test_another_address_is_not_in_the_way() -> None:
    with listening("127.0.0.1") as port:
        assert owner_of("127.0.0.2", port) is None


def test_it_is_found_where_the_system_tells_only_of_own_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: str) -> None:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil, "net_connections", refuse)  # as macOS answers an ordinary user
    with listening("127.0.0.1") as port:
        owner = owner_of("127.0.0.1", port)

        assert owner
        assert owner.pid == os.getpid()


def test_a_process_that_ends_meanwhile_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening("127.0.0.1") as port:
        seen = [one for one in psutil.net_connections("tcp") if one.laddr.port == port]
    with running(sys.executable, "-ISc", "") as ended:
        ended.wait()
    stale = [one._replace(pid=ended.pid) for one in seen]
    monkeypatch.setattr(psutil, "net_connections", lambda _: stale)
    assert owner_of("127.0.0.1", port) is None


def test_the_next_free_port_is_one_that_can_be_bound() -> None:
    with listening("127.0.0.1") as first:
        taken = next_free_port("127.0.0.1", first)
        assert taken > first
        with socket.create_server(("127.0.0.1", taken)):
            free = next_free_port("127.0.0.1", first)

            assert free > taken
            assert bind_problem("127.0.0.1", free) is None


def test_above_the_last_port_a_usual_one_is_found() -> None:
    assert 1023 < next_free_port("127.0.0.1", 65535) < 65535


@pytest.mark.parametrize(
    ("host", "refusal"),
    [
        ("192.0.2.1", "192.0.2.1 is not an address of this machine"),
        ("no.such.host.invalid", "The host name no.such.host.invalid does not resolve"),
    ],
)
def test_an_address_elsewhere_is_refused(host: str, refusal: str, free_port: int) -> None:
    assert refusal in (port_refusal(host, free_port) or "")
    with pytest.raises(ServerFailedError, match="Cannot listen on"):
        next_free_port(host, free_port)


def test_a_free_port_is_not_refused(free_port: int) -> None:
    assert port_refusal("127.0.0.1", free_port) is None
    assert port_refusal("localhost", free_port) is None
    assert owner_of("127.0.0.1", free_port) is None


def test_a_port_for_administrators_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reserving(socket.socket):
        """A socket of a user who has no such port, which root's tests can't be."""

        def bind(self, address: tuple[str, int]) -> None:
            if address[1] < 1024:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Reserving)
    with pytest.raises(PortBusyError) as refused:
        refuse_busy_port(ServerConfig(port=80))
    assert re.fullmatch(
        "Port 80 is reserved for administrators; choose one above 1023. Set LLAMACPP_PRIMARY_PORT"
        r" to a free port, such as \d+\.",
        str(refused.value),
    )


def test_a_port_bound_without_listening_is_refused_too(free_port: int) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", free_port))
        assert "does not listen yet" in (port_refusal("127.0.0.1", free_port) or "")
