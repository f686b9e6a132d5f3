"""A MkDocs hook: tables that come from the code itself, where a page asks for them."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from kitty_nb.supervisor.diagnosis import read_signatures

PACKAGE = Path(__file__).parents[1] / "kitty_nb"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put each table where its mark stands."""
    for mark, table in (("every crash", crashes), ("every file", files)):
        if (comment := f"<!-- {mark} -->") in markdown:
            markdown = markdown.replace(comment, table())
    return markdown


def crashes() -> str:
    """Every crash that kitty_nb recognises, with its remedy."""
    tables = read_signatures()
    rows = [*tables["signature"], *tables["signal"].values(), *tables["launch"].values()]
    return _table("you see", "do", dict.fromkeys((row["cause"], row["remedy"]) for row in rows))


def files() -> str:
    """Every file of the package, with the first line of its docstring."""
    rows = []
    for path in sorted(PACKAGE.rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        rows.append((f"`{path.relative_to(PACKAGE)}`", docstring.partition("\n")[0]))
    return _table("file", "what it is", rows)


def _table(left: str, right: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {_plain(one)} | {_plain(other)} |" for one, other in rows]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *lines])


def _plain(sentence: str) -> str:
    """Show what is filled in later as an ellipsis."""
    return re.sub(r"(\{\w+\})+", "…", sentence).replace("|", r"\|")
