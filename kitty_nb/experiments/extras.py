"""Lazy imports of optional dependencies."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kitty_nb.errors import ExperimentError

if TYPE_CHECKING:
    from types import ModuleType


def extra(name: str, of: str = "experiments") -> ModuleType:
    """Import an optional dependency; if it is missing, the error names the extra that has it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ExperimentError(
            f"{name} can't be imported: {error}. Install it: pip install 'kitty_nb[{of}]'"
        ) from error
