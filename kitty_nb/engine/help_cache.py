"""A cache of what engines print of their flags and version, for the next command."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from kitty_nb.config.whole_file import write_whole
from kitty_nb.trust import distrust
from kitty_nb.user_folders import user_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEPT = 8  # programs
_SCRIPT = 1 << 16  # bytes; what is longer is no script that only starts another program
_PATH = re.compile(r"/[\w./+@-]+")


def key_of(program: Path, stamp: object) -> str | None:
    """Return a text that changes once a program may print something else.

    A script counts with all files that it names; one that names none, or works out which program
    it starts, is not known.

    Args:
        program: The program.
        stamp: What tells whether its own file has changed.
    """
    with program.open("rb") as file:
        head = file.read(_SCRIPT)
    if not head.startswith(b"#!"):
        return repr(stamp)
    lines = head.decode(errors="replace").partition("\n")[2]
    named = [path for path in map(Path, _PATH.findall(lines)) if path.is_file()]
    stats = [(str(path), path.stat()) for path in named]
    found = [(name, status.st_mtime_ns, status.st_size) for name, status in stats]
    starts = [line for line in lines.splitlines() if "$@" in line]
    worked_out = any(line.count("$") > 1 for line in starts)
    return repr((stamp, found)) if found and starts and not worked_out else None


def load(key: str) -> dict[str, str] | None:
    """Return what a program printed, by flag; None where that is not known."""
    found = _read().get(key)
    return found if isinstance(found, dict) and {"--help", "--version"} <= found.keys() else None


def store(key: str, answers: Mapping[str, str]) -> None:
    """Store what a program printed. Where that cannot be written it is asked again."""
    known = {name: value for name, value in _read().items() if name != key}
    newest = dict([*known.items(), (key, dict(answers))][-_KEPT:])
    path = _path()
    with suppress(OSError):
        if distrust(path, folders=False):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(newest).encode())


def _read() -> dict[str, dict[str, str]]:
    path = _path()
    if distrust(path, folders=False):
        return {}
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _path() -> Path:
    return user_folder(platformdirs.user_cache_path) / "engines.json"
