"""One trial, from its settings to its row: its own server, warmed up, measured and stopped."""

from __future__ import annotations

import math
import time
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

import anyio
import httpx
import psutil
from anyio.to_thread import run_sync

from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.client.protocol import post, props, stream
from kitty_nb.errors import ConfigError, ExperimentError, KittyError, WillNotFitError, first_of
from kitty_nb.experiments.noise import noise_since, usage_with
from kitty_nb.experiments.recording import describe_run
from kitty_nb.experiments.run_record import Exchange, Request, Timings
from kitty_nb.experiments.space import changes
from kitty_nb.experiments.trial import (
    Measurement,
    ModelFingerprint,
    Outcome,
    Perplexity,
    RequestAnswered,
    RequestTimes,
    Speed,
    TrialProgressed,
    TrialResult,
    TrialSeconds,
)
from kitty_nb.isolated_server import gather_facts, isolated_server, locate_engine, this_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from pydantic import JsonValue

    from kitty_nb.config import ServerConfig
    from kitty_nb.errors import Problem
    from kitty_nb.experiments.trial import Execute, OnProgress, Trial, Value, Workload
    from kitty_nb.isolated_server import Engine, IsolatedServer, LoadProgress

_LOAD_SECONDS = 0.1  # seconds over which the machine's load is measured
_WARM_UP_TOKENS = 16
# llama-server's reasons for an answer's end, in the words of OpenAI's protocol.
_FINISHED = {"eos": "stop", "word": "stop", "limit": "length"}
_CERTAIN = 1e6  # added to a token's logit, so that it is taken whatever the others' are
_LIKELIEST = (1 << 10, 1 << 20)  # tokens to list: so many mostly do, and no vocabulary has more
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "repeat_penalty": 1.0}

_Piece = str | list[int]  # the text of a token, or its bytes where a character is split


@dataclass(frozen=True, slots=True)
class Answer:
    """A measured answer.

    Attributes:
        times: Its times at the client.
        timings: The server's own.
        exchange: What was asked and answered, as a run record keeps it.
    """

    times: RequestTimes
    timings: Timings
    exchange: Exchange


class BenchmarkClient:
    """The requests of a workload to one server.

    Its methods raise KittyError where the server refuses a request, and `httpx.HTTPError` where it
    falls silent.

    Args:
        http: A client of the server; from now on it makes a connection for each request.
        workload: What to ask.
        settings: The trial's own settings; requests don't override them.

    Attributes:
        context: Tokens that one request may have; None where a build does not say.
        slots: Requests that the server answers at once; None where a build does not say.
    """

    def __init__(
        self, http: httpx.AsyncClient, workload: Workload, settings: Mapping[str, Value]
    ) -> None:
        # llama-server ends an idle connection after seconds, at worst just as it is used again.
        http.headers["Connection"] = "close"
        self.context: int | None = None
        self.slots: int | None = None
        self._http = http
        self._workload = workload
        self._prompts: list[str] = []
        self._parameters: dict[str, JsonValue] = {
            "n_predict": workload.max_tokens,
            "seed": workload.seed,
            "cache_prompt": False,
            "ignore_eos": workload.quality is None,
            **{name: value for name, value in _GREEDY.items() if name not in settings},
        }

    async def warm_up(self) -> None:
        """Prepare the prompts and have one answered before anything is measured."""
        facts = await props(self._http)
        self.context = facts.get("default_generation_settings", {}).get("n_ctx")
        self.slots = facts.get("total_slots")
        for prompt in self._workload.prompts:
            self._prompts.append(await self._templated(await self._filled(prompt)))
        await self._ask(0, n_predict=min(self._workload.max_tokens, _WARM_UP_TOKENS))

    async def speed(
        self, parallel: int, on_answer: Callable[[Answer], object]
    ) -> tuple[Speed, tuple[Answer, ...]]:
        """Ask every prompt, `parallel` at a time, and call back with each answer."""
        answers: list[Answer] = []

        async def ask_on(left: Iterator[int]) -> None:
            for index in left:
                answer = await self._ask(index)
                answers.append(answer)
                on_answer(answer)

        left = iter(self._workload.asked(parallel))
        began = time.perf_counter()
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(parallel):
                    tasks.start_soon(ask_on, left)
        except ExceptionGroup as group:
            raise first_of(group) from None
        seconds = time.perf_counter() - began
        timings = [answer.timings for answer in answers]
        speed = Speed(
            parallel=parallel,
            requests=len(answers),
            seconds=seconds,
            time_to_first_token=median(answer.times.time_to_first_token for answer in answers),
            prompt_tokens_per_second=_median(t.prompt_per_second for t in timings if t.prompt_n),
            generation_tokens_per_second=_median(
                t.predicted_per_second for t in timings if t.predicted_n > 1
            ),
            total_tokens_per_second=sum(t.predicted_n for t in timings) / seconds,
            prompt_tokens=max(t.prompt_n for t in timings),
            each=tuple(answer.times for answer in answers),
        )
        return speed, tuple(answers)

    async def arrive(self, offsets: Iterable[float]) -> tuple[float, tuple[RequestTimes, ...]]:
        """Ask the prompts in turn, each at its time, whatever is still to be answered.

        Args:
            offsets: Seconds from now, ascending.

        Returns:
            The seconds until the last answer, and the times of each request.
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
            raise first_of(group) from None
        return anyio.current_time() - began, tuple(times)

    async def surprise(self, quality: Perplexity) -> tuple[float, float]:
        """Measure the perplexity of the expected texts, and their bits per character."""
        likelihoods: list[float] = []
        characters = 0
        for prompt, asked in zip(self._workload.prompts, self._prompts, strict=True):
            if text := quality.expected.get(prompt):
                likelihoods += await self._likelihoods(asked, text)
                characters += len(text)
        surprise = -sum(likelihoods)
        try:
            perplexity = math.exp(surprise / len(likelihoods))
        except OverflowError:
            raise ExperimentError(
                "The perplexity is infinite: the model gives a token of an expected text zero"
                " probability. Give another text, or leave perplexity out."
            ) from None
        return perplexity, surprise / math.log(2) / characters

    async def _likelihoods(self, prompt: str, text: str) -> list[float]:
        """Return the log-probabilities of a text's own tokens after a prompt."""
        before = await self._tokens(prompt)
        whole = await self._tokens(prompt + text)
        if whole[: len(before)] != before:  # a token reaches across the seam
            whole = before + await self._tokens(text, add_special=False)
        ids = [token for token, _ in whole]
        return [
            await self._likelihood(ids[:end], *whole[end]) for end in range(len(before), len(whole))
        ]

    async def _likelihood(self, before: list[int], token: int, piece: _Piece) -> float:
        """Return the log-probability of the next token.

        A server reports the probability of the token it takes, so it is made to take this one, with
        a request for each: it reports nothing about tokens that it speculates on. Nor does it about
        a part of a character, which is looked up among the likeliest tokens instead, while the
        server takes a whole character.
        """
        taken, counts = token, [1]
        if not isinstance(piece, str):
            taken, counts = (await self._tokens("a", add_special=False))[-1][0], [*_LIKELIEST]
        for count in counts:
            found = await self._probabilities(before, taken, count)
            if token in found:
                return found[token]
        raise ExperimentError(
            "Perplexity cannot be measured: this build of llama-server does not report the"
            " probability of a given token. Update llama.cpp, or leave it out."
        )

    async def _probabilities(self, before: list[int], taken: int, count: int) -> dict[int, float]:
        """Return the log-probabilities of the token taken and of the `count` likeliest."""
        request = {
            "prompt": before,
            "n_predict": 1,
            "n_probs": count,
            "temperature": 0.0,
            "logit_bias": [[taken, _CERTAIN]],
            "cache_prompt": True,
            "id_slot": 0,
        }
        body = await post(self._http, "/completion", request, "content")
        return {
            one["id"]: one["logprob"]
            for token in body.get("completion_probabilities", ())
            for one in (token, *token.get("top_logprobs", ()))
            if {"id", "logprob"} <= one.keys()
        }

    async def _tokens(self, text: str, *, add_special: bool = True) -> list[tuple[int, _Piece]]:
        request = {"content": text, "add_special": add_special, "with_pieces": True}
        tokens = (await post(self._http, "/tokenize", request, "tokens"))["tokens"]
        return [(one["id"], one["piece"]) for one in tokens if isinstance(one, dict)]

    async def _filled(self, prompt: str) -> str:
        """Repeat a prompt until it is as long as the workload wants, or the context allows."""
        workload = self._workload
        if not workload.fill:
            return prompt
        once, twice = [len(await self._tokens(t)) for t in (prompt, f"{prompt} {prompt}")]
        size, templated = twice - once, len(await self._tokens(await self._templated(prompt)))
        if size < 1:  # a build without pieces, or a model without a vocabulary
            return prompt
        room = (self.context or 0) // workload.levels[-1] - workload.max_tokens - (templated - size)
        return " ".join([prompt] * max(1, min(math.ceil(workload.fill / size), room // size)))

    async def _templated(self, prompt: str) -> str:
        if not self._workload.chat:
            return prompt
        request = {"messages": [{"role": "user", "content": prompt}]}
        return str((await post(self._http, "/apply-template", request, "prompt"))["prompt"])

    async def _ask(self, prompt: int, **changes: object) -> Answer:
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
    """Measure a trial on a server of its own, and return its row. It does not raise.

    The server has a free port, a profile and a log of its own, so whatever else is served goes on;
    it ends with this call, also when that is cancelled or this process is killed.

    Args:
        trial: What to try.
        on_progress: Called with the load's progress and with each answer.
        config: The settings that it changes, as they are on this machine.
        workload: What to ask.
        folder: Where the server's log goes; without it the log goes with the server.
    """
    run = _Run(trial, on_progress, workload)
    began = time.monotonic()
    try:
        await run.measure(config, folder)
    except WillNotFitError as error:
        run.end(Outcome.SKIPPED, str(error))
    except KittyError as error:
        run.end(Outcome.FAILED, str(error))
    except OSError as error:
        problem = f"Can't write to {error.filename or folder}: {error.strerror or error}."
        run.end(Outcome.FAILED, f"{problem} Free some space or fix its permissions.")
    seconds = replace(run.row.seconds, overall=time.monotonic() - began)
    return replace(run.row, seconds=seconds, at=time.time())


async def engine_of(trial: Trial, config: ServerConfig) -> Engine:
    """Find the engine of a trial on this machine.

    Raises:
        EngineError: There is none, or it cannot be run.
    """
    binary = dict(trial.settings).get("binary", config.binary)
    return await locate_engine(Path(str(binary)) if binary else None)


def this_machine(
    config: ServerConfig, workload: Workload, logs: Path | None = None
) -> AbstractAsyncContextManager[Execute]:
    """Provide the callable that runs trials here.

    Args:
        config: The settings that trials change.
        workload: What to ask each server.
        logs: A folder for the servers' logs, to be kept; without it they go with the trial.
    """
    return nullcontext(partial(run_trial, config=config, workload=workload, folder=logs))


def fingerprint_of(model: str, config: ServerConfig) -> ModelFingerprint:
    """Fingerprint a model on this machine. It blocks.

    Args:
        model: Its name in trials.
        config: The sweep's settings, which say where models are.

    Raises:
        ConfigError: The model is missing.
    """
    facts = gather_facts(resolve_model(config.replace(model=model)))
    return ModelFingerprint(facts.size, facts.digest)


def fingerprints_here(
    models: Iterable[str], config: ServerConfig, *, must_exist: bool = False
) -> dict[str, ModelFingerprint]:
    """Fingerprint the models that can be read on this machine. It blocks.

    Args:
        models: Their names in trials.
        config: The sweep's settings, which say where models are.
        must_exist: Whether a missing model is an error.

    Raises:
        ConfigError: Listing the missing models.
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


class _Run:
    """One trial under way, with what is known of its row."""

    def __init__(self, trial: Trial, on_progress: OnProgress, workload: Workload) -> None:
        self.row = TrialResult(trial, Outcome.DONE, host=this_host())
        self._trial = trial
        self._on_progress = on_progress
        self._workload = workload
        self._answered = 0

    def end(self, outcome: Outcome, reason: str) -> None:
        """Record the reason that the trial was not measured."""
        self.row = replace(self.row, outcome=outcome, reason=reason)

    async def measure(self, config: ServerConfig, folder: Path | None) -> None:
        """Start the server, measure it and stop it; then judge its answers."""
        trial, workload = self._trial, self._workload
        busy = await run_sync(psutil.cpu_percent, _LOAD_SECONDS)
        engine = await engine_of(trial, config)
        self.row = replace(self.row, engine=engine.version)
        name = f"trial_{trial.key}"
        own = config.replace(**changes(trial, config, engine.dialect), profile=name, alias=name)
        fingerprint = await run_sync(fingerprint_of, trial.model, config)
        self.row = replace(self.row, fingerprint=fingerprint)
        document = ""
        async with isolated_server(own, folder, on_progress=self._loading) as server:
            self.row = replace(self.row, seconds=TrialSeconds(server.load.total))
            async with server.access.async_http() as http:
                client = BenchmarkClient(http, workload, dict(trial.settings))
                began = time.monotonic()
                await client.warm_up()
                warm = time.monotonic()
                measured, answers = await self._ask(client, server)
                seconds = TrialSeconds(server.load.total, warm - began, time.monotonic() - warm)
            if workload.record:
                exchanges = tuple(answer.exchange for answer in answers)
                record = await describe_run(server.state, server.access, exchanges, workload.seed)
                document = record.to_json()
        quality, problem = await run_sync(_judge, workload, measured.answers)
        self.row = replace(
            self.row,
            measurement=replace(measured, quality=quality, machine_load=busy / 100),
            document=document,
            seconds=seconds,
            reason=problem or _queued(workload.levels[-1], client.slots),
        )

    async def _ask(
        self, client: BenchmarkClient, server: IsolatedServer
    ) -> tuple[Measurement, tuple[Answer, ...]]:
        speeds = []
        first: tuple[Answer, ...] = ()
        pid = server.state.pid or 0
        before = await usage_with(pid)
        for parallel in self._workload.levels:
            speed, answers = await client.speed(parallel, partial(self._on_answer, parallel))
            await server.sample_memory()
            speeds.append(replace(speed, memory=server.memory, gpu_memory=server.gpu_memory))
            first = first or answers
        noise = await noise_since(before, pid)
        perplexity = bits = None
        if isinstance(self._workload.quality, Perplexity):
            perplexity, bits = await client.surprise(self._workload.quality)
            await server.sample_memory()
        texts = {answer.times.prompt: answer.exchange.output for answer in first}
        measured = Measurement(
            load=server.load,
            speeds=tuple(speeds),
            memory=server.memory,
            gpu_memory=server.gpu_memory,
            context=client.context,
            answers=tuple(texts[index] for index in sorted(texts)),
            perplexity=perplexity,
            bits_per_character=bits,
            slots=client.slots,
            noise=noise,
        )
        return measured, first

    def _loading(self, progress: LoadProgress) -> None:
        self._on_progress(TrialProgressed(self._trial, progress))

    def _on_answer(self, parallel: int, answer: Answer) -> None:
        self._answered += 1
        self._on_progress(
            RequestAnswered(
                trial=self._trial,
                done=self._answered,
                total=self._workload.requests,
                parallel=parallel,
                tokens_per_second=answer.timings.predicted_per_second,
                prompt_tokens_per_second=answer.timings.prompt_per_second,
                time_to_first_token=answer.times.time_to_first_token,
            )
        )


def _judge(workload: Workload, answers: tuple[str, ...]) -> tuple[float | None, str]:
    """Return the user's mean score of the answers, and what is wrong with the scoring."""
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
