"""Looking through the models: the table, the details, and what is remembered of them."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from ipywidgets import VBox

from kitty_nb.errors import KittyError
from kitty_nb.widgets.last_time import LastTime
from kitty_nb.widgets.model_details import ModelDetails
from kitty_nb.widgets.model_rows import group_rows
from kitty_nb.widgets.model_table import ModelTable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kitty_nb.catalog import Model
    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import ModelManager
    from kitty_nb.widgets.model_picker import ModelPicker
    from kitty_nb.widgets.settings_form import SettingsForm

_LOOK_EVERY = 30.0  # seconds; free memory changes, and other programs use the same history
_PAUSE = 0.2  # seconds, in which several changes become one
_JUDGED_AT_ONCE = 50  # models; reading so many headers takes a second or two


class ModelBrowser(VBox):
    """Folds out under the picker. What it shows is written by the manager's loop.

    Args:
        manager: It knows how models were used, and whether they fit.
        picker: Whose models these are; a click on a row chooses there.
        form: Where the settings of last time go.
        wanted: Returns the settings that a start would use, or raises a `KittyError`.
        tell: Called, on the manager's loop, with a sentence about what cannot be remembered.
    """

    def __init__(
        self,
        manager: ModelManager,
        picker: ModelPicker,
        form: SettingsForm,
        wanted: Callable[[], ServerConfig],
        tell: Callable[[str], None],
    ) -> None:
        self._manager, self._picker, self._wanted, self._tell = manager, picker, wanted, tell
        self._stale = anyio.Event()
        self.last_time = LastTime(form)
        self.table = ModelTable(picker.choose, self._mark, self.look_again)
        self.details = ModelDetails(self.look_again)
        super().__init__([self.last_time, self.table, self.details])
        self.add_class("kitty-browser")
        picker.on_list = self.look_again
        self._looking = manager.run(self._look_forever)

    def look_again(self) -> None:
        """Have everything looked at again; callable from any thread but the manager's."""
        with suppress(KittyError):  # the manager is closed
            self._manager.run(self._note_change)

    def note_change(self) -> None:
        """The same, on the manager's loop."""
        self._stale.set()

    def stop(self) -> None:
        """Look no more."""
        self._looking.cancel()

    async def _note_change(self) -> None:
        self.note_change()

    def _mark(self, model: Path, favourite: bool) -> None:
        with suppress(KittyError):
            self._manager.run(self._remember, model, favourite)

    async def _remember(self, model: Path, favourite: bool) -> None:
        config = self._manager.state.config
        await self._manager.shelf.mark(model, favourite, config, self._tell)
        self.note_change()

    async def _look_forever(self) -> None:
        while True:
            with anyio.move_on_after(_LOOK_EVERY if self.table.asked else None):
                await self._stale.wait()
            await anyio.sleep(_PAUSE)
            self._stale = anyio.Event()
            await self._look()

    async def _look(self) -> None:
        model, models = self._picker.model, self._picker.models
        try:
            config, right = await anyio.to_thread.run_sync(self._wanted), True
        except KittyError:
            config, right = self._manager.state.config, False
        self.details.show(model)
        paths = [model.path for model in models]
        notes = await self._manager.shelf.recall(paths, config, self._tell)
        self.last_time.show(notes.get(model.path) if model else None)
        if not self.table.asked:
            return
        ids = self.table.number(paths)
        groups = await anyio.to_thread.run_sync(group_rows, models, config.stores, notes, ids)
        self.table.show(groups)
        self.table.show_chosen(model.path if model else None)
        if right:
            await self._judge(models, config)

    async def _judge(self, models: Sequence[Model], config: ServerConfig) -> None:
        """Look which models fit, until something has changed again."""
        waiting = (model.path for model in models if model.startable)
        while (some := [*islice(waiting, _JUDGED_AT_ONCE)]) and not self._stale.is_set():
            self.table.show_fits(await self._manager.shelf.judge(some, config))
