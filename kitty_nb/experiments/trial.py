"""Trials, their requests, results and events: data that travels between processes and machines."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from math import ceil
from pathlib import Path, PurePath
from types import CellType, CodeType, MethodType
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ConfigError, Problem
from kitty_nb.experiments.noise import Noise  # noqa: TC001 (pydantic reads the types)
from kitty_nb.experiments.run_record import RunRecord
from kitty_nb.isolated_server import LoadSeconds  # noqa: TC001 (pydantic reads the types)

if TYPE_CHECKING:
    from kitty_nb.isolated_server import LoadProgress

DEFAULT_PROMPT = "Explain in a few sentences why the sky is blue, and why it is red at sunset."

# The attributes that tell functions, methods, partials, wrappers and callable objects apart.
_PARTS = (
    *("__module__", "__qualname__", "__code__", "__defaults__", "__kwdefaults__", "__closure__"),
    *("func", "args", "keywords", "__wrapped__", "__func__", "__self__", "__dict__"),
)
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
        settings: Names and values that differ from the sweep's own settings.
        repeat: The round in which the combination is measured, from 1; negative where it is
            measured a second time in that round, for the machine's own spread.
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
        """A description in words, e.g. `qwen.gguf, context_size 8192, threads 4`."""
        settings = (f"{name} {value}" for name, value in self.settings)
        return ", ".join((PurePath(self.model).name, *settings))

    @property
    def columns(self) -> dict[str, Value]:
        """Its model and settings by name, for a table."""
        return {"model": self.model, **dict(self.settings)}

    @cached_property
    def key(self) -> str:
        """A digest of the trial, the same in every process: the key of its stored row."""
        text = json.dumps([self.model, sorted(self.settings), self.repeat])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class ExactMatch:
    """1 where an answer is the expected one but for space around it, else 0.

    Attributes:
        expected: The right answer to each prompt.
    """

    expected: Mapping[str, str]

    def __call__(self, prompt: str, answer: str) -> float:
        """Compare one answer."""
        return float(answer.strip() == self.expected[prompt].strip())


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of given texts as answers: lower is better, and 1 is no surprise at all.

    The server reports how likely each token of a text was, before any sampling. Tokens are those of
    the model's own tokenizer; to compare models with different ones, use the bits per character,
    which are measured too.

    Attributes:
        expected: The text for each prompt. Prompts without one do not count.
    """

    expected: Mapping[str, str]


@dataclass(frozen=True)
class Divergence:
    """How far a model's expectations are from those of a reference, over the tokens of given texts.

    `kl_divergence` is the mean Kullback-Leibler divergence from the reference, in nats: 0 where
    quantization has changed nothing. `top_token_agreement` is the share of tokens where both find
    the same one likeliest. Each server tells of its 4,096 likeliest tokens, and all others count as
    one, so a divergence over the whole vocabulary may be a few percent larger.

    Attributes:
        reference: The file of the model to compare with, of the same family and with little or no
            quantization; it runs once, with the sweep's own settings, before the first trial.
        expected: The text for each prompt. Prompts without one do not count.
    """

    reference: str
    expected: Mapping[str, str]


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-evaluation-harness as a measure of quality, asked of each trial's server.

    Its questions are asked after the workload's own requests, of the server's completions: answers
    are written up to the task's stop sequences, choices are compared by their likelihood, with the
    harness's rules and the server's tokens. Tasks that measure perplexity, need pictures or run a
    model's code are refused. The harness downloads the data of its own tasks; a task in a folder
    may contain code, which is run.

    Attributes:
        name: The task or group, such as `gsm8k`.
        limit: The number of questions of each task, the first ones; None for all.
        metric: The metric, where it is not the first: `acc_norm`, `exact_match,flexible-extract`.
        shots: Solved examples before each question; None for as many as the task has by itself.
        chat: Whether questions go through the model's chat template.
        include_path: A folder of YAML tasks of your own, instead of the harness's.
    """

    name: str
    limit: int | None = None
    metric: str = ""
    shots: int | None = None
    chat: bool = False
    include_path: str = ""

    @property
    def digest(self) -> str:
        """A hash of the folder's files, so that a task that was edited is another. It blocks."""
        folder = Path(self.include_path)
        files = sorted(one for one in folder.rglob("*") if one.is_file() and self.include_path)
        texts = (f"{one.relative_to(folder)}".encode() + one.read_bytes() for one in files)
        return hashlib.blake2b(b"".join(texts), digest_size=12).hexdigest()


Quality = Callable[[str, str], float] | Perplexity | Divergence | HarnessTask
MEASURED_ON_SERVER = (Perplexity, Divergence, HarnessTask)


@dataclass(frozen=True)
class Workload:
    """The requests with which a server is measured.

    Attributes:
        prompts: User messages, one request each; with `chat` off, the raw text to continue.
        max_tokens: Length of an answer, 2 or more. Without `quality`, every answer is that long
            even if the model would end it earlier, so that all are alike.
        parallel: Numbers of concurrent requests, each measured separately.
        seed: The seed of the server's sampling, which is greedy unless the trial varies a setting
            of sampling, such as the temperature.
        chat: Whether prompts go through the model's chat template.
        quality: A score for answers, texts whose likelihood is measured, or a task.
        record: Whether each trial also makes a run record, so that it can be repeated.
        fill: Tokens to which prompts are lengthened by repetition, as far as they fit.
        at_least: Requests at each number in parallel; prompts are repeated to reach it. A p90 needs
            10, a p95 20, and a p99 100.
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
        """Make a workload from one prompt or several, and one number or several."""
        several = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        levels = (parallel,) if isinstance(parallel, int) else tuple(parallel)
        return cls(prompts=several, parallel=levels, quality=quality, **more)

    def __post_init__(self) -> None:
        if problems := tuple(self._problems()):
            raise ConfigError("the sweep", problems)

    @property
    def levels(self) -> tuple[int, ...]:
        """Each number of parallel requests once, ascending."""
        return tuple(sorted(set(self.parallel)))

    def asked(self, parallel: int) -> tuple[int, ...]:
        """Return the indices of the prompts to ask: each one, repeated until all slots are busy."""
        count = ceil(max(len(self.prompts), self.at_least) / parallel) * parallel
        return tuple(index % len(self.prompts) for index in range(count))

    @property
    def requests(self) -> int:
        """The number of measured requests in a trial."""
        return sum(len(self.asked(level)) for level in self.levels)

    def satisfied_by(self, row: TrialResult) -> bool:
        """True if a row has all that is asked for, so that its trial need not be run."""
        return not self.record or bool(row.document) or row.outcome is not Outcome.DONE

    def conditions(self) -> dict[str, Any]:
        """Return what results depend on, as JSON has it."""
        same = {name: getattr(self, name) for name in ("prompts", "max_tokens", "seed", "chat")}
        more = {"parallel": self.levels, "quality": identity(self.quality), "fill": self.fill}
        # Without the name where it is not set: earlier versions' rows count.
        return same | more | ({"at_least": self.at_least} if self.at_least else {})

    def _problems(self) -> Iterator[Problem]:
        if not self.prompts or not all(self.prompts):
            fix = "Write prompts=[…] with at least one, none of them empty."
            yield Problem("prompts", str(self.prompts), "One of them is empty.", fix)
        if self.max_tokens < 2:  # noqa: PLR2004 (between two tokens lies the first interval)
            fix = "Write 2 or more; 64 is a good start."
            yield Problem("max_tokens", str(self.max_tokens), "A rate needs 2 tokens.", fix)
        if not self.parallel or min(self.parallel) < 1:
            fix = "Write numbers of requests, such as (1, 4)."
            yield Problem("parallel", str(self.parallel), "It must be 1 or more.", fix)
        if self.at_least < 0:
            fix = "Write the least number of requests; a p99 needs 100."
            yield Problem("requests", str(self.at_least), "It must be 0 or more.", fix)
        match self.quality:
            case ExactMatch(expected):
                for prompt in (p for p in dict.fromkeys(self.prompts) if p not in expected):
                    fix = "Give ExactMatch the right answer to each prompt."
                    yield Problem("quality", prompt, "ExactMatch lacks this prompt.", fix)
            case Perplexity(expected) | Divergence(_, expected):
                if not any(expected.get(prompt) for prompt in self.prompts):
                    kind = type(self.quality).__name__
                    fix = f"Give {kind} the text to a prompt, spelled as in prompts=[…]."
                    reason = f"{kind} has a text for none of the prompts."
                    yield Problem("quality", "", reason, fix)
            case HarnessTask(limit=limit) if limit is not None and limit < 1:
                fix = "Write a number of questions, or leave it out for all."
                yield Problem("quality", str(limit), "limit must be 1 or more.", fix)
            case HarnessTask(include_path=folder) if folder and not Path(folder).is_dir():
                fix = "Correct include_path, or leave it out for the harness's own tasks."
                yield Problem("quality", folder, "There is no such folder.", fix)
            case HarnessTask():
                pass
            case quality if quality is not None and not callable(quality):
                fix = (
                    "Use ExactMatch({prompt: answer}), Perplexity({prompt: text}),"
                    " Divergence(model, {prompt: text}), HarnessTask(name) or a function."
                )
                yield Problem("quality", repr(quality), "It measures nothing.", fix)


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """The times of one request, as its client saw them, in seconds.

    Attributes:
        sent: When it was sent, in seconds since the epoch.
        time_to_first_token: From sending it to the arrival of the first token: waiting for a slot
            counts.
        seconds: From sending it to the arrival of the last token.
        tokens: Tokens of the answer.
        prompt_tokens: Tokens of the prompt.
        prompt: Index of its prompt.
    """

    sent: float
    time_to_first_token: float
    seconds: float
    tokens: int
    prompt_tokens: int = 0
    prompt: int = 0

    @property
    def time_between_tokens(self) -> float | None:
        """From the first token to the last, over the tokens after the first; None without any."""
        if self.tokens < 2:  # noqa: PLR2004 (between two tokens lies the first interval)
            return None
        return (self.seconds - self.time_to_first_token) / (self.tokens - 1)

    @property
    def columns(self) -> dict[str, float | None]:
        """Its numbers by name, for a table."""
        names = ("prompt", "prompt_tokens", "tokens", "sent", "time_to_first_token")
        return {n: getattr(self, n) for n in (*names, "time_between_tokens", "seconds")}


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of answers at one number of concurrent requests.

    Rates are medians over the requests, as the server's own `timings` report them.

    Attributes:
        parallel: The number of requests at once.
        requests: The number of requests in all.
        seconds: From the first request to the last answer.
        time_to_first_token: Median of the seconds until the first token has arrived.
        prompt_tokens_per_second: Of each request; None where no prompt was processed.
        generation_tokens_per_second: Of each request; None where answers had a single token.
        total_tokens_per_second: Tokens of all answers over `seconds`.
        memory: The most RAM that the server's processes had had by then, in bytes: since their
            beginning, so with fewer requests at once, too. 0 where it is not known.
        gpu_memory: What they had of GPUs' own memory then, in bytes; None where nothing reports it.
        prompt_tokens: Tokens of the longest prompt; 0 where that is not known.
        each: The times of each request, in the order in which they were answered; an earlier
            version's rows have none.
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
    """The measurements of a server.

    Attributes:
        load: The seconds of its stages of loading.
        speeds: One for each number of parallel requests, in ascending order.
        memory: The most RAM its processes had, in bytes; mapped weights count as they are touched.
        gpu_memory: The most that they had of GPUs' own memory after requests, in bytes; None where
            nothing reports it.
        context: Tokens that one request may have, prompt and answer; None where a build hides it.
        answers: To each prompt, asked one at a time.
        quality: Mean over the answers of what the sweep's `quality` gave; None without one.
        perplexity: Of the expected texts; None unless asked for.
        bits_per_character: Of the same texts, for models that split them into other tokens.
        slots: Requests that the server answers at once; None where a build hides it.
        machine_load: Share of the processors that was busy before the server was started.
        noise: The state of the machine during the requests; None where they were too
            short to tell.
        kl_divergence: From the reference, in nats; None unless asked for.
        top_token_agreement: Share of tokens where the reference finds the same one likeliest.
        intervals: Of quality, perplexity, divergence and agreement, with 95 % confidence.
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
        """The seconds of the load and all requests."""
        return self.load + self.warm_up + self.requests


@dataclass(frozen=True, slots=True)
class ModelFingerprint:
    """The identity of a model, beyond its name.

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
        trial: The trial.
        outcome: Its outcome.
        reason: The reason that it was not measured, or the problem with its quality, in a
            sentence.
        measurement: The measurements; None unless it is done.
        seconds: The seconds of its parts.
        host: The machine.
        engine: The engine's name for itself; empty where none was found.
        at: The end, in seconds since the epoch.
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

    @property
    def busy(self) -> bool:
        """True if other processes are likely to have distorted what was measured."""
        noise = self.measurement and self.measurement.noise
        return bool(noise and noise.busy)

    def may_be_of(self, model: ModelFingerprint | None) -> bool:
        """True if it may be a row of this model; where the model is not here, any row may be.

        The failure of a trial that found no model says nothing about one that is here.
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
    """A trial's load has progressed."""

    trial: Trial
    progress: LoadProgress


@dataclass(frozen=True, slots=True)
class RequestAnswered:
    """A trial's server has answered another request.

    Attributes:
        trial: The trial.
        done: The number of measured requests that are answered.
        total: The number of all measured requests.
        parallel: The number of requests under way at once.
        tokens_per_second: The rate at which this answer was written, as the server reports it.
        prompt_tokens_per_second: The rate at which its prompt was read, likewise.
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
        problem: The reason that it broke off, in a sentence; empty where it did not.
    """

    complete: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """Rows could not be written; they are kept in memory and written with the next one.

    Attributes:
        problem: The problem and its remedy, in a sentence.
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
"""Runs one trial somewhere, reports its progress on the event loop, and returns its row.

Being cancelled ends the trial's server. An `ExperimentError` means that nothing more can be run
there, and ends the sweep.
"""


def identity(quality: Quality | None) -> str:
    """Name a measure of quality, the same in every process.

    A function is known by its code and by the values bound to it, so that one that was edited is
    another. What it finds by a global name is not looked into.
    """
    match quality:
        case None:
            return ""
        case ExactMatch() | Perplexity() | Divergence():
            return repr(quality)
        case HarnessTask():
            return f"{quality!r} {quality.digest}"
    text = repr(_plain(quality))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _plain(value: Any, within: tuple[object, ...] = ()) -> object:
    """Return what a value holds, in a form whose `repr` is the same in every process.

    Args:
        value: Any value.
        within: The callables that hold it; one may hold itself.
    """
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return value
        case tuple() | list():
            return [_plain(one, within) for one in value]
        case set() | frozenset():
            return sorted(repr(_plain(one, within)) for one in value)
        case dict():
            return _plain([*value.items()], within)
        case re.Pattern():
            return value.pattern, value.flags
        case CodeType():
            return value.co_code, value.co_names, _plain(value.co_consts, within)
        case CellType():
            return _plain(getattr(value, "cell_contents", None), within)
        case _ if callable(value) and not any(value is one for one in within):
            parts = [getattr(value, name, None) for name in _PARTS]
            if isinstance(call := value.__call__, MethodType):  # an object of a callable class
                parts.append(call.__func__)
            return type(value).__qualname__, _plain(parts, (*within, value))
    return type(value).__qualname__
