"""What another user of the machine leaves in our way is neither believed nor run."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import eventually
from typer.testing import CliRunner

from kitty_nb import ModelManager, ServerConfig, ServerStatus
from kitty_nb.cli import app
from kitty_nb.errors import PortBusyError, ServerFailedError
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.record import ServerRecord, find_server, write_record
from kitty_nb.supervisor.record_file import record_path

User = pwd.struct_passwd


@contextmanager
def job(user: User | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program that has nothing to do with us, and must survive."""
    whose = {"user": user.pw_uid, "group": user.pw_gid} if user else {}
    with subprocess.Popen(["sleep", "60"], start_new_session=True, **whose) as process:
        try:
            yield process
            assert process.poll() is None
        finally:
            process.kill()


def give(path: Path, user: User) -> None:
    os.chown(path, user.pw_uid, user.pw_gid)


def record_about(process: subprocess.Popen[bytes], config: ServerConfig) -> Path:
    config.log_dir.mkdir(exist_ok=True)
    created = ServerProcess(process.pid, None).create_time
    write_record(ServerRecord(pid=process.pid, create_time=created, began=0.0, config=config))
    return record_path(config)


def command(*words: str, config: ServerConfig) -> tuple[int, str]:
    env = config.log_dir.parent / "settings.env"
    env.write_text(f"LLAMACPP_LOG_DIR={config.log_dir}\nLLAMACPP_PORT={config.port}\n")
    result = CliRunner().invoke(app, [*words, "--env", str(env)])
    return result.exit_code, result.output


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_record_of_another_user_stops_nothing(
    config: ServerConfig, second_user: User, mode: int
) -> None:
    with job() as ours:
        give(record_about(ours, config), second_user)
        config.log_dir.chmod(mode)
        assert find_server(config) is None
        for verb in ("stop", "status", "logs"):
            code, said = command(verb, config=config)
            assert code == 1
            assert str(config.log_dir) in said.replace("\n", "")
            assert "LLAMACPP_LOG_DIR" in said


def test_a_record_of_ours_about_a_process_of_another_user_is_not_believed(
    config: ServerConfig, second_user: User
) -> None:
    with job(second_user) as theirs:
        record_about(theirs, config)
        assert find_server(config) is None
        assert command("stop", config=config)[0] == 0


@pytest.mark.parametrize(
    ("mode", "mine", "says"),
    [
        (0o777, True, r"Other users can write to .*logs \(mode 0777\)"),
        (0o1777, True, r"Other users can write to .*logs \(mode 1777\)"),
        (0o755, False, "logs belongs to the user kitty-test-"),
    ],
)
def test_nothing_is_started_into_a_folder_of_others(
    config: ServerConfig, second_user: User, tmp_path: Path, mode: int, mine: bool, says: str
) -> None:
    """In the folder lies the log already: a link of the other user to a file of ours."""
    mine_alone = tmp_path / "mine"
    mine_alone.write_text("precious\n")
    config.log_dir.mkdir()
    config.log_path.symlink_to(mine_alone)
    os.lchown(config.log_path, second_user.pw_uid, second_user.pw_gid)
    config.log_dir.chmod(mode)
    if not mine:
        give(config.log_dir, second_user)
    before = {path.name for path in config.log_dir.iterdir()}
    with ModelManager(config=config) as manager:
        with pytest.raises(ServerFailedError, match=says):
            manager.start().wait(30)
        assert {path.name for path in config.log_dir.iterdir()} == before
    assert mine_alone.read_text() == "precious\n"


def test_a_new_log_folder_is_for_its_owner_alone(misbehaving: Callable[..., ServerConfig]) -> None:
    config = misbehaving()
    with ModelManager(config=config) as manager:
        manager.start().wait(30)
    assert config.log_dir.stat().st_mode & 0o777 == 0o700


def test_the_server_of_another_user_is_not_attached_to(
    config: ServerConfig, second_user: User
) -> None:
    with socket.create_server((config.host, config.port)) as listening:
        theirs = subprocess.Popen(
            ["llama-server", "60"],
            executable="/bin/sleep",
            user=second_user.pw_uid,
            pass_fds=[listening.fileno()],
            start_new_session=True,
        )
    try:
        eventually(lambda: psutil.Process(theirs.pid).cmdline()[:1] == ["llama-server"])
        with ModelManager(config=config) as manager:
            with pytest.raises(PortBusyError, match=second_user.pw_name) as busy:
                manager.start().wait(30)
            assert not busy.value.attachable
            with pytest.raises(ServerFailedError, match=f"of the user {second_user.pw_name}"):
                manager.attach().wait(30)
            assert manager.state.status is ServerStatus.FAILED
        assert theirs.poll() is None
    finally:
        theirs.kill()
        theirs.wait()


def test_where_sockets_are_hidden_the_listeners_user_tells(second_user: User) -> None:
    def hide(*_: object) -> None:
        raise psutil.AccessDenied

    me = ServerProcess(os.getpid(), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil.Process, "net_connections", hide)
        with closing(socket.create_server(("127.0.0.1", 0))) as ours:
            assert me.listens_on(ours.getsockname()[1])
        os.seteuid(second_user.pw_uid)
        try:
            theirs = socket.create_server(("127.0.0.1", 0))
        finally:
            os.seteuid(0)
        with theirs:
            assert me.listens_on(theirs.getsockname()[1]) is False
