"""The engine's structured log, as the plain lines that it writes without `--log-jsonl`. Pure."""

from __future__ import annotations

import json
from typing import Any

_LETTERS = {"debug": "D", "info": "I", "warn": "W", "error": "E"}


def readable(line: str) -> str:
    """Return one line of a server's log for a person to read.

    A structured line becomes what llama-server writes when it is not asked for structure,
    `minutes.seconds.ms.us LEVEL message`, so that everything behind this knows one format. Any
    other line stays as it is.
    """
    if not line.startswith("{"):
        return line
    try:
        entry = json.loads(line)
        match entry:
            case {"type": "log", "time": int(time), "level": level, "msg": str(message)}:
                return f"{_clock(time)} {_LETTERS.get(level, 'I')} {message.rstrip()}"
            case {"type": "fit_memory_breakdown", "data": {"unit": unit, "rows": rows}}:
                return "; ".join(_memory(row, unit) for row in rows)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # a cut line, or one that the server did not mean as structure
    return line


def _clock(microseconds: int) -> str:
    seconds, rest = divmod(microseconds, 1_000_000)
    return f"{seconds // 60}.{seconds % 60:02}.{rest // 1000:03}.{rest % 1000:03}"


def _memory(row: dict[str, Any], unit: str) -> str:
    parts = ", ".join(f"{part} {row[part]}" for part in ("model", "context", "compute"))
    return f"memory on {row['name']} in {unit}: {parts}"
