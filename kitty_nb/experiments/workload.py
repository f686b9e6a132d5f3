"""What every trial of a sweep is asked."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from kitty_nb.errors import ConfigError, Problem
from kitty_nb.experiments.quality import check_quality, identity
from kitty_nb.experiments.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kitty_nb.experiments.quality import Perplexity, Quality
    from kitty_nb.experiments.trial import TrialResult

DEFAULT_PROMPT = "Explain in a few sentences why the sky is blue, and why it is red at sunset."


@dataclass(frozen=True)
class Workload:
    """The requests with which a server is measured.

    Attributes:
        prompts: What a user says, one request each; with `chat` off the raw text to go on from.
        max_tokens: Length of an answer, 2 or more. Without `quality` every answer is that long,
            also where the model would end it, so that all are alike.
        parallel: Numbers of requests to have under way at once, each measured on its own.
        seed: Of the server's sampling, which is greedy unless a setting is tried that it would
            drown (temperature and the like).
        chat: Whether prompts go through the model's chat template.
        quality: How good an answer is, or which texts' perplexity to measure.
        record: Whether each trial's run record is made, too, by which it can be repeated.
        fill: Tokens up to which prompts are repeated, as far as the context has room.
    """

    prompts: tuple[str, ...] = (DEFAULT_PROMPT,)
    max_tokens: int = 64
    parallel: tuple[int, ...] = (1,)
    seed: int = 0
    chat: bool = True
    quality: Quality | Perplexity | None = None
    record: bool = False
    fill: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not self.prompts or not all(self.prompts):
            fix = "Write prompts=[…] with at least one, none of them empty."
            problems.append(Problem("prompts", str(self.prompts), "There is an empty one.", fix))
        if self.max_tokens < 2:  # noqa: PLR2004 (between two tokens lies the first interval)
            fix = "Write 2 or more; 64 is a good start."
            problems.append(
                Problem("max_tokens", str(self.max_tokens), "A rate needs 2 tokens.", fix)
            )
        if not self.parallel or min(self.parallel) < 1:
            fix = "Write numbers of requests, such as (1, 4)."
            problems.append(Problem("parallel", str(self.parallel), "It must be 1 or more.", fix))
        problems += check_quality(self.quality, self.prompts)
        if problems:
            raise ConfigError("the sweep", tuple(problems))

    @property
    def levels(self) -> tuple[int, ...]:
        """Each number of parallel requests once, ascending."""
        return tuple(sorted(set(self.parallel)))

    def asked(self, parallel: int) -> tuple[int, ...]:
        """Indices of the prompts to ask with so many at once: each of them, until all are busy."""
        count = ceil(len(self.prompts) / parallel) * parallel
        return tuple(index % len(self.prompts) for index in range(count))

    @property
    def requests(self) -> int:
        """How many requests of a trial are measured."""
        return sum(len(self.asked(level)) for level in self.levels)

    def satisfied_by(self, row: TrialResult) -> bool:
        """Whether a row has all that is asked for, so that its trial need not be run."""
        return not self.record or bool(row.document) or row.outcome is not Outcome.DONE

    def conditions(self) -> Iterator[tuple[str, Any]]:
        """Yield what results depend on, as JSON has it."""
        for name in ("prompts", "max_tokens", "seed", "chat"):
            yield name, getattr(self, name)
        yield "parallel", self.levels
        yield "quality", identity(self.quality)
        if self.fill:
            yield "fill", self.fill
