"""What llama-server's endings look like, what they mean and what to do about them: data.

Each row was seen in a log, or stands in llama.cpp's sources where it takes a GPU or a Mac to see
it. `tests/test_diagnosis.py` has a log for every row.
"""

from __future__ import annotations

import errno
import re
import signal
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reading:
    """What an ending means.

    Attributes:
        cause: A sentence; names in braces stand for what the signature found.
        remedy: What to do, in a sentence.
        repeats: Whether the next start would end the same way.
        of_port: Whether another program may have the server's port.
    """

    cause: str
    remedy: str
    repeats: bool = False
    of_port: bool = False


@dataclass(frozen=True, slots=True)
class Signature:
    """A row of the table: lines that match `pattern` prove `reading`."""

    pattern: re.Pattern[str]
    reading: Reading


def _row(
    pattern: str, cause: str, remedy: str, *, repeats: bool = False, of_port: bool = False
) -> Signature:
    return Signature(re.compile(pattern), Reading(cause, remedy, repeats, of_port))


_OPEN = r"failed to open (?:GGUF file )?'?(?P<file>[^']*?)'?(?:: '?| \((?:errno )?)"
_DAMAGED = (
    r"error loading model: .*(?:has wrong shape|invalid n_rot|wrong type|wrong number of tensors"
    r"|tensor .*(?:not found|is duplicated)|missing tensor|key not found|invalid data|vocabulary)"
)
_DOWNLOAD = "Delete the file and download it again."
_UPDATE = "Update llama.cpp, or pick another model."
_SMALLER = "Lower the context, pick a smaller quantization, or end other programs."
_GPU_SMALLER = "Lower the GPU layers or the context, or end what else uses the GPU."
_CONTEXT = (
    "Lower the context (LLAMACPP_CTX) or the number of parallel requests (LLAMACPP_PARALLEL)."
)
# It may be started again by itself, so no remedy asks for that.
_RETRY = "If that repeats, update llama.cpp and leave LLAMACPP_EXTRA_ARGS empty."

# The first row that matches any line wins, so what names the cause stands before what merely
# reports it: a shard is a file too, and a lack of memory may end in a failed check.
SIGNATURES = (
    _row(
        r"error while loading shared libraries: (?P<library>[^:]+)"
        r"|Library not loaded: (?P<dylib>\S+)|version `(?P<version>\S+)' not found"
        r"|undefined symbol: (?P<symbol>\S+)",
        "This build of llama.cpp needs {library}{version}{dylib}{symbol}, which this system lacks.",
        "Install it, or use a build of llama.cpp made for this system.",
        repeats=True,
    ),
    _row(
        r"the xllamacpp wheel cannot be loaded",
        "The embedded engine cannot be loaded.",
        "Install it again: pip install --force-reinstall xllamacpp",
        repeats=True,
    ),
    _row(
        r"Exec format error|cannot execute binary file|Bad CPU type in executable",
        "The engine is not a program that this machine can run.",
        "Set LLAMACPP_BIN to a build of llama.cpp made for this machine, or leave it empty.",
        repeats=True,
    ),
    _row(
        r"^\S+: (?:line )?\d+: (?:exec: )?(?P<program>\S+): (?:cannot execute: )?"
        r"(?:not found|No such file or directory|Permission denied)$",
        "The script that LLAMACPP_BIN names cannot run {program}.",
        "Correct the script, or set LLAMACPP_BIN to llama-server itself.",
        repeats=True,
    ),
    _row(
        r"couldn't bind (?:HTTP|to) server socket,?:? hostname[:=] ?(?P<host>\S*?),?"
        r" port[:=] ?(?P<port>\d{1,3}|10[01]\d|102[0-3])$",
        "Port {port} on {host} is busy, or only an administrator may use it, being below 1024.",
        "Choose another port above 1023.",
        of_port=True,
    ),
    _row(
        r"couldn't bind (?:HTTP|to) server socket,?:? hostname[:=] ?"
        r"(?P<host>(?!127\.|localhost|0\.0\.0\.0|::1?,)\S+?),? port[:=] ?(?P<port>\d+)",
        "{host} is not an address of this machine, or port {port} on it is busy.",
        "Set LLAMACPP_HOST to 127.0.0.1 to serve this machine, or choose another port.",
        of_port=True,
    ),
    _row(
        r"couldn't bind (?:HTTP|to) server socket",
        "The port is busy.",
        "Choose another port, or stop what holds this one.",
        of_port=True,
    ),
    _row(
        r"(?:invalid|unknown) argument: (?P<flag>\S+)",
        "This build of llama.cpp does not know {flag}.",
        "Correct it in LLAMACPP_EXTRA_ARGS; `llama-server --help` lists the flags.",
        repeats=True,
    ),
    _row(
        r'while handling argument "(?P<flag>[^"]+)"|invalid parameter for argument: (?P<old>\S+)',
        "llama.cpp refused the value of {flag}{old}.",
        "Correct it in LLAMACPP_EXTRA_ARGS, or in the setting that it comes from.",
        repeats=True,
    ),
    _row(
        r"failed to download model: .*status code: 40[13]",
        "The download was refused: the API key is missing, wrong or not allowed to see this model.",
        "Set HF_TOKEN to a key that may, or download the file by hand.",
        repeats=True,
    ),
    _row(
        r"No space left on device|Disk quota exceeded|error writing to file",
        "The disk is full.",
        "Make room on it and start again.",
    ),
    _row(
        r"failed to download model",
        "The model cannot be downloaded.",
        "Check the address and the network, or download the file by hand.",
    ),
    _row(
        r"Input/output error|Stale file handle|Transport endpoint is not connected",
        "The disk that holds the model cannot be read.",
        "Check the disk or the network drive, and mount it again.",
    ),
    _row(
        r"Too many open files",
        "The limit on open files is reached.",
        "Raise it with `ulimit -n`, or end other programs.",
    ),
    _row(
        r"(?:failed to load lora adapter file from |lora_init: failed to open ')(?P<file>[^']+)",
        "The adapter given with --lora cannot be read: {file}.",
        "Correct its path in LLAMACPP_EXTRA_ARGS, or remove --lora.",
        repeats=True,
    ),
    _row(
        _OPEN + r"Permission denied",
        "This user may not read {file}.",
        "Give it read permission with chmod or chown, or pick another model.",
        repeats=True,
    ),
    _row(
        _OPEN.replace("[^']*?", r"[^']*?-(?!00001)\d{5}-of-\d{5}\.gguf") + "No such file",
        "A shard of the model is missing: {file}.",
        "Download it beside the others.",
        repeats=True,
    ),
    _row(
        _OPEN + r"No such file",
        "There is no file {file}.",
        "Choose a model that is there, or correct the path.",
        repeats=True,
    ),
    _row(
        r"failed to open (?:GGUF file )?'(?P<file>[^']+)'",  # until 2026 the reason was not said
        "{file} cannot be opened.",
        "Choose a model that is there and that you may read.",
        repeats=True,
    ),
    _row(
        r"must be loaded with the first split|invalid split file name"
        r"|(?:failed to load|missing key \S+ in) GGUF split|invalid split (?:count|file)",
        "The shards of the model do not belong together: one is damaged, renamed or another's.",
        "Pick the shard that ends in -00001-of-…, and download the one named in the log again.",
        repeats=True,
    ),
    _row(
        r"invalid magic",
        "This is not a GGUF file; often it is a web page or a pointer saved in its place.",
        _DOWNLOAD,
        repeats=True,
    ),
    _row(
        r"only supports up to version|GGUFv1 is no longer|bad GGUF version|host and model endian"
        r"|invalid ggml type|not a multiple of block size",
        "This llama.cpp does not read files of this version, byte order or quantization.",
        _UPDATE,
        repeats=True,
    ),
    _row(
        r"not within the file bounds|failed to read (?:magic|header|key-value|tensor info)"
        r"|unexpectedly reached end of file|tensors expected but",
        "The file is cut short or damaged.",
        _DOWNLOAD,
        repeats=True,
    ),
    _row(
        r"unknown model architecture: '(?P<name>[^']*)'",
        "This llama.cpp does not know the architecture '{name}'.",
        "Update llama.cpp if the model is new; image, speech and video models need other programs.",
        repeats=True,
    ),
    _row(
        r"unknown (?:pre-)?tokenizer(?: type)?: '(?P<name>[^']*)'",
        "This llama.cpp is too old for the model: it does not know '{name}'.",
        _UPDATE,
        repeats=True,
    ),
    _row(
        r"CLIP cannot be used as main model",
        "This file is only the part of a model that sees (mmproj).",
        "Pick the model itself; this file is used with it by itself where it lies beside it.",
        repeats=True,
    ),
    _row(
        r"mismatch between text model|mismatch between vision and audio"
        r"|[Ff]ailed to load (?:CLIP|multimodal) model",
        "The projector given with --mmproj does not fit the model.",
        "Set LLAMACPP_MMPROJ to the mmproj file that comes with this model, or to off.",
        repeats=True,
    ),
    _row(
        r"failed to (?:load|apply) lora adapter",
        "The file given with --lora is no adapter for this model.",
        "Name an adapter made for it, or remove --lora from LLAMACPP_EXTRA_ARGS.",
        repeats=True,
    ),
    _row(
        r"chat template (?:parsing error|is not supported)|failed to initialize chat template"
        r"|common_chat_templates_init: error:",
        "llama.cpp cannot use the chat template.",
        "Set --chat-template chatml in LLAMACPP_EXTRA_ARGS, or correct the template named there.",
        repeats=True,
    ),
    _row(
        r"V cache .*requires (?:flash|Flash)",
        "A quantized V cache needs flash attention.",
        "Set LLAMACPP_FLASH_ATTN=on, or remove -ctv from LLAMACPP_EXTRA_ARGS.",
        repeats=True,
    ),
    _row(
        r"kIOGPUCommandBufferCallbackErrorOutOfMemory|ErrorOutOfDeviceMemory|Malloc failed"
        r"|Device memory allocation of size|(?:CUDA|ROCm|MUSA) error.*: out of memory"
        r"|allocate (?:CUDA|ROCm|MUSA|Vulkan|SYCL|Metal|MTL)\S* buffer"
        r"|ggml_(?:backend_)?metal\S* (?:error: )?failed to allocate buffer",
        "The GPU has too little free memory.",
        _GPU_SMALLER,
    ),
    _row(
        r"allocate (?P<device>RPC\d+\[[^\]]+\]) buffer",
        "{device} has too little free memory.",
        "Lower the GPU layers or the context, or end other programs on that machine.",
    ),
    _row(
        r"failed to allocate buffer for kv cache",
        "There is too little memory for the KV cache of this context.",
        _CONTEXT,
    ),
    _row(
        r"failed to allocate compute|failed to reserve",
        "There is too little memory to compute with these batch sizes and this context.",
        "Lower the batch sizes (LLAMACPP_BATCH_SIZE, LLAMACPP_UBATCH_SIZE) or LLAMACPP_CTX.",
    ),
    _row(
        r"unable to allocate \S+ buffer|mmap failed: Cannot allocate",
        "There is too little memory for the model's weights.",
        "Pick a smaller quantization, or end other programs.",
    ),
    _row(
        r"std::bad_alloc|insufficient memory|Cannot allocate memory|failed to allocate|MemoryError",
        "There is too little memory.",
        _SMALLER,
    ),
    _row(
        r"Resource temporarily unavailable|can't start new thread",
        "The limit on processes and threads is reached.",
        "End other programs, lower LLAMACPP_THREADS, or raise the limit with `ulimit -u`.",
    ),
    _row(
        r"no kernel image is available|invalid device function|PTX was compiled with",
        "This build of llama.cpp was not made for this GPU.",
        "Use a build made for it, or set LLAMACPP_N_GPU_LAYERS to 0.",
        repeats=True,
    ),
    _row(
        r"CUDA driver version is insufficient|unsupported display driver|no CUDA-capable device"
        r"|failed to initialize (?:CUDA|ROCm)",
        "The GPU cannot be used: there is none, or its driver is too old for this llama.cpp.",
        "Update the driver, or use a build of llama.cpp without CUDA.",
        repeats=True,
    ),
    _row(
        r"(?:CUDA|ROCm|MUSA) error|DeviceLost|device lost|command buffer \d+ failed",
        "The GPU reported a fault.",
        "If that repeats, update the driver and llama.cpp.",
    ),
    _row(
        _DAMAGED,
        "The file does not hold what this llama.cpp expects: it is damaged, or made for another.",
        "Update llama.cpp; if that does not help, download the model from another source.",
        repeats=True,
    ),
    _row(
        r"llama_init_from_model: .*(?:must|requires?|cannot|does not)",
        "llama.cpp cannot run this model with these settings.",
        "Change the setting that the log names.",
        repeats=True,
    ),
    _row(
        r"error loading model: (?!llama_model_loader: failed to load model from)",
        "llama.cpp cannot load this file.",
        "Update llama.cpp; if that does not help, download the model again.",
        repeats=True,
    ),
    _row(
        r"Remote RPC server crashed",
        "A machine of --rpc no longer answers, and the server ends with it.",
        "Start ggml-rpc-server there again, or take that machine out of --rpc in"
        " LLAMACPP_EXTRA_ARGS.",
    ),
    _row(
        r"GGML_ASSERT|^\S+\.(?:c|cpp|cu|cuh|h|m):\d+: ",
        "A check inside llama.cpp failed.",
        _RETRY,
    ),
    _row(
        r"terminate called|^  what\(\): |double free|^free\(\)|^malloc|^corrupted ",
        "llama.cpp met an error that it does not handle.",
        _RETRY,
    ),
)

STOPPED = Reading(
    "Another program or a person asked it to end.", "If nobody meant that, find out which."
)
NO_SERVER = Reading(
    "It ended by itself without becoming a server.",
    "Remove what only prints, such as --help or --version, from LLAMACPP_EXTRA_ARGS.",
    repeats=True,
)
NO_ANSWER = Reading(
    "llama.cpp cannot compute with this model here, though it says that it is ready.",
    "Start it again; if that repeats, set LLAMACPP_N_GPU_LAYERS to 0, or update llama.cpp and the"
    " driver.",
)
KILLED = Reading("Something killed it; often that is the system, because memory ran out.", _SMALLER)
KILLED_FOR_MEMORY = Reading("The system killed it because memory ran out.", _SMALLER)
KILLED_BY_HAND = Reading(
    "Another program or a person killed it; the system's memory did not run out.",
    "If nobody meant that, find out which.",
)
UNKNOWN = Reading("The reason is not known.", "See the end of the server's log.")
UNKNOWN_REFUSAL = Reading("The system does not say more.", "Check {file}.")

# What a signal means where the log does not say it better.
SIGNALS = {
    signal.SIGILL: Reading(
        "This build of llama.cpp uses instructions that this processor lacks.",
        "Use a build made for it, or build llama.cpp on this machine.",
        repeats=True,
    ),
    signal.SIGABRT: Reading("llama.cpp gave up on an error of its own.", _RETRY),
    signal.SIGSEGV: Reading("llama.cpp crashed on a mistake of its own.", _RETRY),
    signal.SIGFPE: Reading("llama.cpp crashed on a mistake of its own.", _RETRY),
    signal.SIGBUS: Reading(
        "The model's file was cut short, or its disk went away, while it was in use.",
        "Check the disk and the file's size.",
    ),
    signal.SIGXCPU: Reading(
        "It used up the processor time that this user is allowed.",
        "Raise the limit with `ulimit -t`.",
    ),
}
# Sent from outside: what the log says does not explain them.
FROM_OUTSIDE = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}

# Why a process could not even be started, by the system's error number; {file} is what it names.
LAUNCH = {
    errno.ENOENT: Reading("There is no {file}.", "Correct LLAMACPP_BIN, or leave it empty.", True),
    errno.EACCES: Reading(
        "This user may not use {file}.", "Give permission with chmod or chown.", True
    ),
    errno.EPERM: Reading(
        "The system does not let this program use {file}.",
        "Set LLAMACPP_LOG_DIR to another folder; on macOS, or give the terminal full disk access.",
        True,
    ),
    errno.EROFS: Reading("{file} cannot be written.", "Set LLAMACPP_LOG_DIR to a folder that can."),
    errno.ENOTDIR: Reading(
        "A part of the path {file} is a file, not a folder.",
        "Set LLAMACPP_LOG_DIR to a folder that can be written.",
    ),
    errno.EEXIST: Reading(
        "{file} is a file where a folder has to be.",
        "Move it away, or set LLAMACPP_LOG_DIR to a folder that can be written.",
    ),
    errno.EISDIR: Reading(
        "{file} is a folder where a file has to be.",
        "Move it away, or set LLAMACPP_LOG_DIR to another folder.",
    ),
    errno.ENOEXEC: Reading(
        "{file} is not a program that this machine can run.",
        "Set LLAMACPP_BIN to a build of llama.cpp made for this machine, or leave it empty.",
        True,
    ),
    errno.ENOSPC: Reading("The disk that holds {file} is full.", "Make room on it."),
    errno.EDQUOT: Reading("The disk quota is used up.", "Make room in it."),
    errno.EMFILE: Reading(
        "The limit on open files is reached.",
        "End programs that hold files open, or raise it with `ulimit -n`.",
    ),
    errno.EAGAIN: Reading("The limit on processes is reached.", "End other programs."),
    errno.ENOMEM: Reading("There is no memory left to start a program.", _SMALLER),
}

# The same of the folder for logs, whose files are written before there is a process.
_NO_LOGS = Reading(
    "The folder for logs, {file}, cannot be made or written to.",
    "Set LLAMACPP_LOG_DIR to a folder that can.",
)
LOG_FOLDER = dict.fromkeys(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR), _NO_LOGS
) | {
    errno.ENOSPC: Reading(
        "The disk that holds the folder for logs, {file}, is full.",
        "Make room on it, or set LLAMACPP_LOG_DIR to a folder on another one.",
    ),
}
