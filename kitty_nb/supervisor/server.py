"""One generation of a server: a coroutine with a queue, from its launch to its exit."""

from __future__ import annotations

import re
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread

from kitty_nb.catalog.catalog import why_not_served
from kitty_nb.config import OnKernelExit
from kitty_nb.engine.locate import device_names, locate_engine, remote_machines
from kitty_nb.errors import KittyError, PortBusyError
from kitty_nb.supervisor import lifecycle
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
from kitty_nb.supervisor.health import FIRST_ANSWER, HealthProbe, HealthReporter, Identity
from kitty_nb.supervisor.history import LoadRecorder, Outcome
from kitty_nb.supervisor.launch import Launched, launch, start_sidecar
from kitty_nb.supervisor.load_progress import LoadMeter
from kitty_nb.supervisor.log import LogTail, readable
from kitty_nb.supervisor.port_owner import PortOwner, owner_of
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

    Emit = Callable[[Event | lifecycle.Report | HealthCheckResult], None]

# Seconds between two looks at the log.
_LOG_LOADING, _LOG_READY = 0.01, 0.1
# Seconds. The log announces ready first: health is asked when the log hints at news, and else
# ever more rarely, each pause so many times the last, but at each whole second of a load.
_ASK_FIRST, _ASK_FACTOR, _ASK_LONGEST, _ASK_READY = 0.01, 4, 1.0, 2.0
_AT_ONCE = 0.3  # seconds; a first answer that takes no longer is not worth a word
# Seconds, or once it is ready: started together, a server and its sidecar hold each other up.
_SIDECAR_AFTER = 0.2
_SIDECAR_THERE_WITHIN = 10.0  # on a busy machine too
_LOADING = re.compile(r"loading model")
_NEWS = re.compile(r"loading model|model loaded|listening on")
_LINES_KEPT = 2_000  # builds of 2024 print their whole usage after a bad flag
_KEY_REFUSED = (
    "The server rejects the API key it was started with: something sets another key. Remove that"
    " from LLAMACPP_EXTRA_ARGS (--api-key-file) or from the script that LLAMACPP_BIN names, and"
    " set LLAMACPP_API_KEY instead."
)


@dataclass(frozen=True, slots=True)
class _Stop:
    """Command: end the process, or call the launch off."""

    force: bool


@dataclass(frozen=True, slots=True)
class _NotLaunched:
    """There is no process: for this reason, or because the launch was called off."""

    error: KittyError | OSError | None = None


@dataclass(frozen=True, slots=True)
class _Ended:
    """The process has ended, with this exit code where the system tells."""

    code: int | None


@dataclass(frozen=True, slots=True)
class _Hopeless:
    """The server will not become ready."""

    reason: str


_Item = _Stop | Launched | _NotLaunched | _Ended | _Hopeless | HealthCheckResult


class Server:
    """One process, from its launch or adoption to its exit.

    Args:
        generation: The number that its reports carry.
        config: What to start.
        api_key: What the server is to ask its clients for.
        emit: Called with each event, report and answer to a health check.
        found: The server to watch, when another program or kernel has started it.
        clock: Seconds.
    """

    def __init__(
        self,
        generation: int,
        config: ServerConfig,
        api_key: SecretStr | None,
        emit: Emit,
        found: ServerRecord | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.api_key = found.api_key if found else api_key
        self.probe = HealthProbe(config, self.api_key)
        self.was_ready = False
        self._generation, self._config, self._emit = generation, config, emit
        self._clock = clock
        self._record, self._found = found, found is not None
        self._began = found.began if found else clock()
        self._queue: deque[_Item] = deque()
        self._arrived = anyio.Event()
        self._tasks: TaskGroup
        self._asking: TaskGroup | None = None
        self._launching = anyio.CancelScope()
        self._process: ServerProcess | None = None
        self._sidecar: Sidecar | None = None
        self._log: LogTail | None = None
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._meter = LoadMeter()
        self._recorder = LoadRecorder(
            config,
            self._meter,
            lambda text: self._notify(text, Level.WARNING),
            whole=found is None,
        )
        self._foreseen = False
        self._devices: tuple[str, ...] | None = None
        self._reporter = HealthReporter(config.health_max_attempts)
        self._health = HealthCheckResult(ServerStatus.STARTING)
        self._answered: anyio.Event | None = None  # its first request, once it is asked
        # Of the last two answers: a kill between an answer and the end is this server's.
        self._oom_kills = deque([oom_kills()], maxlen=2)
        self._outcome = Outcome.CRASHED
        self._failure: str | None = None
        self._over = False

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices beside the processor that it has put the model on, as far as known yet."""
        return (self._record and self._record.devices) or ()

    def stop(self, force: bool) -> None:
        """End the process, or call the launch off when there is none yet."""
        self._send(_Stop(force))

    async def run(self) -> None:
        """Live until the process has ended. Called off, it leaves the process to its sidecar."""
        try:
            async with anyio.create_task_group() as self._tasks:
                self._tasks.start_soon(self._forecast)
                self._tasks.start_soon(self._adopt if self._found else self._launch)
                await self._live()
                self._tasks.cancel_scope.cancel()
        except Exception:
            await self._kill()
            raise
        finally:
            if self._log:
                self._log.close()
            if not self._over and not self._found and self._process and self._process.runs():
                self._start_sidecar()
            with anyio.CancelScope(shield=True):
                await self.probe.aclose()
                if self._over:
                    await self._recorder.record(self._elapsed(), self._outcome)
                    if self._sidecar:
                        await self._sidecar.ended()

    async def _live(self) -> None:
        """Handle what arrives, and meanwhile read the log and measure the load."""
        measure_at = 0.0
        while not self._over:
            with anyio.move_on_after(_LOG_READY if self.was_ready else _LOG_LOADING):
                await self._arrived.wait()
            self._arrived = anyio.Event()
            while self._queue and not self._over:
                await self._handle(self._queue.popleft())
            if self._over:
                return
            self._read_log()
            if self._foreseen and self._loads and self._elapsed() >= measure_at:
                measure_at = self._elapsed() + self._measure()

    async def _handle(self, item: _Item) -> None:
        match item:
            case Launched():
                self._watch(item)
            case _NotLaunched(error):
                await self._refuse(error)
            case HealthCheckResult():
                self._note_health(item)
            case _Hopeless(reason):
                self._give_up(reason)
            case _Stop(force):
                self._end(force=force)
            case _Ended(code):
                await self._finish(code)

    def _send(self, item: _Item) -> None:
        self._queue.append(item)
        self._arrived.set()

    # Launch

    async def _launch(self) -> None:
        config = self._config
        self._notify("Server starting…")
        if not config.local_only:
            self._notify(
                f"The server will be open to the network ({config.host}). Set"
                " LLAMACPP_HOST=127.0.0.1 to keep it to this machine.",
                Level.WARNING,
            )
        item: Launched | _NotLaunched = _NotLaunched()
        try:
            with self._launching:
                if remote_machines(config):  # they answer one client at a time
                    with suppress(KittyError, OSError):  # the launch says what is wrong
                        self._devices = await self._list_devices()
                engine = await locate_engine(config.binary)
                self._recorder.set_engine(engine)
                item = await launch(config, engine, self.api_key, self._began, self._notify)
        except (KittyError, OSError) as error:
            item = _NotLaunched(error)
        self._send(item)

    async def _adopt(self) -> None:
        assert self._record  # noqa: S101 (it was found)
        process = ServerProcess.attach(self._record.pid, self._record.create_time)
        if process is None:
            self._send(_NotLaunched())
            return
        self._notify(f"Found a running server (PID {process.pid}).")
        if self._record.ready is None:
            self._meter.measure(Usage(0, 0), 0.0)  # what it has loaded so far counts
        ends_with_kernel = self._config.on_kernel_exit is OnKernelExit.STOP
        sidecar = start_sidecar(self._config, process, self._record) if ends_with_kernel else None
        self._send(Launched(process, self._record, sidecar))

    async def _refuse(self, error: KittyError | OSError | None) -> None:
        """Report that there is no process."""
        if error is None:
            self._exited("It exited before kitty_nb could supervise it.", asked=True)
            return
        self._outcome = Outcome.FAILED
        cause = (
            diagnose_launch(error, self._config.log_dir) if isinstance(error, OSError) else error
        )
        refused = lifecycle.Refused(self._generation, str(cause))
        if not await anyio.to_thread.run_sync(find_server, self._config):
            note_failure(self._config, refused.reason)
        if isinstance(error, PortBusyError):
            refused = replace(refused, free_port=error.free_port, attachable=error.attachable)
        self._over = True
        self._emit(refused)

    def _watch(self, launched: Launched) -> None:
        self._process, self._record, self._sidecar = launched
        self.probe.process = self._process
        self._log = LogTail(self._config.log_path)
        self._meter.enter_stage(Stage.STARTING, self._elapsed())
        self._emit(lifecycle.Spawned(self._generation, self._process.pid))
        self._tasks.start_soon(self._wait, self._process)
        for task in (self._ask_health, self._tend_sidecar, self._name_devices):
            self._tasks.start_soon(task)
        if self._launching.cancel_called:  # too late to be called off
            self._end(force=True)

    # The load

    @property
    def _loads(self) -> bool:
        return not self.was_ready and self._failure is None

    async def _forecast(self) -> None:
        """Learn how long the load should take."""
        if self._record is None or self._record.ready is None:
            await self._recorder.forecast()
            self._foreseen = True

    def _measure(self) -> float:
        """Measure the load and publish its progress; return the seconds until the next time."""
        elapsed = self._elapsed()
        usage = self._process.usage() if self._process else None
        if usage:
            # What a process had before it began to load does not count, so the log is read only
            # now: it tells of the beginning before the first byte is there.
            self._read_log()
            self._meter.measure(usage, elapsed)
        if self._process and elapsed - self._meter.moved_at > self._config.stall_seconds:
            self._give_up(self._stalled())
        pause = self._meter.pause(elapsed)
        self._emit(ProgressMade(self._meter.progress(elapsed, pause)))
        return pause

    def _read_log(self, *, to_end: bool = False) -> bool:
        """Publish the new lines, or a part of very many; say whether there were any."""
        lines = tuple(map(readable, self._log.read(to_end=to_end))) if self._log else ()
        if not lines:
            return False
        self._lines.extend(lines)
        self._meter.heartbeat(self._elapsed())
        if self._meter.stage is Stage.STARTING and any(map(_LOADING.search, lines)):
            self._meter.enter_stage(Stage.LOADING, self._elapsed())
            self._tasks.start_soon(self.probe.find_listener)  # it is bound before that line
        self._emit(LogLines(lines))
        if not self.was_ready and any(map(_NEWS.search, lines)):
            self.probe.hint()
        return True

    def _stalled(self) -> str:
        answer = self._health
        hint = f" Last health check: {answer.message}." if answer.latency is not None else ""
        return (
            f"The load stalled in the stage '{self._meter.stage.label}': for"
            f" {self._config.stall_seconds:.0f} s the server used no CPU time, read nothing, logged"
            f" nothing, and its health checks did not change.{hint} See the end of its log. If it"
            " was only slow, raise LLAMACPP_STALL_SECONDS."
        )

    # Health

    async def _ask_health(self) -> None:
        """Ask how it is until it is ready, and more rarely from then on."""
        pause = _ASK_FIRST
        async with anyio.create_task_group() as self._asking:
            while (result := await self._check(self._asking)).status is not ServerStatus.READY:
                self._send(result)
                second = _ASK_LONGEST - self._elapsed() % _ASK_LONGEST
                hinted = await self.probe.hinted(within=min(pause, second))
                pause = _ASK_FIRST if hinted else min(pause * _ASK_FACTOR, _ASK_LONGEST)
            self._send(result)
            while True:
                self._send(await self.probe.check_activity())
                await anyio.sleep(_ASK_READY)

    async def _check(self, tasks: TaskGroup) -> HealthCheckResult:
        """Ask once. Ready is believed of our own server, and once it has answered a request."""
        result = await self.probe.check()
        if result.status is not ServerStatus.READY:
            return result
        if self._answered is None:
            if doubt := await self._verify_identity():
                return replace(result, status=ServerStatus.STARTING, message=doubt)
            self._answered = anyio.Event()
            tasks.start_soon(self._prove, self._answered)
            with anyio.move_on_after(_AT_ONCE):
                await self._answered.wait()
        if self._answered.is_set():
            return result
        return replace(result, status=ServerStatus.LOADING, message=FIRST_ANSWER)

    async def _verify_identity(self) -> str | None:
        """Why what answers on our port is not our server, in words; None when it is."""
        if not await self.probe.find_listener():
            owner = await self._port_owner()
            who = owner.who if owner else "another server"
            return f"port {self._config.port} is now in use by {who}"
        match await self.probe.identify():
            case Identity.KEY_REFUSED:
                self._send(_Hopeless(_KEY_REFUSED))
                return "it rejects our API key"
            case Identity.OTHER_MODEL:
                name = self._config.served_alias
                return f"it answers, but not as {name}: something overrides --alias"
        return None

    async def _prove(self, answered: anyio.Event) -> None:
        """See whether the server answers a request; where that fails, it is hopeless."""
        if self._record is None or self._record.ready is None:
            said = await self.probe.first_answer()
            if said:
                self._send(_Hopeless(str(diagnose_first_answer(said, tuple(self._lines)))))
                return
        answered.set()
        self.probe.hint()

    def _note_health(self, result: HealthCheckResult) -> None:
        before, self._health, elapsed = self._health, result, self._elapsed()
        if result.latency is not None:
            self._oom_kills.append(oom_kills())
        if self.was_ready:
            news = self._reporter.serving(result)
        else:
            if result.status is not before.status:
                self._meter.heartbeat(elapsed)
                elapsed = self._enter(result.status, elapsed)
            news = self._reporter.loading(result, elapsed)
        self._emit(result)
        if news and not self._being_ended():
            for event in news:
                self._emit(event)

    def _enter(self, status: ServerStatus, elapsed: float) -> float:
        """Act on another status; return what the load has taken by then, in seconds."""
        if status is ServerStatus.LOADING:
            self._meter.enter_stage(Stage.LOADING, elapsed)
            self._emit(lifecycle.LoadBegan(self._generation))
            self._tasks.start_soon(self.probe.find_listener)
        elif status is ServerStatus.READY:
            self.was_ready = True
            since, elapsed = self._note_ready(elapsed)
            self._meter.enter_stage(Stage.READY, elapsed)
            self._emit(lifecycle.BecameReady(self._generation, since))
            self._emit(ProgressMade(self._meter.progress(elapsed)))
            if usage := self._process.usage() if self._process else None:
                self._meter.measure(usage, elapsed)  # what came since the last look counts
            self._tasks.start_soon(self._recorder.record, elapsed, Outcome.READY)
        return elapsed

    def _note_ready(self, elapsed: float) -> tuple[float, float]:
        """Return since when it is ready, by the monotonic clock, and what the load took."""
        now, record = self._clock(), self._record
        if record and record.ready is not None and record.load_seconds is not None:
            return record.ready, record.load_seconds
        # Withdrawn, it must not come back: the server is being ended just as it becomes ready.
        if record and not self._being_ended():
            self._record = record.model_copy(update={"ready": now, "load_seconds": elapsed})
            try:
                write_record(self._record)
            except OSError as error:
                self._notify(
                    f"Can't write to {self._config.log_dir} ({error.strerror}), so other kernels"
                    " cannot tell how long this server has been ready. Free some space or fix the"
                    " folder's permissions.",
                    Level.WARNING,
                )
        return now, elapsed

    # Beside the server

    async def _name_devices(self) -> None:
        """Learn which devices the server uses. Its load does not wait for that."""
        if self._record is None or self._record.devices is not None:
            return
        with suppress(KittyError, OSError):  # people can do without
            devices = await self._list_devices() if self._devices is None else self._devices
            self._record = self._record.model_copy(update={"devices": devices})
            if not self._found and not self._being_ended():
                write_record(self._record)

    async def _list_devices(self) -> tuple[str, ...] | None:
        if not await anyio.to_thread.run_sync(offloads, self._config):
            return ()
        return await device_names(self._config)

    async def _tend_sidecar(self) -> None:
        """Have a sidecar, unless another program has one; replace one that was killed."""
        if self._found:
            await anyio.sleep(max(0.0, _SIDECAR_THERE_WITHIN - self._elapsed()))
        else:
            await anyio.sleep(_SIDECAR_AFTER)
            self._start_sidecar()
            await anyio.sleep(_SIDECAR_THERE_WITHIN)
        while True:
            if not has_sidecar(self._config.log_path):
                self._start_sidecar()
            await anyio.sleep(_SIDECAR_THERE_WITHIN)

    def _start_sidecar(self) -> None:
        if self._process is None or self._record is None or (self._sidecar and self._sidecar.runs):
            return
        with suppress(OSError):  # the next look tries again
            self._sidecar = start_sidecar(self._config, self._process, self._record)

    # The end

    def _end(self, *, force: bool) -> None:
        if self._outcome is Outcome.CRASHED:
            self._outcome = Outcome.STOPPED
        if self._process is None:
            self._launching.cancel()
            return
        withdraw_record(self._config, self._process.pid, self._process.create_time)
        if self._asking:  # hang up: some builds wait for those who still ask before they end
            self._asking.cancel_scope.cancel()
        self._tasks.start_soon(self._signal, self._process, force)

    async def _signal(self, process: ServerProcess, force: bool) -> None:
        await anyio.lowlevel.checkpoint()  # the connection is closed before the signal is sent
        if force:
            process.kill()
        else:
            await process.terminate(self._config.stop_grace_seconds)

    async def _wait(self, process: ServerProcess) -> None:
        self._send(_Ended(await process.wait()))

    async def _finish(self, code: int | None) -> None:
        """Read the log to its end and report why the process ended."""
        while self._read_log():
            await anyio.lowlevel.checkpoint()
        self._read_log(to_end=True)
        asked = self._being_ended()
        if asked and self._outcome is Outcome.CRASHED:
            self._outcome = Outcome.STOPPED
        kills, before = oom_kills(), self._oom_kills[0]
        out_of_memory = None if kills is None else kills != before
        diagnosis = diagnose(code, tuple(self._lines), out_of_memory=out_of_memory)
        model = self._config.model
        if diagnosis.blames_model and model:
            cause = await anyio.to_thread.run_sync(why_not_served, model)
            if cause:
                diagnosis = replace(diagnosis, cause=cause, remedy="", repeats=True)
        reason = str(diagnosis)
        if diagnosis.of_port and (owner := await self._port_owner()):
            reason = f"{reason} {owner.sentence}"
        self._exited(reason, asked=asked, repeats=diagnosis.repeats)
        with suppress(OSError):
            withdrawn_path(record_path(self._config)).unlink()

    async def _port_owner(self) -> PortOwner | None:
        return await anyio.to_thread.run_sync(owner_of, self._config.host, self._config.port)

    async def _kill(self) -> None:
        """Let no process run that nothing watches, unless others may watch it."""
        if self._process is None or self._found:
            return
        with anyio.CancelScope(shield=True):
            self._process.kill()
            await self._process.wait()
        withdraw_record(self._config, self._process.pid, self._process.create_time)
        self._over = True

    def _being_ended(self) -> bool:
        """True if this program or another one is ending the server, or has ended it."""
        process = self._process
        return process is not None and was_stopped(self._config, process.pid, process.create_time)

    def _give_up(self, reason: str) -> None:
        self._outcome, self._failure = Outcome.FAILED, reason
        self._emit(lifecycle.GaveUp(self._generation, reason))

    def _exited(self, reason: str, *, asked: bool, repeats: bool = False) -> None:
        failure = self._failure or (None if asked else reason)
        if failure and not (self._found and last_failure(self._config)):
            note_failure(self._config, failure)
        self._over = True
        self._emit(lifecycle.Exited(self._generation, reason, self._clock(), repeats, asked))

    def _elapsed(self) -> float:
        return self._clock() - self._began

    def _notify(self, message: str, level: Level = Level.INFO) -> None:
        self._emit(Activity.now(message, level))
