"""The table of the requests that a server has finished."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from kitty_nb.widgets.display import Fold, Page, asset, duration

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kitty_nb.supervisor.requests import Request


def request_row(request: Request) -> dict[str, Any]:
    """Arrange a request as texts for people; the page's own clock tells `at`."""

    def told(value: float | None, text: Callable[[float], str]) -> str:
        return "" if value is None else text(value)

    return {
        "at": request.at,
        "prompt": told(request.prompt_tokens, "{:,}".format),
        "answer": told(request.answer_tokens, "{:,}".format),
        "first": told(request.first_token, duration),
        "speed": told(request.tokens_per_second, "{:.3g} tok/s".format),
        "cached": told(request.cached, "{:.0%}".format),
        "accepted": told(request.accepted, "{:.0%}".format),
        "took": told(request.seconds, duration),
        "ended": request.ended.value,
        "error": request.error,
    }


class RequestsTable(Fold):
    """The requests since the server's start, by anybody; no contents of theirs."""

    def __init__(self, on_unfold: Callable[[], object]) -> None:
        self.rows = RequestRows(on_unfold)
        super().__init__("Requests", self.rows, on_unfold=on_unfold)

    def show(self, requests: Sequence[Request]) -> None:
        """Show these, oldest first."""
        if self.unfolded:
            self.rows.show(requests)


class RequestRows(Page):
    """The rows of the table.

    Args:
        on_replay_asked: Called, on the front end's thread, when `show` has all rows to send.
    """

    _esm: ClassVar[str] = asset("page.js", "requests_table.js")

    def __init__(self, on_replay_asked: Callable[[], object]) -> None:
        super().__init__("kitty-requests")
        self._on_replay_asked = on_replay_asked
        self._sent: Sequence[Request] | None = None

    def show(self, requests: Sequence[Request]) -> None:
        """Send the rows to the pages, where they are others than before."""
        if requests != self._sent:
            self._sent = requests
            self.send({"kind": "rows", "rows": [request_row(one) for one in reversed(requests)]})

    def receive(self, message: Any) -> None:
        """Take a message of a page."""
        match message:
            case {"kind": "replay"}:
                self._sent = None
                self._on_replay_asked()
