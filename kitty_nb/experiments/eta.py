"""How long a sweep still takes: from its trials so far, and from the history of loads."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import anyio.to_thread

from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import KittyError
from kitty_nb.experiments.trial import Outcome
from kitty_nb.supervisor.history import Basis, LoadHistory, estimate_load
from kitty_nb.supervisor.load_facts import gather_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.trial import Trial, TrialResult


def seconds_left(
    results: Sequence[TrialResult],
    left: Sequence[Trial],
    loads: Mapping[str, float],
    passed: float = 0.0,
) -> float | None:
    """Forecast how long trials take one after the other; None while nothing is known. Pure.

    The best that there is for each: the same combination, else the same model, else all trials'
    requests with the load that the history promises.

    Args:
        results: Trials that have ended.
        left: Those that have not.
        loads: Seconds that a model's load should take, by its name, where the history tells.
        passed: Seconds for which trials of `left` have been under way already.
    """
    if not left:
        return 0.0
    done = [result for result in results if result.outcome is Outcome.DONE]
    if not done:
        return None
    same = _medians((result.trial.combination, result.seconds.overall) for result in results)
    model = _medians((result.trial.model, result.seconds.overall) for result in done)
    requests = median(result.seconds.overall - result.seconds.load for result in done)
    anything = median(result.seconds.overall for result in done)

    def expected(trial: Trial) -> float:
        for known in (same.get(trial.combination), model.get(trial.model)):
            if known is not None:
                return known
        return loads[trial.model] + requests if trial.model in loads else anything

    return max(0.0, sum(map(expected, left)) - passed)


def _medians(values: Iterable[tuple[Hashable, float]]) -> dict[Hashable, float]:
    groups: dict[Hashable, list[float]] = {}
    for key, value in values:
        groups.setdefault(key, []).append(value)
    return {key: median(group) for key, group in groups.items()}


async def forecast_loads(
    models: Iterable[str], config: ServerConfig, tell: Callable[[str], None]
) -> dict[str, float]:
    """Ask the history of loads how long models take; what it does not know is left out.

    Args:
        models: As trials name them.
        config: A sweep's own settings.
        tell: Called with a sentence about what is wrong with the history.
    """
    history, found = LoadHistory(config.history, tell), {}
    for model in dict.fromkeys(models):
        try:
            own = await anyio.to_thread.run_sync(lambda name: config.replace(model=name), model)
            engine = await locate_engine(config.binary)
        except KittyError:  # the trial itself will say so
            continue
        facts = await anyio.to_thread.run_sync(gather_facts, own, abandon_on_cancel=True)
        facts = replace(facts, engine=engine.kind.value, version=engine.version)
        estimate = estimate_load(await history.recall(facts.host, facts.path), facts)
        if estimate.basis is not Basis.NOTHING:
            found[model] = estimate.starting + estimate.loading + estimate.preparing
    return found
