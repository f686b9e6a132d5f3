"""How to talk to the running model, to be copied into a cell."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ipywidgets import HTML

from kitty_nb.supervisor.events import ServerStatus

if TYPE_CHECKING:
    from kitty_nb.supervisor.events import ServerState

_CODE = """\
messages = [{{"role": "user", "content": "Who are you?"}}]

# panel.manager.http is an httpx.Client that knows the server's address and key.
answer = panel.manager.http.post("/v1/chat/completions", json={{"messages": messages}})
print(answer.json()["choices"][0]["message"]["content"])

# With `pip install openai`, panel.manager.client is an openai.OpenAI.
panel.manager.client.chat.completions.create(model={alias!r}, messages=messages)

# Other programs need the address {endpoint}/v1 and the key:
key = panel.manager.reveal_api_key()"""


class Snippet(HTML):
    """Folded code; hidden until the server is ready."""

    def __init__(self) -> None:
        super().__init__()
        self.add_class("kitty-snippet")

    def show(self, state: ServerState) -> None:
        """Show the code for a server."""
        code = _CODE.format(alias=state.alias, endpoint=state.endpoint)
        summary = "<summary>Use it from code</summary>"
        self.value = f"<details>{summary}<pre>{escape(code)}</pre></details>"
        self.layout.display = None if state.status is ServerStatus.READY else "none"
