"""Output of results: data frames, Markdown tables and files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.extras import extra
from kitty_nb.safe_files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pandas import DataFrame


def valid_text(text: str) -> str:
    """Escape what no file or font takes: a file's name may have bytes that are no text."""
    return text.encode(errors="backslashreplace").decode()


def number(value: float) -> str:
    """Format a number to three digits, never with an exponent such as 4.44e+03."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004


def frame_of(rows: Iterable[dict[str, Any]]) -> DataFrame:
    """Return a data frame with a row for each mapping."""
    valid = [
        {name: valid_text(one) if isinstance(one, str) else one for name, one in row.items()}
        for row in rows
    ]
    frame: DataFrame = extra("pandas").DataFrame(valid)
    return frame


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], align: str, widths: Sequence[int] = ()
) -> list[str]:
    """Return the lines of a table, padded so that it reads well as plain text, too.

    `align` has a letter per column, `l` or `r`; widths are minima, in characters.
    """
    rows = [head, *rows]
    least = widths or [3] * len(head)
    sizes = [max(one, *map(len, column)) for one, *column in zip(least, *rows, strict=True)]
    pads = [str.rjust if side == "r" else str.ljust for side in align]
    rule = [
        "-" * (n - 1) + (":" if side == "r" else "-") for n, side in zip(sizes, align, strict=True)
    ]
    return [
        f"| {' | '.join(pad(*cell) for pad, *cell in zip(pads, row, sizes, strict=True))} |"
        for row in (head, rule, *rows[1:])
    ]


def write_parquet(frame: DataFrame, path: str | Path) -> Path:
    """Write a data frame as Parquet, columns of mixed types as text, and return the path."""
    extra("pyarrow")
    for name in frame.columns:
        if len({type(value) for value in frame[name].dropna()}) > 1:
            frame[name] = frame[name].map(str, na_action="ignore")
    return write_file(path, frame.to_parquet(index=False))


def write_file(
    path: str | Path, content: bytes, error: type[ExperimentError] = ExperimentError
) -> Path:
    """Write a file atomically, and return its path; or raise an error of the given type."""
    try:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content, private=False)
    except (OSError, TypeError, ValueError) as problem:  # no name can have a zero byte
        reason = getattr(problem, "strerror", None) or problem
        raise error(
            f"Can't write {path}: {reason}. Free some space, check the folder's permissions, or"
            " choose another place."
        ) from problem
    return path
