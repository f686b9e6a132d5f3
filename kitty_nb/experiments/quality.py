"""Quality: what answers are worth, as scores, likelihoods of texts or tasks."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path, PurePath
from statistics import fmean
from threading import Thread
from types import CellType, CodeType, MethodType
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import Problem
from kitty_nb.experiments.arguments import require, whole
from kitty_nb.experiments.statistics import score_interval

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Scores = dict[str, Any]  # fields of a `Measurement`

# The attributes that distinguish functions, methods, partials, wrappers and callable objects.
_PARTS = (
    *("__module__", "__qualname__", "__code__", "__defaults__", "__kwdefaults__", "__closure__"),
    *("func", "args", "keywords", "__wrapped__", "__func__", "__self__", "__dict__"),
)


@dataclass(frozen=True)
class ExactMatch:
    """A score of 1 if an answer equals the expected one, ignoring surrounding whitespace, else 0.

    Attributes:
        expected: The correct answer to each prompt.
    """

    expected: Mapping[str, str]

    def __post_init__(self) -> None:
        _check_expected(self.expected)

    def __call__(self, prompt: str, answer: str) -> float:
        """Score an answer."""
        return float(answer.strip() == self.expected[prompt].strip())


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of given answers: lower is better, and 1 means perfect prediction.

    It is computed from the probability that the server reports for each token, before sampling. To
    compare models with different tokenizers, use `bits_per_character`, measured with it.

    Attributes:
        expected: The text to predict, by prompt. Prompts without a text don't count.
    """

    expected: Mapping[str, str]

    def __post_init__(self) -> None:
        _check_expected(self.expected)


@dataclass(frozen=True)
class Divergence:
    """Divergence of a model's predictions from those of a reference, over given texts.

    `kl_divergence` is the mean Kullback-Leibler divergence from the reference, in nats: 0 if
    quantization changes nothing. `top_token_agreement` is the fraction of tokens for which both
    models predict the same most likely token. Both use the 4,096 most likely tokens and treat the
    rest as one, so the divergence over the whole vocabulary may be a few percent larger.

    Attributes:
        reference: The file of the reference model, of the same family and with little or no
            quantization. It runs once, with the base settings, before the first trial.
        expected: The text to predict, by prompt. Prompts without a text don't count.
    """

    reference: str
    expected: Mapping[str, str]

    def __post_init__(self) -> None:
        require("reference", self.reference, (str, PurePath), "the path of a model")
        _check_expected(self.expected)


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-evaluation-harness as a measure of quality, run on each trial's server.

    The task runs after the workload's requests, through the server's completions: answers are
    generated up to the task's stop sequences, and choices are compared by likelihood, by the
    harness's rules but with the server's tokens. Tasks that measure perplexity, need images or run
    generated code are rejected. The harness downloads the data of its own tasks; a task in a folder
    may contain code, which is run.

    Attributes:
        name: The task or group, such as `gsm8k`.
        limit: The number of questions per task, from the first; None for all.
        metric: The metric, such as `acc_norm` or `exact_match,flexible-extract`; by default the
            task's first.
        shots: The number of solved examples before each question; None for the task's default.
        chat: Whether questions go through the model's chat template.
        include_path: A folder of your own YAML tasks, instead of the harness's.
    """

    name: str
    limit: int | None = None
    metric: str = ""
    shots: int | None = None
    chat: bool = False
    include_path: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "metric", "include_path"):
            require(name, getattr(self, name), str, "a text")
        for name, least in (("limit", 1), ("shots", 0)):
            if (value := getattr(self, name)) is not None:
                whole(name, value, least)

    @property
    def digest(self) -> str:
        """A hash of the folder's files, so that an edited task counts as a new one. Blocking."""
        folder = Path(self.include_path)
        files = sorted(one for one in folder.rglob("*") if one.is_file() and self.include_path)
        texts = (f"{one.relative_to(folder)}".encode() + one.read_bytes() for one in files)
        return hashlib.blake2b(b"".join(texts), digest_size=12).hexdigest()


def _check_expected(expected: Mapping[str, str]) -> None:
    example = "a text for each prompt: {prompt: text}"
    require("expected", expected, Mapping, example)
    for text in expected.values():
        require("expected", text, str, example)


Quality = Callable[[str, str], float] | Perplexity | Divergence | HarnessTask
_MEASURED_ON_SERVER = (Perplexity, Divergence, HarnessTask)


def problems_of(quality: Quality, prompts: Sequence[str]) -> Iterator[Problem]:
    """Yield why a quality can't be measured with these prompts."""
    match quality:
        case ExactMatch(expected):
            for prompt in (p for p in dict.fromkeys(prompts) if p not in expected):
                fix = "Give ExactMatch the right answer to each prompt."
                yield Problem("quality", prompt, "ExactMatch lacks this prompt.", fix)
        case Perplexity(expected) | Divergence(_, expected):
            if not any(expected.get(prompt) for prompt in prompts):
                kind = type(quality).__name__
                fix = f"Give {kind} the text to a prompt, spelled as in prompts=[…]."
                reason = f"{kind} has a text for none of the prompts."
                yield Problem("quality", ", ".join(expected), reason, fix)
        case HarnessTask(include_path=folder):
            if folder and not Path(folder).is_dir():
                fix = "Correct include_path, or leave it out for the harness's own tasks."
                yield Problem("quality", folder, "There is no such folder.", fix)
        case _ if not callable(quality):
            fix = (
                "Use ExactMatch({prompt: answer}), Perplexity({prompt: text}),"
                " Divergence(model, {prompt: text}), HarnessTask(name) or a function."
            )
            yield Problem("quality", repr(quality), "It measures nothing.", fix)


async def judge(
    quality: Quality | None, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[Scores, str]:
    """Return the mean score with its 95 % interval, and a problem with the user's function, if any.

    The interval covers the mean over all prompts of this kind. The function runs on a thread that
    nobody waits for, because it may never return.
    """
    if quality is None or isinstance(quality, _MEASURED_ON_SERVER):
        return {}, ""
    found: Future[tuple[Scores, str]] = Future()
    found.set_running_or_notify_cancel()

    def work() -> None:
        try:
            found.set_result(_judge(quality, prompts, answers))
        except Exception as error:  # noqa: BLE001 (raised where it is awaited)
            found.set_exception(error)

    Thread(target=work, name="kitty_nb quality", daemon=True).start()
    return await asyncio.wrap_future(found)


def _judge(
    quality: Callable[[str, str], float], prompts: Sequence[str], answers: Sequence[str]
) -> tuple[Scores, str]:
    try:
        scores = [float(quality(*pair)) for pair in zip(prompts, answers, strict=True)]
    except BaseException as error:  # noqa: BLE001 (whatever a user's function raises, exits too)
        return {}, f"quality failed with {error!r}. It must return a number for every answer."
    if not math.isfinite(sum(score * score for score in scores)):  # as their variance has to be
        must = "It must return a finite number for every answer, and none too large for a mean."
        return {}, f"quality returned {scores}. {must}"
    return mean_quality(fmean(scores), score_interval(scores)), ""


def mean_quality(score: float, interval: tuple[float, float] | None) -> Scores:
    """Return a quality with its interval, as fields of a `Measurement`."""
    return {"quality": score, "intervals": {"quality": interval} if interval else {}}


def identity(quality: Quality | None) -> str:
    """Return an identifier of a quality measure that is stable across processes.

    A function is identified by its code and the values bound to it, so that an edited function
    counts as a new one. Globals that it uses are ignored.
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
    """Return the contents of a value in a form whose `repr` is stable across processes.

    A callable may refer to itself, so those it is `within` are left out.
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
        case _ if is_dataclass(value):  # such as a task of a suite, with its expected answer
            contents = [getattr(value, one.name) for one in fields(value)]
            return type(value).__qualname__, _plain(contents, within)
    return type(value).__qualname__
