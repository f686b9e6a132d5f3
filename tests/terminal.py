"""The command line, without the cost of a process."""

from __future__ import annotations

from functools import cache

import typer.testing
from typer.main import get_command
from typer.testing import CliRunner, Result

from kitty_nb.cli import app

# Once: it reads the signatures of all verbs, which takes longer than most of them.
typer.testing._get_command = cache(get_command)


def run(*words: object, color: bool = False) -> Result:
    """Run a command of `kitty-nb` in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], color=color)
