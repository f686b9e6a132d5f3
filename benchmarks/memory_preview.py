"""The accuracy and speed of the memory forecast: formula over the engine's own breakdown.

`python -m benchmarks.memory_preview [--engine PATH] [--model PATH]` asks that engine about that
model, or else the engine found as usual about headers as long as real ones, made by the tests.
"""

from __future__ import annotations

import os
import statistics
from typing import TYPE_CHECKING, Any

import anyio

from benchmarks.subject import read_subject, seconds_of
from kitty_nb import ServerConfig
from kitty_nb.catalog.memory import Memory, MemoryPool, Requirement, estimate, plan, read_shape
from kitty_nb.engine.devices import list_devices
from kitty_nb.supervisor.forecast import settings_of
from tests.engine_memory import breakdown
from tests.model_files import MODELS, write_model

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.subject import Subject
    from kitty_nb.engine.locate import Engine

_RUNS = 15
_REAL_VOCABULARY = 152_064  # Qwen's; that of Gemma 3 is 262,144
_MIB = 1 << 20
_ITSELF = "8k, itself as draft"
_CHANGES: dict[str, dict[str, Any]] = {
    "8k": {"context_size": 8192},
    "unset": {},
    "32k, -np 4, q8_0": {
        "context_size": 32768,
        "parallel": 4,
        "extra_args": "-ctk q8_0 -ctv q8_0",
    },
    "16k, -fa off": {"context_size": 16384, "flash_attention": "off"},
    "32k, --swa-full": {"context_size": 32768, "extra_args": "--swa-full"},
    "8k, embeddings": {"context_size": 8192, "extra_args": "--embeddings"},
    _ITSELF: {"context_size": 8192},
}


def main() -> None:
    """Print the tables."""
    subject = read_subject(__doc__)
    with subject.folder() as folder:
        models = (
            {subject.model.stem: subject.model}
            if subject.model
            else {name: _model(folder, name, **details) for name, details in MODELS.items()}
        )
        _truth(subject, models)
        _speed(subject, folder)


def _model(folder: Path, name: str, **details: Any) -> Path:
    architecture = details.pop("architecture", name)
    return write_model(folder / f"{name}.gguf", architecture, **details)


def _config(subject: Subject, model: Path, changes: dict[str, Any]) -> ServerConfig:
    """Return settings for the CPU alone, where the formula can be compared row by row."""
    hidden = "-dev none" if subject.engine.dialect.option("--device") else ""
    words = f"{changes.get('extra_args', '')} {hidden}"
    config = ServerConfig(models_dir=model.parent, model=model, binary=subject.binary)
    return config.replace(**changes | {"extra_args": words})


def _truth(subject: Subject, models: dict[str, Path]) -> None:
    """Compare formula and engine, in whole MiB as the engine reports them."""
    print("formula / engine                 weights    cache  compute    total   engine's total")
    worst = {"weights": 0.0, "cache": 0.0, "total": 0.0}
    for name, path in models.items():
        for label, changes in _CHANGES.items():
            config = _config(subject, path, changes)
            told = breakdown(subject.engine, config)["RAM"]
            if label == _ITSELF:
                told += told
                words = (*config.extra_args, "--model-draft", str(path))
                config = config.replace(extra_args=words)
            formula = _formula(subject.engine, config)
            ratios = {
                part: (getattr(formula, part) // _MIB) / (getattr(told, part) // _MIB)
                for part in ("weights", "cache", "compute", "total")
            }
            worst = {part: max(off, abs(ratios[part] - 1)) for part, off in worst.items()}
            figures = "".join(f"{ratio:9.4f}" for ratio in ratios.values())
            total = (told.total or 0) // _MIB
            print(f"{f'{name} {label}':<32}{figures}{total:>12,} MiB")
    # Of small parts, the MiB that rounding drops is a large share.
    limits = {"weights": 0.01, "cache": 0.04, "total": 0.05}
    for part, off in worst.items():
        print(f"farthest off, {part:<10}{off:.2%} (at most {limits[part]:.1%})")


def _formula(engine: Engine, config: ServerConfig) -> Requirement:
    assert config.model
    everywhere = Memory(MemoryPool("RAM", 1 << 60, 1 << 60))
    shape = read_shape(config.model)
    return estimate(shape, plan(shape, settings_of(config, engine), everywhere))[0]


def _speed(subject: Subject, folder: Path) -> None:
    """Time the formula, on the model or the header of a large current one, and the device list."""
    details = {**MODELS["qwen2"], "layers": 64, "vocabulary": _REAL_VOCABULARY}
    path = subject.model or _model(folder, "qwen2", **details)
    engine, config = subject.engine, _config(subject, path, {"context_size": 8192})
    formulas, listings = [], []
    for _ in range(_RUNS):
        os.utime(path)  # the header is read again if the file has changed
        formulas.append(seconds_of(lambda: _formula(engine, config)))
        listings.append(seconds_of(lambda: anyio.run(list_devices, config)))
    again = seconds_of(lambda: _formula(engine, config))
    shape = read_shape(path)
    print(f"\n{len(shape.layers)} layers, {shape.vocabulary:,} tokens; median of {_RUNS}")
    print(f"formula, header read        {statistics.median(formulas) * 1000:6.1f} ms")
    print(f"formula, header known       {again * 1000:6.1f} ms")
    print(f"devices listed              {statistics.median(listings) * 1000:6.1f} ms")


if __name__ == "__main__":
    main()
