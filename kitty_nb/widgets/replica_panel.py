"""ReplicaPanel: the replicas of a `Fleet` in one table."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import traitlets

from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.widgets import session
from kitty_nb.widgets.display import LiveView, Page, asset, receive_while_busy, still, table
from kitty_nb.widgets.fleet_panel import UNKNOWN, FleetRow, describe_memory, describe_pace
from kitty_nb.widgets.server_view import TONES, describe_load, describe_uptime, word

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kitty_nb.fleet.fleet import Fleet
    from kitty_nb.fleet.placement import Replica

_CLOCK = 1.0  # seconds


def replica_rows(replicas: tuple[Replica, ...], alias: str) -> list[FleetRow]:
    """Describe the replicas of a fleet."""
    return [_row(replica, alias) for replica in replicas]


def _row(replica: Replica, alias: str) -> FleetRow:
    report, status = replica.report, replica.status
    load = report.progress if report else None
    facts = [describe_load(load)] if load else []
    if replica.uptime is not None:
        facts.append(f"up {describe_uptime(replica.uptime)}")
    if report and report.restarts:
        facts.append(f"restarted {report.restarts} times")
    if replica.worker and not status.idle:
        facts.append(f"on {urlsplit(replica.worker).hostname}")
    url = urlsplit(replica.url or "")
    ready = status is ServerStatus.READY
    pace = report.tokens_per_second if report and ready else None
    return FleetRow(
        profile=f"replica {replica.number}",
        status=word(status),
        tone=TONES[status],
        detail=" · ".join(facts),
        fraction=load.fraction if load else None,
        model=report.alias if report else alias,
        port=url.port if replica.url and not status.idle else None,
        memory=describe_memory(report.memory, ()) if report and report.pid else UNKNOWN,
        pace=describe_pace(pace),
        problem=replica.problem or "",
        start=status.idle,
        stop=not status.idle,
        routed=False,
    )


class ReplicaPanel(Page):
    """Watch the replicas of a fleet, and stop or start each.

    A notebook shows one for a `Fleet` that is the value of a cell.

    Args:
        fleet: The fleet. Closing the panel leaves it alone.

    Attributes:
        rows: A `FleetRow` for each replica.
        notice: What keeps replicas from being placed.
    """

    _esm: ClassVar[str] = asset("page.js", "fleet_panel.js")
    _css: ClassVar[str] = asset("panel.css", "fleet.css")
    rows: Any = traitlets.List().tag(sync=True)
    notice: Any = traitlets.Unicode("").tag(sync=True)

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._failure: str | None = None
        super().__init__("kitty-panel", rows=self._look())
        self._view = LiveView(
            self._draw,
            self._show_error,
            lambda: _CLOCK,
            subscribe=lambda: fleet.subscribe(lambda _: self._view.wake()),
        )
        self._view.start(fleet.begin)
        self._actions = session.ActionRunner(fleet.begin, self._show_error)
        self.add_class("kitty-fleet")
        receive_while_busy([self])

    def __repr__(self) -> str:
        return f"ReplicaPanel({self._fleet!r})"

    def _repr_html_(self) -> str:
        cells = [(row["profile"], row["status"], row["model"], row["problem"]) for row in self.rows]
        head = "Replica", "State", "Model", ""
        return still("kitty_nb fleet", [repr(self._fleet)], table(head, cells))

    def close(self) -> None:
        """Remove the widget; the replicas run on."""
        if self.comm is not None:
            self._view.stop()
            super().close()

    def _look(self) -> list[FleetRow]:
        return replica_rows(self._fleet.replicas, self._fleet.alias)

    def _draw(self) -> None:
        with self.hold_sync():
            self.rows, self.notice = self._look(), self._failure or self._fleet.problem or ""

    def _show_error(self, message: str | None) -> None:
        self._failure = message
        self.notice = message or ""

    def receive(self, message: Any) -> None:
        """Take a message of a page."""
        match message:
            case {"kind": "start" | "stop" as verb, "profile": str(name)}:
                rows = enumerate(self.rows)
                self._order(verb, [n for n, row in rows if row[verb] and row["profile"] == name])
            case {"kind": "start_all" | "stop_all" as verb}:  # those that wait for a worker, too
                self._order(verb.removesuffix("_all"), range(len(self.rows)))
            case {"kind": "rescan"}:
                self._actions.run(self._fleet.rescan)

    def _order(self, verb: str, numbers: Sequence[int]) -> None:
        if numbers:
            self._actions.run(partial(getattr(self._fleet, verb), *numbers))


def bundle(fleet: Fleet) -> dict[str, Any]:
    """Return what a notebook shows of a fleet: its panel, made if none is open."""
    panel = session.newest(ReplicaPanel, fleet)
    if panel is None or panel.comm is None:
        panel = ReplicaPanel(fleet)
        session.succeed(panel, fleet)
    still_picture = {"text/html": panel._repr_html_(), "text/plain": repr(fleet)}
    drawn, _ = panel._repr_mimebundle_() or ({}, {})
    return {**drawn, **still_picture}
