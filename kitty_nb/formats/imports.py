"""Profiles read from files of other programs; the files are data, and nothing in them is run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tomllib
from configparser import ConfigParser
from configparser import Error as IniError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.catalog.stores import StoreKind, files_in, model_stores
from kitty_nb.config import PREFIX, ServerConfig, Speculation, env_settings, user_variables
from kitty_nb.config.flags import takes_secret
from kitty_nb.config.profiles import configured_profiles, load_lenient, split_key
from kitty_nb.engine.command_line import (
    ORIGINS,
    canonical,
    portable_arguments,
    read_arguments,
    split_options,
)
from kitty_nb.errors import ConfigError, KittyError
from kitty_nb.formats import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from kitty_nb.engine.locate import Dialect

_NAMES: dict[str, dict[str, str]] = tomllib.loads(
    Path(__file__).with_name("names.toml").read_text(encoding="utf-8")
)
_PRESETS = {"stop-timeout": "stop_grace_seconds", "load-on-startup": "pinned"}
_TRUE, _FALSE = {"true", "on", "enabled", "1"}, {"false", "off", "disabled", "0"}
_KEYS = {"--api-key", "--api-key-file"}
_REMOTE = {"-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-mu", "--model-url", "-dr"}
_FIRST_FREE_PORT, _LAST_PORT = 8082, 65535
# Characters of a file, and those that its macros add to one command. Nobody writes more by hand.
_LARGEST, _LONGEST = 1_000_000, 100_000


@dataclass(slots=True)
class _Entry:
    """One model of a file.

    Attributes:
        name: Its name there.
        words: The equivalent arguments of llama-server.
        notes: What has no meaning here, in sentences.
        settings: Its other settings, by field.
        aliases: Its other names.
    """

    name: str
    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)

    def leave_out(self, names: Iterable[object], why: str = "") -> None:
        """Note what is left out, if anything is."""
        if left := ", ".join(map(str, names)):
            self.notes.append(f"left out: {left}.{why}")


class _File(NamedTuple):
    """A file to be read: its text and path, notes on all of it, and the flags of an engine."""

    text: str
    path: Path
    notes: list[str]
    dialect: Dialect | None


@dataclass(frozen=True, slots=True)
class Imported:
    """The contents of a file.

    Attributes:
        configs: The profiles, not yet in any `.env` file.
        notes: What was left out and what to do about it, in sentences.
    """

    configs: tuple[ServerConfig, ...]
    notes: tuple[str, ...]


def import_profiles(
    file: Path,
    env: str | Path = ".env",
    source: Source | None = None,
    *,
    name: str | None = None,
    model: Path | None = None,
    dialect: Dialect | None = None,
) -> Imported:
    """Read the profiles in a file of another program.

    Args:
        file: The file.
        env: The `.env` file that they are for: settings for all profiles apply to them, too.
        source: The program it was written for; None to tell by its name and content.
        name: The profile's name, if the file holds one; None for its name there.
        model: The model of a profile for which the file names none, absolute or in the models
            folder.
        dialect: The flags of an engine, to tell a switch from a flag with a value.

    Raises:
        KittyError: The file can't be read, is for no known program, or contains no profile.
    """
    try:
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(_LARGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise KittyError(f"Can't read {file} ({why}).") from None
    if len(text) > _LARGEST:
        raise KittyError(f"Can't read {file}: it is larger than {_LARGEST:,} characters.")
    notes: list[str] = []
    read = _READERS[source or _source_of(file, text)]
    try:
        entries = list(read(_File(text, file, notes, dialect)))
    except (yaml.YAMLError, IniError, ValueError) as error:
        raise KittyError(f"Can't read {file}: {error}") from None
    except (AttributeError, TypeError, LookupError, RecursionError) as error:
        raise KittyError(f"Can't read {file}: it has an unexpected form ({error}).") from None
    if not entries:
        raise KittyError("\n".join([f"{file} holds no profile.", *notes]))
    if name is not None and len(entries) > 1:
        raise KittyError(f"{file} holds {len(entries)} profiles, so they keep their names.")
    place = _Place(file.absolute().parent, env, model)
    configs = []
    for entry in entries:
        configs.append(place.settle(entry, name))
        notes += [f"{configs[-1].profile}: {note}" for note in entry.notes]
    return Imported(tuple(configs), tuple(dict.fromkeys(notes)))


def _source_of(file: Path, text: str) -> Source:
    by_suffix = {
        ".yaml": Source.LLAMA_SWAP,
        ".yml": Source.LLAMA_SWAP,
        ".ini": Source.ROUTER,
        ".json": Source.LM_STUDIO,
    }
    if source := by_suffix.get(file.suffix.lower()):
        return source
    if re.search(r"^\s*FROM\s+\S", text, re.IGNORECASE | re.MULTILINE):
        return Source.OLLAMA
    raise KittyError(
        f"Can't tell which program {file} is for. Add --from with one of {', '.join(Source)}."
    )


# llama-swap


def _read_llama_swap(file: _File) -> Iterator[_Entry]:
    whole = yaml.safe_load(file.text) or {}
    known = {"models", "peers", "macros", "healthCheckTimeout", "globalTTL", "startPort"}
    for key in sorted(whole.keys() - known):
        if key == "apiKeys":
            file.notes.append("apiKeys are left out: set LLAMACPP_API_KEY in .env yourself.")
        else:
            file.notes.append(f"{key!r} of llama-swap is left out.")
    for name, model in (whole.get("models") or {}).items():
        entry = _Entry(str(name))
        macros = {**(whole.get("macros") or {}), **(model.get("macros") or {}), "MODEL_ID": name}
        command = _expand(_without_comments(_text(model.get("cmd"))), macros, entry.notes)
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"the command of {name} can't be split into words ({error})") from None
        if not _take_program(entry, words):
            file.notes.append(
                f"{name}: its command starts no llama-server here, so it is left out."
            )
            continue
        ttl = model.get("ttl", -1)
        ttl = whole.get("globalTTL", 0) if ttl == -1 else ttl
        if ttl:
            entry.settings["idle_shutdown_seconds"] = _text(ttl)
        if timeout := _text(model.get("unloadTimeout")):
            entry.settings["stop_grace_seconds"] = timeout
        entry.aliases += map(_text, model.get("aliases") or [])
        read = {"cmd", "macros", "ttl", "unloadTimeout", "aliases", "name", "description", "proxy"}
        entry.leave_out(sorted(map(str, model.keys() - read)))
        yield entry
    for name, peer in (whole.get("peers") or {}).items():
        entry = _Entry(str(name), settings={"url": _text(peer.get("proxy"))})
        names = [*map(_text, peer.get("models") or [])]
        if len(names) == 1:
            entry.settings["alias"] = names[0]
        left = sorted(map(str, peer.keys() - {"proxy", "models"}))
        entry.leave_out(left, " Write a key into .env.")
        yield entry


def _text(value: object) -> str:
    """Return a value as text, but no list or mapping: aliases can make it larger than memory."""
    if isinstance(value, list | dict):
        raise TypeError("it has a list or a mapping instead of a text")
    return str(value or "")


def _without_comments(command: str) -> str:
    lines = [line for line in command.splitlines() if not line.strip().startswith("#")]
    return "\n".join(line.rstrip().removesuffix("\\") for line in lines)


def _expand(command: str, macros: Mapping[str, object], notes: list[str]) -> str:
    """Expand macros, also in macros; the macro for a port that llama-swap chooses stays."""
    left = _LONGEST

    def value(found: re.Match[str]) -> str:
        nonlocal left
        name = found[1]
        if name in macros:
            text = _text(macros[name])
            left -= len(text)
            if left < 0:
                raise ValueError("its macros expand without end")
            return text
        known = user_variables([name[4:]]) if name.startswith("env.") else {}
        if known and not takes_secret(f"--{name[4:]}"):
            return known[name[4:]]
        if name != "PORT":
            why = "may be a secret" if known else "is not set"
            notes.append(f"{found[0]} {why}, and stays as it is.")
        return found[0]

    for _ in range(len(macros) + 1):
        before, command = command, re.sub(r"\$\{([\w.-]+)\}", value, command)
        if command == before:
            break
    return _without_comments(command)


def _take_program(entry: _Entry, words: list[str]) -> bool:
    """Take the arguments of a command that starts llama-server; return whether it does."""
    ours = "kitty_nb.engine.embedded"
    starts = [word == ours or Path(word).name.startswith("llama-server") for word in words]
    at = starts.index(True) if any(starts) else None
    if at is None or Path(words[0]).name in {"docker", "podman"}:
        return False
    program = Path(words[at])
    entry.words = words[at + 1 :]
    if words[at] == ours:
        return True
    if at:
        # Only its name: what follows may be a secret.
        before = words[0].partition("=")[0]
        entry.leave_out([before, "and everything else before llama-server"])
    if program.is_absolute() and str(program) != shutil.which("llama-server"):
        entry.settings["binary"] = program
    return True


# llama-server's router


def _read_router(file: _File) -> Iterator[_Entry]:
    parser = ConfigParser(
        delimiters=("=",),
        comment_prefixes=(";", "#"),
        strict=False,
        interpolation=None,
        default_section="",  # only "*" applies to all sections
        empty_lines_in_values=False,
    )
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string(f"[default]\n{file.text}")
    shared = dict(parser["*"]) if "*" in parser else {}
    for name in parser.sections():
        own = dict(parser[name])
        if name == "*" or (name == "default" and not own.keys() - {"version"}):
            continue
        entry = _Entry(name)
        for key, value in (shared | own).items():
            value = re.split("[;#]", value, maxsplit=1)[0].strip()  # noqa: PLW2901
            _take_preset(entry, key, value, file.dialect)
        yield entry


def _take_preset(entry: _Entry, key: str, value: str, dialect: Dialect | None) -> None:
    if key in {"version", "dedup-cache-models"}:
        return
    if setting := _PRESETS.get(key):
        entry.settings[setting] = value
        return
    flag = _flag_of_preset(key, dialect)
    option = dialect.option(flag) if dialect else None
    is_switch = not option.values if option else value.lower() in {"true", "false"}
    if not is_switch:
        entry.words += (flag, value)
    elif value.lower() in _TRUE:
        entry.words.append(flag)
    elif value.lower() in _FALSE:
        negated = flag.replace("--no-", "--", 1) if flag.startswith("--no-") else f"--no-{flag[2:]}"
        if canonical(flag) == "--jinja" or (dialect and dialect.option(negated)):
            entry.words.append(negated)


def _flag_of_preset(key: str, dialect: Dialect | None) -> str:
    """Return the flag that a key means: a flag without its dashes, or the name of its variable."""
    if key.startswith("LLAMA_ARG_"):
        name = key.removeprefix("LLAMA_ARG_")
        return _NAMES["router"].get(name, "--" + name.lower().replace("_", "-"))
    if key == "LLAMA_API_KEY":
        return "--api-key"
    short = f"-{key}"
    known = canonical(short) != short or (dialect and dialect.option(short))
    return short if known else f"--{key}"


# Ollama


def _read_modelfile(file: _File) -> Iterator[_Entry]:
    entry = _Entry("")
    left: dict[str, None] = {}
    for instruction, argument in _instructions(file.text):
        match instruction:
            case "FROM":
                entry.name = _take_base(entry, argument, file.path)
            case "PARAMETER":
                name, _, value = argument.partition(" ")
                value = value.strip().strip('"')
                flag = _NAMES["ollama"].get(name.lower())
                if flag is None:
                    left[f"PARAMETER {name}"] = None
                else:
                    switch = {"true": True, "false": False}.get(value.lower())
                    entry.words += _option(flag, value if switch is None else switch)
            case "ADAPTER":
                path = file.path.parent / _at_home(argument)
                entry.words += ("--lora", str(path.absolute()))
            case "LICENSE" | "REQUIRES":
                pass
            case _:
                left[instruction] = None
    entry.leave_out(
        left,
        " System prompts, templates and stop words belong to the request or the model here.",
    )
    if entry.name:
        yield entry


def _at_home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 (keeps ~name if there is no such user)


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = iter(text.splitlines())
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if not word or word.startswith("#"):
            continue
        rest = rest.strip()
        if rest.count('"""') == 1:
            parts = [rest]
            for more in lines:
                parts.append(more)
                if '"""' in more:
                    break
            rest = "\n".join(parts)
        yield word.upper(), rest.replace('"""', "")


def _take_base(entry: _Entry, base: str, file: Path) -> str:
    path = file.parent / _at_home(base)
    if path.exists() or path.suffix.lower() == ".gguf":
        entry.words += ("--model", str(path.absolute()))
        suffix = file.suffix.removeprefix(".")  # as in Modelfile.coder
        return suffix if file.stem.lower() == "modelfile" and suffix else path.stem
    stores = [store for store in model_stores(ServerConfig()) if store.kind is StoreKind.OLLAMA]
    for found in (found for store in stores for found in files_in(store)):
        if {base, f"{base}:latest"} & set((found.known_as or "").split(", ")):
            entry.words += ("--model", str(found.path))
            return base
    entry.notes.append(f"Ollama has no model {base} on this machine. Run: ollama pull {base}")
    return base


# LM Studio


def _read_lm_studio(file: _File) -> Iterator[_Entry]:
    whole = json.loads(file.text)
    entry = _Entry(str(whole.get("name") or file.path.name.partition(".")[0]))
    parts = [whole, whole.get("operation") or {}, whole.get("load") or {}]
    given = {one["key"]: one.get("value") for part in parts for one in part.get("fields") or []}
    table = _NAMES["lm-studio"]
    if "load_params" in whole or "inference_params" in whole:
        given = {**(whole.get("load_params") or {}), **(whole.get("inference_params") or {})}
        table = _NAMES["lm-studio-0-2"]
    left = []
    for key, value in given.items():
        if isinstance(value, dict) and "checked" in value:
            if not value["checked"]:
                continue
            value = value.get("value")  # noqa: PLW2901
        flag = table.get(key)
        if flag == "--n-gpu-layers" and "Ratio" in key:
            value = {"max": 999, 1: 999, "off": 0, 0: 0}.get(value)  # noqa: PLW2901
        if flag is None or (flag and not isinstance(value, bool | int | float | str)):
            if value not in ("", None, [], {}):
                left.append(key)
        elif flag:
            entry.words += _option(flag, value)
    entry.leave_out(left)
    entry.words += _model_of_lm_studio(file.path)
    yield entry


def _model_of_lm_studio(file: Path) -> tuple[str, ...]:
    """Return the model that LM Studio keeps these settings for, by their file's name."""
    home, found, name = str(file.absolute()).partition("/user-concrete-model-default-config/")
    if not found:
        return ()
    path = Path(home).parent / "models" / name.removesuffix(".json")
    return ("--model", str(path)) if path.is_file() else ()


def _option(flag: str, value: object) -> tuple[str, ...]:
    """Return the words for a value of another program."""
    if not flag:
        return ()
    if flag == "--flash-attn":
        return (flag, "on" if value else "off")
    if isinstance(value, bool):
        wanted = value is not flag.startswith("!")
        return (flag.removeprefix("!"),) if wanted else ()
    return (flag, str(value))


_READERS: dict[Source, Callable[[_File], Iterator[_Entry]]] = {
    Source.LLAMA_SWAP: _read_llama_swap,
    Source.ROUTER: _read_router,
    Source.OLLAMA: _read_modelfile,
    Source.LM_STUDIO: _read_lm_studio,
}


class _Place:
    """The destination of profiles: names and ports must be free there, and files accessible.

    Args:
        folder: The folder that relative paths start from.
        env: The `.env` file.
        model: The model of a profile that names none.
    """

    def __init__(self, folder: Path, env: str | Path, model: Path | None) -> None:
        self._folder, self._env, self._model = folder, env, model
        self._names: set[str] = set()
        there = {name: load_lenient(env, name)[0] for name in configured_profiles(env)}
        self._ports = {name: config.port for name, config in there.items() if config.model}

    def settle(self, entry: _Entry, name: str | None) -> ServerConfig:
        """Return the settings that an entry asks for."""
        profile = self._free_name(name or entry.name)
        base, _ = load_lenient(self._env, profile)
        if "url" in entry.settings:
            return base.replace(**_valid(base, entry.settings, entry))
        words = [word for option in split_options(entry.words) for word in _kept(option, entry)]
        settings = read_arguments(words) | entry.settings
        extra_args = settings.pop("extra_args")
        if "model" not in settings and self._model:
            settings["model"] = base.models_dir / self._model
        for file in ("model", "mmproj", "draft_model"):
            if settings.get(file, "off") != "off":
                settings[file] = self._path(str(settings[file]), entry)
        if "model" not in settings:
            entry.notes.append(f"it names no model: set LLAMACPP_{profile.upper()}_MODEL.")
        settings |= self._names_of(entry, profile, settings)
        settings["port"] = self._free_port(profile, settings.get("port"), base.port)
        files: dict[str, Any] = {
            file: settings.pop(file) for file in ("mmproj", "draft_model") if file in settings
        }
        if "draft_model" in files:
            settings.setdefault("speculation", Speculation.DRAFT)
        wanted = base.replace(**_valid(base, settings, entry))
        return _as_found(wanted, files, extra_args, entry)

    def _free_name(self, name: str) -> str:
        plain = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").lower()
        plain = plain if plain[:1].isalpha() else f"model_{plain}".rstrip("_")
        # A profile "qwen_draft" could not have a model: LLAMACPP_QWEN_DRAFT_MODEL is a setting of
        # the profile "qwen", as LLAMACPP_DRAFT_MODEL is one of all.
        keys = (f"{PREFIX}{plain.upper()}_{one.suffix}" for one in env_settings().values())
        meant = any(split_key(key)[0].lower() != plain for key in keys)
        number, free = 2, f"{plain}2" if meant else plain
        while free in self._names:
            free, number = f"{plain}_{number}", number + 1
        self._names.add(free)
        return free

    def _free_port(self, profile: str, asked: object, usual: int) -> int:
        taken = {port for name, port in self._ports.items() if name != profile}
        wanted = int(str(asked)) if asked else usual
        if wanted in taken:
            above = range(max(_FIRST_FREE_PORT, *taken) + 1, _LAST_PORT + 1)
            ports = (*above, *range(_FIRST_FREE_PORT, _LAST_PORT + 1))
            wanted = next(port for port in ports if port not in taken)
        self._ports[profile] = wanted
        return wanted

    def _path(self, value: str, entry: _Entry) -> Path:
        path = self._folder / _at_home(value)
        if not path.exists():
            entry.notes.append(f"there is no {path}.")
        return path

    @staticmethod
    def _names_of(entry: _Entry, profile: str, settings: Mapping[str, object]) -> dict[str, object]:
        """Return the name that clients ask for; none if the model's own is meant."""
        own = [] if entry.name.lower() == profile else [entry.name]
        names = [*map(str, filter(None, [settings.get("alias")])), *entry.aliases, *own]
        if rest := [name for name in dict.fromkeys(names[1:]) if name != names[0]]:
            entry.notes.append(
                f"clients can ask for {names[0]} only, no longer for {', '.join(rest)}."
            )
        model = settings.get("model")
        stem = model.stem if isinstance(model, Path) else None
        return {"alias": names[0] if names and names[0] != stem else None}


def _kept(option: tuple[str, ...], entry: _Entry) -> tuple[str, ...]:
    """Return an option, or nothing if it can't be taken over."""
    flag, *values = option
    if takes_secret(flag) or canonical(flag) in _KEYS:
        name = flag.partition("=")[0]
        key = "API_KEY" if canonical(name) in _KEYS else "EXTRA_ARGS"
        entry.notes.append(f"{name} is left out: set LLAMACPP_{key} in .env yourself.")
        return ()
    if flag in _REMOTE:
        name = re.sub("//[^/]*@", "//", values[0]) if values else ""  # without a password
        entry.notes.append(f"{flag} {name} is left out. Run: kitty-nb download {name}")
        return ()
    ours = {"--port": ["${PORT}"], ORIGINS: ["localhost"]}  # llama-swap's choice, and kitty_nb's
    if ours.get(canonical(flag)) == values:
        return ()
    return option


def _valid(base: ServerConfig, settings: Mapping[str, object], entry: _Entry) -> dict[str, object]:
    kept = {}
    for name, value in settings.items():
        try:
            base.replace(**{name: value})
        except ConfigError as error:
            entry.notes.append(f"left out: {error.problems[0]}")
        else:
            kept[name] = value
    return kept


def _as_found(
    wanted: ServerConfig,
    files: Mapping[str, Any],
    extra_args: Iterable[str],
    entry: _Entry,
) -> ServerConfig:
    """Leave it to kitty_nb to find what it can: projector, draft model, task."""
    resolved = _resolved(wanted, entry) if wanted.model else None
    if resolved is None:
        return wanted.replace(**files, extra_args=extra_args)
    changes: dict[str, object] = {"allow_absolute_paths": resolved.allow_absolute_paths}
    if resolved.projector != files.get("mmproj"):
        changes["mmproj"] = files.get("mmproj", "off")
    if "draft_model" in files and resolved.drafter != files["draft_model"]:
        changes["draft_model"] = files["draft_model"]
    by_itself = [
        (canonical(flag), *values) for flag, *values in split_options(portable_arguments(resolved))
    ]
    changes["extra_args"] = [
        word
        for flag, *values in split_options(extra_args)
        if (canonical(flag), *values) not in by_itself
        for word in (flag, *values)
    ]
    return wanted.replace(**changes)


def _resolved(config: ServerConfig, entry: _Entry) -> ServerConfig | None:
    """Look up the files of settings; a model may be outside the models folder."""
    reason = ""
    for allowed in dict.fromkeys((config.allow_absolute_paths, True)):
        try:
            return resolve_model(config.replace(allow_absolute_paths=allowed))
        except ConfigError as error:
            reason = f"{error.problems[0].reason} {error.problems[0].fix}"
    if config.model and config.model.exists():
        entry.notes.append(reason)
    return None
