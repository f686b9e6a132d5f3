"""What is known of the models on disk beyond their files: how they were used, whether they fit."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio.from_thread
import anyio.to_thread

from kitty_nb.catalog.memory import MemoryPreview, Verdict, allocate, plan
from kitty_nb.catalog.model_shape import Shapes
from kitty_nb.engine.devices import engine_devices, remote_machines
from kitty_nb.errors import KittyError
from kitty_nb.supervisor.forecast import settings_of
from kitty_nb.supervisor.free_memory import free_memory, with_devices
from kitty_nb.supervisor.history import LoadHistory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kitty_nb.catalog.model import ModelNote
    from kitty_nb.catalog.model_shape import ModelShape
    from kitty_nb.config import ServerConfig


class ModelShelf:
    """Answers for many models at once. Its coroutines belong on the supervisor's loop.

    Args:
        pid: Tells which server would end before another starts.
    """

    def __init__(self, pid: Callable[[], int | None]) -> None:
        self._pid = pid
        self._shapes = Shapes()

    async def recall(
        self, models: Sequence[Path], config: ServerConfig, tell: Callable[[str], None]
    ) -> dict[Path, ModelNote]:
        """Return what is remembered of models; nothing of those that were never used.

        Args:
            models: Their first files.
            config: Says where the history is.
            tell: Called with a sentence about what is wrong with the history.
        """
        return await LoadHistory(config.history, tell).notes(models)

    async def mark(
        self, model: Path, favourite: bool, config: ServerConfig, tell: Callable[[str], None]
    ) -> None:
        """Remember whether a model is a favourite; the arguments are those of `recall`."""
        await LoadHistory(config.history, tell).mark(model, favourite)

    async def judge(self, models: Sequence[Path], config: ServerConfig) -> dict[Path, Verdict]:
        """Tell by formula which models would fit into the memory that is free now.

        Args:
            models: Their first files; their headers are read where that was not done before.
            config: With what settings.
        """
        pid, devices = self._pid(), None
        with suppress(KittyError):  # a start says what is wrong with the engine
            _, devices = await engine_devices(config)
            if devices is None and remote_machines(config):  # busy, so nobody knows
                return dict.fromkeys(models, Verdict.UNKNOWN)

        def look() -> dict[Path, Verdict]:
            settings, memory = settings_of(config), with_devices(free_memory(pid), devices)

            def verdict(shape: ModelShape | None) -> Verdict:
                if shape is None:
                    return Verdict.UNKNOWN
                settled = plan(shape, settings, memory)
                return MemoryPreview(allocate(shape, settled, memory)).verdict

            verdicts: dict[Path, Verdict] = {}
            for model, shape in self._shapes.look_up(models):
                anyio.from_thread.check_cancelled()
                verdicts[model] = verdict(shape)
            return verdicts

        return await anyio.to_thread.run_sync(look)
