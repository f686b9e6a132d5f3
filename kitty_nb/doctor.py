"""Whether this machine can serve, and what to do where it cannot."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import anyio
import anyio.to_thread
from rich.filesize import decimal

from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.demo_model import write_demo_model
from kitty_nb.catalog.resolve import load_profile
from kitty_nb.catalog.stores import model_stores
from kitty_nb.config import (
    OnKernelExit,
    ServerConfig,
    configured_profiles,
    env_warnings,
    load_lenient,
)
from kitty_nb.config.env_file import read_env
from kitty_nb.engine.command_line import build_command
from kitty_nb.engine.devices import engine_devices
from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import ConfigError, EngineError, KittyError, ServerFailedError
from kitty_nb.supervisor.free_memory import free_memory, with_devices
from kitty_nb.supervisor.port_holder import next_free_port, port_refusal
from kitty_nb.supervisor.registry import find_server, refuse_open_folder
from kitty_nb.supervisor.supervisor import Supervisor

_KERNEL_WITH_SUBSHELLS = 7  # ipykernel's first version whose widgets answer while a cell runs
_NO_ENGINE = "none that can be run"
_LOADED_WITHIN = 60.0  # seconds
_LITTLE_SPACE = 1_000_000_000  # bytes; a log of a busy day and the next small model


class Verdict(StrEnum):
    """How a finding is to be read."""

    GOOD = "ok"
    ODD = "look"
    BAD = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found.

    Attributes:
        what: What was checked.
        verdict: Whether it will do.
        found: What is there.
        advice: What to do; empty when nothing is to be done.
    """

    what: str
    verdict: Verdict
    found: str
    advice: str = ""


async def examine(env: str | Path = ".env", profile: str = "primary") -> list[Finding]:
    """Check all that a start needs, and let the engine load a demo model beside what runs.

    Args:
        env: The `.env` file with the settings.
        profile: Which named set of settings to check.
    """
    findings = [_versions(), _kernel()]
    try:
        config, complaint = await anyio.to_thread.run_sync(load_profile, env, profile)
        source = (await anyio.to_thread.run_sync(read_env, env)).path
        warnings = await anyio.to_thread.run_sync(env_warnings, env, profile)
    except ConfigError as error:
        return [*findings, Finding(".env", Verdict.BAD, str(error), "Correct these lines.")]
    findings.append(_settings(source, complaint, warnings))
    findings.append(await _engine(config))
    if findings[-1].found != _NO_ENGINE:
        findings.append(await _load(config))
    findings.append(await _memory(config))
    checks = (_models, _model, _port, _disk)
    findings += [await anyio.to_thread.run_sync(check, config) for check in checks]
    others = [
        load_lenient(env, name)[0] for name in configured_profiles(env) if name != config.profile
    ]
    return findings + [await anyio.to_thread.run_sync(_port, other) for other in others]


def _versions() -> Finding:
    found = f"kitty_nb {version('kitty_nb')}, Python {platform.python_version()}, {sys.platform}"
    if sys.platform in {"linux", "darwin"}:
        return Finding("Versions", Verdict.GOOD, found)
    return Finding("Versions", Verdict.BAD, found, "Use Linux or macOS; on Windows, WSL.")


def _kernel() -> Finding:
    try:
        lab, kernel = version("jupyterlab"), version("ipykernel")
    except PackageNotFoundError as error:
        advice = "Install it again: pip install kitty_nb"
        return Finding("JupyterLab", Verdict.BAD, str(error), advice)
    found = f"JupyterLab {lab}, ipykernel {kernel}"
    if int(kernel.partition(".")[0]) >= _KERNEL_WITH_SUBSHELLS:
        return Finding("JupyterLab", Verdict.GOOD, found)
    advice = "Clicks wait until a cell ends; pip install --upgrade ipykernel mends that."
    return Finding("JupyterLab", Verdict.ODD, found, advice)


def _settings(source: Path, complaint: ConfigError | None, warnings: tuple[str, ...]) -> Finding:
    advice = "\n".join([*map(str, complaint.problems if complaint else ()), *warnings])
    if complaint:
        found = f"{len(complaint.problems)} wrong in {source}"
        return Finding(".env", Verdict.BAD, found, advice)
    if not source.exists():
        found = f"There is none in {source.parent} or above: every setting has its default."
        return Finding(".env", Verdict.ODD if warnings else Verdict.GOOD, found, advice)
    return Finding(".env", Verdict.ODD if warnings else Verdict.GOOD, str(source), advice)


async def _engine(config: ServerConfig) -> Finding:
    try:
        engine = await locate_engine(config.binary)
    except EngineError as error:
        return Finding("Engine", Verdict.BAD, _NO_ENGINE, str(error))
    found = f"llama-server {engine.version} ({engine.kind})"
    if config.model:
        try:
            build_command(engine, config)
        except KittyError as error:
            return Finding("Engine", Verdict.BAD, found, str(error))
    return Finding("Engine", Verdict.GOOD, found)


async def _load(config: ServerConfig) -> Finding:
    """Start the engine on a demo model, on a free port and in a temporary folder."""
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="kitty_nb-") as name:
            trial = await anyio.to_thread.run_sync(_trial, config, Path(name))
            async with Supervisor(trial) as supervisor:
                with anyio.fail_after(_LOADED_WITHIN):
                    await supervisor.start()
    except TimeoutError:
        advice = (
            "Some devices compile their programs for minutes the first time. Start a server: its"
            " activity and its log show how far it is."
        )
        found = f"no answer from the demo model within {_LOADED_WITHIN:.0f} s"
        return Finding("Load", Verdict.ODD, found, advice)
    except (KittyError, OSError) as error:
        return Finding("Load", Verdict.BAD, "the engine does not serve a demo model", str(error))
    seconds = time.monotonic() - began
    return Finding("Load", Verdict.GOOD, f"a demo model was loaded and answered in {seconds:.1f} s")


def _trial(config: ServerConfig, folder: Path) -> ServerConfig:
    return ServerConfig(
        profile="doctor",
        binary=config.binary,
        models_dir=folder,
        model=write_demo_model(folder / "demo.gguf"),
        port=next_free_port("127.0.0.1", config.port),
        log_dir=folder,
        history=folder / "history.sqlite3",
        context_size=256,
        parallel=1,
        restart_max=0,
        stop_grace_seconds=2,
        on_kernel_exit=OnKernelExit.STOP,
    )


def _models(config: ServerConfig) -> Finding:
    folder = config.models_dir
    try:
        any(folder.iterdir())
    except FileNotFoundError:
        advice = "Correct LLAMACPP_MODELS_DIR, or make it, with a small model: kitty-nb demo-model"
        return Finding("Models", Verdict.ODD, f"There is no folder {folder}.", advice)
    except OSError as error:
        found = f"{folder} cannot be looked into ({error.strerror})."
        advice = "Correct LLAMACPP_MODELS_DIR, or the rights of that folder and of those above it."
        return Finding("Models", Verdict.BAD, found, advice)
    stores = model_stores(config)
    models = ModelCatalog(stores).scan()
    if not models:
        advice = "Put .gguf files there, or try it out with: kitty-nb demo-model"
        return Finding("Models", Verdict.ODD, f"none in {folder}", advice)
    troubles = [f"{model.name}: {model.problem}" for model in models if model.problem]
    places = f"{folder} and what other programs keep" if len(stores) > 1 else str(folder)
    found = f"{len(models) - len(troubles)} of {len(models)} can be served, in {places}"
    return Finding("Models", Verdict.ODD if troubles else Verdict.GOOD, found, "\n".join(troubles))


def _model(config: ServerConfig) -> Finding:
    if config.model:
        return Finding("Model", Verdict.GOOD, str(config.model))
    key = f"LLAMACPP_{config.profile.upper()}_MODEL"
    advice = f"Set {key}, or pick one in the panel and press Save."
    return Finding("Model", Verdict.ODD, "none is chosen", advice)


def _port(config: ServerConfig) -> Finding:
    what, address = f"Port of {config.profile}", f"{config.host}:{config.port}"
    if record := find_server(config):
        return Finding(what, Verdict.GOOD, f"{record.config.endpoint}, ours (PID {record.pid})")
    refusal = port_refusal(config.host, config.port)
    if refusal is None:
        return Finding(what, Verdict.GOOD, f"{address} is free")
    key = f"LLAMACPP_{config.profile.upper()}_PORT"
    try:
        advice = f"Stop what holds it, or set {key}={next_free_port(config.host, config.port)}."
    except ServerFailedError as error:
        advice = str(error)
    return Finding(what, Verdict.BAD, refusal, advice)


async def _memory(config: ServerConfig) -> Finding:
    what = "GPU, memory"
    record = await anyio.to_thread.run_sync(find_server, config)
    measured = await anyio.to_thread.run_sync(free_memory, record.pid if record else None)
    devices = None
    with suppress(EngineError):  # another finding says what is wrong with it
        _, devices = await engine_devices(config)
    memory = with_devices(measured, devices)
    rows = [
        f"{pool.name}: {decimal(pool.free)} of {decimal(pool.total)} free" for pool in memory.pools
    ]
    if devices is None and record and record.devices:  # machines of --rpc that serve it
        rows += [f"{name}: in use by the server (PID {record.pid})" for name in record.devices]
    found = ", ".join(rows)
    if measured.gpus and devices == ():
        names = ", ".join(gpu.name for gpu in measured.gpus)
        advice = f"This llama-server does not use {names}. Install a build that does."
        return Finding(what, Verdict.ODD, found, advice)
    if len(rows) > 1 or sys.platform == "darwin":
        return Finding(what, Verdict.GOOD, found)
    advice = "This llama-server lists no GPU: models run on the processor."
    if devices is None and not find_spec("pynvml"):
        advice = "To see an NVIDIA GPU: pip install 'kitty_nb[gpu]'"
    return Finding(what, Verdict.GOOD, found, advice)


def _disk(config: ServerConfig) -> Finding:
    try:
        refuse_open_folder(config)
    except ServerFailedError as error:
        return Finding("Disk", Verdict.BAD, str(error))
    folders = {
        "LLAMACPP_LOG_DIR": _nearest(config.log_dir),
        "LLAMACPP_HISTORY": _nearest(config.history.parent),
    }
    for key, folder in folders.items():
        if not os.access(folder, os.W_OK | os.X_OK):
            advice = f"Make it writable, or set {key} to a folder that is."
            return Finding("Disk", Verdict.BAD, f"{folder} cannot be written to", advice)
    free = {
        folder: shutil.disk_usage(folder).free
        for folder in (folders["LLAMACPP_LOG_DIR"], _nearest(config.models_dir))
    }
    folder = min(free, key=free.__getitem__)
    found = f"{decimal(free[folder])} free at {folder}"
    if free[folder] >= _LITTLE_SPACE:
        return Finding("Disk", Verdict.GOOD, found)
    return Finding("Disk", Verdict.ODD, found, "Make room: logs and models need some.")


def _nearest(folder: Path) -> Path:
    """The folder, or the first above it that exists."""
    places = (folder, *folder.parents)
    return next(path for path in places if os.path.exists(path))  # noqa: PTH110 (never raises)
