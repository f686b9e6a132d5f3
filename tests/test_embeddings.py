"""Models that embed or rank: recognised, started for it, and asked."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from conftest import demo_config, eventually, unused_port
from model_files import WORDS, write_header, write_pooled, write_ranker

from kitty_nb import ControlPanel, ModelCatalog, ModelManager, ServerConfig
from kitty_nb.catalog.model import read_task
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.config import Task
from kitty_nb.errors import KittyError, ServerError
from kitty_nb.operation import Operation
from kitty_nb.widgets.server_view import name_of, snippet

TEXTS = ["a model", "", "who are you", "the demo model of kitty_nb", "hello " * 20, "a model"]


@pytest.fixture(autouse=True)
def nothing_leaks() -> None:
    """The manager of all these tests keeps its connections until the last of them."""


@pytest.fixture(scope="module")
def embedder(
    demo_model: Path, engine: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelManager]:
    folder = tmp_path_factory.mktemp("embed")
    model = write_pooled(demo_model, folder / "models" / "embedder.gguf", 1)
    config = demo_config(model, folder, unused_port()).replace(binary=engine, parallel=2)
    with ModelManager(config=config) as manager:
        manager.start().wait(60)
        yield manager


def test_texts_become_the_rows_that_the_server_gives_one_by_one(embedder: ModelManager) -> None:
    assert embedder.state.task is Task.EMBED
    seen: list[tuple[int, int]] = []
    vectors = embedder.embed(TEXTS, 2, lambda *done: seen.append(done)).wait(60)
    assert vectors.dtype == np.float32
    assert len(vectors) == len(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        raw = embedder.http.post("/v1/embeddings", json={"input": text}).json()
        np.testing.assert_allclose(vector, raw["data"][0]["embedding"], rtol=1e-3, atol=1e-4)
    assert seen[-1] == (len(TEXTS), len(TEXTS))
    assert embedder.embed([]).wait(60).shape[0] == 0


def test_a_vector_is_the_mean_of_those_of_its_tokens(embedder: ModelManager) -> None:
    """The demo model's layers add nothing: the vector of a token is 1 at its number, else 0."""
    text = "who are you the demo model"
    request = {"content": text, "add_special": True}
    tokens = embedder.http.post("/tokenize", json=request).json()["tokens"]
    counts = np.bincount(tokens, minlength=320)
    assert len(set(tokens)) > 3
    (vector,) = embedder.embed([text]).wait(60)
    np.testing.assert_allclose(vector, counts / np.linalg.norm(counts), atol=1e-3)


def test_the_panel_shows_what_becomes_of_a_text(embedder: ModelManager) -> None:
    panel = ControlPanel(manager=embedder)
    try:
        eventually(lambda: panel.embed.layout.display is None)
        for said in ("320 numbers · length", "1.00 similar to the previous text"):
            panel.embed.text.value = "who are you"
            panel.embed.embed.click()
            eventually(lambda said=said: said in panel.embed.vector.value)
        panel.embed.text.value = "hello " * 600
        panel.embed.embed.click()
        eventually(lambda: "longer than the model takes in one go" in panel.notice.value)
        code = snippet(panel.manager.state, name_of(panel))
        assert "panel.manager.embed([" in code
        panel.embed.show(replace(panel.manager.state, pid=1))  # another model's
        assert panel.embed.vector.value == ""
    finally:
        panel.close()


def test_the_panel_shows_the_vector_of_the_text_embedded_last(
    embedder: ModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Future[Any]] = []

    def embed(_texts: list[str]) -> Operation[Any]:
        answers.append(Future())
        return Operation(answers[-1])

    panel = ControlPanel(manager=embedder)
    monkeypatch.setattr(embedder, "embed", embed)
    shown: list[str] = []
    panel.embed.vector.observe(lambda change: shown.append(change["new"]), "value")
    try:
        for _ in range(2):
            panel.embed.embed.click()
        for answer, numbers in ((answers[1], 2), (answers[0], 1)):
            if not answer.cancelled():
                answer.set_result(np.ones((1, numbers), np.float32))
        panel.manager.run(anyio.sleep, 0.1).wait(10)
        assert [text.split(" · ")[0] for text in shown] == ["2 numbers"]
    finally:
        panel.close()


def test_a_text_that_is_too_long_is_named(embedder: ModelManager) -> None:
    with pytest.raises(ServerError, match="Text 3: "):
        embedder.embed([*TEXTS[:3], "hello " * 600, *TEXTS]).wait(60)
    with pytest.raises(ServerError, match="Text 1: The text contains half a surrogate pair"):
        embedder.embed([TEXTS[0], "torn \ud83d", *TEXTS]).wait(60)
    with pytest.raises(KittyError, match="a list of texts"):
        embedder.embed("hello")


def test_what_a_model_was_not_started_for_is_refused(embedder: ModelManager) -> None:
    with pytest.raises(KittyError, match=r"started to embed, not to rank\..*--rerank"):
        embedder.rerank("who", ["a"])
    with pytest.raises(KittyError, match="was started to embed, not to chat"):
        embedder.chat("Hello")


def test_tokens_are_those_of_the_server(embedder: ModelManager) -> None:
    raw = embedder.http.post("/tokenize", json={"content": TEXTS[3]}).json()["tokens"]
    assert embedder.tokenize(TEXTS[3]).wait(60) == raw


def test_a_server_that_is_attached_to_embeds_too(embedder: ModelManager, tmp_path: Path) -> None:
    config = embedder.state.config
    other = ServerConfig(profile="other", port=config.port, log_dir=config.log_dir)
    with ModelManager(config=other) as manager:
        assert manager.attach().wait(60).task is Task.EMBED
        assert manager.embed(TEXTS[:1]).wait(60).shape == (1, 320)


@pytest.mark.parametrize("pooling", [4, None])  # old conversions do not say it
def test_documents_are_ranked_as_by_the_server(
    config: ServerConfig, engine: Path | None, tmp_path: Path, pooling: int | None
) -> None:
    model = write_ranker(tmp_path / "models" / "ranker.gguf", pooling)
    documents = [f"the {word} sits" for word in WORDS]
    asked = {"query": "what is the sun", "documents": documents}
    config = config.replace(model=model, context_size=256, binary=engine)
    by_flag = config.replace(extra_args=["--rerank"])
    with ModelManager(config=by_flag if pooling else config) as one:
        assert one.start().wait(60).task is Task.RANK
        remedy = "flag in LLAMACPP_EXTRA_ARGS" if pooling else "Start a model that was made to chat"
        with pytest.raises(KittyError, match=remedy):
            one.chat("Hello")
        ranked = one.rerank(asked["query"], documents).wait(60)
        raw = one.http.post("/v1/rerank", json=asked).json()["results"]
        best = one.rerank(asked["query"], documents, 2).wait(60)
    by_server = {row["index"]: row["relevance_score"] for row in raw}
    assert {row.index: row.score for row in ranked} == pytest.approx(by_server)
    assert [row.score for row in ranked] == sorted(by_server.values(), reverse=True)
    assert len(set(by_server.values())) == len(documents)
    assert [row.document for row in ranked] == [documents[row.index] for row in ranked]
    assert best == ranked[:2]


@pytest.mark.parametrize(
    ("architecture", "keys", "task"),
    [
        ("llama", {}, Task.CHAT),
        ("qwen3", {"qwen3__pooling_type": 3}, Task.EMBED),
        ("qwen3", {"qwen3__pooling_type": 4}, Task.RANK),
        ("nomic-bert", {}, Task.EMBED),
        ("bert", {"bert__classifier__output_labels": ["LABEL_0"]}, Task.RANK),
        ("llama", {"llama__pooling_type": 0}, Task.CHAT),
    ],
)
def test_the_header_tells_what_a_model_is_for(
    tmp_path: Path, architecture: str, keys: dict[str, object], task: Task
) -> None:
    path = write_header(tmp_path / "model.gguf", architecture, **keys)
    assert read_task(path) is task
    (row,) = ModelCatalog(tmp_path).scan()
    assert row.facts.task is task


@pytest.mark.parametrize(("pooling", "task"), [(4, Task.RANK), (None, Task.RANK), (2, Task.EMBED)])
def test_the_tensors_tell_where_the_header_does_not(
    tmp_path: Path, pooling: int | None, task: Task
) -> None:
    path = write_ranker(tmp_path / "model.gguf", pooling)
    assert read_task(path) is task
    (row,) = ModelCatalog(tmp_path).scan()
    assert row.facts.task is task


def test_flags_outrank_the_header(config: ServerConfig) -> None:
    def task(*flags: str) -> Task:
        return resolve_model(config.replace(extra_args=flags)).task

    assert task() is Task.CHAT
    assert task("--embeddings") is Task.EMBED
    assert task("--reranking") is Task.RANK
    assert task("--embedding", "--pooling", "rank") is Task.RANK
