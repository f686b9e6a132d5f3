"""A server's slots: what they hold, how that is written to a file and read from one.

The engine does both itself: `POST /slots/N?action=save|restore`, see `tools/server/README.md` of
llama.cpp.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Any

import anyio

from kitty_nb.errors import ServerError
from kitty_nb.supervisor.requests import Held

if TYPE_CHECKING:
    from collections.abc import Collection

    from kitty_nb.supervisor.health import HealthProbe
    from kitty_nb.supervisor.requests import RequestLog

_SAVED_WITHIN = 10.0  # seconds; a server that works on a long prompt does not do it before
_QUESTIONS = ("Why?", "1 2")  # what they have in common is what any question begins with


class Slots:
    """The slots of one server, by what it answers and by its log."""

    def __init__(self, probe: HealthProbe, log: RequestLog) -> None:
        self._probe, self._log = probe, log
        self._reading: set[anyio.CancelScope] = set()

    async def contents(self) -> dict[int, Held]:
        """Return what those at rest hold: the server knows before its log tells."""
        contents = {}
        for slot in await self._probe.ask_slots():
            number = slot.get("id")
            logged = self._log.held.get(number) if isinstance(number, int) else None
            task = slot.get("id_task", logged and logged.task)
            tokens = slot.get("n_prompt_tokens", logged and logged.tokens)
            if isinstance(task, int) and isinstance(tokens, int) and not slot.get("is_processing"):
                contents[int(slot["id"])] = Held(task, tokens)
        return contents

    async def free(self, *spared: Collection[int]) -> int:
        """Return the one whose contents were used longest ago.

        Args:
            spared: Those to take only where there is no other, the most precious first.

        Raises:
            ServerError: There is none, or the server does not tell.
        """
        slots = await self._probe.ask_slots()
        free = [int(slot.get("id", 0)) for slot in slots if not slot.get("is_processing")]
        if not slots:
            raise ServerError("The server does not list its slots. Start it without --no-slots.")
        if not free:
            raise ServerError("All slots are busy. Try again when an answer is complete.")

        def worth(slot: int) -> tuple[int, ...]:
            held = self._log.held.get(slot)
            return *(slot in some for some in spared), held.task if held else -1

        return min(free, key=worth)

    async def save(self, slot: int, file: str) -> int:
        """Write what one holds to a file in the server's folder; return its tokens.

        It goes on when it is cancelled: else the engine would write what nobody keeps.

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
        """Read into one what a file in the server's folder holds; return its tokens.

        `asked` is set once the server has been asked to.

        Raises:
            ServerCrashedError: The server broke off.
            ServerError: It could not be read.
        """
        said = await self._probe.post(f"/slots/{slot}?action=restore", {"filename": file}, asked)
        return int(said.get("n_restored", 0))

    async def read(self, slot: int, tokens: list[int]) -> float | None:
        """Have one hold a prompt; return the seconds, None where some of it was there before.

        Raises:
            ServerError: The server refused it, broke off, or is being stopped.
        """
        request = {"prompt": tokens, "n_predict": 0, "id_slot": slot, "cache_prompt": True}
        said: dict[str, Any] = {}
        with anyio.CancelScope() as scope:
            self._reading.add(scope)
            try:
                said = await self._probe.post("/completion", request)
            finally:
                self._reading.discard(scope)
        if scope.cancelled_caught:
            raise ServerError("the server is being stopped")
        timings = said.get("timings", {})
        return None if timings.get("cache_n") else timings.get("prompt_ms", 0.0) / 1000

    def hang_up(self) -> None:
        """Break off what is being read: the server is to stop."""
        for scope in self._reading:
            scope.cancel()

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
