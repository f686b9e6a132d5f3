"""`llama-server` from the `xllamacpp` wheel: the same flags, log and exit codes.

Run as a program. The wheel contains llama.cpp's own HTTP server, but takes a parameter object
instead of a command line; `embedded.options` says which option sets what. `--help` prints
llama-server's layout, and answers without loading the wheel.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

TABLE = Path(__file__).with_name("embedded.options").read_text(encoding="utf-8").splitlines()
# Each option as --help shows it, and what it sets, if its name does not tell.
OPTIONS = dict(row.partition("  ")[::2] for row in TABLE if row.startswith("-"))
_CHOICES = re.compile(r"[\[<](\S+\|\S+)[\]>]|\{(.+)\}")
_LOOKS, _LOOK_AFTER = 20, 0.05  # at the log of a start that failed; the latter in seconds
_OFF = ("--no-", "-no", "-nk", "-nr")
# Words of the command line that the wheel's enumerations spell differently.
_MEMBERS = {"on": "enabled", "off": "disabled", "dio": "direct_io"}
_CPUS = 512  # ggml's GGML_MAX_N_THREADS
_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
_SAMPLERS = {
    "d": "dry", "k": "top_k", "y": "typ_p", "p": "top_p", "s": "top_n_sigma", "m": "min_p",
    "t": "temperature", "x": "xtc", "i": "infill", "e": "penalties", "a": "adaptive_p",
}  # fmt: skip
# Prefixes of an option's name in the path of the attribute that it sets.
_BEFORE = ("", "n_", "no_", "use_", "endpoint_", "sampling_")


class _Row(NamedTuple):
    """A row of the table: the option's names, the form of its value, and what it sets."""

    names: tuple[str, ...]
    metavar: str
    target: str


def _rows() -> Iterator[tuple[str, _Row]]:
    for head, target in OPTIONS.items():
        *names, last = head.split(", ")
        name, _, metavar = last.partition(" ")
        row = _Row((*names, name), metavar, target)
        yield from dict.fromkeys(row.names, row).items()


_BY_FLAG = dict(_rows())


def attribute_of(params: Any, names: Iterable[str]) -> str | None:
    """Return the path of the attribute that has an option's name, or None."""
    paths = {path.replace(".", "_"): path for path in _paths(params)}
    for name in names:
        word = re.sub("^--(?:no-)?", "", name).replace("-", "_").replace("spec_", "speculative_")
        if found := next(filter(None, (paths.get(before + word) for before in _BEFORE)), None):
            return found
    return None


def _paths(owner: Any, prefix: str = "") -> Iterator[str]:
    for name in dir(owner):
        if name.startswith("_") or callable(value := getattr(owner, name)):
            continue
        inner = type(value).__module__.startswith("xllamacpp") and not _is_enum(type(value))
        yield from _paths(value, f"{prefix}{name}.") if inner else (prefix + name,)


def _is_enum(kind: type) -> bool:
    return hasattr(kind, "__members__")


def set_option(params: Any, flag: str, value: str | bool) -> None:
    """Set the parameters that a flag of the table stands for to its value."""
    names, _, target = _BY_FLAG[flag]
    match target[:1]:
        case "@":
            globals()[f"_{target[1:]}"](params, str(value), flag)
        case "<":
            set_option(params, target[1:], Path(str(value)).read_text(encoding="utf-8"))
        case "-":
            set_option(params, *target.split("=", 1))
        case _:
            targets = target or attribute_of(params, names) or ""
            for path, _, fixed in (word.partition("=") for word in targets.split()):
                _set(params, path, fixed or value)


def _set(params: Any, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    owner = reduce(getattr, parents, params)
    kind = type(getattr(owner, name))
    if kind is bool:
        value = (value in {True, "on", "1"}) is not name.startswith("no_")
    elif kind in {list, set}:
        value = kind(items(value))
    elif _is_enum(kind):
        value = _member(kind, value)
    else:
        value = kind(value)
    setattr(owner, name, value)
    if parents == ["sampling"]:
        # Marked as the user's, the value overrides what the model's file recommends.
        marks = import_module("xllamacpp").common_params_sampling_config
        mark = getattr(marks, f"COMMON_PARAMS_SAMPLING_CONFIG_{name.upper()}", 0)
        params.sampling.user_sampling_config |= mark


def _member(kind: Any, value: str) -> Any:
    if value.lstrip("-").isdigit():
        return kind(int(value))
    word = _MEMBERS.get(value) or re.sub(r"\W", "_", value)
    return kind[f"{kind.__name__}_{word}".upper()]


def items(value: str) -> list[str]:
    """Split a list at its commas."""
    return [item.strip() for item in value.split(",") if item.strip()]


def _owner(params: Any, flag: str) -> Any:
    """Return the parameters that a flag is for: the draft model's or the model's own."""
    return params.speculative.draft if "draft" in _BY_FLAG[flag].names[-1] else params


def _cpu_mask(params: Any, value: str, flag: str) -> None:
    _let_run_on(params, flag, int(value, 16))


def _cpu_range(params: Any, value: str, flag: str) -> None:
    first, dash, last = value.partition("-")
    if not dash:
        raise ValueError("expected the first and the last processor, such as 0-3")
    cpus = range(int(first or 0), int(last or _CPUS - 1) + 1)
    _let_run_on(params, flag, sum(1 << cpu for cpu in cpus))


def _let_run_on(params: Any, flag: str, mask: int) -> None:
    owner = _owner(params, flag)
    cpus = owner.cpuparams_batch if "batch" in _BY_FLAG[flag].names[-1] else owner.cpuparams
    if mask >> _CPUS:
        raise ValueError(f"there are at most {_CPUS} processors")
    cpus.cpumask = [on or bool(mask >> i & 1) for i, on in enumerate(cpus.cpumask)]
    cpus.mask_valid = True


def _context(params: Any, value: str, _flag: str) -> None:
    params.n_ctx = int(value)
    if params.n_ctx == 0:
        params.fit_params_min_ctx = -1  # an explicit 0 asks for it all, so it must not shrink


def _agent(params: Any, _value: str, flag: str) -> None:
    params.ui_mcp_proxy = not flag.startswith(_OFF)
    params.server_tools = ["all"] if params.ui_mcp_proxy else []


def close_to_pages(params: Any) -> None:
    """Let only this machine's web pages use a server that has tools, unless others were given."""
    has_tools = params.server_tools or params.mcp_servers_config or params.mcp_servers_json
    if has_tools and not params.cors_origins_explicit:
        params.cors_origins = "localhost"


def _fit_target(params: Any, value: str, _flag: str) -> None:
    given, before = [int(mib) << 20 for mib in re.split("[,/]", value)], params.fit_params_target
    rest = given * len(before) if len(given) == 1 else before[len(given) :]
    params.fit_params_target = [*given, *rest][: len(before)]


def _tensor_split(params: Any, value: str, _flag: str) -> None:
    shares = [float(share) for share in re.split("[,/]", value)]
    params.tensor_split = shares + [0.0] * (len(params.tensor_split) - len(shares))


def _n_cpu_moe(params: Any, value: str, flag: str) -> None:
    rules = [f"blk\\.{i}{_EXPERTS}" for i in range(int(value))]
    _set(_owner(params, flag), "tensor_buft_overrides", ",".join(rules))


def _lora(params: Any, value: str, flag: str) -> None:
    for item in items(value):
        path, _, scale = item.rpartition(":") if flag == "--lora-scaled" else (item, "", "1")
        adapter = import_module("xllamacpp").CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, float(scale)
        params.lora_adapters = [*params.lora_adapters, adapter]


def _chat_template_kwargs(params: Any, value: str, _flag: str = "") -> None:
    values = {name: json.dumps(item) for name, item in json.loads(value).items()}
    params.default_template_kwargs = {**params.default_template_kwargs, **values}


def _reasoning(params: Any, value: str, _flag: str) -> None:
    params.enable_reasoning = {"on": 1, "off": 0, "auto": -1}[value]
    if value != "auto":
        _chat_template_kwargs(params, json.dumps({"enable_thinking": value == "on"}))


def _reasoning_effort(params: Any, value: str, _flag: str) -> None:
    if value != "default":
        _chat_template_kwargs(params, json.dumps({"reasoning_effort": value}))


def _gpu_layers(params: Any, value: str, flag: str) -> None:
    _owner(params, flag).n_gpu_layers = {"auto": -1, "all": -2}.get(value) or int(value)


def _json_schema(params: Any, value: str, _flag: str) -> None:
    grammar = params.sampling.grammar
    grammar.grammar = import_module("xllamacpp").json_schema_to_grammar(json.loads(value))
    _set(params, "sampling.grammar.type", "output_format")


def _api_key_file(params: Any, value: str, _flag: str) -> None:
    lines = Path(value).read_text(encoding="utf-8").splitlines()
    params.api_keys = [*params.api_keys, *(key for key in lines if key and key[0] != "#")]


def _sampler_letters(params: Any, value: str, _flag: str) -> None:
    _set(params, "sampling.samplers", ";".join(map(_SAMPLERS.__getitem__, value)))


def _spec_type(params: Any, value: str, _flag: str) -> None:
    kinds = import_module("xllamacpp").common_speculative_type
    params.speculative.types = [_member(kinds, name) for name in items(value)]


def _rope_scale(params: Any, value: str, _flag: str) -> None:
    params.rope_freq_scale = 1 / float(value)


def _seed(params: Any, value: str, _flag: str) -> None:
    _set(params, "sampling.seed", int(value) % 2**32)


def _folder(params: Any, value: str, flag: str) -> None:
    if not Path(value).is_dir():
        raise ValueError(f"not a directory: {value}")
    _set(params, attribute_of(params, [flag]) or "", f"{value.rstrip('/')}/")


def read_arguments(words: Sequence[str]) -> Iterator[tuple[str, str | bool]]:
    """Yield each flag of a command line, and its value (a bool for a switch).

    Raises:
        SystemExit: llama-server would reject an argument; the message is its own.
    """
    rest = iter(words)
    for word in rest:
        flag = word.replace("_", "-") if word.startswith("--") else word
        if flag not in _BY_FLAG:
            sys.exit(f"error: invalid argument: {flag}")
        metavar = _BY_FLAG[flag].metavar
        if not metavar:
            yield flag, not flag.startswith(_OFF)
            continue
        value = next(rest, None)
        if value is None:
            refuse(flag, "expected value for argument")
        listed = _CHOICES.fullmatch(metavar)
        choices = re.split(r"[|,]", listed[1] or listed[2]) if listed else [value]
        if value not in choices:
            refuse(flag, f"{value!r} is not one of {', '.join(choices)}")
        yield flag, value


def refuse(flag: str, reason: object) -> NoReturn:
    """Exit as llama-server does when it can't take a value."""
    sys.exit(f'error while handling argument "{flag}": {reason}')


_HELP = """\
usage: llama-server [options]

llama.cpp's server, run by the xllamacpp wheel. Each option does what it does in llama-server:
https://github.com/ggml-org/llama.cpp/tree/master/tools/server

{options}

verbosity:
 - 3: info
 - 4: trace (more info)
"""
# The errors that a value raises if its option can't take it.
_REFUSED = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, OSError)


def help_text() -> str:
    """Return the output of `--help`: every option, in llama-server's layout."""
    heads = ("-h, --help, --usage", "--version", "--list-devices", *OPTIONS)
    aligned = (re.sub(r"^-\w+, ", lambda short: f"{short[0]:<7}", head) for head in heads)
    return _HELP.format(options="\n".join(aligned))


def version_text() -> str:
    """Return the output of `--version`; the wheel's last number is llama.cpp's build."""
    wheel = import_module("importlib.metadata").version("xllamacpp")
    return f"version: {wheel.rpartition('.')[2]} (xllamacpp {wheel})"


def devices_text() -> str:
    """Return the output of `--list-devices`: all devices except the CPU."""
    xllamacpp = import_module("xllamacpp")
    mib = 1 << 20
    lines = [
        f"  {device['name']}: {device['description']} ({device['memory_total'] // mib} MiB,"
        f" {device['memory_free'] // mib} MiB free)"
        for device in xllamacpp.get_device_info()
        if device["type"] != xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    ]
    return "\n".join(["Available devices:", *(lines or ["  (none)"])])


def main(words: Sequence[str]) -> None:
    """Run as llama-server, until a signal ends it or the model fails to load."""
    if {"-h", "--help", "--usage"} & set(words):
        print(help_text())
        return
    if "--version" in words:
        print(version_text())
        return
    if "--list-devices" in words:
        print(devices_text())
        return
    # Loading blocks the interpreter: only a signal's default action can end it then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    given = list(read_arguments(words))
    try:
        xllamacpp = import_module("xllamacpp")
    except ImportError as error:
        sys.exit(f"error: the xllamacpp wheel cannot be loaded: {error}")
    params = xllamacpp.CommonParams()
    params.port, params.n_parallel = 8080, -1  # llama-server's defaults; -1 is automatic
    # As in llama-server, so that the key need not be on a command line that everyone can read.
    params.api_keys = items(os.environ.get("LLAMA_API_KEY", ""))
    for flag, value in given:
        try:
            set_option(params, flag, value)
        except _REFUSED as error:
            refuse(flag, error)
    close_to_pages(params)
    try:
        _server = xllamacpp.Server(params)  # returns when the model is loaded
    except RuntimeError:
        _await_log()
        sys.exit("error: the server could not start; the lines above say why")
    _wait_for_signal()
    # Not by the destructor: it waits for requests under way, half a minute for a long answer.
    sys.stdout.flush()
    os._exit(0)


def _await_log() -> None:
    """Wait until the log thread of the wheel has said why; an exit may be faster if all is busy."""
    written, pause = 0, threading.Event()
    for _ in range(_LOOKS):
        pause.wait(_LOOK_AFTER)
        before, written = written, os.fstat(sys.stderr.fileno()).st_size
        if written and written == before:
            return


def _wait_for_signal() -> None:
    # A pipe, because the system may deliver the signal to any of the server's threads.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.read(reader, 1)


if __name__ == "__main__":
    main(sys.argv[1:])
