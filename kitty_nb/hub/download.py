"""The download of one model: resumed where it stopped, verified, and only then named.

The listing, login, client and errors are huggingface_hub's. Its `snapshot_download` is not used: an
interrupted one (2.4) deletes what it has fetched, and a killed one leaves it behind unused.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import shutil
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import IO, TYPE_CHECKING

import anyio
from anyio.to_thread import run_sync
from rich.filesize import decimal

from kitty_nb.catalog.folder import is_folder, stamp_of
from kitty_nb.catalog.scan_cache import DigestCache, Stamp
from kitty_nb.errors import ChecksumError, DiskFullError, HubError
from kitty_nb.hub.repository import hub_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from hashlib import _Hash
    from pathlib import Path

    from anyio import AsyncFile
    from httpx2 import AsyncClient

    from kitty_nb.hub.repository import HubFile, Repository, Variant

MAX_RANGE = 8 << 30  # bytes per request; the Hub refuses more than 50 GB

_PIECE = 1 << 18  # bytes received at once
_READ_BACK = 16 << 20  # bytes read at once
_SILENCE = 30.0  # seconds without a byte before the connection counts as lost
_FIRST_PAUSE = 0.5  # seconds; doubled by each failure
_ATTEMPTS = 6  # without a byte in between
_REPORT_EVERY = 0.25  # seconds
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PARTIAL = 206
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_SHA256_DIGITS = 64


class DownloadStep(StrEnum):
    """The current activity of a download."""

    CHECKING = "verifying"
    DOWNLOADING = "downloading"
    WAITING = "connection lost, retrying"
    DONE = "complete"


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """The bytes of all files on disk, out of `total`, and the current activity."""

    step: DownloadStep
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a download against the free disk space.

    Attributes:
        size: Bytes of all files.
        there: Bytes already on disk.
        free: Bytes free on the disk of the models folder.
        folder: The models folder.
    """

    size: int
    there: int
    free: int
    folder: Path

    @property
    def missing(self) -> int:
        """Bytes still to download."""
        return self.size - self.there

    @property
    def shortage(self) -> int:
        """Bytes of disk space missing; 0 when it fits."""
        return max(self.missing - self.free, 0)

    def check(self) -> None:
        """Raise `DiskFullError` when it does not fit."""
        if self.shortage:
            raise DiskFullError(
                f"Not enough disk space: {decimal(self.missing)} to download, {decimal(self.free)}"
                f" free in {self.folder}. Free {decimal(self.shortage)} more, choose a smaller"
                " quantization, or set LLAMACPP_MODELS_DIR to another disk."
            )


class Download:
    """One model of a repository, on its way into `<models folder>/<owner>/<name>/`.

    Files keep their paths in the repository, except the projector, which goes beside its model,
    where the catalog looks for it. While it is incomplete, a file is called
    `<name>.<checksum>.incomplete`; the catalog lists it as downloading.
    """

    def __init__(self, repository: Repository, variant: Variant, models_dir: Path) -> None:
        self._repository, self._variant, self._models_dir = repository, variant, models_dir
        self._folder = models_dir.joinpath(*repository.name.split("/"))

    @property
    def model(self) -> Path:
        """The file to give to the engine: the first shard."""
        return self._target(self._variant.model[0])

    def plan(self) -> Plan:
        """Compare what is there with what is needed. It reads the disk."""
        there = 0
        for file in self._variant.files:
            target = self._target(file)
            sizes = (_size(target), min(_size(_part_path(target, file)), file.size))
            there += file.size if sizes[0] == file.size else sizes[1]
        existing = next(path for path in (self._folder, *self._folder.parents) if is_folder(path))
        free = shutil.disk_usage(existing).free
        return Plan(self._variant.size, there, free, self._models_dir)

    async def run(self, on_progress: Callable[[DownloadProgress], object]) -> Path:
        """Fetch what is missing; return the file to give to the engine.

        A cancelled or failed run keeps the downloaded part, and the next one resumes there.

        Args:
            on_progress: Called a few times a second.

        Raises:
            DiskFullError: The disk is full, or too small.
            ChecksumError: A file arrived damaged.
            HubError: The Hub refuses or can't be reached, or the folder can't be written.
        """
        from huggingface_hub import get_async_session  # noqa: PLC0415
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

        (await run_sync(self.plan)).check()
        meter = _Meter(self._variant.size, on_progress)
        where = self._repository
        try:
            with hub_errors(where.name, where.endpoint):
                headers = await run_sync(partial(build_hf_headers, library_name="kitty_nb"))
                async with get_async_session() as client:
                    client.headers.update(headers)
                    transfer = _Transfer(client, where, meter)
                    for file in self._variant.files:
                        await transfer.fetch(file, self._target(file))
                    meter.enter(DownloadStep.DONE)
        except OSError as error:
            kind = DiskFullError if error.errno in _NO_ROOM else HubError
            raise kind(
                f"Can't write to {self._folder}: {error}. Free some space, fix its permissions, or"
                " set LLAMACPP_MODELS_DIR to another folder. The downloaded part is kept."
            ) from error
        return self.model

    def _target(self, file: HubFile) -> Path:
        if file is self._variant.projector:
            return self.model.with_name(file.inside.name)
        return self._folder / file.path


class _Meter:
    """Counts bytes and reports them now and then."""

    def __init__(self, total: int, report: Callable[[DownloadProgress], object]) -> None:
        self._total, self._report = total, report
        self._step, self._done, self._reported = DownloadStep.CHECKING, 0, 0.0

    def enter(self, step: DownloadStep) -> None:
        self._step = step
        self._tell()

    def add(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._reported >= _REPORT_EVERY:
            self._tell()

    def _tell(self) -> None:
        self._reported = time.monotonic()
        self._report(DownloadProgress(self._step, self._done, self._total))


class _Transfer:
    """Brings files from one repository, one after the other."""

    def __init__(self, client: AsyncClient, repository: Repository, meter: _Meter) -> None:
        self._client, self._repository, self._meter = client, repository, meter
        self._digests = DigestCache()

    async def fetch(self, file: HubFile, target: Path) -> None:
        """Put a file in place, unless it is there already."""
        self._meter.enter(DownloadStep.CHECKING)
        if await self._is_there(file, target):
            return
        path = _part_path(target, file)
        async with _locked(path, target) as part:
            digest = _new_digest(file)
            await self._read(part, digest)
            await self._complete(file, part, digest)
            if digest.hexdigest() != file.checksum:
                await anyio.Path(path).unlink()
                raise ChecksumError(
                    f"Checksum mismatch: {target.name} doesn't match the Hub. The damaged file was"
                    " deleted; try again. If it happens again, a proxy on the way may alter files."
                )
            await part.flush()
            await run_sync(os.fsync, part.wrapped.fileno())
            await anyio.Path(path).replace(target)
        stamp = await run_sync(stamp_of, target)
        await run_sync(self._remember, target, stamp, file.checksum)

    async def _is_there(self, file: HubFile, target: Path) -> bool:
        """Whether the file is in place; it is read unless its checksum is remembered."""
        stamp = await run_sync(stamp_of, target)
        if stamp is None or stamp.size != file.size:
            return False
        name = str(target)
        found = (await run_sync(self._digests.recall, {name: stamp})).get(name, "")
        if len(found) == len(file.checksum):
            self._meter.add(file.size)
        else:
            digest = _new_digest(file)
            async with await anyio.open_file(target, "rb") as opened:
                await self._read(opened, digest)
            found = digest.hexdigest()
            await run_sync(self._remember, target, stamp, found)
        if found == file.checksum:
            return True
        self._meter.add(-file.size)
        return False

    def _remember(self, target: Path, stamp: Stamp | None, checksum: str) -> None:
        if stamp and len(checksum) == _SHA256_DIGITS:
            self._digests.keep({str(target): (stamp, checksum)}, (), set())

    async def _read(self, opened: AsyncFile[bytes], digest: _Hash) -> None:
        """Digest what is there."""
        while data := await opened.read(_READ_BACK):
            await run_sync(digest.update, data)
            self._meter.add(len(data))

    async def _complete(self, file: HubFile, part: AsyncFile[bytes], digest: _Hash) -> None:
        """Receive the rest of a file, however often the connection is lost."""
        import httpx2  # noqa: PLC0415
        from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

        failures = 0
        while (start := await part.tell()) < file.size:
            self._meter.enter(DownloadStep.DOWNLOADING)
            try:
                await self._receive(file, part, digest, start)
                if await part.tell() == start:
                    raise httpx2.RemoteProtocolError("it sends nothing")
            except (httpx2.TransportError, HfHubHTTPError) as error:
                failures = failures + 1 if await part.tell() == start else 0
                if failures == _ATTEMPTS or _is_final(error):
                    raise
                self._meter.enter(DownloadStep.WAITING)
                await anyio.sleep(_FIRST_PAUSE * 2**failures)

    async def _receive(
        self, file: HubFile, part: AsyncFile[bytes], digest: _Hash, start: int
    ) -> None:
        """Receive the bytes from `start` on, until the file ends or the connection does."""
        from huggingface_hub import hf_hub_url, hf_raise_for_status  # noqa: PLC0415

        where = self._repository
        url = hf_hub_url(where.name, file.path, revision=where.commit, endpoint=where.endpoint)
        end = min(start + MAX_RANGE, file.size) - 1
        headers = {"Range": f"bytes={start}-{end}", "Accept-Encoding": "identity"}
        async with self._client.stream("GET", url, headers=headers, timeout=_SILENCE) as response:
            hf_raise_for_status(response)
            # A server that knows no ranges sends the file from its beginning.
            skip = 0 if response.status_code == _PARTIAL else start
            async for received in response.aiter_raw(_PIECE):
                data, skip = received[skip:], max(skip - len(received), 0)
                await run_sync(_append, part.wrapped, digest, data)
                self._meter.add(len(data))


@asynccontextmanager
async def _locked(path: Path, target: Path) -> AsyncIterator[AsyncFile[bytes]]:
    """Open an incomplete file for this process alone, and delete those of other versions."""
    await anyio.Path(path.parent).mkdir(parents=True, exist_ok=True)
    async with await anyio.open_file(path, "a+b") as part:
        if not await run_sync(_lock, part.wrapped, path):
            raise HubError(
                f"{target.name} is being downloaded already. Wait for that download, or cancel it."
            )
        async for other in anyio.Path(path.parent).glob(f"{glob.escape(target.name)}.*.incomplete"):
            if other.name != path.name:
                await other.unlink(missing_ok=True)
        await part.seek(0)
        yield part


def _lock(part: IO[bytes], path: Path) -> bool:
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had the lock may have renamed the file meanwhile.
        return os.path.samestat(os.fstat(part.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _is_final(error: Exception) -> bool:
    response = getattr(error, "response", None)
    return response is not None and response.status_code not in _TRANSIENT


def _append(part: IO[bytes], digest: _Hash, data: bytes) -> None:
    part.write(data)
    digest.update(data)


def _new_digest(file: HubFile) -> _Hash:
    if len(file.checksum) == _SHA256_DIGITS:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _part_path(target: Path, file: HubFile) -> Path:
    return target.with_name(f"{target.name}.{file.checksum[:12]}.incomplete")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
