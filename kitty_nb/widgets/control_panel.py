"""`ControlPanel`: a notebook cell becomes a live model manager."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipywidgets import HBox, VBox

from kitty_nb.catalog.resolve import load_profile, resolve_model
from kitty_nb.client.connect import hand_overs
from kitty_nb.config.profiles import as_written, env_warnings, save_settings
from kitty_nb.errors import ConfigError, KittyError, ModelFileError
from kitty_nb.supervisor.events import (
    Activity,
    Event,
    LogLines,
    RouterLoad,
    ServerState,
    ServerStatus,
    StateChanged,
)
from kitty_nb.widgets import display, server_view, session
from kitty_nb.widgets.ask import Ask, EmbedBox
from kitty_nb.widgets.download_form import DownloadForm
from kitty_nb.widgets.models import ModelBrowser, ModelPicker
from kitty_nb.widgets.server_view import Address, Details, cells_for_programs, name_of, snippet
from kitty_nb.widgets.server_work import ActivityLog, LiveLine, RequestsTable, ServerLog
from kitty_nb.widgets.settings_form import MemoryLine, SettingsForm, ensure_models_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import ModelManager
    from kitty_nb.operation import Operation

_LOOK_EVERY = 1.0  # seconds
_TROUBLE = {
    ServerStatus.FAILED,
    ServerStatus.CRASHED,
    ServerStatus.RESTARTING,
    ServerStatus.OUT_OF_REACH,
}


class ControlPanel(VBox):
    """Pick a model, start it, watch it load, use it, stop or switch it.

    Only the manager's thread writes the facts, so that they stay live while a cell keeps the kernel
    busy; the fields that the user edits are written by callbacks, and when a server was started
    elsewhere.

    A panel replaces an earlier one of its file and profile, as when its cell is run again. For two
    side by side, give the second one the manager of the first.

    Args:
        env: The `.env` file with the settings.
        profile: The profile to use.
        manager: The manager to control, with the `.env` file and the profile that it was created
            from; without one, the panel creates its own, and closes it.
    """

    def __init__(
        self,
        env: str | Path = ".env",
        profile: str = "primary",
        manager: ModelManager | None = None,
    ) -> None:
        self._config: ServerConfig
        self._file: ServerConfig | None = None  # the file's settings when it was last read
        self._problem: str | None = None
        self._hints = ""  # settings that have no effect
        self._log_shown = False  # automatically, because of a problem
        self._edited = False  # since the fields were filled, or a server was started with them
        self._taken: frozenset[str] = frozenset()
        earlier: ControlPanel | None = None
        if manager is None:
            self._env, self._profile = env, profile
            self._problem = self._read_env()
            manager = session.acquire(env, profile, self, self._config)
            earlier = session.succeed(self, Path(env).absolute(), profile)
        else:
            self._env = manager.env or env
            self._config = manager.state.config
            self._profile = self._config.profile
            if manager.env is not None:
                with suppress(ConfigError):
                    self._file = load_profile(self._env, self._profile)[0]
        self.manager = manager
        self._router_load: RouterLoad | None = None
        self._latest_switch: server_view.Switch | None = None
        self._status: ServerStatus
        replaced = earlier if earlier and earlier.manager is manager else None
        told = replaced.activity_log.activities if replaced else ()
        self._view = display.LiveView(
            self._draw,
            self._show_error,
            self._next_second,
            subscribe=partial(self._subscribe, told),
        )
        self._make_parts(replaced)
        self._view.start(manager.run)  # first: the rest takes time, in which a server may start
        self.live.watch(manager, self._show_error)
        self._scan()
        state = manager.state
        if not state.status.absent and state.external is None:  # started here or elsewhere
            self._follow(state.config)
        self._look_again()
        if earlier:
            earlier.close()

    def _make_parts(self, earlier: ControlPanel | None) -> None:
        """Create the widgets; an earlier panel of this manager passes on its contents."""
        manager = self.manager
        self.activity_log = ActivityLog()  # first: the others write to it
        self.status_line = display.Line("kitty-status")
        self.load_bar = server_view.LoadBar()
        self.picker = ModelPicker(manager, self._choose, self._look_again)
        self.served = server_view.ServedModels(self._switch)
        self.buttons = server_view.ServerButtons()
        self.notice = display.Notice()
        name = partial(name_of, self)
        self.ask: Ask = Ask(manager, name, earlier and earlier.ask)
        self.embed = EmbedBox(manager, self._show_problem)
        programs = cells_for_programs(manager, name)
        self.address = Address(
            {
                "key": manager.reveal_api_key,
                "code": lambda: snippet(manager.state, name()),
                **programs,
            },
            {program: hand_overs()[program].title for program in programs},
        )
        self.live = LiveLine()
        self.requests = RequestsTable(self._view.wake)
        self.settings = SettingsForm(self._config, self._choose)
        self.memory = MemoryLine(manager, self._wanted)
        self.browser = ModelBrowser(manager, self.picker, self.settings, self._wanted, self._say)
        self.details = Details(self._view.wake)
        self.download: DownloadForm = (
            earlier._hand_over(self)
            if earlier
            else DownloadForm(manager, self._models_dir, self.picker.choose)
        )
        self.server_log = ServerLog(self._view.wake)
        self._arrange()
        self._answer_clicks()

    def _arrange(self) -> None:
        """Lay out the parts, from those always needed to those folded away.

        Parts that use a ready server go between the notice and the address; those needed only now
        and then are a `Fold` each in the last row, which contains the memory, too.
        """
        profile = self._config.profile
        label = "" if profile == server_view.DEFAULT_PROFILE else f" of the profile {profile}"
        self.saved = display.Line("kitty-fact")
        self._settings_fold = display.Fold(
            "Settings", self.settings, self.saved, self.browser.last_time
        )
        self._log_fold = display.Fold("Log", self.activity_log, self.server_log)
        top = HBox([self.status_line, self.load_bar]).add_class("kitty-top")
        choice = HBox([self.picker, self.served, self.buttons]).add_class("kitty-choice")
        self._notice_row = HBox([self.notice, self.buttons.remedies])
        self._notice_row.add_class("kitty-notice-row")
        looked_up = self.details, self.browser, self.download, self.requests, self._log_fold
        self._folds = HBox([self.memory, self._settings_fold, *looked_up]).add_class("kitty-folds")
        # A router's models have settings of their own, in their profiles.
        self._for_one_model = self.picker, self.memory, self._settings_fold, self.browser
        self._for_files = *self._for_one_model, self.download, self.requests, self.server_log
        name = display.Accessible(f"kitty_nb control panel{label}")
        used = self.live, self.ask, self.embed, self.address
        super().__init__([top, choice, self._notice_row, *used, self._folds, name])
        self.add_class("kitty-panel")

    def _answer_clicks(self) -> None:
        actions = session.ActionRunner(self.manager.run, self._show_problem, remedy="")
        start, restart, stop = self.manager.start, self.manager.restart, self.manager.stop
        self._actions, buttons = actions, self.buttons
        for pressed in (buttons.start, buttons.now):
            pressed.on_click(lambda _: actions.run(start, self._wanted))
        for pressed in (buttons.stop, buttons.cancel):
            pressed.on_click(lambda _: actions.run(stop))
        buttons.use_port.on_click(lambda _: actions.run(start, self._on_free_port))
        buttons.restart.on_click(lambda _: actions.run(restart, self._wanted))
        buttons.attach.on_click(lambda _: actions.run(self.manager.attach))
        buttons.anyway.on_click(lambda _: actions.insist())
        self.settings.save.on_click(lambda _: self._save())
        self.picker.rescan.on_click(lambda _: self.rescan())
        display.receive_while_busy(display.tree(self))

    def __repr__(self) -> str:
        return f"ControlPanel(profile={self._profile!r})"

    def _repr_html_(self) -> str:
        state = self.manager.state
        ready = state.status is ServerStatus.READY
        facts = server_view.word(state.status), state.model_name or "", ready and state.endpoint
        return display.still("kitty_nb", [fact for fact in facts if fact])

    @property
    def choice(self) -> ServerConfig:
        """The settings that *Start* would use. While models are being listed, it waits for one.

        Raises:
            ConfigError: A setting in the panel is invalid.
        """
        self.picker.wait_for_choice()
        return self._wanted()

    def rescan(self) -> None:
        """Reload the `.env` file and look for models again. Edits in the panel are kept."""
        edits, problem, edited = self.settings.edits, None, self._edited
        try:
            if self.manager.env is not None:
                problem = self._read_env()
                self.settings.fill(self._config, edits)
        except ConfigError as error:
            problem = str(error)
        self._problem, self._edited = problem, edited
        self._scan()
        self._look_again()

    def use(self, **settings: Any) -> None:
        """Take a model and settings as if the user had entered them. Nothing is started.

        Settings without a field here apply until `.env` is reloaded; *Save* writes them, too.

        Args:
            settings: Fields of `ServerConfig` by name.

        Raises:
            ConfigError: A value is invalid.
        """
        config = self._config.replace(**settings)
        config = resolve_model(config) if config.model else config
        self._config, self._taken = config, self._taken | settings.keys()
        self.settings.apply(dict(config))
        if config.model:
            self.picker.choose(config.model)
        self._choose()

    def close(self) -> None:
        """Remove the widgets; stop the server and end the thread if the manager is its own."""
        if self.comm is None:
            return
        for part in (self._view, self.ask, self.picker, self.browser, self.live, self.memory):
            part.stop()
        if self.download in self._folds.children:  # else a later run of the cell has it
            self.download.stop()
        session.release(self)
        for widget in [*display.tree(self)][1:]:
            widget.close()
        super().close()

    def _read_env(self) -> str | None:
        """Read the settings without invalid ones; return a complaint about those."""
        self._file, complaint = load_profile(self._env, self._profile)
        self._config = self._file
        self._hints = "\n".join(env_warnings(self._env, self._profile))
        return str(complaint) if complaint else None

    def _hand_over(self, later: ControlPanel) -> DownloadForm:
        """Pass the form, with its running download, to a later run of this cell."""
        self._folds.children = [one for one in self._folds.children if one is not self.download]
        self.download.attach(later._models_dir, later.picker.choose)
        return self.download

    def _scan(self) -> None:
        if self._config.url:  # it has no files on this machine
            return
        try:
            if not self._config.ssh and (done := ensure_models_dir(self._config.models_dir)):
                self._say(done)
        except ModelFileError as error:
            self._problem = str(error)
        config = self.manager.settled(self._config)
        self.picker.scan(self.manager.catalog(config), preferred=config.model)

    def _models_dir(self) -> Path:
        return self._config.models_dir

    def _on_free_port(self) -> ServerConfig:
        if port := self.manager.state.free_port:
            self._config = self._config.replace(port=port)
        return self._wanted()

    def _save(self) -> None:
        """Write the choice into the `.env` file."""
        try:
            names = {"model", "mmproj", *self.settings.fields, *self._taken}
            wanted = self._wanted()
            wanted = as_written(wanted) if wanted.ssh else wanted
            saved = save_settings(wanted, self._env, names, self._file)
        except KittyError as error:
            self._show_problem(str(error))
        else:
            self._say(saved.sentence)
            self.rescan()
            self.saved.write(escape(saved.sentence))

    def _choose(self) -> None:
        """Note the choice of another model or setting; an earlier problem no longer counts."""
        self._problem, self._edited = None, True
        self.saved.write("")
        self._look_again()

    def _switch(self, model: str) -> None:
        """Ask a router or a server at a URL for another model from now on."""
        self._latest_switch = switch = server_view.Switch(model)

        def begin() -> Operation[Any]:
            switch.operation = self.manager.switch_model(model)
            return switch.operation

        self._view.before_drawing(partial(self._actions.run, begin))

    def _follow(self, config: ServerConfig) -> None:
        """Choose a server's model and settings, unless the user has edited them since the last."""
        settings, problem = dict(config), self._problem
        runs = self.picker.dropdown.value == config.model and not self.settings.differing(settings)
        if self._edited and not runs:
            return
        if not runs:
            self.settings.fill(config)
            if config.model:
                self.picker.choose(config.model)
        self._problem, self._edited = problem, False

    def _look_again(self) -> None:
        """Refresh memory and models: the model or a setting has changed."""
        self.browser.look_again()
        self._view.before_drawing(self.memory.refresh)

    def _wanted(self) -> ServerConfig:
        model = None if self._config.models is not None else self.picker.dropdown.value
        chosen = self._config.replace(model=model, **self.settings.values)
        return self.manager.settled(chosen)

    def _show_problem(self, problem: str | None) -> None:
        self._problem = problem
        self._view.wake()

    def _show_error(self, message: str) -> None:
        self._problem = message
        self.notice.show(message)
        display.show_if(self._notice_row, True)

    def _say(self, message: str) -> None:
        self.activity_log.append(Activity.now(message))

    def _subscribe(self, told: Iterable[Activity]) -> Callable[[], None]:
        """Collect events from now on, after the activities of the panel that this one replaces."""
        for activity in tuple(told):
            self.activity_log.append(activity)
        self.server_log.append(self.manager.log_lines)
        self._status = self.manager.state.status
        return self.manager.subscribe(self._collect)

    def _collect(self, event: Event) -> None:
        match event:
            case StateChanged(state) if state.status is not self._status:
                self._note_status(state)
            case RouterLoad(model, progress):
                shown = self._router_load and self._router_load.model
                if progress or shown == model:  # another one may be unloaded to make room
                    self._router_load = event
            case Activity():
                self.activity_log.append(event)
            case LogLines(lines):
                self.server_log.append(lines)
        self._view.wake()

    def _note_status(self, state: ServerState) -> None:
        if self._status is ServerStatus.OUT_OF_REACH:  # what is there may have changed
            self.server_log.clear()
            self._view.before_drawing(self._scan)
        self._status = state.status
        self.browser.look_again()
        if state.status is ServerStatus.STARTING:
            self.server_log.clear()
            self._router_load = None
            if state.external is None:
                self._view.before_drawing(partial(self._follow, state.config))
        if state.status is ServerStatus.READY:
            self._problem = None
        if state.status in _TROUBLE and not self._log_fold.unfolded:
            self._log_fold.selected_index, self._log_shown = 0, True
        elif self._log_shown and state.status in {ServerStatus.READY, ServerStatus.STOPPED}:
            self._log_fold.selected_index, self._log_shown = None, False
        if state.status.settled or state.status.absent:
            self._view.before_drawing(self.memory.refresh)

    def _next_second(self) -> float:
        """Return the seconds until the clock on screen advances."""
        state = self.manager.state
        if state.retry_in is not None:
            return state.retry_in % 1
        return _LOOK_EVERY if state.uptime is None else 1 - state.uptime % 1

    def _draw(self) -> None:
        state, model = self.manager.state, self.picker.model
        problem = self._problem
        elsewhere, routes = self._config.url, self._config.models is not None
        startable = routes or (model is not None and model.startable)
        if elsewhere:  # it is used instead of a server that runs here
            startable = elsewhere != state.config.url
        now = server_view.choices(
            state,
            startable=startable,
            other_model=elsewhere is not None or (not routes and self._differs(state)),
            other_settings=self._settings_differ(state),
        )
        doubtful = problem is not None and problem == self._actions.refusal
        self.buttons.show(state, now, doubtful=doubtful)
        self.served.show(state, self._latest_switch)
        lost = state.status is ServerStatus.OUT_OF_REACH
        hidden = [
            *(self._for_files if elsewhere else ()),
            *(self._for_one_model if routes else ()),
            *((self.requests, self.server_log) if state.external else ()),
            *([self.download] if self._config.ssh else ()),  # it fills this machine's folder
            *([self.memory] if lost else ()),
        ]
        for part in self._for_files:
            display.show_if(part, part not in hidden)
        self.ask.show(state, template=self._has_template(state))
        self.embed.show(state)
        self.address.show(state)
        self.load_bar.show(state, self.manager.progress, self._router_load)
        about = None if elsewhere or routes else model and (model.problem or model.doubt)
        message = problem or state.error or state.doubt or about
        self.notice.show(message or self._hints)
        display.show_if(self._notice_row, bool(message or self._hints))
        self._settings_fold.titles = (f"Settings: {self.settings.summary}",)
        self.details.show(state, self.manager.progress, model)
        self.requests.show(self.manager.requests)
        self.activity_log.flush()
        self.server_log.flush()
        # Last, so that whoever waits for a state finds everything else up to date.
        self.status_line.write(server_view.status_line(state))

    def _differs(self, state: ServerState) -> bool:
        """Return whether the chosen model differs from the server's."""
        model = self.picker.model
        if model and state.external:
            return model.path.name != state.model_name
        return model is not None and model.path != state.config.model

    def _has_template(self, state: ServerState) -> bool:
        """Return whether the served model has a chat template, as far as known."""
        served = (one for one in self.picker.models if one.path == state.config.model)
        given = any(word.startswith("--chat-template") for word in state.config.extra_args)
        unknown = state.external is not None
        return given or unknown or not any(one.facts.lacks_template for one in served)

    def _settings_differ(self, state: ServerState) -> bool:
        """Return whether a restart would change anything."""
        try:
            return state.external is None and self._wanted() != state.config.replace()
        except ConfigError:
            return False
