from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from IPython.core.formatters import DisplayFormatter

from kitty_nb import ControlPanel, ServerConfig, show_sweeps
from kitty_nb.experiments import (
    ExactMatch,
    Measurement,
    Outcome,
    Perplexity,
    Results,
    Sweep,
    Trial,
    TrialResult,
    Workload,
)
from kitty_nb.experiments.sweep import SweepProgress
from kitty_nb.experiments.trial import (
    LoadSeconds,
    RequestAnswered,
    Speed,
    SweepEvent,
    TrialEnded,
    TrialStarted,
)
from kitty_nb.isolated_server import in_background
from kitty_nb.widgets import SweepPanel
from kitty_nb.widgets.display import LiveView
from kitty_nb.widgets.sweep_panel import (
    SweepStatus,
    bundle,
    columns,
    draw_table,
    figure,
    status_of,
)

WAIT = 120.0
GRID = {"threads": [1, 2], "cache_type_k": ["f16", "q8_0"]}


@pytest.fixture
def made(config: ServerConfig, tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    """Makes sweeps that share a store, and ends them."""
    sweeps: list[Sweep] = []

    def make(**more: object) -> Sweep:
        given = {"config": config.replace(context_size=1024)}
        given |= {"prompts": "Hi!", "max_tokens": 2, "repeats": 1, "busy_repeats": 0}
        store = tmp_path / "sweep.journal"
        sweeps.append(Sweep(**({"store": store} | given | more)))  # type: ignore[arg-type]
        return sweeps[-1]

    yield make
    for sweep in sweeps:
        sweep.close()


@pytest.fixture
def panel_for() -> Iterator[Callable[..., SweepPanel]]:
    panels: list[SweepPanel] = []

    def make(*args: object, **more: object) -> SweepPanel:
        panels.append(SweepPanel(*args, **more))  # type: ignore[arg-type]
        return panels[-1]

    yield make
    for panel in panels:
        panel.close()


def test_a_panel_that_was_never_made_is_closed_without_a_word() -> None:
    SweepPanel.__new__(SweepPanel).close()


def reach(panel: SweepPanel, status: str) -> None:
    wanted = f">{status}<"
    eventually(lambda: wanted in panel.status_line.value, within=WAIT, why=f"never {status}")


def enabled(panel: SweepPanel) -> set[str]:
    now = panel.buttons
    buttons = (now.start, now.pause, now.cancel, now.use)
    return {button.description for button in buttons if not button.disabled}


def hold_after_first(sweep: Sweep) -> list[SweepEvent]:
    """Pause a sweep as soon as it has an answer; returns what it tells."""
    events: list[SweepEvent] = []

    def listen(event: SweepEvent) -> None:
        events.append(event)
        if isinstance(event, RequestAnswered) and not sweep.progress.done:
            sweep.pause()

    sweep.subscribe(listen)
    return events


def test_from_start_to_the_lines_of_the_best(
    made: Callable[..., Sweep], panel_for: Callable[..., SweepPanel]
) -> None:
    sweep = made(grid=GRID, repeats=2)
    panel = panel_for(sweep)
    assert "Not started" in panel.status_line.value
    assert panel.trials_bar.text.value == "0 of 8 trials"
    assert panel.table.table.count("waiting") == 4
    assert enabled(panel) == {"Start"}
    panel.buttons.start.click()
    reach(panel, "Running")
    assert enabled(panel) == {"Pause", "Cancel"}
    eventually(lambda: "<b>demo.gguf</b> · threads <b>" in panel.now.value, within=WAIT)
    eventually(lambda: "★" in panel.table.table, within=WAIT, why="no best is marked")
    reach(panel, "Done")
    assert panel.trials_bar.text.value == "8 of 8 trials"
    assert panel.trials_bar.bar.value == panel.trials_bar.bar.max == 8
    assert panel.load_bar.layout.display == panel.now.layout.display == "none"
    best = sweep.results.best()
    (marked,) = [row for row in panel.table.table.split("<tr") if "★" in row]
    for _, value in best.trial.settings:
        assert f"<td>{value}</td>" in marked
    for name in ("load_seconds", "memory_gib", "generation_tokens_per_second"):
        assert f">{figure(name, best.metrics[name].median)}<" in marked
    assert enabled(panel) == {"Use the best"}
    notebook = DisplayFormatter()
    show_sweeps(notebook.mimebundle_formatter)
    for shown in (panel, sweep):
        still = notebook.format(shown)[0]["text/html"]
        assert "8 of 8 trials" in still
        assert panel.table.table in still
    panel.buttons.use.click()
    assert f"LLAMACPP_PRIMARY_THREADS={best.value('threads')}" in panel.lines.value
    assert f"--cache-type-k {best.value('cache_type_k')}" in panel.lines.value
    assert panel.notice.layout.display == "none"
    panel.buttons.objective.value = "load_seconds"
    quickest = sweep.results.best("load_seconds").trial

    def is_marked() -> bool:
        (marked,) = [row for row in panel.table.table.split("<tr") if "★" in row]
        return all(f"<td>{value}</td>" in marked for _, value in quickest.settings)

    eventually(is_marked, within=10)  # the run's loop may still draw, and draws soon


def test_the_load_under_way_is_shown(
    made: Callable[..., Sweep],
    panel_for: Callable[..., SweepPanel],
    misbehaving: Callable[..., ServerConfig],
) -> None:
    panel = panel_for(made(config=misbehaving("--load-seconds", "5")))
    loads = set()

    def loading() -> bool:
        loads.add(panel.load_bar.bar.value)
        return len(loads) > 3

    panel.buttons.start.click()
    eventually(loading, within=WAIT, why="the load bar stands still")
    assert panel.load_bar.layout.display is None
    panel.buttons.cancel.click()
    reach(panel, "Not started")
    assert panel.load_bar.layout.display == "none"


def test_pause_resume_cancel_and_go_on(
    made: Callable[..., Sweep], panel_for: Callable[..., SweepPanel]
) -> None:
    sweep = made(grid=GRID, repeats=2)
    panel = panel_for(sweep)
    events = hold_after_first(sweep)
    panel.buttons.start.click()
    reach(panel, "Paused")
    assert panel.trials_bar.bar.value == 1
    assert "left" in panel.trials_bar.text.value
    assert enabled(panel) == {"Resume", "Cancel", "Use the best"}
    panel.buttons.pause.click()
    eventually(lambda: panel.trials_bar.bar.value >= 2, within=WAIT)
    eventually(lambda: panel.buttons.pause.description == "Pause")
    panel.buttons.cancel.click()
    reach(panel, "Interrupted")
    assert 2 <= panel.trials_bar.bar.value < 8
    assert enabled(panel) == {"Continue", "Use the best"}
    before = sum(isinstance(event, TrialEnded) for event in events)
    panel.buttons.start.click()
    reach(panel, "Done")
    ended = [event.result.trial for event in events if isinstance(event, TrialEnded)]
    assert len(ended) == len(set(ended)) == 8 > before


def test_a_cancelled_pause_does_not_hold_the_next_run(
    made: Callable[..., Sweep], panel_for: Callable[..., SweepPanel]
) -> None:
    sweep = made(repeats=2)
    panel = panel_for(sweep)
    hold_after_first(sweep)
    panel.buttons.start.click()
    reach(panel, "Paused")
    panel.buttons.cancel.click()
    reach(panel, "Interrupted")
    panel.buttons.start.click()
    reach(panel, "Done")


def test_the_panel_is_drawn_in_a_second_run_too() -> None:
    drawn: list[int] = []
    errors: list[str] = []
    view = LiveView(lambda: drawn.append(1), errors.append, lambda: 0.01, 0)

    def start(draw: Callable[[], Coroutine[Any, Any, None]]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(draw(), asyncio.get_running_loop())

    async def run() -> None:
        view.start(start)
        before = len(drawn)
        while len(drawn) < before + 3 and not errors:  # it has waited in between
            await asyncio.sleep(0.01)

    for _ in range(2):
        thread, ended = in_background(run, "run")
        ended.result(WAIT)
        thread.join(WAIT)
    assert not errors


def test_what_fails_says_why_and_can_be_tried_again(
    made: Callable[..., Sweep],
    panel_for: Callable[..., SweepPanel],
    demo_model: Path,
    tmp_path: Path,
) -> None:
    broken = tmp_path / "<i>broken&.gguf"
    broken.write_bytes(demo_model.read_bytes()[:200_000])
    os.utime(broken, (0, 0))  # it is not being downloaded now
    sweep = made(models=[demo_model, broken])
    panel = panel_for(sweep)
    panel.buttons.start.click()
    reach(panel, "Done")
    assert sweep.results.best().trial.model == demo_model.name
    assert "1 failed" in panel.status_line.value
    assert "<td>&lt;i&gt;broken&amp;.gguf</td>" in panel.table.table
    assert "<i>" not in panel.table.table
    assert "download it again" in panel.table.table
    assert enabled(panel) == {"Retry failed", "Use the best"}
    shutil.copy(demo_model, broken)
    panel.buttons.start.click()
    eventually(lambda: "failed" not in panel.status_line.value, within=WAIT)
    reach(panel, "Done")
    assert [row.outcome for row in sweep.results.rows] == [Outcome.DONE] * 2


def test_a_sweep_that_breaks_off_says_why(
    made: Callable[..., Sweep], panel_for: Callable[..., SweepPanel]
) -> None:
    panel = panel_for(made(grid={"cache_typ_k": ["f16"]}))
    panel.buttons.start.click()
    reach(panel, "Failed")
    assert "Did you mean cache_type_k?" in panel.notice.value
    assert enabled(panel) == {"Continue"}


def test_a_store_that_cannot_be_read_is_told(
    made: Callable[..., Sweep], panel_for: Callable[..., SweepPanel], tmp_path: Path
) -> None:
    store = tmp_path / "no.journal"
    store.write_text("this is no database, " * 100)
    panel = panel_for(made(store=store))
    assert "use the results file" in panel.notice.value
    panel.buttons.start.click()
    reach(panel, "Failed")
    assert "Free some disk space" in panel.notice.value


def test_a_run_from_code_is_shown_too(
    made: Callable[..., Sweep], panel_for: Callable[..., SweepPanel]
) -> None:
    sweep = made()
    panel = panel_for(sweep)
    sweep.run().wait(WAIT)
    reach(panel, "Done")
    again = panel_for(made())
    assert "Done" in again.status_line.value
    assert "★" in again.table.table


def test_the_best_goes_into_the_control_panel(
    made: Callable[..., Sweep],
    panel_for: Callable[..., SweepPanel],
    config: ServerConfig,
    demo_model: Path,
    tmp_path: Path,
) -> None:
    env = tmp_path / ".env"
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(demo_model, models)
    other = Path(shutil.copy(demo_model, models / "other.gguf"))
    env.write_text(
        f"LLAMACPP_MODELS_DIR={models}\nLLAMACPP_LOG_DIR={tmp_path / 'logs'}\n"
        f"LLAMACPP_HISTORY={config.history}\nLLAMACPP_PORT={config.port}\n"
        f"LLAMACPP_PRIMARY_MODEL={demo_model.name}\n"
    )
    control = ControlPanel(env)
    try:
        sweep = made(
            models=[other],
            configs=[{"threads": 2, "flash_attention": "on", "cache_type_k": "q8_0"}],
        )
        panel = panel_for(sweep, control)
        panel.buttons.start.click()
        reach(panel, "Done")
        panel.buttons.use.click()
        assert panel.notice.value == ""
        assert control.picker.model is not None
        assert control.picker.model.name == "other.gguf"
        chosen = {name: str(field.value) for name, field in control.settings.fields.items()}
        assert chosen["threads"] == "2"
        assert chosen["context_size"] == "1024"
        assert chosen["batch_size"] == ""
        assert chosen["flash_attention"] == "on"
        control.buttons.start.click()
        eventually(lambda: "Ready" in control.status_line.value, within=60)
        served = control.manager.state.config
        assert served.extra_args == ("--cache-type-k", "q8_0")
        assert (served.threads, served.port, served.profile) == (2, config.port, "primary")
        control.settings.save.click()
        saved = ServerConfig.from_env(env)
        assert (saved.model, saved.context_size) == (other, 1024)
        assert saved.extra_args == ("--cache-type-k", "q8_0")
    finally:
        control.close()


def test_two_sweeps_at_once_are_asked_about(
    made: Callable[..., Sweep], panel_for: Callable[..., SweepPanel]
) -> None:
    first, second = made(repeats=4), made(grid={"threads": [1]})
    one, other = panel_for(first), panel_for(second)
    one.buttons.start.click()
    eventually(lambda: first.progress.done, within=WAIT)
    other.buttons.start.click()
    assert "Another sweep in this notebook is still running" in other.notice.value
    assert first.running
    assert not second.running
    other.buttons.start.click()
    assert not first.running
    reach(one, "Interrupted")
    reach(other, "Done")


def test_a_sweep_has_one_panel(
    made: Callable[..., Sweep],
    panel_for: Callable[..., SweepPanel],
    sent: list[tuple[str, dict[str, object]]],
) -> None:
    view = "application/vnd.jupyter.widget-view+json"
    sweep = made(repeats=4)
    shown = bundle(sweep)
    assert shown["text/plain"] == "Sweep(4 trials)"
    assert bundle(sweep)[view] == shown[view]
    panel = panel_for(sweep)
    assert bundle(sweep)[view]["model_id"] == panel.model_id
    closed = [message for message, _ in sent if message == "comm_close"]
    assert len(closed) == sum(message == "comm_open" for message, _ in sent) / 2
    panel.buttons.start.click()
    reach(panel, "Running")
    again = panel_for(made(repeats=4))  # the cell is run once more
    assert panel.comm is None
    assert "earlier run of this cell" in again.notice.value
    sweep.cancel()
    eventually(lambda: again.notice.layout.display == "none", why="it warns of a sweep that ended")
    again.buttons.start.click()
    reach(again, "Done")
    again.close()
    again.close()
    opened = sum(message == "comm_open" for message, _ in sent)
    assert sum(message == "comm_close" for message, _ in sent) == opened


def test_a_running_sweep_sends_few_messages(
    made: Callable[..., Sweep],
    panel_for: Callable[..., SweepPanel],
    sent: list[tuple[str, dict[str, object]]],
) -> None:
    sweep = made(repeats=2, prompts=["Hi!"] * 100)
    panel = panel_for(sweep)
    events: list[SweepEvent] = []
    sweep.subscribe(events.append)
    panel.buttons.start.click()
    eventually(lambda: any(isinstance(e, TrialStarted) for e in events), within=WAIT)
    sent.clear()
    began = time.monotonic()
    reach(panel, "Done")
    seconds = time.monotonic() - began
    assert len(events) > 2 * 100
    assert len(sent) <= 20 * seconds
    panel.close()


def test_constraints_that_none_keeps_are_told(
    made: Callable[..., Sweep], panel_for: Callable[..., SweepPanel]
) -> None:
    panel = panel_for(made(), constraints={"memory_gib": 0.001})
    panel.buttons.start.click()
    reach(panel, "Done")
    assert "satisfies memory_gib &lt;= 0.001." in panel.notice.value
    assert panel.buttons.use.disabled


@pytest.mark.parametrize(
    ("progress", "more", "status"),
    [
        (SweepProgress(0, 4), {}, SweepStatus.NOT_STARTED),
        (SweepProgress(1, 4), {"running": True}, SweepStatus.RUNNING),
        (SweepProgress(1, 4, paused=True), {"running": True}, SweepStatus.PAUSED),
        (SweepProgress(1, 4, (Trial("m"),), paused=True), {"running": True}, SweepStatus.PAUSING),
        (SweepProgress(1, 4), {}, SweepStatus.INTERRUPTED),
        (SweepProgress(1, 4), {"broken": True}, SweepStatus.FAILED),
        (SweepProgress(4, 4, paused=True), {}, SweepStatus.DONE),
    ],
)
def test_where_a_sweep_is(
    progress: SweepProgress, more: dict[str, bool], status: SweepStatus
) -> None:
    assert status_of(progress, **({"running": False} | more)) is status


def done(trial: Trial, rate: float, **more: object) -> TrialResult:
    speed = Speed(1, 1, 1.0, 0.0123, 1234.5, rate, rate)
    measured = Measurement(LoadSeconds(0.1, 12.0, 0.2), (speed,), 3 << 29, **more)  # type: ignore[arg-type]
    return TrialResult(trial, Outcome.DONE, measurement=measured)


def test_a_row_for_each_combination_in_the_order_of_its_values(config: ServerConfig) -> None:
    trials = [
        Trial("m.gguf", (("threads", threads), ("mlock", True)), repeat)
        for repeat in (1, 2, 3)
        for threads in (16, 4, 8, 2)
    ]
    results = Results(
        config,
        (
            done(trials[0], 10.0),
            done(trials[4], 30.0, quality=0.5),
            done(trials[8], 11.0),
            done(trials[1], 20.0),
            TrialResult(trials[5], Outcome.FAILED, "It died\nof <thirst>."),
            TrialResult(trials[2], Outcome.SKIPPED, "It will not fit."),
        ),
    )
    headings = columns(Workload(("a",), quality=ExactMatch({"a": "b"})))
    table = draw_table(trials, results, headings, [trials[9]], results.best())
    rows = [row for row in table.split("<tr") if "kitty-state" in row]
    assert [row.split("<td>")[1].split("<")[0] for row in rows] == ["2", "4", "8", "16"]
    states = ["waiting", "running 3 of 3", "skipped", "done"]
    assert all(f">{state}<" in row for state, row in zip(states, rows, strict=True))
    assert ["kitty-best" in row for row in rows] == [False, True, False, False]
    assert "<th>mlock</th>" in table
    assert "<td>on</td>" in table
    assert "11.0<small>10.0&ndash;30.0</small>" in table
    assert "12 s" in table
    assert "12 ms" in table
    assert "1.6 GB" in table
    assert "1,234" in table
    assert "It died<br>of &lt;thirst&gt;." in table
    assert "colspan='6'>It will not fit.</td>" in table
    told = [line for line in table.split("<tr") if "best" in line]
    assert ["★ too close to tell" in line for line in told] == [True, False]  # 18 to 22, 10 to 30
    assert "title='Too close to tell from 1 other, measured once, so 10 % either way" in told[0]
    assert "≈ best" in told[1]
    clear = replace(results.best(), close=())
    assert "★ best" in draw_table(trials, results, columns(Workload()), best=clear)


def test_the_columns_are_those_that_the_requests_give() -> None:
    assert list(columns(Workload(parallel=(4, 1)))) == [
        "load_seconds",
        "time_to_first_token",
        "prompt_tokens_per_second",
        "generation_tokens_per_second",
        "total_tokens_per_second_4",
        "memory_gib_1",
        "memory_gib",
    ]
    assert columns(Workload(("a",), quality=ExactMatch({"a": "b"})))["quality"] == "Quality"
    assert columns(Workload(("a",), quality=Perplexity({"a": "b"})))["perplexity"] == "Perplexity"
