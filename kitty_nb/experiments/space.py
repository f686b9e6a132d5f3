"""Settings to vary: their names, combinations and order. Pure.

A name is a field of `ServerConfig`, or a flag of llama-server without a field.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from enum import Enum
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import psutil

from kitty_nb.config import ServerConfig
from kitty_nb.config.flags import takes_secret, value_of
from kitty_nb.errors import ConfigError, ExperimentError, Problem
from kitty_nb.experiments.arguments import require, several, texts
from kitty_nb.experiments.trial import Trial
from kitty_nb.isolated_server import SERVER_SETTINGS, accepts, spell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kitty_nb.experiments.trial import ModelFingerprint, Value, Workload
    from kitty_nb.isolated_server import Dialect, Option

    Settings = tuple[tuple[str, Value], ...]
    Skip = Callable[[Mapping[str, Any]], object]

# Each request limits its own answer, so the server's limit has no effect.
FIELDS = (*(name for name in SERVER_SETTINGS if name != "n_predict"), "binary")
# Options that each request, or the sweep, sets itself, and what to do instead.
_DECIDED = {
    "--seed": "Write seed=… as an argument instead.",
    "--predict": "Write max_tokens=… as an argument instead.",
    "--n-predict": "Write max_tokens=… as an argument instead.",
    "--ignore-eos": "Leave it out; with quality=… an answer ends where the model ends it.",
    "--cache-prompt": "Leave it out; prompts always start from scratch, to measure their speed.",
    "--temp": "Write temperature instead.",
    "--top-p": "Write top_p instead.",
    "--repeat-penalty": "Write repeat_penalty instead.",
    "--model": "Name models in their own argument instead.",
    **dict.fromkeys(("--host", "--port", "--alias", "--api-key"), "Leave it out."),
}
_NO_EFFECT = "It has no effect: each request, or the sweep, sets it."
_HIDDEN = "Its value is a secret, and results show every value that is tried."
_OF_ALL = "Leave it out, and set it for all trials in LLAMACPP_EXTRA_ARGS."
_MISSPELT = 0.92  # similarity from which a name is a misspelled field; real flags are below
# llama-server's defaults. Threads: one per core.
ENGINE_DEFAULTS: Mapping[str, Value] = {
    "threads": psutil.cpu_count(logical=False),
    "batch_size": 2048,
    "ubatch_size": 512,
    "flash_attention": "auto",
    "speculation": "off",
    "cache_type_k": "f16",
    "cache_type_v": "f16",
    "mmproj": "auto",
}
_SHORT = {"cache_type_k": "-ctk", "cache_type_v": "-ctv"}


def combine(
    base: ServerConfig,
    models: Sequence[object] = (),
    grid: Mapping[str, Iterable[Any]] | None = None,
    configs: Iterable[ServerConfig | Mapping[str, Any]] | None = None,
    skip: Skip | None = None,
) -> tuple[Trial, ...]:
    """Return every combination of models and settings once; for the arguments, see `Sweep`.

    Raises:
        ConfigError: Some names or values are invalid; the error lists all of them.
        ExperimentError: There is nothing to try.
    """
    problems: list[Problem] = []
    grid = {} if grid is None else grid
    require("grid", grid, Mapping, 'values by name of setting: {"threads": [4, 8]}')
    axes = {name: _values(name, grid[name], problems) for name in texts("grid", [*grid])}
    given = [{}] if configs is None else several(configs)
    listed = [_one_config(one, base, problems) for one in given]
    problems += _check_names([*axes, *(name for _, settings in listed for name in settings)])
    words = [*axes.get("extra_args", ()), *(settings.get("extra_args") for _, settings in listed)]
    problems += _check_words(words)
    if problems:
        raise ConfigError("the sweep", tuple(problems))
    named = [_model_name(model, base) for model in models or filter(None, (base.model,))]
    if not named and not all(model for model, _ in listed):
        raise ExperimentError("No model is chosen. Name one as an argument, or set one in .env.")
    combinations = dict.fromkeys(
        Trial(model, tuple((settings | dict(zip(axes, point, strict=True))).items()))
        for own_model, settings in listed
        for model in ([own_model] if own_model else named)
        for point in product(*axes.values())
    )
    left = tuple(trial for trial in combinations if not _skipped(trial, skip))
    if not left:
        emptied = [name for name, values in axes.items() if not values]
        what = f"no values are given for {', '.join(emptied)}" if emptied else "skip excludes all"
        what = "configs is empty" if configs is not None and not listed else what
        raise ExperimentError(f"There is nothing to try: {what}. Give at least one combination.")
    _check_values(left, base)
    return left


def baseline_of(combinations: Sequence[Trial], base: ServerConfig) -> Trial:
    """Return the combination equal to the settings in use; a new one if none of these is."""
    model = _model_name(base.model, base) if base.model else combinations[0].model
    same = (
        one
        for one in combinations
        if one.model == model and all(value == in_use(name, base) for name, value in one.settings)
    )
    return next(same, Trial(model))


def in_order(
    combinations: Sequence[Trial], repeats: int, seed: int, twice: Trial | None = None
) -> tuple[Trial, ...]:
    """Return all trials in rounds, each of which has every combination once, shuffled.

    A drift, such as a machine warming up, then affects all combinations alike. The combination
    `twice` is measured twice per round, the second time with a negative repeat.
    """
    rounds = []
    for repeat in range(1, repeats + 1):
        once = dict.fromkeys((*combinations, *([twice] if twice else [])))
        trials = [Trial(one.model, one.settings, repeat) for one in once]
        trials += [Trial(twice.model, twice.settings, -repeat)] if twice else []
        Random(f"{seed} {repeat}").shuffle(trials)  # noqa: S311 (an order, not a secret)
        rounds += trials
    return tuple(rounds)


def check_flags(settings: Iterable[tuple[str, Value]], dialect: Dialect) -> None:
    """Reject flags that the engine lacks or a trial can't set, and values it doesn't accept."""
    problems: dict[object, Problem] = {}
    for name, value in sorted(set(settings), key=str):
        words = value if name == "extra_args" and isinstance(value, tuple) else ()
        for word in words:
            if fix := _decided(dialect.option(word)):
                problems[word] = Problem(name, word, _NO_EFFECT, fix)
        if name in FIELDS:
            continue
        option, words = dialect.option(_flag(name)), _words(name, value, dialect)
        if fix := _decided(option):
            problems[name] = Problem(name, str(value), _NO_EFFECT, fix)
        elif option is None and tuple(spell(dialect, words)) == words:
            reason = f"It is neither a setting nor a flag of this llama-server ({_flag(name)})."
            problems[name] = Problem(name, str(value), reason, _advice(name, dialect))
        elif option and value is not None and not accepts(option, str(value)):
            fix = f"Use one of {', '.join(option.choices)}."
            problems[name, value] = Problem(
                name, str(value), "llama-server doesn't accept it.", fix
            )
    if problems:
        raise ConfigError("", tuple(problems.values()))


def as_value(value: Any) -> Value:
    """Convert a value to the form in which trials compare and store it, or raise TypeError."""
    match value:
        case Enum():
            return as_value(value.value)
        case Path():
            return str(value)
        case list() | tuple():
            return tuple(map(str, value))
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
    if callable(item := getattr(value, "item", None)):  # a NumPy scalar
        return as_value(item())
    raise TypeError(f"{value!r} can't be the value of a setting")


def changes(trial: Trial, base: ServerConfig, dialect: Dialect | None = None) -> dict[str, Any]:
    """Return the fields of `ServerConfig` that a trial changes, `extra_args` with its flags last.

    Only a dialect can spell switches that are off.
    """
    fields: dict[str, Any] = {name: value for name, value in trial.settings if name in FIELDS}
    flags = [
        word
        for name, value in trial.settings
        if name not in FIELDS
        for word in _words(name, value, dialect)
    ]
    if flags:
        first = base.replace(extra_args=fields.get("extra_args", base.extra_args))
        fields["extra_args"] = (*first.extra_args, *flags)
    return {"model": trial.model, **fields}


def in_use(name: str, base: ServerConfig) -> Value:
    """Return a setting's value if a trial doesn't change it; None if unknown."""
    if name in FIELDS:
        value = as_value(getattr(base, name))
    else:
        value = value_of(base.extra_args, {_flag(name), _SHORT.get(name, "")})
    return ENGINE_DEFAULTS.get(name) if value is None else value


def digest(
    base: ServerConfig, workload: Workload, files: Mapping[str, ModelFingerprint] | None = None
) -> str:
    """Return a digest of the conditions that comparable rows share, and of files they need."""
    config = base.model_dump(mode="json", include=set(FIELDS), exclude_none=True)
    if not base.rpc_hosts:  # rows of versions without this setting stay valid
        del config["rpc_hosts"]
    needed = {"files": [one.digest for one in files.values()]} if files else {}
    text = json.dumps({"config": config, **workload.conditions(), **needed}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _check_names(names: Iterable[str]) -> Iterator[Problem]:
    """Yield problems with names of settings that don't depend on the engine."""
    choice = f"{', '.join(FIELDS)}, or a flag of llama-server."
    for name in dict.fromkeys(names):
        if name in FIELDS:
            continue
        if takes_secret(_flag(name)):
            yield Problem(name, "", _HIDDEN, _OF_ALL)
        elif name in ServerConfig.model_fields:
            fix = _DECIDED.get(_flag(name), f"Leave it out. You can vary {choice}")
            yield Problem(name, "", "The sweep sets it itself.", fix)
        elif near := get_close_matches(name, FIELDS, n=1, cutoff=_MISSPELT):
            yield Problem(name, "", "There is no such setting.", f"Did you mean {near[0]}?")
        elif not re.fullmatch(r"[\w.-]+", name):
            yield Problem(name, "", "It isn't the name of a setting.", f"Use one of {choice}")


def _check_words(several: Iterable[Value]) -> Iterator[Problem]:
    """Yield secrets among flags that are tried: results, reports and labels show those."""
    for words in several:
        for word in words if isinstance(words, tuple) else ():
            if takes_secret(word):
                yield Problem("extra_args", word, _HIDDEN, _OF_ALL)


def _check_values(trials: Iterable[Trial], base: ServerConfig) -> None:
    """Validate the settings of all trials, but not their models."""
    problems: dict[tuple[str, str], Problem] = {}
    for trial in trials:
        try:
            base.replace(**changes(trial, base))
        except ConfigError as error:
            problems |= {(one.key, one.value): one for one in error.problems}
    if problems:
        raise ConfigError("the sweep", tuple(problems.values()))


def _one_config(
    config: ServerConfig | Mapping[str, Any], base: ServerConfig, problems: list[Problem]
) -> tuple[str | None, dict[str, Value]]:
    """Return a config's model, if any, and its other settings."""
    require("configs", config, (ServerConfig, Mapping), 'settings by name: [{"threads": 4}, …]')
    if isinstance(config, ServerConfig):
        whole = {name: getattr(config, name) for name in (*FIELDS, "model")}
        config = {name: value for name, value in whole.items() if value != getattr(base, name)}
    model = _model_name(config["model"], base) if config.get("model") else None
    names = (name for name in texts("configs", [*config]) if name != "model")
    named = {name: _values(name, [config[name]], problems) for name in names}
    return model, {name: values[0] for name, values in named.items() if values}


def _values(name: str, values: Iterable[Any], problems: list[Problem]) -> tuple[Value, ...]:
    fix = f"Write {name}=[…] with the values to try."
    if isinstance(values, (str, bytes)):
        shown = "" if takes_secret(_flag(name)) else str(values)
        problems.append(Problem(name, shown, "It is one value, not a list.", fix))
        return ()
    try:
        return tuple(dict.fromkeys(map(as_value, values)))
    except TypeError as error:
        problems.append(Problem(name, str(values), f"{error}.", fix))
        return ()


def _model_name(model: object, base: ServerConfig) -> str:
    """Return a model's path relative to the models folder, which is valid on any machine."""
    path, folder = Path(str(getattr(model, "path", model))).expanduser(), base.models_dir
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _skipped(trial: Trial, skip: Skip | None) -> bool:
    combination = {"model": trial.model, **dict(trial.settings)}
    try:
        return skip is not None and bool(skip(combination))
    except Exception as error:
        raise ExperimentError(
            f"skip failed with {error!r} for {combination}. It receives the settings of a"
            " combination, and must return True to leave it out."
        ) from error


def _decided(option: Option | None) -> str:
    """Say where to set an option that a trial can't; empty for other options."""
    return next(
        (_DECIDED[flag] for flag in (option.flags if option else ()) if flag in _DECIDED), ""
    )


def _advice(name: str, dialect: Dialect) -> str:
    """Suggest a field or flag for a misspelled name."""
    option = dialect.option(f"-{name}") or dialect.option(dialect.nearest(_flag(name)) or "")
    if option is None:
        return "Correct its name, or leave it out."
    names = [flag.lstrip("-").replace("-", "_") for flag in option.flags]
    fields = [field for field in FIELDS if field in names] or get_close_matches(name, FIELDS, n=1)
    near = next(iter(fields), max((n for n in names if not n.startswith("no_")), key=len))
    return f"Did you mean {near}?"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _words(name: str, value: Value, dialect: Dialect | None) -> tuple[str, ...]:
    """Return a flag and its value as words of the command line."""
    flag = _flag(name)
    match value:
        case None:
            return ()
        case True:
            return (flag,)
        case False:
            negative = f"--no-{flag.removeprefix('--')}"
            return (negative,) if dialect and dialect.option(negative) else ()
        case tuple():
            return (flag, *value)
    return flag, str(value)
