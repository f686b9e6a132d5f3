"""The table of a sweep: a row for each combination, which fills in as trials end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING, ClassVar

from anywidget import AnyWidget
from rich.filesize import decimal
from traitlets import Unicode

from kitty_nb.experiments import Outcome, Perplexity
from kitty_nb.widgets.assets import asset
from kitty_nb.widgets.load_bar import duration

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from kitty_nb.experiments import Combination, Results, Trial, Workload
    from kitty_nb.experiments.combination import Spread
    from kitty_nb.experiments.trial import Value

_BYTES_PER_GIB = 2**30
_ENDS = (Outcome.DONE, Outcome.SKIPPED, Outcome.FAILED)
_WHOLE_FROM = 100  # a rate from which decimals only distract


@dataclass(frozen=True, slots=True)
class Row:
    """What the table says of one combination.

    Attributes:
        trial: The combination; its first repeat stands for all.
        state: How far it is, in a word or two.
        tone: How to read that: `good`, `busy`, `warn`, `bad` or `idle`.
        metrics: Its numbers, by name; none before the first repeat is done.
        reason: Why repeats were skipped or failed, or empty.
        best: Whether it is the best so far.
        doubt: Why it is not sure that it is the best, in words.
        tied: Whether others are too close to it to tell.
        close: Whether it is one of those.
    """

    trial: Trial
    state: str
    tone: str
    metrics: Mapping[str, Spread]
    reason: str = ""
    best: bool = False
    doubt: str = ""
    tied: bool = False
    close: bool = False


def columns(workload: Workload) -> dict[str, str]:
    """Return the headings of the numbers that such requests give, by name of the number."""
    chosen = {
        "load_seconds": "Load",
        "time_to_first_token": "First token",
        "prompt_tokens_per_second": "Prompt tokens/s",
        "generation_tokens_per_second": "Generation tokens/s",
    }
    least, most = workload.levels[0], workload.levels[-1]
    if most > least:
        chosen[f"total_tokens_per_second_{most}"] = f"Tokens/s, {most} at once"
        chosen[f"memory_gib_{least}"] = f"Memory, {least} at once"
    chosen["memory_gib"] = "Peak memory"
    if workload.quality is not None:
        if isinstance(workload.quality, Perplexity):
            chosen |= {"perplexity": "Perplexity", "bits_per_character": "Bits per character"}
        else:
            chosen["quality"] = "Quality"
    return chosen


def rows_of(
    trials: Iterable[Trial],
    results: Results,
    running: Collection[Trial] = (),
    best: Combination | None = None,
) -> list[Row]:
    """Return a row for each combination, those not tried yet too, in the order of their values.

    Args:
        trials: All trials of the sweep.
        results: What is known by now.
        running: The trials under way.
        best: What to mark.
    """
    repeats = Counter(trial.combination for trial in trials)
    known = {one.trial: one for one in results.combinations}
    outcomes = Counter((row.trial.combination, row.outcome) for row in results.rows)
    at_work = {trial.combination for trial in running}
    rows = []
    for trial in sorted(repeats, key=_place):
        done, skipped, failed = (outcomes[trial, outcome] for outcome in _ENDS)
        state, tone = _state(repeats[trial], done, skipped, failed, at_work=trial in at_work)
        one = known.get(trial)
        rows.append(
            Row(
                trial=trial,
                state=state,
                tone=tone,
                metrics=one.metrics if one else {},
                reason=" ".join(one.reasons) if one else "",
                best=best is not None and trial == best.trial,
                doubt=best.doubt if best else "",
                tied=best is not None and bool(best.close),
                close=best is not None and trial in best.close,
            )
        )
    return rows


def as_html(rows: Sequence[Row], headings: Mapping[str, str]) -> str:
    """Draw the table.

    Args:
        rows: Its rows.
        headings: Of the numbers, by name; see `columns`.
    """
    settings = list(dict.fromkeys(name for row in rows for name, _ in row.trial.settings))
    models = len({row.trial.model for row in rows}) > 1 or not settings
    left = [*(["model"] if models else []), *settings]
    head = "".join(f"<th>{escape(name)}</th>" for name in [*left, "state"])
    head += "".join(f"<th class='kitty-number'>{escape(text)}</th>" for text in headings.values())
    body = "".join(_row(row, settings, headings, models=models) for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def model_name(trial: Trial) -> str:
    """A trial's model as a person calls it: by its place in the models folder, or its file."""
    path = PurePath(trial.model)
    return path.name if path.is_absolute() else str(path)


def figure(name: str, value: float) -> str:
    """A number as the table says it: `0.4 s`, `12 ms`, `104`, `1.4 GB`."""
    if name == "time_to_first_token" and value < 1:
        return f"{value * 1000:.0f} ms"
    if name in {"load_seconds", "time_to_first_token"}:
        return duration(value)
    if name.startswith("memory_gib"):
        return decimal(round(value * _BYTES_PER_GIB))
    if "_per_second" in name:
        return f"{value:,.0f}" if value >= _WHOLE_FROM else f"{value:.1f}"
    return f"{value:.3g}"


def word(value: Value) -> str:
    """A setting's value as the table says it."""
    match value:
        case None:
            return "auto"
        case bool():
            return "on" if value else "off"
        case tuple():
            return " ".join(value)
    return str(value)


class SweepTable(AnyWidget):
    """Shows the table; its scroll position stays when a row comes in."""

    _esm: ClassVar[str] = asset("sweep_table.js")
    _css: ClassVar[str] = asset("panel.css")
    table = Unicode().tag(sync=True)

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-sweep-table")

    def show(self, rows: Sequence[Row], headings: Mapping[str, str]) -> None:
        """Draw these rows."""
        self.table = as_html(rows, headings)


def _state(repeats: int, done: int, skipped: int, failed: int, *, at_work: bool) -> tuple[str, str]:
    ended = done + failed + skipped
    if at_work:
        return (f"running {ended + 1} of {repeats}" if repeats > 1 else "running"), "busy"
    if not ended:
        return "waiting", "idle"
    if not done:
        return ("failed", "bad") if failed else ("skipped", "warn")
    if done < repeats:
        return f"{done} of {repeats} done", "warn" if ended > done else "idle"
    return "done", "good"


def _row(row: Row, settings: Iterable[str], headings: Mapping[str, str], *, models: bool) -> str:
    given = dict(row.trial.settings)
    cells = [f"<td>{escape(model_name(row.trial))}</td>"] if models else []
    words = (word(given[name]) if name in given else "—" for name in settings)
    cells += [f"<td>{escape(word)}</td>" for word in words]
    state = f"<span class='kitty-{row.tone}'>{row.state}</span>{_star(row)}"
    cells.append(f"<td class='kitty-state'>{state}</td>")
    tag = "<tr class='kitty-best'>" if row.best else "<tr>"
    if row.reason and not row.metrics:
        reason = f"<td class='kitty-reason' colspan='{len(headings)}'>{_lines(row.reason)}</td>"
        return f"{tag}{''.join(cells)}{reason}</tr>"
    drawn = "".join([*cells, *(_number(name, row.metrics.get(name)) for name in headings)])
    if not row.reason:
        return f"{tag}{drawn}</tr>"
    whole = len(cells) + len(headings)
    more = f"<td class='kitty-reason' colspan='{whole}'>{_lines(row.reason)}</td>"
    return f"{tag}{drawn}</tr><tr class='kitty-more'>{more}</tr>"


def _star(row: Row) -> str:
    if row.close:
        return " <span title='Too close to the best to tell'>≈ best</span>"
    if not row.best:
        return ""
    title = row.doubt.capitalize() or "The best so far"
    words = "★ too close to tell" if row.tied else "★ best"
    return f" <span class='kitty-sweep-star' title='{title}'>{words}</span>"


def _number(name: str, spread: Spread | None) -> str:
    if spread is None:
        return "<td class='kitty-number kitty-none'>—</td>"
    low, high = figure(name, spread.low), figure(name, spread.high)
    apart = f"<small>{_span(low, high)}</small>" if low != high else ""
    return f"<td class='kitty-number'>{figure(name, spread.median)}{apart}</td>"


def _span(low: str, high: str) -> str:
    """From the least to the greatest, their unit once."""
    (least, _, unit), (greatest, _, other) = low.partition(" "), high.partition(" ")
    return f"{least}&ndash;{greatest} {unit}".strip() if unit == other else f"{low} &ndash; {high}"


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def _place(trial: Trial) -> tuple[object, ...]:
    """Where a row stands: by model, then by values, numbers by their size."""
    values = (
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))
        for _, value in trial.settings
    )
    return trial.model, *values
