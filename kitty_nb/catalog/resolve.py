"""The files that settings name, and those that go with them, looked up before a start."""

from __future__ import annotations

import hashlib
import json
import os
import re
from difflib import get_close_matches
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, NamedTuple

from kitty_nb.catalog.cache import FileCache, signature_of
from kitty_nb.catalog.catalog import find_projector
from kitty_nb.catalog.gguf import ArrayInfo, named_quantization, read_header
from kitty_nb.catalog.memory import read_shape
from kitty_nb.catalog.model import (
    ShardName,
    file_size,
    first_shard,
    name_some,
    read_task,
    shard_paths,
    total_size,
)
from kitty_nb.catalog.stores import StoreKind, files_in, find_files, is_folder, model_stores
from kitty_nb.config import ServerConfig, Speculation, task_by_flags
from kitty_nb.config.flags import PROJECTOR, PROJECTOR_URL
from kitty_nb.config.profiles import configured_profiles, load_lenient
from kitty_nb.errors import ConfigError, ModelFileError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kitty_nb.catalog.model import FoundFile
    from kitty_nb.catalog.stores import Store

_SHOWN = 5
_PROJECTOR_FLAGS = {*PROJECTOR, *PROJECTOR_URL, "--no-mmproj", "--no-mmproj-auto"}
_DRAFT_FLAGS = {"-md", "--model-draft", "--spec-draft-model", "--spec-draft-hf", "-hfd"}
_NO_DRAFT = "Download a smaller model of the same family, or set LLAMACPP_SPECULATION=ngram."
_HUB_REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:[:/](?P<file>.+))?", re.ASCII)
_FILE_ENDING = re.compile(r"\.[A-Za-z]{2,12}$")
_HUB_FOLDER = re.compile(r"[\w.-]+-GGUF/", re.ASCII | re.IGNORECASE)
_FEWER = 128  # tokens: llama.cpp's limit on the difference between two vocabularies
_SMALLER = 2  # times; a larger draft model would take longer than it saves


def resolve_model(config: ServerConfig) -> ServerConfig:
    """Look up the files that settings name, as the last check before a start; reads the disk.

    Returns:
        The settings, with the model's name in its store, projector, task and draft model. Settings
        of another machine are left to that machine.

    Raises:
        ConfigError: No model is chosen, or there are problems with the files' paths; lists them.
    """
    if config.ssh or config.models is not None:  # each of a router's models has its own settings
        return config
    if config.model is None:
        key = f"LLAMACPP_{config.profile.upper()}_MODEL"
        fix = f"Choose one, or set {key}. {_listed(_names(config.models_dir), config.models_dir)}"
        raise ConfigError("", (Problem(key, "", "No model is chosen.", fix),))
    folder, *others = model_stores(config)
    named = {"model": config.model, "mmproj": config.mmproj}
    if config.speculation is Speculation.DRAFT:
        named["draft_model"] = config.draft_model
    problems = tuple(
        Problem(name, _relative(path, folder.path), *wrong)
        for name, path in named.items()
        if isinstance(path, Path) and (wrong := _what_is_wrong(path, config, others))
    )
    if problems:
        raise ConfigError("", problems)
    kept = _file_in_store(config.model, others)
    known_as = kept.known_as.partition(", ")[0] if kept and kept.known_as else None
    found = {
        "known_as": known_as,
        "projector": _projector(config, kept),
        "task": task_by_flags(config.extra_args) or read_task(config.model),
        "drafter": _drafter(config, others),
    }
    return config.model_copy(update=found)


class Routed(NamedTuple):
    """The profiles that a router serves.

    Attributes:
        profiles: Their settings.
        left_out: The problems of those that it leaves out, in sentences.
    """

    profiles: tuple[ServerConfig, ...]
    left_out: tuple[str, ...] = ()


def routed_profiles(config: ServerConfig) -> Routed:
    """Look up the profiles that a router serves, and their files; reads the disk.

    Of `all` profiles, it serves those without a problem.

    Raises:
        ConfigError: A profile that is named, or every profile, has a problem, or there is no
            profile; lists the problems.
    """
    env, names = config.env or Path(".env"), config.models or ()
    every = names == ("all",)
    if every:
        names = tuple(
            name
            for name in configured_profiles(env)
            if (one := load_lenient(env, name)[0]).model
            and one.models is None
            and not (one.ssh or one.url)
        )
    found: list[ServerConfig] = []
    problems: list[Problem] = []
    left_out: list[str] = []
    for name in names:
        wrong: tuple[Problem, ...] = ()
        try:
            read = ServerConfig.from_env(env, name)
            profile = resolve_model(read.replace(api_key=config.api_key))  # clients' only key
            read_shape(model := profile.require_model())
            found.append(profile)
        except ConfigError as error:
            wrong = error.problems
        except ModelFileError as error:
            key = f"LLAMACPP_{name.upper()}_MODEL"
            wrong = (Problem(key, str(model), str(error), "Choose another."),)
        problems += wrong
        left_out += [f"The profile {name} is left out. {problem}" for problem in wrong]
    if not found and not problems:
        key = f"LLAMACPP_{config.profile.upper()}_MODELS"
        problems.append(Problem(key, ", ".join(names), "No profile has a model.", "Set one."))
    if problems and not (every and found):
        raise ConfigError(str(env), tuple(problems))
    return Routed(tuple(found), tuple(left_out))


def load_profile(
    path: str | Path = ".env", profile: str = "primary"
) -> tuple[ServerConfig, ConfigError | None]:
    """Like `load_lenient`, and look up the profile's model."""
    return load_lenient(path, profile, lambda read: resolve_model(read) if read.model else read)


def _projector(config: ServerConfig, kept: FoundFile | None) -> Path | None:
    """Return the projector: the user's own flags decide, then the setting, then the catalog."""
    if config.model is None or config.mmproj == "off":
        return None
    if _PROJECTOR_FLAGS.intersection(config.extra_args):
        return None
    if config.mmproj:
        return config.mmproj
    roots = [store.path for store in model_stores(config)]
    return kept.projector if kept else find_projector(config.model, roots)


def _drafter(config: ServerConfig, others: Sequence[Store]) -> Path | None:
    """Return the draft model of the settings, else the smallest one that fits the model.

    Raises:
        ConfigError: There is none, or its vocabulary differs from the model's.
    """
    model, chosen = config.require_model(), config.draft_model
    if config.speculation is not Speculation.DRAFT:
        return None
    if chosen and can_draft(chosen, model):
        return chosen
    if chosen is None and _DRAFT_FLAGS.intersection(config.extra_args):
        return None
    drafts = find_drafts(model, [config.models_dir, *(store.path for store in others)])
    if chosen is None and drafts:
        return drafts[0]
    names = [_relative(path, config.models_dir) for path in drafts]
    fix = f"Choose {' or '.join(names[:_SHOWN])}." if names else _NO_DRAFT
    if chosen is None:
        reason = f"No model of half its size or less is known to have {model.name}'s vocabulary."
        raise ConfigError("", (Problem("speculation", "draft", reason, fix),))
    reason = f"Its vocabulary is not known to be that of {model.name}."
    value = _relative(chosen, config.models_dir)
    raise ConfigError("", (Problem("draft_model", value, reason, fix),))


class _Vocabulary(NamedTuple):
    """The facts about a tokenizer that decide whether two models share their tokens."""

    length: int = 0  # number of tokens; 0 if it can't be read
    digest: str = ""  # of its kind and its tokens, except the last, which are padding in some lists

    def matches(self, other: _Vocabulary) -> bool:
        """Return whether llama.cpp accepts two models with these vocabularies together."""
        alike = self.digest == other.digest and abs(self.length - other.length) <= _FEWER
        return alike and self.digest != ""


def find_drafts(model: Path, folders: Sequence[Path]) -> list[Path]:
    """List the models in and below folders that can draft for `model`, smallest first."""
    files = (file.path for folder in folders for file in find_files(folder) if file.signature)
    limit = total_size(model) // _SMALLER
    sizes = {
        path: size
        for path in files
        if path == first_shard(path) and (size := total_size(path)) <= limit
    }
    known = _vocabularies([model, *sizes])
    fitting = [path for path in sizes if known[path].matches(known[model])]
    return sorted(fitting, key=lambda path: (sizes[path], path))


def can_draft(draft: Path, model: Path) -> bool:
    """Return whether two models have the same vocabulary, whatever their sizes."""
    known = _vocabularies([draft, model])
    return known[draft].matches(known[model])


def _vocabularies(paths: Sequence[Path]) -> dict[Path, _Vocabulary]:
    """Return the vocabularies of files, reading only those that have changed since last time."""
    signatures = {str(path): signature for path in paths if (signature := signature_of(path))}
    cache = FileCache("vocabulary 2", lambda text: _Vocabulary(*json.loads(text)), json.dumps)
    known = cache.recall(signatures)
    new = {str(path): _vocabulary(path) for path in paths if str(path) not in known}
    cache.keep({name: (signatures[name], new[name]) for name in new if name in signatures})
    return {path: (known | new)[str(path)] for path in paths}


def _vocabulary(path: Path) -> _Vocabulary:
    try:
        header = read_header(path)
        tokens = header.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, ArrayInfo) or not header.tensors:
            return _Vocabulary()
        with path.open("rb") as file:
            file.seek(tokens.span.start)
            text = file.read(len(tokens.span))
    except (ModelFileError, OSError):  # the catalog reports the problem
        return _Vocabulary()
    kind = header.text("tokenizer.ggml.model") or ""
    return _Vocabulary(tokens.length, hashlib.sha256(kind.encode() + b"\0" + text).hexdigest())


def _what_is_wrong(
    path: Path, config: ServerConfig, others: Sequence[Store]
) -> tuple[str, str] | None:
    """Return the reason and remedy if a model can't be loaded from its path; None if it can."""
    models_dir = config.models_dir
    inside = any(_is_inside(path, folder) for folder in (models_dir, *(s.path for s in others)))
    if not config.allow_absolute_paths and not inside:
        reason = f"It is outside the models folder, {models_dir}."
        fix = "Move it there, set LLAMACPP_MODELS_DIR to a folder above it, or allow models"
        return reason, f"{fix} anywhere with LLAMACPP_ALLOW_ABSOLUTE_PATHS=1."
    if path.suffix.lower() != ".gguf" and not _file_in_store(path, others):
        kind = "is a folder" if is_folder(path) else "does not end in .gguf"
        return f"It {kind}, so llama-server can't load it.", _advice(path, models_dir)
    try:
        regular = S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        regular = False
    except OSError as error:
        return (
            f"Can't read it ({error.strerror}).",
            "Check the path and the permissions of the folders above it.",
        )
    if not regular:
        return f"There is no such file (looked in {path.parent}).", _advice(path, models_dir)
    if str(path).encode(errors="ignore") != os.fsencode(path):
        return "Its name, or that of a folder above it, is not valid UTF-8.", "Rename it."
    shard, shards = ShardName.parse(path), shard_paths(path)
    if shard and shard.number > 1:
        reason = f"It is shard {shard.number} of {shard.count}; a model is named by shard 1."
        return reason, f"Write {_relative(shards[0], models_dir)}."
    if missing := [each.name for each in shards if file_size(each) is None]:
        return (
            f"{len(missing)} of its {len(shards)} shards are missing from {path.parent}:"
            f" {name_some(missing, _SHOWN)}.",
            "Download the missing files beside the others.",
        )
    return None


def _file_in_store(path: Path, stores: Sequence[Store]) -> FoundFile | None:
    """Return Ollama's entry for a model that it keeps; None for any other."""
    ollama = [store for store in stores if store.kind is StoreKind.OLLAMA]
    files = (file for one in ollama if path.is_relative_to(one.path) for file in files_in(one))
    return next((file for file in files if file.path == path and file.known_as), None)


def _is_inside(path: Path, folder: Path) -> bool:
    """Return whether a file is in a folder, where the targets of its links count as in it."""
    direct = path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
    return direct or path.resolve().is_relative_to(folder.resolve())


def _advice(path: Path, models_dir: Path) -> str:
    """Suggest what could be meant: the closest models, the existing ones, how to download it."""
    value, names = _relative(path, models_dir), _names(models_dir)
    wanted = value.lower().removesuffix(".gguf")
    by_key = {key: name for name in names for key in (name.lower(), Path(name).stem.lower())}
    inside = [name for name in names if name.lower().startswith(wanted.rstrip("/") + "/")]
    close = [by_key[key] for key in get_close_matches(wanted, by_key, n=6)]
    near = list(dict.fromkeys(inside + close))[:_SHOWN]
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"{meant}{_listed(names, models_dir)}{_download_commands(value, models_dir)}"


def _names(models_dir: Path) -> list[str]:
    return sorted(
        _relative(file.path, models_dir)
        for file in find_files(models_dir)
        if file.signature and not file.parts and file.path == first_shard(file.path)
    )


def _listed(names: list[str], models_dir: Path) -> str:
    if not names:
        return f"There are no models in {models_dir}."
    return f"Models in {models_dir}: {name_some(names, _SHOWN)}."


def _download_commands(value: str, models_dir: Path) -> str:
    """Return our command and `hf download`, if the name looks like a Hub repository."""
    owned = f"OWNER/{value}" if _HUB_FOLDER.match(value) else value
    hub = _HUB_REPOSITORY.fullmatch(owned)
    if not hub or _FILE_ENDING.search(hub["repository"]):  # a mistyped file
        return ""
    repository, stem = hub["repository"], Path(hub["file"] or "").name.removesuffix(".gguf")
    pattern = f"*{stem}*.gguf" if stem else "*.gguf"
    quantization = named_quantization(stem)
    ours = f"kitty-nb download {repository}" + (f":{quantization}" if quantization else "")
    target = models_dir / repository.split("/")[1]
    theirs = f"hf download {repository} --include '{pattern}' --local-dir '{target}'"
    return f" To download it: {ours} (or: {theirs})"


def _relative(path: Path, models_dir: Path) -> str:
    return path.relative_to(models_dir).as_posix() if path.is_relative_to(models_dir) else str(path)
