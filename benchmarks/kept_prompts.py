"""The gains and costs of kept prompts.

`python -m benchmarks.kept_prompts [--engine PATH] [--model PATH]`: a conversation of about 2,600
tokens resumes after another model, a killed server or a new kernel, each beside the same request to
a server that keeps nothing. Older builds restore models with sliding windows only with --swa-full:
`--swa-full` passes it on.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.subject import subject_of, subject_parser
from kitty_nb import ModelManager, ServerStatus, write_demo_model
from kitty_nb.supervisor.kept_prompts import PromptStore

if TYPE_CHECKING:
    from pathlib import Path

    from kitty_nb import ServerConfig
    from kitty_nb.client import Answer

_STARTS = 5
_TEXT = " ".join(f"Row {n} has {n * 7 % 13} apples and {n * 5 % 11} pears." for n in range(185))
_GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16}
_WITHIN = 600.0  # seconds


def main() -> None:
    """Print the table."""
    parser = subject_parser(__doc__)
    parser.add_argument("--swa-full", action="store_true", help="pass it on to llama-server")
    args = parser.parse_args()
    subject, flags = subject_of(args), ["--swa-full"] * args.swa_full
    with subject.folder(f" {' '.join(flags)}") as folder:
        config = subject.config(folder, context_size=4096, parallel=1, extra_args=tuple(flags))
        config = config.replace(on_kernel_exit="stop", allow_absolute_paths=True)
        talk, cold, reference = _reference(config.replace(keep_prompts=False))
        tokens = cold.usage.prompt or 0
        print(f"{'':<28}first token   reused   same answer")
        print(f"{'nothing kept':<28}{cold.timings.first_token:9.2f} s ({tokens} tokens)")
        for what, again, known in _ways(config, folder, talk):
            share = (again.timings.first_token or 0) / (cold.timings.first_token or 1)
            reused = (again.usage.cached or 0) / known
            same = "yes" if again.text == reference else "no"
            print(f"{what:<28}{again.timings.first_token:9.2f} s {share:7.1%} {reused:7.1%} {same}")
        _costs(config)


def _ask(manager: ModelManager, talk: list[dict[str, str]]) -> Answer:
    answer: Answer = manager.chat(talk, **_GREEDY).wait(_WITHIN)
    return answer


def _reference(config: ServerConfig) -> tuple[list[dict[str, str]], Answer, str]:
    """Return a conversation, its next answer after a full read, and that answer uninterrupted."""
    talk = [{"role": "user", "content": _TEXT}]
    with ModelManager(config=config) as manager:
        manager.start().wait(_WITHIN)
        talk.append({"role": "assistant", "content": _ask(manager, talk).text})
        talk.append({"role": "user", "content": "How many apples has row 9?"})
        reference = _ask(manager, talk).text
        manager.restart().wait(_WITHIN)
        return talk, _ask(manager, talk), reference


def _ways(
    config: ServerConfig, folder: Path, talk: list[dict[str, str]]
) -> list[tuple[str, Answer, int]]:
    """Yield how each answer was resumed, the answer, and the number of tokens kept for it."""
    other = write_demo_model(folder / "other.gguf")
    found = []
    with ModelManager(config=config) as manager:
        manager.start().wait(_WITHIN)
        _ask(manager, talk[:1])
        manager.switch_model(other).wait(_WITHIN)
        assert config.model
        manager.switch_model(config.model).wait(_WITHIN)
        store = PromptStore.of(config)
        tokens, last = _newest(store)
        found.append(("A, B, A", _ask(manager, talk), tokens))
        while _newest(store)[1] == last:
            time.sleep(0.5)  # until it has been saved while idle
        assert manager.state.pid
        os.kill(manager.state.pid, signal.SIGKILL)
        while manager.state.status is ServerStatus.READY:
            time.sleep(0.05)
        manager.start().wait(_WITHIN)
        found.append(("kill -9 of the server", *_again(manager, talk)))
    with ModelManager(config=config) as manager:  # the last one ended its server
        manager.start().wait(_WITHIN)
        found.append(("a new kernel", *_again(manager, talk)))
    return found


def _again(manager: ModelManager, talk: list[dict[str, str]]) -> tuple[Answer, int]:
    answer = _ask(manager, talk)
    return answer, answer.usage.prompt or 0  # all of it was sent before


def _newest(store: PromptStore) -> tuple[int, float]:
    prompt = store.prompts()[0]
    return prompt.tokens, prompt.at


def _costs(config: ServerConfig) -> None:
    seconds: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    talk = [{"role": "user", "content": _TEXT[: len(_TEXT) // 4]}]
    for _ in range(_STARTS):
        for name, took in seconds.items():
            with ModelManager(config=config.replace(keep_prompts=name == "on")) as manager:
                began = time.perf_counter()
                manager.start().wait(_WITHIN)
                ready = time.perf_counter() - began
                _ask(manager, talk)
                began = time.perf_counter()
                manager.stop().wait(_WITHIN)
                took.append((ready, time.perf_counter() - began))
    for index, what in enumerate(("READY", "a stop")):
        off, on = (statistics.median(one[index] for one in seconds[n]) for n in ("off", "on"))
        print(f"added to {what}: {(on - off) * 1e3:+.0f} ms to {off * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
