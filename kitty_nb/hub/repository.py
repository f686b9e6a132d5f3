"""The models that a repository of the Hugging Face Hub holds, and the Hub's errors as sentences."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Self
from urllib.parse import unquote

from anyio.to_thread import run_sync

from kitty_nb.catalog.gguf import named_quantization
from kitty_nb.catalog.model import ShardName
from kitty_nb.catalog.rows import is_projector_name, own_name, plain_name, preference
from kitty_nb.errors import HubAccessError, HubError, HubOfflineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
    """One file of a repository.

    Attributes:
        path: Its path in the repository.
        size: Bytes.
        sha256: Its checksum.
    """

    path: PurePosixPath
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Variant:
    """A model that can be downloaded whole.

    Attributes:
        label: The quantization, e.g. `UD-Q4_K_XL`, or the file's path where several share one.
        shards: The model's files, first to last.
        projector: The projector for images or sound that goes with it.
    """

    label: str
    shards: tuple[HubFile, ...]
    projector: HubFile | None = None

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
    """A repository at one commit.

    Attributes:
        name: `owner/name`.
        commit: The commit that all its files are of.
        variants: Its models, at least one, smallest first.
    """

    name: str
    commit: str
    variants: tuple[Variant, ...]

    def choose(self, wanted: str | None, *, or_smallest: bool = False) -> Variant:
        """Find a variant by its label or by a file or folder; the usual one for None.

        Args:
            wanted: The label, file or folder.
            or_smallest: Whether the smallest will do where none is usual.

        Raises:
            HubError: There is no such variant, or several would do.
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
    """Ask the Hub, or the one that `HF_ENDPOINT` names, for a repository's models.

    Raises:
        HubError: With the reason and the remedy.
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
        if file.lfs  # the Hub keeps all binary files so
    ]
    variants = list_variants(files)
    if not variants:
        raise HubError(
            f"{asked} has no GGUF model that llama-server could load. Look for a repository of the"
            " same model whose name ends in -GGUF."
        )
    # A renamed repository answers with its new name, a mirror with any: the folder keeps the name
    # that was asked for, in the Hub's own upper and lower case.
    name = info.id if info.id.casefold() == asked.casefold() else asked
    return Repository(name, info.sha or reference.revision, variants)


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Raise the errors of the Hub's client as sentences with a remedy."""
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
            f" later, or {_LOG_IN}. The downloaded part is kept."
        ) from error
    except (errors.OfflineModeIsEnabled, httpx2.HTTPError) as error:
        raise HubOfflineError(
            f"Can't reach the Hub at {constants.ENDPOINT} ({type(error).__name__}: {error}). Check"
            " the connection and try again. The downloaded part is kept."
        ) from error


def list_variants(files: Iterable[HubFile]) -> tuple[Variant, ...]:
    """List the models among a repository's files, smallest first.

    Left out are files that are not GGUF, models with a missing shard, importance matrices, and
    paths that lead out of the repository's folder.
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
    """Choose the one the catalog will choose: named like the model, or else without a name."""

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
