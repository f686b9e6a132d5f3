"""A model with a real tokenizer and sliding-window attention, on both engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from test_real_loads import is_true, load

from kitty_nb import ModelCatalog, ModelManager, ServerConfig, ServerStatus
from kitty_nb.supervisor import server
from kitty_nb.supervisor.events import Ending, Working


def test_its_load_is_followed_to_the_end(real_config: ServerConfig) -> None:
    progress = load(real_config)

    is_true(progress)
    assert len({p.fraction for p in progress}) >= 3


def test_it_answers_and_stops(real_config: ServerConfig) -> None:
    with ModelManager(config=real_config) as manager:
        manager.start().wait(timeout=120)
        request = {"prompt": "Paris is the capital of", "n_predict": 4, "temperature": 0}
        answer = manager.http.post("/completion", json=request).json()

        assert answer["content"].split()[0].strip(",.") == "France"
        assert answer["timings"]["predicted_n"] == 4
        manager.stop().wait(timeout=30)
        assert manager.state.status is ServerStatus.STOPPED


def test_the_catalog_reads_its_header(real_model: Path) -> None:
    model = next(m for m in ModelCatalog(real_model.parent).scan() if m.path == real_model)

    assert model.architecture == "gemma3"
    assert model.quantization == "Q4_K_M"
    assert model.context_length == 32768


@pytest.mark.slow
def test_a_prompt_that_it_reads_is_followed(
    real_config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_SLOTS_ASKED", 0.02)  # slots alone tell the limit of an answer
    for pause in "_LOG_READY", "_WORK_SHOWN":  # a fast machine reads these prompts in a moment
        monkeypatch.setattr(server, pause, 0.02)
    told: list[float] = []

    def note(event: object) -> None:
        if isinstance(event, Working) and (reading := event.work.reading) and reading.total:
            told.append(reading.fraction)

    with ModelManager(config=real_config.replace(context_size=2048)) as manager:
        manager.start().wait(timeout=120)
        for prompt in ("one two three " * 40, "four five six " * 40, "seven eight " * 60):
            eventually(lambda: not manager.work.busy)
            if prompt.startswith("seven"):  # the first prompt of a start
                manager.restart().wait(timeout=120)
            told.clear()
            unsubscribe = manager.subscribe(note)
            manager.http.post("/completion", json={"prompt": prompt, "n_predict": 2}, timeout=120)
            unsubscribe()
            assert told or prompt.startswith("one")  # the very first teaches the pace
            assert told == sorted(told)
        eventually(lambda: len(manager.requests) == 1)
        assert manager.requests[-1].prompt_tokens
        assert manager.requests[-1].ended is Ending.LENGTH


def earlier_call(city: str, weather: str) -> list[dict[str, Any]]:
    """A question that was answered with the help of a tool, which a small model imitates."""
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    calls = [{"id": city, "type": "function", "function": function}]
    return [
        {"role": "user", "content": f"What is the weather in {city}?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": city, "content": weather},
        {"role": "assistant", "content": weather},
    ]


@pytest.mark.slow
def test_it_calls_a_python_function(real_config: ServerConfig) -> None:
    asked: list[str] = []

    def weather(city: str) -> str:
        """Look up the weather of a city."""
        asked.append(city)
        return f"It is foggy in {city}."

    template = str(Path(__file__).with_name("tools.jinja"))
    config = real_config.replace(
        tool_calling=True, extra_args=("--chat-template-file", template), parallel=1
    )
    messages = [
        *earlier_call("Paris", "It is sunny in Paris."),
        *earlier_call("Madrid", "It is windy in Madrid."),
        {"role": "user", "content": "What is the weather in Rome?"},
    ]
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "stop": ["<|im_end|>"]}
    with ModelManager(config=config) as manager:
        manager.start().wait(timeout=120)
        chat = manager.chat(messages, tools=[weather], tool_choice="required", **options)
        answer = chat.wait(timeout=120)

    assert set(asked) == {"Rome"}
    assert {call.result for call in answer.tool_calls} == {"It is foggy in Rome."}
    assert "foggy" in answer.text
