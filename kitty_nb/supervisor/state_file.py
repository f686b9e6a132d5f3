"""A SQLite file with what is remembered from one program to the next.

The file is a convenience: whatever is wrong with it costs what it remembers, never a load.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing, contextmanager, suppress
from threading import Event
from typing import TYPE_CHECKING, TypeVar

import anyio.to_thread

from kitty_nb.trust import distrust

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    T = TypeVar("T")

_BUSY_SECONDS = 0.2
_LOOK_AGAIN = 0.01  # seconds
_DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}

_told: set[str] = set()


@contextmanager
def opened(
    path: Path, tables: Iterable[str], version: int, patience: float
) -> Iterator[sqlite3.Connection]:
    """Open a SQLite file for one transaction, which ends with the block.

    Args:
        path: The file; it and its folder are made if they are missing.
        tables: One statement that makes each table, where it is not there.
        version: One higher whenever the tables are others.
        patience: Seconds to wait while another program holds the file.

    Raises:
        sqlite3.Error: It is damaged, locked or newer than this program.
        OSError: It cannot be written, or is another user's.
    """
    if reason := distrust(path, folders=False):
        raise PermissionError(reason.rstrip("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=patience)) as file:
        (found,) = file.execute("PRAGMA user_version").fetchone()
        if found > version:
            raise sqlite3.NotSupportedError("a newer version of kitty_nb has written it")
        if found < version:
            _write_ahead(file, patience)
            for table in tables:
                file.execute(table)
            file.execute(f"PRAGMA user_version = {version}")
        with file:
            yield file


def _write_ahead(file: sqlite3.Connection, patience: float) -> None:
    """Let readers and a writer not wait for each other.

    This turns a lock for reading into one for writing, and for that SQLite never waits by itself:
    two programs that do so at once would wait for each other.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            file.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline:
                raise
            Event().wait(_LOOK_AGAIN)
        else:
            return


class StateFile:
    """Lets work be done in the file. It never raises: it says once what is wrong.

    Args:
        path: The file; it and its folder are made when first needed.
        tables: One statement that makes each table, where it is not there.
        version: One higher whenever the tables are others.
        tell: Called, on the event loop, with a sentence about what is wrong with the file.
    """

    def __init__(
        self, path: Path, tables: tuple[str, ...], version: int, tell: Callable[[str], None]
    ) -> None:
        self._path, self._tables, self._version = path, tables, version
        self._tell = tell

    async def use(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Do some work in one transaction, in a worker thread.

        Args:
            work: What to do with the connection.
            otherwise: The result where the file cannot be used.
        """
        try:
            try:
                return await anyio.to_thread.run_sync(self._open_and, work)
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
                    raise
                kept = await anyio.to_thread.run_sync(self._set_aside)
                self._complain(f"is damaged. It is kept as {kept.name}, and a new one is begun.")
                return await anyio.to_thread.run_sync(self._open_and, work)
        except (sqlite3.Error, OSError) as error:
            self._complain(
                f"is not used: {error}. Set LLAMACPP_HISTORY to a file that can be written."
                " Loads go on, without a forecast from it; favourites and"
                " last settings are not remembered."
            )
        return otherwise

    def _open_and(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with opened(self._path, self._tables, self._version, _BUSY_SECONDS) as file:
            file.execute("PRAGMA synchronous = NORMAL")  # a row lost to a power cut is no loss
            return work(file)

    def _set_aside(self) -> Path:
        """Rename the file, and what SQLite keeps beside it."""
        suffix = f".damaged-{time.strftime('%Y%m%dT%H%M%S')}"
        for end in ("-wal", "-shm", ""):
            part = self._path.with_name(self._path.name + end)
            kept = part.with_name(part.name + suffix)
            with suppress(FileNotFoundError):
                part.replace(kept)
        return kept

    def _complain(self, what: str) -> None:
        sentence = f"The history of loads, {self._path}, {what}"
        if sentence not in _told:
            _told.add(sentence)
            self._tell(sentence)
