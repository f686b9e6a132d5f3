"""Exports of profiles for programs that run llama-server without kitty_nb; never with secrets."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kitty_nb.config import env_settings, goes_without_key
from kitty_nb.config.flags import takes_secret
from kitty_nb.engine.command_line import (
    REUSE_PORT,
    SERVER_SETTINGS,
    build_command,
    portable_arguments,
    split_options,
)
from kitty_nb.engine.locate import PASSES_KEY
from kitty_nb.errors import KittyError
from kitty_nb.formats import Format

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Engine

    Writer = Callable[[Sequence["_Served"], str, list[str]], str]

IMAGE = "ghcr.io/ggml-org/llama.cpp:server"
_NO_LIMIT = 1_000_000
_HOME = "https://github.com/ggml-org/llama.cpp/blob/master"
_PLAIN = re.compile(r"[\w@:,./=+-]+", re.ASCII)
# Fields that any format can express, or that mean nothing outside kitty_nb: where to look for
# models, how to watch a load. Only kitty_nb starts workers on other machines.
_HELD = {
    *SERVER_SETTINGS, "model", "alias", "host", "port", "api_key", "idle_shutdown_seconds",
    "binary", "models_dir", "allow_absolute_paths", "other_stores", "history", "log_dir",
    "health_max_attempts", "stall_seconds", "on_kernel_exit", "models", "router_memory_gb",
} - {"rpc_hosts"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Exported:
    """A file for another program.

    Attributes:
        text: Its content.
        notes: What it can't express, in sentences.
    """

    text: str
    notes: tuple[str, ...]


def export(
    form: Format,
    configs: Sequence[ServerConfig],
    engine: Engine | None = None,
    image: str = IMAGE,
    models: Mapping[str, Sequence[str]] | None = None,
) -> Exported:
    """Write profiles in a format.

    Args:
        form: The format.
        configs: The settings of each profile, as `resolve_model` returns them.
        engine: The engine, if `form.runs_here`.
        image: The container image with a llama-server, for quadlet and compose.
        models: The models of the server behind each profile with a URL.

    Raises:
        KittyError: The format takes only one profile or none of these, or the engine does not know
            a setting.
    """
    if len(configs) > 1 and form in {Format.SYSTEMD, Format.QUADLET}:
        raise KittyError(f"A {form} file holds one profile. Export them one by one.")
    write, held = _WRITERS[form]
    notes: list[str] = []
    served = []
    peers = {one.profile: one for one in configs if one.url}
    if form is not Format.LLAMA_SWAP:
        notes += [
            f"{name} uses the server at {one.url}, which a {form} file can't start, so it is left"
            " out. llama-swap can forward requests to it: kitty-nb export llama-swap"
            for name, one in peers.items()
        ]
        if len(peers) == len(configs):
            raise KittyError(" ".join(notes))
    for config in configs:
        if not config.url:
            served.append(_serve(form, config, engine, notes))
            notes += _not_held(form, config, _HELD | held)
    text = write(served, image, notes)
    if peers and form is Format.LLAMA_SWAP:
        text += _peers(peers, models or {}, notes)
    return Exported(text, tuple(dict.fromkeys(notes)))


def export_router(
    configs: Sequence[ServerConfig], engine: Engine, together: int, first_port: int
) -> Exported:
    """Write profiles for a llama-swap that kitty_nb supervises.

    Each server is named after its profile. The log contains the lines of all servers, but not
    llama-swap's own for each request.

    Args:
        configs: The settings of each profile.
        engine: The engine that serves them.
        together: How many of them fit into memory together. Unpinned ones share the remaining
            places, each of which has one model at a time.
        first_port: The port of the first server; the others have the next ones.
    """
    notes: list[str] = []
    served = [_serve(Format.LLAMA_SWAP, one, engine, notes) for one in configs]
    shares = (REUSE_PORT,) if engine.dialect.option(REUSE_PORT) else ()
    named = [
        replace(one, arguments=(*one.with_values({"--alias": one.name}), *shares)) for one in served
    ]
    settings = _swap_settings(named, notes) | {
        "logLevel": "warn",
        "logToStdout": "both",
        "startPort": first_port,
        "captureBuffer": 0,  # by default, it keeps questions and answers in memory
        "hooks": {"on_startup": {"preload": [one.name for one in served if one.config.pinned]}},
    }
    for model in settings["models"].values():
        model["concurrencyLimit"] = _NO_LIMIT  # by default, it refuses the eleventh request
    pinned = sum(one.config.pinned for one in served)
    others = [one.name for one in served if not one.config.pinned]
    for place in range(min(together - pinned, len(others))):
        members = others[place :: together - pinned]
        group = {"swap": True, "exclusive": False, "members": members}
        settings["groups"][f"place {place + 1}"] = group
    return Exported(_yaml(settings), tuple(dict.fromkeys(notes)))


def _serve(form: Format, config: ServerConfig, engine: Engine | None, notes: list[str]) -> _Served:
    if form.runs_here and engine:
        program = engine.command
        words = build_command(engine, config, supervised=False)[len(program) :]
    else:
        program, words = (), portable_arguments(config)
    kept: list[str] = []
    for option in split_options(words):
        if takes_secret(option[0]):
            key = f"LLAMACPP_{config.profile.upper()}_EXTRA_ARGS"
            notes.append(f"{option[0]} in {key} takes a secret and is left out: set it there.")
        else:
            kept += option
    return _Served(config, program, tuple(kept))


@dataclass(frozen=True, slots=True)
class _Served:
    """One profile: its settings, the engine's own words, and its arguments without secrets."""

    config: ServerConfig
    program: tuple[str, ...]
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.config.profile

    @property
    def asks_key(self) -> bool:
        return not goes_without_key(self.config)

    def with_values(self, values: Mapping[str, str]) -> tuple[str, ...]:
        """The arguments with other values of some flags."""
        pairs = pairwise(("", *self.arguments))
        return tuple(values.get(flag, word) for flag, word in pairs)


def _not_held(form: Format, config: ServerConfig, held: set[str]) -> list[str]:
    left = [
        f"LLAMACPP_{config.profile.upper()}_{setting.suffix}={getattr(config, name)}"
        for name, setting in env_settings().items()
        if name not in held
        and getattr(config, name) != type(config).model_fields[name].get_default()
    ]
    return [f"A {form} file can't express {', '.join(left)}."] if left else []


# llama-swap: https://github.com/mostlygeek/llama-swap/blob/main/config.example.yaml


class _Dumper(yaml.SafeDumper):
    """A dumper that shows text that ends a line verbatim."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Represent a text."""
        style = "|" if data.endswith("\n") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _yaml(data: object) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _llama_swap(served: Sequence[_Served], _image: str, notes: list[str]) -> str:
    head = (
        "# Profiles of kitty_nb for llama-swap: llama-swap --config FILE --listen 127.0.0.1:8080\n"
        "# It runs one model at a time; groups and a matrix let several run together.\n"
    )
    notes += [
        f"{one.name}: to open llama-swap to the network, start it with -listen."
        for one in served
        if one.config.host != "127.0.0.1"
    ]
    if any(one.asks_key for one in served):
        notes.append(
            f"llama-swap (v{PASSES_KEY} or later) and its servers require the key in"
            " LLAMA_API_KEY: set it first."
        )
    return head + _yaml(_swap_settings(served, notes))


def _swap_settings(served: Sequence[_Served], notes: list[str]) -> dict[str, Any]:
    models: dict[str, Any] = {}
    for one in served:
        options = split_options(one.with_values({"--host": "127.0.0.1", "--port": "${PORT}"}))
        lines = (one.program, *(each for each in options if each[0] != "--sleep-idle-seconds"))
        aliases = _aliases(one, served, notes)
        models[one.name] = {
            "cmd": "".join(f"{' '.join(map(_swap_word, line))}\n" for line in lines),
            "proxy": "http://127.0.0.1:${PORT}",  # by default, any listener on ::1 comes first
            **({"aliases": aliases} if aliases else {}),
            "ttl": one.config.idle_shutdown_seconds or 0,
            "unloadTimeout": max(1, round(one.config.stop_grace_seconds)),
        }
    keys = {"apiKeys": ["${env.LLAMA_API_KEY}"]} if any(one.asks_key for one in served) else {}
    pinned = [one.name for one in served if one.config.pinned]
    group = {"persistent": True, "swap": False, "exclusive": False, "members": pinned}
    groups = {"pinned": group} if pinned else {}
    # Large models take longer than the two minutes after which llama-swap gives up.
    return {"healthCheckTimeout": 1800, **keys, "models": models, "groups": groups}


def _peers(
    configs: Mapping[str, ServerConfig], models: Mapping[str, Sequence[str]], notes: list[str]
) -> str:
    """Write the servers at a URL, to which llama-swap forwards requests."""
    peers: dict[str, Any] = {}
    for name, config in configs.items():
        peers[name] = {"proxy": config.url, "models": [*models.get(name, ())]}
        if config.api_key and not goes_without_key(config):
            variable = f"{name.upper()}_API_KEY"
            peers[name]["apiKey"] = f"${{env.{variable}}}"
            notes.append(f"llama-swap sends {config.url} the key in {variable}: set it first.")
    return _yaml({"peers": peers})


def _swap_word(word: str) -> str:
    """Quote a word; split in two what llama-swap would take for a macro."""
    return word if word == "${PORT}" else shlex.quote(word).replace("${", "$''{")


def _aliases(one: _Served, served: Sequence[_Served], notes: list[str]) -> list[str]:
    """Return the name that clients use, unless another profile has it, too."""
    alias = one.config.served_alias
    taken = Counter(other.config.served_alias for other in served)
    taken.update(other.name for other in served)
    if taken[alias] == 1:
        return [alias]
    if alias != one.name:
        notes.append(f"{one.name}: {alias} names another profile, too; ask for {one.name}.")
    return []


# llama-server's router: _HOME/tools/server/README.md#model-presets


def _router(served: Sequence[_Served], _image: str, notes: list[str]) -> str:
    sections = ["; Profiles of kitty_nb: llama-server --models-preset FILE\nversion = 1\n"]
    for one in served:
        if why_not := _why_no_preset("model", [str(one.config.model)], set()):
            # Without its model, a router would wait for the load forever.
            notes.append(f"{one.name} is left out: {why_not}, and {one.config.model} has one.")
            continue
        lines = [f"[{one.name}]"]
        aliases = _aliases(one, served, notes)
        keys: set[str] = set()
        for flag, *values in split_options(one.arguments):
            key, value = flag.lstrip("-"), " ".join(values) if values else "true"
            if key == "alias":
                value = ",".join(aliases)
            if why_not := _why_no_preset(key, values, keys):
                notes.append(f"{one.name}: {shlex.join((flag, *values))} is left out: {why_not}.")
            elif value:
                lines.append(f"{key} = {value}")
                keys.add(key)
        lines += ["load-on-startup = true"] if one.config.pinned else []
        sections.append("\n".join(lines) + "\n")
    if any(one.asks_key for one in served):
        notes.append("The router requires the key in LLAMA_API_KEY: set it first.")
    return "\n".join(sections)


def _why_no_preset(key: str, values: Sequence[str], keys: set[str]) -> str:
    if key in keys:
        return "presets can have each option only once"
    if len(values) > 1:
        return "presets can have only one value per option"
    if re.search(r"[;#\r\n]", "".join(values)):
        return "in presets, ';' and '#' begin a comment"
    return ""


# systemd: systemd.service(5); podman-systemd.unit(5)


def _systemd(served: Sequence[_Served], _image: str, notes: list[str]) -> str:
    (one,) = served
    return _unit_file(
        one,
        f"# ~/.config/systemd/user/{_unit(one)}.service",
        f"# systemctl --user daemon-reload && systemctl --user enable --now {_unit(one)}",
        "# To keep it running while you are logged out: loginctl enable-linger",
        body=(
            "[Service]",
            "Type=exec",
            f"ExecStart={' '.join(map(_unit_word, (*one.program, *one.arguments)))}",
            *_key_file(one, notes),
        ),
    )


def _quadlet(served: Sequence[_Served], image: str, notes: list[str]) -> str:
    (one,) = served
    _note_image(image, notes)
    return _unit_file(
        one,
        f"# ~/.config/containers/systemd/{_unit(one)}.container",
        f"# systemctl --user daemon-reload && systemctl --user start {_unit(one)}",
        body=(
            "[Container]",
            f"Image={image}",
            f"Exec={' '.join(map(_unit_word, one.with_values({'--host': '0.0.0.0'})))}",
            f"PublishPort={_published(one.config)}",
            *(f"Volume={_unit_word(f'{folder}:{folder}:ro')}" for folder in _folders(one)),
            *_key_file(one, notes),
            "",
            "[Service]",
        ),
    )


def _unit(one: _Served) -> str:
    return f"llama-{one.name}"


def _unit_file(one: _Served, *head: str, body: Iterable[str]) -> str:
    config = one.config
    tries = config.restart_max + 1
    # Longer than all the tries take, so that systemd gives up on a server that never starts.
    window = round(tries * config.restart_delay_max_seconds + config.restart_stable_seconds)
    lines = (
        *head,
        "[Unit]",
        f"Description=llama-server, profile {one.name} of kitty_nb",
        f"StartLimitIntervalSec={window}",
        f"StartLimitBurst={tries}",
        "",
        *body,
        f"Restart={'on-failure' if config.restart_max else 'no'}",
        f"RestartSec={config.restart_delay_seconds:g}",
        f"TimeoutStopSec={config.stop_grace_seconds:g}",
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
    )
    return "\n".join(lines)


def _key_file(one: _Served, notes: list[str]) -> tuple[str, ...]:
    if not one.asks_key:
        return ()
    notes.append(f"{one.name}: write LLAMA_API_KEY=… into ~/.config/{_unit(one)}.env, chmod 600.")
    return (
        "# LLAMA_API_KEY=…, the key that clients must send; only you may read the file.",
        f"EnvironmentFile=%h/.config/{_unit(one)}.env",
    )


def _unit_word(word: str) -> str:
    """Quote a word for systemd, which expands % and $ inside quotes, too."""
    text = word.replace("%", "%%").replace("$", "$$")
    if _PLAIN.fullmatch(word):
        return text
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(letter, letter) for letter in text) + '"'


# Containers: https://github.com/compose-spec/compose-spec


def _compose(served: Sequence[_Served], image: str, notes: list[str]) -> str:
    services = {}
    for one in served:
        config = one.config
        arguments = one.with_values({"--host": "0.0.0.0"})
        services[one.name] = {
            "image": image,
            "command": [word.replace("$", "$$") for word in arguments],
            "ports": [_published(config)],
            "volumes": [
                {"type": "bind", "source": folder, "target": folder, "read_only": True}
                for folder in (str(path).replace("$", "$$") for path in _folders(one))
            ],
            **({"env_file": [f"{_unit(one)}.env"]} if one.asks_key else {}),
            "restart": f"on-failure:{config.restart_max}" if config.restart_max else "no",
            "stop_grace_period": f"{round(config.stop_grace_seconds * 1000)}ms",
        }
        if one.asks_key:
            notes.append(f"{one.name}: write LLAMA_API_KEY=… into {_unit(one)}.env beside it.")
    _note_image(image, notes)
    head = (
        "# Profiles of kitty_nb for containers: docker compose up\n"
        "# NAME.env holds LLAMA_API_KEY=…, the key that clients must send; only you may read it.\n"
    )
    return head + _yaml({"services": services})


def _published(config: ServerConfig) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    host = host.replace("localhost", "127.0.0.1")  # a name is not accepted
    return f"{host}:{config.port}:{config.port}"


def _folders(one: _Served) -> list[Path]:
    """Return the folders of all files that arguments name, and of the files behind links."""
    paths = [path for path in map(Path, one.arguments) if path.is_absolute() and path.is_file()]
    return list(
        dict.fromkeys(folder for path in paths for folder in (path.parent, path.resolve().parent))
    )


def _note_image(image: str, notes: list[str]) -> None:
    if image == IMAGE:
        notes.append(f"{IMAGE} computes on the CPU. For a GPU, see {_HOME}/docs/docker.md.")


_UNIT = {"restart_max", "restart_delay_seconds", "restart_stable_seconds", "stop_grace_seconds"}
# The writer of each format, and the other fields that it can express.
_WRITERS: dict[Format, tuple[Writer, set[str]]] = {
    Format.LLAMA_SWAP: (_llama_swap, {"stop_grace_seconds", "pinned"}),
    Format.ROUTER: (_router, {"pinned"}),
    Format.SYSTEMD: (_systemd, _UNIT),
    Format.QUADLET: (_quadlet, _UNIT),
    Format.COMPOSE: (_compose, {"restart_max", "stop_grace_seconds"}),
}
