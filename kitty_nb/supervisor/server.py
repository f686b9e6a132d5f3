"""One generation of a server: a coroutine, from the launch of its process to its exit."""

from __future__ import annotations

import math
import platform
import re
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import anyio
import anyio.lowlevel
from anyio.to_thread import run_sync

from kitty_nb.catalog.catalog import why_not_served
from kitty_nb.config import OnKernelExit, ServerConfig, server_environment
from kitty_nb.engine import command_line
from kitty_nb.engine.devices import device_names, remote_machines
from kitty_nb.engine.locate import Engine, locate_engine
from kitty_nb.engine.rpc import by_host
from kitty_nb.errors import KittyError, PortBusyError, ServerFailedError
from kitty_nb.safe_files import write_atomic
from kitty_nb.supervisor import lifecycle, registry
from kitty_nb.supervisor.diagnosis import (
    diagnose,
    diagnose_first_answer,
    diagnose_launch,
    failed_by_itself,
)
from kitty_nb.supervisor.events import (
    Activity,
    HealthCheckResult,
    Level,
    LogLines,
    ProgressMade,
    RequestFinished,
    Restored,
    ServerStatus,
    Stage,
    Working,
)
from kitty_nb.supervisor.forecast import offloads
from kitty_nb.supervisor.health import FIRST_ANSWER, HealthProbe, HealthReporter, Identity
from kitty_nb.supervisor.history import LoadRecorder, Outcome
from kitty_nb.supervisor.kept_prompts import PromptStore, state_facts
from kitty_nb.supervisor.load_progress import LoadMeter
from kitty_nb.supervisor.log import LogTail, last_written, readable, rotate
from kitty_nb.supervisor.port_owner import (
    PortOwner,
    await_release,
    keep_ports,
    owner_of,
    refuse_busy_port,
)
from kitty_nb.supervisor.process import ServerProcess, oom_kills
from kitty_nb.supervisor.prompt_keeper import PromptKeeper
from kitty_nb.supervisor.requests import RequestLog, WorkMeter
from kitty_nb.supervisor.router import RouterModels
from kitty_nb.supervisor.router_program import (
    LlamaServer,
    RouterApi,
    pinned_profiles,
    router_api,
    router_command,
)
from kitty_nb.supervisor.sidecar import Sidecar, has_sidecar

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup
    from pydantic import SecretStr


# Seconds between two reads of the log. Each costs CPU time: of a load, a fiftieth of its time.
_LOG_LOADING, _LOG_READY = 0.01, 0.1
_LOG_PINNED = 0.03  # pinned models must be used before the next request
# Seconds. The log announces READY first, so a hint in it triggers a check. Otherwise each pause is
# so many times the last one, with a check at each whole second of a load.
_ASK_FIRST, _ASK_FACTOR, _ASK_LONGEST, _ASK_READY = 0.01, 4, 1.0, 2.0
# Seconds, while requests are processed. Reading the slots costs the server a moment.
_WORK_SHOWN, _SLOTS_ASKED = 0.25, 0.5
_AT_ONCE = 0.3  # seconds; a first answer within this time is not reported
# Seconds. Started together, a server and its sidecar would slow each other down, and a server
# that exits at once needs none.
_SIDECAR_AFTER = 1.0
_SIDECAR_THERE_WITHIN = 10.0  # on a busy machine too
_LOADING = re.compile(r"loading model")
_NEWS = re.compile(r"loading model|model loaded|listening on")
_RPC_HOSTS = 2
_LINES_KEPT = 2_000  # builds of 2024 print their whole usage after a bad flag
_KEY_REFUSED = (
    "The server rejects the API key it was started with: something sets another key. Remove that"
    " from LLAMACPP_EXTRA_ARGS (--api-key-file) or from the script that LLAMACPP_BIN names, and"
    " set LLAMACPP_API_KEY instead."
)


class Server:
    """One process, from its launch or adoption to its exit.

    Args:
        generation: The number that its reports carry.
        config: The settings to start it with.
        api_key: The key that the server is to require of clients.
        emit: Called with each event, report and answer to a health check.
        found: The server to watch, if another program or kernel started it.
        crashes: How many crashes in a row this start follows.
        clock: Seconds.
        processes: Spawns its process, or attaches to it.
    """

    owner: ClassVar[None] = None  # it is ours

    def __init__(
        self,
        generation: int,
        config: ServerConfig,
        api_key: SecretStr | None,
        emit: lifecycle.Emit,
        found: registry.ServerRecord | None,
        *,
        crashes: int = 0,
        clock: Callable[[], float],
        processes: type[ServerProcess],
    ) -> None:
        self.api_key = found.api_key if found else api_key
        self.probe = HealthProbe(config, self.api_key, on_slots=self._look_at_slots)
        self.was_ready = False
        self._generation, self._config, self._emit = generation, config, emit
        self._clock, self._processes = clock, processes
        self._tasks: TaskGroup
        self._launching, self._locked = anyio.CancelScope(), True
        self._crashes = crashes
        self._asking: TaskGroup | None = None
        # The process.
        self._record, self._found = found, found is not None
        self._found_ready = found is not None and found.ready is not None
        self._process: ServerProcess | None = None
        self._kept_ports = range(0)  # of a router's servers
        self._sidecar: Sidecar | None = None
        self._log: LogTail | None = None
        self.lines: deque[str] = deque(maxlen=_LINES_KEPT)
        # At the last two answers: a kill between an answer and the exit was this server's.
        self._oom_kills = deque([oom_kills()], maxlen=2)
        self._failure: str | None = None
        self._stopping = self._ended = self._log_fails = False
        # The load.
        self._began = found.began if found else clock()
        self._meter, self._foreseen = LoadMeter(), False
        warn = partial(self._notify, level=Level.WARNING)
        routes = config.models is not None
        whole = found is None and not routes  # a router loads nothing itself
        self._recorder = LoadRecorder(config, self._meter, warn, whole=whole)
        self._reporter = HealthReporter(
            config.health_max_attempts, routes=routes, silent=self._found_ready
        )
        self._health = HealthCheckResult(ServerStatus.STARTING)
        self._answered: anyio.Event | None = None  # set by the answer to its first request
        # Its work, once it is ready.
        self.work = WorkMeter(RequestLog(), config.batch_size, routes=routes)
        ready = found.ready if found else None
        self.work.log.ready = math.inf if ready is None else ready
        self._worked = anyio.Event()
        self.router: RouterModels | None = None  # once it is ready
        self._router_api: RouterApi | None = None
        self.prompts: PromptKeeper | None = None  # if they are kept, once that is known

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices other than the CPU that hold the model, as far as known yet."""
        return (self._record and self._record.devices) or ()

    def stop(self, force: bool) -> None:
        """Stop the process, or cancel the launch if there is none yet."""
        if self._process is None:
            self._launching.cancel()
        elif not self._ended:
            self._stopping = True
            registry.withdraw_record(self._config, self._process)
            if self._asking:  # hang up: some builds finish open requests before they exit
                self._asking.cancel_scope.cancel()
            if self.prompts:
                self.prompts.hang_up()
            self._tasks.start_soon(self._signal, self._process, force)

    async def run(self) -> None:
        """Supervise the process until it exits. If cancelled, leave the process to its sidecar."""
        refusal: KittyError | OSError | None = None  # stays None if the launch is cancelled
        try:
            async with anyio.create_task_group() as self._tasks:
                self._tasks.start_soon(self._measure_load)
                try:
                    with self._launching:
                        await (self._adopt() if self._found else self._launch())
                except (KittyError, OSError) as error:
                    refusal = error
                code = await self._watch(self._process) if self._process else None
                self._ended = True
                self._tasks.cancel_scope.cancel()
            outcome = await (self._finish(code) if self._process else self._refuse(refusal))
            await self._recorder.record(self._elapsed(), outcome)
            await self._recorder.set_prompt_pace(self.work.log.prompt_speed, self.work.log.rest)
        except Exception:
            await self._kill()
            raise
        finally:
            if self._log:
                self._log.close()
                self._log = None  # the probe may still get an answer
            if not self._ended:
                self._leave()
            with anyio.CancelScope(shield=True):
                if self.router:
                    await self.router.close()
                await self.probe.aclose()
                if self._ended and self._sidecar:
                    await self._sidecar.ended()

    # Launch

    async def _adopt(self) -> None:
        assert self._record  # noqa: S101 (it was found)
        self._process = self._processes.attach(self._record.pid, self._record.create_time)
        if self._process is None:
            return
        seconds = self._record.load_seconds if self._config.models is None else None
        took = "" if seconds is None else f", whose model loaded in {seconds:.0f} s"
        self._notify(f"Found a running server (PID {self._process.pid}){took}.")
        if self._record.prompts is not None:
            self._make_keeper(self._record.prompts)
        if self._guards:
            self._start_sidecar()

    async def _launch(self) -> None:
        """Start the profile's server, unless it runs elsewhere; if this fails, leave no process."""
        config, devices = self._config, None
        self._notify("Server starting…")
        if not config.local_only:
            self._notify(
                f"The server will be open to the network ({config.host}). Set"
                " LLAMACPP_HOST=127.0.0.1 to keep it to this machine.",
                Level.WARNING,
            )
        if remote_machines(config):  # they answer one client at a time
            with suppress(KittyError, OSError):  # the launch reports what is wrong
                devices = await self._list_devices()
        engine = await locate_engine(config.binary)
        self._recorder.set_engine(engine)
        with registry.profile_lock(config) as self._locked:
            while self._locked and await run_sync(registry.may_show_soon, config):  # noqa: ASYNC110
                await anyio.sleep(_LOG_READY)
            if owner := await run_sync(registry.who_owns, config, self._locked):
                raise ServerFailedError(owner)
            if (last := registry.read_record(config)) and last.host != platform.node():
                self._notify(f"This profile's server on {last.host} no longer runs.")
            await self._end_previous()
            prompts = await self._prompt_facts(engine)
            if config.models is None:
                command = command_line.build_command(
                    engine, config, None if prompts is None else config.prompts_dir
                )
            else:
                command = await self._router_command(engine)
            self._warn_of_build(engine)
            await await_release(config.host, config.port)
            await run_sync(refuse_busy_port, config)
            # A cancellation during the thread's work is delivered only here.
            await anyio.lowlevel.checkpoint_if_cancelled()
            rotate(config.log_path, config.log_keep)
            await self._start_process(command, devices, prompts)
        if prompts is not None:
            self._tasks.start_soon(self._make_keeper(prompts).look)

    async def _end_previous(self) -> None:
        """Wait for the server that is being stopped; end it if whoever stops it does not."""
        leaving = registry.withdrawn_record(self._config)
        if not (leaving and (process := registry.process_of(leaving))):
            return
        self._notify(f"Waiting for the previous server (PID {leaving.pid}) to exit.")
        grace = self._config.stop_grace_seconds
        saves = leaving.prompts is not None
        if not (saves and await process.exited(grace)):
            await process.terminate(grace)

    async def _router_command(self, engine: Engine) -> tuple[str, ...]:
        plan = await router_command(self._config, engine)
        write_atomic(plan.path, plan.text.encode())
        self._kept_ports = plan.ports
        if plan.by_llama_swap:
            self._notify(
                f"This build of llama-server ({engine.version}) has no router, so llama-swap serves"
                " the profiles."
            )
        for note in plan.notes:
            self._notify(note, Level.WARNING)
        return plan.command

    def _warn_of_build(self, engine: Engine) -> None:
        if command_line.leaves_out_projector(engine, self._config):
            self._notify(
                f"This build of llama-server ({engine.version}) has no --mmproj, so the model"
                " accepts only text. For images and audio, update llama.cpp."
            )
        if len(self._config.rpc_hosts) > _RPC_HOSTS:
            self._notify(
                f"With more than {_RPC_HOSTS} RPC hosts, llama-server has been seen to deadlock. If"
                " it stops answering, remove some from LLAMACPP_RPC_HOSTS.",
                Level.WARNING,
            )
        if command_line.open_to_pages(engine, self._config):
            self._notify(
                f"The server has no API key, and this build of llama-server ({engine.version}) has"
                f" no {command_line.ORIGINS}: any web page that you open can use the model."
                " Remove LLAMACPP_API_KEY=none, or update llama.cpp."
            )

    async def _start_process(
        self,
        command: tuple[str, ...],
        devices: tuple[str, ...] | None,
        prompts: dict[str, str] | None,
    ) -> None:
        """Start the process, guarded or announced, so that a killed kernel leaves no orphan."""
        config = self._config
        record = registry.ServerRecord(
            began=self._began,
            api_key=self.api_key,
            crashes=self._crashes,
            idle_seconds=self._idle_seconds(command),
            devices=devices,
            prompts=prompts,
            config=config,
        )
        try:
            if self._guards:
                self._start_sidecar()
            else:
                registry.write_record(record)  # found by its mark if we are killed now
            sidecar = self._sidecar
            mark = sidecar.environment if sidecar else registry.mark_of(record)
            environment = server_environment(self.api_key) | mark
            if config.models is not None:  # else it would also serve what llama.cpp has downloaded
                environment["LLAMA_CACHE"] = str(config.log_dir / "no models here")
            with keep_ports(self._kept_ports) as descriptors:
                self._process = self._processes.spawn(
                    command, config.log_path, environment, descriptors
                )
            if sidecar:
                sidecar.watch(self._process, record.idle_seconds)
            self._record = record.of(self._process)
            registry.write_record(self._record)
        except BaseException as error:
            if isinstance(error, KittyError | OSError):
                # First: without it, others that watch take a missing record for a stop.
                registry.note_failure(config, str(error))
            with suppress(OSError):
                registry.record_path(config).unlink(missing_ok=True)
            await self._kill()
            self._process = None
            raise

    def _idle_seconds(self, command: tuple[str, ...]) -> int:
        """Return the seconds after which the sidecar stops an unused server; 0 for never.

        A server that frees an idle model itself is not stopped.
        """
        by_itself = command_line.sleeps(command) or self._config.models is not None
        return 0 if by_itself else self._config.idle_shutdown_seconds or 0

    async def _refuse(self, error: KittyError | OSError | None) -> Outcome:
        """Report that there is no process."""
        if error is None:
            return self._exited("It exited before kitty_nb could supervise it.", asked=True)
        config = self._config
        cause = diagnose_launch(error, config.log_dir) if isinstance(error, OSError) else error
        refused = lifecycle.Refused(self._generation, str(cause))
        if not await run_sync(registry.who_owns, config, self._locked):
            registry.note_failure(config, refused.reason)
        elif not await run_sync(registry.served_elsewhere, config):  # it can be found here
            refused = replace(refused, elsewhere_at=self._clock())
        if isinstance(error, PortBusyError):
            refused = replace(refused, free_port=error.free_port, attachable=error.attachable)
        self._emit(refused)
        return Outcome.FAILED

    async def _watch(self, process: ServerProcess) -> int | None:
        """Watch the process until it exits; return its exit code, if the system knows it."""
        self.probe.process = process
        self._log = LogTail(self._config.log_path)
        self._date_log(process)
        self._meter.enter_stage(Stage.STARTING, self._elapsed())
        self._emit(lifecycle.Spawned(self._generation, process.pid))
        for task in (self._follow_log, self._ask_health, self._tend_sidecar, self._name_devices):
            self._tasks.start_soon(task)
        if self._launching.cancel_called:  # the launch finished before it could be cancelled
            self.stop(force=not self._found)
        return await process.wait()

    # The load

    async def _measure_load(self) -> None:
        """Measure the load, and publish its progress once there is an estimate of its duration.

        What the process has before its load begins must be measured, however long the estimate
        takes.
        """
        if self._found_ready:
            return
        self._tasks.start_soon(self._foresee)
        while not self.was_ready and self._failure is None:  # noqa: ASYNC110 (nothing tells)
            await anyio.sleep(self._measure())

    async def _foresee(self) -> None:
        await self._recorder.forecast()
        self._foreseen = True
        self.work.log.prompt_speed, self.work.log.rest = await self._recorder.prompt_pace()

    def _measure(self) -> float:
        """Measure the load; return the seconds until the next time."""
        elapsed = self._elapsed()
        usage = self._process.usage() if self._process else None
        if usage:
            # Bytes from before the load do not count, so the log, which announces the load before
            # its first byte, is read only now.
            self._read_log()
            self._meter.measure(usage, elapsed)
        if self._process and elapsed - self._meter.moved_at > self._config.stall_seconds:
            self._give_up(self._stalled())
        pause = self._meter.pause(elapsed)
        if self._foreseen:
            self._emit(ProgressMade(self._meter.progress(elapsed, pause)))
        return pause

    async def _follow_log(self) -> None:
        while True:
            self._read_log()
            ready = _LOG_PINNED if self.router and self.router.pinned else _LOG_READY
            pause = ready if self.was_ready else self._elapsed() / 50
            await anyio.sleep(min(max(pause, _LOG_LOADING), _LOG_READY))

    def _date_log(self, process: ServerProcess) -> None:
        """Date the log's lines. A process ages while the machine sleeps; its clock stands still."""
        began = self._clock() - process.age
        slept = began < self._began  # it is older than its start
        lines, age = last_written(self._config.log_path, _LINES_KEPT) if slept else ((), 0.0)
        self.work.log.dated(began, lines, self._clock() - age)

    def _read_log(self, *, to_end: bool = False) -> bool:
        """Publish new lines, at most one read of them; return whether there were any."""
        lines = tuple(map(readable, self._new_lines(to_end)))
        if not lines:
            self.work.log.read((), self._clock())
            return False
        self.lines.extend(lines)
        self._meter.heartbeat(self._elapsed())
        if self._meter.stage is Stage.STARTING and any(map(_LOADING.search, lines)):
            self._meter.enter_stage(Stage.LOADING, self._elapsed())
            if not self._ended:  # the port is bound before that line
                self._tasks.start_soon(self.probe.find_listener)
        self._emit(LogLines(lines))
        if self.router:
            self.router.read_log(lines)
        self._note_work(lines)
        if not self.was_ready and any(map(_NEWS.search, lines)):
            self.probe.hint()
        return True

    def _new_lines(self, to_end: bool) -> tuple[str, ...]:
        """Return what was added to the log; nothing if it can't be read, as on a lost drive."""
        try:
            return self._log.read(to_end=to_end) if self._log else ()
        except OSError as error:
            if not self._log_fails:
                path, why = self._config.log_path, error.strerror
                self._notify(
                    f"Can't read the log {path} ({why}). kitty_nb keeps trying.", Level.WARNING
                )
            self._log_fails = True
            return ()

    def _note_work(self, lines: tuple[str, ...]) -> None:
        self._note_effort()
        for request in self.work.log.read(lines, self._clock()):
            self._emit(RequestFinished(request))
        if self.work.busy:
            self._worked.set()

    def _note_effort(self) -> None:
        if self.was_ready and self._process and (usage := self._process.usage()):
            self.work.log.spent = usage.processor

    def _stalled(self) -> str:
        answer = self._health
        hint = f" Last health check: {answer.message}." if answer.latency is not None else ""
        return (
            f"The load stalled in the stage '{self._meter.stage}': for"
            f" {self._config.stall_seconds:.0f} s the server used no CPU time, read nothing, logged"
            f" nothing, and its health checks did not change.{hint} See the end of its log. If it"
            " was only slow, raise LLAMACPP_STALL_SECONDS."
        )

    # Health

    async def _ask_health(self) -> None:
        """Check health until the server is ready, and less often from then on."""
        pause = _ASK_FIRST
        async with anyio.create_task_group() as self._asking:
            while (result := await self._check(self._asking)).status is not ServerStatus.READY:
                self._note_health(result)
                second = _ASK_LONGEST - self._elapsed() % _ASK_LONGEST
                hinted = await self.probe.hinted(within=min(pause, second))
                pause = _ASK_FIRST if hinted else min(pause * _ASK_FACTOR, _ASK_LONGEST)
            self._note_health(result)
            self._asking.start_soon(self._show_work)
            self._asking.start_soon(self._ask_slots)
            while True:
                idle = self.work.log.heard and not self.work.busy
                result = await self.probe.check_activity(idle=idle)
                self._note_health(self.router.doubt(result) if self.router else result)
                await anyio.sleep(_ASK_READY)

    async def _show_work(self) -> None:
        """Publish the work: often while there is any, and once more when it is done."""
        while True:
            self._note_effort()
            self._emit(Working(self.work.work(self._clock())))
            if self.work.busy:
                await anyio.sleep(_WORK_SHOWN)
            else:
                self._worked = anyio.Event()
                await self._worked.wait()

    async def _ask_slots(self) -> None:
        """Look at the slots while there is work, so that an idle server may fall asleep."""
        while True:
            await anyio.sleep(_SLOTS_ASKED)
            if self.work.busy:
                await self.probe.look_at_slots()
            else:
                await self._worked.wait()

    def _look_at_slots(self, slots: list[dict[str, Any]], pace: float | None) -> None:
        """Process the answer of `/slots`; the log has any end of a request that it shows by now."""
        self._read_log()
        self.work.look(slots, pace, self._clock())
        if self.work.busy:
            self._worked.set()

    async def _check(self, tasks: TaskGroup) -> HealthCheckResult:
        """Check once. READY requires our own server, and an answer to a first request."""
        result = await self.probe.check()
        if result.status is not ServerStatus.READY:
            return result
        if self._answered is None:
            if doubt := await self._verify_identity(tasks):
                return replace(result, status=ServerStatus.STARTING, message=doubt)
            self._answered = anyio.Event()
            tasks.start_soon(self._prove, self._answered)
            with anyio.move_on_after(_AT_ONCE):
                await self._answered.wait()
        if self._answered.is_set():
            return result
        return replace(result, status=ServerStatus.LOADING, message=FIRST_ANSWER)

    async def _verify_identity(self, tasks: TaskGroup) -> str | None:
        """Return the reason to doubt that it is our server that answers; None if it is."""
        if not await self.probe.find_listener():
            owner = await self._port_owner()
            who = owner.who if owner else "another server"
            return f"port {self._config.port} is now in use by {who}"
        identity = await self.probe.identify()
        if identity is Identity.KEY_REFUSED:
            self._give_up(_KEY_REFUSED)
            return "it rejects our API key"
        if self._config.models is not None:
            self._router_api = await router_api(self.probe, tasks)
            return None if self._router_api else "it does not answer like a router"
        if identity is Identity.OTHER_MODEL:
            name = self._config.served_alias
            return f"it answers, but not as {name}: something overrides --alias"
        return None

    async def _prove(self, answered: anyio.Event) -> None:
        """Send a first request; give up on the server if that fails."""
        async with anyio.create_task_group() as tasks:
            if self.prompts:
                tasks.start_soon(self.prompts.prepare)
            if self._config.models is not None:
                await self._follow_router()
            elif not self._found_ready and (said := await self.probe.first_answer()):
                self._give_up(str(diagnose_first_answer(said, tuple(self.lines))))
                return
        if self.prompts and self._asking:
            if not self._found:
                await self._asking.start(self.prompts.restore)
            self._asking.start_soon(self.prompts.tend)
        answered.set()
        self.probe.hint()

    async def _follow_router(self) -> None:
        """Follow the loads of its models from now on."""
        assert self._process  # noqa: S101 (it has answered)
        assert self._asking  # noqa: S101
        assert self._router_api  # noqa: S101
        pid, api = self._process.pid, self._router_api
        # llama-swap keeps them loaded by itself.
        mine = isinstance(api, LlamaServer)
        pinned = await run_sync(pinned_profiles, self._config) if mine else ()
        self.router = RouterModels(
            pid, f"(PID {pid})", self._config, api, self._emit, pinned, self._read_log
        )
        await self.router.watch(self._asking)

    def _note_health(self, result: HealthCheckResult) -> None:
        before, self._health, elapsed = self._health, result, self._elapsed()
        self._emit(result)  # first: whoever is told of a new status finds the answer behind it
        if result.latency is not None:
            self._oom_kills.append(oom_kills())
        if self.was_ready:
            news = self._reporter.serving_news(before, result)
        else:
            if result.status is not before.status:
                self._meter.heartbeat(elapsed)
                elapsed = self._enter(result.status, elapsed)
            news = self._reporter.load_news(result, elapsed)
        if news and not self._being_ended():
            for event in news:
                self._emit(event)

    def _enter(self, status: ServerStatus, elapsed: float) -> float:
        """React to a changed status; return the seconds that the load has taken."""
        if status is ServerStatus.LOADING:
            self._meter.enter_stage(Stage.LOADING, elapsed)
            self._emit(lifecycle.LoadBegan(self._generation))
            self._tasks.start_soon(self.probe.find_listener)
        elif status is ServerStatus.READY:
            self.was_ready = True
            since, elapsed = self._note_ready(elapsed)
            self.work.log.ready = since
            self._meter.enter_stage(Stage.READY, elapsed)
            self._emit(lifecycle.BecameReady(self._generation, since))
            self._emit(ProgressMade(self._meter.progress(elapsed)))
            if usage := self._process.usage() if self._process else None:
                self._meter.measure(usage, elapsed)  # bytes since the last measurement count
            self._tasks.start_soon(self._recorder.record, elapsed, Outcome.READY)
        return elapsed

    def _note_ready(self, elapsed: float) -> tuple[float, float]:
        """Return when it became ready, on the monotonic clock, and the seconds the load took."""
        now, record = self._clock(), self._record
        if record and record.ready is not None and record.load_seconds is not None:
            return record.ready, record.load_seconds
        # A server that is stopped just as it becomes ready must not get its record back.
        if record and not self._being_ended():
            self._record = record.model_copy(
                update={"ready": now, "ready_at": time.time(), "load_seconds": elapsed}
            )
            try:
                registry.complete_record(self._record)
            except OSError as error:
                self._notify(
                    f"Can't write to {self._config.log_dir} ({error.strerror}), so other kernels"
                    " cannot tell how long this server has been ready. Free some space or fix the"
                    " folder's permissions.",
                    Level.WARNING,
                )
        return now, elapsed

    # Its prompts

    async def _prompt_facts(self, engine: Engine) -> dict[str, str] | None:
        """Return what kept prompts depend on; None if none are kept, or there is no folder."""
        if not command_line.keeps_prompts(engine, self._config):
            return None
        try:
            problem = await run_sync(PromptStore.of(self._config).prepare)
        except OSError as error:
            problem = f"Can't create {self._config.prompts_dir} ({error.strerror})."
        if problem:
            self._notify(
                f"{problem} Prompts are not kept. Set LLAMACPP_LOG_DIR to a folder that only you"
                " can write to, or LLAMACPP_KEEP_PROMPTS=off.",
                Level.WARNING,
            )
            return None
        return await run_sync(state_facts, self._config, engine)

    def _make_keeper(self, facts: dict[str, str]) -> PromptKeeper:
        self.prompts = PromptKeeper(
            self._config,
            facts,
            self.probe,
            self.work.log,
            self._notify,
            self._tell_restored,
            self._clock,
        )
        return self.prompts

    def _tell_restored(self, restored: Restored) -> None:
        self.work.note_restored(restored, self._clock())
        self._worked.set()

    # Beside the server

    async def _name_devices(self) -> None:
        """Find out which devices the server uses, while it loads."""
        if self._record is None or self._record.devices is not None:
            return
        with suppress(KittyError, OSError):  # the names are optional
            devices = await self._list_devices()
            self._record = self._record.model_copy(update={"devices": devices})
            if not self._found and not self._being_ended():
                registry.complete_record(self._record)

    async def _list_devices(self) -> tuple[str, ...] | None:
        engine = await locate_engine(self._config.binary)
        if not await run_sync(offloads, self._config, engine):
            return ()
        return await device_names(self._config)

    async def _tend_sidecar(self) -> None:
        """Start a sidecar unless another program has one; replace one that was killed."""
        if not self._found:
            await anyio.sleep(_SIDECAR_AFTER)
            with suppress(OSError):  # tried again below
                self._start_sidecar()
        while True:
            await anyio.sleep(_SIDECAR_THERE_WITHIN)
            if not has_sidecar(self._config.log_path):
                with suppress(OSError):
                    self._start_sidecar()

    def _start_sidecar(self) -> None:
        """Start the sidecar, unless one runs; it watches the server if that runs already.

        Raises:
            OSError: It cannot be started.
        """
        if self._sidecar:
            if self._sidecar.runs:
                return
            self._sidecar.close()
        path = registry.record_path(self._config)
        self._sidecar = Sidecar(self._config, path, guards=self._guards)
        if self._process and self._record:
            self._sidecar.watch(self._process, self._record.idle_seconds)

    @property
    def _guards(self) -> bool:
        return self._config.on_kernel_exit is OnKernelExit.STOP

    # The end

    async def _signal(self, process: ServerProcess, force: bool) -> None:
        await anyio.lowlevel.checkpoint()  # the connection is closed before the signal is sent
        if force:
            process.kill()
            return
        grace = self._config.stop_grace_seconds
        if self.prompts and self.was_ready and not self._health.asleep:
            self._read_log()
            with anyio.move_on_after(grace):
                await self.prompts.save()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.terminate, grace)
            if self.prompts:
                await self.prompts.settle()

    async def _finish(self, code: int | None) -> Outcome:
        """Read the log to its end and report why the process exited."""
        while self._read_log():
            await anyio.lowlevel.checkpoint()
        self._read_log(to_end=True)
        if self.prompts:
            await self.prompts.settle()
        asked = self._being_ended()
        if self.prompts and failed_by_itself(code) and not asked:
            await self.prompts.blame()
        kills, before = oom_kills(), self._oom_kills[0]
        out_of_memory = None if kills is None else kills != before
        diagnosis = diagnose(code, tuple(self.lines), out_of_memory=out_of_memory)
        model = self._config.model
        if diagnosis.blames_model and model:
            cause = await run_sync(why_not_served, model)
            if cause:
                diagnosis = replace(diagnosis, cause=cause, remedy="", repeats=True)
        reason = by_host("\n".join((*self.lines, str(diagnosis)))).rpartition("\n")[2]
        if diagnosis.of_port and (owner := await self._port_owner()):
            reason = f"{reason} {owner.sentence}"
        outcome = self._exited(reason, asked=asked, repeats=diagnosis.repeats)
        if self._process:
            registry.forget_withdrawn(self._config, self._process)
        return outcome

    def _leave(self) -> None:
        """Leave the process to its sidecar; both run on unwatched."""
        if self._process:
            if not self._found and self._process.runs():
                with suppress(OSError):
                    self._start_sidecar()
            self._process.leave()
        if self._sidecar:
            self._sidecar.leave()

    async def _port_owner(self) -> PortOwner | None:
        return await run_sync(owner_of, self._config.host, self._config.port)

    async def _kill(self) -> None:
        """Kill our process if supervision failed; one that was found may be watched elsewhere."""
        if self._found:
            return
        if self._process:
            with anyio.CancelScope(shield=True):
                self._process.kill()
                await self._process.wait()
            registry.withdraw_record(self._config, self._process)
        self._ended = True

    def _being_ended(self) -> bool:
        """True if this program or another one is stopping the server, or has stopped it."""
        if self._process is None or self._stopping:
            return self._stopping
        return registry.was_stopped(self._config, self._process)

    def _give_up(self, reason: str) -> None:
        if not self._being_ended():
            self._failure = reason
            self._emit(lifecycle.GaveUp(self._generation, reason))

    def _exited(self, reason: str, *, asked: bool, repeats: bool = False) -> Outcome:
        """Report the exit of the process; return the outcome of a load that it cut short."""
        failure = self._failure or (None if asked else reason)
        if failure and not (self._found and registry.last_failure(self._config)):
            registry.note_failure(self._config, failure)
        self._emit(lifecycle.Exited(self._generation, reason, self._clock(), repeats, asked))
        if self._failure:
            return Outcome.FAILED
        return Outcome.STOPPED if asked else Outcome.CRASHED

    def _elapsed(self) -> float:
        return self._clock() - self._began

    def _notify(self, message: str, level: Level = Level.INFO) -> None:
        self._emit(Activity.now(message, level))
