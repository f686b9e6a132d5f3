"""`BenchmarkClient`: measures how fast, and how well, a ready server answers."""

from __future__ import annotations

import math
import time
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from kitty_nb.client import answer_parts, refusal
from kitty_nb.errors import ExperimentError, first_of
from kitty_nb.experiments.run_record import Exchange, Request, Timings
from kitty_nb.experiments.trial import Speed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pydantic import JsonValue

    from kitty_nb.experiments.trial import Value
    from kitty_nb.experiments.workload import Perplexity, Workload

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
        prompt: Index of its prompt.
        first_token: Seconds until its first token arrived.
        timings: The server's own.
        exchange: What was asked and answered, as a run record keeps it.
    """

    prompt: int
    first_token: float
    timings: Timings
    exchange: Exchange


class BenchmarkClient:
    """The requests of a workload to one server.

    Its methods raise ExperimentError where the server refuses a request, and `httpx.HTTPError`
    where it falls silent.

    Args:
        http: A client of the server; from now on it makes a connection for each request.
        workload: What to ask.
        settings: Those of the trial; requests leave alone what it tries.
    """

    def __init__(
        self, http: httpx.AsyncClient, workload: Workload, settings: Mapping[str, Value]
    ) -> None:
        # llama-server ends an idle connection after seconds, at worst just as it is used again.
        http.headers["Connection"] = "close"
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

    async def warm_up(self) -> tuple[int | None, int | None]:
        """Prepare the prompts and have one answered before anything is measured.

        Returns:
            The context of a request, and the number of requests that the server answers at once;
            None where a build does not say.
        """
        workload = self._workload
        props = _body(await self._http.get("/props"))
        context = props.get("default_generation_settings", {}).get("n_ctx")
        for prompt in workload.prompts:
            filled = await self._filled(prompt, context or 0)
            self._prompts.append(await self._templated(filled))
        await self._ask(0, n_predict=min(workload.max_tokens, _WARM_UP_TOKENS))
        return context, props.get("total_slots")

    async def speed(
        self, parallel: int, on_answer: Callable[[Answer], object]
    ) -> tuple[Speed, tuple[Answer, ...]]:
        """Ask every prompt, so many at once, and call back with each answer."""
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
        return _speed(parallel, seconds, answers), tuple(answers)

    async def surprise(self, quality: Perplexity) -> tuple[float, float]:
        """Measure the perplexity of the expected texts, and their bits per character."""
        likelihoods: list[float] = []
        characters = 0
        for index, prompt in enumerate(self._workload.prompts):
            if text := quality.expected.get(prompt):
                likelihoods += await self._likelihoods(self._prompts[index], text)
                characters += len(text)
        if not likelihoods:
            raise ExperimentError("Perplexity has no expected text for any of the prompts.")
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

        A server reports that of the token it takes, so it is made to take this one; a request
        each, because it reports nothing of tokens that it speculates on, nor of a part of a
        character: that is looked up among all tokens while a whole one is taken.
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
        """Return the log-probabilities of the token taken and of the likeliest, by token."""
        body = await self._post(
            "/completion",
            prompt=before,
            n_predict=1,
            n_probs=count,
            temperature=0.0,
            logit_bias=[[taken, _CERTAIN]],
            cache_prompt=True,
            id_slot=0,
        )
        return {
            one["id"]: one["logprob"]
            for token in body.get("completion_probabilities", ())
            for one in (token, *token.get("top_logprobs", ()))
            if {"id", "logprob"} <= one.keys()
        }

    async def _tokens(self, text: str, *, add_special: bool = True) -> list[tuple[int, _Piece]]:
        body = await self._post(
            "/tokenize", content=text, add_special=add_special, with_pieces=True
        )
        tokens = body.get("tokens", ())
        return [(one["id"], one["piece"]) for one in tokens if isinstance(one, dict)]

    async def _filled(self, prompt: str, context: int) -> str:
        """Repeat a prompt until it is as long as the workload wants, or the context allows."""
        workload = self._workload
        if not workload.fill:
            return prompt
        once, twice = [len(await self._tokens(t)) for t in (prompt, f"{prompt} {prompt}")]
        size, templated = twice - once, len(await self._tokens(await self._templated(prompt)))
        if size < 1:  # this build does not tokenize
            return prompt
        room = context // workload.levels[-1] - workload.max_tokens - (templated - size)
        return " ".join([prompt] * max(1, min(math.ceil(workload.fill / size), room // size)))

    async def _templated(self, prompt: str) -> str:
        if not self._workload.chat:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        return str((await self._post("/apply-template", messages=messages))["prompt"])

    async def _post(self, path: str, **request: object) -> dict[str, Any]:
        response = await self._http.post(path, json=request)
        if response.status_code == HTTPStatus.NOT_FOUND:
            raise ExperimentError(
                f"This build of llama-server has no {path}, which chat templates and perplexity"
                " need. Update llama.cpp, or write chat=False to send prompts as they are."
            )
        if response.is_error:
            raise ExperimentError(refusal(response.content, response.status_code))
        return _body(response)

    async def _ask(self, prompt: int, **changes: object) -> Answer:
        request = Request(text=self._prompts[prompt], parameters=self._parameters)
        body = {**request.body, "stream": True, **changes}
        began, first_token, pieces = time.perf_counter(), None, []
        async with self._http.stream("POST", "/completion", json=body) as response:
            if response.is_error:
                raise ExperimentError(refusal(await response.aread(), response.status_code))
            async with aclosing(answer_parts(response)) as parts:
                async for part in parts:
                    if first_token is None:
                        first_token = time.perf_counter() - began
                    if part.get("error"):
                        raise ExperimentError(refusal(part))
                    pieces.append(part.get("content", ""))
                    if "timings" in part:
                        timings = Timings.model_validate(part["timings"])
                        exchange = Exchange(
                            request=request,
                            output="".join(pieces),
                            finish_reason=_FINISHED.get(part.get("stop_type", "")),
                            timings=timings,
                        )
                        return Answer(prompt, first_token, timings, exchange)
        raise httpx.RemoteProtocolError("the answer ended early")


def _speed(parallel: int, seconds: float, answers: list[Answer]) -> Speed:
    timings = [answer.timings for answer in answers]
    return Speed(
        parallel=parallel,
        requests=len(answers),
        seconds=seconds,
        time_to_first_token=median(answer.first_token for answer in answers),
        prompt_tokens_per_second=_median(t.prompt_per_second for t in timings if t.prompt_n),
        generation_tokens_per_second=_median(
            t.predicted_per_second for t in timings if t.predicted_n > 1
        ),
        total_tokens_per_second=sum(t.predicted_n for t in timings) / seconds,
        prompt_tokens=max(t.prompt_n for t in timings),
    )


def _median(rates: Iterable[float | None]) -> float | None:
    known = [rate for rate in rates if rate and math.isfinite(rate)]
    return median(known) if known else None


def _body(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
