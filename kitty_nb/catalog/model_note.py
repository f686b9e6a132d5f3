"""What is remembered of a model beyond its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ModelNote"]


@dataclass(frozen=True, slots=True)
class ModelNote:
    """How a model was used.

    Attributes:
        favourite: Whether the user marked it.
        last_used: When it last became ready, in seconds since the epoch; None when it never did.
        load_seconds: How long that load took.
        settings: What it was started with then, by field of `ServerConfig`; what is left out was
            left to the engine.
    """

    favourite: bool = False
    last_used: float | None = None
    load_seconds: float | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
