"""The loads of the past, one row each, and which models are favourites."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING

from kitty_nb.catalog.model_note import ModelNote
from kitty_nb.supervisor.load_facts import LoadFacts, path_text, this_host
from kitty_nb.supervisor.state_file import StateFile

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable
    from pathlib import Path

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
