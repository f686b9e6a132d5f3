"""`SweepPanel`: a sweep as a live widget, from Start to the settings that won."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from enum import StrEnum
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

from anywidget import AnyWidget
from ipywidgets import Dropdown, HBox, VBox
from rich.filesize import decimal
from traitlets import Unicode

from kitty_nb.errors import ExperimentError, KittyError
from kitty_nb.experiments import Combination, Divergence, Outcome, Perplexity, Results, Sweep
from kitty_nb.experiments.metrics import OBJECTIVE
from kitty_nb.experiments.space import FIELDS
from kitty_nb.experiments.trial import RequestAnswered, SweepEnded, SweepEvent, TrialProgressed
from kitty_nb.supervisor.events import Stage
from kitty_nb.widgets import session
from kitty_nb.widgets.display import (
    Accessible,
    Line,
    LiveView,
    Meter,
    Notice,
    asset,
    button,
    duration,
    explain,
    receive_while_busy,
    still,
    tree,
)
from kitty_nb.widgets.server_view import LoadBar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
    from concurrent.futures import Future

    from kitty_nb.experiments import SweepProgress, Trial, Workload
    from kitty_nb.experiments.metrics import Spread
    from kitty_nb.experiments.trial import Value
    from kitty_nb.supervisor.events import LoadProgress
    from kitty_nb.widgets.control_panel import ControlPanel

# Seconds. A drawing sends about eight messages at most, so a control panel beside this one still
# has its share of what jupyter_server lets through, and the trials are left in peace.
_DRAW_EVERY = 0.5
_CLOCK_EVERY = 1.0
_NAMED_AT_ONCE = 4  # trials under way that are named
_BYTES_PER_GIB = 2**30
_WHOLE_FROM = 100  # tokens a second from which decimals only distract


class SweepStatus(StrEnum):
    """The status of a sweep, as the panel shows it."""

    NOT_STARTED = "Not started"
    RUNNING = "Running"
    PAUSING = "Pausing"
    PAUSED = "Paused"
    INTERRUPTED = "Interrupted"
    FAILED = "Failed"
    DONE = "Done"


_TONES = {
    SweepStatus.RUNNING: "busy",
    SweepStatus.PAUSING: "busy",
    SweepStatus.PAUSED: "warn",
    SweepStatus.FAILED: "bad",
    SweepStatus.DONE: "good",
}
_UNDER_WAY = {SweepStatus.RUNNING, SweepStatus.PAUSING, SweepStatus.PAUSED}
_TO_START = {
    SweepStatus.NOT_STARTED: "Start",
    SweepStatus.INTERRUPTED: "Continue",
    SweepStatus.FAILED: "Continue",
}
_PAUSE = "Pause", "pause", "Finish the running trial, then pause"
_RESUME = "Resume", "play", "Start the next trial"


class SweepTable(AnyWidget):
    """The table of combinations; its scroll position stays when a row comes in."""

    _esm: ClassVar[str] = asset("sweep_table.js")
    _css: ClassVar[str] = asset("panel.css")
    table = Unicode().tag(sync=True)

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-sweep-table")


class SweepButtons(HBox):
    """The buttons, each enabled only where it makes sense."""

    def __init__(self, headings: Mapping[str, str], objective: str) -> None:
        self.start = button("", "play", style="primary")
        self.pause = button(*_PAUSE)
        self.cancel = button("Cancel", "stop", "Stop the sweep and keep finished trials")
        named = {objective: objective.replace("_", " "), **headings}
        self.objective = Dropdown(
            options=[(text, name) for name, text in named.items()],
            value=objective,
            description="Best by",
        )
        self.use = button("Use the best", "star")
        choosing = HBox([self.objective, self.use]).add_class("kitty-choosing")
        super().__init__([self.start, self.pause, self.cancel, choosing])
        self.add_class("kitty-buttons")

    def show(self, status: SweepStatus, *, failed: bool, best: bool) -> None:
        """Enable the buttons that make sense now, and label them."""
        retry = "Retry failed" if failed and status is SweepStatus.DONE else ""
        start = _TO_START.get(status, retry)
        self.start.description, self.start.disabled = start or "Start", not start
        paused = status in {SweepStatus.PAUSING, SweepStatus.PAUSED}
        self.pause.description, self.pause.icon, self.pause.tooltip = _RESUME if paused else _PAUSE
        self.pause.disabled = self.cancel.disabled = status not in _UNDER_WAY
        self.use.disabled = not best


class SweepPanel(VBox):
    """Start a sweep, watch it, pause it, cancel it, and use the best settings.

    The sweep's own thread writes it, so it stays live while a cell keeps the kernel busy; callbacks
    write it too, one at a time. Closing it leaves the sweep running. A sweep has one panel: a
    second one, also of the same sweep created again, replaces it.

    Args:
        sweep: The sweep.
        panel: The panel into which *Use the best* copies the best model and settings; without one,
            the button only shows their lines for `.env`.
        objective: The metric by which the best is chosen at first.
        constraints: Bounds that the best must satisfy; see `Results.best`.
    """

    def __init__(
        self,
        sweep: Sweep,
        panel: ControlPanel | None = None,
        objective: str = OBJECTIVE,
        constraints: Mapping[str, Any] | None = None,
    ) -> None:
        self.sweep, self.panel = sweep, panel
        self._constraints = constraints
        self._headings = columns(sweep.workload)
        self._problem = "\n".join(sweep.warnings)
        self._broke_off = False
        self._rivals: Collection[Sweep] = ()  # those that a start ends, as the user was told
        self._facts: list[str] = []
        self._results = Results(sweep.config, ())
        self._best: Combination | None = None
        self._rows_changed = True
        self._loads: dict[Trial, LoadProgress] = {}
        self._answers: dict[Trial, RequestAnswered] = {}
        self._view = LiveView(self._draw, self._show_problem, lambda: _CLOCK_EVERY, _DRAW_EVERY)
        self._writing = threading.Lock()

        self.status_line = Line("kitty-status")
        self.trials_bar = Meter("kitty-load")
        self.trials_bar.bar.max = len(sweep.trials)
        self.now = Line("kitty-now")
        self.load_bar = LoadBar()
        self.buttons = SweepButtons(self._headings, objective)
        self.notice = Notice()
        self.table = SweepTable()
        self.lines = Line("kitty-lines")
        shown = (self.status_line, self.trials_bar, self.now, self.load_bar, self.buttons)
        below = (self.notice, self.table, self.lines, Accessible("kitty_nb sweep"))
        super().__init__([*shown, *below])
        self.add_class("kitty-panel")
        self.add_class("kitty-sweep")
        self._connect()
        self._replace_earlier()
        self._unsubscribe = sweep.subscribe(self._collect)
        self._draw()

    def __repr__(self) -> str:
        return f"SweepPanel({len(self.sweep.trials)} trials)"

    def _repr_html_(self) -> str:
        done = _done(self.sweep.progress)
        return still("kitty_nb sweep", [done, *self._facts], self.table.table)

    def close(self) -> None:
        """Remove the widgets; a running sweep continues."""
        if self.comm is None:  # closed, or never made, because an argument was wrong
            return
        with self._writing:
            self._unsubscribe()
            self._view.stop()
            for widget in [*tree(self)][1:]:
                widget.close()
            super().close()

    def _connect(self) -> None:
        actions = {
            self.buttons.start: self._start,
            self.buttons.pause: self._pause_or_resume,
            self.buttons.cancel: self.sweep.cancel,
            self.buttons.use: self._use_the_best,
        }
        for pressed, action in actions.items():
            pressed.on_click(lambda _, action=action: self._act(action))
        self.buttons.objective.observe(lambda _: self._act(self._choose_again), names="value")
        receive_while_busy(tree(self))

    def _replace_earlier(self) -> None:
        earlier = session.succeed(self, self.sweep.store, self.sweep.trials)
        _shown.add(self.sweep)
        if earlier is None:
            return
        earlier.close()
        if earlier.sweep is not self.sweep and earlier.sweep.running:
            self._warn_of([earlier.sweep])

    def _warn_of(self, rivals: Collection[Sweep]) -> None:
        """Show, while other sweeps run, that a start ends them."""
        self._rivals = rivals
        for sweep in rivals:
            sweep.subscribe(lambda one: self._refresh() if isinstance(one, SweepEnded) else None)

    def _warning(self) -> str:
        rivals = [sweep for sweep in self._rivals if sweep.running]
        if not rivals:
            return ""
        mine = self.sweep.store, self.sweep.trials
        again = any((sweep.store, sweep.trials) == mine for sweep in rivals)
        what = "An earlier run of this cell" if again else "Another sweep in this notebook"
        return (
            f"{what} is still running; two at once would distort each other's numbers. Wait for it,"
            f" or press {self.buttons.start.description} to end it; finished trials are kept."
        )

    def _act(self, action: Callable[[], object]) -> None:
        """Do what a click asks, and show an error if there is one."""
        self._problem = ""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (raised here, nobody would see it)
            self._problem = explain(error)
        self._refresh()

    def _start(self) -> None:
        if self.sweep.running:
            return
        others = [sweep for sweep in _shown if sweep is not self.sweep and sweep.running]
        if any(sweep not in self._rivals for sweep in others):
            self._warn_of(others)
            return
        self._rivals = ()
        for sweep in (*others, self.sweep):
            sweep.close()  # of our own sweep, the thread of a run that has just ended
        self.sweep.resume()
        progress = self.sweep.progress
        self.sweep.run(retry=progress.done == progress.total)

    def _pause_or_resume(self) -> None:
        (self.sweep.resume if self.sweep.progress.paused else self.sweep.pause)()

    def _choose_again(self) -> None:
        self._rows_changed = True

    def _use_the_best(self) -> None:
        best = self._results.best(self.buttons.objective.value, self._constraints)
        config, profile, where = best.config, None, "In <code>.env</code>:"
        if self.panel:
            self.panel.use(model=config.model, **{name: getattr(config, name) for name in FIELDS})
            profile = self.panel.manager.state.config.profile
            where = "The panel has these settings; start the model there. In <code>.env</code>:"
        doubt = f" is {best.doubt}" if best.doubt else ""
        head = f"<b>{escape(best.trial.label)}</b>{doubt}. {where}"
        self.lines.write(f"{head}<pre>{escape(best.env_lines(profile))}</pre>")

    def _collect(self, event: SweepEvent) -> None:
        match event:
            case TrialProgressed(trial, progress):
                self._loads[trial] = progress
            case RequestAnswered(trial):
                self._answers[trial] = event
            case SweepEnded(_, problem):
                self._loads.clear()
                self._answers.clear()
                self._broke_off = bool(problem)
                self._problem = problem or self._problem
        if not isinstance(event, TrialProgressed | RequestAnswered):
            self._rows_changed = True
        if self.sweep.running and not self._view.drawing:
            self._view.start(_run_here)
        self._refresh()

    def _refresh(self) -> None:
        """Draw immediately if no loop is running, otherwise soon on that loop."""
        if self._view.drawing:
            self._view.wake()
        else:
            self._draw()

    def _draw(self) -> None:
        with self._writing:
            if self.comm is not None:
                self._write()

    def _show_problem(self, message: str) -> None:
        self._problem = message
        self.notice.show(message)

    def _write(self) -> None:
        progress, running = self.sweep.progress, self.sweep.running
        if self._rows_changed:
            self._rows_changed = False
            self._read_rows(progress.running)
        status = status_of(progress, running=running, broken=self._broke_off)
        with self.trials_bar.bar.hold_sync():
            self.trials_bar.bar.value = progress.done
            self.trials_bar.bar.bar_style = "success" if status is SweepStatus.DONE else ""
        self.trials_bar.text.value = _how_far(status, progress)
        self.now.write(_under_way(status, progress.running, self._answers))
        self._show_load(progress.running)
        failed = any(row.outcome is not Outcome.DONE for row in self._results.rows)
        self.buttons.show(status, failed=failed, best=self._best is not None)
        self.notice.show(self._warning() or self._problem or self.sweep.store_problem)
        # Last, so that whoever sees the status may rely on the rest being as it says.
        facts = "".join(f"<span class='kitty-fact'>{escape(fact)}</span>" for fact in self._facts)
        badge = f"<span class='kitty-badge kitty-{_TONES.get(status, 'idle')}'>{status}</span>"
        self.status_line.write(f"{badge}<span class='kitty-heading'>Sweep</span>{facts}")

    def _read_rows(self, running: Collection[Trial]) -> None:
        try:
            self._results = self.sweep.results
        except KittyError as error:
            self._problem = str(error)
        self._best = None
        if any(row.outcome is Outcome.DONE for row in self._results.rows):
            try:
                self._best = self._results.best(self.buttons.objective.value, self._constraints)
            except ExperimentError as error:  # none keeps the constraints, or has this number
                if not self.sweep.running:
                    self._problem = self._problem or str(error)
        trials = self.sweep.trials
        self.table.table = draw_table(trials, self._results, self._headings, running, self._best)
        self._facts = _facts(trials, self._results)

    def _show_load(self, running: Collection[Trial]) -> None:
        loads = filter(None, map(self._loads.get, running))
        self.load_bar.show_load(min(loads, key=lambda one: one.stage is Stage.READY, default=None))


_shown: WeakSet[Sweep] = WeakSet()


def _run_here(function: Callable[[], Coroutine[Any, Any, None]]) -> Future[None]:
    return asyncio.run_coroutine_threadsafe(function(), asyncio.get_running_loop())


def bundle(sweep: Sweep) -> dict[str, Any]:
    """Return a notebook's display of a sweep: its panel, created if none is open."""
    panel = session.newest(SweepPanel, sweep.store, sweep.trials)
    if panel is None or panel.sweep is not sweep or panel.comm is None:
        panel = SweepPanel(sweep)
    still_picture = {"text/html": panel._repr_html_(), "text/plain": repr(sweep)}
    return {**panel._repr_mimebundle_(), **still_picture}


def status_of(progress: SweepProgress, *, running: bool, broken: bool = False) -> SweepStatus:
    """Return a sweep's status; `broken` means that its last run ended with an error."""
    if running and progress.paused:
        return SweepStatus.PAUSING if progress.running else SweepStatus.PAUSED
    if running:
        return SweepStatus.RUNNING
    if progress.done == progress.total:
        return SweepStatus.DONE
    if broken:
        return SweepStatus.FAILED
    return SweepStatus.INTERRUPTED if progress.done else SweepStatus.NOT_STARTED


def _facts(trials: Collection[Trial], results: Results) -> list[str]:
    combinations = len({trial.combination for trial in trials})
    models = {model_name(trial) for trial in trials}
    outcomes = Counter(row.outcome for row in results.rows)
    return [
        f"{len(models)} models" if len(models) > 1 else models.pop(),
        f"{combinations} combination{'s' if combinations > 1 else ''}",
        *([f"{len(trials) // combinations} times each"] if len(trials) > combinations else []),
        *(f"{n} {end}" for end in (Outcome.FAILED, Outcome.SKIPPED) if (n := outcomes[end])),
    ]


def _done(progress: SweepProgress) -> str:
    return f"{progress.done} of {progress.total} trials"


def _how_far(status: SweepStatus, progress: SweepProgress) -> str:
    if status in {SweepStatus.DONE, SweepStatus.NOT_STARTED}:
        return _done(progress)
    if progress.eta is not None:
        return f"{_done(progress)} · about {duration(max(progress.eta, 1))} left"
    unknown = " · time left unknown" if status is SweepStatus.RUNNING else ""
    return f"{_done(progress)}{unknown}"


def _under_way(
    status: SweepStatus, running: Collection[Trial], answers: Mapping[Trial, RequestAnswered]
) -> str:
    if status is SweepStatus.PAUSED:
        return "Paused. Press Resume to start the next trial."
    named = [_now(trial, answers.get(trial)) for trial in running][:_NAMED_AT_ONCE]
    more = len(running) - len(named)
    return "<br>".join([*named, *([f"and {more} more"] if more else [])])


def _now(trial: Trial, answer: RequestAnswered | None) -> str:
    settings = (f"{name} <b>{escape(word(value))}</b>" for name, value in trial.settings)
    parts = [f"<b>{escape(model_name(trial))}</b>", *settings, f"repeat {abs(trial.repeat)}"]
    if answer:
        parts.append(f"request {answer.done} of {answer.total}")
        if answer.parallel > 1:
            parts.append(f"{answer.parallel} at once")
        if answer.tokens_per_second:
            parts.append(f"{answer.tokens_per_second:,.0f} tokens/s")
    return " · ".join(parts)


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
    elif isinstance(workload.quality, Divergence):
        chosen |= {"kl_divergence": "KL divergence", "top_token_agreement": "Same top token"}
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
    """Draw a row for each combination, tried or not, in the order of their values."""
    repeats = Counter(trial.combination for trial in trials)
    settings = list(dict.fromkeys(name for trial in repeats for name, _ in trial.settings))
    several = len({trial.model for trial in repeats}) > 1 or not settings
    left = [*(["model"] if several else []), *settings]
    known = {one.trial: one for one in results.combinations}
    at_work = {trial.combination for trial in running}
    rows = []
    for trial in sorted(repeats, key=_place):
        one = known.get(trial, Combination(trial, results.config))
        given = {"model": model_name(trial), **{name: word(v) for name, v in trial.settings}}
        cells = [f"<td>{escape(given.get(name, '—'))}</td>" for name in left]
        state, tone = _state(one, repeats[trial], at_work=trial in at_work)
        badge = f"<span class='kitty-{tone}'>{state}</span>{_star(trial, best)}"
        cells.append(f"<td class='kitty-state'>{badge}</td>")
        rows.append(_row(cells, one, headings, winner=best is not None and trial == best.trial))
    head = "".join(f"<th>{escape(name)}</th>" for name in [*left, "state"])
    head += "".join(f"<th class='kitty-number'>{escape(text)}</th>" for text in headings.values())
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def model_name(trial: Trial) -> str:
    """Return a trial's model: its path in the models folder, or its file name elsewhere."""
    path = PurePath(trial.model)
    return path.name if path.is_absolute() else str(path)


def figure(name: str, value: float) -> str:
    """Format a metric: `0.4 s`, `12 ms`, `104`, `1.4 GB`."""
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
    """Format a setting's value."""
    match value:
        case None:
            return "auto"
        case bool():
            return "on" if value else "off"
        case tuple():
            return " ".join(value)
    return str(value)


def _state(one: Combination, repeats: int, *, at_work: bool) -> tuple[str, str]:
    """Return a combination's state in words, and its tone."""
    done, ended = one.done, sum(one.outcomes.values())
    if at_work:
        return (f"running {ended + 1} of {repeats}" if repeats > 1 else "running"), "busy"
    if not ended:
        return "waiting", "idle"
    if not done:
        return ("failed", "bad") if Outcome.FAILED in one.outcomes else ("skipped", "warn")
    if done < repeats:
        return f"{done} of {repeats} done", "warn" if ended > done else "idle"
    return "done", "good"


def _row(cells: list[str], one: Combination, headings: Mapping[str, str], *, winner: bool) -> str:
    """Draw a combination's numbers, and below them, or in their place, what went wrong."""
    reason = escape(" ".join(one.reasons)).replace("\n", "<br>")

    def told(width: int) -> str:
        return f"<td class='kitty-reason' colspan='{width}'>{reason}</td>"

    numbers = [_number(name, one.metrics.get(name)) for name in headings]
    if reason and not one.done:
        numbers = [told(len(headings))]
    tag = "<tr class='kitty-best'>" if winner else "<tr>"
    drawn = f"{tag}{''.join([*cells, *numbers])}</tr>"
    if reason and one.done:
        drawn += f"<tr class='kitty-more'>{told(len(cells) + len(headings))}</tr>"
    return drawn


def _star(trial: Trial, best: Combination | None) -> str:
    if best is None:
        return ""
    if trial in best.close:
        return " <span title='Too close to the best to distinguish'>≈ best</span>"
    if trial != best.trial:
        return ""
    title = escape(best.doubt.capitalize()) or "The best so far"
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
    """Return a row's sort key: the model, then the values, numbers by size."""
    values = (
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))
        for _, value in trial.settings
    )
    return trial.model, *values
