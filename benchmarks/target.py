"""What `tune` with a target finds among a model's quants, and how often it holds afterwards.

The model is in use, and other quants of it are in its folder. The target is nine tenths of the
tokens per second that it generates. The result of `tune` is measured in twenty re-runs, and its
memory compared with the least of a full grid that reaches the target.

    python -m benchmarks.target --model PATH [--engine PATH] [--loss "<= 5 %"]
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from benchmarks.subject import row, subject_of, subject_parser
from kitty_nb.experiments import Sweep, tune

if TYPE_CHECKING:
    from pathlib import Path

    from kitty_nb import ServerConfig
    from kitty_nb.experiments import Results

_SPEED = "generation_tokens_per_second"
_SPACE: dict[str, list[Any]] = {
    "cache_type_k": ["f16", "q8_0"],
    "flash_attention": ["on", "off"],
    "ubatch_size": [128, 512],
}
_SHARE, _SHARE_OF_TRIALS, _RERUNS, _HELD = 0.9, 0.25, 20, 19
_ASKED: dict[str, Any] = {"max_tokens": 32}


def main() -> None:
    """Print the table."""
    parser = subject_parser(__doc__)
    parser.add_argument("--loss", default=None, help='such as "<= 5 %%"')
    asked = parser.parse_args()
    if asked.model is None:
        parser.error("Give a --model with its other quants in the same folder.")
    subject = subject_of(asked)
    with subject.folder() as folder:
        config = subject.config(folder, context_size=1024, threads=1)
        family = sorted(config.models_dir.glob("*.gguf"))
        began = time.monotonic()
        grid = _sweep(config, folder / "grid.journal", models=family, grid=_SPACE, repeats=1)
        row("grid", f"{len(grid)} trials in {time.monotonic() - began:.0f} s")
        in_use = _sweep(config, folder / "in_use.journal", repeats=3).combinations[0]
        bound = _SHARE * in_use.value(_SPEED)
        began = time.monotonic()
        found = tune(
            target=f"{_SPEED} >= {bound:.3f}",
            quality_loss=asked.loss,
            space=_SPACE,
            budget=math.floor(_SHARE_OF_TRIALS * len(grid)),
            config=config,
            store=folder / "tune.journal",
            **_ASKED,
        ).wait()
        seconds = time.monotonic() - began
        row("tune", f"{len(found.results.rows)} trials and the proof in {seconds:.0f} s")
        row("target", f"{_SPEED} >= {bound:.1f}")
        row("found", found.best.trial.label)
        print(found.proof)
        reaching = [one for one in grid.combinations if one.value(_SPEED) >= bound]
        least = min(one.value("memory_gib") for one in reaching)
        share = found.best.value("memory_gib") / least
        row("its memory over the grid's least that reaches it", f"{share:.3f} (asked <= 1.05)")
        trial = found.best.trial
        again = _sweep(
            config.replace(model=trial.model),
            folder / "again.journal",
            configs=[dict(trial.settings)],
            repeats=_RERUNS,
        )
        speeds = again.combinations[0].series[_SPEED].values()
        kept = sum(speed >= bound for speed in speeds)
        row("re-runs in which it held", f"{kept} of {_RERUNS} (asked >= {_HELD})")


def _sweep(config: ServerConfig, store: Path, **what: Any) -> Results:
    with Sweep(config=config, store=store, **{**_ASKED, **what}) as sweep:
        return sweep.run().wait()


if __name__ == "__main__":
    main()
