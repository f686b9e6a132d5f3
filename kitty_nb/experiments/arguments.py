"""Checks of what people pass to experiments: numbers, texts, paths and settings.

Each raises ExperimentError, with a sentence that names the argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kitty_nb.config import ServerConfig
from kitty_nb.errors import ExperimentError
from kitty_nb.isolated_server import require_here

MOST = 1_000_000  # of anything that is done one after the other
SEEDS = (1 << 32) - 1  # the highest seed of llama-server and NumPy
_ONE = (str, bytes, PathLike, Mapping, BaseModel)  # one value, though some can be iterated


def is_whole(value: object, least: int, most: int) -> bool:
    """Return whether a value is a whole number within bounds, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def whole(name: str, value: Any, least: int = 0, most: int = MOST) -> int:
    """Return an argument that must be a whole number within bounds."""
    if not is_whole(value, least, most):
        raise ExperimentError(
            f"{name} is {value!r}. Write a whole number from {least} to {most:,}."
        )
    return int(value)


def positive(name: str, value: Any) -> float:
    """Return an argument that must be a finite number above 0."""
    try:
        number = float(value) if not isinstance(value, str | bytes | bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ExperimentError(f"{name} is {value!r}. Write a number above 0.")
    return number


def require(name: str, value: object, kind: type | tuple[type, ...], example: str) -> None:
    """Reject an argument of a wrong type; `example` names what to write instead."""
    if not isinstance(value, kind):
        raise ExperimentError(f"{name} is {value!r}. Write {example}.")


def require_function(name: str, value: object, receives: str) -> None:
    """Reject an argument that can't be called; `receives` names what it is called with."""
    if not callable(value):
        raise ExperimentError(f"{name} is {value!r}. Write a function of {receives}.")


def path_of(name: str, value: Any) -> Path:
    """Return an argument that must be a path, made absolute."""
    require(name, value, (str, PathLike), "a path")
    return Path(value).expanduser().absolute()


def config_of(config: Any) -> ServerConfig:
    """Return the settings given, or else those of `.env`."""
    if config is None:
        return ServerConfig.from_env()
    require("config", config, ServerConfig, "a ServerConfig, such as ServerConfig.from_env()")
    found: ServerConfig = config
    return found


def config_to_start(config: Any, named: object, begins: str) -> ServerConfig:
    """Return the settings of servers to start here, which a profile with a URL or SSH has none of.

    Args:
        config: The settings given; None for those of `.env`.
        named: The models named beside them, if any: those are served here.
        begins: What starts which server, the beginning of a sentence.
    """
    found = config_of(config)
    require_here(found)
    if found.url and not named:
        raise ExperimentError(
            f"{begins}, which kitty_nb can't do at {found.url}. Measure that server with"
            " load_test(concurrency=…), or name a model to try here."
        )
    return found


def several(given: Any) -> tuple[Any, ...]:
    """Return the values of an argument that takes one or several."""
    if isinstance(given, _ONE):
        return (given,)
    try:
        return tuple(given)
    except TypeError:
        return (given,)


def numbers(name: str, given: Any) -> tuple[Any, ...]:
    """Return the values of an argument that takes one number or several."""
    if isinstance(given, str | bytes):
        raise ExperimentError(f"{name} is {given!r}. Write a number, or several in a list.")
    # JSON takes none of NumPy's numbers.
    return tuple(one.item() if hasattr(one, "item") else one for one in several(given))


def texts(name: str, given: Any) -> tuple[str, ...]:
    """Return the values of an argument that takes one text or several."""
    for one in several(given):
        if not isinstance(one, str):
            raise ExperimentError(f"{name} has {one!r}. Write a text, or several in a list.")
    return several(given)
