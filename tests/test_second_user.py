"""Files and processes of another user in our way are neither believed nor run."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import anyio
import platformdirs
import psutil
import pytest
from conftest import eventually
from terminal import run

from kitty_nb import ModelManager, ServerConfig, ServerStatus
from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import (
    ConfigError,
    EngineError,
    PortBusyError,
    ResultStoreError,
    ServerFailedError,
)
from kitty_nb.experiments.store import RowStore
from kitty_nb.safe_files import distrust
from kitty_nb.supervisor.history import LoadHistory
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.registry import ServerRecord, find_server, record_path, write_record

User = pwd.struct_passwd


@pytest.mark.parametrize(
    ("users_listed", "groups_listed", "primary", "name", "trusted"),
    [
        pytest.param(True, True, True, "users", True, id="one local user of a shared group"),
        pytest.param(True, True, True, "me", True, id="a group of one's own"),
        pytest.param(True, True, False, "staff", True, id="a local group that is empty"),
        pytest.param(False, True, True, "users", False, id="a directory's users, a local group"),
        pytest.param(False, False, True, "project", False, id="a directory's primary group"),
        pytest.param(False, False, True, "me", True, id="a directory's group of one's own"),
        pytest.param(True, False, False, "project", False, id="a directory's other group"),
    ],
)
def test_a_group_whose_members_a_directory_does_not_list_is_not_trusted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    users_listed: bool,
    groups_listed: bool,
    primary: bool,
    name: str,
    trusted: bool,
) -> None:
    env = tmp_path / ".env"
    env.touch()
    env.chmod(0o664)
    group = grp.struct_group((name, "x", env.stat().st_gid, []))
    number = group.gr_gid if primary else group.gr_gid + 1
    me = User(("me", "x", os.getuid(), number, "", "/home/me", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: me)
    monkeypatch.setattr(pwd, "getpwall", lambda: [me] if users_listed else [])
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)
    monkeypatch.setattr(grp, "getgrall", lambda: [group] if groups_listed else [])
    assert (distrust(env, folders=False) is None) == trusted


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
    result = run(*words, "--env", env)
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
            with pytest.raises(ServerFailedError, match=f"of user {second_user.pw_name}"):
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


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place to work: a folder of ours below one that everybody can write to, as in `/tmp`."""
    shared = tmp_path / "shared"
    (shared / "project").mkdir(parents=True)
    shared.chmod(0o1777)
    monkeypatch.chdir(shared / "project")
    return shared / "project"


def test_settings_of_another_user_are_not_taken_up_on_the_way_up(
    project: Path, second_user: User
) -> None:
    env = project.parent / ".env"
    env.write_text("LLAMACPP_BIN=/tmp/evil\n")
    assert ServerConfig.from_env().binary == Path("/tmp/evil")
    give(env, second_user)
    belongs = f"{env} belongs to the user {second_user.pw_name}"
    with pytest.raises(ConfigError, match=belongs):
        ServerConfig.from_env()
    result = run("status")
    assert result.exit_code == 1
    assert "belongs to the user" in result.output
    assert ServerConfig.from_env(env).binary == Path("/tmp/evil")  # named, it is vouched for
    (project / ".env").write_text("LLAMACPP_PORT=9000\n")  # the nearest counts
    assert ServerConfig.from_env().port == 9000


@pytest.mark.parametrize(
    ("place", "mode", "mine"),
    [
        ("shared", 0o777, True),
        ("shared/.env", 0o666, True),
        ("shared/project", 0o777, True),
        ("shared/project", 0o755, False),
    ],
)
def test_settings_that_another_user_could_write_are_not_taken_up(
    project: Path, second_user: User, place: str, mode: int, mine: bool
) -> None:
    env = (project if "project" in place else project.parent) / ".env"
    env.write_text("LLAMACPP_PORT=9000\n")
    assert ServerConfig.from_env().port == 9000
    spot = project.parents[1] / place
    spot.chmod(mode)
    if not mine:
        give(spot, second_user)
    with pytest.raises(ConfigError, match=str(spot)):
        ServerConfig.from_env()


def test_a_group_of_ones_own_is_no_other_user(project: Path, second_user: User) -> None:
    """As where everybody has a group to himself and files are made for user and group."""
    env = project / ".env"
    env.write_text("LLAMACPP_PORT=9000\n")
    env.chmod(0o664)
    assert ServerConfig.from_env().port == 9000
    os.chown(env, -1, second_user.pw_gid)
    with pytest.raises(ConfigError, match=r"Other users can write to .*\(mode 0664\)"):
        ServerConfig.from_env()


@pytest.mark.parametrize("place", ["llama-server", "", ".."])
@pytest.mark.parametrize("how", ["owner", "mode"])
def test_a_program_that_another_user_can_change_is_not_run(
    config: ServerConfig, tmp_path: Path, second_user: User, place: str, how: str
) -> None:
    folder = tmp_path / "builds" / "llama"
    folder.mkdir(parents=True)
    program, mark = folder / "llama-server", tmp_path / "ran"
    program.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    program.chmod(0o755)
    spot = Path(os.path.normpath(folder / place))
    if how == "owner":
        give(spot, second_user)
    else:
        spot.chmod(0o777)
    with ModelManager(config=config.replace(binary=program)) as manager:
        with pytest.raises(EngineError, match=f"{spot} ") as refused:
            anyio.run(locate_engine, program)
        assert "LLAMACPP_BIN" in str(refused.value)
        with pytest.raises(ServerFailedError, match=f"{spot} "):
            manager.start().wait(30)
    assert not mark.exists()


@pytest.mark.parametrize("link", ["folder", "program"])
def test_a_program_behind_a_link_that_others_can_change_is_not_run(
    tmp_path: Path, link: str
) -> None:
    (program := tmp_path / "build" / "llama-server").parent.mkdir()
    program.touch(mode=0o755)
    (shared := tmp_path / "shared").mkdir()
    (shared / "current").symlink_to(program if link == "program" else program.parent)
    named = tmp_path / "llama"
    named.symlink_to(Path("shared") / "current")
    shared.chmod(0o777)
    with pytest.raises(EngineError, match=f"Other users can write to {shared} "):
        anyio.run(locate_engine, named)
    shared.chmod(0o755)
    with pytest.raises(EngineError, match="printed no flags of a llama-server"):
        anyio.run(locate_engine, named)


def test_results_and_history_of_another_user_are_not_believed(
    config: ServerConfig, tmp_path: Path, second_user: User
) -> None:
    path = tmp_path / "sweep.journal"
    store = RowStore(path, "conditions")
    anyio.run(store.add)
    give(path, second_user)
    with pytest.raises(ResultStoreError, match=f"belongs to the user {second_user.pw_name}"):
        store.read()
    told: list[str] = []
    sqlite = tmp_path / "history.sqlite3"
    sqlite.touch()
    give(sqlite, second_user)
    history = LoadHistory(sqlite, told.append)
    assert anyio.run(history.recall, "host", "model") == ()
    assert second_user.pw_name in told[0]


def test_what_another_user_has_an_engine_say_is_neither_believed_nor_overwritten(
    second_user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, engine = tmp_path / "inside", tmp_path / "llama-server"
    inside.write_text("#!/bin/sh\necho '-m, --model FNAME  x'; echo 'version: 1 (true)'\n")
    engine.write_text(f'#!/bin/sh\nexec {inside} "$@"\n')
    for script in (inside, engine):
        script.chmod(0o755)
    anyio.run(locate_engine, engine)
    path = platformdirs.user_cache_path("kitty_nb") / "engines.sqlite3"
    path.write_bytes(path.read_bytes().replace(b"1 (true)", b"1 (fake)"))
    give(path, second_user)
    monkeypatch.setattr("kitty_nb.engine.locate._engines", {})  # as in another process
    try:
        before = path.read_bytes()
        assert anyio.run(locate_engine, engine).version == "1 (true)"
        assert path.read_bytes() == before
    finally:
        path.unlink()


def test_notebooks_of_another_user_are_not_opened(
    project: Path, second_user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "notebooks").mkdir()
    notebook = project / "notebooks" / "control_panel.ipynb"
    notebook.write_text("{}")
    give(notebook, second_user)
    result = run("lab", "--version")
    assert result.exit_code == 1
    assert f"belongs to the user {second_user.pw_name}" in result.output
