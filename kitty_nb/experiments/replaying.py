"""Repeating a recorded run on a server of its own, and comparing two runs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import anyio
from anyio.to_thread import run_sync
from rich.filesize import decimal

from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.config import ServerConfig, load_lenient
from kitty_nb.errors import RunRecordError
from kitty_nb.experiments.background import in_background
from kitty_nb.experiments.run_record import ask, describe_run, digest_model
from kitty_nb.isolated_server import SERVER_SETTINGS, gather_facts, isolated_server
from kitty_nb.manager import Operation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kitty_nb.experiments.run_record import RunRecord
    from kitty_nb.isolated_server import LoadProgress

_DIGITS = 12  # of a checksum, enough to tell by
_COMPARED: dict[str, Any] = {
    "config": set(SERVER_SETTINGS),
    **dict.fromkeys(("model", "engine", "host", "libraries", "seed"), True),
    "exchanges": {"__all__": {"request", "finish_reason"}},
}
_NOTHING = "-"
_SHOWN = 40  # characters of an answer


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that the answers may depend on and that is not the same.

    Attributes:
        what: Its place in the record, e.g. `engine.version`.
    """

    what: str
    recorded: str
    now: str


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """An answer that is not the same.

    Attributes:
        exchange: Its index, from 0.
        position: The first character that differs, from 0.
        recorded: The beginning of the recorded answer's rest.
        now: The beginning of the present answer's rest.
    """

    exchange: int
    position: int
    recorded: str
    now: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A measurement, which varies from run to run.

    Attributes:
        what: What was measured, with its unit.
    """

    what: str
    recorded: float
    now: float

    @property
    def ratio(self) -> float:
        """The present value over the recorded one."""
        return self.now / self.recorded


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs side by side; `print` shows it as tables.

    Attributes:
        recorded: The earlier run.
        repeated: The later one.
        outputs: Answers that differ.
        differences: What else differs, timings apart.
        figures: What was measured in both.
    """

    recorded: RunRecord = field(repr=False)
    repeated: RunRecord = field(repr=False)
    outputs: tuple[OutputDifference, ...]
    differences: tuple[Difference, ...]
    figures: tuple[Figure, ...] = field(repr=False)

    @property
    def same_outputs(self) -> bool:
        """True if all answers are the same, to the letter."""
        return not self.outputs

    def __str__(self) -> str:
        count = max(len(run.exchanges) for run in (self.recorded, self.repeated))
        lines = [f"Answers: {count - len(self.outputs)} of {count} are the same."]
        lines += [
            f"Answer {one.exchange + 1} differs from character {one.position + 1} on:"
            f" recorded {one.recorded!r}, now {one.now!r}."
            for one in self.outputs
        ]
        rows = [(one.what, one.recorded, one.now) for one in self.differences]
        figures = [
            (one.what, f"{one.recorded:.4g}", f"{one.now:.4g}", f"{one.ratio:.2f}")
            for one in self.figures
        ]
        lines += _table(("differs", "recorded", "now"), rows)
        lines += _table(("varies", "recorded", "now", "ratio"), figures)
        return "\n".join(lines)


def replay(
    record: RunRecord, *, model: str | Path | None = None, config: ServerConfig | None = None
) -> Operation[Comparison]:
    """Repeat a recorded run on a server of its own, and compare.

    The server gets the recorded settings and ends with the replay; other servers are not touched.
    Cancelling the operation ends it too.

    Args:
        record: The run.
        model: The model to ask instead of the recorded one. Without it the recorded model is
            looked for where it was, then by its checksum in the models folder.
        config: The settings of this machine: models folder, engine, history of loads. Without it
            those of `.env`.

    Raises:
        ConfigError: `.env` cannot be read. Waiting for the result raises RunRecordError when the
            recorded model is not found, and what starting a server and asking it raises.
    """
    here = config or load_lenient(profile=record.profile)[0]
    progress: deque[LoadProgress] = deque(maxlen=1)

    async def repeat() -> Comparison:
        own = _own_settings(record, here)
        asked = await (_with_model(own, model) if model else _find(record, own))
        async with isolated_server(asked, anyway=True, on_progress=progress.append) as server:
            exchanges = await ask(server.access, (one.request for one in record.exchanges))
            repeated = await describe_run(server.state, server.access, exchanges, record.seed)
            return compare(record, repeated)

    _, future = in_background(repeat, "kitty_nb replay")
    return Operation(future, lambda: progress[-1] if progress else None)


def _own_settings(record: RunRecord, here: ServerConfig) -> ServerConfig:
    """Return the recorded settings on this machine, without the model."""
    return here.replace(
        **record.config.model_dump(include=set(SERVER_SETTINGS)),
        profile=record.profile,
        alias=record.config.alias,
        model=None,
        allow_absolute_paths=True,
    )


async def _with_model(own: ServerConfig, model: str | Path) -> ServerConfig:
    return await run_sync(resolve_model, own.replace(model=model))


async def _find(record: RunRecord, own: ServerConfig) -> ServerConfig:
    """Return the settings with the recorded model, wherever it is now."""
    wanted, recorded = record.model, record.config.model
    fate = "is gone"
    if recorded and await anyio.Path(recorded).is_file():
        config = await _with_model(own, recorded)
        if (await digest_model(config)).shards == wanted.shards:
            return config
        fate = "has changed"
    for path in await run_sync(_similar_models, record, own):
        config = await _with_model(own, path)
        found = (await digest_model(config)).shards
        if [one.sha256 for one in found] == [one.sha256 for one in wanted.shards]:
            return config
    digest = wanted.shards[0].sha256[:_DIGITS] if wanted.shards else "unknown"
    raise RunRecordError(
        f"The recorded model {fate}: {recorded}, {decimal(wanted.size)}, SHA-256 {digest}…"
        f" It is not in {own.models_dir} either. Put it back, set LLAMACPP_MODELS_DIR to the"
        " folder that has it, or compare with another model: replay(record, model=…)."
    )


def _similar_models(record: RunRecord, own: ServerConfig) -> list[Path]:
    """List the models of the folder with the recorded size and header."""
    return [
        model.path
        for model in ModelCatalog(own.models_dir).scan()
        if model.startable
        and model.size == record.model.size
        and gather_facts(own.replace(model=model.path)).digest == record.header
    ]


def compare(recorded: RunRecord, repeated: RunRecord) -> Comparison:
    """Lay two runs side by side. What merely varies, such as timings, is no difference."""
    before, after = (
        dict(_leaves(run.model_dump(mode="json", include=_COMPARED)))
        for run in (recorded, repeated)
    )
    was, now = (dict(_measured(run)) for run in (recorded, repeated))
    return Comparison(
        recorded,
        repeated,
        outputs=tuple(_output_differences(recorded, repeated)),
        differences=tuple(
            Difference(key, before.get(key, _NOTHING), after.get(key, _NOTHING))
            for key in before | after
            if before.get(key) != after.get(key)
        ),
        figures=tuple(Figure(what, was[what], now[what]) for what in was if what in now),
    )


def _leaves(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{place}[{index}]")
    else:
        yield place, _NOTHING if value is None else str(value)


def _output_differences(recorded: RunRecord, repeated: RunRecord) -> Iterator[OutputDifference]:
    texts = ([exchange.text for exchange in run.exchanges] for run in (recorded, repeated))
    for index, (was, now) in enumerate(zip_longest(*texts, fillvalue="")):
        if was != now:
            at = next((at for at, pair in enumerate(zip_longest(was, now)) if len(set(pair)) > 1))
            yield OutputDifference(index, at, was[at : at + _SHOWN], now[at : at + _SHOWN])


def _measured(run: RunRecord) -> Iterator[tuple[str, float]]:
    """Yield the figures of a run that are known."""
    if run.load_seconds:
        yield "load, s", run.load_seconds.total
    timings = [exchange.timings for exchange in run.exchanges if exchange.timings]
    if seconds := sum(one.prompt_ms for one in timings) / 1000:
        yield "prompt, tokens/s", sum(one.prompt_n for one in timings) / seconds
    if seconds := sum(one.predicted_ms for one in timings) / 1000:
        yield "generation, tokens/s", sum(one.predicted_n for one in timings) / seconds


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table below an empty line; none without rows."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (head, tuple("-" * width for width in widths), *rows)
    return ["", *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)]
