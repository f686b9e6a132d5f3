from __future__ import annotations

import json
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
import httpx
import psutil
import pytest
from conftest import LOCAL, eventually
from ipywidgets.embed import embed_data

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerStatus
from kitty_nb.client import Access
from kitty_nb.errors import ConfigError, EngineError, KittyError
from kitty_nb.supervisor.registry import read_record, record_path

QUESTION = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
CHAT = "/v1/chat/completions"


@contextmanager
def squatter(port: int) -> Iterator[list[tuple[str, str | None]]]:
    """Take a port and say that all is well; yields each path asked for, and with which key."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "demo"}]}')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


def test_only_who_has_the_key_is_answered(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.client.protocol.find_spec", lambda _name: None)  # no openai
    with ModelManager(config=config) as manager:
        with pytest.raises(KittyError, match="The server is STOPPED"):
            _ = manager.client
        manager.start().wait(30)
        url = manager.state.endpoint + CHAT
        assert httpx.post(url, json=QUESTION, **LOCAL).status_code == 401
        assert manager.http.post(CHAT, json=QUESTION).status_code == 200
        assert manager.http is manager.http
        assert manager.client is manager.http
        assert manager.base_url == f"{manager.state.endpoint}/v1"
        assert manager.check_health().wait(10).slots_total == 1

        async def ask() -> int:
            async with manager.async_client as client:
                return int((await client.post(CHAT, json=QUESTION)).status_code)

        assert anyio.run(ask) == 200


def test_the_key_is_nowhere_but_in_the_record(config: ServerConfig) -> None:
    config = config.replace(extra_args=("--verbose",))
    manager = ModelManager(config=config)
    panel = ControlPanel(manager=manager)
    try:
        manager.start().wait(30)
        key = manager.reveal_api_key()
        assert key
        assert len(key) >= 32
        assert manager.http.post(CHAT, json=QUESTION).status_code == 200
        assert manager.state.pid
        shown = [
            *psutil.Process(manager.state.pid).cmdline(),
            repr(manager),
            repr(manager.state),
            repr(manager.http),
            repr(panel),
            repr(Access("http://localhost", manager._supervisor.api_key)),
            repr(read_record(config)),
            read_record(config).model_dump_json(),  # type: ignore[union-attr]
            json.dumps(embed_data([panel]), default=repr),  # what a saved notebook holds
            "\n".join(manager.log_lines),
        ]
        assert not any(key in text for text in shown)
        holding = []
        for path in config.log_dir.parent.rglob("*"):
            with suppress(FileNotFoundError, IsADirectoryError):  # SQLite's come and go
                if key.encode() in path.read_bytes():
                    holding.append(path)
        assert holding == [record_path(config)]
        assert stat.S_IMODE(record_path(config).stat().st_mode) == 0o600
    finally:
        panel.close()
        manager.close()


def test_a_key_of_ones_own(config: ServerConfig, tmp_path: Path) -> None:
    env = tmp_path / "own.env"
    env.write_text("LLAMACPP_API_KEY=sesame-open\n")
    chosen = ServerConfig.from_env(env).api_key
    assert chosen
    assert chosen.get_secret_value() == "sesame-open"
    assert "sesame" not in repr(ServerConfig.from_env(env))
    with ModelManager(config=config.replace(api_key="sesame-open")) as manager:
        manager.start().wait(30)
        headers = {"Authorization": "Bearer sesame-open"}
        url = manager.state.endpoint + CHAT
        answer = httpx.post(url, json=QUESTION, headers=headers, **LOCAL)
        assert answer.status_code == 200
        with ModelManager(config=config.replace(api_key="sesame-open")) as other:
            state = other.start().wait(30)
            assert state.pid == manager.state.pid  # its settings, key included, are the same


@pytest.mark.parametrize(
    "line",
    ["LLAMACPP_API_KEY='sesame-open", 'LLAMACPP_EXTRA_ARGS="--api-key sesame-open it\'s"'],
)
def test_a_complaint_does_not_repeat_what_may_be_a_key(line: str, tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text(f"{line}\n")
    with pytest.raises(ConfigError) as caught:
        ServerConfig.from_env(env)
    assert "sesame" not in str(caught.value)
    assert line.partition("=")[0] in str(caught.value)


def test_no_key_when_none_is_wanted(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_API_KEY", "meant for another server")
    with ModelManager(config=config.replace(api_key="none")) as manager:
        manager.start().wait(30)
        assert manager.reveal_api_key() is None
        url = manager.state.endpoint + CHAT
        assert httpx.post(url, json=QUESTION, **LOCAL).status_code == 200
        assert manager.http.post(CHAT, json=QUESTION).status_code == 200


def test_without_a_key_the_pages_of_others_are_kept_out(
    config: ServerConfig, engine: Path | None
) -> None:
    with ModelManager(config=config.replace(api_key="none", binary=engine)) as manager:
        manager.start().wait(60)
        url = manager.state.endpoint + "/v1/models"

        def allowed(origin: str) -> str | None:
            answer = httpx.get(url, headers={"Origin": origin}, **LOCAL)
            return answer.headers.get("Access-Control-Allow-Origin")

        assert allowed("https://evil.example") not in {"https://evil.example", "*"}
        assert allowed("http://localhost:8888") == "http://localhost:8888"


def test_a_build_that_lets_every_page_in_without_a_key_is_told_of(
    misbehaving: Callable[..., ServerConfig],
) -> None:
    said: list[str] = []
    with ModelManager(config=misbehaving(api_key="none")) as manager:
        manager.subscribe(lambda event: said.append(str(event)))
        manager.start().wait(30)
    assert any("any web page that you open" in event for event in said)


def test_another_manager_has_the_key_too(config: ServerConfig) -> None:
    with ModelManager(config=config) as manager, ModelManager(config=config) as other:
        manager.start().wait(30)
        eventually(lambda: other.state.status is ServerStatus.READY)
        assert other.reveal_api_key() == manager.reveal_api_key()
        assert other.http.post(CHAT, json=QUESTION).status_code == 200


def test_a_server_started_again_keeps_its_key(
    misbehaving: Callable[..., ServerConfig],
) -> None:
    with ModelManager(config=misbehaving(restart_delay_seconds=0)) as manager:
        manager.start().wait(30)
        key, pid = manager.reveal_api_key(), manager.state.pid
        assert pid
        psutil.Process(pid).kill()
        eventually(lambda: manager.state.pid not in {pid, None})
        eventually(lambda: manager.state.status is ServerStatus.READY)
        assert manager.reveal_api_key() == key
        manager.restart().wait(30)
        assert manager.http.get("/slots").status_code == 200


@pytest.mark.parametrize("changes", [{}, {"idle_shutdown_seconds": 60}])
def test_who_takes_the_port_before_our_server_does_is_not_told_the_key(
    misbehaving: Callable[..., ServerConfig], changes: dict[str, int]
) -> None:
    config = misbehaving("--bind-after", "30", api_key="sesame-open", **changes)
    with ModelManager(config=config) as manager:
        manager.start(wait_for_ready=False)
        eventually(lambda: manager.state.pid is not None)
        with squatter(config.port) as asked:
            eventually(lambda: len(asked) > 3)
            assert manager.check_health().wait(10).status is ServerStatus.STARTING
            assert manager.state.status in {ServerStatus.STARTING, ServerStatus.LOADING}
            assert {*asked} == {("/health", None)}
            manager.stop(force=True).wait(10)
    assert {*asked} == {("/health", None)}


def test_our_own_server_is_asked_for_its_health_without_the_key(
    misbehaving: Callable[..., ServerConfig], tmp_path: Path
) -> None:
    told = tmp_path / "told"
    with ModelManager(config=misbehaving("--tell-keys", str(told))) as manager:
        manager.start().wait(30)
        assert manager.check_health().wait(10).slots_total == 1
    lines = told.read_text().splitlines()
    assert "/health no key" in lines
    assert "/slots key" in lines
    assert "/health key" not in lines


@pytest.mark.parametrize("ready", [True, False])
def test_a_key_is_used_again_only_after_a_start_that_became_ready(
    misbehaving: Callable[..., ServerConfig], ready: bool
) -> None:
    config = misbehaving(*(() if ready else ("--never-ready",)))
    with ModelManager(config=config) as manager:
        manager.start(wait_for_ready=ready).wait(30)
        eventually(lambda: manager.state.pid)
        key = manager.reveal_api_key()
        manager.stop().wait(10)
        manager.start(misbehaving()).wait(30)
        assert (manager.reveal_api_key() == key) is ready


@pytest.mark.parametrize("key", ["two words", "one,two", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_repeated(tmp_path: Path, key: str) -> None:
    env = tmp_path / "bad.env"
    env.write_text(f"LLAMACPP_API_KEY='{key}'\n")
    with pytest.raises(ConfigError, match=r"LLAMACPP_API_KEY.*HTTP header") as caught:
        ServerConfig.from_env(env)
    assert key not in str(caught.value) + repr(caught.value.problems)


def test_a_key_among_the_flags_is_refused_and_not_repeated(config: ServerConfig) -> None:
    with ModelManager(config=config.replace(extra_args=("--api-key", "sesame"))) as manager:
        with pytest.raises(KittyError, match="set LLAMACPP_PRIMARY_API_KEY instead") as caught:
            manager.start().wait(30)
        assert "sesame" not in str(caught.value)
    assert issubclass(EngineError, KittyError)


def test_openai_is_used_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openai.py").write_text(
        "class OpenAI:\n    def __init__(self, **given): self.given = given\n"
        "class AsyncOpenAI(OpenAI): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openai", raising=False)  # that of another test
    access = Access("http://127.0.0.1:1", None)
    with access.http() as http:
        client = access.openai(http)
        assert client.given == {
            "base_url": "http://127.0.0.1:1/v1",
            "api_key": "none",
            "http_client": http,
        }
    assert type(access.openai(access.async_http())).__name__ == "AsyncOpenAI"
    del sys.modules["openai"]


def test_no_repr_shows_a_key_among_the_flags() -> None:
    config = ServerConfig(extra_args=("--api-key", "sesame-open"))
    assert "sesame" not in repr(config) + str(config)
