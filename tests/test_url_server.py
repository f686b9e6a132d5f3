"""Profiles with the URL of an existing server."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import yaml
from conftest import busy, eventually, unused_port
from IPython.core.interactiveshell import InteractiveShell
from stand_in_openai import Shape, certificate, ollama_models, tls_front, vllm_models
from terminal import run
from traitlets.config import Config

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerStatus
from kitty_nb.cli.doctor import Verdict, examine
from kitty_nb.client.embeddings import embed
from kitty_nb.config.profiles import configured_profiles, env_warnings
from kitty_nb.errors import ConfigError, ExperimentError, KittyError, ServerError, ServerFailedError
from kitty_nb.experiments import Bench, Sweep, load_test, tune
from kitty_nb.operation import Operation
from kitty_nb.supervisor import external_server
from kitty_nb.supervisor.events import Activity, Event, Level, StateChanged
from kitty_nb.supervisor.external_server import look_once
from kitty_nb.widgets import FleetPanel

KEY = "sesame-open"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_server, "_ASK_EVERY", 0.05)


@pytest.fixture
def ollama() -> Iterator[tuple[Shape, str]]:
    shape = Shape(ollama_models("nomic-embed-text:latest", "llama3.2:latest", "qwen3:8b"))
    with shape.serving() as url:
        yield shape, url


def written(folder: Path, *lines: str) -> Path:
    path = folder / "my.env"
    head = f"LLAMACPP_MODELS_DIR={folder}\nLLAMACPP_LOG_DIR={folder / 'logs'}\n"
    path.write_text(head + "".join(f"{line}\n" for line in lines))
    return path


def settled(manager: ModelManager, status: ServerStatus) -> None:
    eventually(lambda: manager.state.status is status, why=f"{status}: {manager.state}")


@pytest.mark.parametrize(
    "text",
    ["https://gpu.example/openai/v1/", "https://gpu.example/openai", "https://gpu.example/openai/"],
)
def test_an_address_is_written_with_or_without_what_clients_add(text: str) -> None:
    config = ServerConfig(url=text)
    assert config.endpoint == "https://gpu.example/openai"
    assert config.replace(url=None).endpoint == "http://127.0.0.1:8082"


@pytest.mark.parametrize(
    "text",
    [
        "gpu.example:8080",
        "ftp://gpu.example",
        "http://",
        "http://gpu.example:x",
        "https://me:hush-hush@gpu.example",
        "https://gpu.example/v1?key=1",
        "https://a b/",
    ],
)
def test_what_is_no_address_is_refused_without_its_password(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ServerConfig(url=text)
    assert "hush-hush" not in str(refused.value)


def test_a_key_goes_only_where_it_was_written_for(tmp_path: Path) -> None:
    env = written(
        tmp_path,
        "LLAMACPP_API_KEY=of-my-own-servers",
        "LLAMACPP_GPU_URL=http://gpu.example/v1",
        "LLAMACPP_BOX_URL=http://gpu.example/v1",
        f"LLAMACPP_BOX_API_KEY={KEY}",
        "LLAMACPP_SAFE_URL=https://gpu.example/v1",
        f"LLAMACPP_SAFE_API_KEY={KEY}",
    )
    assert configured_profiles(env) == ("gpu", "box", "safe")
    assert ServerConfig.from_env(env, "gpu").api_key is None
    assert ServerConfig.from_env(env, "primary").api_key
    assert ServerConfig.from_env(env, "box").api_key
    (not_sent,) = env_warnings(env, "gpu")
    assert "LLAMACPP_API_KEY is not sent to LLAMACPP_GPU_URL" in not_sent
    (unencrypted,) = env_warnings(env, "box")
    assert "travels there unencrypted" in unencrypted
    assert env_warnings(env, "safe") == env_warnings(env, "primary") == ()


# httpcore leaves a connection that is cancelled within its handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_real_server_behind_tls(
    config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl, for a certificate")
    pem = certificate(tmp_path)
    with ModelManager(config=config.replace(api_key=KEY)) as there:
        there.start().wait(60)
        with tls_front(pem, config.port) as url:
            here = config.replace(profile="gpu", url=url, api_key=KEY, model=None, alias=None)
            with ModelManager(config=here) as manager:
                settled(manager, ServerStatus.OUT_OF_REACH)
                assert "SSL_CERT_FILE" in manager.state.sentence
                with pytest.raises(ServerFailedError, match="certificate"):
                    manager.start().wait(60)
            monkeypatch.setenv("SSL_CERT_FILE", str(pem))
            with ModelManager(config=here) as manager:
                state = manager.start().wait(60)  # it is there: nothing is started
                assert (state.status, state.alias, state.pid) == (ServerStatus.READY, "demo", None)
                answer = manager.chat("Hello", max_tokens=4).wait(60)
                assert answer.usage.answer == 4
                assert manager.client.models.list().data[0].id == "demo"
                other = here.replace(url=url.replace("127.0.0.1", "localhost"))
                mismatch = str(anyio.run(look_once, other).error)
                assert "can't be verified" in mismatch
                assert "SSL_CERT_FILE" not in mismatch
                wrong = anyio.run(look_once, here.replace(api_key="another"))
                assert wrong.status is ServerStatus.OUT_OF_REACH
                assert "refuses the key in LLAMACPP_GPU_API_KEY" in str(wrong.error)
                for refused in (manager.stop, manager.restart):
                    with pytest.raises(ServerFailedError, match="did not start the server at http"):
                        refused().wait(60)
                assert there.stop().wait(60).status is ServerStatus.STOPPED
                settled(manager, ServerStatus.OUT_OF_REACH)
                with pytest.raises(KittyError, match="can't be used"):
                    manager.chat("Hello")
                there.start().wait(60)
                settled(manager, ServerStatus.READY)
                assert KEY not in repr(manager.state)
        assert there.check_health().wait(60).status is ServerStatus.READY
    gc.collect()


def test_one_that_speaks_like_ollama(ollama: tuple[Shape, str]) -> None:
    shape, url = ollama
    with ModelManager(config=ServerConfig(url=f"{url}/v1")) as manager:
        settled(manager, ServerStatus.READY)
        answer = manager.chat("Why?", on_progress=print).wait(30)
        assert (answer.text, answer.thinking, answer.usage.answer) == ("Blue sky.", "Hm.", 5)
        assert (answer.usage.prompt, answer.finish_reason) == (11, "stop")
        asked = shape.posts[-1][2]
        assert asked["model"] == "llama3.2:latest"  # the one before is for embeddings
        assert "return_progress" not in asked
        manager.switch_model("qwen3:8b").wait(30)
        assert manager.state.alias == "qwen3:8b"
        manager.chat("Why?").wait(30)
        assert shape.posts[-1][2]["model"] == "qwen3:8b"
        with pytest.raises(ServerFailedError, match=r"has no model 'gemma'\. Its models: nomic"):
            manager.switch_model("gemma").wait(30)
        vectors = manager.embed(["a", "b"]).wait(30)
        assert np.array_equal(vectors, np.array([[0.5, 0], [0.5, 1]], np.float32))
        with pytest.raises(KittyError, match="has no /tokenize"):
            manager.tokenize("Hello").wait(30)

        async def embed_by_another() -> None:
            async with manager.access.async_http() as http:
                await embed(http, ["a"], 1, print, model="unknown")

        with pytest.raises(ServerError, match="try pulling it first"):
            anyio.run(embed_by_another)
        assert {key for _, key, _ in shape.seen} == {None}


def said(told: list[Event], level: Level) -> list[str]:
    return [one.message for one in told if isinstance(one, Activity) and one.level is level]


def test_a_model_that_is_pulled_meanwhile_is_not_asked_instead(ollama: tuple[Shape, str]) -> None:
    shape, url = ollama
    told: list[Event] = []

    def listed(*names: str) -> None:
        shape.models = ollama_models(*names)
        count = len(shape.seen)
        eventually(lambda: len(shape.seen) > count + 2)

    with ModelManager(config=ServerConfig(url=url)) as manager:
        settled(manager, ServerStatus.READY)
        manager.subscribe(told.append)
        listed("new:latest", "llama3.2:latest")  # Ollama lists the newest first
        assert manager.state.alias == "llama3.2:latest"
        listed()
        assert manager.state.doubt == "It lists no models. Load 'llama3.2:latest' there."
        assert not said(told, Level.WARNING)
        listed("new:latest")
        assert manager.state.alias == "new:latest"
        (change,) = said(told, Level.WARNING)
        assert "no longer lists llama3.2:latest. Requests now go to the model new:" in change


def test_one_that_loads_is_waited_for_without_a_flood_of_warnings() -> None:
    loading = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
    shape = Shape(ollama_models("a"), unavailable=loading)
    told: list[Event] = []

    def asked(times: int) -> None:
        count = len(shape.seen)
        eventually(lambda: len(shape.seen) >= count + times)

    with shape.serving() as url, ModelManager(config=ServerConfig(url=url)) as manager:
        manager.subscribe(told.append)
        asked(5)
        assert manager.state.status is ServerStatus.LOADING
        assert not said(told, Level.WARNING)
        shape.unavailable = None
        settled(manager, ServerStatus.READY)
        states = [one.state for one in told if isinstance(one, StateChanged)]
        ready = next(state for state in states if state.status is ServerStatus.READY)
        assert ready.last_health_check
        assert ready.last_health_check.status is ServerStatus.READY
        shape.unavailable = loading
        settled(manager, ServerStatus.LOADING)
        asked(5)
        assert len(said(told, Level.WARNING)) == 1
        passed = [one.state.status for one in told if isinstance(one, StateChanged)]
        assert passed.count(ServerStatus.OUT_OF_REACH) <= 1


def test_a_proxy_without_a_server_behind_it_does_not_count_as_a_load() -> None:
    shape = Shape(ollama_models("a"), unavailable="no available server")
    with shape.serving() as url, ModelManager(config=ServerConfig(url=url)) as manager:
        settled(manager, ServerStatus.OUT_OF_REACH)
        assert "answered 503 Service Unavailable" in manager.state.sentence


def test_an_answer_goes_on_when_another_model_is_asked(ollama: tuple[Shape, str]) -> None:
    shape, url = ollama
    with ModelManager(config=ServerConfig(url=url)) as manager:
        settled(manager, ServerStatus.READY)
        shape.held, pieces = True, []
        answers = [manager.chat("Why?", pieces.append)]
        eventually(lambda: len(pieces) == 1)
        manager.switch_model("qwen3:8b").wait(30)
        answers.append(manager.chat("Why?", pieces.append))
        eventually(lambda: len(pieces) == 2)
        shape.held = False
        assert [answer.wait(30).text for answer in answers] == ["Blue sky."] * 2
    assert [body["model"] for *_, body in shape.posts] == ["llama3.2:latest", "qwen3:8b"]


def test_one_that_asks_for_a_key_like_vllm() -> None:
    shape = Shape(
        vllm_models("Qwen/Qwen3-0.6B"), key=KEY, prefix="/llm", thinking="reasoning_content"
    )
    with shape.serving() as url:
        config = ServerConfig(profile="box", url=url)
        with ModelManager(config=config) as manager:
            settled(manager, ServerStatus.OUT_OF_REACH)
            assert "requires a key. Set LLAMACPP_BOX_API_KEY" in manager.state.sentence
        with ModelManager(config=config.replace(api_key="wrong")) as manager:
            settled(manager, ServerStatus.OUT_OF_REACH)
            assert "refuses the key in LLAMACPP_BOX_API_KEY" in manager.state.sentence
        with ModelManager(config=config.replace(api_key=KEY)) as manager:
            settled(manager, ServerStatus.READY)
            assert manager.base_url == f"{url}/v1"
            assert manager.chat("Why?").wait(30).thinking == "Hm."
            assert shape.posts[-1][0] == "/llm/v1/chat/completions"


def test_no_key_follows_a_redirect() -> None:
    elsewhere = Shape(ollama_models("llama3.2:latest"))
    with elsewhere.serving() as other:
        shape = Shape({}, redirect=other)
        with shape.serving() as url:
            config = ServerConfig(url=url, api_key=KEY)
            with ModelManager(config=config) as manager:
                settled(manager, ServerStatus.OUT_OF_REACH)
                sentence = manager.state.sentence
                assert sentence.endswith(f"/v1/models. Set LLAMACPP_PRIMARY_URL to {other}.")
                assert "secret" not in sentence
    assert shape.seen[0][1] == f"Bearer {KEY}"
    assert elsewhere.seen == []


@pytest.mark.parametrize(
    ("models", "said"),
    [({"hello": 1}, "without a list of models"), (ollama_models(), None)],
)
def test_what_lists_no_models(models: object, said: str | None) -> None:
    with Shape(models).serving() as url, ModelManager(config=ServerConfig(url=url)) as manager:
        settled(manager, ServerStatus.OUT_OF_REACH if said else ServerStatus.READY)
        assert said is None or said in manager.state.sentence


def test_a_model_that_it_lacks_is_told_with_those_that_it_has(
    ollama: tuple[Shape, str], tmp_path: Path
) -> None:
    shape, url = ollama
    lines = f"LLAMACPP_GPU_URL={url}", "LLAMACPP_GPU_ALIAS=gemma"
    where = "--env", written(tmp_path, *lines), "--profile", "gpu"
    doubt = "It lists no model 'gemma'. Set LLAMACPP_GPU_ALIAS to one that it lists: nomic-embed"
    for verb in ("status", "start", "wait-ready"):
        done = run(verb, *where)
        assert done.exit_code == 0
        assert f"(not started by kitty_nb). {doubt}" in done.output
    found = {one.what: one for one in examine(where[1], "gpu")}
    assert not found.keys() & {"Engine", "Load", "GPU, memory", "Models", "Disk"}
    assert (found["Model"].verdict, found["Model"].advice[:60]) == (Verdict.WARNING, doubt[:60])
    fleet = FleetPanel(where[1])
    try:
        eventually(lambda: doubt in fleet.rows[0]["problem"])
    finally:
        fleet.close()
    shape.models = ollama_models("gemma:latest")  # as Ollama lists what is asked for as gemma
    assert run("status", *where).output.endswith("(not started by kitty_nb).\n")


def test_an_answer_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_server, "_WHOLE_WITHIN", 0.3)
    with Shape(ollama_models("a"), endless=True).serving() as url:
        assert "no answer in time" in str(anyio.run(look_once, ServerConfig(url=url)).error)


def test_it_is_a_peer_of_llama_swap_and_nothing_that_others_start(
    ollama: tuple[Shape, str], tmp_path: Path
) -> None:
    _, url = ollama
    env = written(tmp_path, f"LLAMACPP_GPU_URL={url}/v1", f"LLAMACPP_GPU_API_KEY={KEY}")
    where = "--env", env, "--profile", "gpu"
    exported = run("export", "llama-swap", *where)
    models = ["nomic-embed-text:latest", "llama3.2:latest", "qwen3:8b"]
    peer = {"proxy": url, "models": models, "apiKey": "${env.GPU_API_KEY}"}
    assert yaml.safe_load(exported.stdout)["peers"] == {"gpu": peer}
    assert "GPU_API_KEY: set it" in exported.stderr
    assert KEY not in exported.output
    file, back = tmp_path / "swap.yaml", tmp_path / "back.env"
    for alias in (None, "qwen3:8b"):
        with env.open("a") as more:
            more.write(f"LLAMACPP_GPU_ALIAS={alias or ''}\n")
        file.write_text(run("export", "llama-swap", *where).stdout)
        back.write_text("")
        assert "Write a key into .env." in run("import", file, "--env", back).stderr
        there = ServerConfig.from_env(back, "gpu")
        assert (there.url, there.alias, there.api_key) == (url, alias, None)
    assert "kitty-nb load-test --profile gpu" in run("bench", *where).stderr
    for form in ("router", "systemd", "quadlet", "compose"):
        refused = run("export", form, *where)
        assert refused.exit_code == 1
        assert f"gpu uses the server at {url}, which a {form} file can't start" in refused.output


def test_certificates_that_are_none_are_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    config = ServerConfig(url="https://127.0.0.1:9")
    with ModelManager(config=config) as manager:
        settled(manager, ServerStatus.OUT_OF_REACH)
        assert f"no certificates in {tmp_path / 'none.pem'}" in manager.state.sentence


def test_a_name_that_cannot_be_shown_is_left_out() -> None:
    models = ollama_models("a\ud83d", "b\x1b[31m", "x" * 501, "good")
    with Shape(models).serving() as url, ModelManager(config=ServerConfig(url=url)) as manager:
        settled(manager, ServerStatus.READY)
        assert manager.state.alias == "good"


def test_where_nobody_listens_there_is_a_sentence_and_back_off() -> None:
    url = f"http://127.0.0.1:{unused_port()}"
    with ModelManager(config=ServerConfig(url=url)) as manager:
        settled(manager, ServerStatus.OUT_OF_REACH)
        with pytest.raises(ServerFailedError, match=r"the connection failed .*PRIMARY_URL\."):
            manager.start().wait(30)
        with Shape(ollama_models("a")).serving(int(url.rpartition(":")[2])):
            settled(manager, ServerStatus.READY)


def test_it_can_be_load_tested_but_not_swept(ollama: tuple[Shape, str]) -> None:
    _, url = ollama
    config = ServerConfig(url=url)
    found = load_test(config=config, concurrency=2, requests=6, max_tokens=8).wait(60)
    (load,) = found.loads
    assert [(one.tokens, one.prompt_tokens) for one in load.requests] == [(5, 11)] * 6
    for starts in Sweep, Bench, tune:
        with pytest.raises(ExperimentError, match=r"load_test\(concurrency"):
            starts(config=config.replace(model="here.gguf", allow_absolute_paths=True))


def test_as_many_requests_are_under_way_as_a_load_says(ollama: tuple[Shape, str]) -> None:
    shape, url = ollama
    together = threading.Barrier(120)  # nobody is answered before that many ask

    def meet() -> None:
        if len(shape.posts) > 1:  # the first warms up
            together.wait(30)

    shape.before_answer = meet
    (load,) = load_test(config=ServerConfig(url=url), concurrency=120).wait(60).loads
    assert len(load.requests) == 120


_FEW_FILES = """
import resource, sys
from kitty_nb import ServerConfig
from kitty_nb.experiments import load_test
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
load_test(config=ServerConfig(url=sys.argv[1]), requests=100, **{sys.argv[2]: 100}).wait(60)
"""


@pytest.mark.parametrize("load", ["concurrency", "rate"])
def test_more_requests_than_files_can_be_open(ollama: tuple[Shape, str], load: str) -> None:
    shape, url = ollama
    given_up = threading.Event()

    def wait() -> None:
        if len(shape.posts) > 1:  # the first warms up
            given_up.wait(60)

    shape.before_answer = wait
    command = [sys.executable, "-c", _FEW_FILES, url, load]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    given_up.set()
    assert "ExperimentError: Each request takes an open file" in done.stderr


def test_the_highest_rate_of_a_server_that_does_not_tell_its_slots(
    ollama: tuple[Shape, str],
) -> None:
    shape, url = ollama
    slots = threading.Semaphore(6)

    def answer() -> None:
        with slots:
            time.sleep(0.1)

    shape.before_answer = answer
    limit = "time_to_first_token_p90 <= 60"
    found = load_test(config=ServerConfig(url=url), limit=limit, requests=10).wait(60)
    assert 20 < (found.highest_rate or 0) <= 60  # one at a time, it would be 10 at most
    assert "the most that the server can answer" in found.summary


def test_a_limit_that_too_few_answers_can_tell_of(ollama: tuple[Shape, str]) -> None:
    shape, url = ollama
    shape.tokens = cycle([5] * 24 + [1])
    limit = "time_between_tokens_p99 <= 60"
    with pytest.raises(ExperimentError, match=r"Only 96 of 100 answers .*p99.*Raise requests"):
        load_test(config=ServerConfig(url=url), limit=limit).wait(60)


def test_the_panel_offers_what_is_possible(
    ollama: tuple[Shape, str], tmp_path: Path, sent: list[tuple[str, dict[str, Any]]]
) -> None:
    shape, url = ollama
    panel = ControlPanel(written(tmp_path, f"LLAMACPP_GPU_URL={url}"), "gpu")
    try:
        eventually(lambda: "Ready" in panel.status_line.value)
        assert url in panel.status_line.value
        eventually(lambda: panel.served.value == "llama3.2:latest")
        hidden = panel.picker, panel.memory, panel.buttons.start, panel.buttons.stop
        eventually(lambda: {one.layout.display for one in hidden} == {"none"})
        index = panel.served.options.index("qwen3:8b")
        with busy(panel.manager):  # what lists the models must not have to wait for a page
            page = threading.Thread(target=panel.served.set_state, args=({"index": index},))
            page.start()
            page.join(10)
            assert not page.is_alive()
        eventually(lambda: panel.manager.state.alias == "qwen3:8b")
        panel.ask.ask("Why?")
        eventually(lambda: [turn.text for turn in panel.ask.turns] == ["Blue sky."])
        facts = [one["content"] for _, one in sent if one.get("content", {}).get("kind") == "facts"]
        assert facts[-1]["sees"]  # nothing is known of the model
        assert not list(tmp_path.glob("*.gguf"))
        shape.models = ollama_models("llama3.2:latest")
        eventually(lambda: "It lists no model" in panel.notice.value)
        shape.models = "gone"
        eventually(lambda: "Out of reach" in panel.status_line.value)
        assert "keeps trying to connect" in panel.status_line.value
        assert "without a list of models" in panel.notice.value
    finally:
        panel.close()


def test_the_panel_shows_the_chosen_model_until_the_server_has_it_or_refuses(
    ollama: tuple[Shape, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, url = ollama
    refused = threading.Event()

    def switch_model(manager: ModelManager, _: str) -> Operation[None]:
        async def load() -> None:
            while not refused.is_set():
                await anyio.sleep(0.01)
            raise ServerFailedError("No room.")

        return manager.run(load)

    monkeypatch.setattr(ModelManager, "switch_model", switch_model)
    panel = ControlPanel(written(tmp_path, f"LLAMACPP_GPU_URL={url}"), "gpu")
    try:
        eventually(lambda: panel.served.value == "llama3.2:latest")
        panel.served.set_state({"index": panel.served.options.index("qwen3:8b")})
        shape.models = ollama_models("llama3.2:latest", "new", "qwen3:8b")
        eventually(lambda: "new" in panel.served.options)
        assert panel.served.value == "qwen3:8b"
        refused.set()
        eventually(lambda: "No room." in panel.notice.value)
        eventually(lambda: panel.served.value == "llama3.2:latest")
    finally:
        panel.close()


def test_the_fleet_and_the_terminal(
    ollama: tuple[Shape, str], tmp_path: Path, config: ServerConfig
) -> None:
    _, url = ollama
    env = written(
        tmp_path,
        f"LLAMACPP_PRIMARY_MODEL={config.model}",
        "LLAMACPP_ALLOW_ABSOLUTE_PATHS=1",
        f"LLAMACPP_GPU_URL={url}",
        f"LLAMACPP_GPU_API_KEY={KEY}",
        "LLAMACPP_GPU_ALIAS=qwen3:8b",
    )
    fleet = FleetPanel(env)
    try:
        eventually(lambda: fleet.rows[1]["status"] == "Ready")
        row = fleet.rows[1]
        assert (row["model"], row["port"], row["start"], row["stop"]) == (
            "qwen3:8b",
            None,
            False,
            False,
        )
        assert row["problem"] == ""
    finally:
        fleet.close()
    where = "--env", env, "--profile", "gpu"
    assert "qwen3:8b" in (told := run("status", *where).output)
    assert "not started by kitty_nb" in told
    assert "It was already running." in run("start", *where).output
    assert run("wait-ready", *where).exit_code == 0
    assert run("key", *where).output.strip() == KEY
    assert KEY not in run("connect", "openai", *where).output
    assert "6" in run("load-test", "--requests", "6", "--concurrency", "1", *where).output
    for verb in ("stop", "restart"):
        refused = run(verb, *where)
        assert refused.exit_code == 1
        assert f"can't {verb} it" in refused.output
    assert "is on its own machine" in run("logs", *where).output


def test_a_terminal_tells_that_it_is_out_of_reach(tmp_path: Path) -> None:
    env = written(tmp_path, f"LLAMACPP_GPU_URL=http://127.0.0.1:{unused_port()}")
    where = "--env", env, "--profile", "gpu"
    status = run("status", *where)
    assert status.exit_code == 3
    assert "OUT OF REACH" in status.output
    assert run("start", *where).exit_code == 1
    assert "already" not in run("start", "--no-wait", *where).output
    assert "can't be used" in run("wait-ready", "--timeout", "0.2", *where).output


def test_the_magics_say_what_cannot_be_done(
    ollama: tuple[Shape, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = written(tmp_path, f"LLAMACPP_GPU_URL={ollama[1]}")
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    where = f"--profile gpu --env {env}"
    shell.run_cell("%load_ext kitty_nb").raise_error()
    try:
        shell.run_cell(f"%kitty start {where}").raise_error()
        shell.run_cell(f"%kitty switch qwen3:8b {where}").raise_error()
        shell.run_cell(f"%%kitty_chat {where}\nWhy?").raise_error()
        said = capsys.readouterr().out
        assert "READY: llama3.2:latest" in said
        assert "Blue sky." in said
        for verb in ("stop", "restart", "logs"):
            with pytest.raises(KittyError):
                shell.run_cell(f"%kitty {verb} {where}").raise_error()
    finally:
        shell.run_cell("%unload_ext kitty_nb")
