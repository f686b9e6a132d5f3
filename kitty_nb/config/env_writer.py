"""Changed settings go back into a `.env` file; everything else in it stays as it is."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from dataclasses import dataclass
from datetime import datetime
from io import StringIO
from typing import TYPE_CHECKING

import platformdirs
from dotenv.parser import parse_stream

from kitty_nb.config.whole_file import write_whole
from kitty_nb.errors import ConfigError, Problem
from kitty_nb.user_folders import user_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kitty_nb.config.env_file import EnvFile

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
