"""Load tests: closed loops of concurrent requests, and open loops of arrivals at a rate."""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING

import httpx
from anyio.to_thread import run_sync

from kitty_nb.catalog.model import name_some
from kitty_nb.catalog.resolve import resolve_model, routed_profiles
from kitty_nb.client import Access
from kitty_nb.client.protocol import broken_off
from kitty_nb.config import ServerConfig
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.arguments import (
    config_of,
    numbers,
    positive,
    require,
    require_function,
    whole,
)
from kitty_nb.experiments.bounds import read_bound
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.latency import LATENCIES, PERCENTILES, latencies, percent_of
from kitty_nb.experiments.measure import BenchmarkClient
from kitty_nb.experiments.metrics import known
from kitty_nb.experiments.noise import noise_since, usage_with
from kitty_nb.experiments.output import frame_of, markdown_table, number, write_parquet
from kitty_nb.experiments.trial import CONNECTIONS, DEFAULT_PROMPT, RequestTimes, Workload
from kitty_nb.isolated_server import (
    access_at_url,
    in_background,
    isolated_server,
    pid_at,
    require_here,
)
from kitty_nb.operation import Operation

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
    from pathlib import Path

    from matplotlib.figure import Figure
    from pandas import DataFrame

    from kitty_nb.experiments.bounds import Constraint
    from kitty_nb.experiments.noise import Noise, Usage
    from kitty_nb.experiments.plots import Point
    from kitty_nb.isolated_server import LoadProgress

    OnLoad = Callable[["Load"], object]

_AT_ONCE = (1, 4)  # default numbers of concurrent requests
_GAIN = 1.1  # more requests at once that gain less find all slots busy
_SHOWN = ("p50", "p90", "p99")


class Arrivals(StrEnum):
    """The arrival process: even gaps, or random ones as from independent people."""

    CONSTANT = "constant"
    POISSON = "poisson"


@dataclass(frozen=True, slots=True)
class Load:
    """A load on a server, and the times of its requests.

    Attributes:
        concurrency: The number of concurrent requests, each sent when another is answered (closed
            loop); None for an open loop.
        rate: Requests per second, sent regardless of answers (open loop); None for a closed loop.
        seconds: Seconds from the first request to the last answer.
        requests: The times of each request, in the order of their answers.
        noise: How busy the machine was; None if the server is elsewhere, or the load was too short.
    """

    concurrency: int | None
    rate: float | None
    seconds: float
    requests: tuple[RequestTimes, ...]
    noise: Noise | None = None

    @property
    def busy(self) -> bool:
        """True if other processes are likely to have distorted the measurement."""
        return self.noise is not None and self.noise.busy

    @property
    def label(self) -> str:
        """A short description of the load."""
        return (
            f"{self.concurrency} at once" if self.rate is None else f"{number(self.rate)} a second"
        )

    def metrics(self, percents: Iterable[int] = PERCENTILES) -> dict[str, float]:
        """Return the metrics by name: rates per second, and latency percentiles in seconds."""
        return {
            "requests_per_second": len(self.requests) / self.seconds,
            "total_tokens_per_second": sum(one.tokens for one in self.requests) / self.seconds,
            **latencies(self.requests, percents),
        }


@dataclass(frozen=True, repr=False)
class LoadTest:
    """The outcome of a load test; `print` shows a Markdown table.

    Attributes:
        loads: The loads, in order.
        limit: The latency limit, as given; empty without one.
        highest_rate: The highest rate tried that kept the limit; None if none did.
        broken_rate: The lowest rate tried that exceeded the limit; None if none did.
    """

    loads: tuple[Load, ...]
    limit: str = ""
    highest_rate: float | None = None
    broken_rate: float | None = None

    @property
    def summary(self) -> str:
        """The highest rate that keeps the limit, as a sentence; empty without a limit."""
        if not self.limit:
            return ""
        highest, broken = map(_number, (self.highest_rate, self.broken_rate))
        if self.highest_rate is None:
            return f"No rate kept {self.limit}, not even {broken} requests a second."
        held = f"{self.limit} holds up to {highest} requests a second"
        if self.broken_rate is None:
            return f"{held}, the most that the server can answer."
        return f"{held}, but not at {broken}."

    @property
    def frame(self) -> DataFrame:
        """The loads as a data frame, with a row per load."""
        return frame_of(
            {
                **_named(load),
                **load.metrics(),
                "busy": load.busy,
                "other_processes": load.noise.others if load.noise else None,
            }
            for load in self.loads
        )

    @property
    def requests(self) -> DataFrame:
        """The requests as a data frame; `sent` is in seconds since the epoch."""
        return frame_of(
            {**_named(load), **one.columns} for load in self.loads for one in load.requests
        )

    def plot(self, y: str = LATENCIES[0]) -> Figure:
        """Plot percentiles of `time_to_first_token`, or of `time_between_tokens`.

        They are drawn against the rate, or else against concurrency.
        """
        extra("matplotlib")
        from kitty_nb.experiments.plots import curves  # noqa: PLC0415 (of an extra)

        known(y, LATENCIES)
        x = "rate" if any(load.rate for load in self.loads) else "concurrency"
        points: dict[str, list[Point]] = {}
        for load in self.loads:
            found, place = load.metrics(), getattr(load, x)
            for percent in _SHOWN:
                if place and (value := found.get(f"{y}_{percent}")) is not None:
                    points.setdefault(percent, []).append((place, value, value, value))
        words = {"rate": "requests per second", "concurrency": "requests at once"}
        return curves(points, y, words[x])

    def to_parquet(self, path: str | Path) -> Path:
        """Write the requests as Parquet, and return the path."""
        return write_parquet(self.requests, path)

    def __str__(self) -> str:
        head = (
            "load",
            "requests",
            "requests/s",
            "tokens/s",
            *(f"{name.replace('_', ' ')}, s: {' / '.join(_SHOWN)}" for name in LATENCIES),
        )
        rows = []
        for load in self.loads:
            found = load.metrics()
            each = (
                " / ".join(_number(found.get(f"{name}_{percent}")) for percent in _SHOWN)
                for name in LATENCIES
            )
            rates = (found["requests_per_second"], found["total_tokens_per_second"])
            rows.append((load.label, str(len(load.requests)), *map(_number, rates), *each))
        lines = markdown_table(head, rows, "lrrrrr")
        notes = [
            f"- {one.label}: {one.noise.warning}" for one in self.loads if one.noise and one.busy
        ]
        for below in (notes, [self.summary]):
            lines += ["", *below] if any(below) else []
        return "\n".join(lines)

    __repr__ = _repr_markdown_ = __str__


def load_test(
    model: object = None,
    *,
    concurrency: int | Iterable[int] = (),
    rate: float | Iterable[float] = (),
    arrivals: str = Arrivals.POISSON,
    limit: str = "",
    requests: int = 100,
    prompts: str | Iterable[str] = DEFAULT_PROMPT,
    max_tokens: int = 64,
    seed: int = 0,
    chat: bool = True,
    steps: int = 6,
    config: ServerConfig | None = None,
    access: Access | None = None,
    on_load: OnLoad = lambda _: None,
) -> Operation[LoadTest]:
    """Start a load test in the background.

    A request that finds all slots busy waits in the server, and the wait counts towards the time to
    first token. With a limit, the test searches for the highest rate that keeps it: it measures the
    throughput with all slots busy, tries that rate, and bisects. To find the throughput of a server
    that doesn't tell its slots, it doubles the number of concurrent requests until that gains
    hardly anything.

    Args:
        model: The model file, absolute or in the models folder; by default the one in `config`.
            With `access`, one of the models that the running server lists, such as a router's.
        concurrency: Numbers of concurrent requests (closed loop). By default 1 and 4, unless you
            give a rate or a limit.
        rate: Requests per second, sent regardless of answers (open loop).
        arrivals: `poisson`, or `constant` for even gaps.
        limit: A limit on a latency percentile, in seconds, such as
            `time_to_first_token_p95 <= 2`.
        requests: Requests per load. A p90 needs 10, a p95 20, and a p99 100.
        prompts: User messages, asked in turn.
        max_tokens: Length of each answer, in tokens.
        seed: The seed of the arrivals and of the server's sampling.
        chat: Whether prompts go through the model's chat template.
        steps: The maximum number of rates to try for the limit.
        config: The server's settings; by default those of `.env`.
        access: A running server, such as `manager.access`. By default the test asks the one at the
            URL in the settings, by OpenAI's protocol, so its answers end where the model ends them;
            without a URL it starts its own server, and stops it at the end.
        on_load: Called after each load.

    Returns:
        The test in progress; cancelling it stops its server. Its result may be any error of
        starting a server or sending requests.

    Raises:
        ConfigError: A setting or option is wrong.
        ExperimentError: A number is wrong, or the limit can't be parsed or needs more requests.
    """
    given = numbers("concurrency", concurrency)
    at_once = tuple(whole("concurrency", one, 1, CONNECTIONS) for one in given)
    rates = tuple(positive("rate", one) for one in numbers("rate", rate))
    if not (at_once or rates or limit):
        at_once = _AT_ONCE
    whole("steps", steps, 1)
    if arrivals not in tuple(Arrivals):
        raise ExperimentError(f"Unknown arrivals {arrivals!r}. Use poisson or constant.")
    asked = {"max_tokens": max_tokens, "seed": seed, "chat": chat, "at_least": requests}
    workload = Workload.of(prompts, at_once or 1, None, **asked)
    bound = _read_limit(limit, workload) if limit else None
    require_function("on_load", on_load, "a load")
    if access is not None:
        require("access", access, Access, "a running server's, such as manager.access")
    here = ServerConfig() if access and config is None else config_of(config)
    if here.models is not None and model is None:
        raise ExperimentError(
            f"{here.profile} is a router, and a load test measures one model. Choose the profile of"
            f" one: {', '.join(one.profile for one in routed_profiles(here).profiles)}."
        )
    progress: deque[LoadProgress] = deque(maxlen=1)

    async def run() -> LoadTest:
        async with (
            _server(model, here, access, progress.append) as (reached, pid),
            reached.async_http() as http,
        ):
            client = BenchmarkClient(http, workload, {}, reached.model)
            await client.warm_up()
            test = _Test(client, workload, Arrivals(arrivals), on_load, pid)
            for several in at_once:
                await test.closed(several)
            for one in rates:
                await test.open(one)
            return await test.search(bound, limit, steps) if bound else LoadTest(test.loads)

    future = in_background(run, "kitty_nb load test")[1]
    return Operation(future, lambda: progress[-1] if progress else None)


def arrival_times(rate: float, count: int, arrivals: Arrivals, seed: int) -> Iterator[float]:
    """Yield the arrival times of requests, in seconds after the first. Pure.

    With the same seed, another rate only rescales the times.
    """
    random = Random(seed)  # noqa: S311 (no secret)
    at = 0.0
    for _ in range(count):
        yield at
        at += 1 / rate if arrivals is Arrivals.CONSTANT else random.expovariate(1.0) / rate


def next_rate(kept: float, broken: float | None, most: float) -> float:
    """Return the next rate of a bisection, which starts at the server's throughput. Pure."""
    return most if broken is None else (kept + broken) / 2


@dataclass
class _Test:
    """A load test on one server, with the loads so far."""

    client: BenchmarkClient
    workload: Workload
    arrivals: Arrivals
    on_load: OnLoad
    pid: int | None
    loads: tuple[Load, ...] = ()

    async def closed(self, concurrency: int) -> Load:
        before = await self._usage()
        speed, _ = await self.client.speed(concurrency, lambda _: None)
        return await self._add(Load(concurrency, None, speed.seconds, speed.each), before)

    async def open(self, rate: float) -> Load:
        count = len(self.workload.asked(1))
        offsets = arrival_times(rate, count, self.arrivals, self.workload.seed)
        before = await self._usage()
        seconds, times = await self.client.arrive(offsets)
        return await self._add(Load(None, rate, seconds, times), before)

    async def search(self, bound: Constraint, limit: str, steps: int) -> LoadTest:
        most = await self._throughput()
        kept, broken = 0.0, None
        for _ in range(steps):
            rate = next_rate(kept, broken, most)
            load = await self.open(rate)
            value = load.metrics({percent_of(bound.name)}).get(bound.name)
            if value is None:  # answers may be shorter than asked for
                several = sum(one.time_between_tokens is not None for one in load.requests)
                raise ExperimentError(
                    f"Only {several} of {len(load.requests)} answers have two tokens or more, too"
                    f" few for {bound.name}. Raise requests, or use prompts with longer answers."
                )
            if bound.allows(value):
                kept = rate
                if broken is None:
                    break
            else:
                broken = rate
        return LoadTest(self.loads, limit, kept or None, broken)

    async def _throughput(self) -> float:
        """Measure how many requests a second the server answers with all slots busy.

        If it doesn't tell its slots, they are busy when twice as many requests gain hardly more.
        """
        at_once, most, gains = self.client.slots or _AT_ONCE[-1], 0.0, True
        while gains:
            now = (await self.closed(at_once)).metrics()["requests_per_second"]
            gains = not self.client.slots and now > most * _GAIN
            at_once, most = at_once * 2, max(most, now)
        return most

    async def _usage(self) -> Usage | None:
        return await usage_with(self.pid) if self.pid else None

    async def _add(self, load: Load, before: Usage | None) -> Load:
        if self.pid and before:
            load = replace(load, noise=await noise_since(before, self.pid))
        self.loads += (load,)
        self.on_load(load)
        return load


@asynccontextmanager
async def _server(
    model: object,
    config: ServerConfig,
    access: Access | None,
    on_progress: Callable[[LoadProgress], object],
) -> AsyncGenerator[tuple[Access, int | None]]:
    """Provide access to the running server, or to one started for this test, with its PID."""
    if access is None and config.url and model is None:
        access = await access_at_url(config)
    if access:
        try:
            access = await _at_model(access, model)
            yield access, await run_sync(pid_at, access)
        except httpx.HTTPError as error:
            raise ExperimentError(broken_off(error)) from error
        return
    if model is not None:
        config = config.replace(model=model, allow_absolute_paths=True)
    require_here(config)
    resolved = await run_sync(resolve_model, config)
    async with isolated_server(resolved, on_progress=on_progress) as server:
        yield server.access, server.state.pid


async def _at_model(access: Access, model: object) -> Access:
    """Return access to one of the models that a running server lists."""
    if model is None and access.model:
        return access
    async with access.async_http() as http:
        said = await http.get("/v1/models")
    try:
        names = [one["id"] for one in said.json()["data"]]
    except (ValueError, LookupError, TypeError):  # not a list of models
        names = []
    if model is None and len(names) <= 1:
        return access
    if model not in names:
        has = name_some(names) or "none"
        lacks = "several models" if model is None else f"no model {str(model)!r}"
        raise ExperimentError(f"{access.endpoint} has {lacks}: {has}. Name one of these.")
    return replace(access, model=str(model))


def _read_limit(limit: str, workload: Workload) -> Constraint:
    """Parse a limit on a percentile, and check that there are enough requests for it."""
    bound = read_bound(limit, example="time_to_first_token_p95 <= 2")
    percents = {percent_of(bound.name), *PERCENTILES} - {0}
    each = [RequestTimes(0.0, 1.0, 2.0, 2)] * len(workload.asked(1))
    known(bound.name, latencies(each, percents))
    return bound


def _named(load: Load) -> dict[str, object]:
    return {"concurrency": load.concurrency, "rate": load.rate}


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)
