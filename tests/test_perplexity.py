"""Perplexity, against values that other programs computed from the same files."""

from __future__ import annotations

import json
import math
import operator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from kitty_nb import ServerConfig, Supervisor
from kitty_nb.client import Access
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments import Perplexity, Sweep, Workload
from kitty_nb.experiments.measure import BenchmarkClient

WAIT = 120.0
PROMPT = "Who are you?"
# Bits per character, by llama.cpp's library at b10434 without a server: a program of its own
# decodes prompt and text together and takes the logarithm of the softmax over the logits, in double
# precision. Each is the median of five ways: batches of 1, 6 and 512 tokens, with and without flash
# attention; they lie up to 3 % apart for a text and 0.6 % for all.
GEMMA = {
    "Paris is the capital of": (" France, and Berlin is the capital of Germany.", 0.44653),
    "An indented list:\n": (
        "    1.  Boil the water.\n    2.  Add the tea.\n\n\n  Then  drink   it  while it is hot.\n",
        1.60668,
    ),
    "Ein Märchen:\n": (
        "Es war einmal ein König, der hatte drei schöne Töchter. Über die Brücke führte eine Straße"
        " zum großen Schloß.",
        1.18019,
    ),
    "Messages from the party:\n": (
        "🎉🎂 Happy birthday! 🥳 I love you ❤️\n👍🏽 👨‍👩‍👧 The whole family comes by"
        " train 🚂 \U0001fae9 and by \U00013000.\n",
        2.73643,
    ),
    "def fibonacci(n: int) -> int:\n": (
        '    """Return the n-th Fibonacci number."""\n    if n < 2:\n        return n\n'
        "    a, b = 0, 1\n    for _ in range(n - 1):\n        a, b = b, a + b\n    return b\n",
        0.37759,
    ),
}
ALL = 1.21872


async def surprises(config: ServerConfig, *texts: dict[str, str]) -> list[tuple[float, float]]:
    """Perplexity and bits per character of each group of texts, by one server."""
    found = []
    async with Supervisor(config) as supervisor:
        state = await supervisor.start()
        async with Access(state.endpoint, supervisor.api_key).async_http() as http:
            for expected in texts:
                quality = Perplexity(expected)
                workload = Workload(tuple(expected), max_tokens=2, chat=False, quality=quality)
                client = BenchmarkClient(http, workload, {})
                await client.warm_up()
                scores = await client.scores()
                found.append((scores["perplexity"], scores["bits_per_character"]))
    return found


@pytest.mark.slow
def test_a_real_tokenizers_texts_have_the_perplexity_that_others_compute(
    real_config: ServerConfig,
) -> None:
    config = real_config.replace(threads=1)
    found = anyio.run(surprises, config, *({p: text} for p, (text, _) in GEMMA.items()))
    assert found[0][0] == pytest.approx(4.15, rel=0.01)
    bits = [one for _, one in found]
    assert bits == pytest.approx([expected for _, expected in GEMMA.values()], rel=0.02)
    lengths = [len(text) for text, _ in GEMMA.values()]
    assert sum(map(operator.mul, bits, lengths)) / sum(lengths) == pytest.approx(ALL, rel=0.01)


@pytest.mark.slow
def test_quantized_caches_rank_as_they_should(real_config: ServerConfig, tmp_path: Path) -> None:
    prompt, (text, _) = next(iter(GEMMA.items()))
    sweep = Sweep(
        configs=[{"cache_type_k": kind, "cache_type_v": kind} for kind in ("f16", "q8_0", "q4_0")],
        prompts=[prompt],
        chat=False,
        repeats=1,
        max_tokens=2,
        quality=Perplexity({prompt: text}),
        config=real_config.replace(flash_attention="on", threads=1),
        store=tmp_path / "sweep.journal",
    )
    with sweep:
        results = sweep.run().wait(WAIT)
    found = {
        dict(one.trial.settings)["cache_type_k"]: one.value("perplexity")
        for one in results.combinations
    }
    # By the same program; with q4_0 its own values lie between 4.55 and 4.69.
    assert found == pytest.approx({"f16": 4.153, "q8_0": 4.225, "q4_0": 4.632}, rel=0.04)
    assert results.best("bits_per_character") == results.best("perplexity")


@pytest.fixture
def demo(config: ServerConfig) -> ServerConfig:
    return config.replace(context_size=1024)


@pytest.mark.parametrize(
    "text", ["Hello! I am the cat", "Hello! I am the kitty_nb demo model,", "Ein Käse 🧀"]
)
def test_it_is_that_of_the_text_token_by_token(demo: ServerConfig, text: str) -> None:
    (found,) = anyio.run(surprises, demo, {PROMPT: text})
    perplexity, count = anyio.run(_by_hand, demo, text)
    assert found[0] == pytest.approx(perplexity, rel=1e-3)
    assert found[1] == pytest.approx(math.log2(perplexity) * count / len(text), rel=1e-3)


async def _by_hand(config: ServerConfig, text: str) -> tuple[float, int]:
    """Ask for the whole distribution of each next token, and look the text's own up in it."""
    async with Supervisor(config) as supervisor:
        state = await supervisor.start()
        async with Access(state.endpoint, supervisor.api_key).async_http() as http:

            async def post(path: str, **body: object) -> Any:
                return (await http.post(path, json=body)).json()

            before = (await post("/tokenize", content=PROMPT, add_special=True))["tokens"]
            whole = (await post("/tokenize", content=PROMPT + text, add_special=True))["tokens"]
            assert whole[: len(before)] == before
            surprise = 0.0
            for end in range(len(before), len(whole)):
                request = {"prompt": whole[:end], "n_predict": 1, "n_probs": 1000}
                told = await post("/completion", **request, temperature=0)
                tops = told["completion_probabilities"][0]["top_logprobs"]
                surprise -= {one["id"]: one["logprob"] for one in tops}[whole[end]]
    count = len(whole) - len(before)
    return math.exp(surprise / count), count


def test_a_text_that_a_model_holds_for_impossible_is_told() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/props":
            return httpx.Response(200, json={})
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            tokens = [{"id": ord(letter), "piece": letter} for letter in body["content"]]
            return httpx.Response(200, json={"tokens": tokens})
        if body.get("stream"):
            text = 'data: {"content": "blue", "timings": {}}\n\n'
            return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, text=text)
        ((token, _),) = body["logit_bias"]
        lowest = -3.4028234663852886e38  # what llama-server writes for the logarithm of 0
        told = [{"id": token, "logprob": lowest}]
        return httpx.Response(200, json={"content": "", "completion_probabilities": told})

    async def ask() -> None:
        quality = Perplexity({PROMPT: "blue"})
        workload = Workload(prompts=(PROMPT,), chat=False, quality=quality)
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            client = BenchmarkClient(http, workload, {})
            await client.warm_up()
            with pytest.raises(ExperimentError, match="infinite"):
                await client.scores()

    anyio.run(ask)
