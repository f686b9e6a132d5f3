"""Faults and their effect on a server: one row says it, and the rest is the same for all rows."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import eventually
from other_kernel import runs

from kitty_nb import ModelManager, ServerConfig, ServerStatus
from kitty_nb.errors import KittyError
from kitty_nb.supervisor.events import Activity, Event, LogLines
from kitty_nb.supervisor.process import ServerProcess
from kitty_nb.supervisor.registry import record_path

READY, LOADING, STOPPED = ServerStatus.READY, ServerStatus.LOADING, ServerStatus.STOPPED
FAILED, CRASHED = ServerStatus.FAILED, ServerStatus.CRASHED


class Case:
    """One server that something happens to.

    Attributes:
        config: What is started. The model is a copy, in `folder / "models"`.
        folder: For this case alone.
        manager: There from the start on.
        heal: What takes the fault away again, run before the next start.
        last: What is run when all is over, however it went.
        other: The server of another kernel, where there is one.
    """

    manager: ModelManager
    other: int

    def __init__(self, config: ServerConfig, folder: Path, stand_in: Path, last: ExitStack) -> None:
        assert config.model
        (folder / "models").mkdir()
        self.model = Path(shutil.copy(config.model, folder / "models" / "m.gguf"))
        self.config = config.replace(
            models_dir=self.model.parent, model=self.model, restart_max=0, stop_grace_seconds=1
        )
        self.healthy = config.replace(binary=stand_in)
        self.folder = folder
        self.stand_in = stand_in
        self.last = last
        self.heal = last.enter_context(ExitStack())

    @property
    def pid(self) -> int:
        pid = self.manager.state.pid
        assert pid
        return pid

    def change(self, **changes: Any) -> None:
        self.config = self.config.replace(**changes)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def at_spawn(self, act: Callable[[], object]) -> None:
        """Let something happen between the last check and the launch."""
        spawn = ServerProcess.spawn

        def late(*args: Any, **more: Any) -> ServerProcess:
            act()
            return spawn(*args, **more)

        patch = self.heal.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(ServerProcess, "spawn", late)


def nothing(_: Case) -> None:
    """Something that the settings of the row do alone."""


@dataclass(frozen=True)
class Fault:
    """A fault, and what becomes of the server.

    Attributes:
        name: What goes wrong, in words.
        status: The state that it leads to.
        says: A pattern in what the user is told: the error, or while it runs on its activities
            and log.
        flags: How the stand-in misbehaves; None for the real engine.
        before: Done before the start is asked for.
        at: The state in which `strike` is done.
        strike: The fault, when it comes later.
        within: Seconds from the fault to state and sentence.
        changes: Of the settings.
    """

    name: str
    status: ServerStatus
    says: str = ""
    flags: tuple[str, ...] | None = None
    before: Callable[[Case], object] = nothing
    at: ServerStatus | None = None
    strike: Callable[[Case], object] = nothing
    within: float = 30.0
    changes: dict[str, Any] = field(default_factory=dict)

    def check(self, config: ServerConfig, folder: Path, stand_in: Path) -> None:
        """Let it happen; the state, the sentence and the time are right and nothing is left."""
        with ExitStack() as last:
            case = Case(config, folder, stand_in, last)
            self._happens_to(case)
        _leaves_nothing(case)

    def _happens_to(self, case: Case) -> None:
        if self.flags is not None:
            case.change(binary=case.stand_in, extra_args=self.flags)
        case.change(**self.changes)
        self.before(case)
        told: deque[str] = deque(maxlen=10_000)
        pids: set[int] = set()

        def listen(event: Event) -> None:
            if isinstance(event, Activity):
                told.append(event.message)
            elif isinstance(event, LogLines):
                told.extend(event.lines)
            if pid := case.manager.state.pid:
                pids.add(pid)

        def outcome() -> tuple[ServerStatus, str]:
            state = case.manager.state
            if state.status.idle and state.error:
                return state.status, state.error
            if state.status.idle and start.done:
                return state.status, _error(start.wait)
            return state.status, "\n".join(told)

        def there() -> bool:
            status, said = outcome()
            return status is self.status and re.search(self.says, said) is not None

        with ModelManager(config=case.config) as case.manager:
            case.manager.subscribe(listen)
            start = case.manager.start()
            if self.at:
                eventually(lambda: case.manager.state.status is self.at, why=f"{outcome()}")
                told.clear()
                self.strike(case)
            struck = time.monotonic()
            while not there():
                if time.monotonic() > struck + self.within:
                    pytest.fail(f"{self.status} {self.says!r}, not {outcome()}")
                time.sleep(0.01)
            if self.at is not READY and self.status in {FAILED, CRASHED}:
                assert _error(start.wait) == case.manager.state.error
            case.heal.close()
            if self.status is READY:
                eventually(lambda: case.manager.check_health().wait(60).status is READY)
            again = case.manager.restart(case.healthy).wait(60)
            assert again.status is READY
            assert case.manager.stop().wait(60).status is STOPPED
        assert not {pid for pid in pids if runs(pid)}


def _leaves_nothing(case: Case) -> None:
    assert not record_path(case.healthy).exists()
    names = {path.name for path in case.healthy.log_dir.iterdir()}
    logs = {f"primary.log.{age}" for age in (1, 2, 3)}
    assert names <= {"primary.lock", "primary.sidecar.lock", "primary.log", "prompts", *logs}
    for process in psutil.process_iter(["cmdline"]):
        assert str(case.folder) not in " ".join(process.info["cmdline"] or ())


def _error(wait: Callable[[], object]) -> str:
    try:
        wait()
    except KittyError as error:
        return str(error)
    return ""
