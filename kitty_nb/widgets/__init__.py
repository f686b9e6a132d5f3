"""The panels `ControlPanel`, `FleetPanel`, `ReplicaPanel` and `SweepPanel`, and their parts.

Panels are imported when they are first used, as in `kitty_nb`: none waits for the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kitty_nb.widgets.control_panel import ControlPanel
    from kitty_nb.widgets.fleet_panel import FleetPanel, ReplicaPanel
    from kitty_nb.widgets.sweep_panel import SweepPanel

_HOMES = {
    "ControlPanel": "control_panel",
    "FleetPanel": "fleet_panel",
    "ReplicaPanel": "fleet_panel",
    "SweepPanel": "sweep_panel",
}

__all__ = ["ControlPanel", "FleetPanel", "ReplicaPanel", "SweepPanel"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
