"""The rows of sweeps, in a SQLite file: written as they come, found again by what was tried."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread
from pydantic import TypeAdapter, ValidationError

from kitty_nb.errors import ResultStoreError
from kitty_nb.experiments.trial import TrialResult
from kitty_nb.supervisor.history import opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    T = TypeVar("T")

_SCHEMA_VERSION = 1
_BUSY_SECONDS = 5.0
_ROW = TypeAdapter(TrialResult)
_CREATE = """
    CREATE TABLE IF NOT EXISTS trials (
        conditions TEXT NOT NULL, trial TEXT NOT NULL, at REAL NOT NULL, result TEXT NOT NULL,
        PRIMARY KEY (conditions, trial)
    )
"""
_ADD = "INSERT OR REPLACE INTO trials VALUES (?, ?, ?, ?)"
_DROP = "DELETE FROM trials WHERE conditions = ? AND trial = ?"
_RECALL = "SELECT result FROM trials WHERE conditions = ? ORDER BY at"


class ResultStore:
    """Keeps the rows of all trials that were run under the same conditions.

    A row that cannot be written stays in memory and is written with the next.

    Args:
        path: The file; it and its folder are made when first needed. Many sweeps may share it.
        conditions: Digest of what the trials have in common.
    """

    def __init__(self, path: Path, conditions: str) -> None:
        self._path = path
        self._conditions = conditions
        self._unwritten: dict[str, TrialResult] = {}
        self._writing = anyio.Lock()

    @property
    def unwritten(self) -> int:
        """How many rows are in memory alone."""
        return len(self._unwritten)

    async def recall(self) -> tuple[TrialResult, ...]:
        """Like `read`, without blocking the event loop. The file is made if it is missing."""
        return _read(self._path, await self._use(self._select))

    def read(self) -> tuple[TrialResult, ...]:
        """Return all rows, in the order in which they ended; none where there is no file.

        Raises:
            ResultStoreError: The file cannot be used.
        """
        if not self._path.exists():
            return ()
        try:
            return _read(self._path, self._open_and(self._select))
        except (sqlite3.Error, OSError) as error:
            raise self._refusal(error) from error

    async def add(self, results: Iterable[TrialResult] = ()) -> None:
        """Write rows, and those that could not be written before.

        Raises:
            ResultStoreError: They cannot be written now; they are kept for the next time.
        """
        self._unwritten |= {result.trial.key: result for result in results}
        async with self._writing:
            batch = dict(self._unwritten)
            if not batch:
                return
            rows = [
                (self._conditions, key, result.at, _ROW.dump_json(result).decode())
                for key, result in batch.items()
            ]
            await self._use(lambda trials: trials.executemany(_ADD, rows))
            for key, result in batch.items():
                if self._unwritten.get(key) is result:
                    del self._unwritten[key]

    async def drop(self, keys: Iterable[str]) -> None:
        """Forget the rows of these trials.

        Raises:
            ResultStoreError: They cannot be removed.
        """
        rows = [(self._conditions, key) for key in keys]
        async with self._writing:
            for _, key in rows:
                self._unwritten.pop(key, None)
            await self._use(lambda trials: trials.executemany(_DROP, rows))

    async def _use(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await anyio.to_thread.run_sync(self._open_and, work)
        except (sqlite3.Error, OSError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> ResultStoreError:
        kept = f" {self.unwritten} results are kept in memory." if self._unwritten else ""
        return ResultStoreError(
            f"The file of results, {self._path}, cannot be used: {error}.{kept} Make room, close"
            " what holds it, or name another file."
        )

    def _select(self, trials: sqlite3.Connection) -> list[str]:
        return [text for (text,) in trials.execute(_RECALL, (self._conditions,))]

    def _open_and(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with opened(self._path, (_CREATE,), _SCHEMA_VERSION, _BUSY_SECONDS) as trials:
            return work(trials)


def _read(path: Path, texts: Iterable[str]) -> tuple[TrialResult, ...]:
    try:
        return tuple(map(_ROW.validate_json, texts))
    except ValidationError as error:
        raise ResultStoreError(
            f"{path} holds results that cannot be read: {error}. Name another file."
        ) from None
