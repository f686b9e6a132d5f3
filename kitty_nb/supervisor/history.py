"""The history of loads, and the estimate of the next one."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from itertools import islice
from math import log
from statistics import median
from threading import Event
from typing import TYPE_CHECKING, TypeVar

import anyio.to_thread

from kitty_nb.catalog.model import ModelNote
from kitty_nb.engine.locate import EngineKind
from kitty_nb.safe_files import distrust
from kitty_nb.supervisor.load_facts import LoadFacts, path_text, this_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
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


_VERSION = 2
_ROWS_KEPT = 10_000
_ROWS_RECALLED = 200


class Outcome(StrEnum):
    """How a load ended."""

    READY = "ready"
    CRASHED = "crashed"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class LoadRecord(LoadFacts):
    """A load that has ended.

    Attributes:
        starting: Seconds from its process to its first sign of loading.
        loading: Seconds that it read weights for.
        preparing: Seconds from the last weight to ready.
        loaded: Bytes that were seen to come in.
        outcome: How it ended; seconds of stages not reached are 0.
        at: When, in seconds since the epoch.
    """

    starting: float
    loading: float
    preparing: float
    loaded: int
    outcome: str
    at: float


_COLUMNS = ", ".join(field.name for field in fields(LoadRecord))
_TABLES = (
    f"CREATE TABLE IF NOT EXISTS loads (id INTEGER PRIMARY KEY, {_COLUMNS})",
    "CREATE TABLE IF NOT EXISTS favourites (path PRIMARY KEY)",
)
_INSERT = f"INSERT INTO loads ({_COLUMNS}) VALUES ({', '.join('?' * len(fields(LoadRecord)))})"  # noqa: S608 (our names)
_FORGET = "DELETE FROM loads WHERE id <= (SELECT max(id) FROM loads) - ?"
# The bounds also keep out what is no number: SQLite sorts text behind all of them.
_BOUNDS = f"""
    host = ? AND outcome = '{Outcome.READY}' AND size BETWEEN 1 AND 1e15
        AND starting BETWEEN 0 AND 1e6 AND loading BETWEEN 0 AND 1e6
        AND preparing BETWEEN 0 AND 1e6 AND (cached IS NULL OR cached BETWEEN 0 AND 1)
"""
_RECALL = f"""
    SELECT {_COLUMNS} FROM loads WHERE {_BOUNDS} ORDER BY path = ? DESC, id DESC LIMIT ?
"""  # noqa: S608 (our names)
# SQLite takes the other columns from the row with the greatest `at`.
_LAST = f"""
    SELECT path, settings, starting + loading + preparing, max(at) FROM loads
    WHERE {_BOUNDS} AND at BETWEEN 0 AND 1e12 GROUP BY path
"""  # noqa: S608 (our names)


class LoadHistory:
    """Remembers loads and favourites.

    Its methods never raise: they say once what is wrong and do without.

    Args:
        path: The SQLite file; it and its folder are made when first needed.
        tell: Called, on the event loop, with a sentence about what is wrong with the file.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self._file = StateFile(path, _TABLES, _VERSION, tell)

    async def recall(self, host: str, path: str) -> tuple[LoadRecord, ...]:
        """Return a host's loads that became ready: first those of the model at `path`, by age."""
        values = (host, path, _ROWS_RECALLED)
        return await self._file.use(
            lambda loads: tuple(LoadRecord(*row) for row in loads.execute(_RECALL, values)), ()
        )

    async def add(self, record: LoadRecord) -> None:
        """Write a row, and forget the oldest once there are very many."""

        def insert(loads: sqlite3.Connection) -> None:
            loads.execute(_INSERT, astuple(record))
            loads.execute(_FORGET, (_ROWS_KEPT,))

        await self._file.use(insert, None)

    async def notes(self, models: Iterable[Path]) -> dict[Path, ModelNote]:
        """Return what is remembered of some models, by this host's last load of each."""
        texts = {path_text(model): model for model in models}

        def look(loads: sqlite3.Connection) -> dict[Path, ModelNote]:
            favourites = {path for (path,) in loads.execute("SELECT path FROM favourites")}
            last = {row[0]: row for row in loads.execute(_LAST, (this_host(),)) if row[0] in texts}
            found: dict[Path, ModelNote] = {}
            for text in (favourites & texts.keys()) | last.keys():
                _, settings, seconds, at = last.get(text, (text, "", None, None))
                note = ModelNote(text in favourites, at, seconds, _mapping(settings))
                found[texts[text]] = note
            return found

        return await self._file.use(look, {})

    async def mark(self, model: Path, favourite: bool) -> None:
        """Remember whether a model is a favourite."""
        statement = (
            "INSERT OR IGNORE INTO favourites VALUES (?)"
            if favourite
            else "DELETE FROM favourites WHERE path = ?"
        )

        def write(loads: sqlite3.Connection) -> None:
            loads.execute(statement, (path_text(model),))

        await self._file.use(write, None)


def _mapping(text: object) -> dict[str, object]:
    """Settings as they were written; whatever else is there counts for none."""
    with suppress(ValueError):
        if isinstance(text, str) and isinstance(settings := json.loads(text), dict):
            return settings
    return {}


_RECENT = 5  # loads whose median counts: a disk's mood changes, so does the machine
_SIMILAR = 0.1  # difference of cached shares
_COMPARABLE = 10  # as many times as large, or as small, a model may be to speak for another
# Where nothing is known, the bar needs a shape all the same. These make one, and no number to show.
_STARTING, _STARTING_PYTHON = 0.05, 0.12  # seconds, of a program and of the one inside a wheel
_COLD, _HOT = 2e9, 40e9  # bytes a second off a solid-state disk, and out of the page cache
_PREPARING = 0.02  # seconds, and those in which the processor passes once through all weights:
_WARM_UP = 2e9 * min(os.cpu_count() or 1, 8)  # bytes a second, as measured with dense f16 models


class Basis(StrEnum):
    """What an estimate rests on, the best first."""

    SAME_LOAD = "this model with these settings"
    SAME_MODEL = "this model"
    HOST = "this machine"
    NOTHING = "nothing yet"


@dataclass(frozen=True, slots=True)
class LoadEstimate:
    """The seconds that each stage of a load will take.

    Attributes:
        basis: What it rests on. With NOTHING it is a rule of thumb that gives the bar its shape,
            and no number to show.
        starting: From its process to its first sign of loading.
        loading: Until the last weight is there.
        preparing: Until it is ready.
    """

    basis: Basis
    starting: float
    loading: float
    preparing: float


def estimate_load(
    records: Sequence[LoadRecord], facts: LoadFacts, active: float = 1.0
) -> LoadEstimate:
    """Forecast a load from loads of the past that became ready, newest first.

    The best that there is: this very model by this engine with these settings; this model
    otherwise; else the bytes by this machine's rate. Cold and hot page caches are kept apart.

    Args:
        records: What happened.
        facts: What is to be loaded.
        active: Share of the weights that a token passes through: 1, but for mixtures of experts.
            It matters where nothing else is known.
    """
    same_model = [record for record in records if _model(record) == _model(facts)]
    same_load = [record for record in same_model if _way(record) == _way(facts)]
    on_host = sorted(
        (record for record in records if _comparable(record, facts)),
        key=lambda record: abs(log(record.size / facts.size)),
    )
    pools = ((Basis.SAME_LOAD, same_load), (Basis.SAME_MODEL, same_model), (Basis.HOST, on_host))
    for basis, pool in pools:
        pace = _pace(pool, facts.cached)
        if pace is not None:
            like = [record for record in pool if _similar(record.cached, facts.cached)] or pool
            return LoadEstimate(
                basis,
                _typical(record.starting for record in pool),
                pace * facts.size,
                _typical(record.preparing for record in like),
            )
    rest = same_load or same_model or on_host
    cached = facts.cached or 0.0
    starting = _STARTING_PYTHON if facts.engine == EngineKind.EMBEDDED else _STARTING
    warm_up = _PREPARING + active * facts.size / _WARM_UP
    return LoadEstimate(
        Basis.NOTHING,
        _typical(record.starting for record in rest) if rest else starting,
        facts.size * ((1 - cached) / _COLD + cached / _HOT),
        _typical(record.preparing for record in rest) if rest else warm_up,
    )


def _model(load: LoadFacts) -> tuple[object, ...]:
    return load.path, load.size, load.mtime_ns, load.digest, load.host


def _way(load: LoadFacts) -> tuple[object, ...]:
    return load.engine, load.version, load.settings


def _comparable(record: LoadRecord, facts: LoadFacts) -> bool:
    alike = (record.host, record.engine) == (facts.host, facts.engine) and record.loading > 0
    return alike and facts.size / _COMPARABLE < record.size < facts.size * _COMPARABLE


def _pace(records: Sequence[LoadRecord], cached: float | None) -> float | None:
    """Seconds a byte at this cached share; if need be between those of a cold and a hot cache."""
    like = [record for record in records if _similar(record.cached, cached)]
    if like:
        return _typical(record.loading / record.size for record in like)
    if cached is None or _similar(cached, 0.0) or _similar(cached, 1.0):
        return None
    cold, hot = _pace(records, 0.0), _pace(records, 1.0)
    return None if cold is None or hot is None else cold + (hot - cold) * cached


def _similar(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= _SIMILAR


def _typical(seconds: Iterable[float]) -> float:
    return median(islice(seconds, _RECENT))
