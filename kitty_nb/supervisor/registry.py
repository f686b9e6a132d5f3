"""The registry of running servers, by profile: records, start locks and last failures."""

from __future__ import annotations

import fcntl
import platform
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kitty_nb.config import SHOW_SECRETS, Secret, ServerConfig
from kitty_nb.errors import KittyError, ServerFailedError
from kitty_nb.safe_files import distrust, write_atomic
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.sidecar import (
    MARK,
    RECORD,
    failure_path,
    find_marked,
    has_sidecar,
    withdraw,
    withdrawn_path,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


# Seconds after an announcement: by the first, a spawned process shows its mark, even on a busy
# machine; from the second on, the announcement is void.
_MARKED_WITHIN, _SPAWNED_WITHIN = 3.0, 60.0
_ATTENDED_WITHIN = 10.0  # seconds after a server was recorded; by then, its sidecar has its lock
_PIDS = Path("/proc/self/ns/pid")  # pid_namespaces(7)
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # random(4)


def this_boot() -> str:
    """Return the id of this machine's current boot; empty if the system doesn't tell."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""  # macOS dates a process by the time of day, which no other boot repeats


def this_container() -> str:
    """Return the id of the PID namespace, of which each container has its own; may be empty."""
    try:
        return str(_PIDS.readlink())
    except OSError:
        return ""


class ServerRecord(BaseModel):
    """A server that was started for a profile."""

    model_config = ConfigDict(frozen=True)

    pid: int = 0  # its process; 0 while it is only announced, because it is about to be spawned
    create_time: float = 0.0  # when that process began; see `ServerProcess`
    # The boot of the system that it belongs to, if the system tells.
    boot: str = Field(default_factory=this_boot)
    container: str = Field(default_factory=this_container)  # where its PID is valid
    host: str = Field(default_factory=platform.node)  # the machine's name, for people
    # When its start was requested, in seconds of the monotonic clock, which all processes of one
    # boot share and nobody can set.
    began: float
    ready: float | None = None  # when it became ready, likewise; None before
    # The same moment, in seconds since the epoch: the other clock stands still while the machine
    # sleeps.
    ready_at: float | None = None
    load_seconds: float | None = None  # seconds of the load; None before it was ready
    api_key: Secret | None = None  # the key that it requires of clients; None if it requires none
    crashes: int = 0  # how many crashes in a row were retried before this start
    idle_seconds: int = 0  # how long it may be unused before its sidecar stops it; 0 for no limit
    # The devices other than the CPU that can hold the model; None while nobody has asked.
    devices: tuple[str, ...] | None = None
    # What its kept prompts depend on; None if it keeps none.
    prompts: dict[str, str] | None = None
    config: ServerConfig  # what it was started with

    @property
    def local(self) -> bool:
        """True if its PID is valid here; otherwise another machine or container wrote it."""
        return (self.boot, self.container) == (this_boot(), this_container())

    def names(self, process: ServerProcess) -> bool:
        """Return whether it is the record of this process."""
        same = (self.pid, self.create_time) == (process.pid, process.create_time)
        return same and self.local

    def of(self, process: ServerProcess) -> Self:
        """Return the record with this process in it."""
        return self.model_copy(update={"pid": process.pid, "create_time": process.create_time})


def record_path(config: ServerConfig) -> Path:
    """Return the path of a profile's record while its server is meant to run."""
    return config.log_dir / f"{config.profile}{RECORD}"


def read_record(config: ServerConfig) -> ServerRecord | None:
    """Return the record of a profile, or None if there is none that can be trusted."""
    record = _read(record_path(config))
    return record if record and record.pid else None


def refuse_open_folder(config: ServerConfig) -> None:
    """Reject a log folder whose records and logs may be another user's.

    Raises:
        ServerFailedError: It belongs to another user, or others can write there.
    """
    if reason := distrust(config.log_dir) or distrust(record_path(config)):
        raise ServerFailedError(
            f"{reason} The server records in {config.log_dir} cannot be trusted and are ignored."
            " Set LLAMACPP_LOG_DIR to a folder that only you can write to."
        )


def find_server(config: ServerConfig) -> ServerRecord | None:
    """Return the record of a profile's server if it runs and, once ready, listens."""
    record = _find(record_path(config))
    process = record and process_of(record)
    if not record or not process:
        return None
    silent = record.ready is not None and process.listens_on(record.config.port) is False
    return None if silent else record


def mark_of(record: ServerRecord) -> dict[str, str]:
    """Return the mark in a server's environment by which it is found before its pid is recorded."""
    return {MARK: f"{record_path(record.config)} {record.began!r}"}


def _find(path: Path) -> ServerRecord | None:
    """Read a record, and complete it if the program was killed while it spawned the server."""
    record = _read(path)
    if record is None or record.pid or not record.local:
        return record
    if process := find_marked(mark_of(record)[MARK]):
        record = record.of(process)
        with suppress(OSError):
            write_record(record)
        return record
    with suppress(OSError):
        if _age(path) > _SPAWNED_WITHIN:
            path.unlink()
    return None


def _age(path: Path) -> float:
    """Return the seconds since a file was written."""
    return time.time() - path.stat().st_mtime


def may_show_soon(config: ServerConfig) -> bool:
    """Return whether a server that does not show its mark yet may just have been spawned.

    Call this while holding the profile's lock: whoever announced the server was killed then.
    """
    path = record_path(config)
    with suppress(OSError):
        return _find(path) is None and _age(path) < _MARKED_WITHIN
    return False


def withdrawn_record(config: ServerConfig) -> ServerRecord | None:
    """Return the record of a profile's server that is being stopped; it may have exited."""
    return _read(withdrawn_path(record_path(config)))


def record_of(pid: int, folder: Path) -> ServerRecord | None:
    """Return the record of the server that is this process or its wrapper, for any profile."""
    with suppress(OSError):  # an unreadable folder has none
        for record in filter(None, map(_find, folder.glob(f"*{RECORD}"))):
            if (process := process_of(record)) and process.includes(pid):
                return record
    return None


def process_of(record: ServerRecord) -> ServerProcess | None:
    """Return the process that a record is about, if it still runs."""
    return ServerProcess.attach(record.pid, record.create_time) if record.local else None


def served_elsewhere(config: ServerConfig) -> str | None:
    """Return that a profile's server may run on another machine or in another container, if so.

    Nobody here sees its process, but while it runs, its sidecar holds a lock in the shared folder.
    """
    record, recent = _read(record_path(config)), False
    if record is None or record.local:
        return None
    with suppress(OSError):
        recent = _age(record_path(config)) < _ATTENDED_WITHIN
    if not recent and not has_sidecar(config.log_path):
        return None
    return (
        f"Profile {config.profile!r} is already served by another machine or container,"
        f" {record.host}, which has the same log folder. Stop the server there, or set"
        f" LLAMACPP_LOG_DIR to a folder other than {config.log_dir}."
    )


def _read(path: Path) -> ServerRecord | None:
    if distrust(path):
        return None
    try:
        return ServerRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, KittyError):
        return None


def write_record(record: ServerRecord) -> None:
    """Write the record completely or not at all, readable only by its owner.

    Raises:
        OSError: The folder can't be written to.
    """
    path = record_path(record.config)
    write_atomic(path, record.model_dump_json(context=SHOW_SECRETS).encode(), durable=False)
    failure_path(path).unlink(missing_ok=True)


def complete_record(record: ServerRecord) -> None:
    """Rewrite a server's record with more in it; one that is withdrawn meanwhile stays withdrawn.

    Raises:
        OSError: The folder can't be written to.
    """
    write_record(record)
    leaving = withdrawn_record(record.config)
    if leaving and (leaving.pid, leaving.create_time) == (record.pid, record.create_time):
        withdraw(record_path(record.config))


def withdraw_record(config: ServerConfig, process: ServerProcess) -> None:
    """Withdraw the record of this process, which marks its exit as intended."""
    path = record_path(config)
    record = _read(path)
    with suppress(OSError):  # the folder may be what is wrong
        damaged = record is None and path.is_file()
        if damaged or (record and record.names(process)):
            withdraw(path)


def forget_withdrawn(config: ServerConfig, process: ServerProcess) -> None:
    """Delete the withdrawn record of this process, which has exited."""
    path = withdrawn_path(record_path(config))
    record = _read(path)
    if record is None or record.names(process):
        with suppress(OSError):
            path.unlink()


def withdraw_crashed(config: ServerConfig) -> None:
    """Withdraw the record of a server that exited on its own, so that no program restarts it."""
    if read_record(config) is None:
        return
    path = record_path(config)
    with suppress(OSError, ServerFailedError), profile_lock(config) as ours:
        record = read_record(config)
        if ours and record and record.local and not process_of(record):
            path.unlink()
            failure_path(path).unlink(missing_ok=True)


def was_stopped(config: ServerConfig, process: ServerProcess) -> bool:
    """Return whether somebody has withdrawn the record of this process in order to stop it.

    The record of a process that exited on its own stays until the next start or stop, for all who
    watch. A record that is damaged, or was lost with its folder, does not count as withdrawn.
    """
    if record := _read(record_path(config)):  # or the announcement of its successor
        return record.local and not record.names(process)
    return _lacks_record(config)


def will_not_restart(config: ServerConfig) -> bool:
    """Return whether a server that has crashed was stopped: a failed start leaves its reason."""
    return _lacks_record(config) and last_failure(config) is None


def _lacks_record(config: ServerConfig) -> bool:
    with suppress(OSError):
        return config.log_dir.is_dir() and not record_path(config).exists()
    return False


def note_failure(config: ServerConfig, reason: str) -> None:
    """Keep the reason until the next start, or until the server is stopped."""
    path = failure_path(record_path(config))
    with suppress(OSError):  # the folder may be what is wrong
        if not distrust(path.parent) and not distrust(path):
            path.write_text(reason, encoding="utf-8")


def last_failure(config: ServerConfig) -> str | None:
    """Return why the last server failed; None if it did not, or this user did not start it."""
    path = failure_path(record_path(config))
    with suppress(OSError, UnicodeDecodeError):
        return None if distrust(path) else path.read_text(encoding="utf-8")
    return None


@contextmanager
def profile_lock(config: ServerConfig) -> Iterator[bool]:
    """Hold the right to start this profile's server; yield False if another program has it.

    The system releases it when its holder exits, in whatever way, so it can't become stale.

    Raises:
        ServerFailedError: Others can write to the folder.
        OSError: It can't be written to.
    """
    config.log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_open_folder(config)
    with (config.log_dir / f"{config.profile}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            for unfinished in config.log_dir.glob(f".{record_path(config).name}.*"):
                unfinished.unlink(missing_ok=True)  # of a program killed while it wrote the record
            yield True


def who_owns(config: ServerConfig, locked: bool) -> str | None:
    """Return who prevents the start of a profile's server, with the remedy; None if nobody does.

    `locked` is whether we hold the profile's lock. Run it in a worker thread.
    """
    remedy = "Wait for it, or stop it."
    record = _find(record_path(config))
    if record and process_of(record):
        with suppress(psutil.Error):
            server = f"{psutil.Process(record.pid).name()} (PID {record.pid})"
            already = f"Profile {config.profile!r} is already served by {server}"
            return f"{already}, started elsewhere. {remedy}"
    if locked:
        return served_elsewhere(config)
    starter = "by another program or notebook"
    return f"Profile {config.profile!r} is being started elsewhere, {starter}. {remedy}"
