"""Trials, workloads, results and events: the data exchanged between processes and machines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from math import ceil
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ConfigError, Problem
from kitty_nb.experiments.arguments import MOST, SEEDS, is_whole, numbers, texts
from kitty_nb.experiments.noise import Noise  # noqa: TC001 (pydantic reads the types)
from kitty_nb.experiments.quality import identity, problems_of
from kitty_nb.experiments.run_record import RunRecord
from kitty_nb.isolated_server import LoadSeconds  # noqa: TC001 (pydantic reads the types)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kitty_nb.experiments.quality import Quality
    from kitty_nb.isolated_server import LoadProgress

DEFAULT_PROMPT = "Explain in a few sentences why the sky is blue, and why it is red at sunset."

CONNECTIONS = 10_000  # more than any server answers at once
Value = bool | int | float | str | tuple[str, ...] | None


class Outcome(StrEnum):
    """The outcome of a trial; a search prunes trials that can no longer win."""

    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"
    PRUNED = "pruned"


@dataclass(frozen=True)
class Trial:
    """One measurement of a combination of model and settings.

    Attributes:
        model: The model file as the user named it, absolute or in the models folder.
        settings: Names and values of settings that are varied.
        repeat: The round, from 1; negative for the second measurement in a round, which shows the
            machine's own variation.
    """

    model: str
    settings: tuple[tuple[str, Value], ...] = ()
    repeat: int = 1

    @property
    def combination(self) -> Trial:
        """The first repeat, which represents the combination."""
        return Trial(self.model, self.settings)

    @property
    def label(self) -> str:
        """A short description, e.g. `qwen.gguf, context_size 8192, threads 4`."""
        settings = (f"{name} {value}" for name, value in self.settings)
        return ", ".join((PurePath(self.model).name, *settings))

    @property
    def columns(self) -> dict[str, Value]:
        """The model and settings by name, as table columns."""
        return {"model": self.model, **dict(self.settings)}

    @cached_property
    def key(self) -> str:
        """A digest of the trial, stable across processes: the key of its stored row."""
        text = json.dumps([self.model, sorted(self.settings), self.repeat])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Workload:
    """The requests that measure a server.

    Attributes:
        prompts: User messages, one request each; without `chat`, raw texts to continue.
        max_tokens: Length of an answer in tokens, 2 or more. Without `quality`, answers always have
            this length, so that trials are comparable.
        parallel: Numbers of concurrent requests, each measured separately.
        seed: The seed of the server's sampling, which is greedy unless the trial varies a sampling
            setting, such as the temperature.
        chat: Whether prompts go through the model's chat template.
        quality: A score for answers, texts to predict, or a task.
        record: Whether to make a run record of each trial, so that it can be replayed.
        fill: The length in tokens to which prompts are repeated, as far as they fit.
        at_least: The minimum number of requests at each concurrency; prompts are repeated to reach
            it. A p90 needs 10, a p95 20, and a p99 100.
    """

    prompts: tuple[str, ...] = (DEFAULT_PROMPT,)
    max_tokens: int = 64
    parallel: tuple[int, ...] = (1,)
    seed: int = 0
    chat: bool = True
    quality: Quality | None = None
    record: bool = False
    fill: int = 0
    at_least: int = 0

    @classmethod
    def of(
        cls,
        prompts: str | Iterable[str],
        parallel: int | Iterable[int],
        quality: Quality | None,
        **more: Any,
    ) -> Workload:
        """Create a workload from one or more prompts, and one or more numbers in parallel."""
        levels = numbers("parallel", parallel)
        return cls(prompts=texts("prompts", prompts), parallel=levels, quality=quality, **more)

    def __post_init__(self) -> None:
        if problems := tuple(self._problems()):
            raise ConfigError("", problems)

    @property
    def levels(self) -> tuple[int, ...]:
        """The distinct numbers of concurrent requests, ascending."""
        return tuple(sorted(set(self.parallel)))

    def asked(self, parallel: int) -> tuple[int, ...]:
        """Return the indices of the prompts to send, repeated to a multiple of `parallel`."""
        count = ceil(max(len(self.prompts), self.at_least) / parallel) * parallel
        return tuple(index % len(self.prompts) for index in range(count))

    @property
    def requests(self) -> int:
        """The number of measured requests in a trial."""
        return sum(len(self.asked(level)) for level in self.levels)

    def satisfied_by(self, row: TrialResult) -> bool:
        """Return whether a row has all that is asked for, so that its trial need not run again."""
        return not self.record or bool(row.document) or row.outcome is not Outcome.DONE

    def conditions(self) -> dict[str, Any]:
        """Return what results depend on, in JSON types."""
        same = {name: getattr(self, name) for name in ("prompts", "max_tokens", "seed", "chat")}
        more = {"parallel": self.levels, "quality": identity(self.quality), "fill": self.fill}
        # Omitted if not set, so that rows of older versions stay valid.
        return same | more | ({"at_least": self.at_least} if self.at_least else {})

    def _problems(self) -> Iterator[Problem]:
        if not self.prompts or not all(self.prompts):
            fix = "Write prompts=[…] with at least one, none of them empty."
            yield Problem("prompts", str(self.prompts), "One of them is empty.", fix)
        for name, value, least, most, usual in (
            ("max_tokens", self.max_tokens, 2, MOST, 64),  # a rate needs 2 tokens
            ("seed", self.seed, 0, SEEDS, 0),
            ("requests", self.at_least, 0, MOST, 100),
            *(("parallel", one, 1, CONNECTIONS, 4) for one in self.parallel or (None,)),
        ):
            if not is_whole(value, least, most):
                reason = f"It must be a whole number from {least} to {most:,}."
                yield Problem(name, repr(value), reason, f"Write one, such as {usual}.")
        for name in ("chat", "record"):
            if not isinstance(value := getattr(self, name), bool):
                yield Problem(name, repr(value), "It is neither True nor False.", "Write one.")
        if self.quality is not None:
            yield from problems_of(self.quality, self.prompts)


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """The times of a request, measured by the client, in seconds.

    Attributes:
        sent: The time of sending, in seconds since the epoch.
        time_to_first_token: From sending to the first token, including the wait for a slot.
        seconds: From sending to the last token.
        tokens: The number of tokens in the answer.
        prompt: The index of the prompt.
    """

    sent: float
    time_to_first_token: float
    seconds: float
    tokens: int
    prompt_tokens: int = 0
    prompt: int = 0

    @property
    def time_between_tokens(self) -> float | None:
        """The mean time between tokens after the first; None with fewer than two tokens."""
        if self.tokens < 2:  # noqa: PLR2004 (between two tokens lies the first interval)
            return None
        return (self.seconds - self.time_to_first_token) / (self.tokens - 1)

    @property
    def columns(self) -> dict[str, float | None]:
        """The values by name, as table columns."""
        names = ("prompt", "prompt_tokens", "tokens", "sent", "time_to_first_token")
        return {n: getattr(self, n) for n in (*names, "time_between_tokens", "seconds")}


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of answers at one number of concurrent requests.

    Rates are medians over the requests, by the server's own `timings`.

    Attributes:
        parallel: The number of concurrent requests.
        seconds: From the first request to the last answer.
        prompt_tokens_per_second: None if no prompt was processed.
        generation_tokens_per_second: The tokens after the first, which comes with the prompt, over
            their time; None if answers had a single token.
        total_tokens_per_second: The tokens of all answers over `seconds`.
        memory: Peak RAM of the server's processes since their start, in bytes; 0 if unknown.
        gpu_memory: Their GPU memory at that point, in bytes; None if no driver reports it.
        prompt_tokens: The number of tokens in the longest prompt; 0 if unknown.
        each: The requests, in the order of their answers; empty in rows of older versions.
    """

    parallel: int
    requests: int
    seconds: float
    time_to_first_token: float
    prompt_tokens_per_second: float | None
    generation_tokens_per_second: float | None
    total_tokens_per_second: float
    memory: int = 0
    gpu_memory: int | None = 0
    prompt_tokens: int = 0
    each: tuple[RequestTimes, ...] = ()


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurements of a server; scores are None if not measured.

    Attributes:
        speeds: The speed at each number of concurrent requests, ascending.
        memory: Peak RAM of the server's processes, in bytes; mapped weights count once touched.
        gpu_memory: Their peak GPU memory after requests, in bytes; None if no driver reports it.
        context: The context of a request in tokens, prompt and answer; None if a build hides it.
        answers: The answer to each prompt, at the lowest concurrency.
        quality: The mean score of the answers.
        bits_per_character: Perplexity per character, to compare models of different tokenizers.
        slots: The number of requests the server processes at once; None if a build hides it.
        machine_load: The busy fraction of the processors before the server started.
        noise: The state of the machine during the requests; None if they were too short.
        intervals: 95 % confidence intervals of quality, perplexity, divergence and agreement.
    """

    load: LoadSeconds
    speeds: tuple[Speed, ...]
    memory: int
    gpu_memory: int | None = 0
    context: int | None = None
    answers: tuple[str, ...] = ()
    quality: float | None = None
    perplexity: float | None = None
    bits_per_character: float | None = None
    slots: int | None = None
    machine_load: float | None = None
    noise: Noise | None = None
    kl_divergence: float | None = None
    top_token_agreement: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrialSeconds:
    """Seconds of a trial's parts and overall; `load` is 0 if the server was never ready."""

    load: float = 0.0
    warm_up: float = 0.0
    requests: float = 0.0
    overall: float = 0.0

    @property
    def own(self) -> float:
        """The seconds of the load and all requests."""
        return self.load + self.warm_up + self.requests


@dataclass(frozen=True, slots=True)
class ModelFingerprint:
    """A model's identity, whatever its name: size in bytes, and hash of samples of its files."""

    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A row of a sweep's results.

    Attributes:
        reason: Why the trial was not measured, or a problem with its quality, in a sentence.
        measurement: The measurements; None unless done.
        host: The name of the machine.
        engine: The engine's version; empty if none was found.
        at: The end of the trial, in seconds since the epoch.
        fingerprint: The model's identity, if the file was found.
        document: The run record as JSON; empty unless the sweep makes records.
        run: An identifier of the run that measured it; empty in rows of older versions.
    """

    trial: Trial
    outcome: Outcome
    reason: str = ""
    measurement: Measurement | None = None
    seconds: TrialSeconds = TrialSeconds()
    host: str = ""
    engine: str = ""
    at: float = 0.0
    fingerprint: ModelFingerprint | None = None
    document: str = field(default="", repr=False)
    run: str = ""

    @property
    def busy(self) -> bool:
        """True if other processes are likely to have distorted the measurement."""
        noise = self.measurement and self.measurement.noise
        return bool(noise and noise.busy)

    def may_be_of(self, model: ModelFingerprint | None) -> bool:
        """Return whether the row may be of this model; any row may be if the model isn't here.

        A failure to find the model doesn't apply to a model that is here.
        """
        if model is None or self.fingerprint == model:
            return True
        return self.fingerprint is None and self.outcome is Outcome.DONE

    @property
    def record(self) -> RunRecord | None:
        """The run record, to save or replay; None if the sweep makes none."""
        return RunRecord.parse(self.document) if self.document else None


@dataclass(frozen=True, slots=True)
class TrialStarted:
    """A trial has started."""

    trial: Trial


@dataclass(frozen=True, slots=True)
class TrialProgressed:
    """A trial's server has made progress with its load."""

    trial: Trial
    progress: LoadProgress


@dataclass(frozen=True, slots=True)
class RequestAnswered:
    """A trial's server has answered `done` of `total` measured requests.

    The speed is by the server's clock, the times by the client's.
    """

    trial: Trial
    done: int
    total: int
    parallel: int
    tokens_per_second: float | None
    times: RequestTimes


@dataclass(frozen=True, slots=True)
class TrialEnded:
    """A trial has finished, with a row."""

    result: TrialResult


@dataclass(frozen=True, slots=True)
class SweepPaused:
    """The sweep is paused: no further trials start, and those in progress finish."""


@dataclass(frozen=True, slots=True)
class SweepResumed:
    """The sweep has resumed."""


@dataclass(frozen=True, slots=True)
class SweepEnded:
    """The run has ended: with a row for every trial, or because of a problem, in a sentence."""

    complete: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """Rows could not be written; they are kept in memory, and written with the next one."""

    problem: str


SweepEvent = (
    TrialStarted
    | TrialProgressed
    | RequestAnswered
    | TrialEnded
    | SweepPaused
    | SweepResumed
    | SweepEnded
    | StoreFailed
)


OnProgress = Callable[[SweepEvent], object]
Execute = Callable[[Trial, OnProgress], Awaitable[TrialResult]]
"""Runs a trial somewhere, reports progress on the event loop, and returns the row.

Cancelling it stops the trial's server. An `ExperimentError` means that no more trials can run
there, and ends the sweep.
"""
