"""Embeddings, tokens and relevance scores of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from pydantic import (
    Base64Bytes,
    BaseModel,
    FiniteFloat,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
)

from kitty_nb.client.protocol import ask_each, broken_off, post
from kitty_nb.errors import RefusedError, ServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

T = TypeVar("T")
# Concurrent requests. With two, the server has the next batch while we read the last one.
_AT_ONCE = 2


_STRANGE = "{} did not answer like llama-server. Check what listens there."


class _Vector(BaseModel):
    index: NonNegativeInt
    embedding: Base64Bytes | list[FiniteFloat]  # little-endian 32-bit floats; or numbers


class _Score(BaseModel):
    index: NonNegativeInt
    relevance_score: FiniteFloat


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document, and its relevance to a query.

    Attributes:
        index: Its position among the given documents.
        score: The model's own score; higher is better.
        document: Its text.
    """

    index: int
    score: float
    document: str


async def embed(
    http: httpx.AsyncClient,
    texts: Sequence[str],
    batch_size: int,
    on_progress: Callable[[int, int], object],
    **fields: str,
) -> Vectors:
    """Return the vectors of texts, one row each. See `ModelManager.embed`.

    Raises:
        RefusedError: The server refused a text; the message names it.
        ServerError: The server broke off.
    """
    import numpy as np  # noqa: PLC0415 (100 ms that a start should not wait for)

    rows: list[Any] = [None] * len(texts)
    done = 0

    async def ask(start: int) -> None:
        nonlocal done
        batch = texts[start : start + batch_size]
        vectors = await _vectors(http, batch, start, fields, alone=len(texts) == 1)
        rows[start : start + len(batch)] = [
            np.frombuffer(one, "<f4") if isinstance(one, bytes) else np.array(one, np.float32)
            for one in vectors
        ]
        done += len(batch)
        on_progress(done, len(texts))

    await ask_each(range(0, len(texts), batch_size), _AT_ONCE, ask)
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


async def _vectors(
    http: httpx.AsyncClient,
    texts: Sequence[str],
    start: int,
    fields: Mapping[str, str],
    *,
    alone: bool,
) -> list[bytes | list[float]]:
    request = {"input": [*texts], "encoding_format": "base64", **fields}
    try:
        rows = await _ask(http, "/v1/embeddings", request, "data", list[_Vector])
    except RefusedError as error:
        if alone:
            raise
        if len(texts) == 1:
            raise RefusedError(f"Text {start}: {error}") from None
        for number, text in enumerate(texts, start):  # one of them is to blame
            await _vectors(http, [text], number, fields, alone=False)
        raise
    vectors = {row.index: row.embedding for row in rows}
    odd = any(not one or (isinstance(one, bytes) and len(one) % 4) for one in vectors.values())
    if odd or vectors.keys() != set(range(len(texts))):
        raise ServerError(_STRANGE.format("/v1/embeddings"))
    return [vectors[number] for number in range(len(texts))]


async def rerank(
    http: httpx.AsyncClient, query: str, documents: Sequence[str], top_n: int | None, **fields: str
) -> list[Ranked]:
    """Return documents, the most relevant to a query first. See `ModelManager.rerank`.

    Raises:
        ServerError: The server refused the request, or broke off.
    """
    if not documents:
        return []
    request = {"query": query, "documents": [*documents], **fields}
    rows = await _ask(http, "/v1/rerank", request, "results", list[_Score])
    if any(row.index >= len(documents) for row in rows):
        raise ServerError(_STRANGE.format("/v1/rerank"))
    found = [Ranked(row.index, row.relevance_score, documents[row.index]) for row in rows]
    return sorted(found, key=lambda one: one.score, reverse=True)[:top_n]


async def tokenize(http: httpx.AsyncClient, text: str) -> list[int]:
    """Return the tokens of a text, without the special ones that the model adds around it.

    Raises:
        ServerError: The server broke off.
    """
    return await _ask(http, "/tokenize", {"content": text}, "tokens", list[int])


async def count_tokens(http: httpx.AsyncClient, messages: Sequence[dict[str, Any]]) -> int:
    """Return the number of tokens in a conversation as a prompt, with the model's chat template.

    Raises:
        ServerError: The server refused the messages, or broke off.
    """
    prompt = await _ask(http, "/apply-template", {"messages": [*messages]}, "prompt", str)
    whole = {"content": prompt, "add_special": True, "parse_special": True}
    return len(await _ask(http, "/tokenize", whole, "tokens", list[int]))


async def _ask(
    http: httpx.AsyncClient, path: str, request: dict[str, Any], wanted: str, kind: type[T]
) -> T:
    """Send a request; return the `wanted` part of the answer, which must be of type `kind`."""
    try:
        said = await post(http, path, request, wanted)
        return TypeAdapter(kind).validate_python(said.get(wanted))
    except httpx.HTTPError as error:
        raise ServerError(broken_off(error)) from None
    except ValidationError:
        raise ServerError(_STRANGE.format(path)) from None
