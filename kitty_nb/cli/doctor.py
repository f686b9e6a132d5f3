"""Checks of everything that a start needs, each with advice if it fails."""

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
from typing import TYPE_CHECKING

import anyio
from rich.filesize import decimal

from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.demo_model import write_demo_model
from kitty_nb.catalog.resolve import load_profile
from kitty_nb.catalog.stores import model_stores
from kitty_nb.cli.commands import read_status
from kitty_nb.config import ServerConfig
from kitty_nb.config.env_file import read_env
from kitty_nb.config.profiles import configured_profiles, env_warnings, load_lenient
from kitty_nb.engine.command_line import build_command
from kitty_nb.engine.devices import list_devices
from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import ConfigError, EngineError, KittyError, ServerFailedError
from kitty_nb.isolated_server import isolated_server
from kitty_nb.remote.connection import doctor_command
from kitty_nb.supervisor.events import ServerStatus
from kitty_nb.supervisor.external_server import look_once
from kitty_nb.supervisor.forecast import Forecaster, Running, free_memory, with_devices
from kitty_nb.supervisor.port_owner import refuse_busy_port
from kitty_nb.supervisor.registry import find_server, refuse_open_folder
from kitty_nb.supervisor.router_program import router_command

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kitty_nb.engine.locate import Engine

_KERNEL_WITH_SUBSHELLS = 7  # ipykernel's first version whose widgets answer while a cell runs
_LOADED_WITHIN = 60.0  # seconds
_SHOWN = 5  # models with problems
_LITTLE_SPACE = 1_000_000_000  # bytes; enough for a busy day's log and another small model


class Verdict(StrEnum):
    """The severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        what: The thing that was checked.
        verdict: How serious it is.
        found: What was found.
        advice: What to do about it; empty if there is nothing to do.
    """

    what: str
    verdict: Verdict
    found: str
    advice: str = ""


_OK, _WARNING, _ERROR = Verdict
_Result = tuple[Verdict, str, str] | tuple[Verdict, str]  # the rest of a finding


def examine(env: str | Path = ".env", profile: str = "primary") -> list[Finding]:
    """Check everything that a start needs, and load a demo model beside running servers. It blocks.

    For a server elsewhere, check only whether it can be reached.

    Args:
        env: The `.env` file with the settings.
        profile: The profile to check.
    """
    findings = [Finding("Versions", *_versions()), Finding("JupyterLab", *_jupyterlab())]
    try:
        config, complaint = load_profile(env, profile)
        findings.append(Finding(".env", *_settings(env, profile, complaint)))
    except ConfigError as error:
        return [*findings, Finding(".env", _ERROR, str(error), "Correct these lines.")]
    if config.ssh:
        return [*findings, Finding("Machine", *_machine(config)), *_ports(env, config.profile)]
    if config.url:
        return [*findings, Finding("Model", *_model(config)), *_ports(env, config.profile)]
    try:
        engine = anyio.run(locate_engine, config.binary)
    except EngineError as error:
        findings.append(Finding("Engine", _ERROR, "No usable llama-server found.", str(error)))
    else:
        findings += [Finding("Engine", *_engine(engine, config)), Finding("Load", *_load(config))]
    findings += [Finding(what, *check(config)) for what, check in _CHECKS.items()]
    return [*findings, *_ports(env, config.profile)]


def _versions() -> _Result:
    found = f"kitty_nb {version('kitty_nb')}, Python {platform.python_version()}, {sys.platform}"
    if sys.platform in {"linux", "darwin"}:
        return _OK, found
    return _ERROR, found, "Use Linux or macOS; on Windows, WSL."


def _jupyterlab() -> _Result:
    try:
        lab, kernel = version("jupyterlab"), version("ipykernel")
    except PackageNotFoundError as error:
        advice = "To fix: pip install --force-reinstall kitty_nb"
        return _ERROR, f"{error.name} is not installed.", advice
    found = f"JupyterLab {lab}, ipykernel {kernel}"
    if int(kernel.partition(".")[0]) >= _KERNEL_WITH_SUBSHELLS:
        return _OK, found
    advice = "Buttons don't respond while a cell runs. To fix: pip install --upgrade ipykernel"
    return _WARNING, found, advice


def _settings(env: str | Path, profile: str, complaint: ConfigError | None) -> _Result:
    source, warnings = read_env(env).path, env_warnings(env, profile)
    advice = "\n".join(warnings)
    if complaint:
        return _ERROR, str(complaint), advice
    found = str(source)
    if not source.exists():
        found = f"No .env in {source.parent} or its parent folders; every setting has its default."
    return _WARNING if warnings else _OK, found, advice


def _machine(config: ServerConfig) -> _Result:
    began = time.monotonic()
    state, _ = read_status(config)
    if state.status is ServerStatus.OUT_OF_REACH:
        return _ERROR, state.error or ""
    found = f"Reached {config.ssh} in {time.monotonic() - began:.1f} s. {state.sentence}"
    return _OK, found, f"For its engine, memory and models: {doctor_command(config)}"


def _engine(engine: Engine, config: ServerConfig) -> _Result:
    found = f"llama-server {engine.version} ({engine.kind})"
    try:
        if config.model:
            build_command(engine, config)
    except KittyError as error:
        return _ERROR, found, str(error)
    return _OK, found


def _load(config: ServerConfig) -> _Result:
    """Serve a demo model on a free port and in a temporary folder."""
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="kitty_nb-") as folder:
            anyio.run(_serve_demo, config, Path(folder))
    except TimeoutError:
        found = f"The engine did not serve a demo model within {_LOADED_WITHIN:.0f} s."
        advice = (
            "Some devices compile kernels for minutes the first time. To watch, run kitty-nb start"
            " and kitty-nb logs -f."
        )
        return _WARNING, found, advice
    except (KittyError, OSError) as error:
        return _ERROR, "The engine can't serve a demo model.", str(error)
    return _OK, f"The engine served a demo model after {time.monotonic() - began:.1f} s."


async def _serve_demo(config: ServerConfig, folder: Path) -> None:
    demo = ServerConfig(
        profile="doctor",
        binary=config.binary,
        models_dir=folder,
        model=write_demo_model(folder / "demo.gguf"),
        history=folder / "history.sqlite3",
        context_size=256,
        parallel=1,
    )
    with anyio.fail_after(_LOADED_WITHIN):
        async with isolated_server(demo, folder):
            pass


def _memory(config: ServerConfig) -> _Result:
    measured, devices = free_memory(), None
    with suppress(EngineError):  # the check of the engine reports what is wrong with it
        devices = anyio.run(list_devices, config)
    rows = [
        f"{pool.name}: {decimal(pool.free)} of {decimal(pool.total)} free"
        for pool in with_devices(measured, devices).pools
    ]
    if devices is None and (record := find_server(config)) and record.devices:  # machines of --rpc
        rows += [f"{name}: in use by the server (PID {record.pid})" for name in record.devices]
    found = ", ".join(rows)
    if measured.gpus and devices == ():
        names = ", ".join(gpu.name for gpu in measured.gpus)
        advice = "Unless --device or CUDA_VISIBLE_DEVICES forbids it, install a build that can."
        return _WARNING, found, f"This llama-server does not use {names}. {advice}"
    if len(rows) > 1 or sys.platform == "darwin":
        return _OK, found
    if devices is not None:
        return _OK, found, "This llama-server uses no GPU: models run on the processor."
    advice = "" if find_spec("pynvml") else "To detect NVIDIA GPUs: pip install 'kitty_nb[gpu]'"
    return _OK, found, advice


def _models(config: ServerConfig) -> _Result:
    folder, stores = config.models_dir, model_stores(config)
    try:
        with suppress(FileNotFoundError):
            any(folder.iterdir())
    except OSError as error:
        advice = "Check LLAMACPP_MODELS_DIR and the folder's permissions."
        return _ERROR, f"Can't read {folder} ({error.strerror}).", advice
    models = ModelCatalog(stores).scan()
    if not models:
        advice = "Check LLAMACPP_MODELS_DIR, or try things out: kitty-nb demo-model"
        return _WARNING, f"There are no models in {folder}.", advice
    problems = [f"{model.name}: {model.problem}" for model in models if model.problem]
    places = f"{folder} and other programs' stores" if len(stores) > 1 else str(folder)
    found = f"{len(models) - len(problems)} of {len(models)} models in {places} can be served."
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"{len(problems) - _SHOWN} more: run kitty-nb scan to see them."]
    return _WARNING if problems else _OK, found, "\n".join(problems)


def _model(config: ServerConfig) -> _Result:
    if config.url:
        found = anyio.run(look_once, config)
        if found.error:
            return _ERROR, found.error
        models = ", ".join((found.external and found.external.models) or ()) or "none"
        verdict = _WARNING if found.doubt else _OK
        return verdict, f"{config.url} answers. Its models: {models}.", found.doubt
    if config.models is not None:
        return anyio.run(_routed, config)
    if not config.model:
        advice = f"Set LLAMACPP_{config.profile.upper()}_MODEL to one that kitty-nb scan lists."
        return _WARNING, "No model is chosen.", advice
    record = find_server(config)
    running = Running(record.pid, record.config) if record else Running()
    too_large = anyio.run(Forecaster().why_not, config, running)
    return _ERROR if too_large else _OK, str(config.model), too_large


async def _routed(config: ServerConfig) -> _Result:
    try:
        plan = await router_command(config, await locate_engine(config.binary))
    except KittyError as error:
        return _ERROR, "The router can't be started.", str(error)
    router = "llama-swap" if plan.by_llama_swap else "llama-server's router"
    verdict = _WARNING if plan.notes else _OK
    return verdict, f"The models of {', '.join(plan.profiles)}, by {router}.", "\n".join(plan.notes)


def _disk(config: ServerConfig) -> _Result:
    try:
        refuse_open_folder(config)
    except ServerFailedError as error:
        return _ERROR, str(error)
    logs, models = _nearest(config.log_dir), _nearest(config.models_dir)
    written = {"LLAMACPP_LOG_DIR": logs, "LLAMACPP_HISTORY": _nearest(config.history.parent)}
    for key, folder in written.items():
        if not os.access(folder, os.W_OK | os.X_OK):
            return _ERROR, f"Can't write to {folder}.", f"Make it writable, or change {key}."
    free, folder = min((shutil.disk_usage(folder).free, folder) for folder in (logs, models))
    found = f"{decimal(free)} free in {folder}"
    if free >= _LITTLE_SPACE:
        return _OK, found
    return _WARNING, found, "Free some space: logs and models need it."


_CHECKS = {"GPU, memory": _memory, "Models": _models, "Model": _model, "Disk": _disk}


def _ports(env: str | Path, first: str) -> Iterator[Finding]:
    problems: dict[ServerConfig, str] = {}
    for name in dict.fromkeys((first, *configured_profiles(env))):
        config, complaint = load_lenient(env, name)
        if config.ssh:  # its port is on another machine
            continue
        wrong = [str(p) for p in (complaint.problems if complaint else ()) if "_PORT" in p.key]
        problems[config] = "".join(wrong)
    # A router serves these at its own port.
    routed = {name for config in problems for name in config.models or ()}
    if "all" in routed:
        routed = {config.profile for config in problems if config.models is None}
    for config, problem in problems.items():
        if config.url:
            continue
        sharing = [
            other.profile
            for other in problems
            if other.endpoint == config.endpoint
            and not (problems[other] or {other.profile, config.profile} <= routed)
        ]
        yield Finding(f"Port of {config.profile}", *_port(config, problem, sharing))


def _port(config: ServerConfig, problem: str, sharing: Sequence[str]) -> _Result:
    if problem:
        return _ERROR, problem
    if record := find_server(config):
        return _OK, f"{record.config.endpoint} is the profile's server (PID {record.pid})."
    try:
        refuse_busy_port(config)
    except ServerFailedError as error:
        return _ERROR, str(error)
    found = f"{config.host}:{config.port} is free."
    if others := ", ".join(name for name in sharing if name != config.profile):
        advice = f"Only one of them can run at a time. Set LLAMACPP_{config.profile.upper()}_PORT."
        return _WARNING, f"{found} It is also the port of {others}.", advice
    return _OK, found


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    places = (folder, *folder.parents)
    return next(path for path in places if os.path.exists(path))  # noqa: PTH110 (never raises)
