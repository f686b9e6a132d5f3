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
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from kitty_nb.catalog.cache import signature_of
from kitty_nb.catalog.model import FoundFile, first_shard
from kitty_nb.config import user_variables
from kitty_nb.safe_files import user_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kitty_nb.config import ServerConfig

# Names of unfinished downloads by browsers, LM Studio, llama.cpp, the Hub's client (which puts a
# hash before the extension) and aria2.
_UNFINISHED = re.compile(
    r"(?:downloading_)?(?P<target>.*?\.gguf).*\.(?:part|partial|incomplete|downloadinprogress"
    r"|crdownload|opdownload|download|aria2)",
    re.IGNORECASE | re.DOTALL,
)
_FILLING = ".aria2"  # beside a file that has its full length from the start
_OLLAMA_LAYER = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256[:-][0-9a-f]{64}")
_LARGEST_MANIFEST = 1 << 20  # bytes; real ones have one or two thousand
is_folder = os.path.isdir  # unlike pathlib's, it is False for inaccessible paths


def find_files(directory: Path) -> list[FoundFile]:
    """List the GGUF files in a folder and its subfolders, by path.

    Names that begin with a dot are skipped: they belong to other programs. So are unreadable
    folders, and links that lead back up.
    """
    parts: defaultdict[Path, list[Path]] = defaultdict(list)
    for path in _gguf_paths(directory):
        if unfinished := _UNFINISHED.fullmatch(path.name):
            parts[path.with_name(unfinished["target"])].append(path)
        elif path.suffix.lower() == ".gguf":
            parts.setdefault(path, [])
    return [
        FoundFile(
            path,
            signature_of(path),
            parts=tuple(filter(None, map(signature_of, unfinished))),
            filling=any(part.suffix.lower() == _FILLING for part in unfinished),
        )
        for path, unfinished in sorted(parts.items())
    ]


def _gguf_paths(directory: Path) -> Iterator[Path]:
    """Walk through each folder once, following links only to folders not reached without them."""
    seen: set[str] = set()
    starts = [directory]
    while starts:
        for folder, below, names in os.walk(starts.pop()):
            real = os.path.realpath(folder)
            below[:] = [] if real in seen else [name for name in below if name[0] != "."]
            if real in seen:
                continue
            seen.add(real)
            starts += [path for path in (Path(folder, name) for name in below) if path.is_symlink()]
            for name in names:
                if ".gguf" in name.lower() and name[0] != ".":
                    yield Path(folder, name)


class StoreKind(StrEnum):
    """The program that a folder belongs to, which determines its layout."""

    FOLDER = "folder"
    HUGGING_FACE = "Hugging Face"
    LLAMA_CPP = "llama.cpp"
    LM_STUDIO = "LM Studio"
    OLLAMA = "Ollama"


@dataclass(frozen=True, slots=True)
class Store:
    """A folder with models."""

    path: Path  # the folder
    kind: StoreKind = StoreKind.FOLDER  # the program it belongs to


_VARIABLES = ("HF_HUB_CACHE", "HF_HOME", "LLAMA_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME")


def model_stores(config: ServerConfig) -> tuple[Store, ...]:
    """Return the models folder, then the folders of other programs if they may be used."""
    others = known_stores(user_variables(_VARIABLES)) if config.other_stores else ()
    return (Store(config.models_dir), *others)


def known_stores(variables: Mapping[str, str], home: Path | None = None) -> list[Store]:
    """List the folders of other programs that exist on this machine.

    Args:
        variables: The environment variables that make programs keep models elsewhere:
            `HF_HUB_CACHE`, `HF_HOME`, `LLAMA_CACHE`, `OLLAMA_MODELS`, `XDG_CACHE_HOME`.
        home: The user's home folder; None for the real one.
    """
    home = home or user_folder(lambda _: Path.home())

    def named(variable: str) -> list[Path]:
        value = variables.get(variable)
        return [home / value.removeprefix("~/")] if value else []

    caches = (named("XDG_CACHE_HOME") or [home / ".cache"])[0]
    hub = named("HF_HUB_CACHE") or [path / "hub" for path in named("HF_HOME")]
    mac = [home / "Library/Caches/llama.cpp"] if sys.platform == "darwin" else []
    places = {
        StoreKind.HUGGING_FACE: hub or [caches / "huggingface" / "hub"],
        StoreKind.LLAMA_CPP: named("LLAMA_CACHE") or [*mac, caches / "llama.cpp"],
        StoreKind.LM_STUDIO: [home / ".lmstudio/models", home / ".cache/lm-studio/models"],
        StoreKind.OLLAMA: named("OLLAMA_MODELS") or [home / ".ollama" / "models"],
    }
    return [
        Store(path, kind) for kind, paths in places.items() for path in paths if is_folder(path)
    ]


def files_in(store: Store) -> list[FoundFile]:
    """List the files of a store that should be GGUF; unreadable ones are skipped."""
    match store.kind:
        case StoreKind.HUGGING_FACE:
            repositories = matching(store.path, "models--*")
            return [file for repository in repositories for file in _from_hub(repository)]
        case StoreKind.OLLAMA:
            return _from_ollama(store.path)
        case _:
            return find_files(store.path)


def matching(folder: Path, pattern: str) -> list[Path]:
    """List a folder's matching entries, if readable, without names that begin with a dot."""
    return sorted(folder / name for name in glob(pattern, root_dir=folder))  # noqa: PTH207 - never raises


def _from_hub(repository: Path) -> list[FoundFile]:
    """List a repository's files, each in one of the revisions that link to it.

    A model is listed in the revision with most of its files; of several with as many, the latest.
    """
    name = repository.name.removeprefix("models--").replace("--", "/")
    best: dict[Path, list[FoundFile]] = {}
    for revision in _revisions(repository):
        models: defaultdict[Path, list[FoundFile]] = defaultdict(list)
        for file in find_files(revision):
            model = first_shard(file.path.relative_to(revision))
            models[model].append(replace(file, repository=name))
        for model, files in models.items():
            if len(files) > len(best.get(model, ())):
                best[model] = files
    return [file for files in best.values() for file in files]


def _revisions(repository: Path) -> list[Path]:
    """List a repository's revisions, the latest first."""
    try:
        main = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        main = ""

    def age(revision: Path) -> tuple[bool, int]:
        signature = signature_of(revision)
        return revision.name == main, signature.mtime_ns if signature else 0

    return sorted(matching(repository, "snapshots/*"), key=age, reverse=True)


def _from_ollama(root: Path) -> list[FoundFile]:
    """List the blobs that Ollama's manifests name as models, projectors and adapters."""
    files: dict[Path, FoundFile] = {}
    for manifest in matching(root / "manifests", "*/*/*/*"):
        try:
            layers = _layers(manifest, root / "blobs")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            problem = f"Can't read the manifest {manifest}: {error}. Pull the model again."
            files[manifest] = FoundFile(manifest, signature_of(manifest), problem=problem)
            continue
        host, namespace, model, tag = manifest.parts[-4:]
        name = f"{host}/{namespace}/{model}:{tag}".removeprefix("registry.ollama.ai/")
        name = name.removeprefix("library/")
        for kind in ("model", "projector", "adapter"):
            if blob := layers.get(kind):
                before = files.get(blob)
                files[blob] = FoundFile(
                    blob,
                    signature_of(blob),
                    known_as=f"{before.known_as}, {name}" if before else name,
                    projector=layers.get("projector") if kind == "model" else None,
                )
    return list(files.values())


def _layers(manifest: Path, blobs: Path) -> dict[str, Path]:
    """Return the blob of each kind that a manifest names; the first if it names several."""
    with manifest.open("rb") as file:
        content = json.loads(file.read(_LARGEST_MANIFEST))
    layers: dict[str, Path] = {}
    for layer in content["layers"]:
        if not _DIGEST.fullmatch(layer["digest"]):
            raise ValueError(f"{layer['digest']!r} is not a digest")
        kind = layer["mediaType"].removeprefix(_OLLAMA_LAYER)
        layers.setdefault(kind, blobs / layer["digest"].replace(":", "-"))
    return layers
