"""`regress`: compare the answers and speed of other engine builds with the engine in use."""

from __future__ import annotations

import shlex
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kitty_nb.client.protocol import post, props
from kitty_nb.errors import ExperimentError, KittyError
from kitty_nb.experiments.arguments import config_of, path_of, require_function, several, whole
from kitty_nb.experiments.bench import BenchClient, BenchProgress, BenchTest, tests_of
from kitty_nb.experiments.recording import exchange_of, settings_of
from kitty_nb.experiments.run_record import RunRecord, first_difference
from kitty_nb.experiments.statistics import LEAST_ROUNDS, Verdict, compare_paired, own_spread
from kitty_nb.isolated_server import SERVER_SETTINGS, in_background, isolated_server, locate_engine
from kitty_nb.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import httpx
    from pydantic import JsonValue

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.run_record import Request
    from kitty_nb.experiments.statistics import Difference

    OnProgress = Callable[[BenchProgress], object]
    OnRound = Callable[["Regression"], object]

_PROGRAMS = ("llama-server", "bin/llama-server", "build/bin/llama-server")
_LONG_ENOUGH = 0.5  # seconds
_SMALL = 512  # assumed context, in tokens, if a build doesn't report it
_SHOWN = 40  # characters in an excerpt of an answer
_IN_USE = "in use"


@dataclass(frozen=True, slots=True)
class OtherAnswer:
    """An answer that differs from the one given by the engine in use.

    Attributes:
        answer: The number of the answer in the record, from 1.
        token: The number of the first token that differs, from 1; None if a build reports none.
        before: An excerpt from there of the answer of the engine in use; `now`, of the build's.
    """

    record: str
    answer: int
    token: int | None
    before: str
    now: str

    def __str__(self) -> str:
        where = f" from token {self.token} on" if self.token else ""
        return (
            f"answer {self.answer} of {self.record} differs{where}:"
            f" {self.now!r} instead of {self.before!r}"
        )


@dataclass(frozen=True)
class BuildReport:
    """A build compared with the engine in use.

    Attributes:
        version: The version it reports; empty if it can't be run.
        speeds: Differences in tokens per second, by test.
        compared: The number of answers compared: those that the engine in use reproduces.
        problem: Why the build can't serve a record, in a sentence; empty if it can.
    """

    engine: Path
    version: str = ""
    speeds: Mapping[str, Difference] = field(default_factory=dict)
    answers: tuple[OtherAnswer, ...] = ()
    compared: int = 0
    problem: str = ""

    @property
    def regressed(self) -> bool:
        """True if the build is slower, gives different answers, or can't serve a record."""
        slower = any(one.verdict is Verdict.SLOWER for one in self.speeds.values())
        return bool(self.problem or self.answers or slower)

    def __str__(self) -> str:
        told = [f"{test}: {difference}" for test, difference in self.speeds.items()]
        told += map(str, self.answers)
        if not self.answers:
            same = f"answers compared: {self.compared}, all the same"
            told.append(self.problem or (same if self.compared else "no answer could be compared"))
        head = f"{self.engine} {self.version}".rstrip()
        verdict = "REGRESSED" if self.regressed else "ok"
        return "\n- ".join([f"{head}: {verdict}", *told])


@dataclass(frozen=True)
class Regression:
    """The outcome of `regress`; `print` shows a summary.

    Attributes:
        baseline: The version of the engine in use.
        builds: The builds that were tried, in the order given.
        first_bad: The first build that regresses, found by bisection; None if none does.
        notes: Answers that the engine in use itself doesn't reproduce, in sentences.
    """

    baseline: str
    builds: tuple[BuildReport, ...]
    first_bad: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def regressed(self) -> bool:
        """True if any build that was tried regresses."""
        return any(build.regressed for build in self.builds)

    def __str__(self) -> str:
        head = "\n- ".join([f"Engine in use: {self.baseline}", *self.notes])
        lines = [head, *map(str, self.builds)]
        if self.first_bad:
            lines.append(f"The first build that regresses is {self.first_bad}.")
        return "\n".join(lines)

    __repr__ = __str__


def regress(
    records: RunRecord | str | Path | Iterable[RunRecord | str | Path],
    engines: str | Path | Iterable[str | Path],
    *,
    rounds: int = 8,
    prompt: int = 256,
    answer: int = 64,
    bisect: bool = False,
    config: ServerConfig | None = None,
    on_progress: OnProgress = lambda _: None,
    on_round: OnRound = lambda _: None,
) -> Operation[Regression]:
    """Compare other engine builds with the one in use, in the background.

    Each round starts every build in turn with a record's settings, and measures it. The engine in
    use is measured twice per round, which shows the machine's own variation. Answers are compared
    with those of the engine in use.

    Args:
        records: One or more run records, or paths of their files.
        engines: One or more other builds: a llama-server, a folder with one, or a Python
            environment (or its interpreter) with another `xllamacpp`.
        rounds: The number of measurements per build. Eight detect nearly every difference of 10 %
            on a quiet machine.
        prompt: Length of the timed prompt, in tokens.
        answer: Length of the timed answer, in tokens.
        bisect: Whether to find the first build that regresses by bisection, given builds in order.
            About log2 of their number are tried.
        config: The settings of this machine; by default those of `.env`.
        on_progress: Called on the event loop before each measurement of a build.
        on_round: Called there after each round, with the outcome so far.

    Raises:
        ExperimentError: There are no records or engines, or an argument is wrong.
        RunRecordError: A record can't be read.
    """
    given = [_named(one, number) for number, one in enumerate(several(records), 1)]
    others = [*dict.fromkeys(path_of("engines", one) for one in several(engines))]
    if not given or not others:
        raise ExperimentError("Nothing to compare. Give at least one record and one engine.")
    whole("rounds", rounds, LEAST_ROUNDS)
    require_function("on_progress", on_progress, "the progress")
    require_function("on_round", on_round, "the outcome so far")
    tests = tests_of(whole("prompt", prompt), whole("answer", answer), (0,))
    job = _Job(given, config_of(config), tests, rounds, on_progress, on_round)
    work = job.bisect if bisect else job.compare
    return Operation(in_background(lambda: work(others), "kitty_nb regress")[1])


@dataclass
class _Group:
    """Records that share a server's settings, and the tests that fit into its context."""

    config: ServerConfig
    records: list[tuple[str, RunRecord]]
    tests: list[BenchTest]

    def label(self, test: BenchTest, alone: bool) -> str:
        return str(test) if alone else f"{test} of {self.records[0][0]}"


@dataclass(frozen=True)
class _Answer:
    """An answer and its tokens; none if a build doesn't report them."""

    text: str
    tokens: tuple[object, ...]


@dataclass
class _Found:
    """A build's speeds by test, one per round, and its answers in the first round."""

    speeds: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[tuple[str, int], _Answer] = field(default_factory=dict)
    problem: str = ""


@dataclass
class _Job:
    records: Sequence[tuple[str, RunRecord]]
    here: ServerConfig
    tests: Sequence[BenchTest]
    rounds: int
    on_progress: OnProgress
    on_round: OnRound
    groups: Sequence[_Group] = ()
    tried: dict[Path, BuildReport] = field(default_factory=dict)

    async def compare(self, engines: Sequence[Path]) -> Regression:
        """Compare all builds with the engine in use, in the same rounds."""
        await self._prepare()
        outcome = Regression((await locate_engine(self.here.binary)).version, ())
        with ExitStack() as stack:
            programs = [stack.enter_context(_program(engine)) for engine in engines]
            versions = [await _version(program) for program in programs]
            names = [_IN_USE, _IN_USE, *map(str, engines)]
            first, again, *others = found = [_Found() for _ in names]
            paths = [self.here.binary, self.here.binary, *programs]
            builds = [*zip(names, paths, found, strict=True)]
            for number in range(self.rounds):
                await self._round(number, builds)
                if problem := first.problem or again.problem:
                    raise ExperimentError(f"The engine in use can't serve a record: {problem}")
                for engine, version, other in zip(engines, versions, others, strict=True):
                    self.tried[engine] = _report(engine, version, other, first, again)
                tried, notes = tuple(self.tried.values()), tuple(self._notes(first, again))
                outcome = replace(outcome, builds=tried, notes=notes)
                self.on_round(outcome)
        return outcome

    async def bisect(self, engines: Sequence[Path]) -> Regression:
        """Find the first build that regresses, assuming that all later ones do, too."""
        good, bad = -1, len(engines) - 1
        outcome = await self.compare([engines[bad]])
        if not outcome.regressed:
            return outcome
        while bad - good > 1:
            middle = (good + bad) // 2
            outcome = await self.compare([engines[middle]])
            good, bad = (good, middle) if self.tried[engines[middle]].regressed else (middle, bad)
        builds = tuple(self.tried[engine] for engine in engines if engine in self.tried)
        return replace(outcome, builds=builds, first_bad=engines[bad])

    def _notes(self, first: _Found, again: _Found) -> Iterator[str]:
        """Yield which answers the engine in use doesn't reproduce."""
        records = dict(self.records)
        for (record, number), answer in first.answers.items():
            if again.answers.get((record, number)) != answer:
                yield f"answer {number + 1} of {record} varies between runs: not compared"
            elif answer.text != records[record].exchanges[number].text:
                yield f"answer {number + 1} of {record} no longer matches the record"

    async def _prepare(self) -> None:
        """Find the records' models, and group records that share a server's settings."""
        if self.groups:
            return
        groups: dict[str, _Group] = {}
        for name, record in self.records:
            config = await settings_of(record, self.here)
            key = f"{config.model} {config.model_dump(include=set(SERVER_SETTINGS))}"
            group = groups.setdefault(key, _Group(config, [], []))
            group.records.append((name, record))
        self.groups = tuple(groups.values())

    async def _round(self, number: int, builds: Sequence[tuple[str, Path | None, _Found]]) -> None:
        """Measure all builds once, in reverse order every other round."""
        done, total = (count * len(self.groups) * len(builds) for count in (number, self.rounds))
        for group in self.groups:
            for name, program, found in builds if number % 2 == 0 else reversed(builds):
                self.on_progress(BenchProgress(name, done, total))
                done += 1
                if not found.problem:
                    try:
                        await self._one(group, program, found, number)
                    except KittyError as error:
                        found.problem = str(error)

    async def _one(self, group: _Group, program: Path | None, found: _Found, number: int) -> None:
        # `replace` would look up the projector and the draft model again.
        config = group.config.model_copy(update={"binary": program})
        async with isolated_server(config) as server, server.access.async_http() as http:
            if not group.tests:
                group.tests = await self._fitting(http)
            client = await BenchClient.of(http, number)
            for test in group.tests:
                speed = await _fastest(client, test)
                label = group.label(test, len(self.groups) == 1)
                found.speeds.setdefault(label, []).append(speed)
            for name, record in group.records if number == 0 else ():
                for index, one in enumerate(record.exchanges):
                    found.answers[name, index] = await _ask(http, one.request)

    async def _fitting(self, http: httpx.AsyncClient) -> list[BenchTest]:
        said = (await props(http)).get("default_generation_settings", {}).get("n_ctx")
        room = (int(said) if said else _SMALL) // 2 - 2
        return [replace(test, tokens=min(test.tokens, room)) for test in self.tests]


def _named(one: RunRecord | str | Path, number: int) -> tuple[str, RunRecord]:
    if isinstance(one, RunRecord):
        return f"record {number}", one
    return str(one), RunRecord.load(one)


@contextmanager
def _program(engine: Path) -> Iterator[Path]:
    """Provide the llama-server at a path.

    The one in a Python environment's `xllamacpp` runs through this package's code, which need not
    be installed there.
    """
    python = engine
    if engine.is_dir() and not any((engine / name).is_file() for name in _PROGRAMS):
        python = engine / "bin" / "python"
    if not python.is_file() or not python.name.startswith("python"):
        yield engine
        return
    with TemporaryDirectory(prefix="kitty_nb-") as name:
        folder = Path(name)
        (folder / "lib").mkdir()
        package = Path(__file__).parents[1]
        (folder / "lib" / "kitty_nb").symlink_to(package, target_is_directory=True)
        program = folder / "llama-server"
        program.write_text(
            f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(folder / 'lib'))}\n"
            f'exec {shlex.quote(str(python))} -P -m kitty_nb.engine.embedded "$@"\n'
        )
        program.chmod(0o700)
        yield program


async def _version(program: Path) -> str:
    try:
        return (await locate_engine(program)).version
    except KittyError:
        return ""


async def _fastest(client: BenchClient, test: BenchTest) -> float:
    """Return the highest speed of several runs: interference only ever slows one down."""
    await client.warm_up(test)
    began, fastest = time.perf_counter(), 0.0
    while not fastest or time.perf_counter() - began < _LONG_ENOUGH:
        speed, _ = await client.measure(test)
        fastest = max(fastest, speed)
    return fastest


async def _ask(http: httpx.AsyncClient, request: Request) -> _Answer:
    """Send a request, and have the server report the tokens of its answer."""
    told: JsonValue = True if request.text is None else 1  # chat and plain completions differ
    answer = await post(http, request.path, {**request.body, "logprobs": told}, "choices")
    text = exchange_of(request, answer).text
    choice: dict[str, Any] = next(iter(answer["choices"]), {})
    listed = (choice.get("logprobs") or {}).get("content") or ()
    tokens = tuple(one.get("id", one.get("token")) for one in listed if isinstance(one, dict))
    whole = len(tokens) == (answer.get("usage") or {}).get("completion_tokens")
    return _Answer(text, tokens if whole else ())


def _report(engine: Path, version: str, found: _Found, first: _Found, again: _Found) -> BuildReport:
    """Compare what was found of a build with the two measurements of the engine in use."""
    if found.problem:
        return BuildReport(engine, version, problem=found.problem)
    steady = {key: one for key, one in first.answers.items() if again.answers.get(key) == one}
    speeds = {
        test: compare_paired(
            speeds,
            found.speeds[test],
            smaller_is_better=False,
            spread=own_spread(speeds, again.speeds[test]),
        )
        for test, speeds in first.speeds.items()
    }
    answers = tuple(_other_answers(steady, found.answers))
    return BuildReport(engine, version, speeds, answers, len(steady))


def _other_answers(
    before: Mapping[tuple[str, int], _Answer], now: Mapping[tuple[str, int], _Answer]
) -> Iterator[OtherAnswer]:
    for (record, index), was in before.items():
        if (other := now[record, index]).text != was.text:
            counted = was.tokens and other.tokens
            token = first_difference(was.tokens, other.tokens) + 1 if counted else None
            at = first_difference(was.text, other.text)
            rest, changed = (one.text[at : at + _SHOWN] for one in (was, other))
            yield OtherAnswer(record, index + 1, token, rest, changed)
