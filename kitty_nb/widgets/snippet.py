"""How to talk to the running model, to be copied into a cell."""

from __future__ import annotations

from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING

from IPython import get_ipython
from ipywidgets import HTML

from kitty_nb.supervisor.events import ServerStatus

if TYPE_CHECKING:
    from kitty_nb.supervisor.events import ServerState

_CODE = """\
print({panel}.manager.chat("Who are you?", max_tokens=500).wait())

# The same in OpenAI's protocol, by an httpx.Client that knows the server's address and key.
messages = [{{"role": "user", "content": "Who are you?"}}]
request = {{"model": {alias!r}, "messages": messages, "max_tokens": 500}}
answer = {panel}.manager.http.post("/v1/chat/completions", json=request)
print(answer.json()["choices"][0]["message"]["content"])

{openai}

# Other programs need the address {endpoint}/v1 and the key:
key = {panel}.manager.reveal_api_key()"""
_OPENAI = """\
# And by an openai.OpenAI.
print({panel}.manager.client.chat.completions.create(**request).choices[0].message.content)"""
_NO_OPENAI = "# After `pip install openai`, {panel}.manager.client is an openai.OpenAI."


class Snippet(HTML):
    """Folded code; hidden until the server is ready.

    Args:
        panel: The panel that the code goes through.
    """

    def __init__(self, panel: object) -> None:
        super().__init__()
        self.add_class("kitty-snippet")
        self._panel = panel
        self._openai = _OPENAI if find_spec("openai") else _NO_OPENAI

    def show(self, state: ServerState) -> None:
        """Show the code for a server."""
        ready = state.status is ServerStatus.READY
        self.layout.display = None if ready else "none"
        if ready:
            panel = _name_of(self._panel)
            openai = self._openai.format(panel=panel)
            code = _CODE.format(
                panel=panel, alias=state.alias, endpoint=state.endpoint, openai=openai
            )
            summary = "<summary>Use it from code</summary>"
            self.value = f"<details>{summary}<pre>{escape(code)}</pre></details>"


def _name_of(thing: object) -> str:
    """Return a name that cells have for something, if only `_3`, the output of a cell."""
    shell = get_ipython()
    names = shell.user_ns.copy().items() if shell else ()
    found = [name for name, value in names if value is thing and name.strip("_")]
    return min(found, key=lambda name: name.startswith("_"), default="panel")
