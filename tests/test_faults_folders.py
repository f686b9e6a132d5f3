"""Faults of what is written: records, locks, logs and the folders. On the real engine,
unless only the stand-in can produce it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import eventually
from faults import CRASHED, FAILED, LOADING, READY, STOPPED, Case, Fault

from kitty_nb import ServerConfig
from kitty_nb.errors import ConfigError
from kitty_nb.supervisor import registry
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.registry import ServerRecord, record_path, write_record
from kitty_nb.supervisor.sidecar import has_sidecar

Strike = Callable[[Case], object]


def folder_below_a_file(case: Case) -> None:
    (case.folder / "file").touch()
    case.change(log_dir=case.folder / "file" / "logs")


def folder_is_a_file(case: Case) -> None:
    (case.folder / "file").touch()
    case.change(log_dir=case.folder / "file")


def record_is_a_folder(case: Case) -> None:
    path = record_path(case.config)
    path.mkdir(parents=True)
    case.heal.callback(shutil.rmtree, path)


def record(text: str) -> Any:
    def put(case: Case) -> None:
        case.config.log_dir.mkdir()
        record_path(case.config).write_text(text)

    return put


def record_of(process: subprocess.Popen[bytes], case: Case, **changes: Any) -> None:
    created = ServerProcess(process.pid, None).create_time
    ours = ServerRecord(pid=process.pid, create_time=created, began=0.0, config=case.config)
    case.config.log_dir.mkdir()
    write_record(ours.model_copy(update=changes))


def stranger(case: Case) -> subprocess.Popen[bytes]:
    """A process that must survive whatever a record says of it."""
    command = [sys.executable, "-c", "input()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def survived() -> None:
        assert process.poll() is None
        process.communicate(b"\n")

    case.heal.callback(survived)
    return process


def stale_record(case: Case) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ended:
        record_of(ended, case)
        ended.communicate(b"\n")


def reused_pid(case: Case) -> None:
    record_of(stranger(case), case, create_time=1.0)


def record_of_another_boot(case: Case) -> None:
    record_of(stranger(case), case, boot="another")
    os.utime(record_path(case.config), (0, 0))


def stale_lock(case: Case) -> None:
    code = (
        "import fcntl, os, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX);"
        " os.kill(os.getpid(), 9)"
    )
    case.config.log_dir.mkdir()
    lock = case.config.log_dir / "primary.lock"
    subprocess.run([sys.executable, "-c", code, lock], check=False)
    assert lock.exists()


def held_lock(case: Case) -> None:
    case.config.log_dir.mkdir()
    file = case.heal.enter_context((case.config.log_dir / "primary.lock").open("a"))
    fcntl.flock(file, fcntl.LOCK_EX)


def damaged_history(case: Case) -> None:
    case.config.history.write_bytes(b"no database")


def unmount_models(case: Case) -> None:
    folder = case.model.parent
    away = folder.rename(case.folder / "elsewhere")
    case.heal.callback(away.rename, folder)


def restart_unmounted(case: Case) -> None:
    unmount_models(case)
    with pytest.raises(ConfigError, match="no such file"):
        case.manager.restart().wait(10)


def from_env(case: Case) -> None:
    env = case.folder / ".env"
    env.write_text(
        f"LLAMACPP_MODELS_DIR=models\nLLAMACPP_PRIMARY_MODEL=m.gguf\nLLAMACPP_CTX=512\n"
        f"LLAMACPP_PORT={case.config.port}\nLLAMACPP_LOG_DIR={case.config.log_dir}\n"
        f"LLAMACPP_HISTORY={case.config.history}\nLLAMACPP_THREADS=1\n"
    )
    case.config = ServerConfig.from_env(env)


def restart_without_env(case: Case) -> None:
    (case.folder / ".env").unlink()
    case.manager.restart().wait(10)


def restart_without_engine(case: Case) -> None:
    (case.folder / "llama-server").unlink()
    case.manager.restart()


def own_engine(case: Case) -> None:
    copy = shutil.copy(case.stand_in, case.folder / "llama-server")
    case.change(binary=Path(copy))


def lose_folder(case: Case) -> None:
    def gone() -> bool:
        shutil.rmtree(case.config.log_dir, ignore_errors=True)
        return not case.config.log_dir.exists()

    eventually(gone)  # a sidecar that starts just then makes its lock there


def lose_folder_and_die(case: Case) -> None:
    lose_folder(case)
    case.signal(signal.SIGKILL)


def damage_record_and_die(case: Case) -> None:
    record_path(case.config).write_text("{")
    case.signal(signal.SIGKILL)


def replace_record_and_die(case: Case) -> None:
    """As another machine does that shares the folder but not its locks."""
    path = record_path(case.config)
    ours = ServerRecord.model_validate_json(path.read_bytes())
    write_record(ours.model_copy(update={"boot": "another", "pid": 1}))
    os.utime(path, (0, 0))
    case.signal(signal.SIGKILL)
    case.heal.callback(eventually, lambda: not has_sidecar(case.config.log_path))


def flood(case: Case) -> None:
    """For 5 s the server answers, and what shows it needs no more memory than before."""
    case.heal.callback(case.config.log_path.unlink)
    before, end = psutil.Process().memory_info().rss, time.monotonic() + 5
    while time.monotonic() < end:
        began = time.monotonic()
        assert case.manager.check_health().wait(5).status is READY
        assert time.monotonic() - began < 3
        time.sleep(0.5)
    assert case.config.log_path.stat().st_size > 5 * 100_000 * 10 / 2  # a busy machine is slower
    assert psutil.Process().memory_info().rss - before < 50_000_000
    assert len(case.manager.log_lines) <= 2_000


def empty_log(case: Case) -> None:
    """One that needs seconds to be as long again: a late reader would not see the cut."""
    eventually(lambda: case.config.log_path.stat().st_size > 5_000)
    os.truncate(case.config.log_path, 0)


def lose_log(case: Case) -> None:
    """The open log fails, as on a network drive that is gone."""
    reading, writing = os.pipe()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if descriptor.readlink() == case.config.log_path:
                os.dup2(reading, int(descriptor.name))
    os.close(reading)
    os.close(writing)


def stop_without_folder(case: Case) -> None:
    """The folder fails, in a way that root's rights don't heal."""
    away = case.config.log_dir.rename(case.folder / "elsewhere")
    case.config.log_dir.symlink_to("x" * 300)
    case.heal.callback(away.rename, case.config.log_dir)
    case.heal.callback(case.config.log_dir.unlink)
    case.manager.stop().wait(10)


def blurt(content: bytes) -> Strike:
    def put(case: Case) -> None:
        words = case.folder / "words"
        words.write_bytes(content)
        case.change(extra_args=("--blurt", str(words)))

    return put


def fill_log_disk(case: Case) -> None:
    """The real engine, all whose output meets a full disk."""
    engine = f"exec '{sys.executable}' -P -m kitty_nb.engine.embedded"
    program = case.folder / "llama-server"
    asked = f'case "$1" in --help|--version) {engine} "$@";; esac'
    program.write_text(f'#!/bin/sh\n{asked}\n{engine} "$@" >/dev/full 2>&1\n')
    program.chmod(0o755)
    case.change(binary=program)


def fill_disk(case: Case) -> None:
    patch = case.heal.enter_context(pytest.MonkeyPatch.context())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(case.config.log_dir))

    patch.setattr(registry, "write_atomic", refuse)


def forbidden_folder(case: Case) -> None:
    """One that nobody may write to, or with root's rights one that the system keeps to itself."""
    folder = case.folder / "forbidden"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        folder = Path("/sys")
        if not folder.is_dir():
            pytest.skip("root may write anywhere here")
    case.change(log_dir=folder / "kitty_nb")


STATE = [
    Fault(
        "state folder that cannot be written",
        FAILED,
        "create or write to the log folder .*",
        before=forbidden_folder,
    ),
    Fault(
        "state folder below a file",
        FAILED,
        "create or write to the log folder .*file/logs",
        before=folder_below_a_file,
    ),
    Fault(
        "state folder is a file", FAILED, "is a file, but must be a folder", before=folder_is_a_file
    ),
    Fault(
        "record that cannot be written",
        FAILED,
        "primary.server.json is a folder",
        before=record_is_a_folder,
    ),
    *(
        Fault(f"corrupted record {text[:12]!r}", READY, "Server starting", before=record(text))
        for text in ("", "{", "[]", '{"pid": 1}', "\x00" * 100)
    ),
    Fault("record of a server that has died", READY, "Server starting", before=stale_record),
    Fault("record whose pid is another's", READY, "Server starting", before=reused_pid),
    Fault("record of before the reboot", READY, "Server starting", before=record_of_another_boot),
    Fault("lock whose holder was killed", READY, "Server starting", before=stale_lock),
    Fault("lock that another program holds", FAILED, "started elsewhere", before=held_lock),
    Fault("damaged history", READY, "load history .* is da", before=damaged_history),
]


LOG = [
    Fault(
        "100,000 log lines a second for 5 s",
        READY,
        "chatter",
        flags=("--chatter", "100000"),
        at=READY,
        strike=flood,
        changes={"log_max_mb": 1000},
    ),
    Fault(
        "log line of 1 MB without an end",
        READY,
        "x{1000}",
        before=blurt(b"x" * 1_000_000),
        flags=(),
    ),
    Fault(
        "log that is no UTF-8",
        READY,
        "caf\N{REPLACEMENT CHARACTER}",
        before=blurt(b"caf\xe9\n\xff\xfe\x80\n"),
        flags=(),
    ),
    Fault(
        "NUL, escapes and markup in the log",
        READY,
        "<script>",
        before=blurt(b'\0\x1b[31m<script>\r\n{"type":"log"\n{}\n'),
        flags=(),
    ),
    Fault(
        "log deleted while ready",
        READY,
        at=READY,
        strike=lambda case: case.config.log_path.unlink(),
    ),
    Fault(
        "log emptied while ready",
        READY,
        "log was rotated",
        flags=("--chatter", "100"),
        at=READY,
        strike=empty_log,
    ),
    Fault("log that fails while ready", READY, "Can't read the log", at=READY, strike=lose_log),
    Fault("log disk full", READY, "Model loaded", before=fill_log_disk),
]
FOLDERS = [
    Fault("disk full at the start", FAILED, "disk that holds .* is full", before=fill_disk),
    Fault(
        "disk full while loading",
        READY,
        r"Can't write to .*\(No space left",
        flags=("--prepare-seconds", "5"),
        at=LOADING,
        strike=fill_disk,
        within=20,
    ),
    Fault(
        "state folder deleted while loading",
        READY,
        r"Can't write to .*\(No such file",
        flags=("--prepare-seconds", "5"),
        at=LOADING,
        strike=lose_folder,
        within=20,
    ),
    Fault(
        "state folder deleted while ready", CRASHED, "SIGKILL", at=READY, strike=lose_folder_and_die
    ),
    Fault("record damaged while ready", CRASHED, "SIGKILL", at=READY, strike=damage_record_and_die),
    Fault(
        "record replaced by another machine while ready",
        CRASHED,
        "SIGKILL",
        at=READY,
        strike=replace_record_and_die,
    ),
    Fault("state folder fails while ready", STOPPED, at=READY, strike=stop_without_folder),
    Fault("models folder unmounted while ready", READY, at=READY, strike=unmount_models),
    Fault("restart without the models folder", READY, at=READY, strike=restart_unmounted),
    Fault("restart without .env", READY, before=from_env, at=READY, strike=restart_without_env),
    Fault(
        "restart without the engine",
        FAILED,
        "no such file",
        flags=(),
        before=own_engine,
        at=READY,
        strike=restart_without_engine,
    ),
]


@pytest.mark.parametrize("fault", [*STATE, *LOG, *FOLDERS], ids=lambda fault: fault.name)
def test_what_is_wrong_with_files_is_told_and_survived(
    fault: Fault, config: ServerConfig, tmp_path: Path, stand_in: Path
) -> None:
    pytest.importorskip("xllamacpp")
    fault.check(config, tmp_path, stand_in)
