"""One trial, from its settings to its row: its own server, warmed up, measured and stopped."""

from __future__ import annotations

import logging
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import anyio.to_thread
import psutil

from kitty_nb.errors import ExperimentError, KittyError, WillNotFitError
from kitty_nb.experiments.measure import BenchmarkClient
from kitty_nb.experiments.model_files import fingerprint_of
from kitty_nb.experiments.quality import Perplexity
from kitty_nb.experiments.run_record import describe_run
from kitty_nb.experiments.settings import changes
from kitty_nb.experiments.trial import (
    Measurement,
    Outcome,
    RequestAnswered,
    TrialProgressed,
    TrialResult,
    TrialSeconds,
)
from kitty_nb.isolated_server import isolated_server, locate_engine, this_host

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.measure import Answer
    from kitty_nb.experiments.run_record import Exchange
    from kitty_nb.experiments.trial import Execute, ModelFingerprint, OnProgress, Trial
    from kitty_nb.experiments.workload import Workload
    from kitty_nb.isolated_server import Engine, IsolatedServer, LoadProgress

_LOOKED_AT = 0.1  # seconds for which what else the machine does is looked at
_log = logging.getLogger(__name__)


async def run_trial(
    trial: Trial,
    on_progress: OnProgress,
    *,
    config: ServerConfig,
    workload: Workload,
    folder: Path,
) -> TrialResult:
    """Measure a trial by a server of its own, and say what came of it. It does not raise.

    The server has a free port, a profile and a log of its own, so whatever else is served goes on;
    it ends with this call, also when that is cancelled or this process is killed.

    Args:
        trial: What to try.
        on_progress: Called with the load's progress and with each answer.
        config: The settings that it changes, as they are on this machine.
        workload: What to ask.
        folder: Where the server's log goes.
    """
    run = _Run(trial, workload, on_progress)
    outcome, reason = Outcome.DONE, ""
    try:
        await run.serve(await run.prepare(config), folder)
        reason = " ".join(filter(None, (await run.judge(), run.queued())))
    except WillNotFitError as error:
        outcome, reason = Outcome.SKIPPED, str(error)
        run.seconds = replace(run.seconds, load=0.0)
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
        fingerprint=run.fingerprint,
        document=run.document if done else "",
    )


async def engine_of(trial: Trial, config: ServerConfig) -> Engine:
    """Find the engine of a trial on this machine.

    Raises:
        EngineError: There is none, or it cannot be run.
    """
    binary = dict(trial.settings).get("binary", config.binary)
    return await locate_engine(Path(str(binary)) if binary else None)


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


async def row_of(trial: Trial, execute: Execute, on_progress: OnProgress) -> TrialResult:
    """Return a trial's row, also when running it fails in a way nobody foresaw: others go on.

    Raises:
        ExperimentError: Nothing can be run there any more.
    """
    try:
        return await execute(trial, on_progress)
    except ExperimentError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever it is, it has its row)
        _log.exception("Running a trial failed.")
        reason = f"kitty_nb failed to run this trial: {error!r}. Please report it."
        return TrialResult(trial, Outcome.FAILED, reason, at=time.time())


class _Run:
    """What is known of a trial while it runs."""

    def __init__(self, trial: Trial, workload: Workload, tell: OnProgress) -> None:
        self.measurement: Measurement | None = None
        self.seconds = TrialSeconds()
        self.engine = self.document = ""
        self.fingerprint: ModelFingerprint | None = None
        self._trial = trial
        self._workload = workload
        self._tell = tell
        self._began = time.monotonic()
        self._exchanges: tuple[Exchange, ...] = ()
        self._answered = 0
        self._machine_load = 0.0

    def elapsed(self) -> float:
        """Seconds since the trial began."""
        return time.monotonic() - self._began

    async def prepare(self, config: ServerConfig) -> ServerConfig:
        """Return the settings of the trial's server."""
        busy = await anyio.to_thread.run_sync(psutil.cpu_percent, _LOOKED_AT)
        self._machine_load = busy / 100
        engine = await engine_of(self._trial, config)
        self.engine = engine.version
        own = await anyio.to_thread.run_sync(self._own_config, config, engine)
        self.fingerprint = await anyio.to_thread.run_sync(fingerprint_of, self._trial.model, config)
        return own

    def _own_config(self, config: ServerConfig, engine: Engine) -> ServerConfig:
        name = f"trial_{self._trial.key}"
        return config.replace(
            **changes(self._trial, config, engine.dialect), profile=name, alias=name
        )

    async def serve(self, config: ServerConfig, folder: Path) -> None:
        """Start the server, measure it and stop it."""
        began = time.monotonic()
        try:
            async with isolated_server(config, folder, on_progress=self._follow) as server:
                self.seconds = replace(self.seconds, load=server.load.total)
                self.measurement = await self._measure(server)
                if self._workload.record:
                    self.document = await self._describe(server)
        finally:
            load = self.seconds.load or time.monotonic() - began
            self.seconds = replace(self.seconds, load=load, overall=self.elapsed())

    async def _describe(self, server: IsolatedServer) -> str:
        seed = self._workload.seed
        record = await describe_run(server.state, server.access, self._exchanges, seed)
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

    async def _measure(self, server: IsolatedServer) -> Measurement:
        began = time.monotonic()
        try:
            async with server.access.async_http() as http:
                interview = BenchmarkClient(http, self._workload, dict(self._trial.settings))
                try:
                    context, slots = await interview.warm_up()
                finally:
                    warm_up = time.monotonic() - began
                    self.seconds = replace(self.seconds, warm_up=warm_up)
                measured = await self._interview(interview, server, context)
                return replace(measured, slots=slots, machine_load=self._machine_load)
        finally:
            requests = time.monotonic() - began - self.seconds.warm_up
            self.seconds = replace(self.seconds, requests=requests)

    async def _interview(
        self, interview: BenchmarkClient, server: IsolatedServer, context: int | None
    ) -> Measurement:
        workload, speeds = self._workload, []
        first: tuple[Answer, ...] = ()
        for parallel in workload.levels:
            speed, answers = await interview.speed(parallel, partial(self._note, parallel))
            await server.sample_memory()
            speeds.append(replace(speed, memory=server.memory, gpu_memory=server.gpu_memory))
            first = first or answers
        perplexity = bits = None
        if isinstance(workload.quality, Perplexity):
            perplexity, bits = await interview.surprise(workload.quality)
            await server.sample_memory()
        self._exchanges = interview.exchanges(first)
        texts = {answer.prompt: answer.text for answer in first}
        return Measurement(
            load=server.load,
            speeds=tuple(speeds),
            memory=server.memory,
            gpu_memory=server.gpu_memory,
            context=context,
            answers=tuple(texts[index] for index in sorted(texts)),
            perplexity=perplexity,
            bits_per_character=bits,
        )

    def _follow(self, progress: LoadProgress) -> None:
        self._tell(TrialProgressed(self._trial, progress))

    def _note(self, parallel: int, answer: Answer) -> None:
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
