"""The overhead of `chat` and `embed` over raw HTTP.

`python -m benchmarks.asking [--part ask|embed] [--texts N] [--engine PATH] [--model PATH]` asks one
server in turn, by `http.client` and by `manager.chat`, for the same greedy answer; then a server
that embeds, by the fastest of some loops over `httpx` and by `manager.embed`, for the vectors of
short texts. A generative model also computes the scores of its whole vocabulary for each token, so
use `--texts 100` for one.
"""

from __future__ import annotations

import http.client
import json
import statistics
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.subject import seconds_of, subject_of, subject_parser
from kitty_nb import ModelManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from benchmarks.subject import Subject

    Vectors = NDArray[np.float32]

_RUNS, _TOKENS = 15, 96
_EMBED_RUNS = 2
_FEW = 32  # texts to choose the loop with
_LOOPS = ((16, 1), (32, 2), (64, 2), (32, 4))  # texts in a request, connections


def main() -> None:
    """Print the figures."""
    parser = subject_parser(__doc__)
    parser.add_argument("--part", choices=("ask", "embed"), help="measure only this")
    parser.add_argument("--texts", type=int, default=1000)
    args = parser.parse_args()
    parts = {"ask": _ask, "embed": partial(_embed, count=args.texts)}
    subject = subject_of(args)
    with subject.folder() as folder:
        for name, part in parts.items():
            if args.part in {None, name}:
                part(subject, folder)


def _ask(subject: Subject, folder: Path) -> None:
    config = subject.config(folder, context_size=2048, parallel=1, threads=1)
    options = {"temperature": 0, "max_tokens": _TOKENS, "ignore_eos": True}
    raw: list[tuple[float, float]] = []
    ours: list[tuple[float, float]] = []
    with ModelManager(config=config) as manager:
        manager.start().wait(300)
        for _ in range(_RUNS):
            raw.append(_timed(partial(_raw_stream, manager, options)))
            ours.append(_timed(lambda: manager.chat("Tell me a story.", **options)))
    first, token = (statistics.median(one[part] for one in raw) for part in (0, 1))
    pairs = [*zip(raw, ours, strict=True)]
    later = statistics.median(our[0] - bare[0] for bare, our in pairs)
    slower = statistics.median(our[1] / bare[1] for bare, our in pairs) - 1
    print(f"first token: raw {first * 1e3:.1f} ms, chat {later * 1e3:+.2f} ms (median of pairs)")
    print(f"each token: raw {token * 1e3:.2f} ms, chat {slower:+.2%} (median of pairs)")


def _timed(ask: Callable[[], Iterable[object]]) -> tuple[float, float]:
    """Return the seconds to the first token, and per token after that."""
    began = time.perf_counter()
    at = [time.perf_counter() for _ in ask()]
    return at[0] - began, (at[-1] - at[0]) / (len(at) - 1)


def _raw_stream(manager: ModelManager, options: dict[str, Any]) -> Iterable[object]:
    messages = [{"role": "user", "content": "Tell me a story."}]
    request = json.dumps({"messages": messages, "stream": True, **options})
    config = manager.state.config
    key = {"Authorization": f"Bearer {manager.reveal_api_key()}"}
    connection = http.client.HTTPConnection(config.host, config.port)
    connection.request("POST", "/v1/chat/completions", request, key)
    for line in connection.getresponse():
        if b'"content":' in line and b'"content":null' not in line:
            yield line
    connection.close()


def _embed(subject: Subject, folder: Path, count: int) -> None:
    texts = [f"Note {number}: a cat sat." for number in range(count)]
    flags = ("--embedding", "--pooling", "mean")
    settings = {"context_size": 8192, "parallel": 4, "threads": 2, "extra_args": flags}
    with ModelManager(config=subject.config(folder, **settings)) as manager:
        manager.start().wait(300)
        few = texts[:_FEW]
        size, connections = min(
            _LOOPS, key=lambda loop: seconds_of(partial(_raw_embed, manager, few, *loop))
        )
        raw, ours = [], []
        for _ in range(_EMBED_RUNS):
            raw.append(seconds_of(partial(_raw_embed, manager, texts, size, connections)))
            ours.append(seconds_of(lambda: manager.embed(texts).wait()))
    ratio = statistics.median(our / bare for our, bare in zip(ours, raw, strict=True))
    print(f"{count:,} texts: raw {statistics.median(raw):.2f} s ", end="")
    print(f"({size} a request, {connections} connections), ", end="")
    print(f"embed {statistics.median(ours):.2f} s, {ratio:.3f} x (median of pairs)")


def _raw_embed(manager: ModelManager, texts: list[str], size: int, connections: int) -> Vectors:
    def ask(start: int) -> Vectors:
        batch = {"input": texts[start : start + size], "encoding_format": "base64"}
        said = manager.http.post("/v1/embeddings", json=batch).json()
        coded = b"".join(b64decode(row["embedding"]) for row in said["data"])
        return np.frombuffer(coded, "<f4").reshape(len(said["data"]), -1)

    with ThreadPoolExecutor(connections) as pool:
        return np.concatenate([*pool.map(ask, range(0, len(texts), size))])


if __name__ == "__main__":
    main()
