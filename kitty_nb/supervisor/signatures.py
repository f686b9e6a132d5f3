"""What llama-server's endings mean: the tables of `signatures.toml`."""

from __future__ import annotations

import errno
import re
import signal
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Sent from outside: what the log says does not explain them.
FROM_OUTSIDE = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}
_FILE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True, slots=True)
class Reading:
    """What an ending means.

    Attributes:
        cause: A sentence; names in braces stand for what the signature found.
        remedy: What to do, in a sentence.
        repeats: Whether the next start would end the same way.
        of_port: Whether another program may have the server's port.
    """

    cause: str
    remedy: str
    repeats: bool = False
    of_port: bool = False


@dataclass(frozen=True, slots=True)
class Signature:
    """A row of the table: lines that match `pattern` prove `reading`."""

    pattern: re.Pattern[str]
    reading: Reading


@dataclass(frozen=True, slots=True)
class Signatures:
    """All tables.

    Attributes:
        log: What lines of a log prove; the first that matches any line wins.
        endings: Other endings, by name.
        signals: What a signal means where the log does not say it better.
        launch: Why a process could not be started, by error number.
        log_folder: The same of the folder for logs.
    """

    log: tuple[Signature, ...]
    endings: Mapping[str, Reading]
    signals: Mapping[signal.Signals, Reading]
    launch: Mapping[int, Reading]
    log_folder: Mapping[int, Reading]


@cache
def read_signatures() -> Signatures:
    """Read the tables, once a server has ended that needs them."""
    tables: dict[str, Any] = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return Signatures(
        log=tuple(
            Signature(re.compile("|".join(row.pop("patterns"))), Reading(**row))
            for row in tables["signature"]
        ),
        endings=_readings(tables["ending"]),
        signals={signal.Signals[name]: one for name, one in _readings(tables["signal"]).items()},
        launch=_by_number(tables["launch"]),
        log_folder=_by_number(tables["log_folder"]),
    )


def _readings(rows: Mapping[str, Any]) -> dict[str, Reading]:
    return {name: Reading(**row) for name, row in rows.items()}


def _by_number(rows: Mapping[str, Any]) -> dict[int, Reading]:
    numbers = {name: number for number, name in errno.errorcode.items()}
    return {numbers[name]: one for name, one in _readings(rows).items() if name in numbers}
