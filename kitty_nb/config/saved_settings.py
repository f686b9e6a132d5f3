"""A profile's settings in a `.env` file: those that are usable, and writing them back."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from kitty_nb.config.env_file import EnvFile, read_env
from kitty_nb.config.env_writer import SavedEnv, quoted, write_env
from kitty_nb.config.profiles import PREFIX
from kitty_nb.config.server_config import ServerConfig, env_settings, shown
from kitty_nb.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Collection

_MODEL_FILES = {"model", "mmproj"}


def salvage_settings(
    path: str | Path = ".env", profile: str = "primary"
) -> tuple[ServerConfig, ConfigError | None]:
    """Read the settings of a profile, and go on without those that are wrong.

    Args:
        path: The file, found as by `ServerConfig.from_env`.
        profile: Which named set of settings to read.

    Returns:
        The settings, and the complaint about what was left out of them.

    Raises:
        ConfigError: The file cannot be read, or a line in it cannot be understood.
    """
    return _salvage(read_env(path), profile)


def save_settings(
    config: ServerConfig, path: str | Path = ".env", names: Collection[str] | None = None
) -> SavedEnv:
    """Write the settings that differ from a `.env` file into it, for their profile alone.

    Each goes to `LLAMACPP_<PROFILE>_<NAME>`, so other profiles stay as they are. Secrets are never
    written. The rest of the file stays, and a backup of the old one is kept.

    Args:
        config: The settings.
        path: The file, found as by `ServerConfig.from_env`; made when it is missing.
        names: The fields to write; all of them without it.

    Raises:
        ConfigError: The file cannot be read or written, what would be written could not be read
            back, or a setting is to be unset that is set for every profile.
    """
    env = read_env(path)
    given, complaint = _salvage(env, config.profile)
    wrong = {problem.key for problem in complaint.problems} if complaint else set()
    changes: dict[str, str] = {}
    problems = []
    for name, setting in env_settings().items():
        key, shared = f"{PREFIX}{config.profile.upper()}_{setting.suffix}", PREFIX + setting.suffix
        value = getattr(config, name)
        differs = value != getattr(given, name) or key in wrong
        if not differs or isinstance(value, SecretStr) or (names and name not in names):
            continue
        changes[key] = _text(name, value, given) or setting.unset
        if not changes[key] and env.values.get(shared):
            reason = "It holds for every profile, so one profile cannot be without it."
            fix = "Clear it in the file, or choose a value."
            problems.append(Problem(shared, shown(name, env.values[shared]), reason, fix))
    if problems:
        raise ConfigError(str(env.path), tuple(problems))
    after = EnvFile(env.path, {**env.values, **changes})
    ServerConfig.from_file(after, config.profile, wrong - changes.keys())
    return write_env(env, changes)


def env_lines(config: ServerConfig, names: Collection[str]) -> tuple[str, ...]:
    """Return settings as lines of a `.env` file, for their profile alone; never secrets.

    Args:
        config: The settings.
        names: The fields to write.
    """
    return tuple(
        f"{PREFIX}{config.profile.upper()}_{setting.suffix}={quoted(_text(name, value, config))}"
        for name, setting in env_settings().items()
        if name in names and not isinstance(value := getattr(config, name), SecretStr)
    )


def _salvage(env: EnvFile, profile: str) -> tuple[ServerConfig, ConfigError | None]:
    problems: dict[str, Problem] = {}
    while True:  # behind a wrong value may be another one, such as that of every profile
        try:
            config = ServerConfig.from_file(env, profile, problems)
        except ConfigError as error:
            found = {problem.key: problem for problem in error.problems}
            if found.keys() <= problems.keys():
                raise
            problems |= found
        else:
            wrong = tuple(problems.values())
            return config, ConfigError(str(env.path), wrong) if wrong else None


def _text(name: str, value: object, given: ServerConfig) -> str:
    """Write a value as `ServerConfig.from_env` reads it: a model by its path in its folder."""
    match value:
        case None:
            return ""
        case bool():
            return str(int(value))
        case tuple():
            return shlex.join(value)
        case Path() if name in _MODEL_FILES and value.is_relative_to(given.models_dir):
            inside = str(value.relative_to(given.models_dir))
            return str(value) if inside.startswith("~") else inside
    return str(value)
