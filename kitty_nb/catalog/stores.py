"""The files that may be models: in folders, and in the stores of other programs.

Hugging Face: https://huggingface.co/docs/hub/local-cache; Ollama: `server/internal/manifest` in
https://github.com/ollama/ollama; LM Studio: https://lmstudio.ai/docs/app/advanced/import-model;
llama.cpp: `fs_get_cache_directory` in its `common/common.cpp`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitty_nb.catalog.cache import FileSignature, signature_of
from kitty_nb.catalog.model import ShardName
from kitty_nb.config import user_variables
from kitty_nb.safe_files import NO_HOME

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kitty_nb.config import ServerConfig

# What programs append to a name while they download: browsers, LM Studio, llama.cpp, the Hub's
# client, aria2.
_UNFINISHED = (
    ".part", ".partial", ".incomplete", ".downloadinprogress", ".crdownload", ".opdownload",
    ".download", ".aria2",
)  # fmt: skip
_FILLING = ".aria2"  # beside a file that has its full length from the beginning
_LM_STUDIO = "downloading_"
_OLLAMA_LAYER = "application/vnd.ollama.image."
_OLLAMA_DEFAULT = ("registry.ollama.ai", "library")
_DIGEST = re.compile(r"(sha256)[:-]([0-9a-f]{64})")
_LARGEST_MANIFEST = 1 << 20  # bytes; real ones have one or two thousand


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that looks like a model by its name.

    Attributes:
        path: Where it is, or will be.
        signature: What tells whether it has changed; None when it is not there (yet).
        downloading: Bytes that have come so far, while it is on its way; None otherwise.
        known_as: What the store that has it calls it; None where the file's name says it.
        repository: The Hub repository it is from, e.g. `Qwen/Qwen2.5-7B-Instruct-GGUF`.
        projector: The projector that the store keeps for it.
        problem: What is wrong with it beyond what it says itself.
        filling: Whether what comes is written into the file itself, which has its full length.
    """

    path: Path
    signature: FileSignature | None
    downloading: int | None = None
    known_as: str | None = None
    repository: str | None = None
    projector: Path | None = None
    problem: str | None = None
    filling: bool = False

    @property
    def coming(self) -> bool:
        """True if it is being downloaded and nothing is in its place yet."""
        return self.signature is None and self.downloading is not None


def find_files(directory: Path) -> list[FoundFile]:
    """List a folder's GGUF files and those of the folders below it, by path.

    Names that begin with a dot are passed over: they are other programs' business. So are folders
    that may not be read, and links that lead back up.
    """
    files: dict[str, FileSignature | None] = {}
    unfinished: dict[str, int] = {}
    filling: set[str] = set()
    for entry in _entries(str(directory)):
        target = _target(entry.path)
        if target is not None:
            signature = signature_of(entry)
            unfinished[target] = unfinished.get(target, 0) + (signature.size if signature else 0)
            if entry.path.lower().endswith(_FILLING):
                filling.add(target)
        else:
            files[entry.path] = signature_of(entry)
    return [
        FoundFile(Path(path), files.get(path), unfinished.get(path), filling=path in filling)
        for path in sorted(files.keys() | unfinished.keys())
    ]


def is_folder(entry: os.DirEntry[str] | Path) -> bool:
    """Tell whether there is a folder that may be looked at."""
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or in a folder that may not be entered
        return False


def _entries(directory: str) -> Iterator[os.DirEntry[str]]:
    """Walk through each folder once, by links only to what is not reached without them."""
    seen: set[tuple[int, int]] = set()
    folders, links = [directory], list[str]()
    while folders or links:
        folder = (folders or links).pop()
        try:
            status = os.stat(folder)  # noqa: PTH116 - a thousand paths need not become objects
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as scanned:
                entries = list(scanned)
        except OSError:
            continue
        for entry in entries:
            name = entry.name.lower()
            if name.startswith("."):
                continue
            if ".gguf" in name and name.endswith(_UNFINISHED):
                yield entry
            elif is_folder(entry):
                (links if entry.is_symlink() else folders).append(entry.path)
            elif name.endswith(".gguf"):
                yield entry


def _target(path: str) -> str | None:
    """Tell which file an unfinished download becomes; None when it is none."""
    stem = path
    while stem.lower().endswith(_UNFINISHED):
        stem = stem[: stem.rindex(".")]
    if stem == path:
        return None
    folder, name = os.path.split(stem)
    name = name.removeprefix(_LM_STUDIO)
    cut = name.lower().index(".gguf") + len(".gguf")  # the Hub's client puts a hash after it
    return os.path.join(folder, name[:cut])  # noqa: PTH118 - text


class StoreKind(StrEnum):
    """Whose folder it is, and so how models are laid out in it."""

    FOLDER = "folder"
    HUGGING_FACE = "Hugging Face"
    LLAMA_CPP = "llama.cpp"
    LM_STUDIO = "LM Studio"
    OLLAMA = "Ollama"


@dataclass(frozen=True, slots=True)
class Store:
    """A folder with models.

    Attributes:
        path: The folder.
        kind: Whose it is.
    """

    path: Path
    kind: StoreKind = StoreKind.FOLDER


_VARIABLES = ("HF_HUB_CACHE", "HF_HOME", "LLAMA_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME")


def model_stores(config: ServerConfig) -> tuple[Store, ...]:
    """The models folder, and after it the folders of other programs if they may be used."""
    others = known_stores(user_variables(_VARIABLES)) if config.other_stores else ()
    return (Store(config.models_dir), *others)


def known_stores(variables: Mapping[str, str], home: Path | None = None) -> list[Store]:
    """List the folders of other programs that exist on this machine.

    Args:
        variables: Those of the process, by which programs are told to keep models elsewhere:
            `HF_HUB_CACHE`, `HF_HOME`, `LLAMA_CACHE`, `OLLAMA_MODELS`, `XDG_CACHE_HOME`.
        home: The user's home folder; None for the real one.
    """
    home = home or _home()

    def named(variable: str) -> list[Path]:
        value = variables.get(variable)
        return [home / value.removeprefix("~/")] if value else []

    caches = (named("XDG_CACHE_HOME") or [home / ".cache"])[0]
    hub = named("HF_HUB_CACHE") or [path / "hub" for path in named("HF_HOME")]
    mac = [home / "Library" / "Caches" / "llama.cpp"] if sys.platform == "darwin" else []
    places = {
        StoreKind.HUGGING_FACE: hub or [caches / "huggingface" / "hub"],
        StoreKind.LLAMA_CPP: named("LLAMA_CACHE") or [*mac, caches / "llama.cpp"],
        StoreKind.LM_STUDIO: [
            home / ".lmstudio" / "models",
            home / ".cache" / "lm-studio" / "models",
        ],
        StoreKind.OLLAMA: named("OLLAMA_MODELS") or [home / ".ollama" / "models"],
    }
    return [
        Store(path, kind) for kind, paths in places.items() for path in paths if is_folder(path)
    ]


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        return NO_HOME


def files_in(store: Store) -> list[FoundFile]:
    """List the files of a store that should be GGUF; what may not be read is passed over."""
    match store.kind:
        case StoreKind.HUGGING_FACE:
            return [file for repository in _folders(store.path) for file in _from_hub(repository)]
        case StoreKind.OLLAMA:
            return _from_ollama(store.path)
        case _:
            return find_files(store.path)


def _from_hub(repository: Path) -> list[FoundFile]:
    """List a repository's files, each in one of the revisions that link to it.

    The revision with the most files of a model has it, the latest of those with as many.
    """
    kind, *name = repository.name.split("--")
    if kind != "models" or not name:
        return []
    best: dict[tuple[object, ...], list[FoundFile]] = {}
    for revision in _revisions(repository):
        models: defaultdict[tuple[object, ...], list[FoundFile]] = defaultdict(list)
        for file in find_files(revision):
            shard = ShardName.parse(file.path)
            inside = file.path.relative_to(revision)
            key = (inside.parent, shard.prefix, shard.count) if shard else (inside,)
            models[key].append(file)
        for model, files in models.items():
            if len(files) > len(best.get(model, ())):
                best[model] = files
    return [replace(file, repository="/".join(name)) for files in best.values() for file in files]


def _revisions(repository: Path) -> list[Path]:
    """List a repository's revisions, the latest first."""
    try:
        main = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        main = ""

    def age(revision: Path) -> tuple[bool, int]:
        signature = signature_of(revision)
        return revision.name == main, signature.mtime_ns if signature else 0

    return sorted(_folders(repository / "snapshots"), key=age, reverse=True)


def _from_ollama(root: Path) -> list[FoundFile]:
    """List the blobs that Ollama's manifests name as models, projectors and adapters."""
    files: dict[Path, FoundFile] = {}
    for manifest in _manifests(root / "manifests"):
        try:
            layers = _layers(manifest, root / "blobs")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            problem = f"Can't read the manifest {manifest}: {error}. Pull the model again."
            files[manifest] = FoundFile(manifest, signature_of(manifest), problem=problem)
            continue
        name = _ollama_name(manifest.relative_to(root / "manifests"))
        for kind in ("model", "projector", "adapter"):
            if blob := layers.get(kind):
                before = files.get(blob)
                names = f"{before.known_as}, {name}" if before else name
                projector = layers.get("projector") if kind == "model" else None
                files[blob] = FoundFile(blob, signature_of(blob), None, names, None, projector)
    return list(files.values())


def _manifests(folder: Path) -> Iterator[Path]:
    """List `<host>/<namespace>/<model>/<tag>`."""
    for host in _folders(folder):
        for namespace in _folders(host):
            for model in _folders(namespace):
                yield from sorted(p for p in _listed(model) if not p.name.startswith("."))


def _layers(manifest: Path, blobs: Path) -> dict[str, Path]:
    with manifest.open("rb") as file:
        content: dict[str, Any] = json.loads(file.read(_LARGEST_MANIFEST))
    layers: dict[str, Path] = {}
    for layer in content["layers"]:
        digest = _DIGEST.fullmatch(layer["digest"])
        if digest is None:
            raise ValueError(f"{layer['digest']!r} is not a digest")
        kind = layer["mediaType"].removeprefix(_OLLAMA_LAYER)
        blob = blobs / f"{digest[1]}-{digest[2]}"
        older = blobs / f"{digest[1]}:{digest[2]}"
        layers.setdefault(kind, older if older.is_file() else blob)
    return layers


def _ollama_name(path: Path) -> str:
    host, namespace, model, tag = path.parts
    before = [] if (host, namespace) == _OLLAMA_DEFAULT else [host, namespace]
    if host == _OLLAMA_DEFAULT[0]:
        before = before[1:]
    return "/".join([*before, f"{model}:{tag}"])


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in _listed(folder) if is_folder(path) and path.name[0] != ".")


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
