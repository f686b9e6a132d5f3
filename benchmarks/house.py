"""The size and shape of the package: what one person has to keep in mind.

`python -m benchmarks.house` prints the counts of the working tree; with the name of a commit as
well (`python -m benchmarks.house v0.1.0`), those of the commit beside them. `--suite` also runs
the README's test command and times it.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tempfile
import time
import tokenize
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = Path(__file__).parents[1]
_PACKAGE = "kitty_nb"
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


@dataclass(frozen=True)
class Source:
    """One Python file.

    Attributes:
        name: The dotted name of its module.
        tree: Its syntax tree.
        code: The numbers of its lines of code, without blanks, comments and docstrings.
    """

    name: str
    tree: ast.Module
    code: frozenset[int]

    @classmethod
    def read(cls, path: Path, root: Path) -> Source:
        """Parse a file of the package in a root folder."""
        text = path.read_text()
        tree = ast.parse(text)
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in _LAYOUT:
                lines.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(tree):
            if isinstance(node, _DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
                lines -= _lines(node.body[0])
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        return cls(name.removesuffix(".__init__"), tree, frozenset(lines))

    @property
    def import_lines(self) -> int:
        """Lines of import statements."""
        nodes = (n for n in ast.walk(self.tree) if isinstance(n, (ast.Import, ast.ImportFrom)))
        return len({line for node in nodes for line in _lines(node)} & self.code)

    def functions(self) -> Iterator[tuple[int, str]]:
        """The lines of code and the name of each function."""
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield len(_lines(node) & self.code), f"{self.name}.{node.name}"

    def imported(self, modules: set[str]) -> set[str]:
        """The package's modules that it imports, for types and by string too."""
        found = set()
        for node in ast.walk(self.tree):
            match node:
                case ast.Import(names=names):
                    found |= {alias.name for alias in names}
                case ast.ImportFrom(module=str(module), names=names):
                    inner = {f"{module}.{alias.name}" for alias in names}
                    found |= (inner & modules) or {module}
                case ast.Constant(value=str(text)) if text.startswith(f"{_PACKAGE}."):
                    found.add(text)
        return (found & modules) - {self.name}


def _lines(node: ast.stmt | ast.expr) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def measure(root: Path) -> dict[str, str]:
    """Measure the package in a root folder; return the figures by name."""
    sources = [Source.read(path, root) for path in sorted((root / _PACKAGE).rglob("*.py"))]
    modules = {source.name for source in sources}
    code = sum(len(source.code) for source in sources)
    imports = sum(source.import_lines for source in sources)
    length, longest = max((len(source.code), source.name) for source in sources)
    size, function = max(pair for source in sources for pair in source.functions())
    return {
        "Python files": str(len(sources)),
        "code lines": f"{code:,}",
        "import share": f"{imports / code:.1%}",
        "import cycles": _circle({s.name: s.imported(modules) for s in sources}) or "none",
        "longest file": f"{length} ({longest})",
        "longest function": f"{size} ({function})",
    }


def _circle(arrows: dict[str, set[str]]) -> str:
    """Return one import cycle as text; empty if there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return ""


def _measure_commit(commit: str) -> dict[str, str]:
    command = ["git", "archive", commit, _PACKAGE]
    archive = subprocess.run(command, cwd=_ROOT, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as name, tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(name, filter="data")
        return measure(Path(name))


def _time_suite() -> str:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=_ROOT, check=False)
    return f"{time.monotonic() - began:.0f} s" + ("" if done.returncode == 0 else " (failed)")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?", help="a commit to compare the working tree with")
    parser.add_argument("--suite", action="store_true", help="also time the test suite")
    options = parser.parse_args()
    now = measure(_ROOT)
    before = _measure_commit(options.commit) if options.commit else {}
    if options.suite:
        now["test suite"] = _time_suite()
    for name, value in now.items():
        print(f"{name:<20} {before.get(name, ''):<48} {value}" if before else f"{name:<20} {value}")


if __name__ == "__main__":
    main()
