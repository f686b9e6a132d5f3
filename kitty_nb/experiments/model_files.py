"""Which model files are on this machine, known by a look at them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.errors import ConfigError, Problem
from kitty_nb.experiments.trial import ModelFingerprint
from kitty_nb.isolated_server import gather_facts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kitty_nb.config import ServerConfig


def fingerprint_of(model: str, config: ServerConfig) -> ModelFingerprint:
    """Look at a model on this machine. It blocks.

    Args:
        model: As trials name it.
        config: Of the sweep, which says where models are.

    Raises:
        ConfigError: It is not here.
    """
    facts = gather_facts(resolve_model(config.replace(model=model)))
    return ModelFingerprint(facts.size, facts.digest)


def fingerprints_here(models: Iterable[str], config: ServerConfig) -> dict[str, ModelFingerprint]:
    """Look at those of the models that can be read on this machine. It blocks.

    Args:
        models: As trials name them.
        config: As for `fingerprint_of`.
    """
    found: dict[str, ModelFingerprint] = {}
    for model in dict.fromkeys(models):
        with suppress(ConfigError):
            found[model] = fingerprint_of(model, config)
    return {model: one for model, one in found.items() if one.digest}


def check_models(models: Iterable[str], config: ServerConfig) -> None:
    """Check that the models are on this machine. It blocks.

    Args:
        models: As trials name them.
        config: As for `fingerprint_of`.

    Raises:
        ConfigError: Listing those that are not.
    """
    problems: list[Problem] = []
    for model in dict.fromkeys(models):
        try:
            resolve_model(config.replace(model=model))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError("the sweep", tuple(problems))
