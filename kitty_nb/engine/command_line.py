"""The command line for settings, in the engine's own spelling."""

from __future__ import annotations

import shlex
import tomllib
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitty_nb.config import (
    ServerConfig,
    Speculation,
    Task,
    env_settings,
    goes_without_key,
    task_by_flags,
)
from kitty_nb.config.flags import spelled, value_of
from kitty_nb.engine.rpc import with_workers
from kitty_nb.errors import ConfigError, EngineError, UnknownFlagError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kitty_nb.engine.locate import Dialect, Engine, Option


_DIALECTS = tomllib.loads(Path(__file__).with_name("dialects.toml").read_text(encoding="utf-8"))
_NAMES: dict[str, list[str]] = {name: names for names in _DIALECTS["names"] for name in names}
_INSTEAD: dict[str, list[str]] = _DIALECTS["instead"]
_LONGEST = 2
_SWITCHED = {"on", "off", "auto"}


def spell(dialect: Dialect, words: Sequence[str]) -> Iterator[str]:
    """Yield the words of a command line as this build spells them; unknown ones unchanged."""
    rest = list(words)
    while rest:
        taken, said = _spell_first(dialect, rest)
        yield from said
        del rest[:taken]


def options_of(config: ServerConfig) -> list[tuple[str, str]]:
    """Return the options that settings ask for: canonical flags and their values, in order."""
    asked = chain.from_iterable(words for _, words in _asked(config))
    options = split_options((*asked, *config.extra_args))
    return [
        (canonical(flag), values[0] if values else "") for flag, *values in options if is_flag(flag)
    ]


def _asked(config: ServerConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What settings but `extra_args` ask for, in llama.cpp's own spelling, each after its field."""
    for field, flag in _FLAGS.items():
        match getattr(config, field):
            case None:
                pass
            case bool(wanted):
                yield field, (flag if wanted else flag.replace("--", "--no-"),)
            case Speculation() as kind:
                yield field, (flag, _SPECULATION[kind])
            case value:
                yield field, (flag, str(value))
    if config.projector:
        yield "mmproj", (_MMPROJ, str(config.projector))
    if config.task is not Task.CHAT:
        if not task_by_flags(config.extra_args):
            yield "task", (_TASKS[config.task],)
        # With a cache for each slot, llama.cpp cuts texts of unequal lengths apart, and makes their
        # vectors from the last parts.
        yield "task", ("--kv-unified",)
    if config.drafter:
        yield "speculation", (_DRAFT, str(config.drafter))


def _own_words(config: ServerConfig) -> tuple[str, ...]:
    """The words that no `extra_args` may say."""
    return (
        *("--model", str(config.require_model()), "--alias", config.served_alias),
        *("--host", config.host, "--port", str(config.port)),
    )


def _if_known(config: ServerConfig) -> Iterator[tuple[str, str]]:
    """The options that a build may go without: sleep when idle, and a fence against web pages."""
    if config.idle_shutdown_seconds:
        yield _SLEEP, str(config.idle_shutdown_seconds)
    if goes_without_key(config) and not value_of(config.extra_args, {ORIGINS}):
        yield ORIGINS, "localhost"


def is_flag(word: str) -> bool:
    """Return whether a word is a flag rather than a value such as -1."""
    return word.startswith("-") and not word[1:2].isdigit() and word[1:2] != "."


def canonical(flag: str) -> str:
    """Return the one name under which kitty_nb knows a flag."""
    return _NAMES.get(spelled(flag), (spelled(flag),))[0]


def _spell_first(dialect: Dialect, words: Sequence[str]) -> tuple[int, Sequence[str]]:
    """Return how many words the first option is, and what to say for them."""
    flag, value = words[0], words[1] if words[1:] else "-"
    option = dialect.option(flag)
    if not is_flag(flag):
        return 1, (flag,)
    if option and option.values and "on" in option.choices and is_flag(value):
        return 1, (flag, "on")  # a switch in other builds
    if option and not option.values and value in _SWITCHED:
        return 2, (flag,) if value == "on" else ()  # with a value in other builds
    if option and (accepts(option, value) or f"{canonical(flag)} {value}" not in _INSTEAD):
        taken = 1 + option.values
        return taken, words[:taken]
    name = next(filter(dialect.option, _NAMES.get(spelled(flag), ())), None)
    if name and not option:
        return 1, (name,)
    said = [canonical(word) for word in words[:_LONGEST]]
    for taken in range(len(said), 0, -1):
        for instead in _INSTEAD.get(" ".join(said[:taken]), ()):
            if all(map(dialect.option, filter(is_flag, instead.split()))):
                return taken, instead.split()
    return 1, (flag,)


# Fields whose value follows a flag.
_FLAGS = {
    "context_size": "--ctx-size", "n_predict": "--n-predict", "temperature": "--temp",
    "top_p": "--top-p", "repeat_penalty": "--repeat-penalty", "n_gpu_layers": "--n-gpu-layers",
    "threads": "--threads", "batch_size": "--batch-size", "ubatch_size": "--ubatch-size",
    "parallel": "--parallel", "flash_attention": "--flash-attn", "tool_calling": "--jinja",
    "speculation": "--spec-type",
}  # fmt: skip
_ALWAYS = ("model", "host", "port", "alias", "api_key")
# The fields of `ServerConfig` that are for llama-server itself, rather than for its manager.
SERVER_SETTINGS = (*_FLAGS, "draft_model", "mmproj", "rpc_hosts", "extra_args")
# Of the kinds of n-grams, this one guesses at most 48 tokens: for 64 tokens and more, llama.cpp
# computes attention in another way, with slightly different results.
_SPECULATION = {
    Speculation.OFF: "none",
    Speculation.NGRAM: "ngram-simple",
    Speculation.DRAFT: "draft-simple",
}
_DRAFT = "--spec-draft-model"
_MMPROJ = "--mmproj"
_TASKS = {Task.EMBED: "--embedding", Task.RANK: "--rerank"}
REUSE_PORT = "--reuse-port"
ORIGINS = "--cors-origins"
_SLEEP = "--sleep-idle-seconds"
_KEEP = "--slot-save-path"
_CACHE, _RPC = "--cache-ram", "--rpc"
_PRESETS = "--models-preset"
# Flags that the manager sets itself, with the fields that they come from.
_OWNED = {f"--{name.replace('_', '-')}": name for name in _ALWAYS}
# Fields by the canonical name of their flag, to read a command line.
_FIELDS = {canonical(flag): field for field, flag in _FLAGS.items()} | {
    canonical(f"--{name}"): name for name in ("model", "host", "port", "alias")
} | {
    _SLEEP: "idle_shutdown_seconds", "--no-jinja": "tool_calling", _DRAFT: "draft_model",
    _MMPROJ: "mmproj", "--no-mmproj": "mmproj",
}  # fmt: skip
# If no value follows.
_BARE = {"--jinja": "on", "--no-jinja": "off", "--flash-attn": "on", "--no-mmproj": "off"}
_KINDS = {word: kind for kind, word in _SPECULATION.items()}
_ALL_LAYERS = 999
# Flags that change the server's protocol in ways that the manager does not support.
UNSPOKEN_FLAGS = ("--api-prefix", "--ssl-key-file", "--ssl-cert-file")


def build_command(
    engine: Engine, config: ServerConfig, prompts: Path | None = None, *, supervised: bool = True
) -> tuple[str, ...]:
    """Return the arguments that start `engine` with the settings of `config`.

    Settings that are `None` are left out, so that the engine's own defaults apply. `extra_args`
    come last, in this build's spelling: if a flag is given twice, llama-server takes the last. The
    contents of slots are saved in the folder `prompts`; `supervised` makes the log more detailed.

    Raises:
        UnknownFlagError: This build lacks the flag of a setting, or one in `extra_args`.
        EngineError: `extra_args` contains a flag that the manager sets.
        ConfigError: No model is chosen.
    """
    return (
        *with_workers(config, engine.command),
        *_own_words(config),
        *_said(engine, config),
        *_for_workers(engine, config),
        *chain.from_iterable(pair for pair in _if_known(config) if engine.dialect.option(pair[0])),
        *((_KEEP, str(prompts)) if prompts else ()),
        *(_for_our_eyes(engine) if supervised else ()),
        *_checked(engine, config),
    )


def has_router(engine: Engine) -> bool:
    """Return whether this build of llama-server has a router."""
    return engine.dialect.option(_PRESETS) is not None


def build_router_command(
    engine: Engine, config: ServerConfig, presets: Path, most: int
) -> tuple[str, ...]:
    """Return the arguments that start `engine` as a router.

    Its models are in the file `presets`; at most `most` of them are loaded at once.

    Raises:
        UnknownFlagError: This build lacks a flag in `extra_args`.
    """
    open_page = goes_without_key(config) and engine.dialect.option(ORIGINS)
    return (
        *(*engine.command, "--host", config.host, "--port", str(config.port)),
        *(_PRESETS, str(presets), "--models-max", str(most)),
        *((ORIGINS, "localhost") if open_page else ()),
        *_checked(engine, config),
    )


def portable_arguments(config: ServerConfig) -> tuple[str, ...]:
    """Return the arguments for a current llama-server that is not on this machine.

    Raises:
        ConfigError: No model is chosen.
    """
    asked = (*(words for _, words in _asked(config)), *_if_known(config))
    return (*_own_words(config), *chain.from_iterable(asked), *config.extra_args)


def split_options(words: Iterable[str]) -> list[tuple[str, ...]]:
    """Split arguments into options, each a flag and the words up to the next flag."""
    options: list[list[str]] = []
    for word in words:
        if is_flag(word) or not options:
            options.append([])
        options[-1].append(word)
    return [tuple(option) for option in options]


def read_arguments(words: Iterable[str]) -> dict[str, Any]:
    """Return the settings that arguments of llama-server ask for, the inverse of `build_command`.

    Arguments without a setting are left in `extra_args`. If a flag is given twice, the last counts.
    """
    found: dict[str, Any] = {}
    others: list[str] = []
    for flag, *values in split_options(words):
        field = _FIELDS.get(canonical(flag))
        value: object = values[0] if values else _BARE.get(canonical(flag), "")
        if field == "n_gpu_layers" and value == "all":
            value = _ALL_LAYERS
        elif field == "speculation":
            value = _KINDS.get(str(value), value)
        # An extra word, such as a file after a switch, is left for llama-server to judge.
        if field and len(values) <= 1 and _is_valid(field, value):
            found[field] = value
        else:
            others += (flag, *values)
    return found | {"extra_args": tuple(others)}


def _is_valid(field: str, value: object) -> bool:
    try:
        ServerConfig().replace(**{field: value})
    except ConfigError:
        return False
    return True


def sleeps(command: Sequence[str]) -> bool:
    """Return whether a server started this way unloads an idle model; a negative time is off."""
    return not (value_of(command, {_SLEEP}) or "-").startswith("-")


def keeps_prompts(engine: Engine, config: ServerConfig) -> bool:
    """Return whether a server's prompts are kept: the build can, and the model is for chat."""
    theirs = value_of(config.extra_args, {_KEEP}) is not None
    whole = not config.rpc_hosts  # the part of a prompt on other machines can't be saved
    answers = config.models is None and config.task is Task.CHAT
    wanted = config.keep_prompts and answers and whole and not theirs
    return wanted and engine.dialect.option(_KEEP) is not None


def leaves_out_projector(engine: Engine, config: ServerConfig) -> bool:
    """Return whether a model goes without its projector because this build supports none."""
    return config.projector is not None and not engine.dialect.option(_MMPROJ)


def open_to_pages(engine: Engine, config: ServerConfig) -> bool:
    """Return whether any web page can use the server: it has no key, and can't check origins."""
    return goes_without_key(config) and not engine.dialect.option(ORIGINS)


def _said(engine: Engine, config: ServerConfig) -> Iterator[str]:
    """What settings ask for, as this build spells it."""
    for field, asked in _asked(config):
        said = tuple(spell(engine.dialect, asked))
        if _understands(engine.dialect, said):
            yield from said
        elif field != "task" and (field != "mmproj" or config.mmproj is not None):
            named = " ".join(asked) if engine.dialect.option(asked[0]) else asked[0]
            raise UnknownFlagError(
                f"This build of llama-server ({engine.version}) has no {named}, which"
                f" {_key(field)} needs. Leave {_key(field)} empty, or update llama.cpp."
            )


def _for_our_eyes(engine: Engine) -> Iterator[str]:
    if engine.dialect.option("--log-jsonl"):
        yield "--log-jsonl"
    if engine.dialect.traces:  # the log has each prompt's length before it is processed
        yield from ("--verbosity", "4")


def _for_workers(engine: Engine, config: ServerConfig) -> Iterator[str]:
    key = _key("rpc_hosts")
    if not config.rpc_hosts:
        return
    if not engine.dialect.option(_RPC):
        raise UnknownFlagError(
            f"The {engine.kind} engine ({engine.version}) has no {_RPC}, which {key} needs. Set"
            f" LLAMACPP_BIN to a llama-server that is built with RPC, or leave {key} empty."
        )
    if value_of(config.extra_args, {_RPC}):
        raise EngineError(
            f"{_key('extra_args')} has {_RPC}, and {key} is set. Choose one: {key} starts the"
            f" workers itself, {_RPC} names ones that run already."
        )
    if engine.dialect.option(_CACHE) and not value_of(config.extra_args, {_CACHE}):
        yield from (_CACHE, "0")  # llama-server aborts when it saves a prompt of other machines


def _understands(dialect: Dialect, words: Sequence[str]) -> bool:
    """Return whether a build knows all flags, and their values if it lists any."""
    return all(
        (option := dialect.option(flag)) and accepts(option, value)
        for flag, value in pairwise((*words, ""))
        if is_flag(flag)
    )


def accepts(option: Option, value: str) -> bool:
    """Return whether an option accepts a value, as far as the build lists its values."""
    return not option.choices or set(value.split(",")) <= set(option.choices)


def _checked(engine: Engine, config: ServerConfig) -> Iterator[str]:
    """Yield the words of `extra_args` as this build spells them, rejecting what can't work."""
    values = 0
    for word in spell(engine.dialect, config.extra_args):
        yield word
        if values:
            values -= 1
        elif is_flag(word):
            values = _checked_flag(engine, word, config.profile).values


def _checked_flag(engine: Engine, word: str, profile: str) -> Option:
    key = _key("extra_args")
    flag, equals, _ = word.partition("=")
    option = engine.dialect.option(flag)
    if option is None:
        nearest = engine.dialect.nearest(flag)
        lists = f"`{shlex.join((*engine.command, '--help'))}` lists its flags."
        advice = f"Did you mean {nearest}?" if nearest else lists
        raise UnknownFlagError(
            f"{key} has {flag}, which this build of llama-server ({engine.version}) does not"
            f" know. {advice}"
        )
    for owned in option.flags:
        if owned in _OWNED:
            instead = _key(_OWNED[owned], f"{profile.upper()}_")  # others keep theirs
            raise EngineError(f"{key} has {flag}: set {instead} instead.")
        if owned in UNSPOKEN_FLAGS:
            raise EngineError(
                f"{key} has {flag}, but kitty_nb supports only plain HTTP without a prefix. Leave"
                " it out, and let a reverse proxy add the prefix or TLS."
            )
    if equals:
        raise UnknownFlagError(
            f"{key} has {flag}=…: llama-server does not accept '='. Use a space instead."
        )
    return option


def _key(field: str, of_profile: str = "") -> str:
    return f"LLAMACPP_{of_profile}{env_settings()[field].suffix}"
