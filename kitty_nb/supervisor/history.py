"""The history of loads and favourites: recorded, recalled, and turned into estimates."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, fields, replace
from enum import StrEnum
from itertools import islice
from math import log
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.from_thread
from anyio.to_thread import run_sync

from kitty_nb.catalog.cache import signature_of
from kitty_nb.catalog.gguf import read_header
from kitty_nb.catalog.model import ModelNote, file_size, shard_paths
from kitty_nb.config.flags import PROJECTOR, value_of
from kitty_nb.engine.locate import Engine, EngineKind
from kitty_nb.errors import ModelFileError
from kitty_nb.safe_files import Database
from kitty_nb.supervisor.events import Stage
from kitty_nb.supervisor.load_progress import Basis, LoadEstimate, LoadMeter

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kitty_nb.config import ServerConfig

    T = TypeVar("T")

# Windows spread evenly over all files are sampled rather than every page: a model of 400 GB has a
# hundred million. Files are read and evicted in long runs, so this is exact enough.
_WINDOWS = 24
_WINDOW = 1 << 19  # bytes; whole pages on every system
_NOT_RESIDENT = bytes(range(0, 256, 2))  # the lowest bit decides; macOS sets others too
_DIGESTED = 1 << 18  # bytes of the header
# Samples of each file: a merged adapter may have changed only one matrix in ten. A prime, so that
# they hardly warm the windows above.
_SAMPLES = 61
_SAMPLE = 1 << 12  # bytes
_SETTINGS = {
    "context_size", "n_gpu_layers", "threads", "batch_size", "ubatch_size", "parallel",
    "flash_attention", "speculation",
}  # fmt: skip


def cached_share(paths: Sequence[Path]) -> float | None:
    """Measure the share of the files' bytes that are in the page cache, 0 to 1. It blocks.

    Returns:
        None if it is unknown: a file can't be opened, all are empty, the system has no `mincore`,
        or its answer would be untrue. Linux answers "all of it" for a file that the user neither
        owns nor may write (`can_do_mincore` in its mm/mincore.c).
    """
    total, cached = 0, 0.0
    try:
        for path in paths:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() and not os.access(path, os.W_OK):
                    return None
                share = _resident_share(file.fileno(), status.st_size, _WINDOWS // len(paths))
            total += status.st_size
            cached += status.st_size * share
    except (OSError, ValueError, AttributeError):  # mmap's ValueError: the file became shorter
        return None
    return cached / total if total else None


def _resident_share(file: int, size: int, windows: int) -> float:
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    looked, resident = 0, 0
    for start in range(0, size, max(_WINDOW, size // max(windows, 1) // _WINDOW * _WINDOW)):
        length = min(_WINDOW, size - start)
        # A private copy, because ctypes takes only the address of writable memory; none is written.
        with mmap.mmap(file, length, offset=start, access=mmap.ACCESS_COPY) as window:
            pages = (ctypes.c_char * -(-length // mmap.PAGESIZE))()
            address = ctypes.c_char.from_buffer(window)
            failed = mincore(ctypes.addressof(address), length, pages)
            del address  # a window that is still pointed to cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed")
        looked += len(pages)
        resident += len(pages.raw.translate(None, _NOT_RESIDENT))
    return resident / looked if looked else 0.0


@dataclass(frozen=True, slots=True)
class LoadFacts:
    """A load before it begins."""

    path: str  # the model's file; the first one of a split model
    size: int  # bytes of all its files, including a projector for images
    mtime_ns: int  # when the first file was last changed, in nanoseconds since the epoch
    digest: str  # hash of the first file's beginning
    engine: str  # the engine's kind; empty while unknown
    version: str  # the engine's version; empty while unknown
    host: str
    settings: str  # those that affect the duration of a load, as one comparable text
    # Share of the bytes that are in the page cache; None if unknown.
    cached: float | None


def gather_facts(config: ServerConfig) -> LoadFacts:
    """Inspect the files of a load; those that can't be read are ignored. It blocks."""
    sizes = {file: size for file in _files(config) if (size := file_size(file))}
    files = tuple(sizes)
    cached = cached_share(files)  # first: reading the header changes it
    mtime_ns, digest = _fingerprint(files[0]) if files else (0, "")
    return LoadFacts(
        path=path_text(config.model),
        size=sum(sizes.values()),
        mtime_ns=mtime_ns,
        digest=digest,
        engine="",
        version="",
        host=this_host(),
        settings=_settings(config),
        cached=cached,
    )


def sample_content(config: ServerConfig) -> tuple[int, str]:
    """Return the bytes of a load's files, and a hash of samples spread evenly over them. It blocks.

    Training changes nearly all weights, but neither the header nor the size. The hash is empty if a
    file can't be read.
    """
    sizes = {file: size for file in _files(config) if (size := file_size(file))}
    digest = hashlib.blake2b(digest_size=16)
    try:
        for path, size in sizes.items():
            with path.open("rb", buffering=0) as file:
                digest.update(file.read(_DIGESTED))
                for number in range(1, _SAMPLES + 1):
                    file.seek(max(size - _SAMPLE, 0) * number // _SAMPLES)
                    digest.update(file.read(_SAMPLE))
    except OSError:
        return 0, ""
    return sum(sizes.values()), digest.hexdigest() if sizes else ""


def this_host() -> str:
    """Return the machine's name."""
    return f"{platform.node()} {platform.machine()}"


def path_text(model: Path | None) -> str:
    """Return a model's path as text; file names need not be valid text."""
    return os.fsencode(model).decode(errors="backslashreplace") if model else ""


def _files(config: ServerConfig) -> Iterator[Path]:
    if config.model:
        yield from shard_paths(config.model)
    if config.projector:
        yield config.projector
    if config.drafter:
        yield from shard_paths(config.drafter)
    if named := value_of(config.extra_args, PROJECTOR):
        yield Path(named)


def _fingerprint(file: Path) -> tuple[int, str]:
    try:
        with file.open("rb") as opened:
            digest = hashlib.blake2b(opened.read(_DIGESTED), digest_size=16).hexdigest()
    except OSError:
        return 0, ""
    signature = signature_of(file)
    return signature.mtime_ns if signature else 0, digest


def _settings(config: ServerConfig) -> str:
    settings = config.model_dump(mode="json", include=_SETTINGS, exclude_none=True)
    if config.extra_args:
        # Only a short hash, because an API key may be among them.
        words = hashlib.blake2b("\0".join(config.extra_args).encode(), digest_size=4)
        settings["extra_args"] = words.hexdigest()
    return json.dumps(settings, sort_keys=True)


class Outcome(StrEnum):
    """The outcome of a load."""

    READY = "ready"
    CRASHED = "crashed"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class LoadRecord(LoadFacts):
    """A load that has ended."""

    starting: float  # seconds from its process to its first sign of loading
    loading: float  # seconds that reading the weights took
    preparing: float  # seconds from the last weight to ready
    loaded: int  # bytes that were seen to be loaded
    outcome: str  # how it ended; seconds of stages not reached are 0
    at: float  # when, in seconds since the epoch


_ROWS_KEPT = 10_000
_ROWS_RECALLED = 200
_COLUMNS = ", ".join(field.name for field in fields(LoadRecord))
_TABLES = (
    f"CREATE TABLE IF NOT EXISTS loads (id INTEGER PRIMARY KEY, {_COLUMNS})",
    "CREATE TABLE IF NOT EXISTS favourites (path PRIMARY KEY)",
    "CREATE TABLE IF NOT EXISTS prompts"
    " (host, path, settings, speed, rest, PRIMARY KEY (host, path, settings))",
)
_INSERT = f"INSERT INTO loads ({_COLUMNS}) VALUES ({', '.join('?' * len(fields(LoadRecord)))})"  # noqa: S608 (our names)
_FORGET = "DELETE FROM loads WHERE id <= (SELECT max(id) FROM loads) - ?"
# The bounds also exclude what is not a number: SQLite sorts text after all numbers.
_BOUNDS = f"""
    host = ? AND outcome = '{Outcome.READY}' AND size BETWEEN 1 AND 1e15
        AND starting BETWEEN 0 AND 1e6 AND loading BETWEEN 0 AND 1e6
        AND preparing BETWEEN 0 AND 1e6 AND (cached IS NULL OR cached BETWEEN 0 AND 1)
"""
_RECALL = f"""
    SELECT {_COLUMNS} FROM loads WHERE {_BOUNDS} ORDER BY path = ? DESC, id DESC LIMIT ?
"""  # noqa: S608 (our names)
_PACE = """
    SELECT speed, rest FROM prompts WHERE host = ? AND path = ? AND settings = ?
        AND speed BETWEEN 1e-6 AND 1e9 AND rest BETWEEN 0 AND 1e9
"""
_SET_PACE = "INSERT OR REPLACE INTO prompts VALUES (?, ?, ?, ?, ?)"
# SQLite takes the other columns from the row with the greatest `at`.
_LAST = f"""
    SELECT path, settings, starting + loading + preparing, max(at) FROM loads
    WHERE {_BOUNDS} AND at BETWEEN 0 AND 1e12 GROUP BY path
"""  # noqa: S608 (our names)


class LoadHistory:
    """A SQLite file of loads and favourites.

    Its methods never raise: they report once what is wrong with the file, and do without it.

    Args:
        path: The file; it and its folder are created when first needed.
        warn: Called, on the event loop, with a sentence about what is wrong with the file.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._file = Database(
            path,
            "The load history",
            "Set LLAMACPP_HISTORY to a writable file. Without it, loads have no forecast, and"
            " favourites and last settings are not saved.",
            lambda text: anyio.from_thread.run_sync(warn, text),
            _TABLES,
            version=3,
            precious=True,
        )

    async def recall(self, host: str, path: str) -> tuple[LoadRecord, ...]:
        """Return a host's loads that became ready: first the model at `path`, and newest first."""
        values = (host, path, _ROWS_RECALLED)

        def look(file: sqlite3.Connection) -> tuple[LoadRecord, ...]:
            return tuple(LoadRecord(*row) for row in file.execute(_RECALL, values))

        return await self._use(look, (), abandon_on_cancel=True)

    async def add(self, record: LoadRecord) -> None:
        """Add a row, and delete the oldest once there are very many."""

        def insert(file: sqlite3.Connection) -> None:
            file.execute(_INSERT, astuple(record))
            file.execute(_FORGET, (_ROWS_KEPT,))

        await self._use(insert, None)

    async def prompt_pace(self, facts: LoadFacts) -> tuple[float | None, int]:
        """Return how the last prompt was read: `RequestLog`'s `prompt_speed` and `rest`."""
        key = (facts.host, facts.path, facts.settings)
        found = await self._use(lambda file: file.execute(_PACE, key).fetchone(), None)
        return (float(found[0]), int(found[1])) if found else (None, 0)

    async def set_prompt_pace(self, facts: LoadFacts, speed: float, rest: int) -> None:
        """Remember how a prompt was read."""
        row = (facts.host, facts.path, facts.settings, speed, rest)
        await self._use(lambda file: file.execute(_SET_PACE, row), None)

    async def notes(self, models: Iterable[Path]) -> dict[Path, ModelNote]:
        """Return the usage of those models that were loaded here or are favourites."""
        texts = {path_text(model): model for model in models}

        def look(file: sqlite3.Connection) -> dict[Path, ModelNote]:
            favourites = {path for (path,) in file.execute("SELECT path FROM favourites")}
            last = {row[0]: row for row in file.execute(_LAST, (this_host(),)) if row[0] in texts}
            found: dict[Path, ModelNote] = {}
            for text in (favourites & texts.keys()) | last.keys():
                _, settings, seconds, at = last.get(text, (text, "", None, None))
                note = ModelNote(text in favourites, at, seconds, _mapping(settings))
                found[texts[text]] = note
            return found

        return await self._use(look, {}, abandon_on_cancel=True)

    async def set_favorite(self, model: Path, favorite: bool) -> None:
        """Remember whether a model is a favourite."""
        statement = (
            "INSERT OR IGNORE INTO favourites VALUES (?)"
            if favorite
            else "DELETE FROM favourites WHERE path = ?"
        )
        await self._use(lambda file: file.execute(statement, (path_text(model),)), None)

    async def _use(
        self,
        work: Callable[[sqlite3.Connection], T],
        otherwise: T,
        *,
        abandon_on_cancel: bool = False,
    ) -> T:
        """Use the file in a thread; a read may be abandoned, a write may not."""
        return await run_sync(self._file.use, work, otherwise, abandon_on_cancel=abandon_on_cancel)


def _mapping(text: object) -> dict[str, Any]:
    """Return settings as they were written; none if the text is anything else."""
    with suppress(ValueError):
        if isinstance(text, str) and isinstance(settings := json.loads(text), dict):
            return settings
    return {}


_RECENT = 5  # loads whose median counts, because the speed of disks and machines varies
_SIMILAR = 0.1  # difference of cached shares
_COMPARABLE = 10  # the maximum ratio of sizes of two models that may be compared
# If nothing is known, the bar still needs a shape. These give it one, but no number to show.
_STARTING, _STARTING_PYTHON = 0.05, 0.12  # seconds, of a program and of the one inside a wheel
_COLD, _HOT = 2e9, 40e9  # bytes a second from a solid-state disk, and from the page cache
_PREPARING = 0.02  # seconds, besides those in which the CPU passes once through all weights:
_WARM_UP = 2e9 * min(os.cpu_count() or 1, 8)  # bytes a second, as measured with dense f16 models


def estimate_load(
    records: Sequence[LoadRecord], facts: LoadFacts, active: float = 1.0
) -> LoadEstimate:
    """Forecast a load from past loads that became ready, newest first.

    It uses the best evidence there is: this very model with this engine and these settings; this
    model in any other way; else this machine's rate of bytes. Cold and hot page caches are kept
    apart. If nothing else is known, the share of the weights that a token passes through matters
    (`active`): less than 1 in a mixture of experts.
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


_model = attrgetter("path", "size", "mtime_ns", "digest", "host")
_way = attrgetter("engine", "version", "settings")


def _comparable(record: LoadRecord, facts: LoadFacts) -> bool:
    alike = (record.host, record.engine) == (facts.host, facts.engine) and record.loading > 0
    return alike and facts.size / _COMPARABLE < record.size < facts.size * _COMPARABLE


def _pace(records: Sequence[LoadRecord], cached: float | None) -> float | None:
    """Return seconds per byte at this cached share, interpolated if only cold and hot are known."""
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


# Bytes above which a model's growth in memory stands out from that of the engine itself.
_TELLING = 32 << 20


class LoadRecorder:
    """Tells a meter what to expect of a load, and records how it went.

    Only a load that is watched from its beginning (`whole`) is recorded: its row is true.
    """

    def __init__(
        self, config: ServerConfig, meter: LoadMeter, warn: Callable[[str], None], *, whole: bool
    ) -> None:
        self._config, self._meter, self._whole = config, meter, whole
        self._history = LoadHistory(config.history, warn)
        self._engine: Engine | None = None
        self._facts: LoadFacts | None = None
        self._records: tuple[LoadRecord, ...] = ()
        self._active = 1.0

    async def forecast(self) -> None:
        """Look at the model's files and their past, and tell the meter what to expect."""
        model = self._config.model
        # Abandoned when cancelled: a network drive that hangs must not hold the supervisor.
        self._facts = await run_sync(gather_facts, self._config, abandon_on_cancel=True)
        self._records = await self._history.recall(this_host(), path_text(model))
        self._expect()
        if model and (self._meter.total or self._meter.expected.basis is Basis.NOTHING):
            header = await run_sync(_read_header, model, abandon_on_cancel=True)
            self._meter.header, self._active = header
            self._expect()

    def set_engine(self, engine: Engine) -> None:
        """Note which engine will load the model, which changes what to expect."""
        self._engine = engine
        self._expect()

    def _expect(self) -> None:
        if self._facts is None:
            return
        if self._engine:
            kind, version = self._engine.kind.value, self._engine.version
            self._facts = replace(self._facts, engine=kind, version=version)
        self._meter.total = self._facts.size if self._facts.size >= _TELLING else 0
        self._meter.expected = estimate_load(self._records, self._facts, self._active)

    async def prompt_pace(self) -> tuple[float | None, int]:
        """Return how the last prompt was read with these settings, as far as known."""
        return await self._history.prompt_pace(self._facts) if self._facts else (None, 0)

    async def set_prompt_pace(self, speed: float | None, rest: int) -> None:
        """Remember how the last prompt was read."""
        if self._facts and speed:
            with anyio.CancelScope(shield=True):
                await self._history.set_prompt_pace(self._facts, speed, rest)

    async def record(self, elapsed: float, outcome: Outcome) -> None:
        """Write the load's row, once, even if cancelled."""
        if self._facts is None or not self._whole:
            return
        self._whole = False
        meter = self._meter
        record = LoadRecord(
            **asdict(self._facts),
            starting=meter.seconds(Stage.STARTING, elapsed),
            loading=meter.seconds(Stage.LOADING, elapsed),
            preparing=meter.seconds(Stage.PREPARING, elapsed),
            loaded=meter.loaded,
            outcome=outcome.value,
            at=time.time(),
        )
        with anyio.CancelScope(shield=True):
            await self._history.add(record)


def _read_header(model: Path) -> tuple[int, float]:
    """Return the bytes before the weights, and the share of weights that a token passes through.

    It is less than 1 for a mixture of experts; weights that all tokens share are not considered.
    """
    try:
        header = read_header(model)
    except ModelFileError:
        return 0, 1.0
    used, count = header.own_number("expert_used_count"), header.own_number("expert_count")
    return header.data_at, min(used / count, 1.0) if used and count else 1.0
