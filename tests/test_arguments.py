"""What experiments refuse at once, in a sentence that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kitty_nb import ServerConfig
from kitty_nb.errors import ConfigError, ExperimentError, RunRecordError
from kitty_nb.experiments import (
    Bench,
    Divergence,
    ExactMatch,
    HarnessTask,
    Perplexity,
    Results,
    RunRecord,
    Suite,
    Sweep,
    compare,
    compare_paired,
    compare_results,
    load_test,
    own_spread,
    proportion_interval,
    regress,
    replay,
    tune,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "arguments", "told"),
    [
        *(
            (call, {"config": 5}, "config is 5. Write a ServerConfig")
            for call in (Sweep, Bench, tune, load_test)
        ),
        *(
            (call, {"config": ServerConfig(ssh="red")}, "Do it on red, or without LLAMACPP_SSH")
            for call in (Sweep, Bench, tune)
        ),
        *((call, {"store": 5}, "store is 5. Write a path") for call in (Sweep, tune)),
        (Sweep, {"logs": 5}, "logs is 5. Write a path"),
        (Sweep, {"grid": {"cache_type_k": [NAN]}}, "nan can't be the value of a setting"),
        (Sweep, {"grid": 5}, "grid is 5. Write values by name"),
        (Sweep, {"grid": {5: [1]}}, "grid has 5. Write a text"),
        (Sweep, {"configs": [5]}, "configs is 5. Write settings by name"),
        (tune, {"space": 5}, "space is 5. Write values by name"),
        (tune, {"space": {"threads": [NAN]}}, "nan can't be the value of a setting"),
        (tune, {"constraints": 5}, "constraints is 5. Write bounds by name"),
        (tune, {"constraints": {5: 1}}, "constraints has 5. Write a text"),
        (tune, {"constraints": {"memory_gib": NAN}}, "bound on memory_gib is not a number"),
        (tune, {"objective": 5}, "objective is 5. Write a metric"),
        (tune, {"target": 5}, "Can't parse 5. Write it like"),
        (tune, {"text": 5}, "text is 5. Write a text"),
        (tune, {"chat": "no"}, "neither True nor False"),
        (load_test, {"access": 5}, "access is 5. Write a running server's"),
        (load_test, {"on_load": 5}, "on_load is 5. Write a function"),
        (tune, {"on_event": 5}, "on_event is 5. Write a function"),
        (lambda config: Bench(config=config).run(5), {}, "on_progress is 5. Write a function"),
    ],
)
def test_a_wrong_argument_is_named(
    config: ServerConfig, call: Callable[..., Any], arguments: dict[str, object], told: str
) -> None:
    with pytest.raises((ConfigError, ExperimentError), match=told):
        call(**({"config": config} | arguments))


class _Client(AbstractAsyncContextManager[None]):
    """What a client of Dask looks like."""

    submit = __aexit__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("where", [print, 5, _Client()])
def test_what_runs_no_trials_is_named(config: ServerConfig, tmp_path: Path, where: Any) -> None:
    sweep = Sweep(config=config, store=tmp_path / "sweep.journal")
    with pytest.raises(ExperimentError, match=r"where is .*for a Dask cluster, write client="):
        sweep.run(where).wait(30)


@pytest.mark.parametrize(
    ("call", "arguments", "told"),
    [
        (regress, (5, "a"), "Can't read 5"),
        (regress, ([], [5]), "engines is 5. Write a path"),
        (replay, (5,), "record is 5. Write a RunRecord"),
        (compare, (5, 5), "recorded is 5. Write a RunRecord"),
        (compare_results, (5, 5), "first is 5. Write the results of a sweep"),
        (own_spread, (["a"], ["b"]), "Ratios need positive numbers"),
        (partial(compare_paired, [1], [1], smaller_is_better=True, confidence=1), (), "below 1"),
        (partial(compare_paired, [1], [1], smaller_is_better=True, seed=-1), (), "seed is -1"),
        (partial(compare_paired, [1], [1], smaller_is_better=True, spread=-1), (), "spread is -1"),
        (proportion_interval, (1, 3, 5), "confidence is 5. Write a number below 1"),
        (proportion_interval, (5, 3), "successes is 5. Write a whole number from 0 to 3"),
        (ExactMatch, (5,), "expected is 5. Write a text for each prompt"),
        (Perplexity, ({"Why?": 5},), "expected is 5. Write a text for each prompt"),
        (Divergence, ("m.gguf", ["Why?"]), "Write a text for each prompt"),
        (Divergence, (5, {}), "reference is 5. Write the path of a model"),
        (HarnessTask, (5,), "name is 5. Write a text"),
        (HarnessTask, ("gsm8k", 0), "limit is 0. Write a whole number from 1"),
        (HarnessTask, ("gsm8k", None, "", "few"), "shots is 'few'. Write a whole number"),
        (Suite.standard, (0, 1, 5), "kinds has 5. Write a text"),
        (RunRecord.load, (5,), "Can't read 5"),
        (Results(ServerConfig(), ()).to_csv, (5,), "Can't write 5"),
    ],
)
def test_a_wrong_value_is_named(
    call: Callable[..., Any], arguments: tuple[object, ...], told: str
) -> None:
    with pytest.raises((ExperimentError, RunRecordError), match=told):
        call(*arguments)
