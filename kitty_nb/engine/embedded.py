"""`llama-server` out of the `xllamacpp` wheel: the same flags, log and exit codes.

Run as a program. The wheel holds llama.cpp's own HTTP server, but takes a parameter object where
llama-server takes a command line; `OPTIONS` translates. `--help` prints the layout of
llama-server, and answers without loading the wheel.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from functools import reduce
from importlib import import_module
from operator import not_
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Setter = Callable[[Any, Any], None]

_HELP = """\
usage: llama-server [options]

llama.cpp's server, run by the xllamacpp wheel. Each option does what it does in llama-server:
https://github.com/ggml-org/llama.cpp/tree/master/tools/server

{options}"""


def _to(paths: str, read: Callable[[Any], Any] = lambda value: value) -> Setter:
    """Set attributes, named by their paths from the parameters, to the value as `read`."""

    def apply(params: Any, value: Any) -> None:
        for path in paths.split():
            *parents, name = path.split(".")
            setattr(reduce(getattr, parents, params), name, read(value))
            if parents == ["sampling"]:
                # Marked as the user's, it wins over what the model's file recommends.
                marks = import_module("xllamacpp").common_params_sampling_config
                mark = getattr(marks, f"COMMON_PARAMS_SAMPLING_CONFIG_{name.upper()}", 0)
                params.sampling.user_sampling_config |= mark

    return apply


def _enum(path: str, kind: str, **renamed: str) -> Setter:
    """Set an attribute to a member of one of the wheel's enumerations."""

    def read(value: object) -> Any:
        word = str(value).lower()
        member = renamed.get(word) or re.sub(r"\W", "_", word)
        return getattr(getattr(import_module("xllamacpp"), kind), f"{kind}_{member}".upper())

    return _to(path, read)


def _items(value: str) -> list[str]:
    return [item.strip() for item in value.split(",") if item.strip()]


def _folder(value: str) -> str:
    if not Path(value).is_dir():
        raise ValueError(f"not a directory: {value}")
    return f"{value.rstrip('/')}/"


def _text(value: str) -> str:
    return Path(value).read_text(encoding="utf-8")


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


def _rerank(params: Any, value: bool) -> None:
    params.embedding = value
    _enum("pooling_type", "llama_pooling_type")(params, "rank")


_KV_TYPES = "{f32,f16,bf16,q8_0,q4_0,q4_1,iq4_nl,q5_0,q5_1}"

# What --help shows of an option, and how it is set. Without a value it is a switch, set to False
# by flags that begin with --no-, -no or -nk, else to True.
OPTIONS: dict[str, Setter] = {
    "-t, --threads N": _to("cpuparams.n_threads", int),
    "-tb, --threads-batch N": _to("cpuparams_batch.n_threads", int),
    "-c, --ctx-size N": _context,
    "-n, --predict, --n-predict N": _to("n_predict", int),
    "-b, --batch-size N": _to("n_batch", int),
    "-ub, --ubatch-size N": _to("n_ubatch", int),
    "--keep N": _to("n_keep", int),
    "--swa-full": _to("swa_full"),
    "-fa, --flash-attn [on|off|auto]": _enum(
        "flash_attn_type", "llama_flash_attn_type", on="enabled", off="disabled"
    ),
    "--rope-scaling {none,linear,yarn}": _enum("rope_scaling_type", "llama_rope_scaling_type"),
    "--rope-scale N": _to("rope_freq_scale", lambda value: 1 / float(value)),
    "--rope-freq-base N": _to("rope_freq_base", float),
    "--rope-freq-scale N": _to("rope_freq_scale", float),
    "--yarn-orig-ctx N": _to("yarn_orig_ctx", int),
    "-kvo, --kv-offload, -nkvo, --no-kv-offload": _to("no_kv_offload", not_),
    f"-ctk, --cache-type-k {_KV_TYPES}": _enum("cache_type_k", "ggml_type"),
    f"-ctv, --cache-type-v {_KV_TYPES}": _enum("cache_type_v", "ggml_type"),
    "-lm, --load-mode {auto,none,mmap,mlock,mmap+mlock,dio}": _enum(
        "load_mode", "llama_load_mode", dio="direct_io"
    ),
    "--mlock": _enum("load_mode", "llama_load_mode", true="mlock"),
    "--mmap, --no-mmap": _enum("load_mode", "llama_load_mode", true="mmap", false="none"),
    "--numa {distribute,isolate,numactl}": _enum("numa", "ggml_numa_strategy"),
    "-ot, --override-tensor <tensor name pattern>=<buffer type>,...": _to("tensor_buft_overrides"),
    "-ngl, --gpu-layers, --n-gpu-layers N": _to(
        "n_gpu_layers", lambda value: {"auto": -1, "all": -2}.get(value) or int(value)
    ),
    "-sm, --split-mode {none,layer,row,tensor}": _enum("split_mode", "llama_split_mode"),
    "-ts, --tensor-split N0,N1,N2,...": _tensor_split,
    "-mg, --main-gpu INDEX": _to("main_gpu", int),
    "-fit, --fit [on|off]": _to("fit_params", lambda value: value == "on"),
    "-fitc, --fit-ctx N": _to("fit_params_min_ctx", int),
    "--check-tensors": _to("check_tensors"),
    "--lora FNAME": _lora,
    "-m, --model FNAME": _to("model.path"),
    "-v, --verbose, --log-verbose": _to("verbosity", lambda _: 2**31 - 1),
    "-lv, --verbosity, --log-verbosity N": _to("verbosity", int),
    "--samplers SAMPLERS": _to("sampling.samplers"),
    "-s, --seed SEED": _to("sampling.seed", lambda value: int(value) % 2**32),
    "--ignore-eos": _to("sampling.ignore_eos"),
    "--temp, --temperature N": _to("sampling.temp", float),
    "--top-k N": _to("sampling.top_k", int),
    "--top-p N": _to("sampling.top_p", float),
    "--min-p N": _to("sampling.min_p", float),
    "--repeat-last-n N": _to("sampling.penalty_last_n", int),
    "--repeat-penalty N": _to("sampling.penalty_repeat", float),
    "--presence-penalty N": _to("sampling.penalty_present", float),
    "--frequency-penalty N": _to("sampling.penalty_freq", float),
    "--mirostat N": _to("sampling.mirostat", int),
    "--reasoning-budget N": _to("sampling.reasoning_budget_tokens", int),
    "-cram, --cache-ram N": _to("cache_ram_mib", int),
    "-kvu, --kv-unified, -no-kvu, --no-kv-unified": _to("kv_unified"),
    "--context-shift, --no-context-shift": _to("ctx_shift"),
    "--warmup, --no-warmup": _to("warmup"),
    "--pooling {none,mean,cls,last,rank}": _enum("pooling_type", "llama_pooling_type"),
    "-np, --parallel N": _to("n_parallel", int),
    "-cb, --cont-batching, -nocb, --no-cont-batching": _to("cont_batching"),
    "-mm, --mmproj FILE": _to("mmproj.path"),
    "--mmproj-auto, --no-mmproj, --no-mmproj-auto": _to("no_mmproj", not_),
    "--mmproj-offload, --no-mmproj-offload": _to("mmproj_use_gpu"),
    "--image-min-tokens N": _to("image_min_tokens", int),
    "--image-max-tokens N": _to("image_max_tokens", int),
    "-a, --alias STRING": _to("model_alias", lambda value: set(_items(value))),
    "--host HOST": _to("hostnames", _items),
    "--port PORT": _to("port", int),
    "--cors-origins ORIGINS": _to("cors_origins"),
    "--ui, --webui, --no-ui, --no-webui": _to("ui"),
    "--embedding, --embeddings": _to("embedding"),
    "--rerank, --reranking": _rerank,
    "--api-key KEY": _to("api_keys", _items),
    "--jinja, --no-jinja": _to("use_jinja"),
    "--chat-template JINJA_TEMPLATE": _to("chat_template"),
    "--chat-template-file JINJA_TEMPLATE_FILE": _to("chat_template", _text),
    "--chat-template-kwargs STRING": _template_values,
    "--reasoning-format {none,auto,deepseek,deepseek-legacy}": _enum(
        "reasoning_format", "common_reasoning_format"
    ),
    "-rea, --reasoning [on|off|auto]": _reasoning,
    "-to, --timeout N": _to("timeout_read timeout_write", int),
    "--threads-http N": _to("n_threads_http", int),
    "--cache-prompt, --no-cache-prompt": _to("cache_prompt"),
    "--cache-reuse N": _to("n_cache_reuse", int),
    "--metrics": _to("endpoint_metrics"),
    "--props": _to("endpoint_props"),
    "--slots, --no-slots": _to("endpoint_slots"),
    "--slot-save-path PATH": _to("slot_save_path", _folder),
    "--media-path PATH": _to("media_path", _folder),
    "--sleep-idle-seconds SECONDS": _to("sleep_idle_seconds", int),
}


def read_arguments(words: Sequence[str]) -> Iterator[tuple[str, str | bool, Setter]]:
    """Yield each flag of a command line with its value (a bool for a switch) and its setter.

    Raises:
        SystemExit: At what llama-server would refuse, with its message.
    """
    by_flag = {
        name.partition(" ")[0]: (head.rpartition(", ")[2].partition(" ")[2], apply)
        for head, apply in OPTIONS.items()
        for name in head.split(", ")
    }
    rest = iter(words)
    for word in rest:
        flag = word.replace("_", "-") if word.startswith("--") else word
        if flag not in by_flag:
            sys.exit(f"error: invalid argument: {flag}")
        metavar, apply = by_flag[flag]
        if not metavar:
            yield flag, not flag.startswith(("--no-", "-no", "-nk")), apply
            continue
        value = next(rest, None)
        if value is None:
            _refuse(flag, "expected value for argument")
        choices = re.split(r"[|,]", metavar[1:-1]) if metavar[0] in "[{" else [value]
        if value not in choices:
            _refuse(flag, f"{value!r} is not one of {', '.join(choices)}")
        yield flag, value, apply


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
    for flag, value, apply in given:
        try:
            apply(params, value)
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
