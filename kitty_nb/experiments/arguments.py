"""Numbers that a person hands to an experiment, checked before anything runs. Pure."""

from __future__ import annotations

from typing import Any

from kitty_nb.errors import ExperimentError

MOST = 1_000_000  # of anything that is done one after the other


def is_whole(value: object, least: int, most: int) -> bool:
    """True of a whole number between two others, and of no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def whole(name: str, value: Any, least: int = 0, most: int = MOST) -> int:
    """Return a whole number.

    Args:
        name: Of the argument.
        value: What the person wrote.
        least: The least that makes sense.
        most: The most.

    Raises:
        ExperimentError: It is none, or out of bounds.
    """
    if not is_whole(value, least, most):
        raise ExperimentError(
            f"{name} is {value!r}. Write a whole number from {least} to {most:,}."
        )
    return int(value)
