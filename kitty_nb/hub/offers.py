"""A repository's files become the models that can be had from it. Pure."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from kitty_nb.catalog.projectors import is_projector_name, own_name, plain_name, projector_rank
from kitty_nb.catalog.quantization import named_quantization
from kitty_nb.catalog.shards import ShardName
from kitty_nb.errors import HubError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["HubFile", "Offer", "choose", "list_offers", "usual"]

_USUAL = "Q4_K_M"  # what llama.cpp takes too when nobody says which
_NO_MODEL = re.compile(r"(?<![a-z])imatrix(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository.

    Attributes:
        path: Its path in the repository.
        size: Bytes.
        checksum: Its SHA-256; of a file so small that it is kept in git itself, git's SHA-1 of it.
    """

    path: str
    size: int
    checksum: str

    @property
    def inside(self) -> PurePosixPath:
        """The same path, taken apart."""
        return PurePosixPath(self.path)


@dataclass(frozen=True, slots=True)
class Offer:
    """A model that can be downloaded whole.

    Attributes:
        label: What to call it: the quantization, e.g. `UD-Q4_K_XL`, or where that would not tell
            two apart the name of the file.
        model: Its files, first to last.
        projector: The projector for images or sound that goes with it.
    """

    label: str
    model: tuple[HubFile, ...]
    projector: HubFile | None = None

    @property
    def files(self) -> tuple[HubFile, ...]:
        """All that is fetched; the projector first, so that no model is seen without it."""
        return (*([self.projector] if self.projector else []), *self.model)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def list_offers(files: Iterable[HubFile]) -> tuple[Offer, ...]:
    """List the models among a repository's files, smallest first.

    Left out are files that are no GGUF, models of which a shard is missing, importance matrices,
    and names that lead out of the repository's folder.
    """
    usable = [file for file in files if _usable(file.inside)]
    projectors = [file for file in usable if is_projector_name(file.inside)]
    shards: defaultdict[tuple[PurePosixPath, str, int], dict[int, HubFile]] = defaultdict(dict)
    for file in usable:
        if file in projectors:
            continue
        shard = ShardName.parse(file.inside) or ShardName(file.inside.stem, 1, 1)
        shards[file.inside.parent, shard.prefix, shard.count][shard.number] = file
    offers = [
        Offer(
            _label(folder, stem),
            tuple(parts[number] for number in sorted(parts)),
            _projector(folder, stem, projectors),
        )
        for (folder, stem, count), parts in shards.items()
        if len(parts) == count
    ]
    seen = Counter(offer.label for offer in offers)
    told_apart = (
        offer if seen[offer.label] == 1 else replace(offer, label=_stem(offer)) for offer in offers
    )
    return tuple(sorted(told_apart, key=lambda offer: (offer.size, offer.label)))


def choose(offers: Sequence[Offer], wanted: str | None, repository: str) -> Offer:
    """Find the offer that a user means.

    Args:
        offers: What there is.
        wanted: A label, or a file or folder of the repository. None for the only offer, or the
            one with the usual quantization.
        repository: The repository's name, for what is said of it.

    Raises:
        HubError: There is none, or nothing tells which; says what there is.
    """
    if not offers:
        raise HubError(
            f"{repository} has no GGUF model that llama-server could load. Look for a repository"
            " of the same model whose name ends in -GGUF."
        )
    if wanted is None and (offer := usual(offers)):
        return offer
    key = (wanted or "").strip("/").casefold()
    for offer in offers:
        if offer.label.casefold() == key:
            return offer
    for offer in offers:
        if any(_names(file.inside, key) for file in offer.model):
            return offer
    labels = ", ".join(offer.label for offer in offers)
    missing = f"{repository} has no {wanted}." if wanted else f"{repository} has several models."
    raise HubError(f"{missing} Choose one of {labels}.")


def usual(offers: Sequence[Offer]) -> Offer | None:
    """The only offer, or the one with the usual quantization; None where neither is there."""
    of_kind = [offer for offer in offers if len(offers) == 1 or offer.label == _USUAL]
    return of_kind[0] if of_kind else None


def _usable(path: PurePosixPath) -> bool:
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in str(path)
    return inside and path.suffix.lower() == ".gguf" and not _NO_MODEL.search(path.stem)


def _names(path: PurePosixPath, key: str) -> bool:
    return bool(key) and key in (
        path.name.casefold(),
        *(str(p).casefold() for p in (path, *path.parents)),
    )


def _label(folder: PurePosixPath, stem: str) -> str:
    for name in (stem, folder.name):
        if tag := named_quantization(name):
            dynamic = re.search(rf"(?i)(?<![a-z0-9])UD-{tag}", name)
            return f"UD-{tag}" if dynamic else tag
    return stem


def _stem(offer: Offer) -> str:
    path = offer.model[0].inside
    shard = ShardName.parse(path)
    return str(path.with_name(shard.prefix) if shard else path.with_suffix(""))


def _projector(folder: PurePosixPath, stem: str, projectors: Iterable[HubFile]) -> HubFile | None:
    """Choose as the catalog will: meant for this model by its name, or for all by having none."""
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
