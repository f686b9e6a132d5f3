"""The folders that models are chosen from: the user's own, and those of other programs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kitty_nb.catalog.stores import Store, known_stores

if TYPE_CHECKING:
    from pathlib import Path


def model_stores(models_dir: Path, *, others: bool) -> tuple[Store, ...]:
    """List the models folder, and after it the folders of other programs that are there.

    Args:
        models_dir: The models folder.
        others: Whether models of other programs may be chosen too.
    """
    return (Store(models_dir), *(known_stores(os.environ) if others else ()))
