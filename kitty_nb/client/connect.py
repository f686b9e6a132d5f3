"""Code that lets other programs use a running server: pasted there, it gets the key itself."""

from __future__ import annotations

import json
import shlex
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kitty_nb.client import Access

_NO_KEY = "none"  # clients require a key, even for a server that requires none


@dataclass(frozen=True, slots=True)
class Served:
    """A running server, as other programs see it."""

    access: Access  # its address, and the key that it asks for
    model: str  # the name under which it serves its model
    profile: str  # its profile


@dataclass(frozen=True, slots=True)
class HandOver:
    """Code that lets another program use a server."""

    title: str  # the program
    install: str = ""  # its packages, as arguments of `pip install`; empty if it needs none
    python: str = ""  # the template of its Python code; empty if the program is a command
    shell: str = ""  # the template of its shell lines; empty if the program is a library

    def in_terminal(self, served: Served, key_command: Sequence[str]) -> str:
        """Return shell lines or, if there are none, Python code for any interpreter.

        `key_command` is the command that prints the key.
        """
        if self.shell:
            key = f'"$({shlex.join(key_command)})"' if served.access.api_key else _NO_KEY
            return _fill(self.shell, served, key)
        key = f"subprocess.check_output({[*key_command]!r}, text=True).strip()"
        lines = ("import subprocess", "", f"key = {key}") if served.access.api_key else ()
        return self._python(served, *lines)

    def in_notebook(self, served: Served, manager: str) -> str:
        """Return Python code for a cell; empty if the program is a command.

        `manager` is an expression for the `ModelManager` there.
        """
        lines = (f"key = {manager}.reveal_api_key()",) if served.access.api_key else ()
        return self._python(served, *lines) if self.python else ""

    def _python(self, served: Served, *key: str) -> str:
        code = _fill(self.python, served)
        return "\n".join([*(key or [f'key = "{_NO_KEY}"']), code])


def _fill(template: str, served: Served, key: str = "") -> str:
    # A JSON string without an apostrophe can't end a quoted string in Python, YAML or a shell.
    model = json.dumps(served.model, ensure_ascii=False)[1:-1].replace("'", "\\u0027")
    name = f"kitty-{served.profile}"
    url = served.access.base_url
    return template.format(base_url=url, model=model, name=name, key=key).strip()


@cache
def hand_overs() -> Mapping[str, HandOver]:
    """Return all hand-overs by name."""
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    return {name: HandOver(**facts) for name, facts in tomllib.loads(text).items()}
