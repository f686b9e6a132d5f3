"""Every error that kitty_nb raises on purpose.

    KittyError
    ├── ConfigError          settings are wrong; `.problems` lists all of them
    ├── ModelFileError       a file is not a readable GGUF model, or can't be written
    │   ├── ModelFileCutShortError    the file ends too early, as during a download
    │   └── DemoModelSizeError    the size is too small for a demo model
    ├── EngineError
    │   ├── EngineNotFoundError   no usable llama-server was found
    │   └── UnknownFlagError      EXTRA_ARGS contains a flag that this build does not know
    ├── ServerError
    │   ├── ServerFailedError     a start was refused, or given up before it was ready
    │   │   ├── PortBusyError     another program listens on the port; `.free_port` is a
    │   │   │                     free one, `.attachable` whether it is a llama-server
    │   │   └── WillNotFitError   not enough memory for the model
    │   ├── ServerCrashedError    its process exited on its own
    │   ├── StartCancelledError   it was stopped or superseded before it was ready
    │   ├── OutOfReachError       the machine that it runs on can't be reached
    │   ├── RefusedError          the server refused a request for its content
    │   └── NoAnswerError         the answer has no text: only reasoning or a tool call
    ├── HubError             a download from the Hugging Face Hub failed
    │   ├── HubAccessError        the repository is missing, or access to it is restricted
    │   ├── HubOfflineError       the Hub can't be reached
    │   ├── DiskFullError         not enough free disk space
    │   └── ChecksumError         the downloaded file doesn't match the Hub
    ├── ExperimentError      a sweep or a run failed, or its results don't allow this
    │   ├── ResultStoreError      the results file can't be read or written
    │   └── RunRecordError        a run record can't be read, written or repeated
    └── WaitTimeoutError     `Operation.wait` timed out; the operation continues

Messages are for the person at the keyboard: what happened, then the remedy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# C0 and C1 control characters except tab and newline: a terminal obeys them, for example to set
# its title or the clipboard.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Escape control characters in untrusted text, as Python's `repr` does."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class KittyError(Exception):
    """Base of all errors in this package."""

    def _render_traceback_(self) -> list[str]:
        """Show the sentence alone in a notebook: IPython prints this instead of a traceback."""
        return [printable(f"{type(self).__name__}: {self}")]


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong setting."""

    key: str  # the name as the user wrote it, e.g. `LLAMACPP_PRIMARY_MODEL`
    value: str  # the value that was refused
    reason: str  # what is wrong with it
    fix: str  # what to write or do instead

    def __str__(self) -> str:
        return f"{self.key}={self.value!r}: {self.reason} {self.fix}"


class ConfigError(KittyError):
    """Settings are wrong; all problems are reported at once."""

    def __init__(self, source: str, problems: tuple[Problem, ...]) -> None:
        self.source = source
        self.problems = problems
        count = "1 setting is" if len(problems) == 1 else f"{len(problems)} settings are"
        where = f" in {source}" if source else ""
        super().__init__("\n".join([f"{count} wrong{where}:", *(f"- {p}" for p in problems)]))


class ModelFileError(KittyError):
    """A file is not a readable GGUF model, or can't be written."""


class ModelFileCutShortError(ModelFileError):
    """A GGUF file ends too early: it is still being downloaded, or the download broke off."""


class DemoModelSizeError(ModelFileError, ValueError):
    """The size is too small for a demo model."""


class EngineError(KittyError):
    """The engine, the program that serves the model, can't be used."""


class EngineNotFoundError(EngineError):
    """No usable llama-server was found."""


class UnknownFlagError(EngineError):
    """EXTRA_ARGS contains a flag that this build of the engine doesn't know."""


class ServerError(KittyError):
    """A server didn't do what was asked of it."""


class ServerFailedError(ServerError):
    """A start was refused, or given up before the server was ready."""


class PortBusyError(ServerFailedError):
    """Another program listens on the server's port."""

    def __init__(
        self, message: str, free_port: int | None = None, *, attachable: bool = False
    ) -> None:
        super().__init__(message)
        self.free_port = free_port
        self.attachable = attachable


class WillNotFitError(ServerFailedError):
    """A model needs more memory than there is."""


class ServerCrashedError(ServerError):
    """The server's process exited on its own."""


class StartCancelledError(ServerError):
    """A start was superseded by a stop, a restart or a switch."""


class OutOfReachError(ServerError):
    """The machine that a server runs on can't be reached; the server keeps running there."""


class RefusedError(ServerError):
    """A server refused a request because of its content."""


class NoAnswerError(ServerError):
    """A model's answer has no text, or lacks the form that was asked for."""


class HubError(KittyError):
    """A download from the Hugging Face Hub failed."""


class HubAccessError(HubError):
    """The Hub has no such repository, or restricts access to it."""


class HubOfflineError(HubError):
    """The Hub can't be reached."""


class DiskFullError(HubError):
    """The disk has no room for a download."""


class ChecksumError(HubError):
    """A downloaded file doesn't match the Hub; it was deleted."""


class ExperimentError(KittyError):
    """A sweep or a run failed, or its results don't allow what was asked."""


class ResultStoreError(ExperimentError):
    """The results file of a sweep can't be read or written."""


class RunRecordError(ExperimentError):
    """A run record can't be read, written or repeated."""


class WaitTimeoutError(KittyError, TimeoutError):
    """`Operation.wait` timed out; the operation continues."""


def not_encodable(error: UnicodeEncodeError) -> RefusedError:
    """Return the error for a text that no request can carry."""
    half = ord(error.object[error.start])
    return RefusedError(
        f"The text contains half a surrogate pair (U+{half:04X}), which UTF-8 can't encode. Replace"
        " such halves: text.encode(errors='replace').decode()."
    )


def another_machine(wanted: str | None, own: str | None) -> ServerFailedError:
    """Return the error for settings that name another machine than a manager's servers run on.

    Args:
        wanted: The machine in the settings; None for this one.
        own: The manager's; None for this one.
    """
    here = "this machine"
    return ServerFailedError(
        f"These settings are for {wanted or here}, but this manager's servers run on {own or here}."
        " Close the manager, or restart the kernel, to change that."
    )


def first_of(error: Exception) -> Exception:
    """Return the first of the errors that a task group raised."""
    return first_of(error.exceptions[0]) if isinstance(error, ExceptionGroup) else error
