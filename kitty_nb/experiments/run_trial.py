"""One trial, from its settings to its row: its own server, warmed up, measured and stopped."""

from __future__ import annotations

import socket
import sys
import time
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import httpx
import psutil

from kitty_nb.client import Access
from kitty_nb.config import OnKernelExit
from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import ExperimentError, KittyError, PortBusyError
from kitty_nb.experiments.events import RequestAnswered, TrialProgressed
from kitty_nb.experiments.measure import Interview
from kitty_nb.experiments.model_mark import mark_of
from kitty_nb.experiments.quality import Perplexity
from kitty_nb.experiments.recording import describe_run
from kitty_nb.experiments.settings import changes
from kitty_nb.experiments.trial import (
    LoadSeconds,
    Measurement,
    Outcome,
    TrialResult,
    TrialSeconds,
)
from kitty_nb.supervisor.events import ProgressMade, Stage
from kitty_nb.supervisor.free_memory import free_memory
from kitty_nb.supervisor.load_facts import this_host
from kitty_nb.supervisor.memory_preview import MemoryPreviewer
from kitty_nb.supervisor.process import peak_memory
from kitty_nb.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Engine
    from kitty_nb.experiments.events import SweepEvent
    from kitty_nb.experiments.measure import Answer
    from kitty_nb.experiments.run_record import Exchange
    from kitty_nb.experiments.trial import ModelMark, Trial
    from kitty_nb.experiments.workload import Workload
    from kitty_nb.supervisor.events import Event

_HOST = "127.0.0.1"
_DEATH_WITHIN = 5.0  # seconds in which a server that fell silent must be seen to have ended
_PORTS_TRIED = 3
_LOOKED_AT = 0.1  # seconds for which what else the machine does is looked at


async def run_trial(
    trial: Trial,
    config: ServerConfig,
    workload: Workload,
    folder: Path,
    tell: Callable[[SweepEvent], None] = lambda _: None,
    free: Callable[[], None] = lambda: None,
) -> TrialResult:
    """Measure a trial by a server of its own, and say what came of it. It does not raise.

    The server has a free port, a profile and a log of its own, so whatever else is served goes on;
    it ends with this call, also when that is cancelled or this process is killed.

    Args:
        trial: What to try.
        config: The settings that it changes, as they are on this machine.
        workload: What to ask.
        folder: Where the server's log goes.
        tell: Called with the load's progress and with each answer.
        free: Called once the server's process is gone, when the next trial may begin; some
            milliseconds of tidying are still to come then.
    """
    run = _Run(trial, workload, tell)
    outcome, reason = Outcome.DONE, ""
    try:
        own, refusal = await run.prepare(config, folder)
        if refusal:
            outcome, reason = Outcome.SKIPPED, refusal
        else:
            await run.serve(own, free)
            reason = " ".join(filter(None, (await run.judge(), run.queued())))
    except KittyError as error:
        outcome, reason = Outcome.FAILED, str(error)
    except OSError as error:
        outcome = Outcome.FAILED
        reason = f"{folder} cannot be used: {error.strerror or error}. Make room or permit it."
    done = outcome is Outcome.DONE
    return TrialResult(
        trial=trial,
        outcome=outcome,
        reason=reason,
        measurement=run.measurement if done else None,
        seconds=replace(run.seconds, overall=run.seconds.overall or run.elapsed()),
        host=this_host(),
        engine=run.engine,
        at=time.time(),
        mark=run.mark,
        document=run.document if done else "",
    )


async def engine_of(trial: Trial, config: ServerConfig) -> Engine:
    """Find the engine of a trial on this machine.

    Raises:
        EngineError: There is none, or it cannot be run.
    """
    binary = dict(trial.settings).get("binary", config.binary)
    return await locate_engine(Path(str(binary)) if binary else None)


class _Run:
    """What is known of a trial while it runs."""

    def __init__(
        self, trial: Trial, workload: Workload, tell: Callable[[SweepEvent], None]
    ) -> None:
        self.measurement: Measurement | None = None
        self.seconds = TrialSeconds()
        self.engine = self.document = ""
        self.mark: ModelMark | None = None
        self._trial = trial
        self._workload = workload
        self._tell = tell
        self._began = time.monotonic()
        self._stages: dict[Stage, float] = {}
        self._exchanges: tuple[Exchange, ...] = ()
        self._memory = 0
        self._gpu_memory: int | None = 0
        self._answered = 0
        self._machine_load = 0.0

    def elapsed(self) -> float:
        """Seconds since the trial began."""
        return time.monotonic() - self._began

    async def prepare(self, config: ServerConfig, folder: Path) -> tuple[ServerConfig, str]:
        """Return the settings of the trial's server, and why it need not be tried, if so."""
        busy = await anyio.to_thread.run_sync(psutil.cpu_percent, _LOOKED_AT)
        self._machine_load = busy / 100
        engine = await engine_of(self._trial, config)
        self.engine = engine.version
        own = await anyio.to_thread.run_sync(self._own_config, config, folder, engine)
        self.mark = await anyio.to_thread.run_sync(mark_of, self._trial.model, config)
        return own, await MemoryPreviewer().refusal(own, None)

    def _own_config(self, config: ServerConfig, folder: Path, engine: Engine) -> ServerConfig:
        name = f"trial_{self._trial.key}"
        return config.replace(
            **changes(self._trial, config, engine.dialect),
            profile=name,
            alias=name,
            host=_HOST,
            port=_free_port(),
            api_key=None,
            log_dir=folder,
            on_kernel_exit=OnKernelExit.STOP,
            idle_shutdown_seconds=None,
            restart_max=0,
        )

    async def serve(self, config: ServerConfig, free: Callable[[], None]) -> None:
        """Start the server, measure it and stop it."""
        async with Supervisor(config) as supervisor:
            try:
                supervisor.subscribe(self._follow)
                await self._start(supervisor, config)
                self.measurement = await self._measure(supervisor)
                if self._workload.record:
                    self.document = await self._describe(supervisor)
            finally:
                with anyio.CancelScope(shield=True):
                    await supervisor.stop(force=True)
                self.seconds = replace(self.seconds, overall=self.elapsed())
                free()

    async def _describe(self, supervisor: Supervisor) -> str:
        access = Access(supervisor.state.endpoint, supervisor.api_key)
        seed = self._workload.seed
        record = await describe_run(supervisor.state, access, self._exchanges, seed)
        return record.model_dump_json()

    async def judge(self) -> str:
        """Let the user's function say how good the answers are; return what is wrong, if so."""
        quality, measurement = self._workload.quality, self.measurement
        if quality is None or isinstance(quality, Perplexity) or measurement is None:
            return ""

        def mean() -> float:
            prompts = self._workload.prompts
            marks = [
                float(quality(*pair)) for pair in zip(prompts, measurement.answers, strict=True)
            ]
            return sum(marks) / len(marks)

        try:
            self.measurement = replace(measurement, quality=await anyio.to_thread.run_sync(mean))
        except Exception as error:  # noqa: BLE001 (whatever a user's function raises)
            return f"quality failed with {error!r}; it must return a number for every answer."
        return ""

    def queued(self) -> str:
        """Say that more requests were under way than the server answers at once, if so."""
        slots = self.measurement.slots if self.measurement else None
        most = self._workload.levels[-1]
        if slots is None or most <= slots:
            return ""
        return (
            f"{most} requests at once waited for the server's {slots} slots, so these numbers are"
            f" those of a queue. Set parallel to {most} or more in the grid or in .env."
        )

    async def _start(self, supervisor: Supervisor, config: ServerConfig) -> None:
        began = time.monotonic()
        try:
            for _ in range(_PORTS_TRIED):
                try:
                    await supervisor.start(config)
                except PortBusyError as busy:  # somebody was faster
                    config = config.replace(port=busy.free_port or _free_port())
                else:
                    break
        finally:
            load = self._stages.get(Stage.READY, time.monotonic() - began)
            self.seconds = replace(self.seconds, load=load)

    async def _measure(self, supervisor: Supervisor) -> Measurement:
        began = time.monotonic()
        access = Access(supervisor.state.endpoint, supervisor.api_key)
        try:
            async with access.async_http() as http:
                interview = Interview(http, self._workload, dict(self._trial.settings))
                try:
                    context, slots = await interview.warm_up()
                finally:
                    warm_up = time.monotonic() - began
                    self.seconds = replace(self.seconds, warm_up=warm_up)
                measured = await self._interview(interview, supervisor, context)
                return replace(measured, slots=slots, machine_load=self._machine_load)
        except httpx.HTTPError as error:
            raise ExperimentError(await _why_silent(supervisor, error)) from error
        finally:
            requests = time.monotonic() - began - self.seconds.warm_up
            self.seconds = replace(self.seconds, requests=requests)

    async def _interview(
        self, interview: Interview, supervisor: Supervisor, context: int | None
    ) -> Measurement:
        pid = supervisor.state.pid or 0
        workload, speeds = self._workload, []
        first: tuple[Answer, ...] = ()
        for parallel in workload.levels:
            note = partial(self._note, pid, parallel)
            speed, answers = await interview.speed(parallel, note)
            await self._weigh(supervisor, pid)
            speeds.append(replace(speed, memory=self._memory, gpu_memory=self._gpu_memory))
            first = first or answers
        perplexity = bits = None
        if isinstance(workload.quality, Perplexity):
            perplexity, bits = await interview.surprise(workload.quality)
            await self._weigh(supervisor, pid)
        self._exchanges = interview.exchanges(first)
        texts = {answer.prompt: answer.text for answer in first}
        return Measurement(
            load=_load_seconds(self._stages),
            speeds=tuple(speeds),
            memory=self._memory,
            gpu_memory=self._gpu_memory,
            context=context,
            answers=tuple(texts[index] for index in sorted(texts)),
            perplexity=perplexity,
            bits_per_character=bits,
        )

    async def _weigh(self, supervisor: Supervisor, pid: int) -> None:
        """Take down the most memory that the server has had."""
        gpus = (await anyio.to_thread.run_sync(free_memory, pid)).gpus
        held = max(self._gpu_memory or 0, sum(gpu.returned for gpu in gpus))
        # Only NVIDIA's library says what a process holds of a device; a Mac's shares the RAM.
        untold = supervisor.state.devices and not held and sys.platform != "darwin"
        self._gpu_memory = None if untold else held
        self._memory = max(self._memory, peak_memory(pid))

    def _follow(self, event: Event) -> None:
        if isinstance(event, ProgressMade):
            if event.progress.elapsed == 0:
                self._stages.clear()  # another port is tried
            self._stages.setdefault(event.progress.stage, event.progress.elapsed)
            self._tell(TrialProgressed(self._trial, event.progress))

    def _note(self, pid: int, parallel: int, answer: Answer) -> None:
        self._memory = max(self._memory, peak_memory(pid))
        self._answered += 1
        self._tell(
            RequestAnswered(
                trial=self._trial,
                done=self._answered,
                total=self._workload.requests,
                parallel=parallel,
                tokens_per_second=answer.timings.get("predicted_per_second"),
                prompt_tokens_per_second=answer.timings.get("prompt_per_second"),
                time_to_first_token=answer.first_token,
            )
        )


async def _why_silent(supervisor: Supervisor, error: httpx.HTTPError) -> str:
    """What to tell of a server that did not answer: how it ended, if it did."""
    with anyio.move_on_after(_DEATH_WITHIN):
        async with aclosing(supervisor.events()) as events:
            while not supervisor.state.status.idle:
                await anext(events)
    if supervisor.state.status.idle and supervisor.state.error:
        return supervisor.state.error
    return f"The server did not answer a request: {str(error) or type(error).__name__}."


def _load_seconds(stages: Mapping[Stage, float]) -> LoadSeconds:
    ready = stages.get(Stage.READY, 0.0)
    prepared = stages.get(Stage.PREPARING, ready)
    loaded = stages.get(Stage.LOADING, prepared)
    return LoadSeconds(loaded, prepared - loaded, ready - prepared)


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind((_HOST, 0))
        return int(trial.getsockname()[1])
