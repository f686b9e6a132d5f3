"""Warnings of what a `.env` file or the environment says in vain, such as misspelled keys."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from io import StringIO
from typing import TYPE_CHECKING

from dotenv.parser import parse_stream

from kitty_nb.config.api_key import FLAG_PREFIX
from kitty_nb.config.env_file import read_env
from kitty_nb.config.server_config import PREFIX, ROLES, env_settings, split_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from kitty_nb.config.env_file import EnvFile

_PATHS = {"MODELS_DIR", "MODEL", "BIN", "LOG_DIR", "HISTORY"}
_CURLY = "\u201c\u201d\u2018\u2019\u201e"
_BARE = re.compile(r"\$(?P<name>[A-Za-z_]\w*)")
_BRACED = re.compile(r"\$\{(?P<name>[^}:]+)\}")
_SO_ALIKE = 0.85  # of 1: a slip, rather than another name


def env_warnings(path: str | Path, *profiles: str) -> tuple[str, ...]:
    """Say what has no effect, or another one than it seems to; each in a sentence with its fix.

    No values are shown.

    Args:
        path: The file, found as by `ServerConfig.from_env`.
        profiles: Those whose settings are read from it.

    Raises:
        ConfigError: It cannot be read, or a line in it cannot be understood.
    """
    env = read_env(path)
    return (*_keys(env), *_values(env), *_environment(env, profiles))


def _keys(env: EnvFile) -> Iterator[str]:
    suffixes = {setting.suffix for setting in env_settings().values()}
    profiles: dict[str, str] = {}
    for key, value in env.values.items():
        if not value or not key.startswith(PREFIX):
            continue
        profile, suffix = split_key(key, suffixes)
        if not suffix:
            yield f"{key} is not a setting, so it has no effect.{_nearest(key, profiles)}"
        elif profile:
            profiles.setdefault(profile.lower(), key)
    for profile, key in profiles.items():
        others = [name for name in (*ROLES, *profiles) if not _related(name, profile)]
        near = get_close_matches(profile, others, n=1, cutoff=_SO_ALIKE)
        if near and profile not in ROLES:
            meant = key.replace(f"_{profile.upper()}_", f"_{near[0].upper()}_", 1)
            yield f"{key} makes a profile {profile!r}. If you mean {near[0]!r}, write {meant}."


def _related(name: str, profile: str) -> bool:
    """Tell whether one of two names is the other with something added, as coder and coder2."""
    return name.startswith(profile) or profile.startswith(name)


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
    suffixes = {setting.suffix for setting in env_settings().values()}
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
                        f"{key} has ${{{name}}}, which is not set and counts as empty. Set {name}"
                        " on a line above, or write its value there."
                    )
            if split_key(key, suffixes)[1] in _PATHS and (bare := _BARE.search(value)):
                name = bare["name"]
                yield f"{key} has ${name}, which is taken as it is. Write ${{{name}}}."
            if value[0] in _CURLY or value[-1] in _CURLY:
                yield f"{key} is in curly quotes, which belong to its value. Use \" or '."
        known.add(key)


def _environment(env: EnvFile, profiles: Iterable[str]) -> Iterator[str]:
    suffixes = {setting.suffix for setting in env_settings().values()}
    whose = {"", *map(str.lower, profiles)}
    names = [
        key
        for key, value in sorted(os.environ.items())
        if value and key.startswith(PREFIX) and value != env.values.get(key)
        if (split := split_key(key, suffixes))[1] and split[0].lower() in whose
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
