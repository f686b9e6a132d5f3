"""Which file a trial's model is on this machine, without reading all of it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from kitty_nb.errors import ConfigError, Problem
from kitty_nb.experiments.trial import ModelMark
from kitty_nb.isolated_server import gather_facts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kitty_nb.config import ServerConfig

__all__ = ["check_models", "mark_of", "marks_here"]


def mark_of(model: str, config: ServerConfig) -> ModelMark:
    """Look at a model on this machine. It blocks.

    Args:
        model: As trials name it.
        config: Of the sweep, which says where models are.

    Raises:
        ConfigError: It is not here.
    """
    facts = gather_facts(config.replace(model=model))
    return ModelMark(facts.size, facts.digest)


def marks_here(models: Iterable[str], config: ServerConfig) -> dict[str, ModelMark]:
    """Look at those of the models that can be read on this machine. It blocks.

    Args:
        models: As trials name them.
        config: As for `mark_of`.
    """
    marks: dict[str, ModelMark] = {}
    for model in dict.fromkeys(models):
        with suppress(ConfigError):
            marks[model] = mark_of(model, config)
    return {model: mark for model, mark in marks.items() if mark.digest}


def check_models(models: Iterable[str], config: ServerConfig) -> None:
    """Check that the models are on this machine. It blocks.

    Args:
        models: As trials name them.
        config: As for `mark_of`.

    Raises:
        ConfigError: Listing those that are not.
    """
    problems: list[Problem] = []
    for model in dict.fromkeys(models):
        try:
            config.replace(model=model)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError("the sweep", tuple(problems))
