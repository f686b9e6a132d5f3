"""The profiles of a `.env` file: loaded leniently, saved back, checked for warnings, run elsewhere.

The file is found as by `ServerConfig.from_env`. All of this raises `ConfigError` if it can't be
read, or a line in it can't be parsed.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dotenv.parser import parse_stream
from pydantic import BaseModel, ConfigDict, SecretStr

from kitty_nb.config import PREFIX, ROLES, ServerConfig, env_settings, setting_keys, shown
from kitty_nb.config.env_file import quoted, read_env, write_env
from kitty_nb.config.flags import FLAG_PREFIX
from kitty_nb.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from kitty_nb.config.env_file import EnvFile, SavedEnv

# Prefers no profile to one, and a short name to a long one: suffixes contain underscores, too.
_SETTING = re.compile(
    rf"{PREFIX}(?:(?P<profile>[A-Z][A-Z0-9_]*?)_)??"
    rf"(?P<suffix>{'|'.join(setting.suffix for setting in env_settings().values())})"
)
_MODEL_FILES = {"model", "mmproj"}
_PATHS = {"MODELS_DIR", "MODEL", "BIN", "LOG_DIR", "HISTORY"}
_CURLY = "\u201c\u201d\u2018\u2019\u201e"
_BARE = re.compile(r"\$(?P<name>[A-Za-z_]\w*)")
_BRACED = re.compile(r"\$\{(?P<name>[^}:]+)\}")
_FOLDERS = frozenset({"models_dir", "log_dir", "history", "binary"})
_IN_MODELS = ("model", "mmproj", "draft_model")
_SO_ALIKE = 0.85  # of 1: a typo, rather than another name


def load_lenient(
    path: str | Path = ".env",
    profile: str = "primary",
    check: Callable[[ServerConfig], ServerConfig] | None = None,
) -> tuple[ServerConfig, ConfigError | None]:
    """Load the settings of a profile, skipping those that are wrong.

    `check` is a further check of the settings, which raises `ConfigError`.

    Returns:
        The settings, and an error about those that were skipped; None if none was.
    """
    return _load(read_env(path), profile, check)


def _load(
    env: EnvFile, profile: str, check: Callable[[ServerConfig], ServerConfig] | None = None
) -> tuple[ServerConfig, ConfigError | None]:
    wrong: dict[str, Problem] = {}
    while True:  # a wrong value may hide another, such as the one for every profile
        try:
            config = ServerConfig.from_file(env, profile, wrong)
            config = check(config) if check else config
        except ConfigError as error:
            keys = setting_keys(env, profile, wrong)
            found = dict(_as_written(problem, env, keys) for problem in error.problems)
            if found.keys() <= wrong.keys():
                raise
            wrong |= found
        else:
            problems = tuple(wrong.values())
            return config, ConfigError(str(env.path), problems) if problems else None


def _as_written(problem: Problem, env: EnvFile, keys: Mapping[str, str]) -> tuple[str, Problem]:
    """Return the key of a problem in the file, and the problem with the value in the file."""
    if key := keys.get(problem.key):
        problem = replace(problem, key=key, value=str(env.values[key]))
    return problem.key, problem


def configured_profiles(path: str | Path = ".env") -> tuple[str, ...]:
    """Return the profiles in a `.env` file: roles first, then the others in the file's order.

    A role counts if it has any key of its own, another profile if it has a model or a URL, or
    routes to other profiles, and `primary` if there is no other.
    """
    found = dict.fromkeys(
        name.lower()
        for key, value in read_env(path).values.items()
        if value
        for name, suffix in [split_key(key)]
        if suffix in {"MODEL", "MODELS", "URL"} or name.lower() in ROLES
    )
    roles = [role for role in ROLES if role in found]
    others = [name for name in found if name and name not in ROLES]
    if "" in found and "primary" not in roles:  # LLAMACPP_MODEL, a model for profiles without one
        roles.insert(0, "primary")
    return (*roles, *others) or ("primary",)


def split_key(key: str) -> tuple[str, str]:
    """Split a key into its profile, empty if it applies to all, and the setting's suffix.

    Both are empty if the key is not a setting.
    """
    found = _SETTING.fullmatch(key)
    return (found["profile"] or "", found["suffix"]) if found else ("", "")


def save_settings(
    config: ServerConfig,
    path: str | Path = ".env",
    names: Collection[str] | None = None,
    read: ServerConfig | None = None,
) -> SavedEnv:
    """Write the settings that differ from a `.env` file into it, for their profile alone.

    Each goes to `LLAMACPP_<PROFILE>_<NAME>`, so other profiles stay as they are. Secrets are never
    written. The rest of the file stays, and a backup of the old one is kept.

    Args:
        config: The settings.
        path: The file; created if it is missing.
        names: The fields to write; all by default.
        read: The file's settings when it was last read. Those that have since changed in the file,
            but not in `config`, stay.

    Raises:
        ConfigError: The file can't be read or written, or a setting that applies to every profile
            would have to be unset.
    """
    env = read_env(path)
    return write_env(env, _changes(env, config, names, read))


def add_profiles(
    configs: Collection[ServerConfig], path: str | Path = ".env", *, replace: bool = False
) -> SavedEnv:
    """Write whole profiles into a `.env` file, either all of them or none.

    Args:
        configs: Their settings. Secrets are never written.
        path: The file; created if it is missing.
        replace: Whether to change profiles that are in the file already.

    Raises:
        ConfigError: As `save_settings`, or a profile is in the file already.
    """
    env = read_env(path)
    there = {split_key(key)[0].lower() for key, value in env.values.items() if value}
    other = " To keep it, rename the new one with --profile." if len(configs) == 1 else ""
    fix = f"To change it, add --replace.{other}"
    problems = [
        Problem(config.profile, "", "It is in the file already.", fix)
        for config in configs
        if config.profile in there and not replace
    ]
    if problems:
        raise ConfigError(str(env.path), tuple(problems))
    return write_env(env, _additions(env, configs))


def added_lines(configs: Collection[ServerConfig], path: str | Path = ".env") -> tuple[str, ...]:
    """Return the lines that `add_profiles` with `replace` would write into a `.env` file.

    Raises:
        ConfigError: As `save_settings`.
    """
    changes = _additions(read_env(path), configs)
    return tuple(f"{key}={quoted(value)}" for key, value in changes.items())


def _additions(env: EnvFile, configs: Collection[ServerConfig]) -> dict[str, str]:
    changes: dict[str, str] = {}
    for config in configs:
        changes |= _changes(env, config)
    return changes


def _changes(
    env: EnvFile,
    config: ServerConfig,
    names: Collection[str] | None = None,
    read: ServerConfig | None = None,
) -> dict[str, str]:
    """Return the keys that a profile's settings would change in a file, with their values."""
    given, complaint = _load(env, config.profile)
    wrong = {problem.key for problem in complaint.problems} if complaint else set()
    changes: dict[str, str] = {}
    problems = []
    for name, setting in env_settings().items():
        key, shared = f"{PREFIX}{config.profile.upper()}_{setting.suffix}", PREFIX + setting.suffix
        value, in_file = getattr(config, name), getattr(given, name)
        stays = read is not None and value == getattr(read, name) != in_file
        differs = value != in_file or key in wrong
        if stays or not differs or isinstance(value, SecretStr) or (names and name not in names):
            continue
        changes[key] = _text(name, value, given)
        if not changes[key] and env.values.get(shared):
            reason = "It applies to every profile, so one profile can't unset it."
            fix = "Clear it in the file, or choose a value."
            problems.append(Problem(shared, shown(name, env.values[shared]), reason, fix))
    if problems:
        raise ConfigError(str(env.path), tuple(problems))
    return changes


def env_lines(config: ServerConfig, names: Collection[str]) -> tuple[str, ...]:
    """Return settings as lines of a `.env` file, for their profile alone; never secrets."""
    return tuple(
        f"{PREFIX}{config.profile.upper()}_{setting.suffix}={quoted(_text(name, value, config))}"
        for name, setting in env_settings().items()
        if name in names and not isinstance(value := getattr(config, name), SecretStr)
    )


def _text(name: str, value: object, given: ServerConfig) -> str:
    """Write a value as `ServerConfig.from_env` reads it: a model by its path in its folder."""
    match value:
        case None:
            return "auto" if name == "mmproj" else ""
        case bool():
            return str(int(value))
        case tuple():
            return shlex.join(value)
        case Path() if name in _MODEL_FILES and value.is_relative_to(given.models_dir):
            inside = str(value.relative_to(given.models_dir))
            return str(value) if inside.startswith("~") else inside
    return str(value)


def env_warnings(path: str | Path, *profiles: str) -> tuple[str, ...]:
    """Return warnings about keys, values and variables that don't have the intended effect.

    Each is a sentence with its fix. None shows a value.
    """
    env = read_env(path)
    return (*_keys(env), *_values(env), *_urls(env, profiles), *_environment(env, profiles))


def _keys(env: EnvFile) -> Iterator[str]:
    profiles: dict[str, str] = {}
    for key, value in env.values.items():
        if not value or not key.startswith(PREFIX):
            continue
        profile, suffix = split_key(key)
        if not suffix:
            yield f"{key} is not a setting, so it has no effect.{_nearest(key, profiles)}"
        elif profile:
            profiles.setdefault(profile.lower(), key)
    for profile, key in profiles.items():
        # A name that extends another, such as coder2, is intentional.
        others = [
            name
            for name in (*ROLES, *profiles)
            if not name.startswith(profile) and not profile.startswith(name)
        ]
        near = get_close_matches(profile, others, n=1, cutoff=_SO_ALIKE)
        if near and profile not in ROLES:
            meant = key.replace(f"_{profile.upper()}_", f"_{near[0].upper()}_", 1)
            yield f"{key} defines a profile {profile!r}. If you mean {near[0]!r}, write {meant}."


def _nearest(key: str, profiles: Iterable[str]) -> str:
    words = key.removeprefix(PREFIX)
    role = next((name for name in (*ROLES, *profiles) if words.startswith(f"{name.upper()}_")), "")
    rest = words[len(role) + 1 :] if role else words
    names = {name.upper(): one.suffix for name, one in env_settings().items()}
    names |= {one.suffix: one.suffix for one in env_settings().values()}
    near = get_close_matches(rest.upper(), names, n=1)
    whose = f"{role.upper()}_" if role else ""
    return f" Did you mean {PREFIX}{whose}{names[near[0]]}?" if near else ""


def _values(env: EnvFile) -> Iterator[str]:
    known: set[str] = set()
    for binding in parse_stream(StringIO(env.raw.decode("utf-8-sig"), newline=None)):
        key, value = binding.key, binding.value
        if not key:
            continue
        if value and key.startswith(PREFIX):
            for match in _BRACED.finditer(value):
                name = match["name"]
                if name not in known and not os.environ.get(name):
                    yield (
                        f"{key} uses ${{{name}}}, which is not set and counts as empty. Set {name}"
                        " on a line above, or write its value there."
                    )
            if split_key(key)[1] in _PATHS and (bare := _BARE.search(value)):
                name = bare["name"]
                yield f"{key} contains ${name}, which is taken literally. Write ${{{name}}}."
            if value[0] in _CURLY or value[-1] in _CURLY:
                yield f"{key} contains curly quotes, which become part of its value. Use \" or '."
        known.add(key)


def _urls(env: EnvFile, profiles: Iterable[str]) -> Iterator[str]:
    for profile in profiles:
        config, _ = _load(env, profile)
        names = setting_keys(env, profile)
        if config.key_in_the_clear:
            yield (
                f"{names['url']} is http to another machine, so {names['api_key']} travels there"
                " unencrypted. Use https, or an SSH tunnel."
            )
        if config.url and names.get("api_key") == f"{PREFIX}API_KEY":
            yield (
                f"{names['api_key']} is not sent to {names['url']}, because it is not that"
                " profile's own key. If that server requires a key, set"
                f" {PREFIX}{profile.upper()}_API_KEY."
            )


def _environment(env: EnvFile, profiles: Iterable[str]) -> Iterator[str]:
    whose = {"", *map(str.lower, profiles)}
    names = [
        key
        for key, value in sorted(os.environ.items())
        if value and key.startswith(PREFIX) and value != env.values.get(key)
        if (split := split_key(key))[1] and split[0].lower() in whose
    ]
    if names:
        has, them = ("has", "it") if len(names) == 1 else ("have", "them")
        yield (
            f"{', '.join(names)} in this program's environment {has} no effect: settings are read"
            f" from {env.path} alone. Write {them} there."
        )
    if flags := sorted(name for name in os.environ if name.startswith(FLAG_PREFIX)):
        yield (
            f"{', '.join(flags)} in this program's environment: not passed on to llama-server."
            " Write the flag into LLAMACPP_EXTRA_ARGS."
        )


class Places(BaseModel):
    """The folders and files of another machine, which its own `.env`, or else a default, names."""

    model_config = ConfigDict(frozen=True)

    home: Path
    models_dir: Path
    log_dir: Path  # the folder for logs and records
    history: Path
    binary: Path | None = None  # the llama-server program; None to find one

    @classmethod
    def of_this_machine(cls, profile: str) -> Self:
        """Read those of this machine, for a profile that is to run here.

        Raises:
            ConfigError: The `.env` file can't be read.
        """
        config, _ = load_lenient(".env", profile)
        return cls(home=Path.home(), **{name: getattr(config, name) for name in _FOLDERS})

    def settle(self, config: ServerConfig) -> ServerConfig:
        """Return a profile's settings with all paths as they are on that machine.

        That machine decides the paths that the settings leave to the default.
        """

        def absolute(folder: Path, path: Path) -> Path:
            first, *rest = path.parts or ("",)
            return self.home.joinpath(*rest) if first == "~" else folder / path

        found: dict[str, Any] = {}
        for name in _FOLDERS:
            value = getattr(config, name)
            is_default = value == ServerConfig.model_fields[name].default
            found[name] = getattr(self, name) if is_default else absolute(self.home, value)
        for name in _IN_MODELS:
            if isinstance(value := getattr(config, name), Path):
                found[name] = absolute(found["models_dir"], value)
        return config.model_copy(update=found)


def as_written(config: ServerConfig) -> ServerConfig:
    """Return the settings of another machine with models as a `.env` file names them."""
    folder = config.models_dir
    named = {name: getattr(config, name) for name in _IN_MODELS}
    short = {
        name: value.relative_to(folder)
        for name, value in named.items()
        if isinstance(value, Path) and value.is_relative_to(folder)
    }
    return config.model_copy(update=short)
