"""A script that runs a function written by a model, and exits with 0 if it passes all test cases.

Standard input is JSON: the code, and test cases of arguments and result. The code can't import
modules or use other builtins than a few, and its time, memory and files are limited. If it reaches
beyond this process all the same (a file, a signal, another process), an audit hook ends it first.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from typing import Any

_SECONDS, _BYTES = 2, 1 << 29
_INNER = ("_", "gi_", "cr_", "ag_", "f_", "tb_")  # attributes that lead to builtins or frames
# A format string can reach attributes that don't appear in the code; `mro` ends at `object`.
_LEADS_OUT = frozenset({"format", "format_map", "mro"})
_COMPUTES = frozenset({"compile", "exec"})  # audit events of code that only computes
_ALLOWED = (
    *("abs", "all", "any", "bool", "chr", "dict", "divmod", "enumerate", "filter", "float"),
    *("frozenset", "int", "isinstance", "iter", "len", "list", "map", "max", "min", "next", "ord"),
    *("pow", "range", "repr", "reversed", "round", "set", "slice", "sorted", "str", "sum", "tuple"),
    *("zip", "ValueError", "TypeError", "KeyError", "IndexError", "StopIteration", "Exception"),
)


def allows(code: str) -> bool:
    """Return whether code is free of imports and of attributes that escape the sandbox. Pure."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            return False
        if getattr(node, "id", "").startswith("__"):
            return False
        # A pattern such as `case int(real=x)` reads attributes, too.
        for name in (getattr(node, "attr", ""), *getattr(node, "kwd_attrs", ())):
            if name.startswith(_INNER) or name in _LEADS_OUT:
                return False
    return True


def holds(code: str, cases: list[tuple[list[Any], Any]]) -> bool:
    """Run code, and return whether its last function passes all test cases."""
    given = __builtins__ if isinstance(__builtins__, dict) else vars(__builtins__)
    scope: dict[str, Any] = {"__builtins__": {name: given[name] for name in _ALLOWED}}
    exec(compile(code, "answer", "exec"), scope)  # noqa: S102 (the purpose of this process)
    function = [one for one in scope.values() if callable(one)][-1]
    return all(function(*arguments) == result for arguments, result in cases)


def _limit() -> None:
    import resource  # noqa: PLC0415 (not on every system)

    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    sys.addaudithook(_end_beyond)


def _end_beyond(event: str, _: object) -> None:
    if event not in _COMPUTES:
        os._exit(1)


if __name__ == "__main__":
    code, cases = json.load(sys.stdin)
    _limit()
    os._exit(0 if allows(code) and holds(code, cases) else 1)  # an orderly end is audited, too
