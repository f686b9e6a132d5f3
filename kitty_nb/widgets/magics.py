"""`%kitty` and `%%kitty_chat`: IPython magics that control a server and chat with its model."""

from __future__ import annotations

import shlex
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from kitty_nb.client.conversation import with_images
from kitty_nb.config.profiles import env_warnings
from kitty_nb.errors import (
    KittyError,
    StartCancelledError,
    WaitTimeoutError,
    WillNotFitError,
    printable,
)
from kitty_nb.widgets import session
from kitty_nb.widgets.server_view import describe_load, describe_reading

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    from IPython.core.interactiveshell import InteractiveShell

    from kitty_nb.client import Piece, PromptProgress
    from kitty_nb.config import ServerConfig
    from kitty_nb.manager import ModelManager
    from kitty_nb.operation import Operation
    from kitty_nb.supervisor.events import ServerState

T = TypeVar("T")

_SHOW_EVERY = 0.2  # seconds
_VERBS = ["start", "stop", "restart", "switch", "status", "logs"]
_GREY, _PLAIN = "\x1b[90m", "\x1b[0m"


@magics_class
class KittyMagics(Magics):
    """The magics. A profile has one manager per kernel, which its panel shares."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self._refused: object = None  # the latest start, if it was refused: it will not fit
        self._talks: dict[ModelManager, list[dict[str, Any]]] = {}

    @magic_arguments()
    @argument(
        "verb", nargs="?", default="status", choices=_VERBS, help="What to do; by default, status."
    )
    @argument("model", nargs="?", help="switch: a .gguf file, relative to the models folder.")
    @argument("--profile", default="primary", help="The profile to use.")
    @argument("--env", default=".env", help="The .env file with the settings.")
    @argument("--force", action="store_true", help="stop: kill the server immediately.")
    @argument("-n", "--lines", type=int, default=40, help="logs: the number of lines to print.")
    @line_magic
    def kitty(self, line: str) -> None:
        """Start, stop or inspect a profile's server."""
        given = _given(self.kitty, line)
        manager = session.acquire(given.env, given.profile, self)
        if given.verb in {"start", "restart", "status"}:
            for warning in env_warnings(given.env, given.profile):
                _say(warning)
        match given.verb:
            case "start" | "restart" as verb:
                config = session.config_to_start(manager, given.env, given.profile)
                self._load(getattr(manager, verb), config)
            case "switch":
                if given.model is None:
                    raise KittyError("Name the model to switch to: %kitty switch model.gguf")
                self._load(manager.switch_model, given.model)
            case "stop":
                before = manager.state
                after = _follow(manager.stop(given.force), lambda: None)
                if before.pid is None:
                    _say(after.sentence)
                elif before.external:
                    _say(f"Detached from {before.external.who}; it keeps running.")
                else:
                    _say(f"The server (PID {before.pid}) is stopped.")
            case "status":
                _say(manager.state.sentence)
            case "logs":
                self._print_log(manager, given.lines)

    @magic_arguments()
    @argument("--system", help="The system prompt.")
    @argument("--temperature", type=float, help="0 always picks the most likely token.")
    @argument("--max-tokens", type=int, help="The maximum length of the answer, in tokens.")
    @argument("--image", action="append", default=[], help="A picture to show; can be repeated.")
    @argument("--go-on", action="store_true", help="Continue the conversation so far.")
    @argument("--profile", default="primary", help="The profile whose model to ask.")
    @argument("--env", default=".env", help="The .env file with the settings.")
    @cell_magic
    def kitty_chat(self, line: str, cell: str) -> None:
        """Ask the running model; its answer appears as it streams. Interrupt to end it.

        Each cell is a conversation of its own, unless --go-on continues the previous one.
        """
        given = _given(self.kitty_chat, line)
        manager = session.acquire(given.env, given.profile, self)
        talk = self._talks.get(manager, []) if given.go_on else []
        if given.system and not talk:
            talk = [{"role": "system", "content": given.system}]
        messages = [*talk, {"role": "user", "content": cell.strip()}]
        options = {"temperature": given.temperature, "max_tokens": given.max_tokens}
        asked = {name: value for name, value in options.items() if value is not None}
        answer = _Answering(manager, messages, {"images": given.image, **asked})
        with suppress(KeyboardInterrupt):
            _follow(answer.chat, answer.show)
        answer.show()
        print()
        reply = {"role": "assistant", "content": answer.text}
        self._talks[manager] = [*with_images(messages, given.image), reply]

    def _load(
        self, start: Callable[..., Operation[ServerState]], wanted: ServerConfig | str
    ) -> None:
        """Start a server, and show its load in one changing line."""
        line = _ChangingLine()
        attempt = start, wanted
        refused, self._refused = self._refused, None  # the next start alone can insist
        operation = start(wanted, anyway=attempt == refused)
        before = operation.progress  # of an earlier load, until this one begins

        def show() -> None:
            if (progress := operation.progress) and progress is not before:
                line.show(describe_load(progress))

        try:
            line.show(_follow(operation, show).sentence)
        except WillNotFitError as error:
            self._refused = attempt
            raise WillNotFitError(f"{error} Run this again to start anyway.") from None
        except KeyboardInterrupt:
            raise StartCancelledError("Interrupted; the start was cancelled.") from None
        finally:
            print()

    def _print_log(self, manager: ModelManager, count: int) -> None:
        if count < 1:
            raise KittyError("The number of lines must be 1 or more: %kitty logs -n 40")
        if url := manager.state.config.url:
            raise KittyError(f"The log of the server at {url} is on its own machine.")
        if external := manager.state.external:
            raise KittyError(f"kitty_nb did not start {external.who}, so it doesn't have its log.")
        lines = manager.log_lines
        if not lines:
            raise KittyError("This kernel has no server log yet. To start the server: %kitty start")
        _say("\n".join(lines[-count:]))


def load(shell: InteractiveShell) -> None:
    """Register the magics with a shell."""
    shell.register_magics(KittyMagics)


def unload(shell: InteractiveShell) -> None:
    """Remove the magics from a shell, and close the managers that no panel uses."""
    manager = shell.magics_manager
    for kind, name in (("line", "kitty"), ("cell", "kitty_chat")):
        manager.magics[kind].pop(name, None)
    if magics := manager.registry.pop(KittyMagics.__name__, None):
        session.release(magics)


class _ChangingLine:
    """A line that is overwritten; carriage returns work in notebooks and terminals alike."""

    def __init__(self) -> None:
        self._shown = ""

    def show(self, text: str) -> None:
        text = printable(text)
        if text != self._shown:
            print(f"\r{text:{len(self._shown)}}", end="", flush=True)
            self._shown = text

    def clear(self) -> None:
        if self._shown:
            print(f"\r{'':{len(self._shown)}}\r", end="", flush=True)
            self._shown = ""


class _Answering:
    """An answer that is printed as it streams, after the progress of reading a long prompt."""

    def __init__(
        self, manager: ModelManager, messages: list[dict[str, Any]], options: dict[str, Any]
    ) -> None:
        self._pieces: SimpleQueue[Piece] = SimpleQueue()
        self._reading = _ChangingLine()
        self._progress: PromptProgress | None = None
        self.text = ""
        self.chat = manager.chat(messages, self._pieces.put, self._note, **options)

    def _note(self, progress: PromptProgress) -> None:
        self._progress = progress

    def show(self) -> None:
        """Print what is new, thoughts in grey."""
        text = ""
        while not self._pieces.empty():
            piece = self._pieces.get()
            said = printable(piece.text)
            text += f"{_GREY}{said}{_PLAIN}" if piece.thinking else said
            self.text += "" if piece.thinking else piece.text
        if text:
            self._reading.clear()
            print(text, end="", flush=True)
        elif self._progress and not self.text:
            self._reading.show(describe_reading(self._progress))


def _say(text: str) -> None:
    print(printable(text))


def _follow(operation: Operation[T], show: Callable[[], Any]) -> T:
    """Wait for an operation while the kernel's own tasks continue; an interrupt cancels it.

    Raises:
        KittyError: The operation failed.
        KeyboardInterrupt: The user pressed the interrupt button.
    """
    try:
        while not operation.done:
            with suppress(WaitTimeoutError):
                operation.wait(_SHOW_EVERY)
            show()
        return operation.wait()
    except KeyboardInterrupt:
        operation.cancel()
        raise


def _given(magic: Any, line: str) -> Namespace:
    """Parse a magic's line as a shell would: IPython keeps the quotes around words."""
    try:
        given: Namespace = magic.parser.parse_args(shlex.split(line))
    except ValueError as error:
        raise KittyError(
            f"Can't read the line: {error}. Close the quotes, or remove them."
        ) from None
    return given
