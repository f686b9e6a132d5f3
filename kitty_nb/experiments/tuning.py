"""`tune`: the best settings in far fewer trials than a grid has combinations."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

from kitty_nb.config import ServerConfig, env_warnings
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments import target as targets
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.metrics import (
    OBJECTIVE,
    constraints_of,
    metric_names,
    read_objective,
)
from kitty_nb.experiments.search_run import TuneResult, Tuning
from kitty_nb.experiments.space import BATCHES, fill_batches
from kitty_nb.experiments.trial import (
    DEFAULT_PROMPT,
    Perplexity,
    TrialResult,
    Workload,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from kitty_nb.experiments.trial import (
        Quality,
        SweepEvent,
    )
    from kitty_nb.operation import Operation


def tune(
    model: object = None,
    objective: str | Callable[[TrialResult], float] = OBJECTIVE,
    space: Mapping[str, Any] | None = None,
    constraints: Mapping[str, Any] | None = None,
    budget: int = 20,
    prompts: str | Iterable[str] = DEFAULT_PROMPT,
    *,
    target: str | None = None,
    quality_loss: str | None = None,
    memory: str | None = None,
    text: str = "",
    proof_rounds: int = 8,
    seconds: float | None = None,
    seed: int = 0,
    parallel: int | Iterable[int] = 1,
    max_tokens: int = 64,
    config: ServerConfig | None = None,
    quality: Quality | None = None,
    chat: bool = True,
    record: bool = False,
    requests: int = 0,
    store: str | Path = "tune.journal",
    logs: str | Path | None = None,
    busy_repeats: int = 1,
    on_event: Callable[[SweepEvent], object] = lambda _: None,
) -> Operation[TuneResult]:
    """Search for the settings that are best at something, and return at once.

    Trials run here one after the other, as those of a `Sweep` do. The settings in use come first,
    then some by chance, then what Optuna expects to be better; every eighth trial measures the best
    so far again, up to three times, for medians are compared. A trial that is clearly behind the
    others is pruned. Rows are in the `store` as soon as they are there, and count: the same call
    goes on where the last one ended.

    Args:
        model: The file, absolute or in the models folder; by default the one in `config`.
        objective: A number of the table, after a minus sign one of which less is better; or a
            function of a row that is done, the higher the better.
        space: What to choose from, by name of setting as in a `Sweep`: a list of values, or the
            lowest and the highest number as a tuple. By default threads and flash attention, and
            layers on a GPU where there is one.
        constraints: Bounds to keep, of numbers or settings, by name and sign; a name alone means
            at most: `{"memory_gib": 20, "context_size>=": 16384}`. What breaks one on a setting
            is never tried.
        budget: The number of trials, with those in the store.
        prompts: One request each; 1 or more. By default a question, which is repeated
            to fill the batches where their sizes are chosen and the objective depends on them.
        target: A bound to reach, such as `"generation_tokens_per_second >= 30"`. The search is then
            for the least memory that reaches it, over all quants of the model on disk, and the
            `proof` compares it with the settings in use and the runner-up.
        quality_loss: How much worse the perplexity of `text` may be than that of the largest
            quant, such as `"<= 2 %"`; only with a target.
        memory: The most memory, such as `"<= 20 GB"`; only with a target.
        text: The text for `quality_loss`, as an answer to the first prompt; a short one is built
            in.
        proof_rounds: The rounds of the proof. Eight find nearly every difference of 10 % on a quiet
            machine.
        seconds: After how long no further trial begins; None for no limit.
        seed: Of the search and of the server's sampling.
        parallel: Numbers of requests to have under way at once, each measured on its own.
        max_tokens: Length of an answer.
        config: The settings that the space changes; by default those of `.env`.
        quality: As for a `Sweep`.
        chat: Whether prompts go through the model's chat template.
        requests: As for a `Sweep`.
        record: As for a `Sweep`; trials that were measured without a run record do not count.
        store: The file for the rows.
        logs: A folder in which to keep the servers' logs.
        busy_repeats: As for a `Sweep`.
        on_event: Called on the search's thread when a trial begins, makes progress or ends.

    Returns:
        Cancelling it ends the search and the server under way; the rows stay in the store. It may
        end with `ExperimentError`: no trial could be measured, or none keeps the constraints.

    Raises:
        ConfigError: Listing every name and value that is wrong.
        ExperimentError: There is nothing to try, or Optuna is missing.
    """
    extra("optuna")
    from kitty_nb.experiments.study import Search, default_space, read_space  # noqa: PLC0415 (of an extra)

    warnings = () if config else env_warnings(".env", "primary")
    config = config or ServerConfig.from_env()
    models: Sequence[object] = [] if model is None else [model]
    goal = None
    if target:
        goal = targets.Goal.of(target, quality_loss, memory, text, proof_rounds)
        models, largest = targets.family_of(model, config)
        objective, constraints = targets.COST, {**goal.limits, **(constraints or {})}
        space = {**default_space(config), **targets.COSTS} if space is None else space
        prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if goal.loss and quality is None:
            quality = Perplexity(dict.fromkeys(prompts[:1], goal.text))
    elif quality_loss or memory:
        raise ExperimentError("quality_loss and memory go with a target. Give one, or constraints.")
    asked = {"max_tokens": max_tokens, "seed": seed, "chat": chat, "record": record}
    workload = Workload.of(prompts, parallel, quality, **asked, at_least=requests)
    if budget < 1:
        raise ExperimentError(f"budget is {budget}, so nothing would be tried. Write 1 or more.")
    names = metric_names(workload)
    bounds = constraints_of(constraints)
    aim = read_objective(objective, names)
    search = Search(*read_space(models, config, space, bounds, names), aim, bounds, config, seed)
    batches = [search.samples(name) for name in search.space if name in BATCHES and not goal]
    workload, useless = fill_batches(workload, [*product(*batches)], config, aim.name)
    common: dict[str, Any] = {
        "config": config,
        "workload": workload,
        "store": store,
        "logs": logs,
        "busy_repeats": busy_repeats,
        "warnings": (*warnings, *useless),
        "search": search,
        "budget": budget,
        "seconds": seconds,
    }
    run = Tuning(**common)
    if goal:
        reference = search.models[models.index(largest)]
        run = targets.TargetTuning(goal=goal, reference=reference, **common)
    run.subscribe(on_event)
    return run.start()
