"""Trials, their results and their events: data that travels between processes and machines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING

from kitty_nb.experiments.run_record import RunRecord
from kitty_nb.isolated_server import LoadSeconds  # noqa: TC001 (pydantic reads the types)

if TYPE_CHECKING:
    from kitty_nb.isolated_server import LoadProgress

Value = bool | int | float | str | tuple[str, ...] | None


class Outcome(StrEnum):
    """The outcome of a trial; a search prunes a trial that can no longer win."""

    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"
    PRUNED = "pruned"


@dataclass(frozen=True)
class Trial:
    """One combination of model and settings, to be measured once.

    Attributes:
        model: The model's file as the user named it, absolute or in the models folder.
        settings: Names and values that differ from the sweep's own settings; see `settings`.
        repeat: Which measurement of this combination it is, from 1.
    """

    model: str
    settings: tuple[tuple[str, Value], ...] = ()
    repeat: int = 1

    @property
    def combination(self) -> Trial:
        """The first of its repeats, which stands for all of them."""
        return Trial(self.model, self.settings)

    @property
    def label(self) -> str:
        """It in words, e.g. `qwen.gguf, context_size 8192, threads 4`."""
        settings = (f"{name} {value}" for name, value in self.settings)
        return ", ".join((PurePath(self.model).name, *settings))

    @cached_property
    def key(self) -> str:
        """A digest of all of it, the same in every process: what is stored is found by it."""
        text = json.dumps([self.model, sorted(self.settings), self.repeat])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of answers at one number of concurrent requests.

    Rates are medians over the requests, of what the server itself says in `timings`.

    Attributes:
        parallel: How many at once.
        requests: How many in all.
        seconds: From the first request to the last answer.
        time_to_first_token: Median of the seconds until the first token has arrived.
        prompt_tokens_per_second: Of each request; None where no prompt was worked on.
        generation_tokens_per_second: Of each request; None where answers had a single token.
        total_tokens_per_second: Tokens of all answers over `seconds`.
        memory: The most RAM that the server's processes had had by then, in bytes: since their
            beginning, so with fewer requests at once, too. 0 where it is not known.
        gpu_memory: What they had of GPUs' own memory then, in bytes; None where nobody tells.
        prompt_tokens: Tokens of the longest prompt; 0 where that is not known.
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


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurements of a server.

    Attributes:
        load: How long its stages of loading took.
        speeds: One for each number of parallel requests, in ascending order.
        memory: The most RAM its processes had, in bytes; mapped weights count as they are touched.
        gpu_memory: The most that they had of GPUs' own memory after requests, in bytes; None where
            nobody tells.
        context: Tokens that one request may have, prompt and answer; None where a build hides it.
        answers: To each prompt, asked one at a time.
        quality: Mean over the answers of what the sweep's `quality` gave; None without one.
        perplexity: Of the expected texts; None unless asked for.
        bits_per_character: Of the same texts, for models that split them into other tokens.
        slots: Requests that the server answers at once; None where a build hides it.
        machine_load: Share of the processors that was busy before the server was started.
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


@dataclass(frozen=True, slots=True)
class TrialSeconds:
    """The seconds that each part of a trial took.

    Attributes:
        load: From asking for the server to ready; 0 where it never was.
        warm_up: The requests that are not measured.
        requests: Those that are.
        overall: From the trial's beginning to the end of its server.
    """

    load: float = 0.0
    warm_up: float = 0.0
    requests: float = 0.0
    overall: float = 0.0

    @property
    def own(self) -> float:
        """What the trial itself is about."""
        return self.load + self.warm_up + self.requests


@dataclass(frozen=True, slots=True)
class ModelFingerprint:
    """Tells one model from another of the same name.

    Attributes:
        size: Bytes of its files.
        digest: Hash of the first file's beginning.
    """

    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A row of a sweep's results.

    Attributes:
        trial: What was tried.
        outcome: How it ended.
        reason: Why it was not measured, or what is wrong with its quality, in a sentence.
        measurement: What was measured; None unless it is done.
        seconds: Where the time went.
        host: The machine.
        engine: What the engine calls itself; empty where none was found.
        at: When it ended, in seconds since the epoch.
        fingerprint: Of the model, where it was seen.
        document: Its run record as JSON; empty unless the sweep makes records.
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

    def may_be_of(self, model: ModelFingerprint | None) -> bool:
        """True if it may be a row of this model; where the model is not here, any row may be.

        Where a trial saw no such model, its failure says nothing of one that is here.
        """
        if model is None or self.fingerprint == model:
            return True
        return self.fingerprint is None and self.outcome is Outcome.DONE

    @property
    def record(self) -> RunRecord | None:
        """Its run record, to be saved or replayed.

        Raises:
            RunRecordError: A later version of kitty_nb has written it.
        """
        return RunRecord.parse(self.document) if self.document else None


@dataclass(frozen=True, slots=True)
class TrialStarted:
    """A trial has begun."""

    trial: Trial


@dataclass(frozen=True, slots=True)
class TrialProgressed:
    """A trial's load has moved."""

    trial: Trial
    progress: LoadProgress


@dataclass(frozen=True, slots=True)
class RequestAnswered:
    """A trial has one more answer.

    Attributes:
        trial: Which.
        done: Measured requests that are answered.
        total: How many there are.
        parallel: How many are under way at once.
        tokens_per_second: At which this answer was written, as the server says.
        prompt_tokens_per_second: At which its prompt was read, as the server says.
        time_to_first_token: Seconds until its first token had arrived.
    """

    trial: Trial
    done: int
    total: int
    parallel: int
    tokens_per_second: float | None
    prompt_tokens_per_second: float | None
    time_to_first_token: float


@dataclass(frozen=True, slots=True)
class TrialEnded:
    """A trial has its row."""

    result: TrialResult


@dataclass(frozen=True, slots=True)
class SweepPaused:
    """No further trial begins until the sweep is resumed; the one under way goes on."""


@dataclass(frozen=True, slots=True)
class SweepResumed:
    """Trials begin again."""


@dataclass(frozen=True, slots=True)
class SweepEnded:
    """The run is over.

    Attributes:
        complete: Whether every trial has its row.
        problem: Why it broke off, in a sentence; empty where it did not.
    """

    complete: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """Rows could not be written; they are kept in memory and written with the next one.

    Attributes:
        problem: What is wrong and what to do, in a sentence.
    """

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
"""Runs one trial somewhere, tells its progress on the event loop, and returns its row.

Being cancelled ends the trial's server. An `ExperimentError` means that nothing more can be run
there, and ends the sweep.
"""
