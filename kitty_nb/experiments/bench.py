"""`Bench`: llama-bench's table, measured through llama-server."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

import psutil
from anyio.to_thread import run_sync

from kitty_nb.catalog.model import read_facts
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.client.protocol import post, props
from kitty_nb.config.flags import value_of
from kitty_nb.errors import ExperimentError, WillNotFitError
from kitty_nb.experiments.arguments import SEEDS, config_to_start, numbers, require_function, whole
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.noise import noise_since, usage_with
from kitty_nb.experiments.output import frame_of, markdown_table
from kitty_nb.experiments.run_record import Timings
from kitty_nb.isolated_server import in_background, isolated_server, locate_engine
from kitty_nb.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import httpx
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.noise import Noise
    from kitty_nb.experiments.plots import Point
    from kitty_nb.isolated_server import Dialect, IsolatedServer

DEPTHS = (0, 4096, 16384)
_BILLION = 1_000_000_000
_TOKENS = 1 << 30  # far beyond any model's context
_PAD = 256  # llama.cpp rounds a context up to it
_AGREE = 0.03  # relative difference tolerated between the clock and the server's timings
_UNNOTICED = 0.05  # seconds of overhead, such as HTTP, that no server counts
_REREAD = 1.02  # ratio of tokens read to those asked for; a build may read the last one again
# llama-bench keeps no copies of the state, which would also split a prompt's batches.
_PLAIN = (("--ctx-checkpoints", "0"), ("--cache-ram", "0"))
# The cheapest sampler, because llama-bench does not sample at all.
_GREEDY = {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"]}
_COLUMNS = {"batch_size": "n_batch", "ubatch_size": "n_ubatch", "flash_attention": "fa"}
_CACHE = {"type_k": {"--cache-type-k", "-ctk"}, "type_v": {"--cache-type-v", "-ctv"}}


class BenchKind(StrEnum):
    """llama-bench's kinds of tests: prompt processing and text generation."""

    PROMPT = "pp"
    ANSWER = "tg"


@dataclass(frozen=True, slots=True)
class BenchTest:
    """A test of llama-bench: so many tokens to read or write, after `depth` tokens of context."""

    kind: BenchKind
    tokens: int
    depth: int = 0

    def __str__(self) -> str:
        name = f"{self.kind}{self.tokens}"
        return f"{name} @ d{self.depth}" if self.depth else name

    @property
    def prompt(self) -> int:
        """The number of tokens to read; a single one comes before an answer."""
        return self.tokens if self.kind is BenchKind.PROMPT else 1

    @property
    def context(self) -> int:
        """The context size needed, in tokens."""
        return self.depth + self.prompt + self.predicted

    @property
    def predicted(self) -> int:
        """The number of tokens to write; the first comes from reading, so it isn't counted."""
        return 1 if self.kind is BenchKind.PROMPT else self.tokens + 1


@dataclass(frozen=True, slots=True)
class BenchRow:
    """A test and its measurements.

    Attributes:
        speeds: Tokens per second by the server's own timings, one value per repeat.
        clock: The same by the client's clock, including the overhead of a request.
        reason: Why the test was not measured, in a sentence.
        noise: How busy the machine was; None if the test was too short to tell.
    """

    test: BenchTest
    speeds: tuple[float, ...] = ()
    clock: tuple[float, ...] = ()
    reason: str = ""
    noise: Noise | None = None

    @property
    def mean(self) -> float | None:
        """Mean tokens per second; None if not measured."""
        return fmean(self.speeds) if self.speeds else None

    @property
    def deviation(self) -> float:
        """The standard deviation of the speed over the repeats."""
        return stdev(self.speeds) if len(self.speeds) > 1 else 0.0

    @property
    def note(self) -> str:
        """Caveats about the measurement, in sentences; empty if there are none."""
        disturbed = self.noise.warning if self.speeds and self.noise else ""
        return " ".join(filter(None, (disturbed, self._by_clock))) or self.reason

    @property
    def _by_clock(self) -> str:
        if not self.speeds or not self.clock:
            return ""
        clock = fmean(self.clock)
        seconds = self.test.tokens * (1 / clock - 1 / fmean(self.speeds))
        if abs(clock / fmean(self.speeds) - 1) <= _AGREE or abs(seconds) <= _UNNOTICED:
            return ""
        advice = "" if self.noise else " Close other programs, and measure again."
        return f"By the clock it is {clock:.2f} t/s: something delayed the answers.{advice}"


@dataclass(frozen=True)
class BenchTable:
    """The results of `Bench`; `print` shows llama-bench's table in Markdown.

    Attributes:
        model: The model as llama-bench describes it, e.g. `gemma3 270M Q4_K - Medium`.
        size: Size of the tensors in bytes.
        parameters: The number of weights.
        backend: The kind of device used, e.g. `CPU`.
        settings: llama-bench's columns for settings, by their names there.
        build: The engine's build.
        rows: The tests, by depth.
    """

    model: str
    size: int
    parameters: int
    backend: str
    settings: tuple[tuple[str, object], ...]
    build: str
    rows: tuple[BenchRow, ...]

    @property
    def frame(self) -> DataFrame:
        """The results as a data frame, with a row per test."""
        return frame_of(
            {
                "model": self.model,
                "size": self.size,
                "params": self.parameters,
                "backend": self.backend,
                **dict(self.settings),
                "test": str(row.test),
                "depth": row.test.depth,
                "tokens_per_second": row.mean,
                "deviation": row.deviation if row.speeds else None,
                "repeats": len(row.speeds),
                "tokens_per_second_by_clock": fmean(row.clock) if row.clock else None,
                "other_processes": row.noise.others if row.noise else None,
                "note": row.note,
            }
            for row in self.rows
        )

    def plot(self, *, prompts: bool = False) -> Figure:
        """Plot generation speed, or prompt speed, against the depth.

        Raises:
            ExperimentError: Matplotlib is missing, or no such test was measured.
        """
        extra("matplotlib")
        from kitty_nb.experiments.plots import curves  # noqa: PLC0415 (of an extra)

        kind = BenchKind.PROMPT if prompts else BenchKind.ANSWER
        points: dict[str, list[Point]] = {}
        for row in self.rows:
            if row.speeds and row.test.kind is kind:
                name = str(replace(row.test, depth=0))
                spread = median(row.speeds), min(row.speeds), max(row.speeds)
                points.setdefault(name, []).append((row.test.depth, *spread))
        if not points:
            raise ExperimentError(
                "Nothing to plot: no such test was measured. Run the bench with a prompt or an"
                " answer."
            )
        y = "prompt_tokens_per_second" if prompts else "generation_tokens_per_second"
        return curves(points, y, "depth, tokens already in the context", "repeats")

    def __str__(self) -> str:
        scale, letter = (1e9, "B") if self.parameters >= _BILLION else (1e6, "M")
        large = self.size >= 1 << 30
        common = (
            self.model,
            f"{self.size / (1 << (30 if large else 20)):.2f} {'GiB' if large else 'MiB'}",
            f"{self.parameters / scale:.2f} {letter}",
            self.backend,
            *(str(value) for _, value in self.settings),
        )
        names = [name for name, _ in self.settings]
        lines = markdown_table(
            ("model", "size", "params", "backend", *names, "test", "t/s"),
            (
                (*common, str(r.test), f"{r.mean:.2f} ± {r.deviation:.2f}" if r.mean else "-")
                for r in self.rows
            ),
            align=f"lrrl{'r' * len(names)}rr",
            widths=(30, 10, 10, 10, *(3 if n in {"ngl", "fa"} else len(n) for n in names), 15, 20),
        )
        notes = [f"- {row.test}: {row.note}" for row in self.rows if row.note]
        return "\n".join([*lines, "", *notes, *([""] if notes else []), f"build: {self.build}"])

    _repr_markdown_ = __str__  # front ends sanitize the HTML in Markdown


@dataclass(frozen=True, slots=True)
class BenchProgress:
    """The progress of a `Bench`: the current test, and how many of all measurements are done."""

    test: str
    done: int
    total: int


class Bench:
    """llama-bench's table: prompt and generation speed at several depths.

    The bench starts its own server, so it measures the engine you serve with, and its settings. The
    panel's server isn't touched, but stop it first: it would skew the measurements.

    Args:
        model: The model file, absolute or in the models folder; by default the one in `config`.
        prompt: Length of the prompt to read, in tokens; 0 skips that test.
        answer: Length of the answer to write, in tokens; 0 skips that test.
        depths: Numbers of tokens already in the context when a test begins.
        repeats: The number of measurements per test.
        seed: The seed of the random tokens.
        config: The server's settings; by default those of `.env`. The bench sets the context size,
            the number of slots, speculation and the projector itself.

    Attributes:
        table: The results so far; None before the first.

    Raises:
        ExperimentError: A number is wrong, or there is nothing to measure.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        prompt: int = 512,
        answer: int = 128,
        depths: int | Iterable[int] = DEPTHS,
        repeats: int = 5,
        seed: int = 0,
        config: ServerConfig | None = None,
    ) -> None:
        base = config_to_start(config, model, "Bench starts a server of its own")
        if model is not None:
            base = base.replace(model=model, allow_absolute_paths=True)
        self.config = base
        self.repeats = whole("repeats", repeats, 1)
        sizes = whole("prompt", prompt, 0, _TOKENS), whole("answer", answer, 0, _TOKENS)
        several = [whole("depths", depth, 0, _TOKENS) for depth in numbers("depths", depths)]
        self.tests = tests_of(*sizes, several)
        if not self.tests:
            raise ExperimentError(
                "There is nothing to measure. Give a prompt or an answer of 1 token or more, and a"
                " depth."
            )
        self.table: BenchTable | None = None
        self._seed = whole("seed", seed, 0, SEEDS)

    def run(
        self, on_progress: Callable[[BenchProgress], object] = lambda _: None
    ) -> Operation[BenchTable]:
        """Measure in a background thread, and return at once."""
        require_function("on_progress", on_progress, "the progress")
        return Operation(in_background(lambda: self.run_here(on_progress), "kitty_nb bench")[1])

    async def run_here(
        self, on_progress: Callable[[BenchProgress], object] = lambda _: None
    ) -> BenchTable:
        """Measure on the running event loop."""
        config = await run_sync(resolve_model, self.config)
        facts = await run_sync(read_facts, config.require_model())
        trained = facts.context_length or max(test.context for test in self.tests)
        reasons = {
            test: f"It does not fit into the model's trained context of {trained:,} tokens."
            for test in self.tests
            if test.context > trained
        }
        while left := [test for test in self.tests if test not in reasons]:
            try:
                table = await self._measure(config, left, on_progress)
            except WillNotFitError as error:
                deepest = max(test.depth for test in left)
                if all(test.depth == deepest for test in left):
                    raise
                reasons |= {test: str(error) for test in left if test.depth == deepest}
            else:
                rows = {row.test: row for row in table.rows}
                rows |= {test: BenchRow(test, reason=reason) for test, reason in reasons.items()}
                self.table = replace(table, rows=tuple(rows[test] for test in self.tests))
                return self.table
        raise ExperimentError(
            f"No test fits into the model's trained context of {trained:,} tokens."
            " Choose a shorter prompt, a shorter answer or smaller depths."
        )

    async def _measure(
        self,
        config: ServerConfig,
        tests: Sequence[BenchTest],
        on_progress: Callable[[BenchProgress], object],
    ) -> BenchTable:
        engine = await locate_engine(config.binary)
        async with (
            isolated_server(await run_sync(plain_config, config, engine.dialect, tests)) as server,
            server.access.async_http() as http,
        ):
            table = await _describe(server, http, config)
            client = await BenchClient.of(http, self._seed)
            pid = server.state.pid or 0
            rows, total = [], len(tests) * self.repeats
            for index, test in enumerate(tests):
                await client.warm_up(test)
                samples: list[tuple[float, float]] = []
                reason = ""
                before = await usage_with(pid)
                try:
                    for done in range(index * self.repeats, (index + 1) * self.repeats):
                        on_progress(BenchProgress(str(test), done, total))
                        samples.append(await client.measure(test))
                except ExperimentError as error:
                    samples, reason = [], str(error)
                speeds, clock = zip(*samples, strict=True) if samples else ((), ())
                noise = await noise_since(before, pid)
                rows.append(BenchRow(test, speeds, clock, reason, noise))
                self.table = replace(table, rows=tuple(rows))
            return replace(table, rows=tuple(rows))


class BenchClient:
    """Runs tests, with random tokens, on a server with the settings of `plain_config`."""

    def __init__(self, http: httpx.AsyncClient, vocabulary: int, seed: int = 0) -> None:
        self._http = http
        self._vocabulary = range(vocabulary)
        self._seed = seed
        self._random = Random(seed)  # noqa: S311 (tokens, not secrets)

    @classmethod
    async def of(cls, http: httpx.AsyncClient, seed: int = 0) -> BenchClient:
        """Create a client for the model of a server."""
        http.headers["Connection"] = "close"  # the server may close an idle one as it is reused
        return cls(http, (await _meta(http)).get("n_vocab") or 256, seed)

    async def warm_up(self, test: BenchTest) -> None:
        """Run the test's kind of work once without measuring, as llama-bench does."""
        await self._ask(self._tokens(test.prompt), min(test.predicted, 2))

    async def measure(self, test: BenchTest) -> tuple[float, float]:
        """Run a test once; return tokens per second by the server's timings, and by the clock.

        The context is filled first. A model that can drop its latest tokens keeps it for the next
        test; one with a sliding window or a recurrent state has to read it again.
        """
        before = Random(f"{self._seed} {test.depth}").choices(self._vocabulary, k=test.depth)  # noqa: S311
        if before:
            await self._ask(before, 1, cache=True)
        asked = [*before, *self._tokens(test.prompt)]
        timings, seconds = await self._ask(asked, test.predicted, cache=bool(before))
        apart = seconds - (timings.prompt_ms + timings.predicted_ms) / 1000
        if test.kind is BenchKind.PROMPT:
            tokens, own = timings.prompt_n, timings.prompt_ms / 1000
            right = test.tokens <= tokens <= max(test.tokens + 1, test.tokens * _REREAD)
            why = ": it does not keep such a context. Try another depth." if before else "."
        else:
            tokens, own = timings.predicted_n - 1, timings.predicted_ms / 1000
            right = tokens == test.tokens
            why = ". Look for a limit in LLAMACPP_N_PREDICT and LLAMACPP_EXTRA_ARGS."
        if not right:
            raise ExperimentError(
                f"The engine processed {tokens} tokens instead of {test.tokens}{why}"
            )
        if own <= 0:
            raise ExperimentError(f"The engine reports no time for {tokens} tokens. Ask for more.")
        return tokens / own, tokens / (own + apart)

    async def _ask(
        self, tokens: Sequence[int], count: int, *, cache: bool = False
    ) -> tuple[Timings, float]:
        request: dict[str, Any] = {
            "prompt": tokens,
            "n_predict": count,
            "ignore_eos": True,
            "cache_prompt": cache,
            "id_slot": 0,
            **_GREEDY,
        }
        began = time.perf_counter()
        body = await post(self._http, "/completion", request, "timings")
        return Timings.model_validate(body["timings"]), time.perf_counter() - began

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(self._vocabulary, k=count)


def tests_of(prompt: int, answer: int, depths: Iterable[int]) -> tuple[BenchTest, ...]:
    """Return llama-bench's tests in its order: at each depth the prompt, then the answer."""
    sizes = {BenchKind.PROMPT: prompt, BenchKind.ANSWER: answer}
    return tuple(
        BenchTest(kind, tokens, depth)
        for depth in sorted(set(depths))
        for kind, tokens in sizes.items()
        if tokens
    )


def plain_config(
    config: ServerConfig, dialect: Dialect, tests: Iterable[BenchTest]
) -> ServerConfig:
    """Return settings for a server that runs tests with nothing that llama-bench lacks."""
    context = max(test.context for test in tests)
    plain = (word for words in _PLAIN if dialect.option(words[0]) for word in words)
    return resolve_model(
        config.replace(
            context_size=-(-context // _PAD) * _PAD,
            n_predict=None,  # earlier builds apply it to requests with a number of their own, too
            parallel=1,
            speculation=None,
            draft_model=None,
            mmproj="off",
            extra_args=(*config.extra_args, *plain),
        )
    )


async def _meta(http: httpx.AsyncClient) -> dict[str, Any]:
    listed = (await http.get("/v1/models")).json().get("data") or [{}]
    found: dict[str, Any] = listed[0].get("meta") or {}
    return found


async def _describe(
    server: IsolatedServer, http: httpx.AsyncClient, config: ServerConfig
) -> BenchTable:
    """Return the table without rows: model, machine and settings."""
    facts = await run_sync(read_facts, config.require_model())
    meta, said = await _meta(http), await props(http)
    words = (facts.architecture, facts.size_label, meta.get("ftype") or said.get("model_ftype"))
    devices = dict.fromkeys(name.rstrip("0123456789") for name in server.state.devices)
    settings: dict[str, object] = {}
    if devices:
        settings["ngl"] = -1 if config.n_gpu_layers is None else config.n_gpu_layers
    settings["threads"] = config.threads or psutil.cpu_count(logical=False)
    for field, name in _COLUMNS.items():
        if (value := getattr(config, field)) is not None:
            settings[name] = value
    for name, flags in _CACHE.items():
        if value := value_of(config.extra_args, flags):
            settings[name] = value
    number, _, commit = str(said.get("build_info", "")).partition("-")
    build = f"{commit} ({number.lstrip('b')})"
    if commit in {"", "unknown"}:  # in a wheel
        build = (await locate_engine(config.binary)).version
    return BenchTable(
        model=" ".join(filter(None, words)) or config.require_model().stem,
        size=meta.get("size") or 0,
        parameters=meta.get("n_params") or facts.parameters,
        backend=",".join(devices) or "CPU",
        settings=tuple(settings.items()),
        build=f"{build}, measured through llama-server by kitty-nb bench",
        rows=(),
    )
