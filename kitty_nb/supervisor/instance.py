"""One generation of a server: its process, watched from spawn to exit."""

from __future__ import annotations

import re
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread

from kitty_nb.catalog.catalog import why_not_served
from kitty_nb.config import OnKernelExit
from kitty_nb.engine.devices import engine_devices, remote_machines
from kitty_nb.errors import KittyError, PortBusyError
from kitty_nb.supervisor.diagnosis import diagnose, diagnose_first_answer, diagnose_launch
from kitty_nb.supervisor.events import (
    Activity,
    Event,
    HealthCheckResult,
    Level,
    LogLines,
    ProgressMade,
    ServerStatus,
    Stage,
)
from kitty_nb.supervisor.forecast import offloads
from kitty_nb.supervisor.health import HealthProbe, HealthWatch, Recognition
from kitty_nb.supervisor.history import Outcome
from kitty_nb.supervisor.launch import launch, make_guard
from kitty_nb.supervisor.lifecycle import (
    BecameReady,
    Exited,
    GaveUp,
    LoadBegan,
    Refused,
    Report,
    Spawned,
)
from kitty_nb.supervisor.load_progress import LoadJournal, LoadMeter
from kitty_nb.supervisor.log import FileChanges, LogTail, readable
from kitty_nb.supervisor.port_holder import PortHolder, holder_of
from kitty_nb.supervisor.process import ServerProcess, Usage, oom_kills
from kitty_nb.supervisor.registry import (
    ServerRecord,
    find_server,
    last_failure,
    note_failure,
    record_path,
    was_stopped,
    withdraw_record,
    write_record,
)
from kitty_nb.supervisor.sidecar import Sidecar, has_sidecar, withdrawn_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup
    from pydantic import SecretStr

    from kitty_nb.config import ServerConfig

# Seconds. Pauses between two reads of the log let a flood come in few pieces.
_LOG_PAUSE_LOADING = 0.005
_LOG_PAUSE_READY = 0.1
_UNFORESEEN = 0.005
# Seconds, or once it is ready: started together, a server and its sidecar hold each other up.
_SIDECAR_AFTER = 0.2
_SIDECAR_THERE_WITHIN = 10.0  # on a busy machine too
_LOADING = re.compile(r"loading model")
_NEWS = re.compile(r"loading model|model loaded|listening on")
_KEY_REFUSED = (
    "The server refuses the API key that it was started with: something has told it to ask for"
    " another one. Remove that from LLAMACPP_EXTRA_ARGS (--api-key-file) or from the script that"
    " LLAMACPP_BIN names, and set LLAMACPP_API_KEY to the key that you want."
)
_LINES_KEPT = 2_000  # builds of 2024 print their whole usage after a bad flag


class ServerInstance:
    """Starts one process and reports what becomes of it.

    Args:
        generation: The number that its reports carry.
        config: What to start.
        report: Called with each fact that the lifecycle needs.
        publish: Called with each event for the user.
        note_health: Called with every answer to a health check.
        api_key: What the server is to ask its clients for.
        found: The server to watch, when another program or kernel has started it.
    """

    def __init__(
        self,
        generation: int,
        config: ServerConfig,
        report: Callable[[Report], None],
        publish: Callable[[Event], None],
        note_health: Callable[[HealthCheckResult], None],
        api_key: SecretStr | None,
        found: ServerRecord | None = None,
    ) -> None:
        self.generation = generation
        self.api_key = found.api_key if found else api_key
        self.probe = HealthProbe(config, self.api_key)
        self._config = config
        self._report = report
        self._publish = publish
        self._record = found
        self._found = found is not None
        self._began = found.began if found else time.monotonic()
        self._preparing = anyio.CancelScope()
        self._process: ServerProcess | None = None
        self._meter = LoadMeter()
        self._journal = LoadJournal(
            config, lambda text: self._say(text, Level.WARNING), whole=found is None
        )
        self._health = HealthWatch(
            self.probe,
            self._meter,
            self._elapsed,
            config.health_max_attempts,
            self._enter,
            publish,
            self._note_health,
            self._doubt,
            self._prove,
            self._being_ended,
        )
        self._tell_health = note_health
        # Of the last two answers: a kill between an answer and the end is this server's.
        self._oom_kills = deque([oom_kills()], maxlen=2)
        self._foreseen = self._over = False
        self._hint = ""
        self._failure: str | None = None
        self._sidecar: Sidecar | None = None
        self._outcome = Outcome.CRASHED
        self._helpers: TaskGroup
        self._ready = anyio.Event()
        self._last_lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._devices: tuple[str, ...] | None = None

    @property
    def was_ready(self) -> bool:
        """True once it has been ready, so that clients may have its key."""
        return self._ready.is_set()

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices beside the processor that it has put the model on, as far as known yet."""
        return (self._record and self._record.devices) or ()

    async def run(self) -> None:
        """Start the process and watch it until it has ended."""
        try:
            async with anyio.create_task_group() as self._helpers:
                await self._serve()
        except Exception:
            await self.put_down()
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await self.probe.aclose()
                if self._over:
                    await self._journal.close(self._meter, self._elapsed(), self._outcome)
                    if self._sidecar:
                        await self._sidecar.ended()

    async def _serve(self) -> None:
        try:
            process = self._attach(self._record) if self._record else await self._start()
        except (KittyError, OSError) as error:
            self._outcome = Outcome.FAILED
            reason = (
                diagnose_launch(error, self._config.log_dir)
                if isinstance(error, OSError)
                else error
            )
            refused = Refused(self.generation, str(reason))
            if not await anyio.to_thread.run_sync(find_server, self._config):
                note_failure(self._config, refused.reason)
            if isinstance(error, PortBusyError):
                refused = replace(refused, free_port=error.free_port, attachable=error.attachable)
            self._end(refused)
        else:
            if process:
                await self._watch(process)
            else:
                self._exited("It ended before it could be watched.", asked=True)

    async def terminate(self, force: bool) -> None:
        """End the process, or call the start off when there is none yet."""
        if self._outcome is Outcome.CRASHED:
            self._outcome = Outcome.STOPPED
        if self._process is None:
            self._preparing.cancel()
            return
        withdraw_record(self._config, self._process.pid, self._process.create_time)
        self._health.stop()
        await anyio.lowlevel.checkpoint()  # the connection is closed before the signal is sent
        if force:
            self._process.kill()
        else:
            await self._process.terminate(self._config.stop_grace_seconds)

    async def put_down(self) -> None:
        """Let no process run that nothing watches, unless others may."""
        if self._process is None or self._found:
            return
        with anyio.CancelScope(shield=True):
            self._process.kill()
            await self._process.wait()
        withdraw_record(self._config, self._process.pid, self._process.create_time)
        self._over = True

    def _attach(self, record: ServerRecord) -> ServerProcess | None:
        process = ServerProcess.attach(record.pid, record.create_time)
        if process:
            self._process = process
            self._say(f"Found a running server (PID {process.pid}).")
            if record.ready is None:
                self._meter.measure(Usage(0, 0), 0.0)  # what it has loaded so far counts
                self._helpers.start_soon(self._foresee)
        return process

    async def _start(self) -> ServerProcess | None:
        """Start the process; None when the start was called off."""
        self._say("Server starting…")
        if not self._config.local_only:
            self._say(
                f"The server will be open to the network ({self._config.host}). Set"
                " LLAMACPP_HOST=127.0.0.1 to keep it to this machine.",
                Level.WARNING,
            )
        self._helpers.start_soon(self._foresee)
        with self._preparing:
            if remote_machines(self._config):  # they answer one client at a time
                with suppress(KittyError, OSError):  # the launch says what is wrong
                    self._devices = await self._list_devices()
            take = partial(self._journal.take, self._meter)
            launched = await launch(self._config, self.api_key, self._began, self._say, take)
            self._process, self._record, self._sidecar = launched
        return self._process

    async def _foresee(self) -> None:
        """Learn what to expect, and show it until the process is watched."""
        await self._journal.look(self._meter)
        self._foreseen = True
        while not self._over:
            pause = self._show_progress()
            if self._process:
                return
            await anyio.sleep(pause)

    async def _watch(self, process: ServerProcess) -> None:
        self._meter.reach(Stage.STARTING, self._elapsed())
        self._report(Spawned(self.generation, process.pid))
        self._show_progress()
        if self._found:
            self._sidecar = make_guard(self._config)
            if self._sidecar and self._record:
                self._sidecar.watch(process, self._record.idle_seconds)
        with LogTail(self._config.log_path) as log:
            try:
                async with anyio.create_task_group() as watchers:
                    watchers.start_soon(self._watch_log, log)
                    watchers.start_soon(self._watch_progress, process, log)
                    watchers.start_soon(self._health.run)
                    watchers.start_soon(self._see_to_sidecar)
                    watchers.start_soon(self._name_devices)
                    code = await process.wait()
                    watchers.cancel_scope.cancel()
            finally:  # this program may end before its server
                if process.runs() and not self._found:
                    self._start_sidecar()
            while self._read_log(log):
                await anyio.lowlevel.checkpoint()
            self._read_log(log, to_end=True)
        asked = self._being_ended()
        if asked and self._outcome is Outcome.CRASHED:
            self._outcome = Outcome.STOPPED
        kills, before = oom_kills(), self._oom_kills[0]
        out_of_memory = None if kills is None else kills != before
        diagnosis = diagnose(code, tuple(self._last_lines), out_of_memory=out_of_memory)
        if diagnosis.blames_model and (told := await self._why_not_served()):
            diagnosis = replace(diagnosis, cause=told, remedy="", repeats=True)
        reason = str(diagnosis)
        if diagnosis.of_port and (holder := await self._port_holder()):
            reason = f"{reason} {holder.sentence}"
        self._exited(reason, asked=asked, repeats=diagnosis.repeats)
        with suppress(OSError):
            withdrawn_path(record_path(self._config)).unlink()

    async def _name_devices(self) -> None:
        """Learn which devices the server uses. Its load does not wait for that."""
        if self._record is None or self._record.devices is not None:
            return
        with suppress(KittyError, OSError):  # people can do without
            if self._devices is None:
                self._devices = await self._list_devices()
            self._record = self._record.model_copy(update={"devices": self._devices})
            if not self._found and not self._being_ended():
                write_record(self._record)

    async def _list_devices(self) -> tuple[str, ...] | None:
        if not await anyio.to_thread.run_sync(offloads, self._config):
            return ()
        _, found = await engine_devices(self._config)
        return None if found is None else tuple(map(str, found))

    async def _why_not_served(self) -> str | None:
        """Return what the model's header says it is, where that is no model to serve."""
        model = self._config.model
        return await anyio.to_thread.run_sync(why_not_served, model) if model else None

    async def _see_to_sidecar(self) -> None:
        """Have a sidecar, unless another program has seen to it; a new one where it was killed."""
        if not self._found:
            with anyio.move_on_after(_SIDECAR_AFTER):
                await self._ready.wait()
        else:
            await anyio.sleep(max(0.0, _SIDECAR_THERE_WITHIN - self._elapsed()))
        ours = not self._found
        while True:
            if ours or not has_sidecar(self._config.log_path):
                self._start_sidecar()
            ours = False
            await anyio.sleep(_SIDECAR_THERE_WITHIN)

    def _start_sidecar(self) -> None:
        if self._record and self._process and not (self._sidecar and self._sidecar.runs):
            guards = self._config.on_kernel_exit is OnKernelExit.STOP
            with suppress(OSError):  # the next look tries again
                sidecar = Sidecar(self._config, record_path(self._config), guards=guards)
                sidecar.watch(self._process, self._record.idle_seconds)
                self._sidecar = sidecar

    async def _watch_log(self, log: LogTail) -> None:
        with FileChanges(self._config.log_path) as changes:
            while True:
                more = self._read_log(log)
                await anyio.sleep(_LOG_PAUSE_READY if self._ready.is_set() else _LOG_PAUSE_LOADING)
                if not more:
                    await changes.wait()

    def _read_log(self, log: LogTail, *, to_end: bool = False) -> bool:
        """Pass on what has come, or a part of very much; say whether there was anything."""
        lines = tuple(map(readable, log.read(to_end=to_end)))
        if not lines:
            return False
        self._last_lines.extend(lines)
        self._meter.touch(self._elapsed())
        if self._meter.stage is Stage.STARTING and any(map(_LOADING.search, lines)):
            self._meter.reach(Stage.LOADING, self._elapsed())
            self._helpers.start_soon(self._look_at_port)  # it is bound before that line
        self._publish(LogLines(lines))
        if not self._ready.is_set() and any(map(_NEWS.search, lines)):
            self._health.hint()
        return True

    async def _watch_progress(self, process: ServerProcess, log: LogTail) -> None:
        while not self._ready.is_set():
            elapsed, usage = self._elapsed(), process.usage()
            # What a process had before it began to load does not count, so the log is read only
            # now: it tells of the beginning before the first byte is there.
            self._read_log(log)
            if usage:
                self._meter.measure(usage, elapsed)
            pause = self._show_progress()
            if elapsed - self._meter.moved_at > self._config.stall_seconds:
                self._give_up(self._stalled())
                return
            await anyio.sleep(pause)

    def _show_progress(self) -> float:
        """Publish how far the load is; return the seconds after which to do so again."""
        if not self._foreseen:
            return _UNFORESEEN
        elapsed = self._elapsed()
        pause = self._meter.pause(elapsed)
        self._publish(ProgressMade(self._meter.progress(elapsed, pause)))
        return pause

    def _enter(self, status: ServerStatus, elapsed: float) -> float:
        """Act on another status; return what the load has taken by then, in seconds."""
        if status is ServerStatus.LOADING:
            self._meter.reach(Stage.LOADING, elapsed)
            self._report(LoadBegan(self.generation))
            self._helpers.start_soon(self._look_at_port)
        elif status is ServerStatus.READY:
            self._ready.set()
            since, elapsed = self._note_ready(elapsed)
            self._meter.reach(Stage.READY, elapsed)
            self._report(BecameReady(self.generation, since))
            self._publish(ProgressMade(self._meter.progress(elapsed)))
            self._helpers.start_soon(self._journal.close, self._meter, elapsed, Outcome.READY)
        return elapsed

    def _note_health(self, result: HealthCheckResult) -> None:
        if result.latency is not None:
            self._oom_kills.append(oom_kills())
            if result.message.startswith("answered ") and not self._hint:
                self._hint = (
                    f" /health {result.message}: a script around the server may have told it to"
                    " serve elsewhere (--api-prefix)."
                )
        self._tell_health(result)

    async def _look_at_port(self) -> None:
        """See whether it is our process that listens: once it does, it goes on until it ends."""
        if self._process:
            listens = await anyio.to_thread.run_sync(self._process.listens_on, self._config.port)
            self.probe.trusted = self.probe.trusted or listens is not False  # two may look at once

    async def _port_holder(self) -> PortHolder | None:
        return await anyio.to_thread.run_sync(holder_of, self._config.host, self._config.port)

    async def _doubt(self) -> str | None:
        """Why what answers on our port is not our server, in words; None when it is."""
        port = self._config.port
        if not self.probe.trusted:
            await self._look_at_port()
        if not self.probe.trusted:
            holder = await self._port_holder()
            who = holder.who if holder else "another server"
            self._hint = f" Port {port} has been taken by {who}."
            return f"{who} answers on this port"
        match await self.probe.recognise():
            case Recognition.KEY_REFUSED:
                self._give_up(_KEY_REFUSED)
                return "it refuses our API key"
            case Recognition.OTHER_MODEL:
                name = self._config.served_alias
                self._hint = f" It answers, but not as {name}: something overrides --alias."
                return f"it does not answer as {name}"
        return None

    async def _prove(self) -> bool:
        """Tell whether the server answers a request; where that fails, it is given up."""
        if self._record and self._record.ready is not None:
            return True
        said = await self.probe.first_answer()
        if said:
            self._give_up(str(diagnose_first_answer(said, tuple(self._last_lines))))
        return said is None

    def _note_ready(self, elapsed: float) -> tuple[float, float]:
        """Return since when it is ready, by the monotonic clock, and what the load took."""
        now, record = time.monotonic(), self._record
        if record and record.ready is not None and record.load_seconds is not None:
            return record.ready, record.load_seconds
        # Withdrawn, it must not come back: the server is being ended just as it becomes ready.
        if record and not self._being_ended():
            self._record = record.model_copy(update={"ready": now, "load_seconds": elapsed})
            try:
                write_record(self._record)
            except OSError as error:
                self._say(
                    f"{self._config.log_dir} cannot be written ({error.strerror}): another kernel"
                    " will not know since when this server is ready. Make room or give permission.",
                    Level.WARNING,
                )
        return now, elapsed

    def _being_ended(self) -> bool:
        """Whether this program or another one is ending the server, or has ended it."""
        process = self._process
        return process is not None and was_stopped(self._config, process.pid, process.create_time)

    def _give_up(self, reason: str) -> None:
        self._outcome, self._failure = Outcome.FAILED, reason
        self._report(GaveUp(self.generation, reason))

    def _stalled(self) -> str:
        return (
            f"The load stalled in the stage '{self._meter.stage.label}': for"
            f" {self._config.stall_seconds:.0f} s the server used no processor time, read nothing,"
            f" logged nothing and answered nothing new.{self._hint} See the end of its log. If it"
            " was only slow, set a larger LLAMACPP_STALL_SECONDS."
        )

    def _exited(self, reason: str, *, asked: bool, repeats: bool = False) -> None:
        failure = self._failure or (None if asked else reason)
        if failure and not (self._found and last_failure(self._config)):
            note_failure(self._config, failure)
        self._end(Exited(self.generation, reason, time.monotonic(), repeats, asked))

    def _end(self, report: Report) -> None:
        self._over = True
        self._report(report)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _say(self, message: str, level: Level = Level.INFO) -> None:
        self._publish(Activity(message, level, time.time()))
