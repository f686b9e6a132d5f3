"""`llama-server` out of the `xllamacpp` wheel: the same flags, log and exit codes.

Run as a program. The wheel holds llama.cpp's own HTTP server, but takes a parameter object where
llama-server takes a command line; `embedded.options` says which option sets what. `--help` prints
the layout of llama-server, and answers without loading the wheel.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_HELP = """\
usage: llama-server [options]

llama.cpp's server, run by the xllamacpp wheel. Each option does what it does in llama-server:
https://github.com/ggml-org/llama.cpp/tree/master/tools/server

{options}"""
_ROWS = Path(__file__).with_suffix(".options").read_text(encoding="utf-8").splitlines()
# What --help shows of an option, and what it sets.
OPTIONS = dict(row.split("  ") for row in _ROWS if row.startswith("-"))
# Words of the command line that the wheel's enumerations spell differently.
_MEMBERS = {"on": "enabled", "off": "disabled", "dio": "direct_io"}


def set_option(params: Any, target: str, value: str | bool) -> None:
    """Set what an option sets, a row's second part, to its value."""
    if target.startswith("@"):
        _FUNCTIONS[target](params, str(value))
        return
    for path, _, fixed in (word.partition("=") for word in target.split()):
        _set(params, path, fixed or value)


def _set(params: Any, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    owner = reduce(getattr, parents, params)
    kind = type(getattr(owner, name))
    if kind is bool:
        value = (value in {True, "on"}) is not name.startswith("no_")
    elif kind in {list, set}:
        value = kind(_items(value))
    elif hasattr(kind, "__members__"):
        member = _MEMBERS.get(value) or re.sub(r"\W", "_", value)
        value = kind[f"{kind.__name__}_{member}".upper()]
    else:
        value = kind(value)
    setattr(owner, name, value)
    if parents == ["sampling"]:
        # Marked as the user's, it wins over what the model's file recommends.
        marks = import_module("xllamacpp").common_params_sampling_config
        mark = getattr(marks, f"COMMON_PARAMS_SAMPLING_CONFIG_{name.upper()}", 0)
        params.sampling.user_sampling_config |= mark


def _items(value: str) -> list[str]:
    return [item.strip() for item in value.split(",") if item.strip()]


def _folder(value: str) -> str:
    if not Path(value).is_dir():
        raise ValueError(f"not a directory: {value}")
    return f"{value.rstrip('/')}/"


def _context(params: Any, value: str) -> None:
    params.n_ctx = int(value)
    if params.n_ctx == 0:
        params.fit_params_min_ctx = -1  # an explicit 0 asks for all, so it must not be shrunk


def _tensor_split(params: Any, value: str) -> None:
    shares = [float(share) for share in re.split("[,/]", value)]
    params.tensor_split = shares + [0.0] * (len(params.tensor_split) - len(shares))


def _lora(params: Any, value: str) -> None:
    for path in _items(value):
        adapter = import_module("xllamacpp").CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, 1.0
        params.lora_adapters = [*params.lora_adapters, adapter]


def _template_values(params: Any, value: str) -> None:
    values = {name: json.dumps(item) for name, item in json.loads(value).items()}
    params.default_template_kwargs = {**params.default_template_kwargs, **values}


def _reasoning(params: Any, value: str) -> None:
    params.enable_reasoning = {"on": 1, "off": 0, "auto": -1}[value]
    if value != "auto":
        _template_values(params, json.dumps({"enable_thinking": value == "on"}))


def _gpu_layers(params: Any, value: str) -> None:
    params.n_gpu_layers = {"auto": -1, "all": -2}.get(value) or int(value)


def _chat_template(params: Any, value: str) -> None:
    params.chat_template = Path(value).read_text(encoding="utf-8")


_FUNCTIONS: dict[str, Callable[[Any, str], None]] = {
    "@chat_template_file": _chat_template,
    "@chat_template_kwargs": _template_values,
    "@context": _context,
    "@gpu_layers": _gpu_layers,
    "@lora": _lora,
    "@media_path": lambda params, value: _set(params, "media_path", _folder(value)),
    "@reasoning": _reasoning,
    "@rope_scale": lambda params, value: _set(params, "rope_freq_scale", 1 / float(value)),
    "@seed": lambda params, value: _set(params, "sampling.seed", int(value) % 2**32),
    "@slot_save_path": lambda params, value: _set(params, "slot_save_path", _folder(value)),
    "@tensor_split": _tensor_split,
}


def read_arguments(words: Sequence[str]) -> Iterator[tuple[str, str | bool, str]]:
    """Yield each flag of a command line, its value (a bool for a switch) and what it sets.

    Raises:
        SystemExit: At what llama-server would refuse, with its message.
    """
    by_flag = {
        name.partition(" ")[0]: (head.rpartition(", ")[2].partition(" ")[2], target)
        for head, target in OPTIONS.items()
        for name in head.split(", ")
    }
    rest = iter(words)
    for word in rest:
        flag = word.replace("_", "-") if word.startswith("--") else word
        if flag not in by_flag:
            sys.exit(f"error: invalid argument: {flag}")
        metavar, target = by_flag[flag]
        if not metavar:
            yield flag, not flag.startswith(("--no-", "-no", "-nk")), target
            continue
        value = next(rest, None)
        if value is None:
            _refuse(flag, "expected value for argument")
        choices = re.split(r"[|,]", metavar[1:-1]) if metavar[0] in "[{" else [value]
        if value not in choices:
            _refuse(flag, f"{value!r} is not one of {', '.join(choices)}")
        yield flag, value, target


def _refuse(flag: str, reason: object) -> NoReturn:
    sys.exit(f'error while handling argument "{flag}": {reason}')


def help_text() -> str:
    """The output of `--help`: every option, laid out as llama-server does."""
    heads = ("-h, --help, --usage", "--version", "--list-devices", *OPTIONS)
    aligned = (re.sub(r"^-\w+, ", lambda short: f"{short[0]:<7}", head) for head in heads)
    return _HELP.format(options="\n".join(aligned))


def version_text() -> str:
    """The output of `--version`; the wheel's last number is llama.cpp's build."""
    wheel = import_module("importlib.metadata").version("xllamacpp")
    return f"version: {wheel.rpartition('.')[2]} (xllamacpp {wheel})"


def devices_text() -> str:
    """Return what `--list-devices` prints: all but the processor."""
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
    """Be llama-server, until a signal ends it or the model does not load."""
    if {"-h", "--help", "--usage"} & set(words):
        print(help_text())
        return
    if "--version" in words:
        print(version_text())
        return
    if "--list-devices" in words:
        print(devices_text())
        return
    # Loading keeps the interpreter busy: only a signal's default action can end it then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    given = list(read_arguments(words))
    try:
        xllamacpp = import_module("xllamacpp")
    except ImportError as error:
        sys.exit(f"error: the xllamacpp wheel cannot be loaded: {error}")
    params = xllamacpp.CommonParams()
    params.port, params.n_parallel = 8080, -1  # llama-server's defaults; -1 is automatic
    # As llama-server does, so that the key need not stand on a command line that all can read.
    params.api_keys = _items(os.environ.get("LLAMA_API_KEY", ""))
    for flag, value, target in given:
        try:
            set_option(params, target, value)
        except (ValueError, TypeError, ArithmeticError, AttributeError, OSError) as error:
            _refuse(flag, error)
    try:
        _server = xllamacpp.Server(params)  # returns when the model is loaded
    except RuntimeError:
        sys.exit("error: the server could not start; the lines above say why")
    _wait_for_signal()
    # Not by the destructor: it waits for requests under way, half a minute for a long answer.
    sys.stdout.flush()
    os._exit(0)


def _wait_for_signal() -> None:
    # A pipe, because the system may hand the signal to any of the server's threads.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.read(reader, 1)


if __name__ == "__main__":
    main(sys.argv[1:])
