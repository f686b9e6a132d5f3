"""How fast a server answers, by what its slots say of themselves. No clock of its own."""

from __future__ import annotations

from typing import Any


class AnswerPace:
    """Measures between one look at `/slots` and the next.

    The server counts tokens of a request while it works on it, so this costs it nothing more than
    the look. What a request brought between the last look and its end is not seen.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[Any, Any], int] = {}
        self._at: float | None = None
        self._pace = 0.0
        self._silent_since: float | None = None

    def measure(self, slots: list[dict[str, Any]], at: float) -> float | None:
        """Return the tokens a second since the last ones; None at the first look, or untold.

        A slow server's next token may come after several looks: until then the pace is the last
        one, or that of a token which came now.

        Args:
            slots: What `/slots` answers.
            at: When it did, in seconds of any clock.
        """
        busy = [slot for slot in slots if slot.get("is_processing")]
        counts = {(slot.get("id"), slot.get("id_task")): _decoded(slot) for slot in busy}
        told = {slot: count for slot, count in counts.items() if count is not None}
        before, self._counts = self._counts, told
        whole = len(told) == len(counts)
        silent = whole and bool(busy) and not any(told.values())
        if not silent:
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = at
        since = self._at
        if not whole or since is None:
            self._at = at
            return None
        if at <= since:
            return None
        # A count that falls is another request's, in a build that does not number them.
        fresh = sum(
            n if n < before.get(slot, 0) else n - before.get(slot, 0) for slot, n in told.items()
        )
        if not fresh and any(told.values()):
            return min(self._pace, 1 / (at - since))
        self._pace, self._at = fresh / (at - since), at
        return self._pace

    def silence(self, at: float) -> float:
        """Return for how many seconds requests have been worked on without a first token."""
        return 0.0 if self._silent_since is None else at - self._silent_since


def any_answering(slots: list[dict[str, Any]]) -> bool:
    """Whether a request has got its first token: its server does compute."""
    return any(slot.get("is_processing") and _decoded(slot) for slot in slots)


def _decoded(slot: dict[str, Any]) -> int | None:
    """Tokens of the answer so far. Builds differ in whether `next_token` is a list."""
    tokens = slot.get("next_token")
    if isinstance(tokens, list):
        tokens = tokens[0] if tokens else None
    count = tokens.get("n_decoded") if isinstance(tokens, dict) else None
    return count if isinstance(count, int) else None
