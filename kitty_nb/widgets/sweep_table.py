"""The table of a sweep: a row for each combination, with the medians of its trials."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING, ClassVar

from anywidget import AnyWidget
from rich.filesize import decimal
from traitlets import Unicode

from kitty_nb.experiments import Outcome, Perplexity
from kitty_nb.widgets.display import asset, duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kitty_nb.experiments import Combination, Results, Trial, Workload
    from kitty_nb.experiments.metrics import Spread
    from kitty_nb.experiments.trial import Value

_ENDS = (Outcome.DONE, Outcome.SKIPPED, Outcome.FAILED)
_BYTES_PER_GIB = 2**30
_WHOLE_FROM = 100  # tokens a second from which decimals only distract


class SweepTable(AnyWidget):
    """The table of combinations; its scroll position stays when a row comes in."""

    _esm: ClassVar[str] = asset("sweep_table.js")
    _css: ClassVar[str] = asset("panel.css")
    table = Unicode().tag(sync=True)

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-sweep-table")


def columns(workload: Workload) -> dict[str, str]:
    """Return the headings of the table's numbers, by name of the number."""
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
    if isinstance(workload.quality, Perplexity):
        chosen |= {"perplexity": "Perplexity", "bits_per_character": "Bits per character"}
    elif workload.quality is not None:
        chosen["quality"] = "Quality"
    return chosen


def draw_table(
    trials: Iterable[Trial],
    results: Results,
    headings: Mapping[str, str],
    running: Iterable[Trial] = (),
    best: Combination | None = None,
) -> str:
    """Draw a row for each combination, those not tried yet too, in the order of their values."""
    repeats = Counter(trial.combination for trial in trials)
    settings = list(dict.fromkeys(name for trial in repeats for name, _ in trial.settings))
    several = len({trial.model for trial in repeats}) > 1 or not settings
    left = [*(["model"] if several else []), *settings]
    known = {one.trial: one for one in results.combinations}
    outcomes = Counter((row.trial.combination, row.outcome) for row in results.rows)
    at_work = {trial.combination for trial in running}
    rows = []
    for trial in sorted(repeats, key=_place):
        given = {"model": model_name(trial), **{name: word(v) for name, v in trial.settings}}
        done, *others = (outcomes[trial, end] for end in _ENDS)
        state, tone = _state(repeats[trial], done, *others, at_work=trial in at_work)
        cells = [f"<td>{escape(given.get(name, '—'))}</td>" for name in left]
        badge = f"<span class='kitty-{tone}'>{state}</span>{_star(trial, best)}"
        cells.append(f"<td class='kitty-state'>{badge}</td>")
        winner = best is not None and trial == best.trial
        rows.append(_row(cells, known.get(trial), headings, winner=winner))
    head = "".join(f"<th>{escape(name)}</th>" for name in [*left, "state"])
    head += "".join(f"<th class='kitty-number'>{escape(text)}</th>" for text in headings.values())
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def model_name(trial: Trial) -> str:
    """A trial's model by its place in the models folder, or its file elsewhere."""
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


def _row(
    cells: list[str], one: Combination | None, headings: Mapping[str, str], *, winner: bool
) -> str:
    tag = "<tr class='kitty-best'>" if winner else "<tr>"
    reason = escape(" ".join(one.reasons)).replace("\n", "<br>") if one else ""
    metrics = one.metrics if one else {}
    if reason and not metrics:
        told = f"<td class='kitty-reason' colspan='{len(headings)}'>{reason}</td>"
        return f"{tag}{''.join(cells)}{told}</tr>"
    numbers = (_number(name, metrics.get(name)) for name in headings)
    drawn = f"{tag}{''.join([*cells, *numbers])}</tr>"
    if not reason:
        return drawn
    told = f"<td class='kitty-reason' colspan='{len(cells) + len(headings)}'>{reason}</td>"
    return f"{drawn}<tr class='kitty-more'>{told}</tr>"


def _star(trial: Trial, best: Combination | None) -> str:
    if best is None:
        return ""
    if trial in best.close:
        return " <span title='Too close to the best to distinguish'>≈ best</span>"
    if trial != best.trial:
        return ""
    title = best.doubt.capitalize() or "The best so far"
    words = "★ too close to tell" if best.close else "★ best"
    return f" <span class='kitty-sweep-star' title='{title}'>{words}</span>"


def _number(name: str, spread: Spread | None) -> str:
    if spread is None:
        return "<td class='kitty-number kitty-none'>—</td>"
    low, high = figure(name, spread.low), figure(name, spread.high)
    (least, _, unit), (greatest, _, other) = low.partition(" "), high.partition(" ")
    span = f"{least}&ndash;{greatest} {unit}" if unit == other else f"{low} &ndash; {high}"
    apart = f"<small>{span.strip()}</small>" if low != high else ""
    return f"<td class='kitty-number'>{figure(name, spread.median)}{apart}</td>"


def _place(trial: Trial) -> tuple[object, ...]:
    """The sort key of a row: by model, then by values, numbers by their size."""
    values = (
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))
        for _, value in trial.settings
    )
    return trial.model, *values
