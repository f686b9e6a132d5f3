"""Bounds on metrics and settings: constraints, targets and limits. Pure."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.arguments import require, texts
from kitty_nb.experiments.metrics import is_share

if TYPE_CHECKING:
    from collections.abc import Callable

QUALITY_LOSS = "quality_loss"  # the relative increase of perplexity, which is no metric of a row
_LEAST = 1e-9  # excess of a value equal to a strict bound
_CONSTRAINT = re.compile(r"(?P<name>\w+)\s*(?P<sign><=|>=|==|<|>|)")
_BOUND = re.compile(
    r"(?P<name>[a-z]\w*)?\s*(?P<sign><=|>=|<|>)\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>%|[GM]i?B)?"
)
_SIZES = {"": 1.0, "GiB": 1.0, "GB": 1e9 / 2**30, "MiB": 1 / 1024, "MB": 1e6 / 2**30}
_PERCENT = {"%": 0.01}
_EXAMPLES = {QUALITY_LOSS: "<= 2 %", "memory_gib": "<= 20 GB"}
_SIGNS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A bound on a metric or setting.

    Attributes:
        name: The name of the metric or setting.
        sign: The comparison operator, such as `<=`.
        bound: The value to compare with; a number, except for `==`.
    """

    name: str
    sign: str
    bound: Any

    def allows(self, value: Any) -> bool:
        """Return whether a value satisfies the constraint; an unknown one doesn't."""
        try:
            return value is not None and bool(_SIGNS[self.sign](value, self.bound))
        except TypeError:
            return False

    def excess(self, value: Any) -> float:
        """Return the relative violation by a value; 0 if the constraint is satisfied."""
        if self.allows(value):
            return 0.0
        try:
            return max(_LEAST, float(abs(value - self.bound) / (abs(self.bound) or 1)))
        except TypeError:
            return 1.0

    def told(self, value: Any) -> str:
        """Return the name with a value, in words."""
        return f"{self.name} {value:.4g}" if isinstance(value, float) else f"{self.name} {value}"

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.bound}"


def constraints_of(written: Mapping[str, Any] | None) -> tuple[Constraint, ...]:
    """Parse constraints such as `{"memory_gib": 20, "context_size>=": 16384}`.

    A name alone means at most.
    """
    written = {} if written is None else written
    require("constraints", written, Mapping, 'bounds by name: {"memory_gib": 20}')
    found = []
    for text in texts("constraints", [*written]):
        bound = written[text]
        if isinstance(bound, float) and math.isnan(bound):
            raise ExperimentError(f"The bound on {text} is not a number. Write one.")
        match = _CONSTRAINT.fullmatch(text.strip())
        if match is None:
            raise ExperimentError(
                f"Can't parse the constraint {text!r}. Write a name and one of <=, >=, <, >, ==,"
                ' such as "context_size>=".'
            )
        found.append(Constraint(match["name"], match["sign"] or "<=", bound))
    return tuple(found)


def read_bound(text: object, name: str = "", example: str = "") -> Constraint:
    """Parse a bound such as `generation_tokens_per_second >= 30` or `<= 20 GB`.

    Args:
        text: The bound.
        name: The only metric that may be meant, and bounded from above; by default the text names
            any.
        example: What to write instead if the text can't be parsed; by default another bound.
    """
    match = _BOUND.fullmatch(str(text).strip())
    metric, unit = (match["name"] or name, match["unit"] or "") if match else ("", "")
    if not match or not metric or (name and (metric != name or match["sign"].startswith(">"))):
        example = example or _EXAMPLES.get(name, "generation_tokens_per_second >= 30")
        raise ExperimentError(f"Can't parse {text!r}. Write it like {example!r}.")
    units = _SIZES if metric.endswith("_gib") else {"": 1.0}
    if metric == QUALITY_LOSS or is_share(metric):
        units = _PERCENT | ({} if metric == QUALITY_LOSS else units)
    if unit not in units:
        allowed = " or ".join(filter(None, units)) or "no unit"
        raise ExperimentError(f"{text!r} has the wrong unit: {metric} takes {allowed}.")
    return Constraint(metric, match["sign"], float(match["number"]) * units[unit])
