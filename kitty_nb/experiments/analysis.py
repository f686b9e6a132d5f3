"""`Analysis`: a sweep's rows as tables, plots, verdicts and the best combination."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.arguments import require
from kitty_nb.experiments.bounds import constraints_of
from kitty_nb.experiments.combination import Combination, choose
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.latency import LATENCIES
from kitty_nb.experiments.metrics import OBJECTIVE, Spread, known, metrics_of, read_objective
from kitty_nb.experiments.output import frame_of
from kitty_nb.experiments.space import baseline_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure
    from pandas import DataFrame

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.bounds import Constraint
    from kitty_nb.experiments.metrics import Objective
    from kitty_nb.experiments.plots import Point
    from kitty_nb.experiments.statistics import Difference
    from kitty_nb.experiments.trial import Trial, TrialResult, Workload

_SHOWN = 3  # reasons listed in a message
_LENGTH = 300  # maximum characters of a reason


@dataclass(frozen=True, repr=False)
class Analysis:
    """The rows of a sweep, and what they say.

    Tables need pandas and plots Matplotlib; without them, they raise ExperimentError.
    """

    config: ServerConfig
    rows: tuple[TrialResult, ...]
    workload: Workload | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def combinations(self) -> tuple[Combination, ...]:
        """The results by combination, in the order in which each first finished."""
        groups: dict[Trial, list[TrialResult]] = {}
        for row in self.rows:
            groups.setdefault(row.trial.combination, []).append(row)
        return tuple(Combination.of(rows, self.config) for rows in groups.values())

    @property
    def frame(self) -> DataFrame:
        """The trials as a data frame: settings, outcome and metrics."""
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
        """The requests of all trials as a data frame, with times in seconds.

        `sent` is in seconds since the epoch. Rows of older versions have no requests.
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

    @property
    def summary(self) -> DataFrame:
        """The combinations as a data frame: medians, with minimum `…_low` and maximum `…_high`."""
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

        If several are too close to tell, it is the one closest to the settings in use, with the
        others as `close`. With three rounds or more, paired intervals decide what is too close;
        with fewer, overlapping ranges.

        Args:
            objective: A metric. Seconds, memory and perplexity are minimized, others maximized.
            constraints: Bounds on metrics or settings, by name and comparison; a name alone means
                at most: `{"memory_gib": 20, "context_size>=": 16384}`.

        Raises:
            ExperimentError: No combination satisfies the constraints, or a name is unknown.
        """
        measured = self.measured("there is no best")
        names = {name for one in measured for name in one.metrics}
        settings = {name for one in measured for name, _ in one.trial.settings}
        aim, bounds = read_objective(objective, names, self.rows), constraints_of(constraints)
        for bound in bounds:
            known(bound.name, names | settings | set(type(self.config).model_fields), self.rows)
        return self.choose(aim, bounds)

    def choose(self, objective: Objective, bounds: Sequence[Constraint]) -> Combination:
        """Return the best of those `fitting`; if there is none, the error names the nearest."""
        if fitting := self.fitting(objective, bounds):
            return choose(fitting, objective, self._spread(objective))
        measured = self.measured("there is no best")
        if all(objective.of(row) is None for row in self.rows):
            measure = "Choose another objective, or measure it (quality=…, parallel=…)."
            raise ExperimentError(
                objective.why_none(self.rows)
                or f"No trial has {objective.name}. {_remedy(objective.name) or measure}"
            )
        near = min(measured, key=lambda one: sum(b.excess(one.value(b.name)) for b in bounds))
        if near.keeps(bounds):
            raise ExperimentError(
                f"{near.trial.label} satisfies {' and '.join(map(str, bounds))}, but its"
                f" {objective.name} is unknown."
                f" {_remedy(objective.name) or 'Choose another objective.'}"
            )
        have = ", ".join(bound.told(near.value(bound.name)) for bound in bounds)
        unknown = (bound.name for bound in bounds if near.value(bound.name) is None)
        raise ExperimentError(
            f"None of {len(measured)} combinations satisfies {' and '.join(map(str, bounds))}."
            f" The nearest is {near.trial.label}, with {have}."
            f" {_remedy(*unknown) or 'Loosen a constraint, or try other settings.'}"
        )

    def fitting(self, objective: Objective, bounds: Sequence[Constraint]) -> list[Combination]:
        """Return the combinations that satisfy all bounds, with the objective in `metrics`."""
        values: dict[Trial, dict[int, float]] = {}
        for row in self.rows:
            if (value := objective.of(row)) is not None:
                values.setdefault(row.trial.combination, {})[row.trial.repeat] = value
        return [
            replace(one, series={**one.series, objective.name: values[one.trial]})
            for one in self.combinations
            if one.trial in values and one.keeps(bounds)
        ]

    def verdict(
        self, one: Combination, other: Combination | None = None, objective: str = OBJECTIVE
    ) -> Difference:
        """Compare two combinations, over the rounds that both have.

        Args:
            one: The combination to judge.
            other: The combination to compare with; by default the settings in use.
            objective: A metric; *faster* means better.

        Raises:
            ExperimentError: The settings in use were not measured, or one lacks the metric.
        """
        aim, other = self._aim(objective), other or self._in_use()
        if lacking := [each for each in (one, other) if aim.name not in each.metrics]:
            raise ExperimentError(
                f"{lacking[0].trial.label} has no {aim.name}. Compare another metric."
            )
        spread = self._spread(aim)
        found = one.against(other, aim.name, smaller_is_better=aim.smaller, spread=spread)
        if found is None:
            raise ExperimentError(
                f"{aim.name} is not always positive, so it has no ratio. Compare another metric."
            )
        return found

    def verdicts(self, objective: str = OBJECTIVE) -> DataFrame:
        """Compare each combination that has the metric with the settings in use, as a data frame.

        `ratio` is the combination's value over that of the settings in use, with the 98 %
        confidence interval from `low` to `high`; `more_rounds` may decide; `apart` were measured
        in different runs or on different machines, so they don't count.

        Raises:
            ExperimentError: The settings in use were not measured, or lack the metric.
        """
        in_use, name = self._in_use(), self._aim(objective).name
        return frame_of(
            {**one.trial.columns, **asdict(self.verdict(one, in_use, objective))}
            for one in self.measured("there is nothing to compare")
            if one.trial != in_use.trial and (name in one.metrics or name not in in_use.metrics)
        )

    def _aim(self, objective: str) -> Objective:
        measured = self.measured("there is nothing to compare")
        return read_objective(objective, {n for one in measured for n in one.metrics}, self.rows)

    def _in_use(self) -> Combination:
        measured = [one.trial for one in self.measured("there is nothing to compare")]
        baseline = next((row.trial.combination for row in self.rows if row.trial.repeat < 0), None)
        if self.config.model or len({trial.model for trial in measured}) == 1:
            tried = [*measured, *(one.trial for one in self.combinations)]
            baseline = baseline or baseline_of(tried, self.config)
        found = next((one for one in self.combinations if one.trial == baseline), None)
        if found is None or not found.done:
            why = found.reasons if found else ("A Sweep measures them with baseline=True.",)
            raise ExperimentError(f"The settings in use were not measured. {' '.join(why)}")
        return found

    def _spread(self, objective: Objective) -> float:
        """Return the machine's own relative variation; 0 if unknown."""
        each = (one.own_spread(objective.name) for one in self.fitting(objective, ()))
        return max(each, default=0.0)

    def env_lines(
        self,
        objective: str = OBJECTIVE,
        constraints: Mapping[str, Any] | None = None,
        profile: str | None = None,
    ) -> str:
        """Return the `.env` lines for the best combination; see `best`."""
        return self.best(objective, constraints).env_lines(profile)

    def plot(
        self, kind: str = "bars", y: str = OBJECTIVE, x: str = "memory_gib", colour: str = ""
    ) -> Figure:
        """Plot the results; a notebook shows the figure.

        Args:
            kind: `bars`, medians with their range; `concurrency`, a metric against concurrent
                requests; `prompt`, a latency against the length of the prompt; `parallel`
                coordinates, a line per combination through all that varies; or `pareto`, the
                trade-off between two metrics.
            y: The metric; for `prompt`, a latency.
            x: The metric on the x-axis of `pareto`, such as memory, perplexity or quality.
            colour: A third metric for `pareto`, shown as colour, such as quality.

        Raises:
            ExperimentError: Nothing was measured, or a name is unknown.
        """
        extra("matplotlib")
        from kitty_nb.experiments.plots import KINDS, curves, labels_of  # noqa: PLC0415 (of an extra)

        own = {"concurrency": self._by_concurrency, "prompt": self._by_prompt}
        if kind not in (kinds := [*KINDS, *own]):
            raise ExperimentError(f"Unknown plot {kind!r}. Use one of {', '.join(kinds)}.")
        require("y", y, str, "the name of a metric")
        measured = self.measured("there is nothing to plot")
        if kind in own:
            y = LATENCIES[0] if kind == "prompt" and y == OBJECTIVE else y
            points = [own[kind](one, y) for one in measured]
            if not any(points):
                raise ExperimentError(
                    f"No result has {y!r} for a plot against {kind}. Choose another metric."
                )
            named = zip(labels_of(measured), points, strict=True)
            words = {
                "concurrency": ("requests at once", "repeats"),
                "prompt": ("prompt, tokens", "requests"),
            }
            return curves({label: found for label, found in named if found}, y, *words[kind])
        names = {name for one in measured for name in one.metrics}
        asked = (y, x, *([colour] if colour else [])) if kind == "pareto" else (y,)
        wanted = {known(name, names, self.rows) for name in asked}
        drawn = [one for one in measured if wanted <= one.metrics.keys()]
        if not drawn:
            raise ExperimentError(f"No combination has both {' and '.join(asked)}. Choose others.")
        return KINDS[kind](drawn, y, x, colour)

    def _by_concurrency(self, one: Combination, name: str) -> list[Point]:
        speeds = [row.measurement.speeds for row in self.rows if row.measurement]
        levels = sorted({speed.parallel for each in speeds for speed in each})
        names = {level: f"{name}_{level}" if index else name for index, level in enumerate(levels)}
        found = {level: one.metrics[at] for level, at in names.items() if at in one.metrics}
        return [(level, it.median, it.low, it.high) for level, it in found.items()]

    def _by_prompt(self, one: Combination, name: str) -> list[Point]:
        values: dict[int, list[float]] = {}
        for row in self.rows:
            if row.measurement and row.trial.combination == one.trial:
                for request in (one for speed in row.measurement.speeds[:1] for one in speed.each):
                    if (value := getattr(request, name, None)) is not None:
                        values.setdefault(request.prompt_tokens, []).append(value)
        spreads = {length: Spread.over(several) for length, several in values.items()}
        return [(length, it.median, it.low, it.high) for length, it in spreads.items()]

    def measured(self, so: str) -> list[Combination]:
        """Return the combinations that were measured.

        Args:
            so: What can't be done without one, for the error.

        Raises:
            ExperimentError: There is none; with the most frequent reasons.
        """
        measured = [one for one in self.combinations if one.done]
        if not measured:
            reasons = Counter(row.reason[:_LENGTH] for row in self.rows).most_common(_SHOWN)
            told = "".join(f"\n- {count} of them: {reason}" for reason, count in reasons)
            raise ExperimentError(f"None of {len(self.rows)} trials was measured, so {so}.{told}")
        return measured


def _remedy(*unknown: str) -> str:
    """Say how to measure the memory of GPUs if that is among the unknown metrics; else empty."""
    if not any("memory_gib" in name for name in unknown):
        return ""
    return (
        "A GPU doesn't report the server's memory, so only ram_gib is known. For NVIDIA's: pip"
        " install 'kitty_nb[gpu]'"
    )
