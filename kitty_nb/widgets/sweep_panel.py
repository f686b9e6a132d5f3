"""`SweepPanel`: a sweep as a live widget, from Start to the settings that won."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

from ipywidgets import HTML, VBox

from kitty_nb.errors import ExperimentError, KittyError
from kitty_nb.experiments import Outcome, Results, Sweep
from kitty_nb.experiments.events import (
    RequestAnswered,
    SweepEnded,
    SweepEvent,
    TrialEnded,
    TrialProgressed,
    TrialStarted,
)
from kitty_nb.experiments.results import OBJECTIVE
from kitty_nb.experiments.settings import FIELDS
from kitty_nb.supervisor.events import ServerStatus, Stage
from kitty_nb.widgets.accessible import Accessible
from kitty_nb.widgets.load_bar import LoadBar
from kitty_nb.widgets.notice import Notice
from kitty_nb.widgets.still import still
from kitty_nb.widgets.subshells import receive_while_busy
from kitty_nb.widgets.sweep_buttons import SweepButtons
from kitty_nb.widgets.sweep_status import NowLine, SweepStatusLine, TrialsBar, status_of
from kitty_nb.widgets.sweep_table import SweepTable, columns, model_name, rows_of
from kitty_nb.widgets.tree import tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from kitty_nb.experiments import Combination, Trial
    from kitty_nb.supervisor.events import LoadProgress
    from kitty_nb.widgets.control_panel import ControlPanel

# Seconds. A refresh sends about eight messages at most, so a control panel beside this one still
# has its share of what jupyter_server lets through, and the trials are left in peace.
_REFRESH_EVERY = 0.5
_CLOCK_EVERY = 1.0
_ANOTHER = (
    "Another sweep is running in this notebook, and two at once would spoil each other's numbers."
    " Wait for it, or"
)
_EARLIER = (
    "This sweep, as an earlier run of the cell made it, is still running. Start ends it and goes on"
    " here;"
)
_KEPT = "what it has measured is kept."


class SweepPanel(VBox):
    """Start a sweep, watch it, pause it, call it off, and use what is best.

    It is written by the sweep's own thread, so that it stays live while a cell keeps the kernel
    busy, and by callbacks, one at a time. Closing it leaves the sweep as it is. A sweep has one
    panel: another one, also of the same sweep made again, takes its place.

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
        self._broke_off = False
        self._starting = False
        self._insists = False
        self._facts: tuple[str, ...] = ()
        self._results = Results(sweep.config, ())
        self._best: Combination | None = None
        self._rows_changed = True
        self._loads: dict[Trial, LoadProgress] = {}
        self._answers: dict[Trial, RequestAnswered] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._refreshed = 0.0
        self._writing = threading.Lock()

        self.status_line = SweepStatusLine()
        self.trials_bar = TrialsBar(len(sweep.trials))
        self.now = NowLine()
        self.load_bar = LoadBar()
        self.buttons = SweepButtons(self._headings, objective)
        self.notice = Notice()
        self.table = SweepTable()
        self.lines = HTML()
        self.lines.add_class("kitty-lines")
        self.lines.layout.display = "none"
        super().__init__(
            [
                self.status_line,
                self.trials_bar,
                self.now,
                self.load_bar,
                self.buttons,
                self.notice,
                self.table,
                self.lines,
                Accessible("kitty_nb sweep"),
            ]
        )
        self.add_class("kitty-panel")
        self.add_class("kitty-sweep")
        self.buttons.start.on_click(lambda _: self._act(self._start))
        self.buttons.pause.on_click(lambda _: self._act(self._pause_or_resume))
        self.buttons.cancel.on_click(lambda _: self._act(self.sweep.cancel))
        self.buttons.use.on_click(lambda _: self._act(self._use_the_best))
        self.buttons.objective.observe(lambda _: self._act(self._choose_anew), names="value")
        receive_while_busy(tree(self))

        self._replace_earlier()
        self._unsubscribe = sweep.subscribe(self._collect)
        self._refresh()

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
            for widget in [*tree(self)][1:]:
                widget.close()
            super().close()

    def _replace_earlier(self) -> None:
        key = self.sweep.store, self.sweep.trials
        earlier = _panels.get(key)
        _panels[key] = self
        _shown.add(self.sweep)
        if earlier is None:
            return
        earlier.close()
        if earlier.sweep is not self.sweep and earlier.sweep.running:
            self._insists = True
            self._problem = f"{_EARLIER} {_KEPT}"

    def _act(self, action: Callable[[], object]) -> None:
        """Do what a click asks; whatever goes wrong is shown."""
        self._problem = ""
        try:
            action()
        except KittyError as error:
            self._problem = str(error)
        except Exception as error:  # noqa: BLE001 (raised here, nobody would see it)
            self._problem = f"Something went wrong inside kitty_nb: {error!r}. Please report it."
        self._refresh()

    def _start(self) -> None:
        if self.sweep.running:
            return
        others = [sweep for sweep in _shown if sweep is not self.sweep and sweep.running]
        if others and not self._insists:
            self._insists = True
            raise ExperimentError(f"{_ANOTHER} press Start again to end it; {_KEPT}")
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

    def _choose_anew(self) -> None:
        self._rows_changed = True

    def _use_the_best(self) -> None:
        best = self._results.best(self.buttons.objective.value, self._constraints)
        config, profile, where = best.config, None, "In <code>.env</code>:"
        if self.panel:
            self.panel.use(model=config.model, **{name: getattr(config, name) for name in FIELDS})
            profile = self.panel.manager.state.config.profile
            where = "The control panel has it now; press <i>Start</i> there. In <code>.env</code>:"
        doubt = f" is {best.doubt}" if best.doubt else ""
        head = f"<b>{escape(best.trial.label)}</b>{doubt}. {where}"
        self.lines.value = f"{head}<pre>{escape(best.env_lines(profile))}</pre>"
        self.lines.layout.display = None

    def _collect(self, event: SweepEvent) -> None:
        self._starting = False
        match event:
            case TrialStarted(trial):
                self._rows_changed = True
            case TrialProgressed(trial, progress):
                self._loads[trial] = progress
            case RequestAnswered(trial):
                self._answers[trial] = event
            case TrialEnded(result):
                self._rows_changed = True
                self._loads.pop(result.trial, None)
                self._answers.pop(result.trial, None)
            case SweepEnded(_, problem):
                self._broke_off, self._rows_changed = bool(problem), True
                self._problem = problem or self._problem
                self._loads.clear()
                self._answers.clear()
        if self.sweep.running:
            loop = asyncio.get_running_loop()
            self._refresh_in(max(0.0, self._refreshed + _REFRESH_EVERY - loop.time()))
        else:
            self._stop_clock()
            self._refresh()

    def _refresh_in(self, seconds: float) -> None:
        """On the sweep's own loop; an earlier refresh that is due already stands."""
        loop = asyncio.get_running_loop()
        if self._timer and self._timer.when() <= loop.time() + seconds:
            return
        self._stop_clock()
        self._timer = loop.call_later(seconds, self._tick)

    def _stop_clock(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = None
        self._refreshed = asyncio.get_running_loop().time()
        self._refresh()
        if self.sweep.running and self.comm is not None:
            self._refresh_in(_CLOCK_EVERY)

    def _refresh(self) -> None:
        with self._writing:
            if self.comm is not None:
                self._write()

    def _write(self) -> None:
        if self._rows_changed:
            self._rows_changed = False
            self._read_rows()
        progress, running = self.sweep.progress, self.sweep.running
        status = status_of(
            progress, running=running, starting=self._starting, broken=self._broke_off
        )
        self.trials_bar.show(status, progress)
        self.now.show(status, progress.running, self._answers)
        self._show_load(progress.running)
        failed = any(row.outcome is not Outcome.DONE for row in self._results.rows)
        self.buttons.show(status, failed=failed, best=self._best is not None)
        self.notice.show(self._problem or self.sweep.store_problem)
        # Last, so that whoever sees the status may rely on the rest being as it says.
        self.status_line.show(status, self._facts)

    def _read_rows(self) -> None:
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
        trials, running = self.sweep.trials, self.sweep.progress.running
        rows = rows_of(trials, self._results, running, self._best)
        self.table.show(rows, self._headings)
        outcomes = Counter(row.outcome for row in self._results.rows)
        models = {model_name(row.trial) for row in rows}
        self._facts = (
            f"{len(models)} models" if len(models) > 1 else models.pop(),
            f"{len(rows)} combination{'s' if len(rows) > 1 else ''}",
            *([f"{len(trials) // len(rows)} times each"] if len(trials) > len(rows) else []),
            *(
                f"{count} {outcome}"
                for outcome in (Outcome.FAILED, Outcome.SKIPPED)
                if (count := outcomes[outcome])
            ),
        )

    def _show_load(self, running: tuple[Trial, ...]) -> None:
        loads = [self._loads[trial] for trial in running if trial in self._loads]
        unfinished = [load for load in loads if load.stage is not Stage.READY]
        load = next(iter(unfinished or loads), None)
        ready = load is not None and load.stage is Stage.READY
        self.load_bar.show(ServerStatus.READY if ready else ServerStatus.LOADING, load)
        self.load_bar.layout.display = None if running else "none"


_Key = tuple["Path", tuple["Trial", ...]]
_panels: WeakValueDictionary[_Key, SweepPanel] = WeakValueDictionary()
_shown: WeakSet[Sweep] = WeakSet()


def panel_of(sweep: Sweep) -> SweepPanel:
    """Return the panel of a sweep, made if it has none that is open."""
    panel = _panels.get((sweep.store, sweep.trials))
    if panel is None or panel.sweep is not sweep or panel.comm is None:
        return SweepPanel(sweep)
    return panel
