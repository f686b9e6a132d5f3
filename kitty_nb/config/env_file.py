"""`.env` files: keys and values read from them, and written back with a backup."""

from __future__ import annotations

import os
import re
import stat
from codecs import BOM_UTF8
from dataclasses import dataclass
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
from dotenv import dotenv_values, find_dotenv
from dotenv.parser import parse_stream

from kitty_nb.errors import ConfigError, Problem
from kitty_nb.safe_files import distrust, user_folder, write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping

_NEEDS_NO_QUOTES = re.compile(r"[^\s'\"#\\$]*")
_NEEDS_ESCAPES = re.compile(r"['\\\r\n]")
_BEFORE_KEY = re.compile(r"\s*(?:export[^\S\r\n]+)?")
_COMMENT = re.compile(  # after a value, quoted or not
    r"""\A[^=]*=[^\S\r\n]*(?:'(?:\\'|[^'])*'|"(?:\\"|[^"])*"|(?!\s*['"])[^\r\n]*?(?=\s\#))"""
    r"""(?P<space>[^\S\r\n]*)(?P<text>\#[^\r\n]*)"""
)
_ESCAPES = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r"}


@dataclass(frozen=True, slots=True)
class EnvFile:
    """A `.env` file's path, its keys and values, and its bytes; empty if it is missing."""

    path: Path
    values: Mapping[str, str | None]
    raw: bytes = b""


def read_env(path: str | Path) -> EnvFile:
    """Read a `.env` file without touching the process environment.

    Args:
        path: The file; plain `.env` is looked for in the folders above, too, and may be missing. A
            file found this way may name a program to run, so it must be writable by nobody else; a
            file that the caller names is trusted.

    Raises:
        ConfigError: The file can't be read, may be another user's, or a line in it can't be parsed.
    """
    found = Path(os.path.expanduser(path))  # noqa: PTH111 (keeps ~name if there is no such user)
    if found == Path(".env"):
        found = Path(find_dotenv(usecwd=True) or found)
        if not found.is_file():
            return EnvFile(found.absolute(), {})
        if reason := distrust(found):
            raise _refused(found, reason, f"To use it anyway, name it: {found} instead of .env.")
    try:
        raw = found.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"Can't read it ({getattr(error, 'strerror', None) or error})."
        fix = "Check its permissions, or name another file."
        if isinstance(error, FileNotFoundError):
            fix = "Copy .env.example there, or name another file."
        elif isinstance(error, UnicodeDecodeError):
            fix = "Save it as UTF-8."
        raise _refused(found, reason, fix) from None
    return EnvFile(found.absolute(), _values(found, text), raw)


def _values(path: Path, text: str) -> dict[str, str | None]:
    problems = tuple(
        Problem(
            f"line {binding.original.line}",
            _hidden(binding.original.string),
            "This is not KEY=value in plain text.",
            "Quote values with spaces or '#', and close every quote.",
        )
        for binding in parse_stream(StringIO(text))
        if binding.error or "\0" in binding.original.string
    )
    if problems:
        raise ConfigError(str(path), problems)
    # Without newline=None, a quoted value would keep the line endings of the file.
    return dotenv_values(stream=StringIO(text, newline=None))


def _hidden(line: str) -> str:
    """Return a line without its value, which may be a secret."""
    key, equals, _ = line.strip().partition("=")
    return f"{key}=…" if equals else "…"


@dataclass(frozen=True, slots=True)
class SavedEnv:
    """The keys written to a `.env` file."""

    path: Path
    keys: tuple[str, ...]  # the keys whose values have changed; empty if nothing was written
    backup: Path | None  # the previous file; None if there was none or nothing was written

    @property
    def sentence(self) -> str:
        """The written keys and the backup's path, as a sentence."""
        if not self.keys:
            return f"{self.path} already says this; nothing was written."
        kept = f" The previous file is kept as {self.backup}." if self.backup else ""
        return f"Saved to {self.path}: {', '.join(self.keys)}.{kept}"


def write_env(env: EnvFile, changes: Mapping[str, str]) -> SavedEnv:
    """Set keys in a `.env` file; other lines, comments, permissions and links stay as they are.

    New keys come last, and values are taken literally: `${NAME}` is not expanded. The previous
    file, which may hold a secret, is backed up in a folder that only this user can read, away from
    anything that git or a web server could publish.

    Raises:
        ConfigError: The file can't be written, or has changed since it was read.
    """
    keys = tuple(key for key, value in changes.items() if (env.values.get(key) or "") != value)
    if not keys:
        return SavedEnv(env.path, (), None)
    encoding = "utf-8-sig" if env.raw.startswith(BOM_UTF8) else "utf-8"
    try:
        there = env.path.exists()
        if (env.path.read_bytes() if there else b"") != env.raw:
            raise _refused(env.path, "It has changed since it was read.", "Read it again.")
        text = _with_values(env.raw.decode(encoding), {key: changes[key] for key in keys})
        there_then = _values(env.path, text)  # the file must stay readable
        if lost := [key for key in keys if (there_then.get(key) or "") != changes[key]]:
            raise _refused(env.path, f"{', '.join(lost)} can't be written.", "Change the value.")
        backup = _back_up(env) if there else None
        file, mode = env.path.resolve(), env.path.stat().st_mode if there else None
        write_atomic(file, text.encode(encoding))
        if mode is not None:
            file.chmod(stat.S_IMODE(mode))
    except (OSError, UnicodeEncodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        lines = " ".join(f"{key}={quoted(changes[key])}" for key in keys)
        fix = f"Make the file and its folder writable, or write by hand: {lines}"
        raise _refused(env.path, f"Can't write it: {why}.", fix) from None
    return SavedEnv(env.path, keys, backup)


def quoted(value: str) -> str:
    """Quote a value so that python-dotenv reads it back unchanged."""
    if _NEEDS_NO_QUOTES.fullmatch(value):
        return value
    # `${…}` is expanded inside any quotes. A variable without a name expands to its default, here
    # the dollar sign.
    plain = value.replace("${", "${:-$}{")
    if not _NEEDS_ESCAPES.search(plain):
        return f"'{plain}'"
    return '"' + "".join(_ESCAPES.get(letter, letter) for letter in plain) + '"'


def _with_values(text: str, changes: Mapping[str, str]) -> str:
    """Set keys in place, or at the end.

    `dotenv.set_key` would drop `export` and the carriage returns of other lines.
    """
    end = "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"
    lines, missing = [], dict(changes)
    for binding in parse_stream(StringIO(text, newline="")):
        key, line = binding.key, binding.original.string
        if key is not None and key in changes:
            missing.pop(key, None)
            before, value = _BEFORE_KEY.match(line), quoted(changes[key])
            if comment := _COMMENT.search(line):
                # Right after the equals sign, it would become the value.
                value = f"{value or repr('')}{comment['space'] or ' '}{comment['text']}"
            line = f"{before[0] if before else ''}{key}={value}{end}"
        lines.append(line)
    if missing and lines and not lines[-1].endswith(("\n", "\r")):
        lines.append(end)
    return "".join((*lines, *(f"{key}={quoted(value)}{end}" for key, value in missing.items())))


def _back_up(env: EnvFile) -> Path:
    file, time = env.path.resolve(), datetime.now().astimezone().strftime("%Y%m%dT%H%M%S.%f")
    folder = user_folder(platformdirs.user_state_path) / "env-backups"
    # Named after the folder, too: every project's file is called .env.
    backup = folder / f"{file.parent.name}-{file.name.lstrip('.')}.backup-{time}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(backup, env.raw)
    except OSError as error:
        reason = f"Can't keep a backup of it in {folder}: {error.strerror}."
        fix = "Make that folder writable, or set XDG_STATE_HOME to another one."
        raise _refused(env.path, reason, fix) from None
    return backup


def _refused(path: Path, reason: str, fix: str) -> ConfigError:
    return ConfigError(str(path), (Problem("file", str(path), reason, fix),))
