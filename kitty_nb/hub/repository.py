"""The models that a repository of the Hugging Face Hub holds, and the Hub's errors as sentences."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Self
from urllib.parse import unquote

import anyio.to_thread

from kitty_nb.catalog.projectors import is_projector_name, own_name, plain_name, projector_rank
from kitty_nb.catalog.quantization import named_quantization
from kitty_nb.catalog.shards import ShardName
from kitty_nb.errors import HubAccessError, HubError, HubOfflineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

MISSING_EXTRA = "Downloads need the package huggingface_hub: pip install 'kitty_nb[hub]'"

_HOST = re.compile(r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)", re.IGNORECASE)
_REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"
_PAGE = re.compile(
    rf"{_REPOSITORY}/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?:/(?P<wanted>.+))?", re.ASCII
)
_SHORT = re.compile(rf"{_REPOSITORY}(?::(?P<tag>.+)|/(?P<file>.+\.gguf))?", re.ASCII)
_USUAL = "Q4_K_M"  # llama.cpp's own default
_NO_MODEL = re.compile(r"(?<![a-z])imatrix(?![a-z])", re.IGNORECASE)
_TIMEOUT = 20.0  # seconds
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository, and the model wanted of it.

    Attributes:
        repository: `owner/name`.
        wanted: A quantization, or a file or folder in the repository; None to choose later.
        revision: A branch, tag or commit.
    """

    repository: str
    wanted: str | None = None
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `owner/name`, `owner/name:Q4_K_M`, `owner/name/file.gguf` or a page's address.

        Raises:
            HubError: It is none of these.
        """
        name = re.split(r"[?#]", _HOST.sub("", text.strip(), count=1), maxsplit=1)[0].rstrip("/")
        if page := _PAGE.fullmatch(name):
            wanted = unquote(page["wanted"]) if page["wanted"] else None
            return cls(page["repository"], wanted, unquote(page["revision"]))
        if short := _SHORT.fullmatch(name):
            return cls(short["repository"], short["tag"] or short["file"])
        raise HubError(
            f"{text!r} does not name a repository on the Hub. Write owner/name, such as"
            " ggml-org/gemma-3-4b-it-GGUF, or paste the address of its page."
        )


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository.

    Attributes:
        path: Its path in the repository.
        size: Bytes.
        checksum: SHA-256, or git's SHA-1 for a small file kept in git itself.
    """

    path: str
    size: int
    checksum: str

    @property
    def inside(self) -> PurePosixPath:
        """The path, parsed."""
        return PurePosixPath(self.path)


@dataclass(frozen=True, slots=True)
class Variant:
    """A model that can be downloaded whole.

    Attributes:
        label: The quantization, e.g. `UD-Q4_K_XL`, or the file's name where several share one.
        model: Its shards, first to last.
        projector: The projector for images or sound that goes with it.
    """

    label: str
    model: tuple[HubFile, ...]
    projector: HubFile | None = None

    @property
    def files(self) -> tuple[HubFile, ...]:
        """All files, the projector first, so that no model is seen without it."""
        return (*([self.projector] if self.projector else []), *self.model)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit.

    Attributes:
        name: `owner/name`.
        commit: The commit that all its files are of.
        variants: Its models, smallest first.
        endpoint: The address of the Hub.
    """

    name: str
    commit: str
    variants: tuple[Variant, ...]
    endpoint: str

    @property
    def usual(self) -> Variant | None:
        """The only variant, or the one with the usual quantization."""
        only = len(self.variants) == 1
        return next((v for v in self.variants if only or v.label == _USUAL), None)

    def choose(self, wanted: str | None) -> Variant:
        """Find a variant by its label or by a file or folder; the usual one for None.

        Raises:
            HubError: There is none, or several would do.
        """
        if not self.variants:
            raise HubError(
                f"{self.name} has no GGUF model that llama-server could load. Look for a"
                " repository of the same model whose name ends in -GGUF."
            )
        if wanted is None and self.usual:
            return self.usual
        key = (wanted or "").strip("/").casefold()
        for variant in self.variants:
            if variant.label.casefold() == key:
                return variant
        for variant in self.variants:
            if any(_is_named(file.inside, key) for file in variant.model):
                return variant
        labels = ", ".join(variant.label for variant in self.variants)
        problem = f"{self.name} has no {wanted}" if wanted else f"{self.name} has several models"
        raise HubError(f"{problem}. Choose one of {labels}.")


def hub_is_installed() -> bool:
    """Whether the extra `hub` is installed."""
    try:
        import huggingface_hub  # noqa: F401, PLC0415
    except ImportError:
        return False
    return True


async def find_repository(reference: HubReference, endpoint: str | None = None) -> Repository:
    """Ask the Hub for a repository's models, sizes and checksums.

    Args:
        reference: The repository and its revision.
        endpoint: The Hub's address; None for `HF_ENDPOINT`, or huggingface.co.

    Raises:
        HubError: With the reason and the remedy.
    """
    ask = partial(_ask, reference, endpoint)
    return await anyio.to_thread.run_sync(ask, abandon_on_cancel=True)


def _ask(reference: HubReference, endpoint: str | None) -> Repository:
    if not hub_is_installed():
        raise HubError(MISSING_EXTRA)
    from huggingface_hub import HfApi  # noqa: PLC0415

    api = HfApi(endpoint=endpoint, library_name="kitty_nb")
    try:
        with hub_errors(reference.repository, api.endpoint):
            info = api.model_info(
                reference.repository,
                revision=reference.revision,
                files_metadata=True,
                timeout=_TIMEOUT,
            )
    except (ImportError, OSError, ValueError) as error:
        # UnicodeError quotes the token that it could not encode.
        detail = "the token is not plain ASCII" if isinstance(error, UnicodeError) else error
        raise HubError(
            f"Can't set up the connection to the Hub: {detail}. Check HF_TOKEN, HF_ENDPOINT,"
            " ALL_PROXY, HTTPS_PROXY, SSL_CERT_FILE and SSL_CERT_DIR."
        ) from None
    files = [
        HubFile(file.rfilename, file.size, checksum)
        for file in info.siblings or ()
        if file.size is not None
        and (checksum := file.lfs.sha256 if file.lfs else file.blob_id) is not None
    ]
    # A renamed repository answers with its new name, a mirror with any: the folder keeps the name
    # that was asked for, in the Hub's own upper and lower case.
    same = info.id.casefold() == reference.repository.casefold()
    name = info.id if same else reference.repository
    return Repository(name, info.sha or reference.revision, list_variants(files), api.endpoint)


@contextmanager
def hub_errors(repository: str, endpoint: str) -> Iterator[None]:
    """Raise what the Hub's client raises as `HubError` with a remedy."""
    import httpx2  # noqa: PLC0415
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise HubOfflineError(
            "HF_HUB_OFFLINE is set, so nothing is downloaded. Unset it."
        ) from None
    except errors.HFValidationError as error:
        raise HubError(f"{repository!r} is not a valid repository name: {error}") from None
    except errors.GatedRepoError as error:
        raise HubAccessError(
            f"{repository} is gated: its authors want you to accept their terms. Accept them at"
            f" {endpoint}/{repository}, {_LOG_IN}, and try again."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubAccessError(
            f"The Hub has no repository {repository}, or it is private. Check the spelling; if it"
            f" is private, {_LOG_IN}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubAccessError(
            f"{repository} has no such revision. Leave the revision out to use the main one."
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubAccessError(
            f"A file of {repository} is gone from the Hub. List its files again."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in {401, 403}:
            raise HubAccessError(
                f"The Hub denies access to {repository} (status {status}). For an account that"
                f" has access, {_LOG_IN}."
            ) from error
        raise HubError(
            f"The Hub answered with status {status} when asked for {repository}. Try again later;"
            " the downloaded part is kept."
        ) from error
    except httpx2.HTTPError as error:
        raise HubOfflineError(
            f"Can't reach the Hub at {endpoint} ({type(error).__name__}: {error}). Check the"
            " connection and try again; the downloaded part is kept."
        ) from error


def list_variants(files: Iterable[HubFile]) -> tuple[Variant, ...]:
    """List the models among a repository's files, smallest first.

    Left out are files that are not GGUF, models with a missing shard, importance matrices, and
    paths that lead out of the repository's folder.
    """
    usable = [file for file in files if _is_usable(file.inside)]
    projectors = [file for file in usable if is_projector_name(file.inside)]
    models: defaultdict[tuple[PurePosixPath, str, int], dict[int, HubFile]] = defaultdict(dict)
    for file in usable:
        if file not in projectors:
            shard = ShardName.parse(file.inside) or ShardName(file.inside.stem, 1, 1)
            models[file.inside.parent, shard.prefix, shard.count][shard.number] = file
    variants = [
        Variant(
            _label(folder, stem),
            tuple(shards[number] for number in sorted(shards)),
            _projector(folder, stem, projectors),
        )
        for (folder, stem, count), shards in models.items()
        if len(shards) == count
    ]
    uses = Counter(variant.label for variant in variants)
    distinct = (v if uses[v.label] == 1 else replace(v, label=_path_label(v)) for v in variants)
    return tuple(sorted(distinct, key=lambda variant: (variant.size, variant.label)))


def _is_usable(path: PurePosixPath) -> bool:
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in str(path)
    return inside and path.suffix.lower() == ".gguf" and not _NO_MODEL.search(path.stem)


def _is_named(path: PurePosixPath, key: str) -> bool:
    names = [path.name, *map(str, (path, *path.parents))]
    return bool(key) and key in (name.casefold() for name in names)


def _label(folder: PurePosixPath, stem: str) -> str:
    for name in (stem, folder.name):
        if tag := named_quantization(name):
            dynamic = re.search(rf"(?i)(?<![a-z0-9])UD-{tag}", name)
            return f"UD-{tag}" if dynamic else tag
    return stem


def _path_label(variant: Variant) -> str:
    path = variant.model[0].inside
    shard = ShardName.parse(path)
    return str(path.with_name(shard.prefix) if shard else path.with_suffix(""))


def _projector(folder: PurePosixPath, stem: str, projectors: Sequence[HubFile]) -> HubFile | None:
    """Choose the one the catalog will choose: named like the model, or else without a name."""
    reachable = {folder, *folder.parents}
    usable = [
        file
        for file in projectors
        if file.inside.parent in reachable
        and plain_name(stem).startswith(own_name(file.inside.stem))
    ]
    return min(
        usable,
        key=lambda file: (
            -len(own_name(file.inside.stem)),
            projector_rank(named_quantization(file.inside.stem)),
            file.path,
        ),
        default=None,
    )
