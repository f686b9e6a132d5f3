"""Prompts that outlive their server, on the real engines."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import anyio
import anyio.to_thread
import pytest
from conftest import eventually, unused_port
from model_files import write_adapter, write_projector
from test_vision import DEMO_WIDTH, png
from typer.testing import CliRunner

from kitty_nb import ModelManager, ServerConfig, ServerStatus, write_demo_model
from kitty_nb.cli import app
from kitty_nb.client import Answer
from kitty_nb.engine.locate import Dialect, Engine, EngineKind
from kitty_nb.errors import ServerError
from kitty_nb.supervisor.events import Activity
from kitty_nb.supervisor.health import HealthProbe
from kitty_nb.supervisor.kept_prompts import KeptPrompt, PromptStore, state_facts
from kitty_nb.supervisor.prompt_keeper import Slots

TEXT = " ".join(f"Row {n} of the table has {n * 7 % 13} apples." for n in range(40))
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(params=["demo", pytest.param("gemma", marks=pytest.mark.slow)])
def kept_config(
    config: ServerConfig, engine: Path | None, request: pytest.FixtureRequest
) -> ServerConfig:
    """A small model and a real one, with a cache that older builds restore, too."""
    settings = {"binary": engine, "parallel": 2, "context_size": 8192, "extra_args": "--swa-full"}
    if request.param == "gemma":
        real: Path = request.getfixturevalue("real_model")
        settings |= {"model": real, "models_dir": real.parent, "context_size": 4096}
    return config.replace(**settings)


@contextmanager
def ready(config: ServerConfig) -> Iterator[tuple[ModelManager, list[str]]]:
    """A server that is ready, and what is said meanwhile."""
    said: list[str] = []

    def note(event: object) -> None:
        if isinstance(event, Activity):
            said.append(event.message)

    with ModelManager(config=config) as manager:
        manager.subscribe(note)
        manager.start().wait(120)
        yield manager, said


def ask(manager: ModelManager, *words: str) -> Answer:
    """Ask the last of some words, after a conversation of the others."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(words)]
    answer: Answer = manager.chat(messages, **GREEDY).wait(120)
    return answer


def reused(answer: Answer) -> float:
    assert answer.usage.prompt
    return (answer.usage.cached or 0) / answer.usage.prompt


def kept(config: ServerConfig) -> list[KeptPrompt]:
    return PromptStore.of(config).prompts()


def test_a_conversation_goes_on_after_a_stop_and_a_kill(kept_config: ServerConfig) -> None:
    with ready(kept_config) as (manager, said):
        first = ask(manager, TEXT)
        expected = ask(manager, TEXT, first.text, "And pears?").text
        manager.stop().wait(60)
        (prompt,) = kept(kept_config)
        assert prompt.tokens > (first.usage.prompt or 0)
        files = [*kept_config.prompts_dir.iterdir()]
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert stat.S_IMODE(kept_config.prompts_dir.stat().st_mode) == 0o700

        manager.start().wait(120)
        eventually(lambda: manager.work.restored)
        assert manager.work.restored.tokens == prompt.tokens
        again = ask(manager, TEXT, first.text, "And pears?")
        assert again.text == expected
        assert reused(again) > 0.9
        assert any("tokens restored in" in line for line in said)

        eventually(lambda: kept(kept_config)[0].at > prompt.at, why="it is not saved at rest")
        assert manager.state.pid
        os.kill(manager.state.pid, signal.SIGKILL)
        eventually(lambda: manager.state.status is not ServerStatus.READY)
        manager.start().wait(120)
        assert reused(ask(manager, TEXT, first.text, "And pears?", again.text, "Plums?")) > 0.9


def test_a_pinned_text_is_read_once_for_all_kernels_and_profiles(kept_config: ServerConfig) -> None:
    with ready(kept_config) as (manager, _), manager.pinned("table", TEXT) as table:
        assert not table.pin.restored
        reading = table.pin.reading
        expected = table.chat("How many apples in row 7?", **GREEDY).wait(120)
        assert expected.usage.cached == table.pin.tokens
        with manager.pinned("table", TEXT) as again:
            assert again.pin.tokens == table.pin.tokens
    other = kept_config.replace(profile="coder", alias="other")
    with ready(other) as (manager, said), manager.pinned("table", TEXT) as table:
        assert table.pin.restored
        assert table.pin.reading
        assert table.pin.reading == reading  # what it spares
        answer = table.chat("How many apples in row 7?", **GREEDY).wait(120)
        assert answer.text == expected.text
        assert reused(answer) > 0.9
        assert any("table" in line and "restored" in line for line in said)
        with manager.pinned("table", f"Another {TEXT}") as another:
            assert not another.pin.restored


def test_a_change_leaves_it_unused_and_says_why(kept_config: ServerConfig) -> None:
    with ready(kept_config) as (manager, _):
        text = ask(manager, TEXT).text
    (prompt,) = kept(kept_config)
    with ready(kept_config.replace(context_size=6144)) as (manager, said):
        eventually(lambda: any("--ctx-size has changed" in line for line in said))
        assert reused(ask(manager, TEXT, text, "And pears?")) < 0.1
    (prompt,) = kept(kept_config)  # that of the other context took its place
    state = PromptStore.of(kept_config).state(prompt.key)
    state.write_bytes(state.read_bytes()[:-1])
    with ready(kept_config.replace(context_size=6144)) as (manager, said):
        eventually(lambda: any("was damaged" in line for line in said))
        assert reused(ask(manager, TEXT, text, "And pears?")) < 0.1
        assert not state.exists()


@pytest.fixture
def tiny_disk(kept_config: ServerConfig) -> Iterator[Path]:
    """A disk for prompts with room for hardly any."""
    place = kept_config.prompts_dir
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "t", place]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_said_once_and_harms_nothing(
    kept_config: ServerConfig, tiny_disk: Path
) -> None:
    def complaints() -> list[str]:
        return [line for line in said if line.startswith("Can't keep a prompt")]

    with ready(kept_config) as (manager, said):
        text = ask(manager, TEXT).text
        eventually(complaints)
        with manager.pinned("table", TEXT) as table:
            assert not table.pin.restored
        assert ask(manager, TEXT, text, "And pears?").text
        manager.stop().wait(60)
        assert len(complaints()) == 1
        assert [*tiny_disk.iterdir()] == []


def test_each_model_of_a_profile_has_its_own_though_they_share_an_alias(
    config: ServerConfig, tmp_path: Path
) -> None:
    other = write_demo_model(tmp_path / "other.gguf", size=20_000_000)
    with ready(config.replace(context_size=4096)) as (manager, said):
        first = ask(manager, TEXT)
        manager.switch_model(other).wait(60)
        ask(manager, f"Other: {TEXT}")
        assert config.model
        manager.switch_model(config.model).wait(60)
        assert reused(ask(manager, TEXT, first.text, "And pears?")) > 0.9
        assert not [line for line in said if "not restored" in line]
    assert {prompt.model for prompt in kept(config)} == {"demo", "other"}


def test_slots_that_share_one_cache_are_all_restored(config: ServerConfig) -> None:
    both = config.replace(context_size=8192, parallel=2, extra_args="--kv-unified")
    with ready(both) as (manager, _):
        first = ask(manager, TEXT)
        eventually(lambda: kept(both))  # the next request moves it out of its slot
        second = ask(manager, f"Other: {TEXT}")
        eventually(lambda: len(kept(both)) == 2)
        manager.stop().wait(60)
        manager.start().wait(60)
        assert reused(ask(manager, TEXT, first.text, "And pears?")) > 0.9
        assert reused(ask(manager, f"Other: {TEXT}", second.text, "And pears?")) > 0.9


def test_what_another_scale_of_an_adapter_has_made_is_not_kept(
    config: ServerConfig, engine: Path | None, tmp_path: Path
) -> None:
    assert config.model
    adapter = write_adapter(tmp_path / "adapter.gguf", config.model)
    adapted = config.replace(binary=engine, context_size=4096, extra_args=("--lora", str(adapter)))
    with ready(adapted) as (manager, _):
        text = ask(manager, TEXT).text
        eventually(lambda: kept(adapted))
        manager.http.post("/lora-adapters", json=[{"id": 0, "scale": 0.5}]).raise_for_status()
        ask(manager, TEXT, text, "And pears?")
        before = kept(adapted)
        manager.stop().wait(60)
        assert kept(adapted) == before
        manager.start().wait(60)
        assert reused(ask(manager, TEXT, text, "And pears?")) > 0.9


def test_a_prompt_with_a_picture_is_kept_and_is_not_that_of_another(
    config: ServerConfig, engine: Path | None, tmp_path: Path
) -> None:
    projector = write_projector(tmp_path / "mmproj.gguf", DEMO_WIDTH)
    seeing = config.replace(binary=engine, context_size=4096, mmproj=projector)

    def see(side: int) -> int:
        url = {"type": "image_url", "image_url": {"url": png(side)}}
        content = [url, {"type": "text", "text": TEXT}]
        answer: Answer = manager.chat([{"role": "user", "content": content}], **GREEDY).wait(60)
        return answer.usage.cached or 0

    with ready(seeing) as (manager, _):
        see(8)
        manager.restart().wait(60)
        eventually(lambda: manager.work.restored)
        assert see(9) < 100
        manager.restart().wait(60)
        eventually(lambda: manager.work.restored)
        assert see(9) > 1000


@pytest.mark.slow
def test_an_older_build_that_cannot_is_found_out_by_what_it_reads_again(
    config: ServerConfig, native_engine: Path, real_model: Path
) -> None:
    """It leaves out what sliding windows need, from where a conversation goes on."""
    older = config.replace(
        binary=native_engine, model=real_model, models_dir=real_model.parent, context_size=4096
    )
    with ready(older) as (manager, said):
        text = ask(manager, TEXT).text
        manager.restart().wait(60)
        ask(manager, TEXT, text, "And pears?")
        eventually(lambda: any("can't keep prompts of gemma" in line for line in said))
        manager.restart().wait(60)
        said.clear()
        ask(manager, TEXT, text, "And plums?")
        manager.stop().wait(60)
    assert not any("prompt" in line for line in said)


def test_of_two_kernels_that_watch_a_server_one_keeps_a_prompt(config: ServerConfig) -> None:
    watched = config.replace(context_size=4096)
    with ready(watched) as (manager, _):
        ask(manager, TEXT)
        eventually(lambda: kept(watched))
        before = {file.name for file in watched.prompts_dir.iterdir()}
        with ModelManager(config=watched) as second:  # both at one moment would both save it
            eventually(lambda: second.state.status is ServerStatus.READY)
            second.stop().wait(60)
        eventually(lambda: manager.state.status is ServerStatus.STOPPED)
        assert {file.name for file in watched.prompts_dir.iterdir()} == before


def test_a_text_can_be_pinned_under_two_names(config: ServerConfig) -> None:
    roomy = config.replace(context_size=16384)
    with ready(roomy) as (manager, _):
        for name in ("a", "b"):
            with manager.pinned(name, TEXT):
                pass
        assert {prompt.name for prompt in kept(roomy)} == {"a", "b"}
        failed = manager.pinned(" ", TEXT)
        with pytest.raises(ServerError, match="needs a name and a text"):
            _ = failed.pin
        assert "done=True" in repr(failed)
        with pytest.raises(ServerError, match="half a surrogate pair"):
            _ = manager.pinned("torn", "torn \ud83d").pin


@pytest.mark.parametrize("end", ["stop", signal.SIGKILL, signal.SIGSEGV])
def test_only_a_restore_that_made_the_server_fail_costs_the_prompt(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch, end: str | signal.Signals
) -> None:
    roomy = config.replace(context_size=8192, restart_max=0)
    with ready(roomy) as (manager, said):
        assert manager.pinned("a", TEXT).pin.tokens
        pid = manager.restart().wait(60).pid
        assert pid
        frozen, restore = Event(), Slots.restore

        async def freeze(*args: Any) -> int:
            os.kill(pid, signal.SIGSTOP)
            frozen.set()
            return await restore(*args)

        monkeypatch.setattr(Slots, "restore", freeze)
        pinned = manager.pinned("a", TEXT)
        assert frozen.wait(30)
        if isinstance(end, str):
            manager.stop(force=True).wait(30)
        else:
            os.kill(pid, end)
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: manager.state.status.idle)
        with pytest.raises(ServerError):
            _ = pinned.pin
    assert len(kept(roomy)) == (end is not signal.SIGSEGV)
    assert any("made the server fail" in line for line in said) == (end is signal.SIGSEGV)


def test_a_restore_that_was_cancelled_long_ago_is_not_blamed(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.supervisor.prompt_keeper._BLAMED_WITHIN", -1.0, raising=False)
    roomy = config.replace(context_size=8192, restart_max=0)
    begun, cancelled = Event(), Event()

    async def hang(*_: Any) -> int:
        begun.set()
        try:
            await anyio.sleep(60)
            return 0
        finally:
            cancelled.set()

    with ready(roomy) as (manager, said):
        assert manager.pinned("a", TEXT).pin.tokens
        pid = manager.restart().wait(60).pid
        assert pid
        monkeypatch.setattr(Slots, "restore", hang)
        pinned = manager.pinned("a", TEXT)
        assert begun.wait(30)
        pinned._operation.cancel()
        assert cancelled.wait(30)
        os.kill(pid, signal.SIGSEGV)
        eventually(lambda: manager.state.status.idle)
        assert not any("made the server fail" in line for line in said)
    assert len(kept(roomy)) == 1


def test_pins_have_slots_of_their_own_as_far_as_there_are_any(config: ServerConfig) -> None:
    two = config.replace(context_size=8192, parallel=2)
    texts = {"a": TEXT, "b": f"Other: {TEXT}"}
    for _ in range(2):  # the second time, both are restored
        with ready(two) as (manager, _):
            pins = [manager.pinned(name, text) for name, text in texts.items()]
            assert {pin.pin.name for pin in pins} == texts.keys()
            for pin in pins:
                assert reused(pin.chat("How many?", **GREEDY).wait(60)) > 0.9
            manager.stop().wait(60)


def test_what_a_slot_held_before_a_restore_does_not_speak_against_it(config: ServerConfig) -> None:
    roomy = config.replace(context_size=4096, parallel=1)
    with ready(roomy) as (manager, _), manager.pinned("table", TEXT):
        pass
    with ready(roomy) as (manager, said):
        first = {"role": "user", "content": "Hello?"}
        short = manager.chat([first], temperature=0, max_tokens=1).wait(60)
        more = [{"role": "assistant", "content": short.text}, {"role": "user", "content": "And?"}]
        # Goes on where the slot's contents end, which are few.
        manager.chat([first, *more], temperature=0, max_tokens=1).wait(60)
        with manager.pinned("table", TEXT) as table:
            assert table.pin.restored
            before = len(kept(roomy))
            time.sleep(1.5)  # in which it is judged
            assert reused(table.chat("How many?", **GREEDY).wait(60)) > 0.9
        eventually(lambda: len(kept(roomy)) > before)
        assert not any("can't keep" in line for line in said)


def test_a_request_that_a_late_restore_waits_for_does_not_speak_against_it(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = config.replace(context_size=4096, parallel=1)
    with ready(roomy) as (manager, _):
        ask(manager, TEXT)
    asked, restored = Event(), Event()
    restore, intact = Slots.restore, PromptStore.intact

    def verify_late(store: PromptStore, prompt: KeptPrompt) -> bool | None:
        assert asked.wait(30)
        return intact(store, prompt)

    def go_on() -> None:
        more = [{"role": "assistant", "content": short.text}, {"role": "user", "content": "And?"}]
        manager.chat([first, *more], temperature=0, max_tokens=1).wait(60)

    async def ask_before(*args: Any) -> int:
        await anyio.to_thread.run_sync(go_on)
        tokens = await restore(*args)
        restored.set()
        return tokens

    monkeypatch.setattr(PromptStore, "intact", verify_late)
    monkeypatch.setattr(Slots, "restore", ask_before)
    with ready(roomy) as (manager, said):
        first = {"role": "user", "content": "Hello?"}
        short = manager.chat([first], temperature=0, max_tokens=1).wait(60)
        asked.set()
        assert restored.wait(30)
        time.sleep(1.5)  # in which it is judged
        assert not any("can't keep" in line for line in said)


def test_what_was_pinned_meanwhile_is_not_replaced_by_a_late_restore(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = config.replace(context_size=4096, parallel=1)
    with ready(roomy) as (manager, _):
        ask(manager, f"Other: {TEXT}")
        assert manager.pinned("table", TEXT).pin
    pinned, intact = Event(), PromptStore.intact

    def verify_late(store: PromptStore, prompt: KeptPrompt) -> bool | None:
        assert prompt.name or pinned.wait(30)
        return intact(store, prompt)

    monkeypatch.setattr(PromptStore, "intact", verify_late)
    with ready(roomy) as (manager, _), manager.pinned("table", TEXT) as table:
        assert table.pin.restored
        pinned.set()
        time.sleep(1)
        assert reused(table.chat("How many?", **GREEDY).wait(60)) > 0.9


def test_every_slot_is_kept_by_a_stop(config: ServerConfig) -> None:
    four = config.replace(context_size=16384, parallel=4)
    with ready(four) as (manager, _):
        for slot in range(4):
            manager.chat(f"{slot}: {TEXT}", id_slot=slot, **GREEDY).wait(60)
        manager.stop().wait(60)
        assert {prompt.slot for prompt in kept(four)} == {0, 1, 2, 3}
    assert len([*four.prompts_dir.iterdir()]) == 8


def test_a_prompt_that_is_verified_while_others_are_restored_is_not_lost(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = config.replace(context_size=8192, parallel=2)
    with ready(two) as (manager, _):
        for slot in range(2):
            manager.chat(f"{slot}: {TEXT}", id_slot=slot, **GREEDY).wait(60)
    first, second = kept(two)
    one_restored, restored = Event(), []
    restore, intact = Slots.restore, PromptStore.intact

    def verify(store: PromptStore, prompt: KeptPrompt) -> bool | None:
        assert prompt.key == first.key or one_restored.wait(30)
        return intact(store, prompt)

    async def take_long(slots: Slots, slot: int, *args: Any) -> int:
        tokens = await restore(slots, slot, *args)
        one_restored.set()
        await anyio.sleep(0.5)  # meanwhile, the second is verified
        restored.append(slot)
        return tokens

    monkeypatch.setattr(PromptStore, "intact", verify)
    monkeypatch.setattr(Slots, "restore", take_long)
    with ready(two):
        eventually(lambda: restored == [first.slot, second.slot], within=10)


def test_a_server_that_does_not_answer_at_first_has_the_same_context(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = config.replace(context_size=8192)
    with ready(roomy) as (manager, _):
        text = ask(manager, TEXT).text
    ask_slots, asked = HealthProbe.ask_slots, []

    async def answer_late(probe: HealthProbe) -> list[dict[str, Any]]:
        asked.append(probe)
        return await ask_slots(probe) if len(asked) > 1 else []

    with monkeypatch.context() as patch:
        patch.setattr(HealthProbe, "ask_slots", answer_late)
        with ready(roomy) as (manager, said):
            eventually(lambda: manager.work.restored)
            text = ask(manager, TEXT, text, "And pears?").text
            assert not [line for line in said if "has changed" in line]
    with ready(roomy) as (manager, said):
        eventually(lambda: any("restored" in line for line in said))
        assert not [line for line in said if "has changed" in line]


def test_a_server_that_sleeps_is_not_woken_by_who_finds_it(config: ServerConfig) -> None:
    sleepy = config.replace(context_size=4096, idle_shutdown_seconds=4)
    with ready(sleepy) as (manager, _):
        ask(manager, TEXT)
        eventually(lambda: is_asleep(manager))
        with ModelManager(config=sleepy) as second:
            eventually(lambda: is_asleep(second))
            time.sleep(4)  # in which it would save what the log has told
            assert is_asleep(second)
        assert "exiting sleeping state" not in sleepy.log_path.read_text()


def test_a_stop_cancels_all_pins_and_saves_the_other_slots(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = config.replace(context_size=12288, parallel=3)
    post, reading, first = HealthProbe.post, Event(), list[Any]()

    async def read_long(probe: HealthProbe, path: str, request: Any, *more: Any) -> dict[str, Any]:
        if path == "/completion":
            first.append(request)
            reading.set()
            await anyio.sleep(60)
        return await post(probe, path, request, *more)

    with ready(three) as (manager, _):
        manager.chat(TEXT, id_slot=2, **GREEDY).wait(60)
        monkeypatch.setattr(HealthProbe, "post", read_long)
        pins = [manager.pinned(name, f"{name}: {TEXT}") for name in "ab"]
        assert reading.wait(30)
        time.sleep(0.5)  # until the other waits for its turn
        manager.stop().wait(60)
        for pin in pins:
            with pytest.raises(ServerError, match="is being stopped"):
                _ = pin.pin
        assert len(first) == 1
    assert [prompt.slot for prompt in kept(three)] == [2]


def test_a_pin_that_slept_is_restored(config: ServerConfig) -> None:
    sleepy = config.replace(context_size=8192, idle_shutdown_seconds=3)
    with ready(sleepy) as (manager, _):
        with manager.pinned("table", TEXT) as table:
            assert not table.pin.restored
        eventually(lambda: is_asleep(manager))
        with manager.pinned("table", TEXT) as table:
            assert table.pin.restored
            assert reused(table.chat("How many?", **GREEDY).wait(60)) > 0.9


def is_asleep(manager: ModelManager) -> bool:
    health = manager.state.last_health_check
    return health is not None and health.asleep


def test_a_start_elsewhere_lets_a_stop_save_its_prompts(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.supervisor.supervisor._LOOK_EVERY", 60)  # it starts unseen
    save, waited_for = Slots.save, Event()

    async def save_later(slots: Slots, slot: int, file: str) -> int:
        with anyio.fail_after(30):
            while not waited_for.is_set():
                await anyio.sleep(0.01)
        await anyio.sleep(0.5)
        return await save(slots, slot, file)

    def listen(event: object) -> None:
        if isinstance(event, Activity) and "Waiting for the previous server" in event.message:
            waited_for.set()

    config = config.replace(context_size=4096)
    with ModelManager(config=config) as other, ready(config) as (manager, said):
        other.subscribe(listen)
        ask(manager, TEXT)
        monkeypatch.setattr(Slots, "save", save_later)
        stopping = manager.stop()
        eventually(lambda: manager.state.status is ServerStatus.STOPPING)
        other.start(config.replace(port=unused_port()))
        stopping.wait(60)
        assert len(kept(config)) == 1
        assert not any("can't keep" in line for line in said)
        other.stop().wait(60)


def test_a_profile_can_keep_none(kept_config: ServerConfig) -> None:
    with ready(kept_config.replace(keep_prompts=False)) as (manager, _):
        ask(manager, TEXT)
        with pytest.raises(ServerError, match="LLAMACPP_KEEP_PROMPTS"), manager.pinned("a", TEXT):
            pass
    assert not kept_config.prompts_dir.exists()


CHANGES: dict[str, object] = {
    "context_size": 1024,
    "n_gpu_layers": 3,
    "batch_size": 64,
    "ubatch_size": 32,
    "parallel": 3,
    "flash_attention": "on",
    "tool_calling": True,
    "speculation": "ngram",
    "extra_args": "--cache-type-k q8_0",
}
FLAGS = (
    "--cache-type-k q4_0",
    "--cache-type-v q8_0",
    "--rope-freq-base 20000",
    "--rope-scaling yarn",
    "--yarn-ext-factor 0.5",
    "--lora {adapter}",
    "--lora-scaled {adapter} 0.5",
    "--control-vector {adapter}",
    "--chat-template chatml",
    "--chat-template-file {adapter}",
    "--override-kv a=int:1",
    "--swa-full",
    "--no-kv-offload",
)


def test_no_wrong_restore_after_random_changes(config: ServerConfig, tmp_path: Path) -> None:
    """Of model, build, settings and files, one of 200 at a time."""
    dice = random.Random(7)
    model, adapter, program = (tmp_path / name for name in ("model.gguf", "adapter", "program"))
    assert config.model
    model.write_bytes(config.model.read_bytes())
    adapter.write_bytes(b"adapter")
    program.write_bytes(b"program")
    engine = Engine(EngineKind.NATIVE, (str(program),), "1 (abc)", Dialect(()))
    base = config.replace(model=model, extra_args=f"--lora {adapter}")
    store = PromptStore(tmp_path / "prompts", 1e9)
    assert store.prepare() is None
    state = store.state("a")
    state.write_bytes(dice.randbytes(5000))
    facts = state_facts(base, engine)
    prompt = store.add(
        KeptPrompt(key="a", profile="primary", model="demo", slot=0, tokens=900, facts=facts)
    )
    assert prompt
    assert not prompt.changed(state_facts(base.replace(temperature=0.5, port=9), engine))
    whole = state.read_bytes()

    def usable(config: ServerConfig = base, engine: Engine = engine) -> bool:
        return not prompt.changed(state_facts(config, engine)) and store.intact(prompt)

    def setting() -> bool:
        name = dice.choice([*CHANGES])
        return usable(base.replace(**{name: CHANGES[name]}))

    def flag() -> bool:
        more = dice.choice(FLAGS).format(adapter=adapter).split()
        return usable(base.replace(extra_args=(*base.extra_args, *more)))

    def build() -> bool:
        return usable(engine=replace(engine, version=f"{dice.randrange(2, 9999)} (abc)"))

    def damage() -> bool:
        state.write_bytes(damaged(whole, dice))
        try:
            return usable()
        finally:
            state.write_bytes(whole)

    def another_file() -> bool:
        file = dice.choice([model, adapter, program])
        file.write_bytes(damaged(file.read_bytes(), dice))
        return usable()

    assert usable()
    wrong = [change for change in dice.choices([setting, flag, build, damage], k=170) if change()]
    wrong += [another_file for _ in range(30) if another_file()]
    assert not wrong


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Change a bit, cut the end, or add to it."""
    changed = bytearray(content)
    match dice.randrange(3):
        case 0:
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        case 1:
            del changed[dice.randrange(len(changed)) :]
        case _:
            changed += dice.randbytes(dice.randrange(1, 50))
    return bytes(changed)


def test_a_prompt_that_cant_be_read_now_stays(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = config.replace(context_size=8192)
    with ready(roomy) as (manager, said):
        ask(manager, TEXT)
        manager.stop().wait(60)
        before, opened = kept(roomy), Path.open

        def refuse(path: Path, *args: Any, **more: Any) -> Any:
            if path.suffix == ".state":
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            return opened(path, *args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refuse)
            manager.start().wait(60)
            eventually(lambda: any("was not restored" in line for line in said))
        assert kept(roomy) == before


def test_the_oldest_go_where_there_are_too_many(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "prompts", 2500)
    assert store.prepare() is None

    def add(name: str, size: int = 1000) -> KeptPrompt | None:
        key = store.new_key()
        store.state(key).write_bytes(bytes(size))
        one = KeptPrompt(
            key=key, name=name, profile="primary", model="m", slot=0, tokens=900, facts={}
        )
        return store.add(one)

    for name in ("a", "b", "c", "b"):
        assert add(name)
    assert [prompt.name for prompt in store.prompts()] == ["b", "c"]
    assert add("large", 3000) is None
    assert len([*store.folder.iterdir()]) == 4
    assert add("")
    assert add("")  # takes the place of the last one in its slot
    assert [prompt.name for prompt in store.prompts()] == ["", "b"]


def test_what_somebody_deletes_while_it_is_verified_was_not_damaged(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = config.replace(context_size=8192)
    with ready(roomy) as (manager, _):
        ask(manager, TEXT)
    intact, found = PromptStore.intact, list[bool | None]()

    def delete_first(store: PromptStore, prompt: KeptPrompt) -> bool | None:
        store.clear([prompt], whole=False)
        found.append(intact(store, prompt))
        return found[0]

    monkeypatch.setattr(PromptStore, "intact", delete_first)
    with ready(roomy) as (_, said):
        eventually(lambda: found)
    assert not any("damaged" in line for line in said)


def test_two_that_keep_the_same_prompt_at_once_keep_one_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PromptStore(tmp_path / "prompts", 1e9)
    assert store.prepare() is None
    both, listed = Barrier(2, timeout=30), PromptStore.prompts

    def list_at_once(store: PromptStore) -> list[KeptPrompt]:
        both.wait()
        found = listed(store)
        both.wait()
        return found

    def add(key: str) -> None:
        store.state(key).write_bytes(bytes(1000))
        store.add(KeptPrompt(key=key, profile="p", model="m", slot=0, tokens=900, facts={}))

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(PromptStore, "prompts", list_at_once)
        list(threads.map(add, "ab"))
    assert store.prompts()
    add("c")
    assert [prompt.key for prompt in store.prompts()] == ["c"]


def test_what_others_could_have_written_is_not_used(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "prompts", 1e9)
    assert store.prepare() is None
    store.state("a").write_bytes(b"state")
    added = store.add(KeptPrompt(key="a", profile="p", model="m", slot=0, tokens=900, facts={}))
    assert store.prompts() == [added]
    about = store.folder / "a.json"
    for wrong in ("{", "[]", json.dumps({"key": "../a"}), about.read_text().replace('"a"', '"b"')):
        (store.folder / "c.json").write_text(wrong)
        assert store.prompts() == [added]
    (store.folder / "c.json").unlink()
    for odd in ('"at": 1e300', '"at": -1', '"size": 1e400', '"tokens": "many"'):
        name, _, _ = odd.partition(":")
        changed = re.sub(rf"{name}:\s*[^,]+", odd, about.read_text())
        assert changed != about.read_text()
        (store.folder / "a.json").write_text(changed)
        assert store.prompts() == []
    about.unlink()
    os.mkfifo(about)  # reading it would wait for ever
    store.state("b").mkdir()
    (store.folder / "notes.json").write_text("mine")
    assert store.prompts() == []
    store.clear([], whole=True)
    assert (store.folder / "notes.json").exists()
    link = PromptStore(tmp_path / "link", 1e9)
    link.folder.symlink_to(store.folder)
    assert "is a link" in (link.prepare() or "")
    assert link.prompts() == []
    store.folder.chmod(0o777)
    assert store.prompts() == []
    assert "Other users can write" in (store.prepare() or "")


def test_they_are_listed_and_removed_in_a_terminal(config: ServerConfig, tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text(f"LLAMACPP_LOG_DIR={config.log_dir}\n")
    run = CliRunner().invoke
    assert "no kept prompts" in run(app, ["prompts", "--env", str(env)]).output
    store = PromptStore.of(config)
    assert store.prepare() is None
    for name in ("manual.txt", ""):
        key = store.new_key()
        store.state(key).write_bytes(bytes(2000))
        store.add(
            KeptPrompt(
                key=key, name=name, profile="primary", model="m", slot=0, tokens=1234, facts={}
            )
        )
    listed = run(app, ["prompts", "list", "--env", str(env)]).output
    assert "manual.txt" in listed
    assert "1,234" in listed
    assert "named 'x'" in run(app, ["prompts", "list", "x", "--env", str(env)]).output
    assert (
        "Removed 1 kept" in run(app, ["prompts", "clear", "manual.txt", "--env", str(env)]).output
    )
    assert [prompt.name for prompt in store.prompts()] == [""]
    store.folder.chmod(0o777)
    assert "Other users can write" in run(app, ["prompts", "--env", str(env)]).output
    store.folder.chmod(0o700)
    (state,) = store.folder.glob("*.state")
    state.rename(tmp_path / "state")
    state.mkdir()  # can't be deleted like a file
    failed = run(app, ["prompts", "clear", "--env", str(env)]).output
    assert state.name in failed
    assert "Removed" not in failed
    state.rmdir()
    (tmp_path / "state").rename(state)
    assert "Removed 0 kept" in run(app, ["prompts", "clear", "--env", str(env)]).output
    assert [*store.folder.iterdir()] == []
