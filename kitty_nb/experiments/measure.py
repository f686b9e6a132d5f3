"""Running one trial: start a server, warm it up, measure it and stop it."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import anyio
import httpx
import psutil
from anyio.to_thread import run_sync

from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.client.protocol import ask_each, out_of_files, post, props, stream
from kitty_nb.errors import ConfigError, KittyError, ServerError, WillNotFitError, first_of
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.likelihood import Likelihoods, likeness, perplexity_of
from kitty_nb.experiments.noise import noise_since, usage_with
from kitty_nb.experiments.quality import (
    Divergence,
    HarnessTask,
    Perplexity,
    judge,
    mean_quality,
)
from kitty_nb.experiments.recording import describe_run
from kitty_nb.experiments.run_record import Exchange, Request, Timings
from kitty_nb.experiments.space import changes
from kitty_nb.experiments.statistics import proportion_interval
from kitty_nb.experiments.trial import (
    Measurement,
    ModelFingerprint,
    Outcome,
    RequestAnswered,
    RequestTimes,
    Speed,
    TrialProgressed,
    TrialResult,
    TrialSeconds,
)
from kitty_nb.isolated_server import (
    SERVER_SETTINGS,
    isolated_server,
    locate_engine,
    sample_content,
    this_host,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractAsyncContextManager

    from pydantic import JsonValue

    from kitty_nb.config import ServerConfig
    from kitty_nb.errors import Problem
    from kitty_nb.experiments.likelihood import Distribution
    from kitty_nb.experiments.trial import Execute, OnProgress, Trial, Value, Workload
    from kitty_nb.isolated_server import Engine, IsolatedServer, LoadProgress

    Reference = tuple[Distribution, ...]

_LOAD_SECONDS = 0.1  # how long the machine's load is sampled, in seconds
_WARM_UP_TOKENS = 16
# llama-server's stop types as OpenAI's finish reasons.
_FINISHED = {"eos": "stop", "word": "stop", "limit": "length"}
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "repeat_penalty": 1.0}
# The predictions of the last reference, which is queried once and not for each trial.
_references: dict[object, Reference] = {}
# Trials at once on a loop wait for the one that queries it.
_reference_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Answer:
    """A measured answer: by the client's clock, by the server's, and as a run record stores it."""

    times: RequestTimes
    timings: Timings
    exchange: Exchange


class BenchmarkClient:
    """Sends the requests of a workload to a server.

    Its methods raise KittyError if the server rejects a request, and `httpx.HTTPError` if the
    connection fails.

    Args:
        http: A client of the server, changed to open a connection per request.
        workload: The requests.
        settings: The trial's settings, which requests don't override.
        model: The model to ask for by OpenAI's protocol, as any server understands it; None for a
            llama-server's own protocol, which tells more.

    Attributes:
        context: The context of a request in tokens; None if a build doesn't report it.
        slots: The number of requests processed at once; None if a build doesn't report it.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        workload: Workload,
        settings: Mapping[str, Value],
        model: str | None = None,
    ) -> None:
        # llama-server closes idle connections after seconds, possibly just as one is reused.
        http.headers["Connection"] = "close"
        self.context: int | None = None
        self.slots: int | None = None
        self._http, self._texts = http, Likelihoods(http)
        self._workload, self._model = workload, model
        self._prompts: list[str] = []
        self._parameters: dict[str, JsonValue] = {
            "n_predict": workload.max_tokens,
            "seed": workload.seed,
            "cache_prompt": False,
            "ignore_eos": workload.quality is None or isinstance(workload.quality, HarnessTask),
            **{name: value for name, value in _GREEDY.items() if name not in settings},
        }

    async def warm_up(self) -> None:
        """Prepare the prompts, and send one request that isn't measured."""
        if self._model:
            self._prompts = [*self._workload.prompts]
            await self._ask(0, max_tokens=min(self._workload.max_tokens, _WARM_UP_TOKENS))
            return
        facts = await props(self._http)
        self.context = facts.get("default_generation_settings", {}).get("n_ctx")
        self.slots = facts.get("total_slots")
        for prompt in self._workload.prompts:
            self._prompts.append(await self._templated(await self._filled(prompt)))
        await self._ask(0, n_predict=min(self._workload.max_tokens, _WARM_UP_TOKENS))

    async def speed(
        self, parallel: int, on_answer: Callable[[Answer], object]
    ) -> tuple[Speed, tuple[Answer, ...]]:
        """Send every prompt, `parallel` at a time, and call back with each answer."""
        answers: list[Answer] = []

        async def ask(index: int) -> None:
            answer = await self._ask(index)
            answers.append(answer)
            on_answer(answer)

        began = time.perf_counter()
        await ask_each(self._workload.asked(parallel), parallel, ask)
        seconds = time.perf_counter() - began
        timings = [answer.timings for answer in answers]
        speed = Speed(
            parallel=parallel,
            requests=len(answers),
            seconds=seconds,
            time_to_first_token=median(answer.times.time_to_first_token for answer in answers),
            prompt_tokens_per_second=_median(t.prompt_per_second for t in timings if t.prompt_n),
            generation_tokens_per_second=_median(t.speed for t in timings),
            total_tokens_per_second=sum(t.predicted_n for t in timings) / seconds,
            prompt_tokens=max(t.prompt_n for t in timings),
            each=tuple(answer.times for answer in answers),
        )
        return speed, tuple(answers)

    async def arrive(self, offsets: Iterable[float]) -> tuple[float, tuple[RequestTimes, ...]]:
        """Send the prompts in turn at given times, in seconds from now, regardless of answers.

        Return the seconds until the last answer, and the times of each request.
        """
        times: list[RequestTimes] = []

        async def ask(prompt: int) -> None:
            times.append((await self._ask(prompt)).times)

        began, prompts = anyio.current_time(), len(self._prompts)
        try:
            async with anyio.create_task_group() as tasks:
                for number, offset in enumerate(offsets):
                    await anyio.sleep_until(began + offset)
                    tasks.start_soon(ask, number % prompts)
        except ExceptionGroup as group:
            error = first_of(group)
            raise error from error.__cause__
        return anyio.current_time() - began, tuple(times)

    async def scores(self, reference: Reference | None = None) -> dict[str, Any]:
        """Measure quality that needs the server, as fields of a `Measurement`."""
        quality = self._workload.quality
        if isinstance(quality, HarnessTask):
            from kitty_nb.experiments.harness import run_harness_task  # noqa: PLC0415 (of an extra)

            seed = self._workload.seed
            asked = run_harness_task(quality, self._http, slots=self.slots, seed=seed)
            return mean_quality(*await asked)
        if not isinstance(quality, Perplexity | Divergence):
            return {}
        pairs = self._expected(quality.expected)
        if isinstance(quality, Divergence):
            found = [one for pair in pairs for one in await self._texts.distributions(*pair)]
            alike = likeness(reference or (), found)
            return {
                "kl_divergence": alike.kl_divergence,
                "top_token_agreement": alike.agreed / alike.tokens,
                "intervals": {
                    "kl_divergence": alike.interval,
                    "top_token_agreement": proportion_interval(alike.agreed, alike.tokens),
                },
            }
        likelihoods = [one for pair in pairs for one in await self._texts.of(*pair)]
        perplexity, interval = perplexity_of(likelihoods)
        characters = sum(len(text) for _, text in pairs)
        return {
            "perplexity": perplexity,
            "bits_per_character": -sum(likelihoods) / math.log(2) / characters,
            "intervals": {"perplexity": interval},
        }

    async def expectations(self, expected: Mapping[str, str]) -> Reference:
        """Return the model's predictions for each token of the texts."""
        pairs = self._expected(expected)
        return tuple([one for pair in pairs for one in await self._texts.distributions(*pair)])

    def _expected(self, expected: Mapping[str, str]) -> list[tuple[str, str]]:
        """Return each templated prompt with its expected text."""
        asked = zip(self._workload.prompts, self._prompts, strict=True)
        return [(whole, text) for prompt, whole in asked if (text := expected.get(prompt))]

    async def _filled(self, prompt: str) -> str:
        """Repeat a prompt up to the workload's `fill`, as far as the context allows."""
        workload = self._workload
        if not workload.fill:
            return prompt
        once, twice = [len(await self._texts.tokens(t)) for t in (prompt, f"{prompt} {prompt}")]
        size, templated = twice - once, len(await self._texts.tokens(await self._templated(prompt)))
        if size < 1:  # a model without a vocabulary, or a build that reports no pieces
            return prompt
        room = (self.context or 0) // workload.levels[-1] - workload.max_tokens - (templated - size)
        return " ".join([prompt] * max(1, min(math.ceil(workload.fill / size), room // size)))

    async def _templated(self, prompt: str) -> str:
        if not self._workload.chat:
            return prompt
        request = {"messages": [{"role": "user", "content": prompt}]}
        return str((await post(self._http, "/apply-template", request, "prompt"))["prompt"])

    async def _ask(self, prompt: int, **changes: object) -> Answer:
        if self._model:
            return await self._ask_any_server(prompt, self._model, **changes)
        request = Request(text=self._prompts[prompt], parameters=self._parameters)
        sent, began, first_token, pieces = time.time(), time.perf_counter(), None, []
        parts = stream(self._http, "/completion", {**request.body, **changes})
        async with aclosing(parts):
            async for part in parts:
                if first_token is None:
                    first_token = time.perf_counter() - began
                pieces.append(part.get("content", ""))
                if "timings" in part:
                    seconds = time.perf_counter() - began
                    timings = Timings.model_validate(part["timings"])
                    read = timings.prompt_n + timings.cache_n
                    times = RequestTimes(
                        sent, first_token, seconds, timings.predicted_n, read, prompt
                    )
                    exchange = Exchange(
                        request=request,
                        output="".join(pieces),
                        finish_reason=_FINISHED.get(part.get("stop_type", "")),
                        timings=timings,
                    )
                    return Answer(times, timings, exchange)
        raise httpx.RemoteProtocolError("the answer ended early")

    async def _ask_any_server(self, prompt: int, model: str, **changes: object) -> Answer:
        """Ask by OpenAI's protocol. The answer ends where the model ends it."""
        chat, text, workload = self._workload.chat, self._prompts[prompt], self._workload
        asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        request = {
            "model": model,
            "max_tokens": workload.max_tokens,
            "seed": workload.seed,
            "temperature": 0.0,
            "stream_options": {"include_usage": True},
            **asked,
            **changes,
        }
        sent, began, first_token, last, pieces = time.time(), time.perf_counter(), 0.0, 0.0, []
        usage: dict[str, Any] = {}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        async with aclosing(stream(self._http, path, request)) as parts:
            async for part in parts:
                usage = part.get("usage") or usage
                for choice in part.get("choices") or ():
                    delta = choice.get("delta") or choice
                    thought = delta.get("reasoning_content") or delta.get("reasoning")
                    if piece := thought or delta.get("content") or delta.get("text"):
                        last = time.perf_counter() - began
                        first_token = first_token or last
                        pieces.append(str(piece))
        if not pieces:
            raise ServerError(f"The server answered {text[:40]!r} without a word.")
        tokens = int(usage.get("completion_tokens") or len(pieces))
        read = int(usage.get("prompt_tokens") or 0)
        return Answer(
            RequestTimes(sent, first_token, last, tokens, read, prompt),
            Timings(prompt_n=read, predicted_n=tokens),
            Exchange(request=Request(text=text), output="".join(pieces)),
        )


def _median(rates: Iterable[float | None]) -> float | None:
    known = [rate for rate in rates if rate and math.isfinite(rate)]
    return median(known) if known else None


async def run_trial(
    trial: Trial,
    on_progress: OnProgress,
    *,
    config: ServerConfig,
    workload: Workload,
    folder: Path | None = None,
) -> TrialResult:
    """Measure a trial on a new server, and return its row. Failures become rows, too.

    The server has its own port, profile and log, so other servers aren't affected. It stops at the
    end, also if the call is cancelled or this process is killed. Without a folder, its log is
    discarded.
    """
    run = _Run(TrialResult(trial, Outcome.DONE, host=this_host()), on_progress, workload)
    began = time.monotonic()
    try:
        await run.measure(config, folder)
    except WillNotFitError as error:
        run.end(Outcome.SKIPPED, str(error))
    except KittyError as error:
        run.end(Outcome.FAILED, str(error))
    except OSError as error:
        run.end(Outcome.FAILED, why_not_written(error, folder))
    seconds = replace(run.row.seconds, overall=time.monotonic() - began)
    return replace(run.row, seconds=seconds, at=time.time())


def why_not_written(error: OSError, folder: object) -> str:
    """Say why a trial's files can't be written, and what to do."""
    where = error.filename or folder or gettempdir()
    return out_of_files(error) or (
        f"Can't write to {where}: {error.strerror or error}. Free some space or fix its"
        " permissions."
    )


async def engine_of(trial: Trial, config: ServerConfig) -> Engine:
    """Find the engine of a trial on this machine."""
    binary = dict(trial.settings).get("binary", config.binary)
    return await locate_engine(Path(str(binary)) if binary else None)


def this_machine(
    config: ServerConfig, workload: Workload, logs: Path | None = None
) -> AbstractAsyncContextManager[Execute]:
    """Provide the callable that runs trials on this machine, with a folder for servers' logs."""
    return nullcontext(partial(run_trial, config=config, workload=workload, folder=logs))


def fingerprint_of(model: str, config: ServerConfig) -> ModelFingerprint:
    """Fingerprint a model on this machine by its name in trials. Blocking."""
    return ModelFingerprint(*sample_content(resolve_model(config.replace(model=model))))


def fingerprints_here(
    models: Iterable[str], config: ServerConfig, *, must_exist: bool = False
) -> dict[str, ModelFingerprint]:
    """Fingerprint the models that exist on this machine. Blocking.

    If they `must_exist`, an error lists all that are missing.
    """
    found: dict[str, ModelFingerprint] = {}
    problems: list[Problem] = []
    for model in dict.fromkeys(models):
        try:
            found[model] = fingerprint_of(model, config)
        except ConfigError as error:
            problems += error.problems
    if problems and must_exist:
        raise ConfigError("", tuple(problems))
    return {model: one for model, one in found.items() if one.digest}


@dataclass
class _Run:
    """A trial in progress, with its row so far."""

    row: TrialResult
    on_progress: OnProgress
    workload: Workload
    answered: int = 0

    def end(self, outcome: Outcome, reason: str) -> None:
        self.row = replace(self.row, outcome=outcome, reason=reason)

    async def measure(self, config: ServerConfig, folder: Path | None) -> None:
        """Start the server, measure it and stop it; then score its answers."""
        trial, workload = self.row.trial, self.workload
        busy = await run_sync(psutil.cpu_percent, _LOAD_SECONDS)
        engine = await engine_of(trial, config)
        self.row = replace(self.row, engine=engine.version)
        name = f"trial_{trial.key}"
        own = config.replace(**changes(trial, config, engine.dialect), profile=name, alias=name)
        fingerprint = await run_sync(fingerprint_of, trial.model, config)
        self.row = replace(self.row, fingerprint=fingerprint)
        if isinstance(workload.quality, HarnessTask):
            await run_sync(extra, "lm_eval", "lm-eval")
        reference = await _reference_of(workload, config)
        document = ""
        async with isolated_server(own, folder, on_progress=self._loading) as server:
            self.row = replace(self.row, seconds=TrialSeconds(server.load.total))
            async with server.access.async_http() as http:
                client = BenchmarkClient(http, workload, dict(trial.settings))
                began = time.monotonic()
                await client.warm_up()
                warm = time.monotonic()
                measured, answers = await self._ask(client, server, reference)
                seconds = TrialSeconds(server.load.total, warm - began, time.monotonic() - warm)
            if workload.record:
                exchanges = tuple(answer.exchange for answer in answers)
                record = await describe_run(server.state, server.access, exchanges, workload.seed)
                document = record.to_json()
        judged, problem = await judge(workload.quality, workload.prompts, measured.answers)
        self.row = replace(
            self.row,
            measurement=replace(measured, **judged, machine_load=busy / 100),
            document=document,
            seconds=seconds,
            reason=problem or _queued(workload.levels[-1], client.slots),
        )

    async def _ask(
        self, client: BenchmarkClient, server: IsolatedServer, reference: Reference
    ) -> tuple[Measurement, tuple[Answer, ...]]:
        speeds = []
        first: tuple[Answer, ...] = ()
        pid = server.state.pid or 0
        before = await usage_with(pid)
        for parallel in self.workload.levels:
            speed, answers = await client.speed(parallel, partial(self._on_answer, parallel))
            await server.sample_memory()
            speeds.append(replace(speed, memory=server.memory, gpu_memory=server.gpu_memory))
            first = first or answers
        noise = await noise_since(before, pid)
        scores = await client.scores(reference)
        await server.sample_memory()
        texts = {answer.times.prompt: answer.exchange.output for answer in first}
        measured = Measurement(
            load=server.load,
            speeds=tuple(speeds),
            memory=server.memory,
            gpu_memory=server.gpu_memory,
            context=client.context,
            answers=tuple(texts[index] for index in sorted(texts)),
            **scores,
            slots=client.slots,
            noise=noise,
        )
        return measured, first

    def _loading(self, progress: LoadProgress) -> None:
        self.on_progress(TrialProgressed(self.row.trial, progress))

    def _on_answer(self, parallel: int, answer: Answer) -> None:
        self.answered += 1
        self.on_progress(
            RequestAnswered(
                trial=self.row.trial,
                done=self.answered,
                total=self.workload.requests,
                parallel=parallel,
                tokens_per_second=answer.timings.speed,
                times=answer.times,
            )
        )


async def _reference_of(workload: Workload, config: ServerConfig) -> Reference:
    """Return the predictions of a divergence's reference; empty for other measures of quality."""
    quality = workload.quality
    if not isinstance(quality, Divergence):
        return ()
    model = await run_sync(fingerprint_of, quality.reference, config)
    settings = config.model_dump_json(include=set(SERVER_SETTINGS))
    key = model, settings, workload.prompts, workload.chat, workload.fill, repr(quality)
    async with _reference_locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        if (found := _references.get(key)) is None:
            own = config.replace(model=quality.reference, profile="reference", alias="reference")
            async with isolated_server(own) as server, server.access.async_http() as http:
                client = BenchmarkClient(http, workload, {})
                await client.warm_up()
                found = await client.expectations(quality.expected)
            _references.clear()  # they are large, and sweeps run one after another
            _references[key] = found
        return found


def _queued(most: int, slots: int | None) -> str:
    """Return a notice if there were more concurrent requests than slots; otherwise empty."""
    if slots is None or most <= slots:
        return ""
    return (
        f"{most} requests at once waited for the server's {slots} slots, so these numbers include"
        f" queueing. Raise the setting parallel to {most} or more."
    )
