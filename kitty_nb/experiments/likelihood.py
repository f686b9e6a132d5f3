"""How likely a model finds given texts: their perplexity, and the divergence from a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING

from kitty_nb.client.protocol import post
from kitty_nb.errors import ExperimentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import httpx

_CERTAIN = 1e6  # added to a token's logit, so that it is taken whatever the others' are
_LIKELIEST = (1 << 10, 1 << 20)  # tokens to list: so many mostly do, and no vocabulary has more
_LISTED = 1 << 12  # tokens of a distribution; of Gemma's 262,000, the divergence is 2 % less
_QUANTILE = NormalDist().inv_cdf(0.975)  # of an interval of 95 %

Piece = str | list[int]
"""The text of a token, or its bytes where a character is split."""
Distribution = dict[int, float]
"""The log-probabilities of the likeliest next tokens."""
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Likeness:
    """How far a model's expectations differ from those of a reference, over some tokens.

    Attributes:
        kl_divergence: The mean Kullback-Leibler divergence from the reference, in nats.
        agreed: The number of tokens where both find the same one likeliest.
        tokens: The number of tokens.
        interval: Of the divergence, with 95 % confidence.
    """

    kl_divergence: float
    agreed: int
    tokens: int
    interval: Interval

    @property
    def top_token_agreement(self) -> float:
        """The share of tokens where both find the same one likeliest."""
        return self.agreed / self.tokens


class Likelihoods:
    """Asks a server how likely texts are.

    Its methods raise KittyError where the server refuses a request, and `httpx.HTTPError` where it
    falls silent.
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def of(self, prompt: str, text: str) -> list[float]:
        """Return the log-probabilities of a text's own tokens after a prompt."""
        whole, begins = await self._split(prompt, text)
        ids = [token for token, _ in whole]
        return [(await self.token(ids[:e], *whole[e]))[0] for e in range(begins, len(whole))]

    async def distributions(self, prompt: str, text: str) -> list[Distribution]:
        """Return what the model expected in place of each of a text's tokens."""
        whole, begins = await self._split(prompt, text)
        ids = [token for token, _ in whole]
        return [await self._expected(ids[:end], None, _LISTED) for end in range(begins, len(ids))]

    async def tokens(self, text: str, *, add_special: bool = True) -> list[tuple[int, Piece]]:
        """Return the tokens of a text, each with its piece of it."""
        request = {"content": text, "add_special": add_special, "with_pieces": True}
        tokens = (await post(self._http, "/tokenize", request, "tokens"))["tokens"]
        return [(one["id"], one["piece"]) for one in tokens if isinstance(one, dict)]

    async def _split(self, prompt: str, text: str) -> tuple[list[tuple[int, Piece]], int]:
        """Return the tokens of both, and the index of the text's first."""
        before = await self.tokens(prompt)
        whole = await self.tokens(prompt + text)
        if whole[: len(before)] != before:  # a token reaches across the seam
            whole = before + await self.tokens(text, add_special=False)
        return whole, len(before)

    async def token(self, before: list[int], token: int, piece: Piece) -> tuple[float, bool]:
        """Return the log-probability of the next token, and whether it is the likeliest.

        A server reports the probability of the token it takes, so it is made to take this one, with
        a request for each: it reports nothing about tokens that it speculates on. Nor does it about
        a part of a character, which is looked up among the likeliest tokens instead, while the
        server takes a whole character.
        """
        taken, counts = token, [1]
        if not isinstance(piece, str):
            taken, counts = (await self.tokens("a", add_special=False))[-1][0], [*_LIKELIEST]
        for count in counts:
            found = await self._expected(before, taken, count)
            if token in found:
                return found[token], found[token] >= max(found.values())
        raise ExperimentError(
            "Perplexity cannot be measured: this build of llama-server does not report the"
            " probability of a given token. Update llama.cpp, or leave it out."
        )

    async def _expected(self, before: list[int], taken: int | None, count: int) -> Distribution:
        """Return the log-probabilities of the token taken and of the `count` likeliest."""
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
    """Return a text's perplexity by its tokens' log-probabilities, and its interval of 95 %.

    The interval is that of the mean, with the standard error over the tokens, as llama-perplexity
    has it: it holds for texts of this kind, not only for this one.

    Raises:
        ExperimentError: A token is impossible.
    """
    mean, (low, high) = _mean([-one for one in likelihoods])
    try:
        return math.exp(mean), (math.exp(low), math.exp(high))
    except OverflowError:
        raise ExperimentError(
            "The perplexity is infinite: the model gives a token of an expected text zero"
            " probability. Give another text, or leave perplexity out."
        ) from None


def likeness(reference: Sequence[Distribution], other: Sequence[Distribution]) -> Likeness:
    """Compare what two models expected at the same places.

    Raises:
        ExperimentError: The places are not the same: the models have other tokenizers.
    """
    if len(reference) != len(other) or not all((*reference, *other)):
        raise ExperimentError(
            "The models cannot be compared token by token: they split the texts differently, or"
            " this build of llama-server reports no probabilities. Use Perplexity, and"
            " compare bits_per_character."
        )
    pairs = [*zip(reference, other, strict=True)]
    mean, interval = _mean([_divergence(one, another) for one, another in pairs])
    agreed = sum(_top(one) == _top(another) for one, another in pairs)
    return Likeness(mean, agreed, len(pairs), interval)


def _divergence(reference: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Return the divergence over the tokens that both list, with all the rest as one.

    So it is at most that over the whole vocabulary.
    """
    both = reference.keys() & other.keys()
    found = math.fsum(math.exp(reference[one]) * (reference[one] - other[one]) for one in both)
    rest, rest_of_other = (
        1 - math.fsum(math.exp(listed[one]) for one in both) for listed in (reference, other)
    )
    if rest > 0 and rest_of_other > 0:
        found += rest * math.log(rest / rest_of_other)
    return max(0.0, found)


def _top(listed: Mapping[int, float]) -> int:
    return max(listed, key=listed.__getitem__)


def _mean(values: Sequence[float]) -> tuple[float, Interval]:
    mean = fmean(values)
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean, (mean - _QUANTILE * error, mean + _QUANTILE * error)
