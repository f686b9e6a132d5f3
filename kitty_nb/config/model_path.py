"""What a user wrote as a model becomes a file that llama-server can load, or a reason."""

from __future__ import annotations

import os
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from kitty_nb.catalog.folder import find_files, is_folder
from kitty_nb.catalog.gguf import named_quantization
from kitty_nb.catalog.model import ShardName, missing_shards, shard_paths
from kitty_nb.catalog.stores import StoreKind, files_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kitty_nb.catalog.folder import FoundFile
    from kitty_nb.catalog.stores import Store

_SHOWN = 5
_HUB_REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:[:/](?P<file>.+))?", re.ASCII)
_FILE_ENDING = re.compile(r"\.[A-Za-z]{2,12}$")
_HUB_FOLDER = re.compile(r"(?P<folder>[\w.-]+-GGUF)/(?P<file>.+)", re.ASCII | re.IGNORECASE)


def check_model(
    value: str, models_dir: Path, stores: Sequence[Store] = (), *, anywhere: bool = False
) -> Path:
    """Return the absolute path of the model a user named.

    Args:
        value: A path, absolute or relative to the models folder.
        models_dir: The models folder.
        stores: Other folders that the model may be in.
        anywhere: Whether the model may be anywhere else.

    Raises:
        PydanticCustomError: With `reason` and `fix` in its context, for `ServerConfig` to report.
    """
    path = models_dir / os.path.expanduser(value)  # noqa: PTH111 (leaves a name that nobody has as it is)
    check_letters(path)
    known = next((store for store in stores if _is_inside(path, store.path)), None)
    if not anywhere and known is None and not _is_inside(path, models_dir):
        reason = f"It is outside the models folder, {models_dir}."
        fix = "Move it there, set LLAMACPP_MODELS_DIR to a folder above it, or allow models"
        raise _refusal(reason, f"{fix} anywhere by LLAMACPP_ALLOW_ABSOLUTE_PATHS=1.")
    if path.suffix.lower() != ".gguf" and not file_in_store(path, stores):
        kind = "is a folder" if is_folder(path) else "does not end in .gguf"
        raise _refusal(f"It {kind}, so llama-server cannot load it.", _advice(value, models_dir))
    if not _is_file(path):
        reason = f"There is no such file (looked in {path.parent})."
        raise _refusal(reason, _advice(value, models_dir))
    if str(path).encode(errors="ignore") != os.fsencode(path):
        reason = "Its name, or that of a folder above it, is not written in UTF-8."
        raise _refusal(reason, "Rename it.")
    shard = ShardName.parse(path)
    if shard and shard.number > 1:
        first = shard_paths(path)[0]
        reason = f"It is shard {shard.number} of {shard.count}; a model is named by its first."
        raise _refusal(reason, f"Write {_relative(first, models_dir)}.")
    if missing := missing_shards(path):
        names = ", ".join(p.name for p in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        reason = f"{len(missing)} of its {len(shard_paths(path))} shards are missing from "
        reason += f"{path.parent}: {names}{more}."
        raise _refusal(reason, "Download the missing files beside the others.")
    return path


def file_in_store(path: Path, stores: Sequence[Store]) -> FoundFile | None:
    """Return what Ollama says of a model that it keeps; None of any other."""
    return next(
        (
            file
            for store in stores
            if store.kind is StoreKind.OLLAMA and path.is_relative_to(store.path)
            for file in files_in(store)
            if file.path == path and file.known_as
        ),
        None,
    )


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder; what the links in that folder lead to counts as in it."""
    direct = path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
    return direct or path.resolve().is_relative_to(folder.resolve())


def check_letters(path: str | Path) -> None:
    """Refuse a name that the locale has no letters for: the system could not be asked for it.

    Raises:
        PydanticCustomError: With `reason` and `fix` in its context.
    """
    encoding = sys.getfilesystemencoding()
    if "utf" not in encoding and not str(path).isascii():
        reason = f"It has letters that this program's locale ({encoding}) lacks."
        raise _refusal(reason, "Set LC_ALL=C.UTF-8, or PYTHONUTF8=1, and start it again.")


def _is_file(path: Path) -> bool:
    try:
        return S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        fix = "Correct it, or the rights of the folders above it."
        raise _refusal(f"It cannot be looked at ({error.strerror}).", fix) from None


def _refusal(reason: str, fix: str) -> PydanticCustomError:
    return PydanticCustomError("model", "{reason}", {"reason": reason, "fix": fix})


def _advice(value: str, models_dir: Path) -> str:
    """Say what could be meant: the closest models, what there is, where to download it."""
    names = _names(models_dir)
    wanted = value.lower().removesuffix(".gguf")
    by_key = {key: name for name in names for key in (name.lower(), Path(name).stem.lower())}
    close = list(dict.fromkeys(by_key[k] for k in get_close_matches(wanted, by_key, n=6)))
    inside = [n for n in names if n.lower().startswith(wanted.rstrip("/") + "/")]
    parts = []
    if near := list(dict.fromkeys(inside + close))[:_SHOWN]:
        parts.append(f"Did you mean {' or '.join(near)}?")
    parts.append(_listed(names, models_dir))
    if commands := _download_commands(value, models_dir):
        parts.append(f"To download it: {commands}")
    return " ".join(parts)


def list_models(models_dir: Path) -> str:
    """Name what there is in a models folder."""
    return _listed(_names(models_dir), models_dir)


def _names(models_dir: Path) -> list[str]:
    return sorted(
        _relative(file.path, models_dir)
        for file in find_files(models_dir)
        if file.stamp and file.downloading is None
        if (shard := ShardName.parse(file.path)) is None or shard.number == 1
    )


def _listed(names: list[str], models_dir: Path) -> str:
    if not names:
        return f"There are no models in {models_dir}."
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"Models in {models_dir}: {', '.join(names[:_SHOWN])}{more}."


def _download_commands(value: str, models_dir: Path) -> str | None:
    """Our line and the `hf download` line, where the name looks like a Hub repository."""
    if folder := _HUB_FOLDER.fullmatch(value):
        repository, file = f"OWNER/{folder['folder']}", folder["file"]
    elif hub := _HUB_REPOSITORY.fullmatch(value):
        repository, file = hub["repository"], hub["file"]
        if _FILE_ENDING.search(repository):  # a mistyped file
            return None
    else:
        return None
    pattern = f"*{Path(file).name.removesuffix('.gguf')}*.gguf" if file else "*.gguf"
    target = models_dir / repository.split("/")[1]
    quantization = named_quantization(Path(file).name.removesuffix(".gguf")) if file else None
    ours = f"kitty-nb download {repository}" + (f":{quantization}" if quantization else "")
    theirs = f"hf download {repository} --include '{pattern}' --local-dir '{target}'"
    return f"{ours} (or: {theirs})"


def _relative(path: Path, models_dir: Path) -> str:
    return path.relative_to(models_dir).as_posix() if path.is_relative_to(models_dir) else str(path)
