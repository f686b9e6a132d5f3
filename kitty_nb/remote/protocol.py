"""The lines between two machines: each is a JSON array of a kind, what it is about, and data.

| from here | about | data |
|---|---|---|
| `do` | number of the call | `Command` |
| `cancel` | number of the call | |
| `heard` | number of the batch | |

| from there | about | data |
|---|---|---|
| `hello` | `PROTOCOL` | `Hello` |
| `event` | its class | the event |
| `key` | | the server's API key, which is in no event |
| `step`, `answer` | number of the call | what its `Verb` answers |
| `failed` | number of the call | `Failure` |
| `told` | number of the batch | the end of one; at most `WINDOW` are sent without `heard` |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, PlainSerializer, TypeAdapter

from kitty_nb import errors
from kitty_nb.catalog.catalog import ScanStep
from kitty_nb.catalog.memory import MemoryPreview, Verdict
from kitty_nb.catalog.model import Model, ModelNote
from kitty_nb.catalog.stores import Store
from kitty_nb.config import SHOW_SECRETS, ServerConfig, Task
from kitty_nb.config.profiles import Places
from kitty_nb.errors import KittyError, Problem
from kitty_nb.supervisor.events import (
    Activity,
    Event,
    HealthCheckResult,
    LoadProgress,
    MemoryUse,
    Request,
    ServerState,
    Work,
)
from kitty_nb.supervisor.port_owner import PortOwner
from kitty_nb.supervisor.prompt_keeper import Pin

PROTOCOL = 1  # incremented whenever a line, an event, a verb or a setting changes
WINDOW = 4  # batches; on a slow line the newest facts wait, not all of them
# Seconds. Each side sends something this often; one that falls silent counts as gone.
TELL_EVERY, SILENT_FOR, LONELY_FOR = 2.0, 8.0, 30.0
LONGEST = 1 << 28  # bytes of a line; a scan of many models

# Settings that are no business of the other machine.
OF_THIS_MACHINE = {"ssh", "ssh_bin", "ssh_config", "on_kernel_exit"}


def _settings(config: ServerConfig | None) -> dict[str, Any] | None:
    """Return what differs from the defaults, and all folders, whose defaults differ by machine."""
    if config is None:
        return None
    everything = config.model_dump(mode="json", context=SHOW_SECRETS, exclude=OF_THIS_MACHINE)
    fields = ServerConfig.model_fields
    places = Places.model_fields.keys()
    return {
        name: value
        for name, value in everything.items()
        if name in places or name == "port" or getattr(config, name) != fields[name].default
    }


class Verb(StrEnum):
    """The operations of the other machine."""

    OPEN = "open"
    START = "start"
    RESTART = "restart"
    SWITCH = "switch_model"
    STOP = "stop"
    ATTACH = "attach"
    CHECK = "check_health"
    MEMORY = "memory_use"
    PREVIEW = "preview_memory"
    PIN = "pin"
    LOG = "log"
    SCAN = "scan"
    NOTES = "notes"
    FAVORITE = "set_favorite"
    FITS = "fits"


class Command(BaseModel):
    """A verb and its arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: Verb
    config: Annotated[ServerConfig | None, PlainSerializer(_settings)] = None
    wait: bool = True
    anyway: bool = False
    force: bool = False
    model: Path | None = None
    models: tuple[Path, ...] = ()
    name: str | None = None
    text: str = ""
    favorite: bool = False
    follow: bool = False
    last: int | None = None


class Hello(BaseModel):
    """The first line of the other machine.

    Attributes:
        version: Its version of kitty_nb.
        now: Its monotonic clock, in seconds.
        boot: The identifier of its system's boot; equal to ours if it is this machine.
        places: The paths of the profile there.
        problem: Why the profile cannot run there, such as a `.env` that can't be read.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    now: float
    boot: str = ""
    places: Places | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything known about a server when its profile is opened."""

    state: ServerState
    progress: LoadProgress | None
    work: Work
    requests: tuple[Request, ...]
    lines: tuple[str, ...]
    activities: tuple[Activity, ...]
    stores: tuple[Store, ...]
    failure: str


class Failure(BaseModel):
    """An error of ours, to be raised on the other side."""

    model_config = ConfigDict(frozen=True)

    type: str
    text: str
    free_port: int | None = None
    attachable: bool = False
    source: str = ""
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Write an error down, with the facts that it has."""
        if not isinstance(error, KittyError):
            return cls(type="KittyError", text=f"Internal error on the other machine: {error!r}")
        return cls(**{**vars(error), "type": type(error).__name__, "text": str(error)})

    def error(self) -> KittyError:
        """Restore the error."""
        if self.type == "ConfigError":
            return errors.ConfigError(self.source, self.problems)
        if self.type == "PortBusyError":
            return errors.PortBusyError(self.text, self.free_port, attachable=self.attachable)
        kind = getattr(errors, self.type, KittyError)
        known = isinstance(kind, type) and issubclass(kind, KittyError)
        made: KittyError = (kind if known else KittyError)(self.text)
        return made


ANSWERS: dict[Verb, Any] = {
    Verb.OPEN: Snapshot,
    **dict.fromkeys((Verb.START, Verb.RESTART, Verb.SWITCH, Verb.STOP, Verb.ATTACH), ServerState),
    Verb.CHECK: HealthCheckResult,
    Verb.MEMORY: MemoryUse | None,
    Verb.PREVIEW: MemoryPreview,
    Verb.PIN: Pin,
    Verb.LOG: tuple[str, ...],
    Verb.SCAN: ScanStep,
    Verb.NOTES: dict[Path, ModelNote],
    Verb.FAVORITE: NoneType,
    Verb.FITS: dict[Path, Verdict],
}
EVENTS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


# Names that the modules of these types import for type checkers only.
_NAMES = {
    kind.__name__: kind
    for kind in (Mapping, Model, Path, PortOwner, Request, ServerConfig, Store, Task)
}


@cache
def _adapter(of: Any) -> TypeAdapter[Any]:
    # Deferred until the names are known. That takes a config, which a dataclass can't be given, but
    # a tuple of it can.
    adapter = TypeAdapter[Any](tuple[of], config=ConfigDict(defer_build=True))
    adapter.rebuild(_types_namespace=_NAMES)
    return adapter


def dump(value: object, of: Any) -> Any:
    """Return a value in JSON types; secrets are included only in commands."""
    return _adapter(of).dump_python((value,), mode="json")[0]


def load(data: Any, of: Any) -> Any:
    """Return the value that `dump` converted to data.

    Raises:
        ValueError: The data is not such a value.
    """
    return _adapter(of).validate_python((data,))[0]


def line(kind: str, about: object = None, data: object = None) -> bytes:
    """Encode a line."""
    return json.dumps([kind, about, data], separators=(",", ":")).encode() + b"\n"


def parse(text: bytes | bytearray) -> tuple[str, Any, Any]:
    """Decode a line.

    Raises:
        ValueError: It is not a line of the protocol.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError(error) from None
    match found:
        case [str(kind), about, data]:
            return kind, about, data
    raise ValueError(f"not a line of the protocol: {text[:80]!r}")
