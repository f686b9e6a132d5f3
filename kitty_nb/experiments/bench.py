"""`Bench`: llama-bench's table, measured through llama-server."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

import psutil
from anyio.to_thread import run_sync

from kitty_nb.catalog.model import read_facts
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.client.protocol import post, props
from kitty_nb.config import ServerConfig, value_of
from kitty_nb.errors import ExperimentError, WillNotFitError
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.run_record import Timings
from kitty_nb.isolated_server import in_background, isolated_server, locate_engine
from kitty_nb.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import httpx
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from kitty_nb.experiments.plots import Point
    from kitty_nb.isolated_server import Dialect, IsolatedServer

DEPTHS = (0, 4096, 16384)
_BILLION = 1_000_000_000
_PAD = 256  # llama.cpp rounds a context up to it
_AGREE = 0.03  # share by which the clock may differ from the server's figure
_UNNOTICED = 0.05  # seconds of a request that no server counts, such as HTTP
_REREAD = 1.02  # of a test's tokens; a build may read the last one of the depth again
# What llama-bench has no part in: copies of the state, which split a prompt's batches, too.
_PLAIN = (("--ctx-checkpoints", "0"), ("--cache-ram", "0"))
# The cheapest sampler there is: llama-bench samples nothing.
_GREEDY = {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"]}
_COLUMNS = {"batch_size": "n_batch", "ubatch_size": "n_ubatch", "flash_attention": "fa"}
_CACHE = {"type_k": {"--cache-type-k", "-ctk"}, "type_v": {"--cache-type-v", "-ctv"}}


@dataclass(frozen=True, slots=True)
class BenchTest:
    """A row of llama-bench: a prompt or an answer of so many tokens, behind so many others."""

    prompt: int
    answer: int
    depth: int

    def __str__(self) -> str:
        name = f"pp{self.prompt}" if self.prompt else f"tg{self.answer}"
        return f"{name} @ d{self.depth}" if self.depth else name

    @property
    def context(self) -> int:
        """The tokens that must fit into the context."""
        # An answer follows a token of prompt, and its own first token costs no step.
        return self.depth + (self.prompt + 1 if self.prompt else self.answer + 2)


@dataclass(frozen=True, slots=True)
class BenchRow:
    """A test and its measurements.

    Attributes:
        test: The test.
        speeds: Tokens per second by the server's own timings, one for each repeat.
        clock: The same by this program's clock, with all that a request costs.
        reason: The reason that it was not measured, in a sentence.
    """

    test: BenchTest
    speeds: tuple[float, ...] = ()
    clock: tuple[float, ...] = ()
    reason: str = ""

    @property
    def mean(self) -> float | None:
        """Mean tokens per second; None where it was not measured."""
        return fmean(self.speeds) if self.speeds else None

    @property
    def deviation(self) -> float:
        """Their standard deviation over the repeats."""
        return stdev(self.speeds) if len(self.speeds) > 1 else 0.0

    @property
    def note(self) -> str:
        """A sentence where the row says less than its number; empty otherwise."""
        if not self.speeds or not self.clock:
            return self.reason
        clock = fmean(self.clock)
        seconds = (self.test.prompt or self.test.answer) * (1 / clock - 1 / fmean(self.speeds))
        if abs(clock / fmean(self.speeds) - 1) <= _AGREE or abs(seconds) <= _UNNOTICED:
            return ""
        return f"By the clock it is {clock:.2f} t/s: something kept the server from answering."


@dataclass(frozen=True)
class BenchTable:
    """What `Bench` measured; `print` shows llama-bench's table in Markdown.

    Attributes:
        model: The model in llama-bench's words, e.g. `gemma3 270M Q4_K - Medium`.
        size: Bytes of its tensors.
        parameters: The number of its weights.
        backend: The kind of device that computes, e.g. `CPU`.
        settings: The columns of llama-bench for settings, by their name there.
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
        """A row for each test, with its numbers.

        Raises:
            ExperimentError: pandas is missing.
        """
        frame: DataFrame = extra("pandas").DataFrame(
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
                "note": row.note,
            }
            for row in self.rows
        )
        return frame

    def plot(self, *, prompts: bool = False) -> Figure:
        """Draw the speed of answers, or of prompts, against the depth.

        Raises:
            ExperimentError: Matplotlib is missing, or no such test was measured.
        """
        extra("matplotlib")
        from kitty_nb.experiments.plots import curves  # noqa: PLC0415 (of an extra)

        points: dict[str, list[Point]] = {}
        for row in self.rows:
            if row.speeds and bool(row.test.prompt) == prompts:
                name = str(replace(row.test, depth=0))
                spread = median(row.speeds), min(row.speeds), max(row.speeds)
                points.setdefault(name, []).append((row.test.depth, *spread))
        if not points:
            raise ExperimentError("No such test was measured, so there is nothing to draw.")
        y = "prompt_tokens_per_second" if prompts else "generation_tokens_per_second"
        return curves(points, y, "depth, tokens in the context before")

    def __str__(self) -> str:
        lines = [self._line(cells) for cells in self._cells()]
        rule = [
            f"{'-' * (abs(width) - 1)}{'-' if width < 0 else ':'}" for _, width in self._heads()
        ]
        lines.insert(1, f"| {' | '.join(rule)} |")
        notes = [f"- {row.test}: {row.note}" for row in self.rows if row.note]
        return "\n".join([*lines, "", *notes, *([""] if notes else []), f"build: {self.build}"])

    _repr_markdown_ = __str__  # front ends clean it of HTML

    def _heads(self) -> list[tuple[str, int]]:
        """Each column's heading and width, which is negative where text stands to the left."""
        settings = ((name, 3 if name in {"ngl", "fa"} else len(name)) for name, _ in self.settings)
        return [
            *(("model", -30), ("size", 10), ("params", 10), ("backend", -10)),
            *settings,
            *(("test", 15), ("t/s", 20)),
        ]

    def _cells(self) -> list[list[str]]:
        scale, letter = (1e9, "B") if self.parameters >= _BILLION else (1e6, "M")
        params = f"{self.parameters / scale:.2f} {letter}"
        large = self.size >= 1 << 30
        size = f"{self.size / (1 << (30 if large else 20)):.2f} {'GiB' if large else 'MiB'}"
        same = [self.model, size, params, self.backend, *(str(value) for _, value in self.settings)]
        return [
            [name for name, _ in self._heads()],
            *(
                [*same, str(row.test), f"{row.mean:.2f} ± {row.deviation:.2f}" if row.mean else "-"]
                for row in self.rows
            ),
        ]

    def _line(self, cells: Sequence[str]) -> str:
        widths = [width for _, width in self._heads()]
        padded = (
            cell.ljust(-width) if width < 0 else cell.rjust(width)
            for cell, width in zip(cells, widths, strict=True)
        )
        return f"| {' | '.join(padded)} |"


@dataclass(frozen=True, slots=True)
class BenchProgress:
    """The progress of a `Bench`.

    Attributes:
        test: The test under way.
        done: Measurements that are done, of all tests.
        total: All of them.
    """

    test: str
    done: int
    total: int


class Bench:
    """llama-bench's table: speed of prompts and answers at several depths.

    It runs on a server of its own, so it measures the engine that serves, with its settings. The
    panel's server isn't touched, but stop it first: it would skew the measurements.

    Args:
        model: The file, absolute or in the models folder; by default the one in `config`.
        prompt: Tokens of the prompt to read; 0 leaves that test out.
        answer: Tokens of the answer to write; 0 leaves that test out.
        depths: Numbers of tokens that are in the context before a test.
        repeats: Measurements of each test.
        seed: Of the tokens, which are random.
        config: The settings; by default those of `.env`. Context, number of slots, speculation and
            projector are the bench's own.

    Raises:
        ExperimentError: There is nothing to measure.
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
        base = config or ServerConfig.from_env()
        if model is not None:
            base = base.replace(model=model, allow_absolute_paths=True)
        self.config = base
        self.repeats = repeats
        self.tests = tests_of(prompt, answer, (depths,) if isinstance(depths, int) else depths)
        if not self.tests or repeats < 1:
            raise ExperimentError(
                "There is nothing to measure. Give a prompt or an answer of 1 token or more, a"
                " depth of 0 or more, and 1 repeat or more."
            )
        self._seed = seed

    def run(
        self, on_progress: Callable[[BenchProgress], object] = lambda _: None
    ) -> Operation[BenchTable]:
        """Measure, on an event loop in a thread of its own, and return at once."""
        _, future = in_background(lambda: self.run_here(on_progress), "kitty_nb bench")
        return Operation(future, lambda: None)

    async def run_here(
        self, on_progress: Callable[[BenchProgress], object] = lambda _: None
    ) -> BenchTable:
        """Like `run`, on the event loop that runs now, until it is over.

        Raises:
            KittyError: The model cannot be served, or the server refuses a test.
        """
        config = await run_sync(resolve_model, self.config)
        facts = await run_sync(read_facts, config.require_model())
        trained = facts.context_length or max(test.context for test in self.tests)
        reasons = {
            test: f"It does not fit into the context that the model was trained for, {trained:,}."
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
                return replace(table, rows=tuple(rows[test] for test in self.tests))
        raise ExperimentError(
            f"No test fits into the context that the model was trained for, {trained:,} tokens."
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
            isolated_server(await run_sync(plainly, config, engine.dialect, tests)) as server,
            server.access.async_http() as http,
        ):
            table = await _describe(server, http, config)
            client = await BenchClient.of(http, self._seed)
            rows, total = [], len(tests) * self.repeats
            for index, test in enumerate(tests):
                await client.warm_up(test)
                samples: list[tuple[float, float]] = []
                reason = ""
                for repeat in range(self.repeats):
                    done = index * self.repeats + repeat
                    on_progress(BenchProgress(str(test), done, total))
                    try:
                        samples.append(await client.measure(test))
                    except ExperimentError as error:
                        samples, reason = [], str(error)
                        break
                speeds, clock = zip(*samples, strict=True) if samples else ((), ())
                rows.append(BenchRow(test, speeds, clock, reason))
            return replace(table, rows=tuple(rows))


class BenchClient:
    """Measures tests on a server, which must have been started `plainly`.

    Args:
        http: A client of the server.
        vocabulary: The number of the model's tokens.
        seed: Of the tokens that are sent.
    """

    def __init__(self, http: httpx.AsyncClient, vocabulary: int, seed: int = 0) -> None:
        self._http = http
        self._vocabulary = range(vocabulary)
        self._seed = seed
        self._random = Random(seed)  # noqa: S311 (tokens, not secrets)

    @classmethod
    async def of(cls, http: httpx.AsyncClient, seed: int = 0) -> BenchClient:
        """Make one for the model that a server has."""
        http.headers["Connection"] = "close"  # the server ends idle ones, at worst when next used
        return cls(http, (await _meta(http)).get("n_vocab") or 256, seed)

    async def warm_up(self, test: BenchTest) -> None:
        """Have the test's kind of work done once, as llama-bench does."""
        await self._ask(self._tokens(test.prompt or 1), 1 if test.prompt else 2)

    async def measure(self, test: BenchTest) -> tuple[float, float]:
        """Measure once: tokens per second by the server's timings, and by the clock.

        The context is filled first. A model that can forget its latest tokens keeps it for the next
        test; one with a sliding window or a recurrent state reads it again.

        Raises:
            ExperimentError: The server has not done what was asked.
        """
        before = Random(f"{self._seed} {test.depth}").choices(self._vocabulary, k=test.depth)  # noqa: S311
        if before:
            await self._ask(before, 1, cache=True)
        asked = [*before, *self._tokens(test.prompt or 1)]
        # The first token of an answer comes from the prompt: it is not counted here.
        count = 1 if test.prompt else test.answer + 1
        timings, seconds = await self._ask(asked, count, cache=bool(before))
        apart = seconds - (timings.prompt_ms + timings.predicted_ms) / 1000
        if test.prompt:
            tokens, own = timings.prompt_n, timings.prompt_ms / 1000
            wrong = not test.prompt <= tokens <= max(test.prompt + 1, test.prompt * _REREAD)
        else:
            tokens, own = timings.predicted_n - 1, timings.predicted_ms / 1000
            wrong = tokens != test.answer
        if wrong or own <= 0:
            raise ExperimentError(
                f"The engine did {tokens} tokens instead of {test.prompt or test.answer}: it does"
                " not keep such a context. Try another depth."
            )
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
    both = [(prompt, 0)] * (prompt > 0) + [(0, answer)] * (answer > 0)
    ordered = sorted({depth for depth in depths if depth >= 0})
    return tuple(BenchTest(*one, depth) for depth in ordered for one in both)


def plainly(config: ServerConfig, dialect: Dialect, tests: Iterable[BenchTest]) -> ServerConfig:
    """Return settings that serve a model for tests, with nothing that llama-bench lacks."""
    context = max(test.context for test in tests)
    plain = (word for words in _PLAIN if dialect.option(words[0]) for word in words)
    return resolve_model(
        config.replace(
            context_size=-(-context // _PAD) * _PAD,
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
    if commit in {"", "unknown"}:  # as a wheel's says
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
