"""Runs that are written down, and repeated: with the real engine on the demo model."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import psutil
import pytest
from conftest import demo_config, eventually, unused_port

from kitty_nb import ModelManager, ServerConfig, ServerStatus, write_demo_model
from kitty_nb.client import Access
from kitty_nb.config import OnKernelExit
from kitty_nb.errors import ExperimentError, KittyError, RunRecordError
from kitty_nb.experiments import Exchange, Request, RunRecord, compare, record_run, replay
from kitty_nb.experiments.recording import ask

ANSWER = "Hello! I am the kitty_nb demo model,"


@pytest.fixture
def config(config: ServerConfig, tmp_path: Path) -> ServerConfig:
    """The real engine on a demo model that a test may change."""
    models = tmp_path / "models"
    models.mkdir()
    model = shutil.copy2(config.model or "", models / "demo.gguf")
    return config.replace(models_dir=models, model=model)


@pytest.fixture
def manager(config: ServerConfig) -> Iterator[ModelManager]:
    with ModelManager(config=config) as manager:
        manager.start().wait(60)
        yield manager


@pytest.fixture
def record(manager: ModelManager) -> RunRecord:
    return record_run(manager, ["Who are you?"], max_tokens=6).wait(60)


@pytest.fixture(scope="module")
def kept(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """A record for the tests that only read it."""
    config = demo_config(demo_model, tmp_path_factory.mktemp("kept"), unused_port())
    with ModelManager(config=config) as manager:
        manager.start().wait(60)
        return record_run(manager, ["Who are you?"], max_tokens=6).wait(60)


def changed(record: RunRecord, **changes: Any) -> RunRecord:
    return record.model_copy(update=changes)


def test_a_run_is_recorded_saved_loaded_and_repeated(
    manager: ModelManager, config: ServerConfig, tmp_path: Path
) -> None:
    prompts = [
        "Who are you?",
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Well?"}],
        Request(text="Once", parameters={"max_tokens": 2}),
    ]
    record = record_run(manager, prompts, max_tokens=6, seed=3).wait(60)
    assert [output.startswith("Hello! I am") for output in record.outputs] == [True] * 3
    assert record.outputs[0] == record.outputs[1] == ANSWER
    assert record.outputs[2] == "Hello! I am"
    assert record.profile == config.profile
    assert record.seed == 3
    assert {one.request.parameters["seed"] for one in record.exchanges} == {3}
    assert [one.timings and one.timings.predicted_n for one in record.exchanges] == [6, 6, 2]
    assert record.load_seconds
    assert 0 < record.load_seconds.total < 60
    assert record.host.ram == psutil.virtual_memory().total
    assert record.host.cpu
    assert record.libraries["kitty_nb"]
    assert record.engine.version

    path = record.save(tmp_path / "deep" / "run.json")
    loaded = RunRecord.load(path)
    assert loaded == record

    pid, log = manager.state.pid, config.log_path.read_bytes()
    comparison = replay(loaded, config=config).wait(120)
    assert comparison.same_outputs
    assert not comparison.differences, str(comparison)
    assert {one.what for one in comparison.figures} == {
        "load, s", "prompt, tokens/s", "generation, tokens/s",
    }  # fmt: skip
    assert all(one.ratio > 0 for one in comparison.figures)
    assert "3 of 3 are the same" in str(comparison)
    assert (manager.state.status, manager.state.pid) == (ServerStatus.READY, pid)
    assert config.log_path.read_bytes().startswith(log)


def test_a_seed_makes_samples_repeat(manager: ModelManager, config: ServerConfig) -> None:
    def run(seed: int) -> RunRecord:
        flat = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return record_run(manager, "Well?", seed=seed, max_tokens=20, **flat).wait(60)

    first = run(1)
    assert not compare(first, run(2)).same_outputs
    assert replay(first, config=config).wait(120).same_outputs


@pytest.mark.parametrize("whose", ["the user's", "made up"])
def test_no_key_is_in_a_record(config: ServerConfig, tmp_path: Path, whose: str) -> None:
    env = tmp_path / "settings.env"
    env.write_text(
        f"LLAMACPP_MODELS_DIR={config.models_dir}\nLLAMACPP_PRIMARY_MODEL=demo.gguf\n"
        f"LLAMACPP_PORT={config.port}\nLLAMACPP_LOG_DIR={config.log_dir}\n"
        f"LLAMACPP_HISTORY={config.history}\n"
        + ("LLAMACPP_API_KEY=open-sesame\n" if whose == "the user's" else "")
    )
    with ModelManager(env) as manager:
        manager.start().wait(60)
        key = manager.reveal_api_key()
        record = record_run(manager, "Who are you?", max_tokens=2).wait(60)
    assert key
    assert (key == "open-sesame") == (whose == "the user's")
    text = record.save(tmp_path / "run.json").read_text()
    assert key not in text
    assert "api_key" not in text
    assert key not in repr(record) + str(record) + repr(record.config)


def test_no_secret_flag_is_in_a_record(kept: RunRecord, config: ServerConfig) -> None:
    words = ("--hf-token", "hf_abc", "--keep", "4", "-hft", "hf_abc", "--ssl-key-file", "k")
    config = config.replace(extra_args=words, api_key="open-sesame")
    made = RunRecord.model_validate({**dict(kept), "config": config})
    assert made.config.extra_args == ("--keep", "4", "--ssl-key-file", "k")
    assert "hf_abc" not in made.model_dump_json() + str(made.model_dump())
    assert "sesame" not in made.model_dump_json() + str(made.model_dump())


def test_a_model_that_was_moved_is_found_by_its_digest(
    record: RunRecord, config: ServerConfig
) -> None:
    assert config.model
    write_demo_model(config.models_dir / "other.gguf")
    damaged = config.models_dir / "damaged.gguf"  # as long, and begins as the recorded one
    shutil.copy(config.model, damaged)
    with damaged.open("r+b") as file:
        file.seek(-10, 2)
        file.write(b"otherwise.")
    moved = config.models_dir / "deeper" / "renamed.gguf"
    moved.parent.mkdir()
    config.model.rename(moved)
    comparison = replay(record, config=config.replace(model=None)).wait(120)
    assert comparison.same_outputs
    assert comparison.repeated.config.model in {moved, config.models_dir / "other.gguf"}
    assert {one.what for one in comparison.differences} <= {"model.shards[0].name"}


def test_a_model_that_has_changed_is_found_out(
    manager: ModelManager, record: RunRecord, config: ServerConfig
) -> None:
    assert config.model
    write_demo_model(config.model, size=1_500_000)
    with pytest.raises(ExperimentError, match="has changed since this server loaded it"):
        record_run(manager, "And now?").wait(60)
    with pytest.raises(RunRecordError, match=r"has changed: .*demo\.gguf.*replay\(record"):
        replay(record, config=config).wait(60)
    comparison = replay(record, config=config, model="demo.gguf").wait(120)
    differences = {one.what: one for one in comparison.differences}
    assert differences["model.shards[0].size"].now == str(config.model.stat().st_size)
    assert "model.shards[0].sha256" in differences
    assert "model.shards[0].sha256" in str(comparison)


def test_a_model_that_is_gone_is_named(record: RunRecord, config: ServerConfig) -> None:
    assert config.model
    config.model.unlink()
    with pytest.raises(RunRecordError, match=r"is gone: .*demo\.gguf.*LLAMACPP_MODELS_DIR"):
        replay(record, config=config.replace(model=None)).wait(60)


def test_a_model_that_is_gone_while_it_is_served_is_named(
    manager: ModelManager, config: ServerConfig
) -> None:
    assert config.model
    config.model.unlink()
    with pytest.raises(KittyError, match=r"demo\.gguf (is missing|has changed)"):
        record_run(manager, "And now?").wait(60)


def test_a_prompt_longer_than_the_context_is_refused(manager: ModelManager) -> None:
    with pytest.raises(ExperimentError, match=r"longer than the context.* 512 tokens.*Shorten"):
        record_run(manager, ["Who are you?", "Why? " * 600]).wait(60)
    assert record_run(manager, "Who are you?", max_tokens=6).wait(60).outputs == (ANSWER,)


def test_what_the_server_refuses_is_told(manager: ModelManager) -> None:
    with pytest.raises(ExperimentError, match=r"refused a request with status 400: .*top_k"):
        record_run(manager, Request(text="Once"), top_k="many").wait(60)


def test_what_is_nothing_to_ask_is_refused(manager: ModelManager) -> None:
    for wrong in (["text"], [], 3):
        with pytest.raises(ExperimentError, match=r"Not a valid prompt: .*list of messages"):
            record_run(manager, [wrong])  # type: ignore[list-item]


def test_a_server_that_breaks_off_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        access = Access(f"http://127.0.0.1:{listener.getsockname()[1]}", None)
        with pytest.raises(ExperimentError, match="ended early"):
            anyio.run(ask, access, [Request(text="Once")])
        thread.join()


def test_a_server_that_is_replaced_meanwhile_is_told(manager: ModelManager) -> None:
    operation = record_run(manager, ["Who are you?"] * 3000)
    manager.restart().wait(60)
    with pytest.raises(ExperimentError, match=r"ended early|was restarted"):
        operation.wait(120)


def test_a_server_must_be_ready(config: ServerConfig) -> None:
    with ModelManager(config=config) as manager, pytest.raises(KittyError, match="STOPPED"):
        record_run(manager, "Who are you?")


def test_another_kernel_records_the_same_server(manager: ModelManager, record: RunRecord) -> None:
    config = manager.state.config.replace(on_kernel_exit=OnKernelExit.KEEP)
    with ModelManager(config=config) as other:
        eventually(lambda: other.state.status is ServerStatus.READY, within=30)
        again = record_run(other, ["Who are you?"], max_tokens=6).wait(60)
        assert again.load_seconds == record.load_seconds
        assert compare(record, again).same_outputs
        assert not compare(record, again).differences


def test_a_load_is_found_after_the_machine_has_slept(
    manager: ModelManager, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    awake = time.time
    monkeypatch.setattr(time, "time", lambda: awake() + 3600)  # and the monotonic clock stood still
    again = record_run(manager, ["Who are you?"], max_tokens=6).wait(60)
    assert again.load_seconds == record.load_seconds


def test_cancelling_a_replay_ends_its_server(
    kept: RunRecord, misbehaving: Callable[..., ServerConfig]
) -> None:
    endless = misbehaving("--never-ready")
    operation = replay(changed(kept, config=endless), config=endless)
    eventually(lambda: operation.progress and operation.progress.elapsed > 0.2, within=30)
    eventually(psutil.Process().children)
    operation.cancel()
    eventually(lambda: operation.done)


def test_differences_are_named_and_located(kept: RunRecord) -> None:
    text = ANSWER.replace("demo", "other")
    other = changed(
        kept,
        exchanges=(kept.exchanges[0].model_copy(update={"output": text}),) * 2,
        engine=kept.engine.model_copy(update={"version": "1 (old)"}),
        config=kept.config.model_copy(update={"threads": 7, "port": 1}),
        load_seconds=None,
    )
    comparison = compare(kept, other)
    assert not comparison.same_outputs
    first, second = comparison.outputs
    assert (first.exchange, first.position, first.now) == (0, ANSWER.index("demo"), "other model,")
    assert (second.exchange, second.position, second.recorded) == (1, 0, "")
    named = {one.what: (one.recorded, one.now) for one in comparison.differences}
    assert named["engine.version"] == (kept.engine.version, "1 (old)")
    assert named["config.threads"] == ("1", "7")
    assert "config.port" not in named
    assert named["exchanges[1].finish_reason"] == ("-", "length")
    shown = str(comparison)
    assert "Answers: 0 of 2 are the same." in shown
    assert f"differs from character {ANSWER.index('demo') + 1} on" in shown
    assert "load" not in {one.what.split(",")[0] for one in comparison.figures}


def test_tool_calls_are_recorded_and_compared(kept: RunRecord) -> None:
    request = Request(messages=({"role": "user", "content": "Weather?"},))

    def run(number: str, city: str) -> RunRecord:
        function = {"name": "weather", "arguments": json.dumps({"city": city})}
        call = {"type": "function", "id": number, "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        answer = {"choices": [{"finish_reason": "tool_calls", "message": message}]}

        class Server(Access):
            def async_http(self) -> httpx.AsyncClient:
                transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
                return httpx.AsyncClient(transport=transport, base_url=self.endpoint)

        return changed(kept, exchanges=anyio.run(ask, Server("http://server", None), [request]))

    paris = run("1", "Paris")
    assert compare(paris, run("2", "Paris")).same_outputs
    assert compare(paris, RunRecord.parse(paris.model_dump_json())).same_outputs
    (difference,) = compare(paris, run("3", "Tokyo")).outputs
    assert difference.recorded.startswith("Paris")
    assert difference.now.startswith("Tokyo")


def broken(text: str, how: str) -> str:
    document = json.loads(text)
    match how:
        case "cut short":
            return text[: len(text) // 2]
        case "not JSON":
            return "# notes"
        case "another document":
            return '{"name": "kitty"}'
        case "a list":
            return "[1]"
        case "no seed":
            del document["seed"]
        case "a wrong type":
            document["exchanges"][0]["output"] = 3
        case "an unknown setting":
            document["config"]["warp"] = 9
        case "version 0":
            document["schema_version"] = 0
    return json.dumps(document)


@pytest.mark.parametrize(
    "how",
    [
        *("cut short", "not JSON", "another document", "a list", "no seed", "a wrong type"),
        *("an unknown setting", "version 0"),
    ],
)
def test_a_damaged_record_is_refused(kept: RunRecord, tmp_path: Path, how: str) -> None:
    path = kept.save(tmp_path / "run.json")
    path.write_text(broken(path.read_text(), how))
    with pytest.raises(RunRecordError, match=r"run\.json is not a run record.*damaged"):
        RunRecord.load(path)


def test_a_later_versions_record_is_refused(kept: RunRecord, tmp_path: Path) -> None:
    path = kept.save(tmp_path / "run.json")
    document = json.loads(path.read_text()) | {"schema_version": 99, "seed": {"other": 1}}
    path.write_text(json.dumps(document))
    with pytest.raises(RunRecordError, match=r"later version.*schema 99.*pip install"):
        RunRecord.load(path)


def test_files_that_cannot_be_read_or_written_are_named(kept: RunRecord, tmp_path: Path) -> None:
    with pytest.raises(RunRecordError, match=r"Can't read .*gone\.json: No such file"):
        RunRecord.load(tmp_path / "gone.json")
    file = kept.save(tmp_path / "run.json")
    with pytest.raises(RunRecordError, match="Can't write"):
        kept.save(file / "run.json")
    assert RunRecord.load(file) == kept
    assert [path.name for path in tmp_path.glob("*run.json*")] == ["run.json"]


def test_a_record_is_written_through_nobodys_link_and_as_the_umask_says(
    kept: RunRecord, tmp_path: Path
) -> None:
    (tmp_path / ".run.json.part").symlink_to(tmp_path / "elsewhere")
    umask = os.umask(0o027)
    try:
        file = kept.save(tmp_path / "run.json")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert not (tmp_path / "elsewhere").exists()


def test_a_request_is_either_a_conversation_or_a_text() -> None:
    for wrong in ({}, {"text": "Once", "messages": ({"role": "user", "content": "Well?"},)}):
        with pytest.raises(ValueError, match="either messages or a text"):
            Request.model_validate(wrong)
    assert Exchange(request=Request(text=""), output="a", reasoning="b").text == "ba"
