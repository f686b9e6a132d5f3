"""The models of a folder and of other programs' stores."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import platformdirs

from kitty_nb.catalog.folder import (
    FoundFile,
    ScanCache,
    Stamp,
    find_files,
    is_folder,
    settled,
    stamp_of,
    too_young,
)
from kitty_nb.catalog.model import FileFacts, Kind, read_facts, shard_paths
from kitty_nb.catalog.scan import Part, doubt, is_projector_name, plain_name, rows, why_never
from kitty_nb.catalog.stores import Store, files_in
from kitty_nb.safe_files import user_folder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence

    from kitty_nb.catalog.model import Model


_REMEMBERED = 64  # files: a setting is validated at each key that is pressed


def describe(path: Path, roots: Sequence[Path]) -> Model | None:
    """Describe the model that begins with `path`; None when it is not one to serve.

    Args:
        path: Its file, the first of a split model.
        roots: Folders that models are listed from; its name is relative to the first.
    """
    return _describe(path, roots, _near(path, roots))


def find_projector(path: Path, roots: Sequence[Path]) -> Path | None:
    """Find the projector for images or sound that goes with a model; None where there is none.

    Headers are read only if there is a projector nearby.
    """
    near = _near(path, roots)
    model = _describe(path, roots, near) if near else None
    return model.projector if model else None


def why_not_served(path: Path) -> str | None:
    """Say what a file is that is no model to serve; None of any other, also where it is damaged."""
    facts = [read_facts(shard) for shard in shard_paths(path)]
    if any(each.problem for each in facts):
        return None
    reason = why_never(path, facts[0], sum(each.tensor_count for each in facts))
    return reason or doubt(path, facts[0], dict(facts[0].weights))


def _describe(path: Path, roots: Sequence[Path], near: Iterable[Path]) -> Model | None:
    shards = shard_paths(path)
    found = [FoundFile(shard, stamp_of(shard)) for shard in shards]
    if len(found) > 1:
        found = [file for file in found if file.stamp] or found[:1]
    own = {file.path: Part(file, _facts(file)) for file in found}
    parts = {**dict(_beside(near)), **own}
    listed = rows(parts.values(), roots[0] if roots else path.parent, time.time())
    row = next(row for row in listed if row.path == shards[0])
    return row if row.kind is Kind.MODEL else None


def _near(path: Path, roots: Sequence[Path]) -> list[Path]:
    """List the folders that may have its projector: its own and, in a root, the one above."""
    own, above = path.parent, path.parent.parent
    folders = [own, above] if any(above.is_relative_to(root) for root in roots) else [own]
    return [folder for folder in folders if any(map(is_projector_name, _gguf_in(folder)))]


def _beside(folders: Iterable[Path]) -> Iterator[tuple[Path, Part]]:
    """Yield projectors with what they say; of all else the name is enough."""
    for folder in folders:
        for file in find_files(folder):
            known = is_projector_name(file.path) and file.stamp
            yield file.path, Part(file, _facts(file) if known else None)


def _gguf_in(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in os.listdir(folder) if name.lower().endswith(".gguf")]  # noqa: PTH208 - no object for each name
    except OSError:
        return []


def _facts(file: FoundFile) -> FileFacts:
    if file.stamp and not too_young(file.stamp):
        facts = _facts_at(file.path, file.stamp)
        if facts.problem is None:
            return facts
    return read_facts(file.path)


@lru_cache(_REMEMBERED)
def _facts_at(path: Path, stamp: Stamp) -> FileFacts:
    """Read a file once for each of its stamps."""
    return read_facts(path)


def families(models: Iterable[Model]) -> dict[str, tuple[Model, ...]]:
    """Group models by their base model, in the order in which they come.

    The base of a base is looked up among the models too. A model that names none is a base itself,
    under its title, or its file's name.

    Returns:
        The base model's name, as the first of its family writes it, with all of its family.
    """
    models = tuple(models)
    parents = {
        plain_name(_own(model)): model.base_model
        for model in models
        if model.title and model.base_model
    }
    found: dict[str, tuple[str, list[Model]]] = {}
    for model in models:
        base = _root(model.base_model or _own(model), parents)
        found.setdefault(plain_name(base), (base, []))[1].append(model)
    return {name: tuple(members) for name, members in found.values()}


def _own(model: Model) -> str:
    return model.title or model.known_as or model.stem


def _root(name: str, parents: dict[str, str]) -> str:
    seen = {plain_name(name)}
    while (parent := parents.get(plain_name(name))) and plain_name(parent) not in seen:
        name = parent
        seen.add(plain_name(name))
    return name


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


_TOGETHER_MS = 500  # changes within this are one
_LOOK_MS = 30_000  # network disks do not tell, and folders can appear
_FIRST_LOOK_MS = 1_000  # what happens before the watch has begun is not told either
_POLLING_MS = 5_000  # between looks, where the system has no more watches to give


async def watch(
    folders: Sequence[Path],
    scan: Callable[[], Generator[ScanStep]],
    on_step: Callable[[ScanStep], object],
) -> AsyncGenerator[list[Model]]:
    """Yield the models at once and whenever they have changed.

    Args:
        folders: What to watch; those that do not exist are waited for.
        scan: Lists the models; run in a worker thread.
        on_step: Called there with each step.
    """
    listed = await _scanned(scan, on_step)
    yield listed
    polling: bool | None = None
    while True:
        there = [folder for folder in folders if is_folder(folder)]
        try:
            async with aclosing(_changes(there, polling=polling)) as changes:
                async for _ in changes:
                    before, listed = listed, await _scanned(scan, on_step)
                    if listed != before:
                        yield listed
                    if there != [folder for folder in folders if is_folder(folder)]:
                        break
        except FileNotFoundError:  # a folder has gone since it was looked for
            continue
        except OSError:  # the system's limit on watches; looking takes longer, but always works
            if polling:
                raise
            polling = True


async def _changes(folders: Sequence[Path], *, polling: bool | None) -> AsyncGenerator[object]:
    """Yield whenever something has changed, and now and then in any case."""
    from watchfiles import awatch  # noqa: PLC0415 - slow to import, and not always needed

    if not folders:
        await anyio.sleep(_LOOK_MS / 1000)
        yield None
        return
    watcher = awatch(
        *folders,
        watch_filter=None,
        debounce=_TOGETHER_MS,
        rust_timeout=min(_FIRST_LOOK_MS, _LOOK_MS),
        yield_on_timeout=True,
        force_polling=polling,
        poll_delay_ms=_POLLING_MS,
        ignore_permission_denied=True,
    )
    async with aclosing(watcher):
        looked = -math.inf
        async for changes in watcher:
            if changes or time.monotonic() - looked >= _LOOK_MS / 1000:
                looked = time.monotonic()
                yield changes


async def _scanned(
    scan: Callable[[], Generator[ScanStep]], on_step: Callable[[ScanStep], object]
) -> list[Model]:
    """Scan in a worker thread, which ends soon after this is cancelled."""
    left = threading.Event()

    def last() -> list[Model]:
        models: list[Model] = []
        with closing(scan()) as steps:
            for step in steps:
                if left.is_set():
                    break
                models = list(step.models)
                on_step(step)
        return models

    try:
        return await anyio.to_thread.run_sync(last, abandon_on_cancel=True)
    finally:
        left.set()
