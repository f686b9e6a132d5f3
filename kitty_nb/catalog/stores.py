"""The folders that other programs keep their models in, and how each names them.

Hugging Face: https://huggingface.co/docs/hub/local-cache; Ollama: `server/internal/manifest` in
https://github.com/ollama/ollama; LM Studio: https://lmstudio.ai/docs/app/advanced/import-model;
llama.cpp: `fs_get_cache_directory` in its `common/common.cpp`.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitty_nb.catalog.folder import FoundFile, find_files, is_folder, stamp_of
from kitty_nb.catalog.model import ShardName
from kitty_nb.config import user_variables
from kitty_nb.safe_files import NO_HOME

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kitty_nb.config import ServerConfig

_OLLAMA_LAYER = "application/vnd.ollama.image."
_OLLAMA_DEFAULT = ("registry.ollama.ai", "library")
_DIGEST = re.compile(r"(sha256)[:-]([0-9a-f]{64})")
_LARGEST_MANIFEST = 1 << 20  # bytes; real ones have one or two thousand


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
        stamp = stamp_of(revision)
        return revision.name == main, stamp.mtime_ns if stamp else 0

    return sorted(_folders(repository / "snapshots"), key=age, reverse=True)


def _from_ollama(root: Path) -> list[FoundFile]:
    """List the blobs that Ollama's manifests name as models, projectors and adapters."""
    files: dict[Path, FoundFile] = {}
    for manifest in _manifests(root / "manifests"):
        try:
            layers = _layers(manifest, root / "blobs")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            problem = (
                f"{manifest} is not a manifest that can be read: {error}. Pull the model again."
            )
            files[manifest] = FoundFile(manifest, stamp_of(manifest), problem=problem)
            continue
        name = _ollama_name(manifest.relative_to(root / "manifests"))
        for kind in ("model", "projector", "adapter"):
            if blob := layers.get(kind):
                before = files.get(blob)
                names = f"{before.known_as}, {name}" if before else name
                projector = layers.get("projector") if kind == "model" else None
                files[blob] = FoundFile(blob, stamp_of(blob), None, names, None, projector)
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
