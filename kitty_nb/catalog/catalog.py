"""Which models some folders hold."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from kitty_nb.catalog.description import describe
from kitty_nb.catalog.file_facts import FileFacts, Kind, read_facts
from kitty_nb.catalog.folder import FoundFile, is_folder, settled
from kitty_nb.catalog.rows import Part, rows
from kitty_nb.catalog.scan_cache import ScanCache, Stamp
from kitty_nb.catalog.stores import Store, files_in
from kitty_nb.catalog.watch import watch
from kitty_nb.user_folders import user_folder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterable

    from kitty_nb.catalog.model import Model

__all__ = ["ModelCatalog", "ScanStep"]

_READERS = 4  # files at a time: reading from a disk, and working on what was read
_STEP_SECONDS = 0.2
_LIST_SHARE = 10  # times as long is read as is spent on unfinished lists


@dataclass(frozen=True, slots=True)
class ScanStep:
    """How far a scan is.

    Attributes:
        done: Files that were read, or had been known.
        total: Files that there are.
        models: All rows so far, in the order of the final list.
    """

    done: int
    total: int
    models: tuple[Model, ...]


class ModelCatalog:
    """The models in some folders and in the folders below them.

    Names that begin with a dot are passed over: they are other programs' business. What was read
    once is remembered until the file changes.

    Args:
        directories: The folder, or several, also other programs' (see `known_stores`). None of
            them need exist. Names are relative to the first.
        cache: The SQLite file that remembers; None for one in the user's cache folder.
    """

    def __init__(
        self,
        directories: str | Path | Store | Iterable[str | Path | Store],
        cache: Path | None = None,
    ) -> None:
        if isinstance(directories, str | Path | Store):
            directories = [directories]
        self.stores = tuple(
            store if isinstance(store, Store) else Store(Path(store)) for store in directories
        )
        self._cache = ScanCache(
            cache or user_folder(platformdirs.user_cache_path) / "catalog.sqlite3"
        )

    @property
    def directory(self) -> Path:
        """The first folder."""
        return self.stores[0].path if self.stores else Path()

    def scan(self, kind: Kind = Kind.MODEL) -> list[Model]:
        """List the models, with `2B` before `10B`; what cannot be served says why.

        Only headers are read. What goes with a model and cannot be served alone is not listed.

        Args:
            kind: What to list instead: adapters, or projectors for images and sound.
        """
        *_, last = self.steps(kind)
        return list(last.models)

    def steps(self, kind: Kind = Kind.MODEL) -> Generator[ScanStep]:
        """Do the same step by step, a few times a second; the last step has the complete list.

        It may be left early: what was read until then is remembered.
        """
        found = self._files()
        stamps = {_key(file): file.stamp for file in found.values() if file.stamp}
        facts = self._cache.recall(stamps)
        fresh: dict[str, tuple[Stamp, FileFacts]] = {}
        waiting = [
            (key, file)
            for key, file in found.items()
            if key not in facts
            and file.problem is None
            and (file.stamp or file.downloading is None)
        ]
        total = len(waiting) + len(facts)

        listed: tuple[Model, ...] = ()
        due = 0.0  # making a long list takes its time too

        def step(*, last: bool = False) -> ScanStep:
            nonlocal listed, due
            began = time.monotonic()
            if last or began >= due:
                listed = self._listed(found, facts, kind)
                due = time.monotonic() + _LIST_SHARE * (time.monotonic() - began)
            return ScanStep(len(facts), total, listed)

        try:
            if waiting:
                yield step()
            for done in _read(waiting):
                for file, read in done:
                    facts[_key(file)] = read
                    # What could not be read may be readable next time, with the same stamp.
                    if file.stamp and settled(file.path, file.stamp) and read.problem is None:
                        fresh[_key(file)] = file.stamp, read
                if len(facts) < total:
                    yield step()
        finally:
            roots = [os.path.abspath(s.path) for s in self.stores if is_folder(s.path)]  # noqa: PTH100
            self._cache.keep(fresh, roots, stamps.keys() | facts.keys())
        yield step(last=True)

    def describe(self, path: Path) -> Model | None:
        """Describe the model that begins with `path`; None when it is not one to serve.

        Outside the catalog's folder its name is the whole path.
        """
        return describe(path, [store.path for store in self.stores])

    def watch(
        self, kind: Kind = Kind.MODEL, on_step: Callable[[ScanStep], object] | None = None
    ) -> AsyncGenerator[list[Model]]:
        """Yield the list at once, and again whenever it has changed, until closed or cancelled.

        Args:
            kind: What to list, as for `scan`.
            on_step: Called, in a worker thread, with each step of each scan.
        """
        folders = [store.path for store in self.stores]
        return watch(folders, lambda: self.steps(kind), on_step or (lambda _: None))

    def _files(self) -> dict[str, FoundFile]:
        return {_key(file): file for store in reversed(self.stores) for file in files_in(store)}

    def _listed(
        self, found: dict[str, FoundFile], facts: dict[str, FileFacts], kind: Kind
    ) -> tuple[Model, ...]:
        parts = [
            Part(file, facts.get(key))
            for key, file in found.items()
            if key in facts or file.problem or (file.stamp is None and file.downloading is not None)
        ]
        listed = [row for row in rows(parts, self.directory, time.time()) if row.kind is kind]
        return tuple(sorted(listed, key=self._order))

    def _order(self, model: Model) -> tuple[int, list[str | int], str]:
        place = next(
            (i for i, store in enumerate(self.stores) if model.path.is_relative_to(store.path)), 0
        )
        return place, _natural(model.known_as or model.name), model.name


def _read(
    waiting: list[tuple[str, FoundFile]],
) -> Generator[list[tuple[FoundFile, FileFacts]]]:
    """Read several files at a time, and hand out a few times a second what is read."""
    if not waiting:
        return
    pool = ThreadPoolExecutor(_READERS, thread_name_prefix="kitty_nb catalog")
    try:
        futures: dict[Future[FileFacts], FoundFile] = {
            pool.submit(read_facts, file.path): file for _, file in waiting
        }
        pending = set(futures)
        while pending:
            done, pending = wait(pending, _STEP_SECONDS)
            yield [(futures[future], future.result()) for future in done]
    finally:
        pool.shutdown(cancel_futures=True)


def _key(file: FoundFile) -> str:
    return os.path.abspath(file.path)  # noqa: PTH100 - a text, and links stay links


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.casefold())]
