"""One model's files come from the Hub into the models folder."""

from __future__ import annotations

import errno
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio.to_thread import run_sync
from rich.filesize import decimal

from kitty_nb.catalog.folder import is_folder
from kitty_nb.errors import DiskFullError, HubError
from kitty_nb.hub.checksums import Checksums
from kitty_nb.hub.part_file import PartFile
from kitty_nb.hub.progress import DownloadProgress, DownloadStep, Meter
from kitty_nb.hub.repository import Repository, environment_explained, explain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from httpx2 import AsyncClient, Response

    from kitty_nb.hub.offers import HubFile, Offer

__all__ = ["Download", "Plan", "PlannedFile"]

_BLOCK = 1 << 20  # bytes written at once, where they come fast
_WRITE_EVERY = 0.25  # seconds, where they come slowly
_SILENCE = 30.0  # seconds without a byte before the connection counts as lost
_FIRST_PAUSE = 0.5  # seconds; each one in vain doubles it
_TRIES = 6  # in vain, one after the other
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PARTIAL = 206
_PASSING = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file, where it goes, and how much of it is there.

    Attributes:
        file: The file in the repository.
        target: Where it goes.
        there: Bytes that need not come any more.
        whole: Whether it is in place.
    """

    file: HubFile
    target: Path
    there: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a download would do.

    Attributes:
        files: In the order in which they are fetched.
        free: Bytes free on the disk of the models folder.
        folder: The models folder.
    """

    files: tuple[PlannedFile, ...]
    free: int
    folder: Path

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(planned.file.size for planned in self.files)

    @property
    def there(self) -> int:
        """Bytes that need not come any more."""
        return sum(planned.there for planned in self.files)

    @property
    def to_come(self) -> int:
        """Bytes that are still to come."""
        return self.size - self.there

    def check(self) -> None:
        """Make sure that it fits.

        Raises:
            DiskFullError: It does not; says how much is missing.
        """
        if self.to_come > self.free:
            short = decimal(self.to_come - self.free)
            raise DiskFullError(
                f"{decimal(self.to_come)} are still to come, but the disk of {self.folder} has"
                f" only {decimal(self.free)} free. Make room for {short} more, take"
                " a smaller quantization, or set LLAMACPP_MODELS_DIR to another disk."
            )


class Download:
    """One model of a repository, on its way into `<models folder>/<owner>/<name>/`.

    The files keep their paths in the repository, but for the projector, which goes beside its
    model, where the catalog looks for it.

    Args:
        repository: The repository.
        offer: Which of its models.
        models_dir: The models folder; need not exist.
        piece: Bytes to ask for at once. Content networks refuse more than 50 GB.
    """

    def __init__(
        self, repository: Repository, offer: Offer, models_dir: Path, piece: int = 8 << 30
    ) -> None:
        self._repository, self._offer, self._piece = repository, offer, piece
        self._models_dir = models_dir
        self._folder = models_dir.joinpath(*repository.name.split("/"))

    @property
    def model(self) -> Path:
        """The file to give to the engine once all is there: the first shard."""
        return self._target(self._offer.model[0])

    def plan(self) -> Plan:
        """See what is there already and what there is room for. Looks at the disk."""
        files = []
        for file in self._offer.files:
            target = self._target(file)
            part = PartFile(target, file.size, file.checksum).path
            whole = _size(target) == file.size
            there = file.size if whole else min(_size(part) or 0, file.size)
            files.append(PlannedFile(file, target, there, whole))
        room = next(path for path in (self._folder, *self._folder.parents) if is_folder(path))
        return Plan(tuple(files), shutil.disk_usage(room).free, self._models_dir)

    async def run(self, on_progress: Callable[[DownloadProgress], object]) -> Path:
        """Fetch what is missing; return the file to give to the engine.

        Cancelling it keeps what has come, and the next run goes on from there. Lost connections
        are tried again. Each file is put in place only when its checksum is the Hub's, and one that
        is there already stays only when its is.

        Args:
            on_progress: Called a few times a second.

        Raises:
            DiskFullError: There is no room for it.
            ChecksumError: A file came damaged.
            HubError: The Hub refused, or cannot be reached; the folder cannot be written.
        """
        plan = await run_sync(self.plan)
        plan.check()
        meter = Meter(plan.size, on_progress)
        try:
            await self._fetch_all(plan, meter)
        except OSError as error:
            kind = DiskFullError if error.errno in _NO_ROOM else HubError
            raise kind(
                f"{self._folder} cannot be written: {error}. Make room or give permission, or set"
                " LLAMACPP_MODELS_DIR to another folder. What has come is kept."
            ) from error
        return self.model

    async def _fetch_all(self, plan: Plan, meter: Meter) -> None:
        from huggingface_hub import get_async_session  # noqa: PLC0415
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

        headers = await run_sync(partial(build_hf_headers, library_name="kitty_nb"))
        sums = Checksums()
        with environment_explained():
            session = get_async_session()
        try:
            async with session as client:
                for planned in plan.files:
                    meter.enter(DownloadStep.CHECKING, planned.file.path)
                    part = PartFile(planned.target, planned.file.size, planned.file.checksum)
                    if planned.whole and await sums.match(
                        planned.target, planned.file, meter.found
                    ):
                        await run_sync(part.discard)
                        continue
                    with ExitStack() as stack:
                        await run_sync(stack.enter_context, part)
                        while counted := await run_sync(part.read_back):
                            meter.found(counted)
                        await self._complete(client, headers, planned.file, part, meter)
                    await run_sync(sums.came, planned.target, planned.file)
        finally:
            with anyio.CancelScope(shield=True):
                await run_sync(sums.keep)
        meter.enter(DownloadStep.DONE)

    async def _complete(
        self,
        client: AsyncClient,
        headers: Mapping[str, str],
        file: HubFile,
        part: PartFile,
        meter: Meter,
    ) -> None:
        """Fetch the rest of a file, however often the connection is lost."""
        import httpx2  # noqa: PLC0415
        from huggingface_hub import hf_hub_url  # noqa: PLC0415
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled  # noqa: PLC0415

        where = self._repository
        url = hf_hub_url(where.name, file.path, revision=where.commit, endpoint=where.endpoint)
        in_vain = 0
        while part.there < file.size:
            before = part.there
            problem: Exception | None = None
            end = min(part.there + self._piece, file.size) - 1
            wanted = {"Range": f"bytes={part.there}-{end}", "Accept-Encoding": "identity"}
            try:
                meter.enter(DownloadStep.DOWNLOADING)
                async with client.stream(
                    "GET", url, headers={**headers, **wanted}, timeout=_SILENCE
                ) as response:
                    await _receive(response, part, meter)
            except httpx2.TransportError as error:
                problem = error
            except HfHubHTTPError as error:
                problem = error
                if error.response.status_code not in _PASSING:
                    raise explain(error, where.name, where.endpoint) from error
            except OfflineModeIsEnabled as error:
                raise explain(error, where.name, where.endpoint) from error
            if part.there > before:
                in_vain = 0
            elif (in_vain := in_vain + 1) == _TRIES:
                lost = problem or ConnectionError("it sends nothing")
                raise explain(lost, where.name, where.endpoint) from problem
            if problem:
                meter.enter(DownloadStep.WAITING)
                await anyio.sleep(_FIRST_PAUSE * 2**in_vain)
        await run_sync(part.finish)

    def _target(self, file: HubFile) -> Path:
        if file is self._offer.projector:
            return self.model.with_name(file.inside.name)
        return self._folder / file.path


async def _receive(response: Response, part: PartFile, meter: Meter) -> None:
    """Write down what comes, as soon as it is much or a moment has passed."""
    from huggingface_hub import hf_raise_for_status  # noqa: PLC0415

    hf_raise_for_status(response)
    if part.there and response.status_code != _PARTIAL:
        meter.found(-part.there)
        await run_sync(part.restart)
    waiting, written = bytearray(), time.monotonic()

    async def write() -> None:
        data = bytes(waiting)
        waiting.clear()
        with anyio.CancelScope(shield=True):
            await run_sync(part.append, data)
        meter.came(len(data))

    try:
        async for data in response.aiter_raw():
            waiting += data
            if len(waiting) >= _BLOCK or time.monotonic() - written >= _WRITE_EVERY:
                await write()
                written = time.monotonic()
            if part.there > part.size:
                break
    finally:
        await write()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
