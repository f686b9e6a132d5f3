"""A MkDocs hook: every crash that kitty_nb recognises, as a table from the code's own."""

import re

from kitty_nb.supervisor.signatures import SIGNALS, SIGNATURES

MARK = "<!-- every crash -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put the table where a page asks for it."""
    return markdown.replace(MARK, _table()) if MARK in markdown else markdown


def _table() -> str:
    readings = [*(signature.reading for signature in SIGNATURES), *SIGNALS.values()]
    rows = [
        f"| {_plain(cause)} | {_plain(remedy)} |"
        for cause, remedy in dict.fromkeys((one.cause, one.remedy) for one in readings)
    ]
    return "\n".join(["| you see | do |", "|---|---|", *rows])


def _plain(sentence: str) -> str:
    """Show what is filled in later as an ellipsis."""
    return re.sub(r"(\{\w+\})+", "…", sentence).replace("|", r"\|")
