"""The rows of a sweep: as a table, as medians with their spread, and the best of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.combination import Combination, choose
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.latency import LATENCIES
from kitty_nb.experiments.metrics import (
    OBJECTIVE,
    Spread,
    constraints_of,
    known,
    metrics_of,
    read_objective,
)
from kitty_nb.experiments.space import baseline_of
from kitty_nb.safe_files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.figure import Figure
    from pandas import DataFrame

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.metrics import Constraint, Objective
    from kitty_nb.experiments.plots import Point
    from kitty_nb.experiments.statistics import Difference
    from kitty_nb.experiments.trial import Trial, TrialResult, Workload

_SHOWN = 3  # reasons in a message
_LENGTH = 300  # characters of one


@dataclass(frozen=True)
class Results:
    """The measurements of a sweep so far. It does not change while the sweep goes on.

    Attributes:
        config: The settings that the trials change.
        rows: One for each trial that has ended, in that order.
        workload: The requests of each trial, where they are known.
    """

    config: ServerConfig
    rows: tuple[TrialResult, ...]
    workload: Workload | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Results({len(self.rows)} trials of {len(self.combinations)} combinations)"

    def _repr_html_(self) -> str:
        return str(self.frame.to_html())

    @cached_property
    def combinations(self) -> tuple[Combination, ...]:
        """The rows of each combination taken together, in the order in which they first ended."""
        groups: dict[Trial, list[TrialResult]] = {}
        for row in self.rows:
            groups.setdefault(row.trial.combination, []).append(row)
        return tuple(Combination.of(rows, self.config) for rows in groups.values())

    @property
    def frame(self) -> DataFrame:
        """A row for each trial: its settings, how it ended, and all that was measured.

        Raises:
            ExperimentError: pandas is missing.
        """
        return frame_of(
            {
                **row.trial.columns,
                "repeat": row.trial.repeat,
                "outcome": row.outcome.value,
                "reason": row.reason,
                "busy": row.busy,
                **metrics_of(row),
                "host": row.host,
                "engine": row.engine,
            }
            for row in self.rows
        )

    @property
    def requests(self) -> DataFrame:
        """A row for each request of each trial: what it asked, and its times in seconds.

        `sent` is in seconds since the epoch. Rows of an earlier version have no requests.

        Raises:
            ExperimentError: pandas is missing.
        """
        return frame_of(
            {
                **row.trial.columns,
                "repeat": row.trial.repeat,
                "concurrency": speed.parallel,
                **one.columns,
                "host": row.host,
            }
            for row in self.rows
            if row.measurement
            for speed in row.measurement.speeds
            for one in speed.each
        )

    def to_parquet(self, path: str | Path, *, requests: bool = False) -> Path:
        """Write the table of trials, or that of requests, as Parquet, and return where.

        Values of a setting that are of several types are written as text.

        Raises:
            ExperimentError: pyarrow is missing, or the file cannot be written.
        """
        return write_parquet(self.requests if requests else self.frame, path)

    @property
    def summary(self) -> DataFrame:
        """A row for each combination: medians, and as `…_low` and `…_high` how far they spread.

        Raises:
            ExperimentError: pandas is missing.
        """
        return frame_of(
            {
                **one.trial.columns,
                "trials": one.done,
                "reason": " ".join(one.reasons),
                **{name: spread.median for name, spread in one.metrics.items()},
                **{f"{name}_low": spread.low for name, spread in one.metrics.items()},
                **{f"{name}_high": spread.high for name, spread in one.metrics.items()},
            }
            for one in self.combinations
        )

    def best(
        self, objective: str = OBJECTIVE, constraints: Mapping[str, Any] | None = None
    ) -> Combination:
        """Return the combination with the best median.

        Where others are too close to tell, it is the one nearest to the settings in use, and has
        the others as `close`. From three rounds on, paired intervals decide what is too close;
        before, whether ranges overlap.

        Args:
            objective: A number of the table. Of seconds, memory and perplexity less is better.
            constraints: Bounds to keep, of numbers or settings, by name and sign; a name alone
                means at most: `{"memory_gib": 20, "context_size>=": 16384}`.

        Raises:
            ExperimentError: No combination keeps them, or a name is not known.
        """
        measured = self._measured("there is no best")
        names = {name for one in measured for name in one.metrics}
        settings = {name for one in measured for name, _ in one.trial.settings}
        aim, bounds = read_objective(objective, names), constraints_of(constraints)
        for bound in bounds:
            known(bound.name, names | settings | set(type(self.config).model_fields))
        return self.choose(aim, bounds)

    def choose(self, objective: Objective, bounds: Sequence[Constraint]) -> Combination:
        """Return the best by an objective that keeps all bounds, with its value in `metrics`.

        Raises:
            ExperimentError: There is none; the message names what comes nearest.
        """
        if fitting := self.fitting(objective, bounds):
            return choose(fitting, objective, self._spread(objective))
        measured = self._measured("there is no best")
        if all(objective.of(row) is None for row in self.rows):
            raise ExperimentError(
                f"No trial has {objective.name}. Choose another objective, or have it measured"
                " (quality=…, parallel=…)."
            )
        near = min(measured, key=lambda one: sum(b.excess(one.value(b.name)) for b in bounds))
        have = ", ".join(f"{bound.name} {near.value(bound.name)}" for bound in bounds)
        raise ExperimentError(
            f"None of {len(measured)} combinations keeps {' and '.join(map(str, bounds))}. The"
            f" nearest is {near.trial.label}, with {have}. Loosen a constraint, or try other"
            " settings."
        )

    def fitting(self, objective: Objective, bounds: Sequence[Constraint]) -> list[Combination]:
        """Return the combinations that keep all bounds, with the objective's value in `metrics`."""
        values: dict[Trial, dict[int, float]] = {}
        for row in self.rows:
            if (value := objective.of(row)) is not None:
                values.setdefault(row.trial.combination, {})[row.trial.repeat] = value
        name = objective.name
        return [
            replace(
                one,
                metrics={**one.metrics, name: Spread.over([*values[one.trial].values()])},
                series={**one.series, name: values[one.trial]},
            )
            for one in self.combinations
            if one.trial in values and one.keeps(bounds)
        ]

    def verdict(
        self, one: Combination, other: Combination | None = None, objective: str = OBJECTIVE
    ) -> Difference:
        """Compare a combination with another one, by the rounds in which both were measured.

        Args:
            one: The combination that the verdict is on.
            other: The other; by default the settings in use.
            objective: A speed or another number of the table; *faster* means better.

        Raises:
            ExperimentError: The settings in use were not measured, or have no such number.
        """
        measured = self._measured("there is nothing to compare")
        aim = read_objective(objective, {name for each in measured for name in each.metrics})
        other = other or self._in_use()
        spread = self._spread(aim)
        found = one.against(other, aim.name, smaller_is_better=aim.smaller, spread=spread)
        if found is None:
            raise ExperimentError(f"{aim.name} is not always positive. Compare another number.")
        return found

    def verdicts(self, objective: str = OBJECTIVE) -> DataFrame:
        """A row for each combination: whether it is faster than the settings in use.

        `ratio` is its number over theirs, between `low` and `high` with 98 % confidence;
        `more_rounds` would probably tell what is too close.

        Raises:
            ExperimentError: The settings in use were not measured, or have no such number.
        """
        in_use = self._in_use()
        return frame_of(
            {
                **one.trial.columns,
                **asdict(self.verdict(one, in_use, objective)),
            }
            for one in self._measured("there is nothing to compare")
            if one.trial != in_use.trial
        )

    def _in_use(self) -> Combination:
        measured = {one.trial: one for one in self._measured("there is nothing to compare")}
        found = measured.get(baseline_of([*measured], self.config))
        if found is None:
            raise ExperimentError(
                "The settings in use were not measured. Make the sweep with baseline=True."
            )
        return found

    def _spread(self, objective: Objective) -> float:
        """The share by which the same settings differ on this machine; 0 where unknown."""
        each = (one.own_spread(objective.name) for one in self.fitting(objective, ()))
        return max(each, default=0.0)

    def env_lines(
        self,
        objective: str = OBJECTIVE,
        constraints: Mapping[str, Any] | None = None,
        profile: str | None = None,
    ) -> str:
        """Return the `.env` lines of the best combination; see `best`."""
        return self.best(objective, constraints).env_lines(profile)

    def plot(
        self, kind: str = "bars", y: str = OBJECTIVE, x: str = "memory_gib", colour: str = ""
    ) -> Figure:
        """Draw what was measured; a notebook shows the figure.

        Args:
            kind: `bars` of medians with their spread; `concurrency`, the number against requests at
                once; `prompt`, a latency against the tokens of the prompt; `parallel` coordinates,
                one line for each combination through all that varies; or `pareto`, what is best at
                one number for each amount of another.
            y: The number that matters; for `prompt`, a latency of each request.
            x: The number that it costs, for `pareto`: memory, perplexity, or also quality.
            colour: A third number, for `pareto`: a point's colour, such as its quality.

        Raises:
            ExperimentError: Matplotlib is missing, nothing was measured, or a name is not known.
        """
        extra("matplotlib")
        from kitty_nb.experiments.plots import KINDS, curves, labels_of  # noqa: PLC0415 (of an extra)

        own = {"concurrency": self._by_concurrency, "prompt": self._by_prompt}
        if kind not in KINDS | own:
            kinds = ", ".join(KINDS | own)
            raise ExperimentError(f"There is no plot {kind!r}. There are {kinds}.")
        measured = self._measured("there is nothing to draw")
        if kind in own:
            y = LATENCIES[0] if kind == "prompt" and y == OBJECTIVE else y
            points = [own[kind](one, y) for one in measured]
            if not any(points):
                raise ExperimentError(f"No result has {y!r} for a plot against {kind}.")
            named = zip(labels_of(measured), points, strict=True)
            words = {"concurrency": "requests at once", "prompt": "prompt, tokens"}
            return curves({label: found for label, found in named if found}, y, words[kind])
        names = {name for one in measured for name in one.metrics}
        asked = (y, x, colour) if kind == "pareto" else (y,)
        wanted = {known(name, names) for name in asked if name}
        return KINDS[kind]([one for one in measured if wanted <= one.metrics.keys()], y, x, colour)

    def report(
        self, path: str | Path, *, objective: str = OBJECTIVE, title: str = "Sweep of llama-server"
    ) -> Path:
        """Write one page of HTML, with its figures and no scripts, and return where.

        It has the table, verdicts, curves, machine, engine, the models' SHA-256 (read once where a
        model is on this machine), and the code to repeat the sweep.

        Args:
            path: Where to.
            objective: The number to judge by.
            title: Of the page.

        Raises:
            ExperimentError: Matplotlib is missing, nothing was measured, there is no such number,
                or the file cannot be written.
        """
        extra("matplotlib")
        from kitty_nb.experiments.report import report_of  # noqa: PLC0415 (of an extra)

        return written(path, report_of(self, objective, title).encode())

    def to_csv(self, path: str | Path) -> Path:
        """Write the table of trials as CSV, and return where.

        Raises:
            ExperimentError: pandas is missing, or the file cannot be written.
        """
        return written(path, self.frame.to_csv(index=False).encode())

    def to_mlflow(
        self,
        experiment: str = "kitty_nb",
        *,
        tracking_uri: str | None = None,
        objective: str = OBJECTIVE,
        title: str = "Sweep of llama-server",
    ) -> str:
        """Log the results to MLflow, and return the run's ID.

        The run has the best combination's numbers and the report; under it is a run for each
        combination: its settings as parameters, its numbers as in `summary` as metrics, and its
        machines, engine and model's SHA-256 as tags. It names files and prompts, as the report.

        Args:
            experiment: The name of MLflow's experiment, which is made where it is missing.
            tracking_uri: Where to, such as `sqlite:///mlflow.db` or a server's address; by default
                what MLflow is set up for.
            objective: The number to judge by.
            title: Of the run and the report.

        Raises:
            ExperimentError: MLflow or Matplotlib is missing, MLflow refuses, nothing was measured,
                or there is no such number.
        """
        extra("mlflow", "mlflow")
        extra("matplotlib")
        from kitty_nb.experiments.mlflow_log import log_to_mlflow  # noqa: PLC0415 (of an extra)

        return log_to_mlflow(self, experiment, tracking_uri, objective, title)

    def _by_concurrency(self, one: Combination, name: str) -> list[Point]:
        """The points of a number at each number of requests at once."""
        speeds = [row.measurement.speeds for row in self.rows if row.measurement]
        levels = sorted({speed.parallel for each in speeds for speed in each})
        names = {level: f"{name}_{level}" if index else name for index, level in enumerate(levels)}
        found = {level: one.metrics[at] for level, at in names.items() if at in one.metrics}
        return [(level, it.median, it.low, it.high) for level, it in found.items()]

    def _by_prompt(self, one: Combination, name: str) -> list[Point]:
        """The points of a latency at each length of prompt, at the least number at once."""
        values: dict[int, list[float]] = {}
        for row in self.rows:
            if row.measurement and row.trial.combination == one.trial:
                for request in row.measurement.speeds[0].each:
                    if (value := getattr(request, name, None)) is not None:
                        values.setdefault(request.prompt_tokens, []).append(value)
        spreads = {length: Spread.over(several) for length, several in values.items()}
        return [(length, it.median, it.low, it.high) for length, it in spreads.items()]

    def _measured(self, so: str) -> list[Combination]:
        measured = [one for one in self.combinations if one.done]
        if not measured:
            reasons = Counter(row.reason[:_LENGTH] for row in self.rows).most_common(_SHOWN)
            told = "".join(f"\n- {count} of them: {reason}" for reason, count in reasons)
            raise ExperimentError(f"None of {len(self.rows)} trials was measured, so {so}.{told}")
        return measured


def write_parquet(frame: DataFrame, path: str | Path) -> Path:
    """Write a table as Parquet, and return where; values of several types are written as text.

    Raises:
        ExperimentError: pyarrow is missing, or the file cannot be written.
    """
    extra("pyarrow")
    for name in frame.columns:
        if len({type(value) for value in frame[name].dropna()}) > 1:
            frame[name] = frame[name].map(str, na_action="ignore")
    return written(path, frame.to_parquet(index=False))


def written(path: str | Path, content: bytes) -> Path:
    """Write a file, whole or not at all, and return where.

    Raises:
        ExperimentError: It cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content, private=False)
    except OSError as error:
        raise ExperimentError(
            f"Can't write {path}: {error.strerror or error}. Free some space, check the folder's"
            " permissions, or choose another place."
        ) from error
    return path


def frame_of(rows: Iterable[dict[str, Any]]) -> DataFrame:
    """Return a table with a row for each mapping.

    Raises:
        ExperimentError: pandas is missing.
    """
    frame: DataFrame = extra("pandas").DataFrame(list(rows))
    return frame
