"""The ways to a ready server: its address, its key, code that asks it, its own web page."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import traitlets
from IPython import get_ipython

from kitty_nb.client.connect import Served, hand_overs
from kitty_nb.config import Task
from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.widgets.display import Page, asset

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kitty_nb.client.connect import HandOver
    from kitty_nb.manager import ModelManager
    from kitty_nb.supervisor.events import ServerState


_NONE: Mapping[str, str] = {}


class Address(Page):
    """The server's address and what to copy, while the server is ready.

    The kernel does not know by which address the browser reaches it, nor whether that passes
    JupyterHub or a tunnel, so the page itself finds out: where jupyter-server-proxy answers, the
    link to the server's web page goes through the notebook's own server; else it is the server's
    address, on this machine.

    The server asks for its key there. The key is in neither the link nor this widget's state: it
    travels when the user presses its *Copy*, in a message that nothing keeps.

    Args:
        texts: Returns what can be copied, by name, when somebody copies it; None where there is
            nothing.
        programs: Titles of those that are in the menu of other programs, by name.
    """

    _esm: ClassVar[str] = asset("page.js", "clipboard.js", "address.js")
    endpoint: Any = traitlets.Unicode("").tag(sync=True)
    asks_key: Any = traitlets.Bool(True).tag(sync=True)
    programs: Any = traitlets.List().tag(sync=True)

    def __init__(
        self, texts: Mapping[str, Callable[[], str | None]], programs: Mapping[str, str] = _NONE
    ) -> None:
        super().__init__("kitty-address", programs=[*programs.items()])
        self._texts = texts

    def show(self, state: ServerState) -> None:
        """Show the address of a server, or hide."""
        with self.hold_sync():
            self.endpoint = state.endpoint if state.status is ServerStatus.READY else ""
            self.asks_key = self._texts["key"]() is not None

    def receive(self, message: Any) -> None:
        """Take a message of a page."""
        match message:
            case {"kind": "copy", "what": str(what), "for": str(asker)} if what in self._texts:
                self.send({"kind": "copy", "for": asker, "text": self._texts[what]() or ""})


_CODE = """\
print({panel}.manager.chat("Who are you?", max_tokens=500).wait())

# The same over OpenAI's API, with an httpx.Client that has the server's address and key.
messages = [{{"role": "user", "content": "Who are you?"}}]
request = {{"model": {alias!r}, "messages": messages, "max_tokens": 500}}
answer = {panel}.manager.http.post("/v1/chat/completions", json=request)
print(answer.json()["choices"][0]["message"]["content"])

{openai}

# Other programs need the base URL {endpoint}/v1 and the key:
key = {panel}.manager.reveal_api_key()"""
_EMBED = """\
vectors = {panel}.manager.embed(["A first text.", "A second text."]).wait()
vectors @ vectors.T

# Other programs need the base URL {endpoint}/v1 and the key:
key = {panel}.manager.reveal_api_key()"""
_RANK = """\
for found in {panel}.manager.rerank("A question?", ["An answer.", "Another text."]).wait():
    print(found.score, found.document)"""
_OPENAI = """\
# And with an openai.OpenAI client.
print({panel}.manager.client.chat.completions.create(**request).choices[0].message.content)"""
_NO_OPENAI = "# After `pip install openai`, {panel}.manager.client is an openai.OpenAI."


def snippet(state: ServerState, panel: str) -> str:
    """Return code that asks a server by the name of its panel, to paste into a cell."""
    openai = (_OPENAI if find_spec("openai") else _NO_OPENAI).format(panel=panel)
    code = {Task.CHAT: _CODE, Task.EMBED: _EMBED, Task.RANK: _RANK}[state.task]
    return code.format(panel=panel, openai=openai, alias=state.alias, endpoint=state.endpoint)


def cells_for_programs(
    manager: ModelManager, panel: Callable[[], str]
) -> dict[str, Callable[[], str]]:
    """Return, by program, what makes a cell that uses a server with it."""

    def cell(hand_over: HandOver) -> str:
        state, asks_key = manager.state, manager.reveal_api_key() is not None
        served = Served(manager.base_url, state.alias, state.config.profile, asks_key)
        return hand_over.in_notebook(served, f"{panel()}.manager")

    return {name: partial(cell, one) for name, one in hand_overs().items() if one.python}


def name_of(thing: object) -> str:
    """Return a name that cells have for something, if only `_3`, the output of a cell."""
    shell = get_ipython()
    names = shell.user_ns.copy().items() if shell else ()
    found = [name for name, value in names if value is thing and name.strip("_")]
    return min(found, key=lambda name: name.startswith("_"), default="panel")
