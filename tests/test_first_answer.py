"""READY means that the server has answered a request, not only that `/health` is good."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import eventually

from kitty_nb import ModelManager, ServerConfig, ServerStatus
from kitty_nb.errors import ServerFailedError
from kitty_nb.supervisor.events import Activity, HealthChecked

Misbehaving = Callable[..., ServerConfig]


def tokens_computed(manager: ModelManager) -> float:
    """The server's own counts, of prompts and answers, since it was started."""
    lines = manager.http.get("/metrics").text.splitlines()
    counts = dict(line.split() for line in lines if not line.startswith("#"))
    return float(counts["llamacpp:prompt_tokens_total"])


def activities(manager: ModelManager) -> list[str]:
    said: list[str] = []
    manager.subscribe(lambda event: isinstance(event, Activity) and said.append(event.message))
    return said


def test_a_server_that_fails_each_request_is_not_ready(misbehaving: Misbehaving) -> None:
    config = misbehaving("--fail-requests", "Compute error.")
    with ModelManager(config=config) as manager:
        with pytest.raises(ServerFailedError, match=r"failed its first request: Compute error\. "):
            manager.start().wait(30)
        assert manager.state.status is ServerStatus.FAILED
        assert manager.state.pid is None


def test_what_the_error_names_is_explained(misbehaving: Misbehaving) -> None:
    config = misbehaving("--fail-requests", "vk::Queue::submit: ErrorDeviceLost")
    with (
        ModelManager(config=config) as manager,
        pytest.raises(ServerFailedError, match="The GPU reported a fault"),
    ):
        manager.start().wait(30)


def test_a_slow_first_answer_is_waited_for_with_words(misbehaving: Misbehaving) -> None:
    config = misbehaving("--first-answer", "3.5", health_max_attempts=2, stall_seconds=60)
    with ModelManager(config=config) as manager:
        said, counts = activities(manager), []
        manager.subscribe(
            lambda event: (
                counts.append((event.attempt, event.max_attempts))
                if isinstance(event, HealthChecked)
                else None
            )
        )
        state = manager.start().wait(30)
        assert state.status is ServerStatus.READY
        waiting = [line for line in said if "waiting for its first answer" in line]
        assert 2 <= len(waiting) <= 5
        assert all(attempt <= most for attempt, most in counts)


def test_a_first_answer_that_never_comes_is_a_stall(misbehaving: Misbehaving) -> None:
    config = misbehaving("--first-answer", "60", stall_seconds=2)
    with (
        ModelManager(config=config) as manager,
        pytest.raises(ServerFailedError, match="used no CPU time"),
    ):
        manager.start().wait(30)


def test_another_clients_answer_will_do(misbehaving: Misbehaving) -> None:
    with ModelManager(config=misbehaving("--first-answer", "60", "--tokens", "3")) as manager:
        assert manager.start().wait(30).status is ServerStatus.READY


def test_stop_does_not_wait_for_it(misbehaving: Misbehaving) -> None:
    with ModelManager(config=misbehaving("--first-answer", "60")) as manager:
        said = activities(manager)
        manager.start()
        eventually(lambda: any("first answer" in line for line in said))
        assert manager.stop().wait(5).status is ServerStatus.STOPPED


def test_nothing_is_said_of_a_load_that_is_being_stopped(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    mark = tmp_path / "tidied"
    with ModelManager(config=misbehaving("--never-ready", "--tidy-up", str(mark))) as manager:
        said = activities(manager)
        manager.start()
        eventually(lambda: any("Loading model" in line for line in said))
        manager.stop().wait(20)
        assert mark.exists()
        assert said[said.index("Server stopping…") :] == ["Server stopping…", "Server stopped."]


@pytest.mark.parametrize("flags", ["--metrics", "--metrics --embedding", "--metrics --rerank"])
def test_each_kind_of_server_is_asked_once(
    config: ServerConfig, engine: Path | None, flags: str
) -> None:
    config = config.replace(binary=engine, extra_args=flags)
    with ModelManager(config=config) as manager:
        manager.start().wait(60)
        computed = tokens_computed(manager)
        assert 0 < computed < 20
        with ModelManager(config=config) as other:
            eventually(lambda: other.state.status is ServerStatus.READY)
            assert other.state.pid == manager.state.pid
            assert tokens_computed(manager) == computed


def test_a_later_request_without_a_token_is_spoken_of(
    misbehaving: Misbehaving, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kitty_nb.supervisor.health._SILENT", 1.5)
    answer = tmp_path / "answer"
    os.mkfifo(answer)  # the server waits until somebody writes
    with ModelManager(config=misbehaving("--chat", str(answer))) as manager:
        said = activities(manager)
        manager.start().wait(30)
        with manager.http.stream("POST", "/v1/chat/completions", json={}):
            eventually(lambda: any("has produced no token" in line for line in said))
            answer.write_text("")
        eventually(
            lambda: any(line.startswith("The server is answering again after") for line in said)
        )
        (waiting,) = [line for line in said if "has produced no token" in line]
        assert "compiling kernels" in waiting
