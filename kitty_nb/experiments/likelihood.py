"""Likelihoods of texts under a model: perplexity, and divergence from a reference."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kitty_nb.client.protocol import post
from kitty_nb.errors import ExperimentError
from kitty_nb.experiments.statistics import normal_interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import httpx

_CERTAIN = 1e6  # logit bias that forces a token
_LIKELIEST = (1 << 10, 1 << 20)  # tokens to list: usually enough, then any whole vocabulary
_LISTED = 1 << 12  # tokens in a distribution; with Gemma's 262,000, it costs 2 % of divergence

Piece = str | list[int]
"""The text of a token, or its bytes if it is part of a character."""
Distribution = dict[int, float]
"""Log-probabilities of the most likely next tokens, by token ID."""
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Likeness:
    """The similarity of a model's predictions to those of a reference, over some tokens.

    Attributes:
        kl_divergence: The mean Kullback-Leibler divergence, in nats.
        interval: Its 95 % confidence interval.
        agreed: The number of tokens for which both have the same most likely one.
    """

    kl_divergence: float
    interval: Interval
    agreed: int
    tokens: int


class Likelihoods:
    """Queries a server for the likelihoods of texts.

    Its methods raise KittyError if the server rejects a request, and `httpx.HTTPError` if the
    connection fails.
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def of(self, prompt: str, text: str) -> list[float]:
        """Return the log-probabilities of a text's tokens after a prompt."""
        whole, begins = await self._split(prompt, text)
        ids = [token for token, _ in whole]
        return [(await self.token(ids[:e], *whole[e]))[0] for e in range(begins, len(whole))]

    async def distributions(self, prompt: str, text: str) -> list[Distribution]:
        """Return the model's predictions for each token of a text after a prompt."""
        whole, begins = await self._split(prompt, text)
        ids = [token for token, _ in whole]
        return [await self._expected(ids[:end], None, _LISTED) for end in range(begins, len(ids))]

    async def tokens(self, text: str, *, add_special: bool = True) -> list[tuple[int, Piece]]:
        """Tokenize a text; return each token's ID and piece."""
        request = {"content": text, "add_special": add_special, "with_pieces": True}
        tokens = (await post(self._http, "/tokenize", request, "tokens"))["tokens"]
        return [(one["id"], one["piece"]) for one in tokens if isinstance(one, dict)]

    async def _split(self, prompt: str, text: str) -> tuple[list[tuple[int, Piece]], int]:
        """Return the tokens of prompt and text, and the index of the text's first token."""
        before = await self.tokens(prompt)
        whole = await self.tokens(prompt + text)
        if whole[: len(before)] != before:  # a token spans prompt and text
            whole = before + await self.tokens(text, add_special=False)
        return whole, len(before)

    async def token(self, before: list[int], token: int, piece: Piece) -> tuple[float, bool]:
        """Return the log-probability of a given next token, and whether it is the most likely one.

        The server reports the probability of the token it samples, so a logit bias forces this one,
        with one request per token, because speculated tokens have no probabilities. For a token
        that is part of a character the server reports none either, so a whole character is forced,
        and the token is looked up among the most likely ones.
        """
        taken, counts = token, [1]
        if not isinstance(piece, str):
            taken, counts = (await self.tokens("a", add_special=False))[-1][0], [*_LIKELIEST]
        for count in counts:
            found = await self._expected(before, taken, count)
            if token in found:
                return found[token], found[token] >= max(found.values())
        raise ExperimentError(
            "Can't measure likelihoods: this build of llama-server doesn't report the probability"
            " of a given token. Update llama.cpp, or use another quality."
        )

    async def _expected(self, before: list[int], taken: int | None, count: int) -> Distribution:
        """Return the log-probabilities of the sampled and the `count` most likely tokens."""
        request = {
            "prompt": before,
            "n_predict": 1,
            "n_probs": count,
            "temperature": 0.0,
            "logit_bias": [] if taken is None else [[taken, _CERTAIN]],
            "cache_prompt": True,
            "id_slot": 0,
        }
        body = await post(self._http, "/completion", request, "content")
        return {
            one["id"]: one["logprob"]
            for token in body.get("completion_probabilities", ())
            for one in (token, *token.get("top_logprobs", ()))
            if {"id", "logprob"} <= one.keys()
        }


def perplexity_of(likelihoods: Sequence[float]) -> tuple[float, Interval]:
    """Return the perplexity for tokens' log-probabilities, and its 95 % interval.

    As in llama-perplexity, the interval uses the standard error over the tokens: it covers texts of
    this kind, not just this one.
    """
    mean, (low, high) = normal_interval([-one for one in likelihoods])
    try:
        return math.exp(mean), (math.exp(low), math.exp(high))
    except OverflowError:
        raise ExperimentError(
            "The perplexity is infinite: the model gives a token of an expected text zero"
            " probability. Use another text, or leave perplexity out."
        ) from None


def likeness(reference: Sequence[Distribution], other: Sequence[Distribution]) -> Likeness:
    """Compare two models' predictions for the same tokens."""
    if len(reference) != len(other) or not all((*reference, *other)):
        raise ExperimentError(
            "Can't compare the models token by token: their tokenizers differ, or this build of"
            " llama-server reports no probabilities. Use Perplexity, and compare"
            " bits_per_character."
        )
    pairs = [*zip(reference, other, strict=True)]
    mean, interval = normal_interval([_divergence(one, another) for one, another in pairs])
    tops = ([max(one, key=one.__getitem__) for one in model] for model in (reference, other))
    return Likeness(mean, interval, sum(map(operator.eq, *tops)), len(pairs))


def _divergence(reference: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Return the divergence over the tokens that both list, treating the rest as one token.

    It is a lower bound of the divergence over the whole vocabulary.
    """
    both = reference.keys() & other.keys()
    found = math.fsum(math.exp(reference[one]) * (reference[one] - other[one]) for one in both)
    rest, rest_of_other = (
        1 - math.fsum(math.exp(listed[one]) for one in both) for listed in (reference, other)
    )
    if rest > 0 and rest_of_other > 0:
        found += rest * math.log(rest / rest_of_other)
    return max(0.0, found)
