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
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import anyio
import psutil
from anyio.to_thread import run_sync
from rich.filesize import decimal

from kitty_nb.catalog.cache import digest_cache, signature_of
from kitty_nb.catalog.stores import is_folder
from kitty_nb.errors import ChecksumError, DiskFullError, HubError
from kitty_nb.hub.repository import hub_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from httpx2 import AsyncClient

    from kitty_nb.hub.repository import HubFile, Repository, Variant

MAX_RANGE = 8 << 30  # bytes per request; the Hub refuses more than 50 GB
FIRST_PAUSE = 0.5  # seconds before a retry; doubled by each failure
_PIECE = 1 << 18  # bytes received at once
_READ_BACK = 16 << 20  # bytes read at once
_SILENCE = 30.0  # seconds without a byte before the connection counts as lost
_ATTEMPTS = 6  # without a byte in between
_REPORT_EVERY = 0.25  # seconds
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PARTIAL = 206
_TRANSIENT = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of a download: all of them, those on disk already, and the disk's free space."""

    size: int
    there: int
    free: int

    @property
    def shortage(self) -> int:
        """Bytes of disk space that are lacking; 0 when it fits."""
        return max(self.size - self.there - self.free, 0)

    @property
    def warnings(self) -> list[str]:
        """Facts that speak against this variant."""
        ram = psutil.virtual_memory().total
        found = [f"needs {decimal(self.shortage)} more disk space"] if self.shortage else []
        return [*found, f"larger than the {decimal(ram)} of RAM"] if self.size > ram else found


class Download:
    """One model of a repository, on its way into `<models folder>/<owner>/<name>/`.

    Files keep their paths in the repository, except the projector, which goes beside its model,
    where the catalog looks for it. While it is incomplete, a file is called
    `<name>.<checksum>.incomplete`, and the catalog lists it as downloading.

    Attributes:
        variant: Which model.
        models_dir: The models folder; need not exist.
        model: The file to give to the engine: the first shard.
    """

    def __init__(self, repository: Repository, variant: Variant, models_dir: Path) -> None:
        self.variant, self.models_dir, self._repository = variant, models_dir, repository
        self._folder = models_dir.joinpath(*repository.name.split("/"))
        self.model = self._folder / variant.shards[0].path
        self._targets = {file: self._folder / file.path for file in variant.files}
        if variant.projector:
            projector = self.model.with_name(variant.projector.path.name)
            self._targets[variant.projector] = projector
        self._digests = digest_cache()
        self._done, self._reported = 0, 0.0

    def plan(self) -> Plan:
        """Compare what is there with what is needed. It reads the disk."""
        there = 0
        for file, target in self._targets.items():
            is_whole = _size(target) == file.size
            there += file.size if is_whole else min(_size(_part_path(target, file)), file.size)
        existing = next(path for path in (self._folder, *self._folder.parents) if is_folder(path))
        return Plan(self.variant.size, there, shutil.disk_usage(existing).free)

    async def run(self, on_progress: Callable[[str, int], object]) -> Path:
        """Fetch what is missing; return the file to give to the engine.

        A cancelled or failed run keeps the downloaded part, and the next one resumes there.

        Args:
            on_progress: Called a few times a second with the current step and the bytes on disk.

        Raises:
            DiskFullError: The disk is full, or too small.
            ChecksumError: A file arrived damaged.
            HubError: The Hub refuses or can't be reached, or the folder can't be written.
        """
        from huggingface_hub import get_async_session  # noqa: PLC0415
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

        plan = await run_sync(self.plan)
        if plan.shortage:
            raise DiskFullError(
                f"Not enough disk space: {decimal(plan.size - plan.there)} to download,"
                f" {decimal(plan.free)} free in {self.models_dir}. Free {decimal(plan.shortage)}"
                " more, choose a smaller quantization, or set LLAMACPP_MODELS_DIR to another disk."
            )
        self._done, self._on_progress = 0, on_progress
        try:
            with hub_errors(self._repository.name):
                headers = await run_sync(build_hf_headers)
                async with get_async_session() as client:
                    client.headers.update(headers)
                    for file, target in self._targets.items():
                        self._enter("verifying")
                        if await self._is_there(file, target):
                            self._add(file.size)
                        else:
                            await self._fetch(client, file, target)
        except OSError as error:
            kind = DiskFullError if error.errno in _NO_ROOM else HubError
            raise kind(
                f"Can't write to {self._folder}: {error}. Free some space, fix its permissions, or"
                " set LLAMACPP_MODELS_DIR to another folder. The downloaded part is kept."
            ) from error
        return self.model

    async def _is_there(self, file: HubFile, target: Path) -> bool:
        """True if the file is in place; it is read unless its checksum is remembered."""
        signature = await run_sync(signature_of, target)
        if signature is None or signature.size != file.size:
            return False
        known = await run_sync(self._digests.recall, {str(target): signature})
        found = known.get(str(target)) or await _sha256(target)
        await run_sync(self._digests.keep, {str(target): (signature, found)})
        return found == file.sha256

    async def _fetch(self, client: AsyncClient, file: HubFile, target: Path) -> None:
        """Receive the rest of a file, verify it, and put it in place."""
        path = _part_path(target, file)
        with await run_sync(_open_part, path, target) as part:
            self._add(part.tell())
            await self._complete(client, file, part)
            part.flush()
            await run_sync(os.fsync, part.fileno())
            self._enter("verifying")
            if await _sha256(path) != file.sha256:
                await run_sync(path.unlink)
                raise ChecksumError(
                    f"Checksum mismatch: {target.name} doesn't match the Hub. The damaged file was"
                    " deleted; try again. If it happens again, a proxy may be altering files."
                )
            await run_sync(path.replace, target)
        if signature := await run_sync(signature_of, target):
            await run_sync(self._digests.keep, {str(target): (signature, file.sha256)})

    async def _complete(self, client: AsyncClient, file: HubFile, part: IO[bytes]) -> None:
        """Receive the rest of a file, however often the connection is lost."""
        import httpx2  # noqa: PLC0415
        from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

        failures = 0
        while (start := part.tell()) < file.size:
            self._enter("downloading")
            try:
                await self._receive(client, file, part)
                if part.tell() == start:
                    raise httpx2.RemoteProtocolError("it sends nothing")
            except (httpx2.TransportError, HfHubHTTPError) as error:
                failures = failures + 1 if part.tell() == start else 0
                response = getattr(error, "response", None)
                is_final = response is not None and response.status_code not in _TRANSIENT
                if is_final or failures == _ATTEMPTS:
                    raise
                self._enter("connection lost, retrying")
                await anyio.sleep(FIRST_PAUSE * 2**failures)

    async def _receive(self, client: AsyncClient, file: HubFile, part: IO[bytes]) -> None:
        """Receive what follows the part, until the file or the connection ends."""
        from huggingface_hub import hf_hub_url, hf_raise_for_status  # noqa: PLC0415

        where, start = self._repository, part.tell()
        url = hf_hub_url(where.name, str(file.path), revision=where.commit)
        end = min(start + MAX_RANGE, file.size) - 1
        headers = {"Range": f"bytes={start}-{end}", "Accept-Encoding": "identity"}
        async with client.stream("GET", url, headers=headers, timeout=_SILENCE) as response:
            hf_raise_for_status(response)
            # A server that knows no ranges sends the file from its beginning.
            skip = 0 if response.status_code == _PARTIAL else start
            async for received in response.aiter_raw(_PIECE):
                data, skip = received[skip:], max(skip - len(received), 0)
                await run_sync(part.write, data)
                self._add(len(data))

    def _enter(self, step: str) -> None:
        self._step, self._reported = step, time.monotonic()
        self._on_progress(step, self._done)

    def _add(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._reported >= _REPORT_EVERY:
            self._enter(self._step)


def _open_part(path: Path, target: Path) -> IO[bytes]:
    """Open an incomplete file for this process alone, and delete those of other versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.open("a+b")
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        part.close()
        raise HubError(
            f"{target.name} is already being downloaded. Wait for that download, or cancel it."
        ) from None
    for other in path.parent.glob(f"{glob.escape(target.name)}.*.incomplete"):
        if other != path:
            other.unlink(missing_ok=True)
    return part


async def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    async with await anyio.open_file(path, "rb") as opened:
        while data := await opened.read(_READ_BACK):
            await run_sync(digest.update, data)
    return digest.hexdigest()


def _part_path(target: Path, file: HubFile) -> Path:
    return target.with_name(f"{target.name}.{file.sha256[:12]}.incomplete")


def _size(path: Path) -> int:
    signature = signature_of(path)
    return signature.size if signature else 0
