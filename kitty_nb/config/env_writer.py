"""Writing settings back to .env, with a backup."""

from __future__ import annotations

import re
import shlex
from codecs import BOM_UTF8
from dataclasses import dataclass
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
from dotenv.parser import parse_stream
from pydantic import SecretStr

from kitty_nb.config.env_file import EnvFile, read_env
from kitty_nb.config.server_config import PREFIX, ServerConfig, env_settings, shown
from kitty_nb.config.whole_file import write_whole
from kitty_nb.errors import ConfigError, Problem
from kitty_nb.user_folders import user_folder

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


# A line with a key, as python-dotenv reads it.
_LINE = re.compile(
    r"""(?P<key>\s*(?:export[^\S\r\n]+)?(?:'[^']+'|[^=\#\s]+)[^\S\r\n]*)
        (?:(?P<equals>=[^\S\r\n]*)
           (?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?<=\s)(?=\#)
              |[^\r\n]*?(?=\s+\#|[^\S\r\n]*(?:[\r\n]|$))))?
        (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
_NEEDS_NO_QUOTES = re.compile(r"[^\s'\"#\\$]*")
_NEEDS_ESCAPES = re.compile(r"['\\\r\n]")
_ESCAPES = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r"}


@dataclass(frozen=True, slots=True)
class SavedEnv:
    """What was written into a `.env` file.

    Attributes:
        path: The file.
        keys: The keys whose values have changed; none when nothing was written.
        backup: The file as it was before; None when there was none or nothing was written.
    """

    path: Path
    keys: tuple[str, ...]
    backup: Path | None

    @property
    def sentence(self) -> str:
        """What was written, and where the old file is, for a person."""
        if not self.keys:
            return f"{self.path} says all this already; nothing was written."
        kept = f" As it was before, it is kept as {self.backup}." if self.backup else ""
        return f"Saved to {self.path}: {', '.join(self.keys)}.{kept}"


def write_env(env: EnvFile, changes: Mapping[str, str]) -> SavedEnv:
    """Set keys in a `.env` file, at once or not at all.

    Comments, order, line ends, permissions and links stay; keys that are not there yet come at the
    end. The old file, which may hold a key, is kept in a folder of this user alone, away from what
    git or a web server may hand out.

    Args:
        env: The file as it was read.
        changes: New values by key. They are taken as they are: `${NAME}` in one means just that.

    Raises:
        ConfigError: The file cannot be written, or is another one since it was read.
    """
    keys = tuple(key for key, value in changes.items() if (env.values.get(key) or "") != value)
    if not keys:
        return SavedEnv(env.path, (), None)
    file = env.path.resolve()
    text = _changed(env.raw.decode("utf-8-sig"), {key: changes[key] for key in keys})
    try:
        content = text.encode("utf-8-sig" if env.raw.startswith(BOM_UTF8) else "utf-8")
        if _bytes(file) != env.raw:
            reason = "It has changed since it was read."
            raise _unwritten(env.path, reason, "Look at it and try again.")
        backup = _back_up(env, file) if file.exists() else None
        write_whole(file, content, like=file)
    except (OSError, UnicodeEncodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        lines = " ".join(f"{key}={quoted(changes[key])}" for key in keys)
        fix = f"Make the file and its folder writable, or write by hand: {lines}"
        raise _unwritten(env.path, f"It cannot be written: {why}.", fix) from None
    return SavedEnv(env.path, keys, backup)


def _changed(text: str, changes: Mapping[str, str]) -> str:
    parts = [(binding.key, binding.original.string) for binding in parse_stream(StringIO(text))]
    lines = [line for _, line in parts]
    last = {key: at for at, (key, _) in enumerate(parts) if key}  # the last of equal keys counts
    newline = "\r\n" if "\r\n" in text else "\n"
    for key, value in changes.items():
        if key in last:
            lines[last[key]] = _with_value(lines[last[key]], value)
        else:
            if lines and not lines[-1].endswith(("\n", "\r")):
                lines.append(newline)
            lines.append(f"{key}={quoted(value)}{newline}")
    return "".join(lines)


def _with_value(line: str, value: str) -> str:
    found = _LINE.fullmatch(line)
    if found is None:
        raise AssertionError(line)
    rest = found["rest"]
    space = " " if rest.startswith("#") else ""
    return f"{found['key']}{found['equals'] or '='}{quoted(value)}{space}{rest}"


def quoted(value: str) -> str:
    """Write a value such that python-dotenv reads it back."""
    if _NEEDS_NO_QUOTES.fullmatch(value):
        return value
    # What looks like a variable is one inside every kind of quotes. This one has no name, and so
    # its default for a value.
    plain = value.replace("${", "${:-$}{")
    if not _NEEDS_ESCAPES.search(plain):
        return f"'{plain}'"
    return '"' + "".join(_ESCAPES.get(letter, letter) for letter in plain) + '"'


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


def _back_up(env: EnvFile, file: Path) -> Path:
    time = datetime.now().astimezone().strftime("%Y%m%dT%H%M%S.%f")
    folder = user_folder(platformdirs.user_state_path) / "env-backups"
    # Named by the folder too: a project's file is called .env everywhere.
    backup = folder / f"{file.parent.name}-{file.name.lstrip('.')}.backup-{time}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(backup, env.raw)
    except OSError as error:
        reason = f"No backup of it can be kept in {folder}: {error.strerror}."
        fix = "Make that folder writable, or set XDG_STATE_HOME to another one."
        raise _unwritten(env.path, reason, fix) from None
    return backup


def _unwritten(path: Path, reason: str, fix: str) -> ConfigError:
    return ConfigError(str(path), (Problem("file", str(path), reason, fix),))


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
