"""Text that can be printed whoever wrote it: file names, names on the Hub, logs, answers."""

from __future__ import annotations

import re

# Those of C0 and C1 but for tab and newline: a terminal takes them for orders, such as to write
# its title or the clipboard.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Write control characters as Python does, by their numbers."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
