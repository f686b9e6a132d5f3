"""Keeping a server's prompts: saved when it is idle or stops, restored when it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from anyio.to_thread import run_sync

from kitty_nb.errors import RefusedError, ServerCrashedError, ServerError
from kitty_nb.supervisor.events import Level, Restored
from kitty_nb.supervisor.history import path_text
from kitty_nb.supervisor.kept_prompts import KeptPrompt, PromptStore, digest_of
from kitty_nb.supervisor.requests import Held, RequestLog

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from anyio.abc import TaskStatus

    from kitty_nb.config import ServerConfig
    from kitty_nb.supervisor.health import HealthProbe

    Notify = Callable[[str, Level], object]
    Tell = Callable[[Restored], object]

_WORTH = 256  # tokens; fewer are read again in no time
_RESTED, _LOOK = 2.0, 1.0  # seconds without work, after which slots are saved; between two looks
_SPARED = 50  # saving takes at most a fiftieth of the time, to spare the disk
_CONTEXT, _ADAPTERS = "the context of a slot", "the scale of an adapter"
_ADAPTER_FLAGS = {"--lora", "--lora-scaled"}
_SAVED_WITHIN = 10.0  # seconds; a server that reads a long prompt saves nothing before that is done
_BLAMED_WITHIN = 5.0  # seconds; a server that fails has exited by then
_QUESTIONS = ("Why?", "1 2")  # what their prompts have in common begins the prompt of any question


@dataclass(frozen=True, slots=True)
class Pin:
    """A named prompt that a server has read."""

    name: str  # its name
    tokens: int  # its length
    seconds: float  # seconds until it was read or restored
    # Seconds that reading it took, now or in the past; None if unknown.
    reading: float | None
    restored: bool  # whether it came from the disk


class Slots:
    """The slots of one server, known by its answers and its log.

    The engine writes and reads files itself: `POST /slots/N?action=save|restore`, see
    `tools/server/README.md` of llama.cpp.
    """

    def __init__(self, probe: HealthProbe, log: RequestLog) -> None:
        self._probe, self._log = probe, log

    async def contents(self) -> dict[int, Held]:
        """Return what the idle slots hold: the server knows before its log tells."""
        contents = {}
        for slot in await self._probe.ask_slots():
            number = slot.get("id")
            if not isinstance(number, int) or slot.get("is_processing"):
                continue
            logged = self._log.held.get(number, Held(-1, 0))
            task = slot.get("id_task", logged.task)
            tokens = slot.get("n_prompt_tokens", logged.tokens)
            if isinstance(task, int) and isinstance(tokens, int):
                contents[number] = Held(task, tokens)
        return contents

    async def free(self, *spared: Collection[int]) -> int:
        """Return the idle slot whose contents were used longest ago.

        Args:
            spared: Slots to use only if there is no other, the most precious first.

        Raises:
            ServerError: No slot is idle, or the server doesn't list them.
        """
        slots = await self._probe.ask_slots()
        free = [int(slot.get("id", 0)) for slot in slots if not slot.get("is_processing")]
        if not slots:
            raise ServerError(
                "The server does not list its slots now. Try again when it is idle, and remove any"
                " --no-slots from LLAMACPP_EXTRA_ARGS."
            )
        if not free:
            raise ServerError("All slots are busy. Try again when an answer is complete.")

        def worth(slot: int) -> tuple[int, ...]:
            held = self._log.held.get(slot)
            return *(slot in some for some in spared), held.task if held else -1

        return min(free, key=worth)

    async def save(self, slot: int, file: str) -> int:
        """Write what a slot holds to a file in the server's folder; return its tokens.

        It continues when cancelled: otherwise the engine would write what nobody keeps.

        Raises:
            RefusedError: This build can't.
            ServerError: It could not be written, or not in time.
        """
        said: dict[str, Any] = {}
        with anyio.move_on_after(_SAVED_WITHIN, shield=True):
            said = await self._probe.post(f"/slots/{slot}?action=save", {"filename": file})
        if not said:
            raise ServerError("the server did not save it in time")
        return int(said.get("n_saved", 0))

    async def restore(self, slot: int, file: str, asked: anyio.Event) -> int:
        """Read a file in the server's folder into a slot; return its tokens.

        `asked` is set once the request has been sent.

        Raises:
            ServerCrashedError: The server broke off.
            ServerError: It could not be read.
        """
        said = await self._probe.post(f"/slots/{slot}?action=restore", {"filename": file}, asked)
        return int(said.get("n_restored", 0))

    async def read(self, slot: int, tokens: list[int]) -> float | None:
        """Have a slot read a prompt; return the seconds, or None if it held some of it before.

        Raises:
            ServerError: The server refused it, or broke off.
        """
        request = {"prompt": tokens, "n_predict": 0, "id_slot": slot, "cache_prompt": True}
        said = await self._probe.post("/completion", request)
        timings = said.get("timings", {})
        return None if timings.get("cache_n") else timings.get("prompt_ms", 0.0) / 1000

    async def prefix(self, text: str) -> list[int]:
        """Return the tokens that all conversations about a text begin with.

        Raises:
            ServerError: The server refused it, or broke off.
        """
        asked = []
        for question in _QUESTIONS:
            messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
            prompt = (await self._probe.post("/apply-template", {"messages": messages}))["prompt"]
            request = {"content": prompt, "add_special": True, "parse_special": True}
            asked.append((await self._probe.post("/tokenize", request))["tokens"])
        same = takewhile(lambda pair: pair[0] == pair[1], zip(*asked, strict=False))
        return [token for token, _ in same]

    async def scales(self, slot: int | None = None) -> dict[Any, Any]:
        """Return the scale of each adapter; for a slot, those of its request, none by default."""
        adapters = await self._probe.get("/lora-adapters") if slot is None else None
        for one in await self._probe.ask_slots() if slot is not None else ():
            if one.get("id") == slot:
                adapters = one.get("params", {}).get("lora")
        listed = adapters if isinstance(adapters, list) else ()
        return {one.get("id"): one.get("scale") for one in listed if isinstance(one, dict)}


class PromptKeeper:
    """The kept prompts of one server.

    Its states depend on `facts`, which `state_facts` returns. `notify` is called with sentences for
    the user, `tell` with each prompt that is restored.
    """

    def __init__(
        self,
        config: ServerConfig,
        facts: Mapping[str, str],
        probe: HealthProbe,
        log: RequestLog,
        notify: Notify,
        tell: Tell,
        clock: Callable[[], float],
    ) -> None:
        self._profile = config.profile
        # Not its alias, which a profile may give to each of its models.
        self._model = config.known_as or Path(path_text(config.model)).stem
        self._facts, self._store = dict(facts), PromptStore.of(config)
        self._slots, self._probe, self._log, self._clock = Slots(probe, log), probe, log, clock
        self._notify, self._tell = notify, tell
        self._saved: dict[int, int] = {}  # by slot: the task after which it was saved
        self._written: list[KeptPrompt] = []  # by the engine, and not yet in the store
        self._candidates: list[KeptPrompt] = []
        # By slot: what was restored, and the last task before that, until a request uses it.
        self._restored: dict[int, tuple[KeptPrompt, int]] = {}
        self._pins: dict[int, KeptPrompt] = {}  # by slot, until it holds something else
        # By key: what the server was to restore without an answer so far, and until when a failure
        # is blamed on it.
        self._restoring: dict[str, tuple[KeptPrompt, float]] = {}
        self._begun = self._off = False
        self._complaints: set[str] = set()
        self._pinning: set[anyio.CancelScope] = set()
        self._turn = anyio.Lock()

    async def look(self) -> None:
        """Find what can be restored, while the server loads, and delete what is damaged."""
        for prompt in await run_sync(self._store.prompts):
            if prompt.name or (prompt.profile, prompt.model) != (self._profile, self._model):
                continue
            if changed := set(prompt.changed(self._facts)) - {_CONTEXT, _ADAPTERS}:
                self._refuse(prompt, changed)
                continue
            intact = await run_sync(self._store.intact, prompt, abandon_on_cancel=True)
            if intact:
                self._candidates.append(prompt)
            elif intact is None:
                why = f"{_kept(prompt)} was not restored: its file can't be read."
                self._notify(why, Level.WARNING)
            else:
                await self._remove(prompt, "was damaged")
        if self._begun and self._candidates:
            await self._restore_late()

    async def prepare(self) -> None:
        """Find out what states depend on, before the server is ready, unless that would wake it."""
        self._off = await run_sync(self._store.is_useless, self._facts)
        props = await self._probe.get("/props")
        if not (isinstance(props, dict) and props.get("is_sleeping")):
            await self._learn_facts()

    async def _learn_facts(self) -> bool:
        """Ask the server, unless it has told, for the rest of what states depend on.

        Returns:
            Whether that is known now.
        """
        if _CONTEXT in self._facts:
            return True
        if _ADAPTER_FLAGS & self._facts.keys():
            if not (scales := await self._slots.scales()):
                return False
            self._facts[_ADAPTERS] = digest_of(scales)
        if not (slots := await self._probe.ask_slots()):
            return False
        self._facts[_CONTEXT] = digest_of(*(slot.get("n_ctx") for slot in slots))
        return True

    async def restore(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Restore what the slots held.

        Its task counts as started once the server has received the requests: later ones wait.
        """
        async with self._turn, anyio.create_task_group() as tasks:
            candidates = await self._take()
            before = await self._slots.contents() if candidates else {}
            for prompt in candidates:
                asked = anyio.Event()
                tasks.start_soon(self._restore, prompt, prompt.slot, before, asked)
                await asked.wait()
            task_status.started()

    async def _restore_late(self) -> None:
        """Restore what was found after the server was ready, into slots that are still unused."""
        async with self._turn:
            for prompt in await self._take():
                contents = await self._slots.contents()
                held = contents.get(prompt.slot)
                filled = self._restored.keys() | self._pins.keys()
                if held and held.tokens < _WORTH and prompt.slot not in filled:
                    await self._restore(prompt, prompt.slot, contents, anyio.Event())

    async def _take(self) -> list[KeptPrompt]:
        """Take the prompts that were found since the last call; return those that fit."""
        self._begun = True
        candidates, self._candidates = self._candidates, []
        if self._off or not candidates:
            return []
        fit, known = [], await self._learn_facts()
        for prompt in candidates:
            if not known:
                why = "the server did not answer in time"
                self._notify(f"{_kept(prompt)} was not restored: {why}.", Level.WARNING)
            elif changed := prompt.changed(self._facts):
                self._refuse(prompt, changed)
            else:
                fit.append(prompt)
        return fit

    async def _restore(
        self, prompt: KeptPrompt, slot: int, before: Mapping[int, Held], asked: anyio.Event
    ) -> bool:
        began = self._clock()
        self._restoring[prompt.key] = prompt, math.inf
        try:
            tokens = await self._slots.restore(slot, self._store.state(prompt.key).name, asked)
            del self._restoring[prompt.key]
        except ServerCrashedError:  # why will be known when it has exited
            return False
        except ServerError as error:
            del self._restoring[prompt.key]
            self._notify(f"{_kept(prompt)} was not restored: {error}", Level.WARNING)
            return False
        finally:
            asked.set()
            if prompt.key in self._restoring:
                self._restoring[prompt.key] = prompt, self._clock() + _BLAMED_WITHIN
        if tokens != prompt.tokens:
            await self._remove(prompt, "was only partly restored")
            return False
        self._restored[slot] = prompt, before[slot].task if slot in before else -1
        restored = Restored(prompt.tokens, self._clock() - began, prompt.reading)
        self._tell(restored)
        which = f"the prompt {prompt.name!r}" if prompt.name else "a kept prompt"
        self._notify(f"Found {which}: {restored}.", Level.INFO)
        return True

    async def blame(self) -> None:
        """Delete what the server was restoring when it failed: the next one would fail likewise."""
        now = self._clock()
        for prompt in [prompt for prompt, until in self._restoring.values() if now <= until]:
            await self._remove(prompt, "made the server fail")

    async def _remove(self, prompt: KeptPrompt, why: str) -> None:
        if await run_sync(self._store.discard, prompt.key):  # else somebody else has deleted it
            self._notify(f"{_kept(prompt)} {why}, so it was deleted.", Level.WARNING)

    async def tend(self) -> None:
        """Save the slots of a server that is idle."""
        rested, due = 0.0, 0.0
        while not self._off:
            await anyio.sleep(_LOOK)
            await self._judge()
            now = self._clock()
            rested = 0.0 if self._log.active else rested + _LOOK
            if rested >= _RESTED and now >= due and self._changed(self._log.held):
                await self.save()
                await self.settle()
                due = self._clock() + (self._clock() - now) * _SPARED

    async def _judge(self) -> None:
        """Find out from the next request whether a restored prompt was of any use."""
        for slot, (prompt, before) in tuple(self._restored.items()):
            held = self._log.held.get(slot)
            if held is None or held.task <= before:
                continue
            del self._restored[slot]
            # A request that extends the prompt, and yet had to be read from its beginning. One that
            # is shorter extends what the slot held before.
            extends = held.extends and held.tokens >= prompt.tokens
            if extends and held.cached is not None and held.cached < prompt.tokens / 2:
                await self._give_up(
                    "it reads restored prompts again, as older builds do for models with sliding"
                    " windows or recurrent layers"
                )

    async def _give_up(self, why: str) -> None:
        self._off = True
        await run_sync(self._store.note_useless, self._facts)
        self._notify(
            f"This build of llama-server can't keep prompts of {self._model}: {why}. A newer build"
            " may be able to.",
            Level.INFO,
        )

    def _changed(self, contents: Mapping[int, Held]) -> list[int]:
        """Return the slots whose contents are worth keeping and not kept yet."""
        return [
            slot
            for slot, held in contents.items()
            if held.tokens >= _WORTH
            and self._saved.get(slot) != held.task
            and not (slot in self._pins and self._pins[slot].tokens == held.tokens)
        ]

    async def save(self) -> None:
        """Have the engine write what the idle slots hold; `settle` keeps it."""
        if self._off:
            return
        async with self._turn:
            if not await self._learn_facts():
                return
            contents = await self._slots.contents()
            kept = {prompt.request for prompt in await run_sync(self._store.prompts)}
            for slot in self._changed(contents):
                if self._request(slot, contents[slot]) in kept:
                    self._saved[slot] = contents[slot].task
                else:
                    await self._save_rested(slot, contents[slot])

    async def _save_rested(self, slot: int, held: Held) -> None:
        """Save what a slot holds, unless it was computed with other adapters than at the start."""
        self._saved[slot] = held.task
        if _ADAPTER_FLAGS & self._facts.keys():
            now, used = await self._slots.scales(), await self._slots.scales(slot)
            if digest_of(now) != self._facts.get(_ADAPTERS) or used not in ({}, now):
                return
        pace = self._log.prompt_speed
        reading = held.tokens / pace if pace else None
        await self._save(self._describe(slot, reading, request=self._request(slot, held)))

    def _request(self, slot: int, held: Held) -> str:
        """Return a digest that identifies a slot's last request among all requests ever made."""
        process = self._probe.process
        return digest_of(process and (process.pid, process.create_time), slot, held.task)

    async def _save(self, prompt: KeptPrompt) -> KeptPrompt | None:
        """Have the engine write a prompt; return it with its length, or None if it did not."""
        try:
            file = self._store.state(prompt.key).name
            tokens = await self._slots.save(prompt.slot, file)
        except RefusedError as error:
            await self._give_up(str(error).rstrip("."))
            return None
        except ServerError as error:
            await run_sync(self._store.discard, prompt.key)
            if self._probe.process and self._probe.process.runs():
                self._complain(str(error).rstrip("."), "Check the disk and its free space")
            return None
        if tokens < _WORTH and not prompt.name:
            await run_sync(self._store.discard, prompt.key)  # something else has emptied the slot
            return None
        prompt = prompt.model_copy(update={"tokens": tokens})
        self._written.append(prompt)
        return prompt

    def _describe(self, slot: int, reading: float | None, **known: Any) -> KeptPrompt:
        """Return a record of what a slot holds, with further fields."""
        return KeptPrompt(
            key=self._store.new_key(),
            profile=self._profile,
            model=self._model,
            slot=slot,
            tokens=0,
            facts=self._facts,
            reading=reading,
            **known,
        )

    async def settle(self) -> None:
        """Keep what the engine has written."""
        while self._written:
            prompt = self._written.pop()
            try:
                with anyio.CancelScope(shield=True):
                    kept = await run_sync(self._store.add, prompt)
                if not kept:
                    self._complain("it is larger than LLAMACPP_KEEP_PROMPTS_GB")
            except FileNotFoundError:
                pass  # somebody has cleared the folder meanwhile
            except OSError as error:
                self._complain(error.strerror or type(error).__name__)

    def _complain(
        self, why: str, fix: str = "Free some space there, raise LLAMACPP_KEEP_PROMPTS_GB"
    ) -> None:
        if why not in self._complaints:
            self._complaints.add(why)
            self._notify(
                f"Can't keep a prompt in {self._store.folder}: {why}. {fix}, or set"
                " LLAMACPP_KEEP_PROMPTS=off.",
                Level.WARNING,
            )

    def hang_up(self) -> None:
        """Cancel the pins under way and those that wait for them: the server is to stop."""
        for scope in self._pinning:
            scope.cancel()

    async def pin(self, name: str, text: str) -> Pin:
        """Have a slot hold a text as the system message. See `Supervisor.pin`.

        Raises:
            ServerError: The server refused it, broke off, or is being stopped.
        """
        with anyio.CancelScope() as scope:
            self._pinning.add(scope)
            try:
                return await self._pin(name, text)
            finally:
                self._pinning.discard(scope)
        raise ServerError("the server is being stopped")

    async def _pin(self, name: str, text: str) -> Pin:
        began = self._clock()
        tokens = await self._slots.prefix(text)
        source = digest_of(tokens)
        async with self._turn:
            for slot, prompt in self._pins.items():
                held = self._log.held.get(slot)
                same = (prompt.name, prompt.source) == (name, source)
                if same and held and held.tokens == prompt.tokens:
                    return Pin(name, prompt.tokens, 0.0, prompt.reading, restored=True)
            if not await self._learn_facts():
                raise ServerError("the server does not answer in time. Try again when it is idle.")
            slot = await self._slots.free(self._pins, self._restored)
            contents = await self._slots.contents()
            if slot in self._changed(contents):
                await self._save_rested(slot, contents[slot])
            kept = await self._find(name, source)
            restored = kept is not None and await self._restore(kept, slot, contents, anyio.Event())
            if not (kept and restored):
                kept = await self._read(name, source, tokens, slot)
            self._pins[slot] = kept
        await self.settle()
        return Pin(name, kept.tokens, self._clock() - began, kept.reading, restored)

    async def _find(self, name: str, source: str) -> KeptPrompt | None:
        """Return the kept prompt of that name, if it is of the same text and may be used."""
        for prompt in () if self._off else await run_sync(self._store.prompts):
            same = (prompt.name, prompt.source) == (name, source)
            if not same or prompt.changed(self._facts):
                continue
            if await run_sync(self._store.intact, prompt, abandon_on_cancel=True):
                return prompt
        return None

    async def _read(self, name: str, source: str, tokens: list[int], slot: int) -> KeptPrompt:
        """Have the server read a prompt, and keep it."""
        reading = await self._slots.read(slot, tokens)
        prompt = self._describe(slot, reading, name=name, source=source)
        kept = None if self._off else await self._save(prompt)
        return kept or prompt.model_copy(update={"tokens": len(tokens)})

    def _refuse(self, prompt: KeptPrompt, changed: Iterable[str]) -> None:
        names = ", ".join(sorted(changed))
        verb = "has" if len(set(changed)) == 1 else "have"
        self._notify(f"{_kept(prompt)} was not restored: {names} {verb} changed.", Level.INFO)


def _kept(prompt: KeptPrompt) -> str:
    which = f"The prompt {prompt.name!r}" if prompt.name else "A prompt"
    return f"{which} of {prompt.tokens:,} tokens"
