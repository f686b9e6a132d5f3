"""Asking a server that is ready, and writing down all that its answers depend on."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import httpx
from anyio.to_thread import run_sync
from pydantic import ValidationError

from kitty_nb.client import not_an_answer
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.host_facts import host_facts, library_versions
from kitty_nb.experiments.model_files import digest_model
from kitty_nb.experiments.run_record import EngineFacts, Exchange, Request, RunRecord, Timings
from kitty_nb.isolated_server import LoadSeconds, find_load, gather_facts, locate_engine

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pydantic import JsonValue

    from kitty_nb import ServerState
    from kitty_nb.client import Access
    from kitty_nb.experiments.model_files import OnProgress
    from kitty_nb.isolated_server import LoadRecord
    from kitty_nb.manager import ModelManager, Operation

    Prompt = str | Sequence[dict[str, JsonValue]] | Request

_TOO_LONG = "exceed_context_size_error"


def record_run(
    manager: ModelManager,
    prompts: str | Request | Iterable[Prompt],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    **parameters: JsonValue,
) -> Operation[RunRecord]:
    """Ask the server that a manager runs, one request after the other, and record the run.

    Answers are greedy, so that they can be repeated; with a temperature, the seed makes them so.

    Args:
        manager: Its server must be ready.
        prompts: What a user says, one conversation each; or whole conversations, as lists of
            messages; or requests, whose own parameters go before those given here.
        max_tokens: The longest answer, in tokens.
        temperature: Of sampling; 0 takes the likeliest token each time.
        seed: Of sampling.
        on_progress: Called in a worker thread with the bytes of the model that are hashed, and that
            are to be: only the first time that a model is recorded.
        parameters: What else llama-server takes with a request, such as `top_k=1`.

    Raises:
        KittyError: The server is not ready or was not started by kitty_nb, or a prompt is nothing
            to ask. Waiting for the result raises ExperimentError when the server refuses a request,
            such as one that is longer than its context.
    """
    sampling: dict[str, JsonValue] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "cache_prompt": False,  # what was asked before must not change how this is computed
        **parameters,
    }
    requests = tuple(
        _request(prompt, sampling)
        for prompt in ([prompts] if isinstance(prompts, str | Request) else prompts)
    )
    access, state = manager.access, manager.state
    if state.foreign:
        raise ExperimentError(
            f"{state.foreign.who} was not started by kitty_nb, so which model and settings answer"
            " is not known. Start a server of your own, and record that."
        )

    async def run() -> RunRecord:
        exchanges = await ask(access, requests)
        if manager.state.ready_since != state.ready_since:
            raise ExperimentError(
                "The server was replaced or has ended while it was asked, so this is no run of"
                " one server. Start it, and record again."
            )
        return await describe_run(state, access, exchanges, seed, on_progress)

    return manager.run(run)


async def ask(access: Access, requests: Iterable[Request]) -> tuple[Exchange, ...]:
    """Send requests to a server, one after the other.

    Raises:
        ExperimentError: The server refuses one, or breaks off.
    """
    async with access.async_http() as http:
        return tuple([await _ask(http, request) for request in requests])


async def describe_run(
    state: ServerState,
    access: Access,
    exchanges: tuple[Exchange, ...],
    seed: int,
    on_progress: OnProgress | None = None,
) -> RunRecord:
    """Put together the record of a server that is ready.

    Args:
        state: Of the server.
        access: How to reach it.
        exchanges: What it was asked, and what it has answered.
        seed: Of all sampling.
        on_progress: As for `record_run`.

    Raises:
        ModelFileError: Which model it is cannot be told.
        ExperimentError: The model's file has changed since it was loaded.
    """
    config = state.config
    engine = await locate_engine(config.binary)
    load = await find_load(state)
    facts = await run_sync(gather_facts, config)
    ready_ns = (time.time() - (state.uptime or 0.0)) * 1e9
    if facts.mtime_ns != load.mtime_ns if load else facts.mtime_ns > ready_ns:
        raise ExperimentError(
            f"{config.model} has changed since this server has loaded it, so which model has"
            " answered cannot be told. Restart the server, and record again."
        )
    return RunRecord(
        made=datetime.now(UTC),
        config=config,
        model=await digest_model(config, on_progress),
        header=facts.digest,
        engine=EngineFacts(
            kind=engine.kind,
            version=engine.version,
            build=await _build(access),
            devices=state.devices,
        ),
        host=await run_sync(host_facts),
        libraries=await run_sync(library_versions),
        seed=seed,
        load_seconds=_seconds(load) if load else None,
        exchanges=exchanges,
    )


def _seconds(load: LoadRecord) -> LoadSeconds:
    return LoadSeconds(
        starting=load.starting,
        loading=load.loading,
        preparing=load.preparing,
        cached=load.cached,
    )


def _request(prompt: Prompt, sampling: dict[str, JsonValue]) -> Request:
    if isinstance(prompt, Request):
        parameters = {**sampling, **prompt.parameters}
        return prompt.model_copy(update={"parameters": parameters})
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    try:
        return Request.model_validate({"messages": prompt, "parameters": sampling})
    except ValidationError as error:
        raise ExperimentError(
            f"This cannot be asked: {prompt!r}. Write a text, a list of messages such as"
            ' {"role": "user", "content": "…"}, or a Request.'
        ) from error


async def _ask(http: httpx.AsyncClient, request: Request) -> Exchange:
    try:
        response = await http.post(request.path, json=request.body)
    except httpx.HTTPError as error:
        raise ExperimentError(
            f"The server broke off its answer ({type(error).__name__}). See its log: it was"
            " stopped, or has crashed."
        ) from error
    if response.is_error:
        raise ExperimentError(_refusal(response))
    try:
        answer = response.json()
        choice = answer["choices"][0]
        message = choice.get("message", {"content": choice.get("text")})
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ExperimentError(not_an_answer(response, response.text)) from None
    calls = message.get("tool_calls") or ()
    timings = answer.get("timings")
    return Exchange(
        request=request,
        output=message.get("content") or "",
        reasoning=message.get("reasoning_content") or "",
        tool_calls=tuple({key: call[key] for key in call if key != "id"} for call in calls),
        finish_reason=choice.get("finish_reason"),
        timings=timings and Timings.model_validate(timings),
    )


def _refusal(response: httpx.Response) -> str:
    """Say what a server's refusal means to the user."""
    try:
        error = response.json()["error"]
        kind, said = error.get("type"), error.get("message")
    except (ValueError, KeyError, TypeError, AttributeError):
        error, kind, said = {}, None, response.text.strip()
    if kind == _TOO_LONG:
        return (
            f"A prompt of {error.get('n_prompt_tokens', '?')} tokens is longer than the context of"
            f" a request, {error.get('n_ctx', '?')} tokens. Raise context_size, lower parallel, or"
            " shorten the prompt."
        )
    return f"The server refused a request with status {response.status_code}: {said}"


async def _build(access: Access) -> str:
    """What the running server calls itself; older builds do not."""
    async with access.async_http() as http:
        try:
            answer = (await http.get("/props")).json()
        except (httpx.HTTPError, ValueError):
            return ""
    return str(answer.get("build_info", "")) if isinstance(answer, dict) else ""
