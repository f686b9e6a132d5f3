"""Models on the Hugging Face Hub: listing, download and verification.

A file gets its name only after verification. Listing, login, client and errors come from
huggingface_hub. Its `snapshot_download` (2.4) is not used: when interrupted, it deletes what it has
fetched, and when killed, it leaves that behind unused.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import shutil
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Self
from urllib.parse import unquote

import anyio
import psutil
from anyio.to_thread import run_sync
from rich.filesize import decimal

from kitty_nb.catalog.cache import digest_cache, digest_files, signature_of
from kitty_nb.catalog.gguf import named_quantization
from kitty_nb.catalog.model import (
    ShardName,
    file_size,
    is_projector_name,
    own_name,
    plain_name,
    preference,
)
from kitty_nb.catalog.stores import is_folder
from kitty_nb.errors import ChecksumError, DiskFullError, HubAccessError, HubError, HubOfflineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from httpx2 import AsyncClient

_HOST = re.compile(r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)", re.IGNORECASE)
_REFERENCE = re.compile(
    r"""(?P<repository>[\w.-]+/[\w.-]+)
    (?: :(?P<tag>.+)
      | /(?:tree|blob|resolve)/(?P<revision>[^/]+)(?:/(?P<path>.+))?
      | /(?P<file>.+\.gguf)
    )?""",
    re.ASCII | re.VERBOSE,
)
_USUAL = "Q4_K_M"  # llama.cpp's own default
_NO_MODEL = re.compile(r"(?<![a-z])imatrix(?![a-z])", re.IGNORECASE)
_TIMEOUT = 20.0  # seconds
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_KEPT = " The downloaded part is kept."


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository, and the model wanted from it."""

    repository: str  # `owner/name`
    # A quantization, or a file or folder in the repository; None to choose later.
    wanted: str | None = None
    revision: str = "main"  # a branch, tag or commit

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `owner/name`, `owner/name:Q4_K_M`, `owner/name/file.gguf` or the URL of a page.

        Raises:
            HubError: The text is none of these.
        """
        name = re.split(r"[?#]", _HOST.sub("", text.strip(), count=1), maxsplit=1)[0].rstrip("/")
        found = _REFERENCE.fullmatch(name)
        if not found:
            raise HubError(
                f"{text!r} does not name a repository on the Hub. Write owner/name, such as"
                " ggml-org/gemma-3-4b-it-GGUF, or paste the page's URL."
            )
        wanted = found["tag"] or found["file"] or unquote(found["path"] or "")
        return cls(found["repository"], wanted or None, unquote(found["revision"] or "main"))


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository."""

    path: PurePosixPath  # its path in the repository
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class Variant:
    """A complete model that can be downloaded."""

    label: str  # the quantization, e.g. `UD-Q4_K_XL`, or the file's path if several share one
    shards: tuple[HubFile, ...]  # the model's files, first to last
    projector: HubFile | None = None  # the projector for images or sound that goes with it

    @property
    def files(self) -> tuple[HubFile, ...]:
        """All files, the projector first, so that no model is seen without it."""
        return (self.projector, *self.shards) if self.projector else self.shards

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit."""

    name: str  # `owner/name`
    commit: str  # the commit of all its files
    variants: tuple[Variant, ...]  # its models, at least one, smallest first

    def choose(self, wanted: str | None, *, or_smallest: bool = False) -> Variant:
        """Find a variant by its label or by a file or folder; the usual one for None.

        With `or_smallest`, None means the smallest if no variant is the usual one.

        Raises:
            HubError: There is no such variant, or nothing decides between several.
        """
        usual = [variant for variant in self.variants if variant.label == _USUAL]
        if wanted is None and (usual or or_smallest or len(self.variants) == 1):
            return (usual or self.variants)[0]
        name = (wanted or "").strip("/").casefold()
        for variant in self.variants:
            paths = [shard.path for shard in variant.shards]
            names = [variant.label, *map(str, paths), *(path.name for path in paths)]
            names += [str(path.parent) for path in paths]
            if name in map(str.casefold, names):
                return variant
        labels = ", ".join(variant.label for variant in self.variants)
        problem = f"{self.name} has no {wanted}" if wanted else f"{self.name} has several models"
        raise HubError(f"{problem}. Choose one of {labels}.")


async def find_repository(reference: HubReference) -> Repository:
    """Ask the Hub, or the endpoint that `HF_ENDPOINT` names, for a repository's models.

    Raises:
        HubError: The models can't be listed; the message has the reason and the remedy.
    """
    return await run_sync(_ask, reference, abandon_on_cancel=True)


def _ask(reference: HubReference) -> Repository:
    try:
        from huggingface_hub import HfApi  # noqa: PLC0415
    except ImportError:
        raise HubError("Downloads need another package: pip install 'kitty_nb[hub]'") from None
    asked = reference.repository
    ask = HfApi(library_name="kitty_nb").model_info
    try:
        with hub_errors(asked):
            info = ask(asked, revision=reference.revision, files_metadata=True, timeout=_TIMEOUT)
    except (ImportError, OSError, ValueError) as error:
        # UnicodeError quotes the token that it could not encode.
        detail = "the token is not plain ASCII" if isinstance(error, UnicodeError) else error
        raise HubError(
            f"Can't ask the Hub for {asked}: {detail}. Check the name, HF_TOKEN, HF_ENDPOINT,"
            " ALL_PROXY, HTTPS_PROXY, SSL_CERT_FILE and SSL_CERT_DIR."
        ) from None
    files = [
        HubFile(PurePosixPath(file.rfilename), file.lfs.size, file.lfs.sha256)
        for file in info.siblings or ()
        if file.lfs  # the Hub stores all binary files this way
    ]
    variants = list_variants(files)
    if not variants:
        raise HubError(
            f"{asked} has no GGUF model that llama-server could load. Look for a repository of the"
            " same model whose name ends in -GGUF."
        )
    # A renamed repository answers with its new name, a mirror with any name. The folder keeps the
    # requested name, in the Hub's own upper and lower case.
    name = info.id if info.id.casefold() == asked.casefold() else asked
    return Repository(name, info.sha or reference.revision, variants)


@contextmanager
def hub_errors(repository: str, downloaded: str = "") -> Iterator[None]:
    """Turn errors of the Hub's client into sentences with a remedy.

    `downloaded` is a sentence to add about files that may have been downloaded.
    """
    import httpx2  # noqa: PLC0415
    from huggingface_hub import constants, errors  # noqa: PLC0415

    page = f"{constants.ENDPOINT}/{repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubAccessError(
            f"{repository} is gated. Accept its authors' terms at {page}, {_LOG_IN}, and try again."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubAccessError(
            f"The Hub has no repository {repository}, or it is private. Check the name, or"
            f" {_LOG_IN}."
        ) from error
    except (errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise HubAccessError(f"{repository} has no such revision or file. See {page}.") from error
    except errors.HfHubHTTPError as error:
        raise HubError(
            f"The Hub answered with status {error.response.status_code} for {repository}. Try again"
            f" later, or {_LOG_IN}.{downloaded}"
        ) from error
    except (errors.OfflineModeIsEnabled, httpx2.HTTPError) as error:
        raise HubOfflineError(
            f"Can't reach the Hub at {constants.ENDPOINT} ({type(error).__name__}: {error}). Check"
            f" the connection and try again.{downloaded}"
        ) from error


def list_variants(files: Iterable[HubFile]) -> tuple[Variant, ...]:
    """List the models among a repository's files, smallest first.

    Files that are not GGUF, models with a missing shard, importance matrices, and paths that lead
    out of the repository's folder are left out.
    """
    models: defaultdict[tuple[PurePosixPath, str, int], dict[int, HubFile]] = defaultdict(dict)
    projectors = []
    for file in filter(_is_usable, files):
        if is_projector_name(file.path):
            projectors.append(file)
        else:
            shard = ShardName.parse(file.path) or ShardName(file.path.stem, 1, 1)
            models[file.path.parent, shard.prefix, shard.count][shard.number] = file
    whole = {place: shards for place, shards in models.items() if len(shards) == place[2]}
    uses = Counter(_label(folder, stem) for folder, stem, _ in whole)
    variants = []
    for (folder, stem, _), shards in whole.items():
        label = _label(folder, stem)
        if uses[label] > 1:
            label = str(folder / stem)
        ordered = tuple(shards[number] for number in sorted(shards))
        variants.append(Variant(label, ordered, _projector(folder, stem, projectors)))
    return tuple(sorted(variants, key=lambda variant: (variant.size, variant.label)))


def _is_usable(file: HubFile) -> bool:
    path = file.path
    is_inside = not path.is_absolute() and ".." not in path.parts and "\\" not in str(path)
    return is_inside and path.suffix.lower() == ".gguf" and not _NO_MODEL.search(path.stem)


def _label(folder: PurePosixPath, stem: str) -> str:
    for name in (stem, folder.name):
        if tag := named_quantization(name):
            dynamic = re.search(rf"(?i)(?<![a-z0-9])UD-{tag}", name)
            return f"UD-{tag}" if dynamic else tag
    return stem


def _projector(folder: PurePosixPath, stem: str, projectors: Iterable[HubFile]) -> HubFile | None:
    """Choose the same projector as the catalog: named like the model, or else without a name."""

    def rank(file: HubFile) -> tuple[int, int, PurePosixPath]:
        name = file.path.stem
        return *preference(name, named_quantization(name)), file.path

    usable = [
        file
        for file in projectors
        if file.path.parent in {folder, *folder.parents}
        and plain_name(stem).startswith(own_name(file.path.stem))
    ]
    return min(usable, key=rank, default=None)


MAX_RANGE = 8 << 30  # bytes per request; the Hub refuses more than 50 GB
FIRST_PAUSE = 0.5  # seconds before a retry; doubled by each failure
_PIECE = 1 << 18  # bytes received at once
_SILENCE = 30.0  # seconds without a byte before the connection counts as lost
_ATTEMPTS = 6  # in a row without receiving a byte
_REPORT_EVERY = 0.25  # seconds
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PARTIAL = 206
_TRANSIENT = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of a download: the total, those already on disk, and the disk's free space."""

    size: int
    there: int
    free: int

    @property
    def shortage(self) -> int:
        """Missing disk space in bytes; 0 if the download fits."""
        return max(self.size - self.there - self.free, 0)

    @property
    def warnings(self) -> list[str]:
        """Reasons not to download this variant."""
        ram = psutil.virtual_memory().total
        found = [f"needs {decimal(self.shortage)} more disk space"] if self.shortage else []
        return [*found, f"larger than the {decimal(ram)} of RAM"] if self.size > ram else found


class Download:
    """The download of a model into `<models folder>/<owner>/<name>/`.

    Files keep their paths in the repository, except the projector, which goes beside its model,
    where the catalog looks for it. An incomplete file is called `<name>.<checksum>.incomplete`, and
    the catalog lists it as downloading.

    Attributes:
        variant: The model to download.
        models_dir: The models folder; need not exist.
        model: The file to pass to the engine: the first shard.
    """

    def __init__(self, repository: Repository, variant: Variant, models_dir: Path) -> None:
        self.variant, self.models_dir, self._repository = variant, models_dir, repository
        self._folder = models_dir.joinpath(*repository.name.split("/"))
        self.model = self._folder / variant.shards[0].path
        self._targets = {file: self._folder / file.path for file in variant.files}
        if variant.projector:
            projector = self.model.with_name(variant.projector.path.name)
            self._targets[variant.projector] = projector
        self._done, self._reported = 0, 0.0

    def plan(self) -> Plan:
        """Compare the files on disk with those needed; reads the disk."""
        there = 0
        for file, target in self._targets.items():
            is_whole = file_size(target) == file.size
            part = file_size(_part_path(target, file)) or 0
            there += file.size if is_whole else min(part, file.size)
        existing = next(path for path in (self._folder, *self._folder.parents) if is_folder(path))
        return Plan(self.variant.size, there, shutil.disk_usage(existing).free)

    async def run(self, on_progress: Callable[[str, int], object]) -> Path:
        """Download what is missing; return the file to pass to the engine.

        A cancelled or failed run keeps the downloaded part, and the next one resumes there.
        `on_progress` is called a few times a second with the current step and the bytes on disk.

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
            with hub_errors(self._repository.name, _KEPT):
                headers = await run_sync(build_hf_headers)
                async with get_async_session() as client:
                    client.headers.update(headers)
                    for file, target in self._targets.items():
                        self._enter("verifying")
                        size = await run_sync(file_size, target)
                        if size == file.size and await _sha256(target) == file.sha256:
                            self._add(file.size)
                        else:
                            await self._fetch(client, file, target)
        except OSError as error:
            kind = DiskFullError if error.errno in _NO_ROOM else HubError
            raise kind(
                f"Can't write to {self._folder}: {error}. Free some space, fix its permissions, or"
                f" set LLAMACPP_MODELS_DIR to another folder.{_KEPT}"
            ) from error
        return self.model

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
            await run_sync(digest_cache().keep, {str(target): (signature, file.sha256)})

    async def _complete(self, client: AsyncClient, file: HubFile, part: IO[bytes]) -> None:
        """Receive the rest of a file, retrying when the connection is lost."""
        import httpx2  # noqa: PLC0415
        from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

        failures = 0
        while (start := part.tell()) < file.size:
            self._enter("downloading")
            try:
                await self._receive(client, file, part)
                if part.tell() == start:
                    raise httpx2.RemoteProtocolError("the server sent no data")
            except (httpx2.TransportError, HfHubHTTPError) as error:
                failures = failures + 1 if part.tell() == start else 0
                response = getattr(error, "response", None)
                is_final = response is not None and response.status_code not in _TRANSIENT
                if is_final or failures == _ATTEMPTS:
                    raise
                self._enter("connection lost, retrying")
                await anyio.sleep(FIRST_PAUSE * 2**failures)

    async def _receive(self, client: AsyncClient, file: HubFile, part: IO[bytes]) -> None:
        """Receive the bytes after the part, until the file or the connection ends."""
        from huggingface_hub import hf_hub_url, hf_raise_for_status  # noqa: PLC0415

        where, start = self._repository, part.tell()
        url = hf_hub_url(where.name, str(file.path), revision=where.commit)
        end = min(start + MAX_RANGE, file.size) - 1
        headers = {"Range": f"bytes={start}-{end}", "Accept-Encoding": "identity"}
        async with client.stream("GET", url, headers=headers, timeout=_SILENCE) as response:
            hf_raise_for_status(response)
            # A server without support for ranges sends the file from the start.
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
    """Open an incomplete file exclusively, and delete those of other versions."""
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
    # Abandoned when cancelled: Ctrl-C must not wait until a large file has been read.
    (found,) = await run_sync(digest_files, (path,), lambda *_: None, abandon_on_cancel=True)
    return found.sha256


def _part_path(target: Path, file: HubFile) -> Path:
    return target.with_name(f"{target.name}.{file.sha256[:12]}.incomplete")
