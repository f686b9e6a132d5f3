"""Files on a machine with several users: trust, kitty_nb's folders, atomic writes, databases."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import secrets
import sqlite3
import stat
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    T = TypeVar("T")

# For users without a home folder, as in containers: nothing can exist there.
NO_HOME = Path(os.devnull) / "no home folder"
_ROOT = Path("/")
_MAX_STEPS = 4096  # more than a path can have; circular links end there


def user_folder(find: Callable[[str], Path]) -> Path:
    """Return kitty_nb's folder, or one below `NO_HOME`.

    `find` is a function that returns a folder, such as `platformdirs.user_cache_path`.
    """
    try:
        return find("kitty_nb")
    except RuntimeError:
        return NO_HOME


def write_atomic(file: Path, content: bytes, *, durable: bool = True, private: bool = True) -> None:
    """Write a file completely or not at all.

    Args:
        file: The file.
        content: Its new content.
        durable: Whether it must survive a power cut, which takes the disk a while.
        private: Whether only its owner may read it; otherwise the umask decides.

    Raises:
        OSError: The file can't be written; it keeps its previous content.
    """
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise OSError(errno.EINVAL, "It is a device or a pipe", str(file))
    partial = file.with_name(f".{file.name}.{secrets.token_hex(8)}")  # nobody can put a link there
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    descriptor = os.open(partial, flags, 0o600 if private else 0o666)
    try:
        with os.fdopen(descriptor, "wb") as written:
            written.write(content)
            if durable:
                written.flush()
                os.fsync(written.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def distrust(file: Path, *, folders: bool = True) -> str | None:
    """Return why others may have changed a file or folder; None if only this user and root can.

    It need not exist. Others can write if everybody can, or a group that may have another member;
    in a sticky folder such as `/tmp` they can't touch what isn't theirs, so owners decide.

    Args:
        file: The file, or a folder whose contents are meant.
        folders: Whether to check the folders above it too: whoever can write there can replace it.
    """
    steps = tuple(_steps(file))
    ends = file.absolute(), steps[-1]
    for place in dict.fromkeys(steps if folders else ends):
        try:
            found = place.lstat()
        except OSError:  # what cannot be looked at cannot be read either
            continue
        # Root may have another number if a container maps users.
        if found.st_uid not in {os.getuid(), 0, _ROOT.stat().st_uid}:
            return f"{place} belongs to {_user(found.st_uid)}."
        if _open_to_others(found) and not (place not in ends and found.st_mode & stat.S_ISVTX):
            return f"Other users can write to {place} (mode {stat.S_IMODE(found.st_mode):04o})."
    return None


def _steps(file: Path) -> Iterator[Path]:
    """Yield the folders and links that lead to a file, even behind other links, and the file."""
    at, rest = _ROOT, [*reversed(file.absolute().parts)]
    for _ in range(_MAX_STEPS):
        if not rest:
            return
        step = Path(os.path.normpath(at / rest.pop()))
        yield step
        try:
            rest += reversed(step.readlink().parts)
        except OSError:  # no link
            at = step


def _open_to_others(found: os.stat_result) -> bool:
    if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
        return False  # everybody can write to a link or to /dev/null, which changes nothing
    everybody, group = found.st_mode & stat.S_IWOTH, found.st_mode & stat.S_IWGRP
    return bool(everybody or (group and _has_others(found.st_gid)))


def _has_others(group: int) -> bool:
    """Return whether a group may have members besides this user and root.

    Many users have a group of their own, with their name. Who is in another one is unknown if a
    directory service, such as SSSD, lists neither its users nor its groups.
    """
    users = {user.pw_uid: user.pw_gid == group for user in pwd.getpwall()}
    members, listed = {uid for uid, primary in users.items() if primary}, True
    with suppress(KeyError):
        found = grp.getgrgid(group)
        for name in found.gr_mem:
            with suppress(KeyError):
                members.add(pwd.getpwnam(name).pw_uid)
        listed = any(one.gr_gid == group for one in grp.getgrall())
        me = pwd.getpwuid(os.getuid())
        if me.pw_gid == group:
            listed = me.pw_name == found.gr_name or (listed and me.pw_uid in users)
    return not listed or bool(members - {os.getuid(), 0})


def _user(number: int) -> str:
    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"the user with the id {number}"


_BUSY_SECONDS = 0.5
_DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}
_complained: set[str] = set()


@dataclass(frozen=True, slots=True)
class Database:
    """A small SQLite file. If it can't be used, it complains once, and callers do without it."""

    path: Path  # the file; it and its folder are created when first used
    name: str  # its name in complaints, e.g. `The load history`
    without: str  # the end of a complaint: what to do, or what is lost without the file
    complain: Callable[[str], object]  # called with a complaint, on the thread that uses the file
    tables: tuple[str, ...]  # statements that prepare a new file, or one of an earlier version
    # The version of the tables. A file of a later version is left alone.
    version: int = 1
    # Whether people would miss it. If damaged, it is renamed rather than deleted.
    precious: bool = False

    def use(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Do some work in one transaction and return its result, or `otherwise` if that fails."""
        if self.path.is_relative_to(NO_HOME):
            return otherwise
        try:
            opened = self._identity()
            try:
                return self._transact(work)
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
                    raise
                self._begin_anew(opened)
                return self._transact(work)
        except (sqlite3.Error, OSError) as error:
            self._complain_once(f"cannot be used: {error}. {self.without}")
        return otherwise

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if reason := distrust(self.path, folders=False):
            raise PermissionError(reason.rstrip("."))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS)) as file:
            # Nobody misses the last row after a power cut, nor a cache that it damages.
            file.execute(f"PRAGMA synchronous = {'NORMAL' if self.precious else 'OFF'}")
            with file:
                if _version(file) < self.version:
                    file.execute("BEGIN IMMEDIATE")  # only one of several programs prepares it
                if _version(file) < self.version:
                    for statement in (*self.tables, f"PRAGMA user_version = {self.version}"):
                        file.execute(statement)
                if _version(file) > self.version:
                    raise sqlite3.NotSupportedError("a newer version of kitty_nb wrote it")
                return work(file)

    def _identity(self) -> tuple[int, int] | None:
        """Return the file's device and inode, if it exists: a new file of its name has others."""
        with suppress(OSError):
            found = self.path.stat()
            return found.st_dev, found.st_ino
        return None

    def _begin_anew(self, opened: tuple[int, int] | None) -> None:
        """Move a damaged file out of the way, along with what SQLite keeps beside it."""
        if opened != self._identity():  # another program has done so
            return
        kept = f"{self.path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}"
        for end in ("-journal", "-wal", "-shm", ""):
            part = self.path.with_name(self.path.name + end)
            with suppress(FileNotFoundError):
                part.replace(part.with_name(kept + end)) if self.precious else part.unlink()
        what = f"renamed to {kept}" if self.precious else "deleted"
        self._complain_once(f"is damaged. It was {what}, and an empty one was created.")

    def _complain_once(self, what: str) -> None:
        sentence = f"{self.name} {self.path} {what}"
        if sentence not in _complained:
            _complained.add(sentence)
            self.complain(sentence)


def _version(file: sqlite3.Connection) -> int:
    return int(file.execute("PRAGMA user_version").fetchone()[0])
