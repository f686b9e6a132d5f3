"""`SweepPanel`: a sweep as a live widget, from Start to the settings that won."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from enum import StrEnum
from html import escape
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ipywidgets import HTML, Button, Dropdown, HBox, VBox

from kitty_nb.errors import ExperimentError, KittyError
from kitty_nb.experiments import Outcome, Results, Sweep
from kitty_nb.experiments.metrics import OBJECTIVE
from kitty_nb.experiments.space import FIELDS
from kitty_nb.experiments.trial import (
    RequestAnswered,
    SweepEnded,
    SweepEvent,
    TrialProgressed,
    TrialStarted,
)
from kitty_nb.supervisor.events import ServerStatus, Stage
from kitty_nb.widgets import session
from kitty_nb.widgets.display import (
    Accessible,
    LiveView,
    Notice,
    duration,
    explain,
    receive_while_busy,
    still,
    tree,
)
from kitty_nb.widgets.server_view import LoadBar
from kitty_nb.widgets.sweep_table import SweepTable, columns, draw_table, model_name, word

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Mapping
    from concurrent.futures import Future

    from kitty_nb.experiments import Combination, SweepProgress, Trial
    from kitty_nb.supervisor.events import LoadProgress
    from kitty_nb.widgets.control_panel import ControlPanel

# Seconds. A drawing sends about eight messages at most, so a control panel beside this one still
# has its share of what jupyter_server lets through, and the trials are left in peace.
_DRAW_EVERY = 0.5
_CLOCK_EVERY = 1.0
_NAMED_AT_ONCE = 4  # trials under way that are named


class SweepStatus(StrEnum):
    """The status of a sweep, as the panel shows it."""

    NOT_STARTED = "NOT STARTED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    INTERRUPTED = "INTERRUPTED"
    FAILED = "FAILED"
    DONE = "DONE"


_TONES = {"PAUSED": "warn", "FAILED": "bad", "DONE": "good"} | dict.fromkeys(
    ("STARTING", "RUNNING", "PAUSING"), "busy"
)
_UNDER_WAY = {SweepStatus.RUNNING, SweepStatus.PAUSING, SweepStatus.PAUSED}


class SweepButtons(HBox):
    """The buttons, each enabled only where it makes sense."""

    def __init__(self, headings: Mapping[str, str], objective: str) -> None:
        self.start = Button(icon="play", button_style="primary")
        self.pause = Button()
        self.cancel = Button(
            description="Cancel", icon="stop", tooltip="Stop the sweep and keep finished trials"
        )
        named = {objective: objective.replace("_", " "), **headings}
        self.objective = Dropdown(
            options=[(text, name) for name, text in named.items()],
            value=objective,
            description="Best by",
        )
        self.use = Button(description="Use the best", icon="star")
        choosing = HBox([self.objective, self.use])
        choosing.add_class("kitty-choosing")
        super().__init__([self.start, self.pause, self.cancel, choosing])
        self.add_class("kitty-buttons")

    def show(self, status: SweepStatus, *, failed: bool, best: bool) -> None:
        """Enable what makes sense now, and name what it does."""
        running, paused = status in _UNDER_WAY, status in {SweepStatus.PAUSING, SweepStatus.PAUSED}
        done = status is SweepStatus.DONE
        begun = status in {SweepStatus.INTERRUPTED, SweepStatus.FAILED}
        self.start.disabled = running or status is SweepStatus.STARTING or (done and not failed)
        self.start.description = (
            "Retry failed" if done and failed else "Continue" if begun else "Start"
        )
        self.pause.disabled = self.cancel.disabled = not running
        self.pause.description = "Resume" if paused else "Pause"
        self.pause.icon = "play" if paused else "pause"
        self.pause.tooltip = (
            "Start the next trial" if paused else "Finish the running trial, then pause"
        )
        self.use.disabled = not best


class SweepPanel(VBox):
    """Start a sweep, watch it, pause it, cancel it, and use the best settings.

    The sweep's own thread writes it, so it stays live while a cell keeps the kernel busy; callbacks
    write it too, one at a time. Closing it leaves the sweep running. A sweep has one panel: a
    second one, also of the same sweep made again, replaces it.

    Args:
        sweep: The sweep.
        panel: Where *Use the best* puts the winner's model and settings; without one it only shows
            their lines for `.env`.
        objective: The number by which the best is chosen at first.
        constraints: Bounds that the best must keep; see `Results.best`.
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
        self._broke_off = self._starting = self._insists = False
        self._facts: list[str] = []
        self._results = Results(sweep.config, ())
        self._best: Combination | None = None
        self._rows_changed = True
        self._loads: dict[Trial, LoadProgress] = {}
        self._answers: dict[Trial, RequestAnswered] = {}
        self._view = LiveView(
            lambda: lambda: None, self._draw, self._show_problem, lambda: _CLOCK_EVERY, _DRAW_EVERY
        )
        self._writing = threading.Lock()

        self.status_line = _html("kitty-status")
        self.trials_bar = LoadBar()
        self.trials_bar.bar.max = len(sweep.trials)
        self.now = _html("kitty-now")
        self.load_bar = LoadBar()
        self.buttons = SweepButtons(self._headings, objective)
        self.notice = Notice()
        self.table = SweepTable()
        self.lines = _html("kitty-lines")
        self.lines.layout.display = "none"
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
        progress = self.sweep.progress
        done = f"{progress.done} of {progress.total} trials"
        return still("kitty_nb sweep", [done, *self._facts], self.table.table)

    def close(self) -> None:
        """Remove the widgets. A sweep that runs goes on."""
        with self._writing:
            if self.comm is None:
                return
            self._unsubscribe()
            self._view.stop()
            for widget in [*tree(self)][1:]:
                widget.close()
            super().close()

    def _connect(self) -> None:
        buttons = self.buttons
        buttons.start.on_click(lambda _: self._act(self._start))
        buttons.pause.on_click(lambda _: self._act(self._pause_or_resume))
        buttons.cancel.on_click(lambda _: self._act(self.sweep.cancel))
        buttons.use.on_click(lambda _: self._act(self._use_the_best))
        buttons.objective.observe(lambda _: self._act(self._choose_again), names="value")
        receive_while_busy(tree(self))

    def _replace_earlier(self) -> None:
        earlier = session.succeed(self, self.sweep.store, self.sweep.trials)
        _shown.add(self.sweep)
        if earlier is None:
            return
        earlier.close()
        if earlier.sweep is not self.sweep and earlier.sweep.running:
            self._insists = True
            self._problem = (
                "An earlier run of this cell started the sweep, and it is still running. Press"
                " Start to end that run and continue here; finished trials are kept."
            )

    def _act(self, action: Callable[[], object]) -> None:
        """Do what a click asks, and show what goes wrong."""
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
        if others and not self._insists:
            self._insists = True
            raise ExperimentError(
                "Another sweep is running in this notebook; two at once would distort each other's"
                " numbers. Wait for it, or press Start again to end it; finished trials are kept."
            )
        self._insists = False
        for sweep in (*others, self.sweep):
            sweep.close()  # of our own sweep, the thread of a run that has just ended
        self.sweep.resume()
        self._starting = True
        try:
            progress = self.sweep.progress
            self.sweep.run(retry=progress.done == progress.total)
        except BaseException:
            self._starting = False
            raise

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
            where = "The panel has these settings; press <i>Start</i> there. In <code>.env</code>:"
        doubt = f" is {best.doubt}" if best.doubt else ""
        head = f"<b>{escape(best.trial.label)}</b>{doubt}. {where}"
        self.lines.value = f"{head}<pre>{escape(best.env_lines(profile))}</pre>"
        self.lines.layout.display = None

    def _collect(self, event: SweepEvent) -> None:
        self._starting = False
        match event:
            case TrialProgressed(trial, progress):
                self._loads[trial] = progress
            case RequestAnswered(trial):
                self._answers[trial] = event
            case TrialStarted(trial):
                self._loads.pop(trial, None)
                self._answers.pop(trial, None)
            case SweepEnded(_, problem):
                self._broke_off = bool(problem)
                self._problem = problem or self._problem
        if not isinstance(event, TrialProgressed | RequestAnswered):
            self._rows_changed = True
        if self.sweep.running and not self._view.drawing:
            self._view.start(_run_here)
        self._refresh()

    def _refresh(self) -> None:
        """Draw at once while no loop runs, else soon and on that loop."""
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
        status = status_of(
            progress, running=running, starting=self._starting, broken=self._broke_off
        )
        with self.trials_bar.bar.hold_sync():
            self.trials_bar.bar.value = progress.done
            self.trials_bar.bar.bar_style = "success" if status is SweepStatus.DONE else ""
        self.trials_bar.text.value = _how_far(status, progress)
        paused = status is SweepStatus.PAUSED
        self.now.value = (
            "Paused. Press Resume to start the next trial."
            if paused
            else _under_way(progress.running, self._answers)
        )
        self.now.layout.display = None if self.now.value else "none"
        self._show_load(progress.running)
        failed = any(row.outcome is not Outcome.DONE for row in self._results.rows)
        self.buttons.show(status, failed=failed, best=self._best is not None)
        self.notice.show(self._problem or self.sweep.store_problem)
        # Last, so that whoever sees the status may rely on the rest being as it says.
        facts = "".join(f"<span class='kitty-fact'>{escape(fact)}</span>" for fact in self._facts)
        badge = f"<span class='kitty-badge kitty-{_TONES.get(status, 'idle')}'>{status}</span>"
        self.status_line.value = f"{badge}<span class='kitty-heading'>Sweep</span>{facts}"

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
        loads = [self._loads[trial] for trial in running if trial in self._loads]
        unfinished = [load for load in loads if load.stage is not Stage.READY]
        load = next(iter(unfinished or loads), None)
        ready = load is not None and load.stage is Stage.READY
        self.load_bar.show(ServerStatus.READY if ready else ServerStatus.LOADING, load)
        self.load_bar.layout.display = None if running else "none"


_shown: WeakSet[Sweep] = WeakSet()


def _run_here(function: Callable[[], Coroutine[Any, Any, None]]) -> Future[None]:
    return asyncio.run_coroutine_threadsafe(function(), asyncio.get_running_loop())


def bundle(sweep: Sweep) -> dict[str, Any]:
    """Return what a notebook shows of a sweep: its panel, made if none is open."""
    panel = session.newest(SweepPanel, sweep.store, sweep.trials)
    if panel is None or panel.sweep is not sweep or panel.comm is None:
        panel = SweepPanel(sweep)
    still_picture = {"text/html": panel._repr_html_(), "text/plain": repr(sweep)}
    return {**panel._repr_mimebundle_(), **still_picture}


def status_of(
    progress: SweepProgress, *, running: bool, starting: bool = False, broken: bool = False
) -> SweepStatus:
    """Name where a sweep is.

    Args:
        progress: How far it is.
        running: Whether it runs.
        starting: Whether a run was requested and has not reported yet.
        broken: Whether its last run broke off.
    """
    if running:
        if progress.paused:
            return SweepStatus.PAUSING if progress.running else SweepStatus.PAUSED
        return SweepStatus.RUNNING
    if starting:
        return SweepStatus.STARTING
    if progress.done == progress.total:
        return SweepStatus.DONE
    if broken:
        return SweepStatus.FAILED
    return SweepStatus.INTERRUPTED if progress.done else SweepStatus.NOT_STARTED


def _html(css_class: str) -> HTML:
    html = HTML("")
    html.add_class(css_class)
    return html


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


def _how_far(status: SweepStatus, progress: SweepProgress) -> str:
    done = f"{progress.done} of {progress.total} trials"
    if status in {SweepStatus.DONE, SweepStatus.NOT_STARTED}:
        return done
    if progress.eta is not None:
        return f"{done} · about {duration(max(progress.eta, 1))} left"
    return f"{done} · time left unknown" if status is SweepStatus.RUNNING else done


def _under_way(running: Collection[Trial], answers: Mapping[Trial, RequestAnswered]) -> str:
    named = [_now(trial, answers.get(trial)) for trial in running][:_NAMED_AT_ONCE]
    more = len(running) - len(named)
    return "<br>".join([*named, *([f"and {more} more"] if more else [])])


def _now(trial: Trial, answer: RequestAnswered | None) -> str:
    settings = (f"{name} <b>{escape(word(value))}</b>" for name, value in trial.settings)
    parts = [f"<b>{escape(model_name(trial))}</b>", *settings, f"repeat {trial.repeat}"]
    if answer:
        parts.append(f"request {answer.done} of {answer.total}")
        if answer.parallel > 1:
            parts.append(f"{answer.parallel} at once")
        if answer.tokens_per_second:
            parts.append(f"{answer.tokens_per_second:,.0f} tokens/s")
    return " · ".join(parts)
