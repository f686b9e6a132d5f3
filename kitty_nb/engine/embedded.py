"""`llama-server` out of the `xllamacpp` wheel: the same flags, log and exit codes.

Run as a program. The wheel holds llama.cpp's own HTTP server, but takes a parameter object where
llama-server takes a command line; `embedded_options.py` knows which option sets what. `--help`
prints the layout of llama-server, and answers without loading the wheel.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from kitty_nb.engine.embedded_options import (
    OPTIONS,
    close_to_pages,
    items,
    read_arguments,
    refuse,
    set_option,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_HELP = """\
usage: llama-server [options]

llama.cpp's server, run by the xllamacpp wheel. Each option does what it does in llama-server:
https://github.com/ggml-org/llama.cpp/tree/master/tools/server

{options}

verbosity:
 - 3: info
 - 4: trace (more info)
"""
# What a value that an option cannot take ends in.
_REFUSED = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, OSError)


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
