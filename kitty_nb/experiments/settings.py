"""Names in a grid: fields of `ServerConfig`, or llama-server's flags that have no field. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from kitty_nb.config import ServerConfig, value_of
from kitty_nb.errors import ConfigError, Problem
from kitty_nb.isolated_server import SERVER_SETTINGS, spell

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kitty_nb.experiments.trial import Trial, Value
    from kitty_nb.isolated_server import Dialect, Option

__all__ = [
    "ENGINE_DEFAULTS",
    "FIELDS",
    "as_value",
    "changes",
    "check_flags",
    "check_names",
    "conditions",
    "digest",
    "in_use",
]

# A request says itself how long its answer may be, so a server's own limit would change nothing.
FIELDS = (*(name for name in SERVER_SETTINGS if name != "n_predict"), "binary")
_MISSPELT = 0.92  # likeness from which a name is a misspelt field; real flags are less like one
# Options that each request, or the sweep, decides by itself; and where to say what they should be.
_DECIDED = {
    "--seed": "Write seed=… in the sweep instead.",
    "--predict": "Write max_tokens=… in the sweep instead.",
    "--n-predict": "Write max_tokens=… in the sweep instead.",
    "--ignore-eos": "Leave it out; with quality=… an answer ends where the model ends it.",
    "--cache-prompt": "Leave it out; each prompt is read anew, so that its speed can be measured.",
    "--temp": "Write temperature instead.",
    "--top-p": "Write top_p instead.",
    "--repeat-penalty": "Write repeat_penalty instead.",
    "--model": "Write models=[…] in the sweep instead.",
    **dict.fromkeys(("--host", "--port", "--alias", "--api-key"), "Leave it out."),
}
# What llama-server takes where it is told nothing. Threads: one for each core.
ENGINE_DEFAULTS: Mapping[str, Value] = {
    "threads": psutil.cpu_count(logical=False),
    "batch_size": 2048,
    "ubatch_size": 512,
    "flash_attention": "auto",
    "cache_type_k": "f16",
    "cache_type_v": "f16",
    "mmproj": "auto",
}
_SHORT = {"cache_type_k": "-ctk", "cache_type_v": "-ctv"}
# What other programs call a setting.
_ELSEWHERE = {
    "n_ctx": "context_size",
    "num_ctx": "context_size",
    "n_batch": "batch_size",
    "num_batch": "batch_size",
    "n_ubatch": "ubatch_size",
    "n_threads": "threads",
    "num_thread": "threads",
    "n_parallel": "parallel",
    "num_gpu": "n_gpu_layers",
    "type_k": "cache_type_k",
    "type_v": "cache_type_v",
}
_NO_EFFECT = "It would change nothing, for each request or the sweep decides it."


def check_names(names: Iterable[str]) -> Iterator[Problem]:
    """Yield what is wrong with names of settings, as far as that can be told without an engine."""
    for name in dict.fromkeys(names):
        if name in FIELDS:
            continue
        fields = ", ".join(FIELDS)
        if name == "model":
            yield Problem(name, "", "Models are not a setting.", "Write models=[…] instead.")
        elif name == "n_predict":
            yield Problem(name, "", "The sweep's max_tokens decides.", "Leave it out.")
        elif name in ServerConfig.model_fields:
            fix = f"Leave it out; what can be tried is {fields}, or a flag of llama-server."
            yield Problem(name, "", "The sweep chooses it itself.", fix)
        elif near := get_close_matches(name, FIELDS, n=1, cutoff=_MISSPELT):
            yield Problem(name, "", "There is no such setting.", f"Did you mean {near[0]}?")
        elif not re.fullmatch(r"[\w.-]+", name):
            fix = f"Use one of {fields}, or a flag of llama-server."
            yield Problem(name, "", "It is no name of a setting.", fix)


def check_flags(trials: Iterable[Trial], dialect: Dialect) -> None:
    """Refuse flags that the engine does not know or a trial cannot decide, and values not taken.

    Raises:
        ConfigError: Listing all of them, each with the nearest name there is.
    """
    wanted = {pair for trial in trials for pair in trial.settings if pair[0] not in FIELDS}
    extra = {v for trial in trials for name, v in trial.settings if name == "extra_args" and v}
    problems: dict[object, Problem] = {}
    for word in dict.fromkeys(
        word for words in extra if isinstance(words, tuple) for word in words
    ):
        if fix := _decided(dialect.option(word)):
            problems[word] = Problem("extra_args", word, _NO_EFFECT, fix)
    for name, value in sorted(wanted, key=str):
        words = _words(_flag(name), value, dialect)
        option = dialect.option(_flag(name))
        if fix := _decided(option):
            problems[name] = Problem(name, str(value), _NO_EFFECT, fix)
        elif option is None and tuple(spell(dialect, words)) == words:
            reason = f"It is neither a setting nor a flag of this llama-server ({_flag(name)})."
            problems[name] = Problem(name, str(value), reason, _advice(name, dialect))
        elif option and option.choices and value is not None and str(value) not in option.choices:
            fix = f"Use one of {', '.join(option.choices)}."
            problems[name, value] = Problem(name, str(value), "llama-server refuses it.", fix)
    if problems:
        raise ConfigError("the sweep", tuple(problems.values()))


def _decided(option: Option | None) -> str:
    """Say where to set an option that a trial cannot decide; empty of any other."""
    flags = option.flags if option else ()
    return next((_DECIDED[flag] for flag in flags if flag in _DECIDED), "")


def _advice(name: str, dialect: Dialect) -> str:
    """Name the setting that is meant, as a grid has it."""
    near = _ELSEWHERE.get(name)
    if near is None and (short := dialect.option(f"-{name}")):
        near = _grid_name(short)
    if near is None and (option := dialect.option(dialect.nearest(_flag(name)) or "")):
        near = next(iter(get_close_matches(name, FIELDS, n=1)), None) or _grid_name(option)
    return f"Did you mean {near}?" if near else "See `llama-server --help`."


def _grid_name(option: Option) -> str:
    """Return an option's name in a grid: its field, else its longest flag that turns it on."""
    names = [flag.lstrip("-").replace("-", "_") for flag in option.flags]
    fields = [field for field in FIELDS if field in names]
    return next(iter(fields), max((n for n in names if not n.startswith("no_")), key=len))


def as_value(value: Any) -> Value:
    """Bring a value into the form in which trials are compared and stored.

    Raises:
        TypeError: It cannot be a setting.
    """
    match value:
        case Enum():
            return as_value(value.value)
        case Path():
            return str(value)
        case list() | tuple():
            return tuple(map(str, value))
        case None | bool() | int() | float() | str():
            return value
    item = getattr(value, "item", None)  # numbers of NumPy, as its ranges hold them
    if callable(item):
        return as_value(item())
    raise TypeError(f"{value!r} is not a value that a setting can have")


def listed(choice: Any) -> list[Any]:
    """Return what a person gave as values, one alone as a list, too."""
    alone = isinstance(choice, str | bytes) or not isinstance(choice, Iterable)
    return [choice] if alone else list(choice)


def changes(trial: Trial, base: ServerConfig, dialect: Dialect | None = None) -> dict[str, Any]:
    """Return the fields of `ServerConfig` that a trial changes, `extra_args` with its flags last.

    Args:
        trial: What is to be tried.
        base: What the sweep starts from.
        dialect: Tells how the engine spells a switch that is off.
    """
    given = dict(trial.settings)
    fields: dict[str, Any] = {name: value for name, value in given.items() if name in FIELDS}
    flags = tuple(
        word
        for name, value in given.items()
        if name not in FIELDS
        for word in _words(_flag(name), value, dialect)
    )
    if flags:
        first = base.replace(extra_args=fields.get("extra_args", base.extra_args))
        fields["extra_args"] = (*first.extra_args, *flags)
    return {"model": trial.model, **fields}


def in_use(name: str, base: ServerConfig) -> Value:
    """Return the value a setting has where a trial does not set it; None if that is not known."""
    if name in FIELDS:
        value = as_value(getattr(base, name))
    else:
        value = value_of(base.extra_args, {_flag(name), _SHORT.get(name, "")})
    return ENGINE_DEFAULTS.get(name) if value is None else value


def conditions(base: ServerConfig) -> Mapping[str, Any]:
    """Return those of a sweep's own settings that every trial rests on."""
    return base.model_dump(mode="json", include=set(FIELDS), exclude_none=True)


def digest(base: ServerConfig, asked: Iterable[tuple[str, Any]]) -> str:
    """Return what rows that may be compared have in common, in a few letters.

    Args:
        base: The settings that trials change.
        asked: What the results depend on besides.
    """
    text = json.dumps({"config": dict(conditions(base)), **dict(asked)}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _words(flag: str, value: Value, dialect: Dialect | None) -> tuple[str, ...]:
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
