"""Asking the ready model in the panel: what a user types, and what pages are told."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import eventually
from model_files import write_projector
from test_vision import DEMO_WIDTH, png

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerStatus, write_demo_model
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.supervisor.events import Ending
from kitty_nb.widgets.ask import Picture, Turn
from kitty_nb.widgets.server_view import model_facts

Sent = list[tuple[str, dict[str, object]]]
Make = Callable[[ServerConfig], ControlPanel]


@pytest.fixture
def started() -> Iterator[Make]:
    """A panel whose server is ready."""
    managers: list[ModelManager] = []

    def start(config: ServerConfig) -> ControlPanel:
        managers.append(ModelManager(config=config))
        managers[-1].start().wait(60)
        return ControlPanel(manager=managers[-1])

    yield start
    for manager in managers:
        manager.close()


@pytest.fixture
def telling(
    misbehaving: Callable[..., ServerConfig], started: Make, tmp_path: Path
) -> Callable[..., ControlPanel]:
    """A panel on a server that answers by the events it is given, each after some seconds."""

    def tell(*events: tuple[float, dict[str, Any]]) -> ControlPanel:
        if events:
            (tmp_path / "chat").write_text(lines(*events))
        else:  # the server waits for what the test writes
            os.mkfifo(tmp_path / "chat")
        config = misbehaving("--chat", str(tmp_path / "chat"), restart_delay_seconds=60)
        return started(config)

    return tell


def lines(*events: tuple[float, dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(event)}\n" for event in events)


def says(text: str, kind: str = "content", **facts: object) -> dict[str, Any]:
    return {"choices": [{"delta": {kind: text}}], **facts}


END = 0.0, {"choices": [{"delta": {}, "finish_reason": "stop"}]}


def ask(panel: ControlPanel, text: str, *pictures: Picture) -> Turn:
    """Ask as a page does."""
    urls = [{"url": one.url, "thumbnail": one.thumbnail} for one in pictures]
    panel.ask.receive({"kind": "ask", "text": text, "pictures": urls})
    return panel.ask.turns[-1]


def answered(turn: Turn) -> Turn:
    eventually(lambda: turn.ended)
    return turn


def told(sent: Sent, kind: str = "turns") -> list[dict[str, Any]]:
    """What pages were sent by the box, by its kind."""
    contents = [data.get("content") for _, data in sent]
    return [one for one in contents if isinstance(one, dict) and one.get("kind") == kind]


def shown(sent: Sent) -> str:
    """The last turn's answer as a page puts it together."""
    text = ""
    for turn in (turn for message in told(sent) for turn in message["turns"]):
        text = turn["text"] if turn["first"] == 0 else text + turn["text"]
    return text


def test_an_answer_reaches_the_page_and_the_chat_goes_on(
    config: ServerConfig, engine: Path | None, started: Make, sent: Sent
) -> None:
    panel = started(config.replace(binary=engine))
    first = answered(ask(panel, "Who are you?"))
    assert first.text.startswith("Hello! I am")
    assert not first.problem
    assert "first token after" in first.status
    assert "tok/s" in first.status
    eventually(lambda: shown(sent) == first.text)
    assert not told(sent)[-1]["turns"][0]["busy"]
    answered(ask(panel, "And who else?"))
    printed: list[str] = []
    exec(panel.ask.code, {"panel": panel, "print": lambda said: printed.append(str(said))})
    assert "And who else?" in panel.ask.code
    assert first.text[-20:] in panel.ask.code
    assert printed[0].startswith("Hello! I am")
    panel.close()


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"n_predict": 5}, r"because LLAMACPP_PRIMARY_N_PREDICT limits answers to 5 tokens"),
        ({"context_size": 256}, r"because the context is full\. Raise the context size"),
        ({"extra_args": ("--ignore-eos", "-n", "5")}, "or the server limits the length of answers"),
    ],
    ids=["limit", "context", "flag"],
)
def test_an_answer_that_is_cut_short_says_by_what(
    config: ServerConfig, engine: Path | None, started: Make, settings: dict[str, Any], cause: str
) -> None:
    endless = {"binary": engine, "extra_args": ("--ignore-eos",)}
    panel = started(config.replace(**endless | settings))
    turn = answered(ask(panel, "Who are you?"))
    assert turn.text
    assert re.search(cause, turn.problem)
    if "context_size" in settings:  # a token limit is told by slots, if one is read in time
        eventually(lambda: panel.manager.requests)
        assert [one.ended for one in panel.manager.requests] == [Ending.LENGTH]
    panel.close()


def test_a_page_that_opens_later_is_told_all_and_the_notebook_keeps_nothing(
    config: ServerConfig, started: Make, sent: Sent
) -> None:
    panel = started(config)
    turn = answered(ask(panel, "What is a secret?"))
    eventually(lambda: shown(sent) == turn.text)
    sent.clear()
    panel.ask.receive({"kind": "replay"})
    (facts,), (message,) = told(sent, "facts"), told(sent)
    assert facts["ready"]
    assert [one["question"] for one in message["turns"]] == ["What is a secret?"]
    assert message["turns"][0]["text"] == turn.text
    assert "secret" not in str(panel.ask.get_state())
    panel.ask.receive({"kind": "new"})
    assert panel.ask.turns == ()
    assert told(sent)[-1] == {"kind": "turns", "chat": message["chat"] + 1, "turns": []}
    panel.close()


def test_a_page_that_opens_as_an_answer_ends_is_told_of_the_end_last(
    telling: Callable[..., ControlPanel], sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = telling((0.0, says("So ")), *[(0.05, says("on "))] * 2000)
    turn = ask(panel, "Well?")
    eventually(lambda: turn.text)
    opening, over = threading.Event(), threading.Event()
    page = threading.Thread(target=panel.ask.receive, args=[{"kind": "replay"}])
    send = panel.ask.send

    def send_slowly(message: dict[str, Any]) -> None:
        ends = message["kind"] == "turns" and not message["turns"][-1]["busy"]
        if threading.current_thread() is page and message["kind"] == "turns":
            opening.set()
            over.wait(1)
        send(message)
        if ends:
            over.set()

    monkeypatch.setattr(panel.ask, "send", send_slowly)
    page.start()
    assert opening.wait(10)
    panel.ask.receive({"kind": "stop"})
    page.join()
    assert over.wait(10)
    assert not told(sent)[-1]["turns"][-1]["busy"]
    panel.close()


def test_a_model_without_a_template_is_told_of_before_it_is_asked(
    real_model: Path, config: ServerConfig, started: Make, sent: Sent
) -> None:
    panel = started(config.replace(model=real_model, models_dir=real_model.parent))
    eventually(lambda: told(sent, "facts"))
    eventually(lambda: "no chat template" in told(sent, "facts")[-1]["prompt"])
    assert model_facts(panel.picker.model)["Chat template"] == "none; answers may run on"
    panel.close()


def test_many_words_are_few_messages(telling: Callable[..., ControlPanel], sent: Sent) -> None:
    counted = {"choices": [], "usage": {"completion_tokens": 4000}}
    panel = telling(*[(0.001, says("word "))] * 1000, END, (0.0, counted))
    began = time.monotonic()
    turn = answered(ask(panel, "Well?"))
    speed = re.search(r"([\d,]+\.\d) tok/s · 4,000 tokens", turn.status)
    assert speed
    assert float(speed[1].replace(",", "")) >= 3990 / (time.monotonic() - began)
    assert turn.text == "word " * 1000
    eventually(lambda: shown(sent) == turn.text)
    assert len(told(sent)) <= 10 * (time.monotonic() - began) + 4


def test_thinking_and_reading_are_told(
    telling: Callable[..., ControlPanel], sent: Sent, tmp_path: Path
) -> None:
    def turns() -> list[dict[str, Any]]:
        return [turn for message in told(sent) for turn in message["turns"]]

    half = {"total": 100, "cache": 0, "processed": 50, "time_ms": 2000}
    panel = telling()
    turn = ask(panel, "Well?")
    with (tmp_path / "chat").open("w", buffering=1) as chat:
        chat.write(lines((0.0, {"choices": [], "prompt_progress": half})))
        eventually(
            lambda: "Reading the prompt · 50 % · 2 s left" in [turn["status"] for turn in turns()]
        )
        chat.write(lines((0.0, says("Hm. ", "reasoning_content"))))
        eventually(lambda: "Thinking…" in [turn["thought"] for turn in turns()])
        chat.write(lines((0.0, says("So. ")), END))
    answered(turn)
    assert re.fullmatch(r"Thought for \d+(\.\d)? s", turn.thought)
    assert (turn.thinking, turn.text) == ("Hm. ", "So. ")
    eventually(lambda: shown(sent) == "So. ")
    assert turns()[0]["status"] == "Waiting for the model"


def test_an_answer_is_stopped_and_a_closed_panel_leaves_none(
    telling: Callable[..., ControlPanel],
) -> None:
    panel = telling((0.0, says("So ")), *[(0.05, says("on "))] * 2000)
    turn = ask(panel, "Well?")
    eventually(lambda: turn.text)
    ask(panel, "And?")
    assert panel.ask.turns == (turn,)  # one at a time
    panel.ask.receive({"kind": "stop"})
    answered(turn)
    assert turn.status.startswith("Stopped · first token after")
    assert panel.ask.turns == (turn,)

    def free() -> bool:
        return not panel.manager.http.get("/slots").json()[0]["is_processing"]

    eventually(free, within=5)
    ask(panel, "Again?")
    eventually(lambda: panel.ask.turns[-1].text)
    panel.close()
    eventually(free, within=5)


def test_what_the_server_did_in_the_middle_is_told(telling: Callable[..., ControlPanel]) -> None:
    panel = telling((0.0, says("So far.")), (60.0, says("Never.")))
    turn = ask(panel, "Well?")
    eventually(lambda: turn.text)
    psutil.Process(panel.manager.state.pid).kill()
    answered(turn)
    assert turn.text == "So far."
    assert "The answer ended early" in turn.problem
    eventually(lambda: panel.manager.state.status is ServerStatus.RESTARTING)
    refused = answered(ask(panel, "And now?"))
    assert "Start it" in refused.problem
    assert "So far." in panel.ask.code
    panel.close()


def test_too_long_a_question_and_too_long_a_chat_are_explained(
    config: ServerConfig, started: Make
) -> None:
    panel = started(config)
    turn = answered(ask(panel, "word " * 2000))
    assert "longer than the context" in turn.problem
    assert answered(ask(panel, "Who are you?")).text  # what was refused is not asked again
    turn = answered(ask(panel, "x" * 1_000_001))
    assert turn.problem == "This chat is too long to be kept. Press New chat."
    panel.close()


def test_a_cell_that_is_run_again_goes_on_with_the_chat(
    config: ServerConfig, tmp_path: Path
) -> None:
    env = tmp_path / ".env"
    env.write_text(
        f"LLAMACPP_MODELS_DIR={config.models_dir}\nLLAMACPP_PORT={config.port}\n"
        f"LLAMACPP_LOG_DIR=logs\nLLAMACPP_HISTORY=h.sqlite3\nLLAMACPP_CTX=512\n"
    )
    panel = ControlPanel(env)
    panel.manager.start(panel.choice).wait(60)
    turn = answered(ask(panel, "Who are you?"))
    again = ControlPanel(env)
    assert again.ask.turns == (turn,)
    answered(ask(again, "Who else?"))
    assert len(again.ask.turns) == 2
    again.close()


def test_pictures_are_asked_about_and_copied_as_code(
    config: ServerConfig, started: Make, tmp_path: Path, sent: Sent
) -> None:
    model = write_demo_model(tmp_path / "models" / "demo" / "demo.gguf")
    write_projector(model.with_name("mmproj-F16.gguf"), DEMO_WIDTH)
    panel = started(resolve_model(config.replace(models_dir=tmp_path / "models", model=model)))
    eventually(lambda: any(facts["sees"] for facts in told(sent, "facts")))
    turn = answered(ask(panel, "What is this?", Picture(png(), "data:image/png;base64,small")))
    assert turn.text.startswith("Hello! I am")
    assert told(sent)[0]["turns"][0]["thumbnails"] == ["data:image/png;base64,small"]
    assert png() not in str(sent)
    printed: list[str] = []
    exec(panel.ask.code, {"panel": panel, "print": lambda said: printed.append(str(said))})
    assert printed[0].startswith("Hello! I am")
    assert "panel.ask.pictures[0]" in panel.ask.code
    assert answered(ask(panel, "word " * 2000, Picture(png(9)))).problem  # is not asked again
    answered(ask(panel, "And this?", Picture(png(10))))
    assert re.findall(r"pictures\[(\d)\]", panel.ask.code) == ["0", "2"]
    panel.close()


@pytest.mark.slow
def test_stop_frees_the_slot_of_a_real_server(real_config: ServerConfig, started: Make) -> None:
    panel = started(real_config.replace(parallel=1))
    turn = ask(panel, "Count to ten thousand: one, two, three,")
    eventually(lambda: turn.text)
    slots = panel.manager.http.get("/slots").json()
    assert any(slot["is_processing"] for slot in slots)
    panel.ask.receive({"kind": "stop"})
    answered(turn)

    def free() -> bool:
        return not any(s["is_processing"] for s in panel.manager.http.get("/slots").json())

    eventually(free, within=5)
    panel.close()
