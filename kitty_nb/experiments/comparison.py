"""What differs between two runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kitty_nb.isolated_server import SERVER_SETTINGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kitty_nb.experiments.run_record import RunRecord

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
        recorded: What it was.
        now: What it is.
    """

    what: str
    recorded: str
    now: str


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """An answer that is not the same.

    Attributes:
        exchange: Which one, from 0.
        position: The first character that differs, from 0.
        recorded: What the answer was from there on, cut short.
        now: What it is.
    """

    exchange: int
    position: int
    recorded: str
    now: str


@dataclass(frozen=True, slots=True)
class Figure:
    """Something measured, which varies from run to run.

    Attributes:
        what: What was measured, with its unit.
        recorded: What it was.
        now: What it is.
    """

    what: str
    recorded: float
    now: float

    @property
    def ratio(self) -> float:
        """What it is, over what it was."""
        return self.now / self.recorded


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs side by side; `print` shows it as tables.

    Attributes:
        recorded: The earlier run.
        repeated: The later one.
        outputs: Answers that differ.
        differences: What else does, timings apart.
        figures: What was measured in both.
    """

    recorded: RunRecord = field(repr=False)
    repeated: RunRecord = field(repr=False)
    outputs: tuple[OutputDifference, ...]
    differences: tuple[Difference, ...]
    figures: tuple[Figure, ...] = field(repr=False)

    @property
    def same_outputs(self) -> bool:
        """Whether all answers are the same, to the letter."""
        return not self.outputs

    def __str__(self) -> str:
        count = max(len(run.exchanges) for run in (self.recorded, self.repeated))
        same = count - len(self.outputs)
        parts = [f"Answers: {same} of {count} are the same."]
        parts += [
            f"Answer {one.exchange + 1} differs from character {one.position + 1} on:"
            f" it was {one.recorded!r}, and is {one.now!r}."
            for one in self.outputs
        ]
        rows = [(one.what, one.recorded, one.now) for one in self.differences]
        parts += ["", *_table(("differs", "recorded", "now"), rows)] if rows else []
        figures = [
            (one.what, f"{one.recorded:.4g}", f"{one.now:.4g}", f"{one.ratio:.2f}")
            for one in self.figures
        ]
        parts += ["", *_table(("varies", "recorded", "now", "ratio"), figures)] if figures else []
        return "\n".join(parts)


def compare(recorded: RunRecord, repeated: RunRecord) -> Comparison:
    """Lay two runs side by side. What merely varies, such as timings, is no difference."""
    before, after = (
        dict(_leaves(run.model_dump(mode="json", include=_COMPARED)))
        for run in (recorded, repeated)
    )
    return Comparison(
        recorded,
        repeated,
        outputs=tuple(_outputs(recorded, repeated)),
        differences=tuple(
            Difference(key, before.get(key, _NOTHING), after.get(key, _NOTHING))
            for key in before | after
            if before.get(key) != after.get(key)
        ),
        figures=tuple(_figures(recorded, repeated)),
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


def _outputs(recorded: RunRecord, repeated: RunRecord) -> Iterator[OutputDifference]:
    count = max(len(recorded.exchanges), len(repeated.exchanges))
    for index in range(count):
        texts = [
            run.exchanges[index].text if index < len(run.exchanges) else ""
            for run in (recorded, repeated)
        ]
        if texts[0] != texts[1]:
            at = _first_difference(*texts)
            yield OutputDifference(index, at, *(text[at : at + _SHOWN] for text in texts))


def _first_difference(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _figures(recorded: RunRecord, repeated: RunRecord) -> Iterator[Figure]:
    was, now = (dict(_measured(run)) for run in (recorded, repeated))
    yield from (Figure(what, was[what], now[what]) for what in was if was[what] and now.get(what))


def _measured(run: RunRecord) -> Iterator[tuple[str, float]]:
    if run.load_seconds:
        yield "load, s", run.load_seconds.total
    timings = [exchange.timings for exchange in run.exchanges if exchange.timings]
    yield "prompt, tokens/s", _rate((one.prompt_n, one.prompt_ms) for one in timings)
    yield "generation, tokens/s", _rate((one.predicted_n, one.predicted_ms) for one in timings)


def _rate(timings: Iterable[tuple[int, float]]) -> float:
    pairs = list(timings)
    seconds = sum(ms for _, ms in pairs) / 1000
    return sum(n for n, _ in pairs) / seconds if seconds else 0.0


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (head, tuple("-" * width for width in widths), *rows)
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
