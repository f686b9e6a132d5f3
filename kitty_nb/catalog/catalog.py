"""The models in a folder and in other programs' stores."""

from __future__ import annotations

import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from anyio.from_thread import check_cancelled
from pydantic import TypeAdapter

from kitty_nb.catalog.cache import FileCache, signature_of
from kitty_nb.catalog.model import (
    FileFacts,
    FoundFile,
    Kind,
    is_projector_name,
    plain_name,
    read_facts,
    rows,
    shard_paths,
    why_never,
)
from kitty_nb.catalog.stores import Store, files_in, find_files, is_folder, matching

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence

    from kitty_nb.catalog.model import Model

_FACTS = "facts 8"  # increase it whenever `FileFacts`, or the way it is computed, changes
_FILE_FACTS = TypeAdapter(FileFacts)
_READERS = 4  # files at a time: some are read from disk while others are parsed
_STEP_SECONDS = 0.2
_LIST_SHARE = 10  # seconds of reading for each second spent on unfinished lists
_TOGETHER_MS = 500  # changes within this time count as one
_LOOK_SECONDS = 30.0  # network disks report no changes, and folders can appear
_FIRST_LOOK_MS = 1_000  # nor are changes reported that happen before the watch has begun
_POLL_SECONDS = 5.0  # if the system has no watches left


def find_projector(path: Path, roots: Sequence[Path]) -> Path | None:
    """Find the projector for images or sound that goes with a model; None if there is none.

    Headers are read only if there is a projector nearby. `roots` are the folders of the catalog.
    """
    beside = _beside(path, roots)
    return _describe(path, roots, beside).projector if beside else None


def _describe(path: Path, roots: Sequence[Path], beside: Iterable[FoundFile] = ()) -> Model:
    """Describe the model that `path` is a file of."""
    shards = shard_paths(path)
    files = {shard: _with_facts(FoundFile(shard, signature_of(shard))) for shard in shards}
    for file in beside:  # for all but projectors, the name is enough
        read = file.signature and is_projector_name(file.path)
        files.setdefault(file.path, _with_facts(file) if read else file)
    listed = rows(files.values(), roots[0] if roots else path.parent)
    return next(row for row in listed if row.path == shards[0])


def _beside(path: Path, roots: Sequence[Path]) -> list[FoundFile]:
    """List the files beside a model and, in a root, in the folder above, if with a projector."""
    own, above = path.parent, path.parent.parent
    folders = [above, own] if any(above.is_relative_to(root) for root in roots) else [own]
    near = [folder for folder in folders if any(map(is_projector_name, matching(folder, "*")))]
    files = {file.path: file for folder in near for file in find_files(folder)}
    return list(files.values())


def why_not_served(path: Path) -> str | None:
    """Return why a model can't, or might not, be served, and the remedy; None if none is known."""
    row = _describe(path, [path.parent])
    if row.kind is Kind.MODEL:
        return row.problem or row.doubt
    return row.problem or why_never(row.path, row.facts, 0)


@dataclass(frozen=True, slots=True)
class ScanStep:
    """The progress of a scan."""

    done: int  # files that were read, or found in the cache
    total: int  # files to read in all
    models: tuple[Model, ...]  # all rows so far, in the order of the final list


class ModelCatalog:
    """The models in some folders and their subfolders.

    Names that begin with a dot are skipped: they belong to other programs. The facts of a file are
    cached until it changes.

    Args:
        directories: One folder or several, which may be other programs' (see `known_stores`) and
            need not exist. Names are relative to the first.
        cache: The SQLite file of the cache; None for one in the user's cache folder.
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
        self._cache = FileCache(
            _FACTS,
            _FILE_FACTS.validate_json,
            lambda facts: _FILE_FACTS.dump_json(facts).decode(),
            cache,
        )

    @property
    def directory(self) -> Path:
        """The first folder."""
        return self.stores[0].path if self.stores else Path()

    def scan(self, kind: Kind = Kind.MODEL) -> list[Model]:
        """List the models, `2B` before `10B`; the `problem` of one says why it can't be served.

        Only headers are read. Files that go with a model and can't be served alone are not listed.

        Args:
            kind: What to list instead: adapters, or projectors for images and sound.
        """
        *_, last = self.steps(kind)
        return list(last.models)

    def steps(self, kind: Kind = Kind.MODEL) -> Generator[ScanStep]:
        """Scan in steps, yielded a few times a second; the last step has the complete list.

        It may be closed early: what was read until then is cached.
        """
        files = [file for store in reversed(self.stores) for file in files_in(store)]
        found = {os.path.abspath(file.path): file for file in files}  # noqa: PTH100 - keeps links
        signatures = {key: file.signature for key, file in found.items() if file.signature}
        for key, facts in self._cache.recall(signatures).items():
            found[key] = replace(found[key], facts=facts)
        waiting = {key: file for key, file in found.items() if file.readable and not file.facts}
        total = sum(file.readable for file in found.values())
        done = total - len(waiting)
        listed: tuple[Model, ...] = ()
        due = 0.0  # building a long list takes time, too
        try:
            for read in _read(waiting):
                found |= read
                done += len(read)
                if done == total:
                    break
                began = time.monotonic()
                if began >= due:
                    listed = self._listed(found.values(), kind)
                    due = time.monotonic() + _LIST_SHARE * (time.monotonic() - began)
                yield ScanStep(done, total, listed)
        finally:
            # What could not be read may be readable next time, unchanged.
            self._cache.keep(
                {
                    key: (file.signature, file.facts)
                    for key, file in ((key, found[key]) for key in waiting)
                    if file.signature and file.facts and file.facts.problem is None
                }
            )
        yield ScanStep(total, total, self._listed(found.values(), kind))

    def describe(self, path: Path) -> Model | None:
        """Describe the model whose first file is `path`; None if it is not one to serve.

        Outside the catalog's folder, its name is the whole path.
        """
        roots = [store.path for store in self.stores]
        row = _describe(path, roots, _beside(path, roots))
        return row if row.kind is Kind.MODEL else None

    async def watch(
        self, kind: Kind = Kind.MODEL, on_step: Callable[[ScanStep], object] | None = None
    ) -> AsyncGenerator[list[Model]]:
        """Yield the list at once, and again whenever it changes, until closed or cancelled.

        Args:
            kind: What to list, as for `scan`.
            on_step: Called, in a worker thread, with each step of each scan.
        """
        folders = [store.path for store in self.stores]
        listed: list[Model] | None = None
        while True:
            there = [folder for folder in folders if is_folder(folder)]
            async with aclosing(_changes(there)) as changes:
                async for _ in changes:
                    before, listed = listed, await self._scanned(kind, on_step)
                    if listed != before:
                        yield listed
                    if there != [folder for folder in folders if is_folder(folder)]:
                        break

    async def _scanned(
        self, kind: Kind, on_step: Callable[[ScanStep], object] | None
    ) -> list[Model]:
        """Scan in a worker thread, which ends soon after this is cancelled."""

        def last() -> list[Model]:
            models: list[Model] = []
            with closing(self.steps(kind)) as steps:
                for step in steps:
                    check_cancelled()
                    models = list(step.models)
                    if on_step:
                        on_step(step)
            return models

        return await anyio.to_thread.run_sync(last, abandon_on_cancel=True)

    def _listed(self, files: Iterable[FoundFile], kind: Kind) -> tuple[Model, ...]:
        known = [file for file in files if file.facts or not file.readable]
        listed = (row for row in rows(known, self.directory) if row.kind is kind)
        return tuple(sorted(listed, key=self._order))

    def _order(self, model: Model) -> tuple[int, list[str | int], str]:
        place = next(
            (i for i, store in enumerate(self.stores) if model.path.is_relative_to(store.path)), 0
        )
        return place, _natural(model.known_as or model.name), model.name


def _read(waiting: Mapping[str, FoundFile]) -> Generator[dict[str, FoundFile]]:
    """Read several files at a time; yield at once, then what was read, a few times a second."""
    if not waiting:
        return
    pool = ThreadPoolExecutor(_READERS, thread_name_prefix="kitty_nb catalog")
    try:
        yield {}
        keys = {pool.submit(_with_facts, file): key for key, file in waiting.items()}
        pending = set(keys)
        while pending:
            done, pending = wait(pending, _STEP_SECONDS)
            yield {keys[future]: future.result() for future in done}
    finally:
        pool.shutdown(cancel_futures=True)


def _with_facts(file: FoundFile) -> FoundFile:
    return replace(file, facts=read_facts(file.path))


async def _changes(folders: Sequence[Path]) -> AsyncGenerator[None]:
    """Yield at once, whenever something changes, and from time to time in any case."""
    from watchfiles import awatch  # noqa: PLC0415 - slow to import, and not always needed

    yield
    if not folders:
        await anyio.sleep(_LOOK_SECONDS)
        return
    watcher = awatch(
        *folders,
        watch_filter=None,
        debounce=_TOGETHER_MS,
        rust_timeout=min(_FIRST_LOOK_MS, int(_LOOK_SECONDS * 1000)),
        yield_on_timeout=True,
        ignore_permission_denied=True,
    )
    looked = -math.inf
    try:
        async with aclosing(watcher):
            async for changes in watcher:
                if changes or time.monotonic() - looked >= _LOOK_SECONDS:
                    looked = time.monotonic()
                    yield
    except OSError:  # a folder is gone, or the system has no watches left
        await anyio.sleep(_POLL_SECONDS)


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.casefold())]


def families(models: Iterable[Model]) -> dict[str, tuple[Model, ...]]:
    """Group models by their base model, in the given order.

    The base of a base is looked up among the models, too. A model that names none is a base itself,
    under its title, or its file's name.

    Returns:
        Each family's models by the name of their base model, as the first of them spells it.
    """
    models = tuple(models)
    parents = {
        plain_name(_own(model)): model.facts.base_model
        for model in models
        if model.title and model.facts.base_model
    }
    found: dict[str, tuple[str, list[Model]]] = {}
    for model in models:
        base = _root(model.facts.base_model or _own(model), parents)
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
