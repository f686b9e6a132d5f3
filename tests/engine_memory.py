"""The memory that an engine says it needs, as the truth to hold the formula against."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

from kitty_nb.catalog.memory import Requirement
from kitty_nb.config import server_environment
from kitty_nb.engine.command_line import build_command

if TYPE_CHECKING:
    from kitty_nb import ServerConfig
    from kitty_nb.engine.locate import Engine

_MIB = 1 << 20
_SHOWS_TABLE = "5"  # the verbosity that shows it, in builds of every year
# E.g. `… |   - Host               |                  296 =   222 +      49 +      24        |`. A
# device's row begins with its total and free memory, and ends in what others hold of it.
_ROW = re.compile(r"\|   - (?P<name>.+?) +\|(?P<numbers>[-+=()\d ]+)\|\s*$")
_DEVICE_NUMBERS = 7  # total, free, self, model, context, compute, unaccounted; others have four


def breakdown(engine: Engine, config: ServerConfig) -> dict[str, Requirement]:
    """Start an engine until it has said what it needs: by device, `RAM` first.

    Nothing is loaded yet by then. A draft model is left out: builds differ in how they tell of it.
    """
    plain = ("--no-log-jsonl",) if engine.dialect.option("--no-log-jsonl") else ()
    words = (*config.extra_args, "--fit", "on", "--verbosity", _SHOWS_TABLE, *plain)
    changes = {"host": "127.0.0.1", "port": 0, "extra_args": words}
    command = build_command(engine, config.model_copy(update=changes))
    found = {"RAM": Requirement(0, 0, 0)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=server_environment(api_key=None),
        text=True,
        errors="replace",
    ) as server:
        assert server.stdout
        rows = 0
        for line in server.stdout:
            if row := _ROW.search(line):
                rows += 1
                numbers = [int(number) * _MIB for number in re.findall(r"-?\d+", row["numbers"])]
                on_device = len(numbers) >= _DEVICE_NUMBERS
                need = Requirement(*(numbers[3:6] if on_device else numbers[-3:]))
                name = row["name"] if on_device else "RAM"
                found[name] = found.get(name, Requirement(0, 0, 0)) + need
            elif rows:
                break
        server.kill()
    assert rows, f"{command} does not say what it needs"
    return found
