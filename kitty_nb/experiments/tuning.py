"""`tune`: a search for the best settings, in far fewer trials than a grid search."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

from kitty_nb.config.profiles import env_warnings
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments import target as targets
from kitty_nb.experiments.arguments import (
    config_to_start,
    positive,
    require,
    require_function,
    texts,
    whole,
)
from kitty_nb.experiments.batches import BATCHES, fill_batches
from kitty_nb.experiments.bounds import constraints_of
from kitty_nb.experiments.extras import extra
from kitty_nb.experiments.metrics import OBJECTIVE, metric_names, read_objective
from kitty_nb.experiments.quality import Perplexity
from kitty_nb.experiments.search_run import TuneResult, Tuning
from kitty_nb.experiments.trial import DEFAULT_PROMPT, TrialResult, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from kitty_nb.config import ServerConfig
    from kitty_nb.experiments.quality import Quality
    from kitty_nb.experiments.search_run import TuningOptions
    from kitty_nb.experiments.trial import SweepEvent
    from kitty_nb.operation import Operation


def tune(
    model: object = None,
    objective: str | Callable[[TrialResult], float] | None = None,
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
    """Search for the best settings in the background.

    Trials run on this machine, one after the other, like those of a `Sweep`: first the settings in
    use, as far as the space has them, then a few random ones, then what Optuna proposes. Every
    eighth trial and, of five or more, the last repeats the best so far, up to three times, because
    medians are compared. A trial that falls clearly behind is pruned. Results are saved in the
    `store` immediately; the same call continues from there, and tries again what failed or was
    skipped.

    Args:
        model: The model file, absolute or in the models folder; by default the one in `config`.
        objective: The metric to optimize, with a minus sign to minimize it (`-seconds`); or a
            function of a finished trial's row, to be maximized. By default the generation speed;
            with a target it is memory.
        space: The values to choose from, by name of setting as in a `Sweep`: a list of values, or a
            tuple of the lowest and highest number. By default threads, flash attention and, with a
            GPU, the layers on it.
        constraints: Bounds on metrics or settings, by name and comparison; a name alone means at
            most: `{"memory_gib": 20, "context_size>=": 16384}`. Settings that violate one are never
            tried.
        budget: The number of trials, including those in the store, but not those of a proof.
        prompts: One or more prompts, one request each. By default a question, repeated to fill the
            batches if their sizes are varied and the objective depends on them.
        target: A bound to reach, such as `"generation_tokens_per_second >= 30"`. The search then
            minimizes memory over all quants of the model on disk, and the `proof` compares the
            result with the settings in use and the runner-up.
        quality_loss: How much worse the perplexity of `text` may be than with the largest quant,
            such as `"<= 2 %"`; only with a target.
        memory: The memory limit, such as `"<= 20 GB"`; only with a target.
        text: The text for `quality_loss`, as the answer to the first prompt. A short one is built
            in.
        proof_rounds: The rounds of the proof. Eight detect nearly every difference of 10 % on a
            quiet machine.
        seconds: The time in seconds after which the search starts no further trial; None for no
            limit. The proof of a target is not cut short: it takes up to three trials per round,
            and is repeated for at most two other candidates.
        seed: The seed of the search and of the server's sampling.
        parallel: Numbers of concurrent requests, each measured separately.
        max_tokens: Length of an answer, in tokens.
        config: The base settings; by default those of `.env`.
        quality: As for a `Sweep`.
        chat: Whether prompts go through the model's chat template.
        record: As for a `Sweep`; trials without a run record are repeated.
        requests: As for a `Sweep`.
        store: The results file.
        logs: A folder for the servers' logs.
        busy_repeats: As for a `Sweep`.
        on_event: Called on the search's thread when a trial starts, makes progress or ends.

    Returns:
        The search in progress; cancelling it stops its server, and results stay in the store. It
        fails with `ExperimentError` if no trial could be measured or satisfies the constraints.

    Raises:
        ConfigError: Some names or values are invalid; the error lists all of them.
        ExperimentError: An argument is wrong or doesn't go with another, there is nothing to try,
            or Optuna is missing.
    """
    extra("optuna")
    from kitty_nb.experiments.study import Search, default_space, read_space  # noqa: PLC0415 (of an extra)

    warnings = () if config else env_warnings(".env", "primary")
    config = config_to_start(config, model, "A search starts a server for each trial")
    require("text", text, str, "a text")
    require_function("on_event", on_event, "an event")
    models: Sequence[object] = [] if model is None else [model]
    goal = None
    if target:
        if objective is not None:
            raise ExperimentError(
                "With a target, the search minimizes memory. Leave objective out, or write it as a"
                " bound in constraints."
            )
        goal = targets.Goal.of(target, quality_loss, memory, text, proof_rounds)
        if goal.loss and quality is not None and not isinstance(quality, Perplexity):
            raise ExperimentError(
                "quality_loss is measured by perplexity. Leave quality out, or bound it in"
                " constraints instead of quality_loss."
            )
        models, largest = targets.family_of(model, config)
        objective, constraints = targets.COST, {**goal.limits, **(constraints or {})}
        space = {**default_space(config), **targets.COSTS} if space is None else space
        prompts = texts("prompts", prompts)
        if goal.loss and quality is None:
            quality = Perplexity(dict.fromkeys(prompts[:1], goal.text))
    elif quality_loss or memory or text:
        raise ExperimentError(
            "quality_loss, memory and text need a target. Give one, or use constraints."
        )
    asked = {"max_tokens": max_tokens, "seed": seed, "chat": chat, "record": record}
    workload = Workload.of(prompts, parallel, quality, **asked, at_least=requests)
    whole("budget", budget, 1)
    whole("busy_repeats", busy_repeats)
    if seconds is not None:
        positive("seconds", seconds)
    names = metric_names(workload)
    bounds = constraints_of(constraints)
    aim = read_objective(OBJECTIVE if objective is None else objective, names)
    search = Search(*read_space(models, config, space, bounds, names), aim, bounds, config, seed)
    batches = [search.samples(name) for name in search.space if name in BATCHES and not goal]
    workload, useless = fill_batches(workload, [*product(*batches)], config, aim.name)
    options: TuningOptions = {
        "config": config,
        "workload": workload,
        "store": store,
        "logs": logs,
        "warnings": (*warnings, *useless),
        "busy_repeats": busy_repeats,
        "search": search,
        "budget": budget,
        "seconds": seconds,
    }
    if goal:
        reference = search.models[models.index(largest)]
        run: Tuning = targets.TargetTuning(goal=goal, reference=reference, **options)
    else:
        run = Tuning(**options)
    run.subscribe(on_event)
    return run.start()
