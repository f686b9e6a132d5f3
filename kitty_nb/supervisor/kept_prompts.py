"""Prompts on disk: what a server's slots held, and when another server may restore it.

The engine writes a state, `KEY.state`; its record is beside it in `KEY.json`, which is written
last: a state without one is incomplete.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError

from kitty_nb.engine.command_line import options_of
from kitty_nb.safe_files import distrust, write_atomic
from kitty_nb.supervisor.history import gather_facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from kitty_nb.config import ServerConfig
    from kitty_nb.engine.locate import Engine

_STATE, _ABOUT, _USELESS = ".state", ".json", ".useless"
_MODEL, _BUILD = "the model's file", "llama-server"
# Flags that change neither the contents of a state nor how it is read.
_NEUTRAL = {"--n-predict", "--temp", "--top-p", "--repeat-penalty", "--threads", "--threads-batch"}
_OURS = re.compile(r"\.?[0-9a-f]{16,32}\.(?:state|json|useless)\b")
_READ_AT_ONCE, _LONGEST = 1 << 20, 1 << 16  # bytes; the latter of a prompt's record
_ABANDONED_AFTER = 600.0  # seconds; writing a state does not take that long
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class KeptPrompt(BaseModel):
    """The record of a prompt on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    key: str  # the name of its files, without a suffix
    name: str = ""  # the name that a program gave it; empty for one kept automatically
    profile: str  # the profile whose server held it
    model: str  # the model's name, for people
    slot: _Count  # the slot that held it
    tokens: _Count  # its length
    size: _Count = 0  # bytes of its state
    checksum: _Count = 0  # of its state
    source: str = ""  # digest of the text that it was made of; empty for one kept automatically
    # Digest of the process and the request that made it: if several programs watch a server, only
    # one of them keeps it.
    request: str = ""
    facts: dict[str, str]  # digests of what it depends on, by name for people
    # When it was saved, in seconds since the epoch.
    at: Annotated[float, Field(ge=0, lt=1 << 33)] = 0.0
    # Seconds that reading it took, or would take; None if unknown.
    reading: NonNegativeFloat | None = None

    def changed(self, facts: Mapping[str, str]) -> list[str]:
        """Return the names of the facts that differ and thus forbid its use."""
        return [name for name in {**self.facts, **facts} if self.facts.get(name) != facts.get(name)]

    def replaces(self, other: KeptPrompt) -> bool:
        """Return whether it replaces another of the same name, or of the same slot and model."""
        if self.name or other.name:
            return (self.name, self.facts) == (other.name, other.facts)
        return (self.profile, self.model, self.slot) == (other.profile, other.model, other.slot)


def state_facts(config: ServerConfig, engine: Engine) -> dict[str, str]:
    """Return digests of what the states of a server depend on, by name for people. It blocks.

    The settings are those that `resolve_model` returns.
    """
    model = gather_facts(config)
    facts = {
        _MODEL: digest_of(model.size, model.mtime_ns, model.digest),
        _BUILD: digest_of(engine.kind, engine.version, _stamp(engine.command[0])),
    }
    for flag, value in options_of(config):
        if flag not in _NEUTRAL:
            # A flag may occur several times, as that of an adapter may.
            facts[flag] = digest_of(facts.get(flag), value, _stamp(value))
    return facts


def digest_of(*parts: object) -> str:
    """Return a digest of some values: states may depend on secrets."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _stamp(file: str) -> tuple[int, int] | None:
    """Return what changes with a file; None if a word names none."""
    try:
        found = Path(file).stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True, slots=True)
class PromptStore:
    """A folder of prompts. Its methods block."""

    folder: Path  # the folder; only its owner may look into it
    budget: float  # the maximum number of bytes of all prompts together

    @classmethod
    def of(cls, config: ServerConfig) -> Self:
        """Return the store of a profile."""
        return cls(config.prompts_dir, config.keep_prompts_gb * 1e9)

    @property
    def doubt(self) -> str | None:
        """Why others could have changed the folder's contents, if they could."""
        return f"{self.folder} is a link." if self.folder.is_symlink() else distrust(self.folder)

    def prepare(self) -> str | None:
        """Create the folder; return why it can't be used, if so.

        Raises:
            OSError: It can't be created.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if doubt := self.doubt:
            return doubt
        self.folder.chmod(0o700)
        self._sweep()
        return None

    def prompts(self) -> list[KeptPrompt]:
        """Return the prompts, newest first; none from a folder that others can write to."""
        try:
            return sorted(self._read(), key=lambda prompt: prompt.at, reverse=True)
        except OSError:  # out of file descriptors, for one
            return []

    def _read(self) -> Iterator[KeptPrompt]:
        for about in self.folder.glob(f"*{_ABOUT}") if not self.doubt else ():
            with suppress(OSError, ValidationError):
                if not _is_plain(about) or about.stat().st_size > _LONGEST:
                    continue
                prompt = KeptPrompt.model_validate_json(about.read_bytes())
                if prompt.key == about.stem and not distrust(about, folders=False):
                    yield prompt

    def new_key(self) -> str:
        """Return a name that no other state has."""
        return secrets.token_hex(8)

    def state(self, key: str) -> Path:
        """Return the path of a state."""
        return self.folder / f"{key}{_STATE}"

    def intact(self, prompt: KeptPrompt) -> bool | None:
        """Return whether a state is still what was saved; None if it can't be read now."""
        state = self.state(prompt.key)
        try:
            whole = _is_plain(state) and state.stat().st_size == prompt.size
            return whole and _checksum(state) == prompt.checksum
        except FileNotFoundError:
            return False
        except OSError:  # out of file descriptors, for one, or a network drive that is gone
            return None

    def add(self, prompt: KeptPrompt) -> KeptPrompt | None:
        """Keep a state that the engine has written, replacing the last one of its kind.

        Older ones are deleted if there are too many.

        Returns:
            The prompt as kept; None if it alone is larger than the budget.

        Raises:
            OSError: It can't be read or written.
        """
        state = self.state(prompt.key)
        try:
            state.chmod(0o600)
            size = state.stat().st_size
            if size > self.budget:
                self.discard(prompt.key)
                return None
            prompt = prompt.model_copy(
                update={"size": size, "checksum": _checksum(state), "at": time.time()}
            )
            # It replaces only what was there before its own record: otherwise, two programs that
            # save the same prompt at once could each delete the other's.
            others = self.prompts()
            about = self.folder / f"{prompt.key}{_ABOUT}"
            write_atomic(about, prompt.model_dump_json().encode(), durable=False)
        except BaseException:
            self.discard(prompt.key)
            raise
        self._make_room(prompt, others)
        return prompt

    def _make_room(self, newest: KeptPrompt, others: Iterable[KeptPrompt]) -> None:
        total = newest.size
        for prompt in others:
            total += prompt.size
            if newest.replaces(prompt) or total > self.budget:
                total -= prompt.size
                self.discard(prompt.key)
        self._sweep()

    def _sweep(self) -> None:
        """Delete states of programs that were killed before they could write a record."""
        for state in self.folder.glob(f"*{_STATE}"):
            with suppress(OSError):
                old = time.time() - state.stat().st_mtime > _ABANDONED_AFTER
                if old and not state.with_suffix(_ABOUT).exists():
                    state.unlink()

    def discard(self, key: str) -> bool:
        """Delete the files of a prompt if possible; return whether there was a record of it."""
        about = self.folder / f"{key}{_ABOUT}"
        there = about.exists()
        with suppress(OSError):
            self._delete(key)
        return there

    def _delete(self, key: str) -> None:
        for ending in (_ABOUT, _STATE):  # the state last: without a record, it counts as none
            (self.folder / f"{key}{ending}").unlink(missing_ok=True)

    def clear(self, prompts: Iterable[KeptPrompt], *, whole: bool) -> None:
        """Delete prompts; with `whole`, also any other file of ours in the folder.

        Raises:
            OSError: A file can't be deleted.
        """
        for prompt in prompts:
            self._delete(prompt.key)
        for file in self.folder.glob("*") if whole and not self.doubt else ():
            if _OURS.match(file.name):
                file.unlink(missing_ok=True)

    def is_useless(self, facts: Mapping[str, str]) -> bool:
        """Return whether this build has been found unable to keep prompts of this model."""
        with suppress(OSError):
            return self._useless(facts).exists()
        return False

    def note_useless(self, facts: Mapping[str, str]) -> None:
        """Remember that this build cannot keep prompts of this model."""
        with suppress(OSError):
            self._useless(facts).touch(mode=0o600)

    def _useless(self, facts: Mapping[str, str]) -> Path:
        named = [facts.get(name) for name in (_MODEL, _BUILD, "--swa-full")]
        return self.folder / f"{digest_of(*named)}{_USELESS}"


def _is_plain(file: Path) -> bool:
    """Return whether reading a file can neither block nor lead elsewhere."""
    return file.is_file() and not file.is_symlink()


def _checksum(file: Path) -> int:
    """Return a file's CRC-32, which detects damage five times as fast as a cryptographic hash."""
    found = 0
    with file.open("rb") as opened:
        while part := opened.read(_READ_AT_ONCE):
            found = zlib.crc32(part, found)
    return found
