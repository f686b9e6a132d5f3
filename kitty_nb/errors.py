"""Every error that kitty_nb raises on purpose.

    KittyError
    ├── ConfigError          a setting is wrong; `.problems` lists all of them
    ├── ModelFileError       a file is not a GGUF model that can be read, or cannot be written
    │   ├── ModelFileCutShortError    it ends too early, as while it is downloaded
    │   └── DemoModelSizeError    no demo model can be as small as was asked
    ├── EngineError
    │   ├── EngineNotFoundError   no llama-server to run
    │   └── UnknownFlagError      EXTRA_ARGS has a flag that this build does not know
    ├── ServerError
    │   ├── ServerFailedError     it never became ready: refused, stalled
    │   │   ├── PortBusyError     another program has its port; `.free_port` is one that is free,
    │   │   │                     `.attachable` whether that program is a llama-server
    │   │   └── WillNotFitError   there is not enough memory for the model
    │   ├── ServerCrashedError    its process ended by itself
    │   ├── StartCancelledError   it was stopped, or replaced, before it was ready
    │   └── NoAnswerError         the model said nothing: it only thought, or called a tool
    ├── HubError             a model cannot be had from the Hugging Face Hub
    │   ├── HubAccessError        it is not there, or not for everybody
    │   ├── HubOfflineError       the Hub cannot be reached
    │   ├── DiskFullError         there is no room for it
    │   └── ChecksumError         what came is not what the Hub has
    ├── ExperimentError      a sweep or a run cannot be made, or its results not be used as asked
    │   ├── ResultStoreError      the file with the results cannot be read or written
    │   └── RunRecordError        a run record cannot be read, written or repeated
    └── WaitTimeoutError     `Operation.wait` ran out of time; the work goes on

A message is written for the person at the notebook: what happened, why, and what to do next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "ChecksumError",
    "ConfigError",
    "DemoModelSizeError",
    "DiskFullError",
    "EngineError",
    "EngineNotFoundError",
    "ExperimentError",
    "HubAccessError",
    "HubError",
    "HubOfflineError",
    "KittyError",
    "ModelFileCutShortError",
    "ModelFileError",
    "NoAnswerError",
    "PortBusyError",
    "Problem",
    "ResultStoreError",
    "RunRecordError",
    "ServerCrashedError",
    "ServerError",
    "ServerFailedError",
    "StartCancelledError",
    "UnknownFlagError",
    "WaitTimeoutError",
    "WillNotFitError",
]


# Those of C0 and C1 but for tab and newline: a terminal takes them for orders, such as to write
# its title or the clipboard.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Write control characters as Python does, by their numbers, in text from anywhere."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class KittyError(Exception):
    """Base of all errors in this package."""

    def _render_traceback_(self) -> list[str]:
        """Show the sentence alone in a notebook: IPython prints this instead of a traceback."""
        return [printable(f"{type(self).__name__}: {self}")]


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong setting.

    Attributes:
        key: The name as the user wrote it, e.g. `LLAMACPP_PRIMARY_MODEL`.
        value: The value that was refused.
        reason: What is wrong with it.
        fix: What to write or do instead.
    """

    key: str
    value: str
    reason: str
    fix: str

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
    """A file is not a GGUF model that can be read, or cannot be written."""


class ModelFileCutShortError(ModelFileError):
    """A GGUF model ends too early: it is still on its way, or was not fetched to its end."""


class DemoModelSizeError(ModelFileError, ValueError):
    """The demo model cannot be made as small as was asked."""


class EngineError(KittyError):
    """The engine, the program that serves the model, cannot be used."""


class EngineNotFoundError(EngineError):
    """There is no llama-server to run."""


class UnknownFlagError(EngineError):
    """A flag in EXTRA_ARGS is not one that this build of the engine knows."""


class ServerError(KittyError):
    """A server did not do what was asked of it."""


class ServerFailedError(ServerError):
    """The server was refused or given up before it was ready."""


class PortBusyError(ServerFailedError):
    """Another program listens where the server should."""

    def __init__(
        self, message: str, free_port: int | None = None, *, attachable: bool = False
    ) -> None:
        super().__init__(message)
        self.free_port = free_port
        self.attachable = attachable


class WillNotFitError(ServerFailedError):
    """A model needs more memory than there is."""


class ServerCrashedError(ServerError):
    """The server's process ended by itself."""


class StartCancelledError(ServerError):
    """A start was overtaken by a stop, a restart or a switch."""


class NoAnswerError(ServerError):
    """A model said nothing in answer to a request."""


class HubError(KittyError):
    """A model cannot be had from the Hugging Face Hub."""


class HubAccessError(HubError):
    """The Hub has no such repository, or does not show it to everybody."""


class HubOfflineError(HubError):
    """The Hub cannot be reached."""


class DiskFullError(HubError):
    """There is no room for a download."""


class ChecksumError(HubError):
    """What came is not what the Hub has; it was deleted."""


class ExperimentError(KittyError):
    """A sweep or a run cannot be made, or its results cannot be used as asked."""


class ResultStoreError(ExperimentError):
    """The file with the results of a sweep cannot be read or written."""


class RunRecordError(ExperimentError):
    """A run record cannot be read, written or repeated."""


class WaitTimeoutError(KittyError, TimeoutError):
    """`Operation.wait` ran out of time; the operation itself goes on."""


def first_of(error: Exception) -> Exception:
    """Return the first of the errors that a task group has raised."""
    return first_of(error.exceptions[0]) if isinstance(error, ExceptionGroup) else error
