"""One trial, from its settings to its row: its own server, warmed up, measured and stopped."""

from __future__ import annotations

import logging
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psutil
from anyio.to_thread import run_sync

from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.errors import ConfigError, ExperimentError, KittyError, WillNotFitError
from kitty_nb.experiments.measure import BenchmarkClient
from kitty_nb.experiments.run_record import describe_run
from kitty_nb.experiments.space import changes
from kitty_nb.experiments.trial import (
    Measurement,
    ModelFingerprint,
    Outcome,
    RequestAnswered,
    TrialProgressed,
    TrialResult,
    TrialSeconds,
)
from kitty_nb.experiments.workload import Perplexity
from kitty_nb.isolated_server import gather_facts, isolated_server, locate_engine, this_host

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator

    from kitty_nb.config import ServerConfig
    from kitty_nb.errors import Problem
    from kitty_nb.experiments.measure import Answer
    from kitty_nb.experiments.trial import Execute, OnProgress, Trial
    from kitty_nb.experiments.workload import Workload
    from kitty_nb.isolated_server import Engine, IsolatedServer, LoadProgress

_LOAD_SECONDS = 0.1  # seconds over which the machine's load is measured
_log = logging.getLogger(__name__)


async def run_trial(
    trial: Trial,
    on_progress: OnProgress,
    *,
    config: ServerConfig,
    workload: Workload,
    folder: Path,
) -> TrialResult:
    """Measure a trial on a server of its own, and return its row. It does not raise.

    The server has a free port, a profile and a log of its own, so whatever else is served goes on;
    it ends with this call, also when that is cancelled or this process is killed.

    Args:
        trial: What to try.
        on_progress: Called with the load's progress and with each answer.
        config: The settings that it changes, as they are on this machine.
        workload: What to ask.
        folder: Where the server's log goes.
    """
    run = _Run(trial, on_progress, workload)
    outcome = Outcome.DONE
    with run.timing("overall"):
        try:
            await run.measure(config, folder)
        except WillNotFitError as error:
            outcome, run.reason = Outcome.SKIPPED, str(error)
        except KittyError as error:
            outcome, run.reason = Outcome.FAILED, str(error)
        except OSError as error:
            outcome = Outcome.FAILED
            run.reason = (
                f"Can't write to {folder}: {error.strerror or error}. Free some space or fix its"
                " permissions."
            )
    done = outcome is Outcome.DONE
    return TrialResult(
        trial=trial,
        outcome=outcome,
        reason=run.reason,
        measurement=run.measurement if done else None,
        seconds=run.seconds,
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
    """Provide the callable that runs trials here.

    Args:
        config: The settings that trials change.
        workload: What to ask each server.
        logs: A folder for the servers' logs, to be kept; without it they are deleted with
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


def fingerprint_of(model: str, config: ServerConfig) -> ModelFingerprint:
    """Look at a model on this machine. It blocks.

    Args:
        model: As trials name it.
        config: Of the sweep, which says where models are.

    Raises:
        ConfigError: It is not here.
    """
    facts = gather_facts(resolve_model(config.replace(model=model)))
    return ModelFingerprint(facts.size, facts.digest)


def fingerprints_here(
    models: Iterable[str], config: ServerConfig, *, must_exist: bool = False
) -> dict[str, ModelFingerprint]:
    """Look at those of the models that can be read on this machine. It blocks.

    Args:
        models: As trials name them.
        config: Of the sweep, which says where models are.
        must_exist: Whether a missing model is an error.

    Raises:
        ConfigError: Listing the models that are not here.
    """
    found: dict[str, ModelFingerprint] = {}
    problems: list[Problem] = []
    for model in dict.fromkeys(models):
        try:
            found[model] = fingerprint_of(model, config)
        except ConfigError as error:
            problems += error.problems
    if problems and must_exist:
        raise ConfigError("the sweep", tuple(problems))
    return {model: one for model, one in found.items() if one.digest}


@dataclass
class _Run:
    """One trial under way, with its measurements so far."""

    trial: Trial
    on_progress: OnProgress
    workload: Workload
    seconds: TrialSeconds = field(default_factory=TrialSeconds)
    engine: str = ""
    fingerprint: ModelFingerprint | None = None
    measurement: Measurement | None = None
    document: str = ""
    reason: str = ""
    answered: int = 0

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Keep how long the block takes as one part of the trial's seconds."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds = replace(self.seconds, **{part: time.monotonic() - began})

    async def measure(self, config: ServerConfig, folder: Path) -> None:
        """Start the server, measure it and stop it; then judge its answers."""
        busy = await run_sync(psutil.cpu_percent, _LOAD_SECONDS)
        engine = await engine_of(self.trial, config)
        self.engine = engine.version
        own = self._own_config(config, engine)
        self.fingerprint = await run_sync(fingerprint_of, self.trial.model, config)
        async with isolated_server(own, folder, on_progress=self._loading) as server:
            self.seconds = replace(self.seconds, load=server.load.total)
            async with server.access.async_http() as http:
                client = BenchmarkClient(http, self.workload, dict(self.trial.settings))
                with self.timing("warm_up"):
                    context, slots = await client.warm_up()
                with self.timing("requests"):
                    measured, answers = await self._ask(client, server)
            if self.workload.record:
                exchanges = tuple(answer.exchange for answer in answers)
                seed = self.workload.seed
                record = await describe_run(server.state, server.access, exchanges, seed)
                self.document = record.model_dump_json()
        measured = replace(measured, context=context, slots=slots, machine_load=busy / 100)
        quality, problem = await run_sync(_judge, self.workload, measured.answers)
        self.measurement = replace(measured, quality=quality)
        self.reason = problem or _queued(self.workload.levels[-1], slots)

    def _own_config(self, config: ServerConfig, engine: Engine) -> ServerConfig:
        name = f"trial_{self.trial.key}"
        return config.replace(
            **changes(self.trial, config, engine.dialect), profile=name, alias=name
        )

    async def _ask(
        self, client: BenchmarkClient, server: IsolatedServer
    ) -> tuple[Measurement, tuple[Answer, ...]]:
        speeds = []
        first: tuple[Answer, ...] = ()
        for parallel in self.workload.levels:
            speed, answers = await client.speed(parallel, partial(self._answered, parallel))
            await server.sample_memory()
            speeds.append(replace(speed, memory=server.memory, gpu_memory=server.gpu_memory))
            first = first or answers
        perplexity = bits = None
        if isinstance(self.workload.quality, Perplexity):
            perplexity, bits = await client.surprise(self.workload.quality)
            await server.sample_memory()
        texts = {answer.prompt: answer.exchange.output for answer in first}
        measured = Measurement(
            load=server.load,
            speeds=tuple(speeds),
            memory=server.memory,
            gpu_memory=server.gpu_memory,
            answers=tuple(texts[index] for index in sorted(texts)),
            perplexity=perplexity,
            bits_per_character=bits,
        )
        return measured, first

    def _loading(self, progress: LoadProgress) -> None:
        self.on_progress(TrialProgressed(self.trial, progress))

    def _answered(self, parallel: int, answer: Answer) -> None:
        self.answered += 1
        self.on_progress(
            RequestAnswered(
                trial=self.trial,
                done=self.answered,
                total=self.workload.requests,
                parallel=parallel,
                tokens_per_second=answer.timings.predicted_per_second,
                prompt_tokens_per_second=answer.timings.prompt_per_second,
                time_to_first_token=answer.first_token,
            )
        )


def _judge(workload: Workload, answers: tuple[str, ...]) -> tuple[float | None, str]:
    """Return the mean of what the user's function gives the answers, and what is wrong with it."""
    quality = workload.quality
    if quality is None or isinstance(quality, Perplexity):
        return None, ""
    try:
        pairs = zip(workload.prompts, answers, strict=True)
        return fmean(float(quality(*pair)) for pair in pairs), ""
    except Exception as error:  # noqa: BLE001 (whatever a user's function raises)
        return None, f"quality failed with {error!r}; it must return a number for every answer."


def _queued(most: int, slots: int | None) -> str:
    """Say that more requests were under way than the server answers at once, if so."""
    if slots is None or most <= slots:
        return ""
    return (
        f"{most} requests at once waited for the server's {slots} slots, so these numbers include"
        f" queueing. Set parallel to {most} or more in the grid or in .env."
    )
