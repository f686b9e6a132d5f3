"""Models by what they were made from: quantizations and fine-tunes of one base together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kitty_nb.catalog.projectors import plain_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kitty_nb.catalog.model import Model

__all__ = ["families"]


def families(models: Iterable[Model]) -> dict[str, tuple[Model, ...]]:
    """Group models by their base model, in the order in which they come.

    The base of a base is looked up among the models too. A model that names none is a base itself,
    under its title, or its file's name.

    Returns:
        The base model's name, as the first of its family writes it, with all of its family.
    """
    models = tuple(models)
    parents = {
        plain_name(_own(model)): model.base_model
        for model in models
        if model.title and model.base_model
    }
    found: dict[str, tuple[str, list[Model]]] = {}
    for model in models:
        base = _root(model.base_model or _own(model), parents)
        found.setdefault(plain_name(base), (base, []))[1].append(model)
    return {name: tuple(members) for name, members in found.values()}


def _own(model: Model) -> str:
    return model.title or model.known_as or model.stem


def _root(name: str, parents: dict[str, str]) -> str:
    seen = {plain_name(name)}
    while (parent := parents.get(plain_name(name))) and plain_name(parent) not in seen:
        name = parent
        seen.add(plain_name(name))
    return name
