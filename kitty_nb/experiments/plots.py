"""Pictures of a sweep: bars with their spread, parallel coordinates, and Pareto fronts."""

from __future__ import annotations

import re
from io import BytesIO
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.figure import Figure

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.combination import Spread
from kitty_nb.experiments.metrics import known, smaller_is_better

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from kitty_nb.experiments.combination import Combination
    from kitty_nb.experiments.results import Results

_BAR = 0.35  # inches
_COSTS = ("memory_gib", "load_seconds")  # what parallel coordinates show beside the settings


class Picture(Figure):
    """A figure that a notebook shows also where pyplot has not been set up."""

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        self.savefig(png, format="png", bbox_inches="tight")
        return png.getvalue()


def draw(results: Results, kind: str, y: str, x: str) -> Figure:
    """See `Results.plot`."""
    kinds = {"bars": _bars, "parallel": _parallel, "pareto": _pareto}
    if kind not in kinds:
        raise ExperimentError(f"There is no plot {kind!r}. There are {', '.join(kinds)}.")
    measured = [one for one in results.combinations if one.done]
    if not measured:
        raise ExperimentError("Nothing was measured, so there is nothing to draw.")
    names = {name for one in measured for name in one.metrics}
    for name in (y, x) if kind == "pareto" else (y,):
        known(name, names)
    drawn = [one for one in measured if y in one.metrics]
    return kinds[kind](drawn, y, x)


def front(points: Sequence[tuple[float, float]], x: str, y: str) -> list[int]:
    """Return the indices of those points that no other beats in both numbers, by `x`. Pure.

    Args:
        points: Values of `x` and `y`.
        x: Name of the one number, which says whether less of it is better.
        y: Name of the other.
    """
    signs = [1 if smaller_is_better(name) else -1 for name in (x, y)]
    costs = [(signs[0] * one, signs[1] * other) for one, other in points]
    kept: list[int] = []
    for index in sorted(range(len(costs)), key=costs.__getitem__):
        if not kept or costs[index][1] < costs[kept[-1]][1]:
            kept.append(index)
    return kept


def _bars(drawn: list[Combination], y: str, _: str) -> Figure:
    worst_first = sorted(drawn, key=lambda one: one.metrics[y].median, reverse=smaller_is_better(y))
    figure, axes = _figure(height=1.2 + _BAR * len(drawn))
    spreads = [one.metrics[y] for one in worst_first]
    axes.barh(
        _labels(worst_first),
        [spread.median for spread in spreads],
        xerr=[
            [spread.median - spread.low for spread in spreads],
            [spread.high - spread.median for spread in spreads],
        ],
        capsize=3,
    )
    axes.set_xlabel(f"{_words(y)}\n(median, and from the least to the greatest of the repeats)")
    return figure


def _parallel(drawn: list[Combination], y: str, _: str) -> Figure:
    varying = [name for name in _settings(drawn) if len({_word(one, name) for one in drawn}) > 1]
    costs = [n for n in _COSTS if n != y and all(n in one.metrics for one in drawn)]
    names = [*varying, *costs, y]
    figure, axes = _figure(width=1.6 * max(len(names), 3))
    columns = [_places(axes, column, name, drawn) for column, name in enumerate(names)]
    for spreads in zip(*columns, strict=True):
        low, heights, high = zip(*((one.low, one.median, one.high) for one in spreads), strict=True)
        ends = [
            [at - end for at, end in zip(heights, low, strict=True)],
            [end - at for at, end in zip(heights, high, strict=True)],
        ]
        colour = colormaps["viridis"](heights[-1])
        axes.errorbar(
            range(len(names)), heights, ends, color=colour, marker="o", capsize=3, alpha=0.8
        )
    axes.set_xlabel("(points are medians, bars from the least to the greatest of the repeats)")
    axes.set_xticks(range(len(names)), [_words(name).replace(" ", "\n", 1) for name in names])
    axes.set_yticks([])
    axes.grid(visible=True, axis="x")
    return figure


def _places(axes: Axes, column: int, name: str, drawn: list[Combination]) -> list[Spread]:
    """Where each combination crosses an axis, from 0 to 1; its ticks are written beside it."""
    if name in drawn[0].metrics:
        spreads = [one.metrics[name] for one in drawn]
        # As low as zero, so that noise is not drawn at full height.
        low = min(0.0, *(spread.low for spread in spreads))
        high = max(spread.high for spread in spreads)
        size = (high - low) or 1.0
        places = [
            Spread(*((end - low) / size for end in (one.median, one.low, one.high)))
            for one in spreads
        ]
        ticks = {0.0: _number(low), 1.0: _number(high)}
    else:
        values = [one.value(name) for one in drawn]
        numbers = all(type(value) in {int, float} for value in values)
        ordered = sorted(set(values), key=None if numbers else str)
        steps = max(len(ordered) - 1, 1)
        heights = [ordered.index(value) / steps for value in values]
        places = [Spread(height, height, height) for height in heights]
        ticks = {index / steps: str(value) for index, value in enumerate(ordered)}
    for place, text in ticks.items():
        axes.annotate(text, (column, place), xytext=(4, 2), textcoords="offset points", fontsize=8)
    return places


def _pareto(drawn: list[Combination], y: str, x: str) -> Figure:
    drawn = [one for one in drawn if x in one.metrics]
    figure, axes = _figure()
    points = [(one.metrics[x].median, one.metrics[y].median) for one in drawn]
    best = front(points, x, y)
    for one, (across, up) in zip(drawn, points, strict=True):
        ends = [one.metrics[name] for name in (x, y)]
        wide, high = ([[s.median - s.low], [s.high - s.median]] for s in ends)
        axes.errorbar(across, up, high, wide, color="0.7", marker="o", capsize=3)
    axes.plot(*zip(*(points[index] for index in best), strict=True), color="0.5")
    labels = _labels(drawn)
    for index in best:
        axes.scatter(*points[index], label=labels[index], zorder=3)
    figure.legend(loc="outside lower center")
    axes.set_xlabel(_words(x))
    axes.set_ylabel(_words(y))
    axes.update_datalim([(0.0, 0.0)])  # 21.2 and 22.1 should look alike
    axes.autoscale_view()
    return figure


def _figure(width: float = 8.0, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Picture(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _settings(drawn: list[Combination]) -> list[str]:
    return ["model", *dict.fromkeys(name for one in drawn for name, _ in one.trial.settings)]


def _word(one: Combination, name: str) -> str:
    return str(one.value(name))


def _labels(drawn: list[Combination]) -> list[str]:
    """What tells the combinations apart, in words."""
    varying = [name for name in _settings(drawn) if len({_word(one, name) for one in drawn}) > 1]
    return [
        ", ".join(
            _word(one, name) if name == "model" else f"{name} {_word(one, name)}"
            for name in varying
        )
        or one.trial.label
        for one in drawn
    ]


def _number(value: float) -> str:
    """A number to three digits, but never with an exponent as 4.44e+03."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004


def _words(name: str) -> str:
    at_once = re.fullmatch(r"(.+?)_(\d+)", name)
    words = (at_once[1] if at_once else name).replace("_", " ").replace("gib", "GiB")
    unit = ", s" if words == "time to first token" or words.endswith("seconds") else ""
    words = words.removesuffix(" seconds") if words != "seconds" else "trial"
    return f"{words}{unit}, {at_once[2]} at once" if at_once else f"{words}{unit}"
