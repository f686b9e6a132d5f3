"""What benchmarks share: their subject, by the command line or the environment; clocks and rows."""

from __future__ import annotations

import argparse
import http.client
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import psutil

from kitty_nb import ServerConfig, write_demo_model
from kitty_nb.engine.locate import locate_engine
from kitty_nb.network import free_port
from tests.model_files import write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kitty_nb.engine.locate import Engine


@dataclass(frozen=True)
class Subject:
    """An engine, and a model where one was given.

    Attributes:
        binary: The engine's program; None for the engine found as usual.
        engine: The engine.
        model: The model; None for a demo model of a suitable size.
    """

    binary: Path | None
    engine: Engine
    model: Path | None

    def __str__(self) -> str:
        return (
            f"{platform.platform()}, {os.cpu_count()} cores,"
            f" {psutil.virtual_memory().total / 1e9:.1f} GB; {self.engine.kind} engine"
            f" {self.engine.version}; {self.model.name if self.model else 'demo model'}"
        )

    @contextmanager
    def folder(self, more: str = "") -> Iterator[Path]:
        """Print what is measured, and `more` about it; lend a folder meanwhile."""
        print(f"{self}{more}\n")
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)

    def dense(self, folder: Path, layers: int) -> Subject:
        """Return a dense model of zeros, about as long to ask as a small real one, unless given."""
        model = self.model or write_model(
            folder / "dense.gguf", layers=layers, width=512, inner=1536, heads=8, kv_heads=4
        )
        return replace(self, model=model)

    def config(self, folder: Path, size: int | None = None, **settings: Any) -> ServerConfig:
        """Return settings that serve the model, or a demo model of `size` bytes, from `folder`."""
        model = self.model or write_demo_model(folder / "demo.gguf", size=size)
        return ServerConfig(
            models_dir=model.parent,
            model=model,
            binary=self.binary,
            port=free_port(),
            log_dir=folder / "logs",
            history=folder / "history.sqlite3",
            **settings,
        )


def read_subject(purpose: str | None) -> Subject:
    """Read `--engine` and `--model`, by default `LLAMACPP_BIN` and `KITTY_REAL_MODEL`."""
    return subject_of(subject_parser(purpose).parse_args())


def subject_parser(purpose: str | None) -> argparse.ArgumentParser:
    """Return a parser with these two options, for a benchmark with further ones."""
    parser = argparse.ArgumentParser(
        description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, variable, default in (
        ("--engine", "LLAMACPP_BIN", "the engine found as usual"),
        ("--model", "KITTY_REAL_MODEL", "a demo model"),
    ):
        parser.add_argument(
            flag,
            type=lambda text: Path(text).absolute(),
            default=os.environ.get(variable) or None,
            metavar="PATH",
            help=f"default: {variable}, else {default}",
        )
    return parser


def subject_of(asked: argparse.Namespace) -> Subject:
    """Find the engine and the model that the options name."""
    return Subject(asked.engine, anyio.run(locate_engine, asked.engine), asked.model)


def row(what: str, figure: str) -> None:
    """Print a row of a table at once: a benchmark takes its time."""
    print(f"{what:<52}{figure}", flush=True)


def seconds_of(work: Callable[[], object]) -> float:
    """Do some work, and return the seconds that it took."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def is_healthy(port: int) -> bool:
    """Ask a server of this machine for its health, without the time that a client takes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Keep so many cores busy."""
    several = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in several:
            one.kill()
            one.wait()


def stand_in(folder: Path) -> Path:
    """Write a program that is the tests' stand-in server, which reads its model at an even pace."""
    program = folder / "llama-server"
    server = Path(__file__).parents[1] / "tests" / "stand_in_server.py"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P "{server}" "$@"\n')
    program.chmod(0o755)
    return program
