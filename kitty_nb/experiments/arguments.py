"""Checks of the numbers and texts that people pass to experiments. Pure."""

from __future__ import annotations

import math
from typing import Any

from kitty_nb.errors import ExperimentError

MOST = 1_000_000  # of anything that is done one after the other
SEEDS = (1 << 32) - 1  # the highest seed of llama-server and NumPy


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


def positive(name: str, value: Any) -> float:
    """Return a finite number above 0.

    Raises:
        ExperimentError: It is none.
    """
    try:
        number = float(value) if not isinstance(value, str | bytes | bool) else math.nan
    except (TypeError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ExperimentError(f"{name} is {value!r}. Write a number above 0.")
    return number


def listed(name: str, given: Any) -> tuple[Any, ...]:
    """Return the values of an argument that takes one number or several.

    Raises:
        ExperimentError: It is a text.
    """
    if isinstance(given, str | bytes):
        raise ExperimentError(f"{name} is {given!r}. Write a number, or several in a list.")
    try:
        several = tuple(given)
    except TypeError:
        several = (given,)
    # JSON takes none of NumPy's numbers.
    return tuple(one.item() if callable(getattr(one, "item", None)) else one for one in several)


def texts(name: str, given: Any) -> tuple[str, ...]:
    """Return the values of an argument that takes one text or several.

    Raises:
        ExperimentError: A value is no text.
    """
    try:
        several = (given,) if isinstance(given, str) else tuple(given)
    except TypeError:
        several = (given,)
    for one in several:
        if not isinstance(one, str):
            raise ExperimentError(f"{name} has {one!r}. Write a text, or several in a list.")
    return several
