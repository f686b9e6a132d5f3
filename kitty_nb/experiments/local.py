"""Running trials on this machine, one at a time."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from kitty_nb.experiments.run_trial import run_trial

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.schedule import Execute
    from kitty_nb.experiments.workload import Workload


@asynccontextmanager
async def this_machine(
    config: ServerConfig, workload: Workload, logs: Path | None = None
) -> AsyncGenerator[Execute]:
    """Give what runs trials here.

    Args:
        config: The settings that trials change.
        workload: What to ask each server.
        logs: A folder for the servers' logs, to be looked at afterwards; without it they go with
            this context.
    """
    with TemporaryDirectory(prefix="kitty_nb-sweep-", ignore_cleanup_errors=True) as temporary:
        yield partial(run_trial, config=config, workload=workload, folder=logs or Path(temporary))
