"""Memory: what there is of it, what a model needs, and whether that fits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kitty_nb.catalog.model_shape import ModelShape

__all__ = [
    "CACHE_TYPES",
    "MARGIN",
    "Draft",
    "Memory",
    "MemoryPreview",
    "MemorySettings",
    "Needs",
    "Part",
    "Place",
    "Verdict",
]

# Bytes of a block and numbers in it, by the names that --cache-type-k takes.
CACHE_TYPES = {
    "f32": (4, 1), "f16": (2, 1), "bf16": (2, 1), "q8_0": (34, 32), "q5_1": (24, 32),
    "q5_0": (22, 32), "q4_1": (20, 32), "q4_0": (18, 32), "iq4_nl": (18, 32),
}  # fmt: skip
_GB = 1_000_000_000
MARGIN = 1 << 30  # llama.cpp's --fit-target: bytes that --fit leaves free on each device
_MARGIN_SHARE = 10  # of a small memory, a tenth is margin enough


class Verdict(StrEnum):
    """Whether a model goes into the memory there is."""

    FITS = "fits"
    TIGHT = "tight"
    WILL_NOT_FIT = "will not fit"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """The settings of llama-server that decide about memory, with its defaults.

    Attributes:
        context: Tokens of context; None leaves it to the engine, 0 is all that was trained for.
        sequences: Requests served at once.
        unified: Whether they share one cache, rather than a part of it each.
        batch: Tokens of a prompt handed over at once.
        micro_batch: Tokens of a prompt worked on at once.
        cache_type_k: How keys are kept, one of `CACHE_TYPES`.
        cache_type_v: How values are kept.
        flash_attention: Whether attention is worked out without a matrix of all scores.
        full_window: Whether layers with a sliding window keep all tokens nevertheless.
        gpu_layers: Layers to put on GPUs, the output being one more; None is what fits.
        cache_on_gpu: Whether the cache of those layers goes there too.
        fits: Whether the engine shrinks what is left to it until it fits (`--fit`).
        scores_all: Whether the engine makes room for the scores of all tokens of a batch, as it
            does for embeddings, and did for everything before it had `--fit`.
        drafted: Tokens that speculation proposes at once, which need scores too.
        extra_weights: Bytes of files that are loaded beside the model, such as a projector.
        draft: The model that proposes them.
    """

    context: int | None = None
    sequences: int = 4
    unified: bool = True
    batch: int = 2048
    micro_batch: int = 512
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attention: bool = True
    full_window: bool = False
    gpu_layers: int | None = None
    cache_on_gpu: bool = True
    fits: bool = True
    scores_all: bool = False
    drafted: int = 0
    extra_weights: int = 0
    draft: Draft | None = None

    @property
    def caches(self) -> int:
        """How many caches share the context between them."""
        return 1 if self.unified else self.sequences


@dataclass(frozen=True, slots=True)
class Draft:
    """A smaller model that is loaded beside another, to propose what comes next.

    Attributes:
        shape: The smaller model.
        settings: Its own; its context is that of the other model.
    """

    shape: ModelShape
    settings: MemorySettings


@dataclass(frozen=True, slots=True)
class Place:
    """A memory that a model can be put into.

    Attributes:
        name: `RAM`, or the GPU's.
        free: Bytes to be had once the server that runs now has ended.
        total: Bytes in all.
        returned: Bytes of `free` that the running server still holds.
    """

    name: str
    free: int
    total: int
    returned: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """All memory of a machine.

    Attributes:
        ram: What the processor uses; the GPU too, where they share it.
        gpus: Each GPU with a memory of its own.
    """

    ram: Place
    gpus: tuple[Place, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """RAM and then the GPUs."""
        return (self.ram, *self.gpus)


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a model needs in one place, or in all.

    Attributes:
        weights: For its weights.
        cache: For what it remembers of the context; None when that cannot be worked out.
        compute: For work in progress; None when that cannot be worked out.
    """

    weights: int
    cache: int | None
    compute: int | None

    @property
    def total(self) -> int | None:
        """All of it; None when a part is not known."""
        if self.cache is None or self.compute is None:
            return None
        return self.weights + self.cache + self.compute

    def __add__(self, other: Needs) -> Needs:
        if self.total is None or other.total is None:
            return Needs(self.weights + other.weights, None, None)
        cache = (self.cache or 0) + (other.cache or 0)
        compute = (self.compute or 0) + (other.compute or 0)
        return Needs(self.weights + other.weights, cache, compute)


@dataclass(frozen=True, slots=True)
class Part:
    """What goes where.

    Attributes:
        place: Where.
        needs: How much.
    """

    place: Place
    needs: Needs

    @property
    def verdict(self) -> Verdict:
        """Whether it goes in there, `tight` where it leaves less than the margin."""
        needed = self.needs.total
        if needed is None:
            return Verdict.UNKNOWN
        left = self.place.free - needed
        margin = min(MARGIN, self.place.free // _MARGIN_SHARE)
        return (
            Verdict.WILL_NOT_FIT if left < 0 else Verdict.TIGHT if left < margin else Verdict.FITS
        )


@dataclass(frozen=True, slots=True)
class MemoryPreview:
    """What a model would need with some settings, and whether there is that much.

    Attributes:
        parts: What goes where; only places that get something. Empty when nothing is known.
        context: The context that this is for, in tokens.
        largest_context: The longest one that fits, with a margin; 0 when none does, None when that
            cannot be worked out.
        exact: Whether the engine itself said so, rather than the formula.
        problem: Why nothing is known, in a sentence.
    """

    parts: tuple[Part, ...] = ()
    context: int | None = None
    largest_context: int | None = None
    exact: bool = False
    problem: str | None = None

    @property
    def needs(self) -> Needs:
        """What it needs in all places together."""
        return sum((part.needs for part in self.parts), Needs(0, 0, 0))

    @property
    def verdict(self) -> Verdict:
        """The worst that holds of any place."""
        found = {part.verdict for part in self.parts} or {Verdict.UNKNOWN}
        worst_first = (Verdict.WILL_NOT_FIT, Verdict.UNKNOWN, Verdict.TIGHT, Verdict.FITS)
        return next(verdict for verdict in worst_first if verdict in found)

    @property
    def refusal(self) -> str:
        """Why not to try, and what to do, in words; empty where it may fit."""
        wants = ", ".join(
            f"{(part.needs.total or 0) / _GB:.1f} GB of {part.place.name}, of which"
            f" {part.place.free / _GB:.1f} GB are free"
            for part in self.parts
            if part.verdict is Verdict.WILL_NOT_FIT
        )
        advice = "Lower the context or the GPU layers, or pick a smaller model."
        return f"It will not fit: it needs {wants}. {advice}" if wants else ""
