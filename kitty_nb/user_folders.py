"""The folders that a user has for programs' own files; none where there is no home folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Of users without an account, as in containers: nothing can be there, and nobody else put it there.
NO_HOME = Path(os.devnull) / "no home folder"


def user_folder(find: Callable[[str], Path]) -> Path:
    """Return kitty_nb's folder, or one below `NO_HOME`.

    Args:
        find: Which folder, such as `platformdirs.user_cache_path`.
    """
    try:
        return find("kitty_nb")
    except RuntimeError:
        return NO_HOME
