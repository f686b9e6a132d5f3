"""One notebook cell becomes a live manager for llama.cpp's llama-server.

Names are imported on first use: the embedded engine is a module of this package, and a server
should not wait for its manager's widgets.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from kitty_nb.catalog.catalog import ModelCatalog as ModelCatalog
    from kitty_nb.catalog.demo_model import write_demo_model as write_demo_model
    from kitty_nb.config import ServerConfig as ServerConfig
    from kitty_nb.fleet import Fleet as Fleet
    from kitty_nb.manager import ModelManager as ModelManager
    from kitty_nb.supervisor.events import HealthCheckResult as HealthCheckResult
    from kitty_nb.supervisor.events import LoadProgress as LoadProgress
    from kitty_nb.supervisor.events import ServerState as ServerState
    from kitty_nb.supervisor.events import ServerStatus as ServerStatus
    from kitty_nb.supervisor.supervisor import Supervisor as Supervisor
    from kitty_nb.widgets import ControlPanel as ControlPanel

_HOMES = {
    "ControlPanel": "widgets",
    "Fleet": "fleet",
    "HealthCheckResult": "supervisor.events",
    "LoadProgress": "supervisor.events",
    "ModelCatalog": "catalog.catalog",
    "ModelManager": "manager",
    "ServerConfig": "config",
    "ServerState": "supervisor.events",
    "ServerStatus": "supervisor.events",
    "Supervisor": "supervisor.supervisor",
    "write_demo_model": "catalog.demo_model",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def _show_sweep(sweep: object) -> Any:
    return import_module(f"{__name__}.widgets.sweep_panel").bundle(sweep)


def _show_fleet(fleet: Any) -> Any:
    return import_module(f"{__name__}.widgets.fleet_panel").bundle(fleet)


def show_sweeps(formatter: Any) -> None:
    """Make IPython show a `Sweep` or `Fleet` as its panel, which is imported when it is shown."""
    formatter.for_type_by_name(f"{__name__}.experiments.sweep", "Sweep", _show_sweep)
    formatter.for_type_by_name(f"{__name__}.fleet", "Fleet", _show_fleet)


if (_ipython := sys.modules.get("IPython")) and (_shell := _ipython.get_ipython()):
    show_sweeps(_shell.display_formatter.mimebundle_formatter)


def load_ipython_extension(shell: "InteractiveShell") -> None:
    """Register `%kitty` and `%%kitty_chat` in a notebook; called by `%load_ext kitty_nb`."""
    import_module(f"{__name__}.widgets.magics").load(shell)


def unload_ipython_extension(shell: "InteractiveShell") -> None:
    """Remove the magics, and stop the servers that they manage."""
    import_module(f"{__name__}.widgets.magics").unload(shell)
