"""How true the memory preview is, and how fast: formula over the engine's own breakdown.

The models are headers as long as real ones, made by the tests. `python -m
benchmarks.memory_preview [llama-server]` asks that engine, by default the one found as usual.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import psutil

from kitty_nb import ServerConfig
from kitty_nb.catalog.memory import Memory, Needs, Place
from kitty_nb.catalog.memory_formula import estimate
from kitty_nb.catalog.memory_plan import plan
from kitty_nb.catalog.model_shape import read_shape
from kitty_nb.engine.command_line import build_command
from kitty_nb.engine.locate import locate_engine
from kitty_nb.supervisor.memory_preview import settings_of
from kitty_nb.supervisor.memory_probe import ask_engine
from tests.model_files import MODELS, write_model

if TYPE_CHECKING:
    from kitty_nb.engine.locate import Engine

_RUNS = 15
_LIMIT = 0.3  # seconds that asking the engine may take
_REAL_VOCABULARY = 152_064  # Qwen's; that of Gemma 3 is 262,144
_MIB = 1 << 20
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
}


def main() -> None:
    """Print the tables."""
    binary = Path(sys.argv[1]).absolute() if sys.argv[1:] else None
    engine = anyio.run(locate_engine, binary)
    print(
        f"{platform.platform()}, {os.cpu_count()} cores,"
        f" {psutil.virtual_memory().total / 1e9:.1f} GB; {engine.kind} engine {engine.version}\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {name: _model(folder, name, **details) for name, details in MODELS.items()}
        _truth(engine, models)
        _speed(engine, folder)


def _model(folder: Path, name: str, **details: Any) -> Path:
    architecture = details.pop("architecture", name)
    return write_model(folder / f"{name}.gguf", architecture, **details)


def _truth(engine: Engine, models: dict[str, Path]) -> None:
    """Compare formula and engine, in whole MiB as the engine tells them."""
    print("formula / engine         weights    cache  compute    total   engine's total")
    worst = {"weights": 0.0, "cache": 0.0, "total": 0.0}
    for name, path in models.items():
        for label, changes in _CHANGES.items():
            config = ServerConfig(models_dir=path.parent, model=path, **changes)
            answer = anyio.run(ask_engine, engine, config)
            assert answer
            told = sum((needs for _, needs in answer.gpus), answer.ram)
            formula = _formula(engine, config)
            ratios = {
                part: (getattr(formula, part) // _MIB) / (getattr(told, part) // _MIB)
                for part in ("weights", "cache", "compute", "total")
            }
            worst = {part: max(off, abs(ratios[part] - 1)) for part, off in worst.items()}
            figures = "".join(f"{ratio:9.4f}" for ratio in ratios.values())
            total = (told.total or 0) // _MIB
            print(f"{f'{name} {label}':<24}{figures}{total:>12,} MiB")
    limits = {"weights": 0.005, "cache": 0.005, "total": 0.05}
    for part, off in worst.items():
        print(f"farthest off, {part:<10}{off:.2%} (at most {limits[part]:.1%})")


def _formula(engine: Engine, config: ServerConfig) -> Needs:
    assert config.model
    everywhere = Memory(Place("RAM", 1 << 60, 1 << 60))
    shape = read_shape(config.model)
    return estimate(shape, plan(shape, settings_of(config, engine), everywhere))[0]


def _speed(engine: Engine, folder: Path) -> None:
    """Time the formula and the engine on a header of a large model of today."""
    details = {**MODELS["qwen2"], "layers": 64, "vocabulary": _REAL_VOCABULARY}
    path = _model(folder, "qwen2", **details)
    config = ServerConfig(models_dir=folder, model=path, context_size=8192)
    formulas, answers, whole = [], [], []
    for _ in range(_RUNS):
        os.utime(path)  # the header is read again when the file has changed
        began = time.perf_counter()
        _formula(engine, config)
        formulas.append(time.perf_counter() - began)
        began = time.perf_counter()
        assert anyio.run(ask_engine, engine, config)
        answers.append(time.perf_counter() - began)
        whole.append(_ask_with_the_model(engine, config))
    began = time.perf_counter()
    _formula(engine, config)
    again = time.perf_counter() - began
    typical, slowest = statistics.median(answers), max(answers)
    print(f"\n64 layers, {_REAL_VOCABULARY:,} tokens in the vocabulary; median of {_RUNS}")
    print(f"formula, header read        {statistics.median(formulas) * 1000:6.1f} ms")
    print(f"formula, header known       {again * 1000:6.1f} ms")
    print(f"engine asked                {typical * 1000:6.1f} ms, slowest {slowest * 1000:.1f} ms")
    print(f"  of the {_LIMIT * 1000:.0f} ms allowed      {typical / _LIMIT:6.2f} x")
    print(f"  of asking with the model  {typical / statistics.median(whole):6.2f} x")
    for step in range(_RUNS):
        anyio.run(_call_off, engine, config, step * 1.2 * typical / _RUNS)
    left = psutil.Process().children(recursive=True)
    print(f"processes left after {_RUNS} answers and {_RUNS} calls off: {len(left)}")


def _ask_with_the_model(engine: Engine, config: ServerConfig) -> float:
    """The yardstick: the engine on the model itself, to the same line, then ended."""
    changed = config.model_copy(update={"port": 0})
    began = time.perf_counter()
    command = build_command(engine, changed)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout
        assert any(b"fit_memory_breakdown" in line for line in server.stdout)
        server.kill()
    return time.perf_counter() - began


async def _call_off(engine: Engine, config: ServerConfig, seconds: float) -> None:
    with anyio.move_on_after(seconds):
        await ask_engine(engine, config)


if __name__ == "__main__":
    main()
