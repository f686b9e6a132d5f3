"""Plots of results: bars, curves, parallel coordinates and Pareto fronts."""

from __future__ import annotations

import operator
import re
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from kitty_nb.errors import printable
from kitty_nb.experiments.metrics import smaller_is_better
from kitty_nb.experiments.output import number, valid_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from kitty_nb.experiments.combination import Combination

    Numbers = NDArray[np.float64]
    Point = tuple[float, float, float, float]

_BAR = 0.35  # inches
_APART = 0.008  # fraction of an axis
# Okabe and Ito's colour-blind safe palette, and markers for print.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8A8A", "#B8A800")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_BESIDE: Any = {"textcoords": "offset points", "fontsize": 9}
_BESIDE_OTHERS = 28  # characters of a label of which two fit side by side, also in a report
_UNITS = {" seconds": "s", " gib": "GiB", " ghz": "GHz", " celsius": "°C"}
_COSTS = ("memory_gib", "load_seconds")  # shown by parallel coordinates beside the settings


class Picture(Figure):
    """A figure that notebooks display without pyplot."""

    def savefig(self, fname: Any, **how: Any) -> None:
        """Save the whole figure: long labels may extend beyond its frame."""
        super().savefig(fname, **({"bbox_inches": "tight"} | how))

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def front(points: Sequence[tuple[float, ...]], *names: str) -> list[int]:
    """Return the indices of the Pareto-optimal points, ordered by the first metric. Pure."""
    signs = [1 if smaller_is_better(name) else -1 for name in names]
    costs = [tuple(map(operator.mul, signs, point)) for point in points]
    kept: list[int] = []
    for index in sorted(range(len(costs)), key=costs.__getitem__):  # dominating points come first
        if not any(all(map(operator.le, costs[other], costs[index])) for other in kept):
            kept.append(index)
    return kept


def _bars(drawn: list[Combination], y: str, *_: str) -> Figure:
    worst_first = sorted(drawn, key=lambda one: one.metrics[y].median, reverse=smaller_is_better(y))
    figure, axes = _figure(height=1.2 + _BAR * len(drawn))
    middle, ends = _error_bars(_spreads(worst_first, y))
    labels = [*map(_literal, labels_of(worst_first))]
    axes.barh(labels, middle, xerr=ends, capsize=3, color=_COLOURS[0], ecolor="0.5")
    axes.set_xlabel(f"{words_of(y)}\n(median and range of the repeats)")
    return figure


def curves(drawn: Mapping[str, Sequence[Point]], y: str, x: str, over: str = "") -> Figure:
    """Plot a line for each name, with error bars if they are a range over something."""
    figure, axes = _figure()
    places = sorted({point[0] for points in drawn.values() for point in points})
    apart = _APART * (places[-1] - places[0])  # keeps error bars from overlapping
    for index, (label, points) in enumerate(drawn.items()):
        place, *spreads = np.array(sorted(points)).T
        middle, ends = _error_bars(np.array(spreads).T)
        aside = apart * (index - (len(drawn) - 1) / 2)
        axes.errorbar(place + aside, middle, ends, label=_literal(label), capsize=3, **_look(index))
    axes.set_xlabel(x)
    axes.set_ylabel(words_of(y))
    if all(place == int(place) for place in places):  # numbers of requests or tokens
        axes.set_xticks(places)
    axes.set_ylim(bottom=0)  # otherwise noise would fill the height
    axes.grid(visible=True, axis="y", alpha=0.3)
    _legend(figure, axes, over)
    return figure


def _legend(figure: Figure, axes: Axes, over: str) -> None:
    """Add a legend below the axes, which also explains the error bars."""
    _, labels = axes.get_legend_handles_labels()
    title = f"points are medians, bars the range of the {over}" if over else None
    ncols = 2 if max(map(len, labels)) <= _BESIDE_OTHERS else 1
    figure.legend(loc="outside lower center", ncols=ncols, frameon=False, title=title)


def _look(index: int) -> dict[str, Any]:
    """Return a distinct colour, marker and line style."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": ("-", "--", ":")[index // len(_COLOURS) % 3],
    }


def _parallel(drawn: list[Combination], y: str, *_: str) -> Figure:
    costs = [n for n in _COSTS if n != y and all(n in one.metrics for one in drawn)]
    names = [*_varying(drawn), *costs, y]
    figure, axes = _figure(width=1.6 * max(len(names), 3))
    columns = [_places(axes, column, name, drawn) for column, name in enumerate(names)]
    for line in np.swapaxes(columns, 0, 1):
        middle, ends = _error_bars(line)
        across, colour = range(len(names)), colormaps["viridis"](middle[-1])
        axes.errorbar(across, middle, ends, color=colour, marker="o", capsize=3, alpha=0.8)
    axes.set_xlabel("(points are medians, bars the range of the repeats)")
    axes.set_xticks(range(len(names)), [words_of(name).replace(" ", "\n", 1) for name in names])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="x")
    return figure


def _places(axes: Axes, column: int, name: str, drawn: list[Combination]) -> Numbers:
    """Draw an axis's ticks, and return where each combination crosses it, from 0 to 1."""
    places = np.zeros((len(drawn), 3))
    if name in drawn[0].metrics:
        values = _spreads(drawn, name)
        low, high = min(0.0, values.min()), values.max()  # otherwise noise would fill the height
        places += (values - low) / ((high - low) or 1.0)
        ticks = {0.0: number(low), 1.0: number(high)}
    else:
        settings = [one.value(name) for one in drawn]
        numbers = all(type(value) in {int, float} for value in settings)
        ordered = sorted(set(settings), key=None if numbers else str)
        steps = max(len(ordered) - 1, 1)
        places += [[ordered.index(value) / steps] for value in settings]
        ticks = {index / steps: _literal(str(value)) for index, value in enumerate(ordered)}
    # Those of the first axis, mostly names of models, are long: they stand where no other axis is.
    look: dict[str, Any] = {"xytext": (4, 2)} if column else {"xytext": (-7, -3), "ha": "right"}
    for place, text in ticks.items():
        axes.annotate(text, (column, place), textcoords="offset points", fontsize=8, **look)
    return places


def _pareto(drawn: list[Combination], y: str, x: str, colour: str) -> Figure:
    figure, axes = _figure(height=5.5 if colour else 4.5)
    (across, wide), (up, high) = (_error_bars(_spreads(drawn, name)) for name in (x, y))
    rest = axes.errorbar(across, up, high, wide, color="0.7", marker="o", capsize=3, linestyle="")
    names = [name for name in (x, y, colour) if name]
    labels = [*map(_literal, labels_of(drawn))]
    medians = [tuple(one.metrics[name].median for name in names) for one in drawn]
    best = front(medians, *names)
    if len(best) < len(drawn):
        rest.set_label("beaten by one of these")
    looks = [_look(number) | {"linestyle": ""} for number in range(len(best))]
    if colour:
        tints = _colour_bar(figure, axes, colour, [median[-1] for median in medians])
        axes.scatter(across, up, c=tints, s=40, zorder=3)
        for number, (index, look) in enumerate(zip(best, looks, strict=True), 1):
            look |= {"color": tints[index], "markeredgecolor": "0.4"}
            labels[index] = f"{number}: {labels[index]}"
            axes.annotate(f"{number}", (across[index], up[index]), (7, 5), **_BESIDE)
    else:
        axes.plot(across[best], up[best], color="0.5")
    for index, look in zip(best, looks, strict=True):
        size = 11 if colour else 8
        axes.plot(across[index], up[index], label=labels[index], zorder=4, markersize=size, **look)
    _legend(figure, axes, "repeats")
    axes.set_xlabel(words_of(x))
    axes.set_ylabel(words_of(y))
    axes.update_datalim([(0.0, 0.0)])  # otherwise 21.2 and 22.1 would look far apart
    axes.autoscale_view()
    return figure


def _colour_bar(figure: Figure, axes: Axes, name: str, values: Sequence[float]) -> Numbers:
    """Draw a colour bar, and return each value's colour in a perceptually uniform map."""
    scale = ScalarMappable(Normalize(min(values), max(values)), "cividis")
    better = "less" if smaller_is_better(name) else "more"
    bar = figure.colorbar(scale, ax=axes, label=f"{words_of(name)} ({better} is better)")
    for drawn in bar.ax.collections:
        drawn.set(rasterized=False, edgecolor="face")  # keeps bitmaps out of the report's SVG
    return np.asarray(scale.to_rgba(np.array(values)))


def _literal(label: str) -> str:
    """Return a label for Matplotlib, which would draw `$…$` as math and hide a leading `_`."""
    text = valid_text(printable(label)).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _figure(width: float = 8.0, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _spreads(drawn: list[Combination], name: str) -> Numbers:
    """Return an array of median, minimum and maximum, with a row per combination."""
    spreads = (one.metrics[name] for one in drawn)
    return np.array([(one.median, one.low, one.high) for one in spreads])


def _error_bars(spreads: Numbers) -> tuple[Numbers, Numbers]:
    """Return the medians, and the distances of minimum and maximum from them."""
    middle, low, high = spreads.T
    return middle, np.array([middle - low, high - middle])


def _varying(drawn: Sequence[Combination]) -> list[str]:
    names = ["model", *dict.fromkeys(name for one in drawn for name, _ in one.trial.settings)]
    return [name for name in names if len({str(one.value(name)) for one in drawn}) > 1]


def labels_of(drawn: Sequence[Combination]) -> list[str]:
    """Return a label for each combination: the settings that distinguish it.

    If some have equal values, one left to the engine and the other given, all settings as given.
    """

    def told(values: Mapping[str, object]) -> str:
        return ", ".join(f"{name} {value}".removeprefix("model ") for name, value in values.items())

    names = _varying(drawn)
    labels = [told({name: one.value(name) for name in names}) or one.trial.label for one in drawn]
    return labels if len({*labels}) == len(drawn) else [told(one.trial.columns) for one in drawn]


def words_of(name: str) -> str:
    """Return a metric's name in words, with its unit."""
    at_once = re.fullmatch(r"(.+?)_(\d+)", name)
    words = (at_once[1] if at_once else name).replace("_", " ")
    if words.startswith(("time to first token", "time between tokens")):
        words += ", s"
    words = {"seconds": "trial, s", "kl divergence": "KL divergence, nats"}.get(words, words)
    for end, unit in _UNITS.items():
        if words.endswith(end):
            words = f"{words.removesuffix(end)}, {unit}"
    return f"{words}, {at_once[2]} at once" if at_once else words


KINDS: dict[str, Callable[[list[Combination], str, str, str], Figure]] = {
    "bars": _bars,
    "parallel": _parallel,
    "pareto": _pareto,
}
