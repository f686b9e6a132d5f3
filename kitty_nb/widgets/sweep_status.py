"""How far a sweep is, and what is being tried."""

from __future__ import annotations

from enum import StrEnum
from html import escape
from typing import TYPE_CHECKING

from ipywidgets import HTML, HBox, IntProgress

from kitty_nb.widgets.load_bar import duration
from kitty_nb.widgets.sweep_table import model_name, word

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kitty_nb.experiments import SweepProgress, Trial
    from kitty_nb.experiments.events import RequestAnswered

_NAMED_AT_ONCE = 4  # trials of so many workers are told in words


class SweepStatus(StrEnum):
    """Where a sweep is, as the panel says it."""

    NOT_STARTED = "NOT STARTED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    INTERRUPTED = "INTERRUPTED"
    FAILED = "FAILED"
    DONE = "DONE"


_TONES = {
    SweepStatus.STARTING: "busy",
    SweepStatus.RUNNING: "busy",
    SweepStatus.PAUSING: "busy",
    SweepStatus.PAUSED: "warn",
    SweepStatus.FAILED: "bad",
    SweepStatus.DONE: "good",
}


def status_of(
    progress: SweepProgress, *, running: bool, starting: bool = False, broken: bool = False
) -> SweepStatus:
    """Name where a sweep is.

    Args:
        progress: How far it is.
        running: Whether it is being run.
        starting: Whether it has been told to run, and nothing was heard of that yet.
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


class SweepStatusLine(HTML):
    """The state of the sweep and its size, in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-status")

    def show(self, status: SweepStatus, facts: Sequence[str]) -> None:
        """Show a state, and facts in words."""
        tone = _TONES.get(status, "idle")
        told = "".join(f"<span class='kitty-fact'>{escape(fact)}</span>" for fact in facts)
        badge = f"<span class='kitty-badge kitty-{tone}'>{status}</span>"
        self.value = f"{badge}<span class='kitty-heading'>Sweep</span>{told}"


class TrialsBar(HBox):
    """A bar over all trials, and beside it how many have ended and the time left."""

    def __init__(self, total: int) -> None:
        self.bar = IntProgress(min=0, max=total, value=0)
        self.text = HTML("")
        self.bar.add_class("kitty-bar")
        self.text.add_class("kitty-bar-text")
        super().__init__([self.bar, self.text])
        self.add_class("kitty-load")

    def show(self, status: SweepStatus, progress: SweepProgress) -> None:
        """Show how many trials have their row."""
        with self.bar.hold_sync():
            self.bar.value = progress.done
            self.bar.bar_style = "success" if status is SweepStatus.DONE else ""
        self.text.value = " · ".join(_told(status, progress))


class NowLine(HTML):
    """What is being tried."""

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-now")

    def show(
        self,
        status: SweepStatus,
        running: Sequence[Trial],
        answers: Mapping[Trial, RequestAnswered],
    ) -> None:
        """Show the trials under way, with the answers that they have so far."""
        if status is SweepStatus.PAUSED:
            self.value = "No trial runs. Resume begins the next one."
        else:
            # A trial whose server is being tidied away may overlap with the next.
            busy = [trial for trial in running if not _answered(answers.get(trial))] or running
            named = [_now(trial, answers.get(trial)) for trial in busy[:_NAMED_AT_ONCE]]
            more = len(busy) - len(named)
            self.value = "<br>".join([*named, *([f"and {more} more"] if more else [])])
        self.layout.display = None if self.value else "none"


def _told(status: SweepStatus, progress: SweepProgress) -> list[str]:
    told = [f"{progress.done} of {progress.total} trials"]
    if status in {SweepStatus.DONE, SweepStatus.NOT_STARTED}:
        return told
    if progress.eta is not None:
        told.append(f"about {duration(max(progress.eta, 1))} left")
    elif status is SweepStatus.RUNNING:
        told.append("time left not known yet")
    return told


def _answered(answer: RequestAnswered | None) -> bool:
    return answer is not None and answer.done == answer.total


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
