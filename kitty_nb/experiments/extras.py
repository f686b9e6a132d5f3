"""Packages of this one's extras, imported where they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kitty_nb.errors import ExperimentError

if TYPE_CHECKING:
    from types import ModuleType


def extra(name: str, of: str = "experiments") -> ModuleType:
    """Import a package of an extra of this one.

    Raises:
        ExperimentError: It is missing.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ExperimentError(
            f"This needs {name}, which cannot be imported: {error}. Install it:"
            f" pip install 'kitty_nb[{of}]'"
        ) from error
