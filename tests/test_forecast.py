from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from conftest import eventually
from engine_memory import breakdown
from model_files import MODELS, write_model

from kitty_nb import ModelManager, ServerConfig
from kitty_nb.catalog.memory import (
    Memory,
    MemoryPool,
    MemoryPreview,
    Verdict,
    estimate,
    plan,
    read_shape,
)
from kitty_nb.engine.locate import Dialect, locate_engine
from kitty_nb.supervisor.forecast import Forecaster, Running, free_memory, offloads, settings_of

MIB = 1 << 20

# An engine that lists devices, and notes in a file beside it that it was asked for them.
TELLER = """\
#!/bin/sh
case " $* " in
*" --help "*) cat <<'END'
-m,    --model FNAME              model path to load
-c,    --ctx-size N               size of the context
-ngl,  --gpu-layers, --n-gpu-layers N   layers in VRAM
-fit,  --fit [on|off]             fit
       --list-devices             list devices
END
exit;;
*" --version "*) echo "version: 1 (teller)"; exit;;
*" --list-devices "*) echo "$*" >> "$0.calls"; {body}; exit;;
esac
exit 1
"""
GPU = "  ROCm0: AMD Radeon RX 7900 XTX (16000 MiB, 9000 MiB free)"


@pytest.fixture
def teller(tmp_path: Path) -> Callable[..., Path]:
    def make(devices: str, body: str = "") -> Path:
        (tmp_path / "teller").mkdir(exist_ok=True)
        program = tmp_path / "teller" / "llama-server"
        listing = f"echo 'Available devices:'; echo '{devices}'"
        program.write_text(TELLER.replace("{body}", body or listing))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return program

    return make


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("headers")
    found = {}
    for name, details in MODELS.items():
        rest = {key: value for key, value in details.items() if key != "architecture"}
        architecture = details.get("architecture", name)
        found[name] = write_model(folder / f"{name}.gguf", architecture, **rest)
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "changes",
    [
        {"context_size": 8192},
        {},
        {"context_size": 30000, "parallel": 3, "extra_args": ["-ctk", "q8_0", "-ctv", "q4_0"]},
        {"context_size": 16384, "flash_attention": "off", "batch_size": 300},
        {"context_size": 32768, "extra_args": ["--swa-full", "-np", "2", "-kvu", "-ub", "128"]},
    ],
    ids=["usual", "nothing said", "parallel", "without flash attention", "full window"],
)
def test_the_formula_agrees_with_the_engine(
    config: ServerConfig, models: dict[str, Path], name: str, changes: dict[str, object]
) -> None:
    config = config.replace(
        models_dir=models[name].parent,
        model=models[name],
        context_size=None,
        parallel=None,
    ).replace(**changes)
    engine = anyio.run(locate_engine)
    told, *gpus = breakdown(engine, config).values()
    if gpus:
        pytest.skip("the formula is checked where the engine has the processor alone")
    shape = read_shape(models[name])
    settings = settings_of(config, engine)
    assert settings == settings_of(config)
    everywhere = Memory(MemoryPool("RAM", 1 << 60, 1 << 60))
    (formula,) = estimate(shape, plan(shape, settings, everywhere))
    # The engine leaves out fractions of a MiB, once for each of two kinds of buffer.
    assert formula.weights == pytest.approx(told.weights, rel=0.005, abs=2 * MIB)
    assert formula.cache == pytest.approx(told.cache, rel=0.005, abs=MIB)
    assert formula.total == pytest.approx(told.total, rel=0.005)


def look(config: ServerConfig) -> list[MemoryPreview]:
    seen: list[MemoryPreview] = []
    with ModelManager(config=config) as manager:
        assert manager.preview_memory(on_preview=seen.append).wait(30) == seen[-1]
    return seen


def test_what_does_not_change_is_told_once(config: ServerConfig) -> None:
    (only,) = look(config)
    assert only.context == 512
    assert only.verdict is Verdict.FITS
    assert only.largest_context == 4096


def test_an_old_build_changes_the_forecast(
    misbehaving: Callable[..., ServerConfig], tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.gguf", vocabulary=50_000)
    first, second = look(misbehaving(models_dir=tmp_path, model=path))
    # An old build makes more room for work; all else is the same.
    assert first.requirement.weights == second.requirement.weights
    assert first.requirement.cache == second.requirement.cache
    assert first.requirement.compute
    assert second.requirement.compute
    assert second.requirement.compute > 512 * 50_000 * 4 > first.requirement.compute


def test_devices_that_only_the_engine_knows_are_taken_up(
    config: ServerConfig, teller: Callable[..., Path]
) -> None:
    first, second = look(config.replace(binary=teller(GPU)))
    assert [one.pool.name for one in first.allocations] == ["RAM"]
    names = [one.pool.name for one in second.allocations]
    assert names == ["RAM", "ROCm0 (AMD Radeon RX 7900 XTX)"]
    assert second.allocations[1].pool.free == 9000 * MIB
    assert second.verdict is Verdict.FITS


def test_a_setting_that_moves_on_never_reaches_the_engine(
    config: ServerConfig, teller: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # For the last setting too: by then the others, if they went on, would have asked.
    monkeypatch.setattr("kitty_nb.supervisor.supervisor._PREVIEW_PAUSE", 3)
    program = teller(GPU)
    seen: list[MemoryPreview] = []
    with ModelManager(config=config.replace(binary=program)) as manager:
        for context in range(256, 5000, 512):
            moved = manager.state.config.replace(context_size=context)
            moving = manager.preview_memory(moved, seen.append)
            eventually(lambda c=context: seen and seen[-1].context == c)
            moving.cancel()
        assert not Path(f"{program}.calls").exists()
        manager.preview_memory(moved).wait(30)
    assert len(Path(f"{program}.calls").read_text().splitlines()) == 1


def test_closing_waits_for_no_preview(config: ServerConfig, teller: Callable[..., Path]) -> None:
    program = teller(GPU, "exec sleep 60")
    with ModelManager(config=config.replace(binary=program)) as manager:
        looking = manager.preview_memory()
        eventually(Path(f"{program}.calls").exists)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    with suppress(CancelledError):
        looking.wait(5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"extra_args": ["--no-such-flag"]}, Verdict.FITS),
        ({"binary": "/no/such/engine"}, Verdict.FITS),
        ({"context_size": 2_000_000_000}, Verdict.WILL_NOT_FIT),
    ],
)
def test_the_formula_needs_no_engine(
    config: ServerConfig, changes: dict[str, object], expected: Verdict
) -> None:
    (only,) = look(config.replace(**changes))
    assert only.verdict is expected


def test_a_model_that_vanishes_or_is_none_is_said_in_words(
    config: ServerConfig, tmp_path: Path
) -> None:
    gone = Path(shutil.copy(str(config.model), tmp_path / "gone.gguf"))
    config = config.replace(models_dir=tmp_path, model=gone)
    gone.write_bytes(gone.read_bytes()[:5000])
    os.utime(gone, (0, 0))  # just written, it would be growing
    (damaged,) = look(config)
    gone.unlink()
    (absent,) = look(config)
    (none,) = look(config.model_copy(update={"model": None}))
    assert "damaged or incomplete" in (damaged.problem or "")
    assert "does not exist" in (absent.problem or "")
    assert none.problem == "No model is chosen."
    assert {p.verdict for p in (damaged, absent, none)} == {Verdict.UNKNOWN}


def test_minus_one_layers_are_the_engines_choice(config: ServerConfig) -> None:
    assert settings_of(config.replace(n_gpu_layers=-1)) == settings_of(config)


def test_extra_args_have_the_last_word(config: ServerConfig, demo_model: Path) -> None:
    words = ["-c", "1024", "-ub", "64", "-ngl", "all", "-ctk", "q4_0", "-ctv", "nonsense"]
    words += ["-np", "2", "--kv-unified", "-nkvo", "-fa", "off", "--fit", "off", "-b", "x"]
    words += ["--mmproj", str(demo_model), "--parallel", "-1"]
    settings = settings_of(config.replace(extra_args=words, batch_size=128))
    assert (settings.context, settings.micro_batch, settings.batch) == (1024, 64, 128)
    assert (settings.cache_type_k, settings.cache_type_v) == ("q4_0", "f16")
    assert (settings.sequences, settings.unified) == (4, True)
    assert (settings.gpu_layers, settings.cache_on_gpu) == (999, False)
    assert (settings.flash_attention, settings.fits) == (False, False)
    assert settings.extra_weights == demo_model.stat().st_size


def test_every_adapter_counts_with_its_scale_or_without(
    config: ServerConfig, tmp_path: Path
) -> None:
    names = []
    for letter, size in (("a", 1000), ("b", 20_000), ("c", 300_000), ("d:1", 4_000_000)):
        path = tmp_path / f"{letter}.gguf"
        path.write_bytes(bytes(size))
        names.append(str(path))
    a, b, c, d = names
    words = ["--lora", f"{a},{b}", "--lora-scaled", f"{c}:0.5,{d}:2"]
    assert settings_of(config.replace(extra_args=words)).extra_weights == 4_321_000
    for absent in (f"{tmp_path}/none.gguf", f"{tmp_path}/none.gguf:1", ":", "/"):
        assert settings_of(config.replace(extra_args=["--lora", absent])).extra_weights == 0


def test_scores_are_kept_of_all_that_is_asked_for(config: ServerConfig) -> None:
    def settings(words: str) -> tuple[bool, int]:
        found = settings_of(config.replace(extra_args=words))
        return found.scores_all, found.drafted

    assert settings("") == (False, 0)
    for words in ("--embeddings", "--embedding", "--reranking", "--pooling mean", "--rerank"):
        assert settings(words) == (True, 0)
    assert settings("--pooling none") == (False, 0)
    assert settings("--spec-type ngram-mod") == (False, 64)
    assert settings("--spec-type draft-simple --spec_draft_n_max 16") == (False, 16)


def test_old_builds_have_other_defaults(misbehaving: Callable[..., ServerConfig]) -> None:
    config = misbehaving().replace(context_size=None, parallel=None)
    engine = anyio.run(locate_engine, config.binary)
    settings = settings_of(config, engine)
    assert (settings.context, settings.sequences, settings.gpu_layers) == (4096, 1, 999)
    oldest = replace(engine, dialect=Dialect(()))
    assert settings_of(config, oldest) == replace(settings, gpu_layers=0)
    assert not offloads(config, oldest)
    assert settings.scores_all
    assert not settings.fits


def test_what_a_server_holds_counts_as_free() -> None:
    code = "import time; held = b'x' * 150_000_000; print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        memory = free_memory(holder.pid)
        holder.kill()
    assert 150_000_000 < memory.ram.returned < 250_000_000
    assert memory.ram.returned < memory.ram.free <= memory.ram.total
    assert free_memory(holder.pid).ram.returned == 0
    assert free_memory().ram.total == psutil.virtual_memory().total


def control_group(folder: Path, files: tuple[str, str], limit: object, use: int) -> None:
    """Write what Linux shows of a group that holds files of 350 MB in its cache."""
    folder.mkdir(parents=True)
    cached = {"active_file": 200 * 10**6, "inactive_file": 150 * 10**6, "anon": 1}
    rows = (cached | {f"total_{name}": count for name, count in cached.items()}).items()
    for name, text in zip((*files, "memory.stat"), (limit, use, None), strict=True):
        said = "".join(f"{row} {count}\n" for row, count in rows) if text is None else f"{text}\n"
        (folder / name).write_text(said)


V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
V2 = "memory.max", "memory.current"


@pytest.mark.parametrize(
    ("line", "groups", "limit"),
    [
        ("0::/", {"": (V2, 500)}, 500),
        ("0::/a.slice/job_1/step_0", {"a.slice": (V2, 500), "a.slice/job_1": (V2, 600)}, 500),
        ("0::/a/b", {"": (V2, 1000), "a": (V2, "max"), "a/b": (V2, 500)}, 500),
        ("4:memory:/docker/1a", {"memory": (V1, 500), "memory/docker/1a": (V1, 2**63)}, 500),
        ("1:name=systemd:/\n4:memory:/docker/1a", {"memory": (V1, 500)}, 500),
        ("0::/../other", {"": (V2, "max")}, None),
        ("4:memory:/", {"memory": (V1, 9223372036854771712)}, None),
        ("1:cpu:/", {"": (V2, 500)}, None),
        ("odd", {}, None),
    ],
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path, line: str, groups: dict[str, tuple[Any, Any]], limit: int | None
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{line}\n")
    for name, (files, size) in groups.items():
        least = size * 10**6 if isinstance(size, int) and size < 2**62 else size
        control_group(tmp_path / "sys/fs/cgroup" / name, files, least, 450 * 10**6)
    ram = free_memory(root=tmp_path).ram
    if limit is None:
        assert (ram.name, ram.total) == ("RAM", psutil.virtual_memory().total)
    else:
        # All but the 100 MB that are no cached files.
        assert (ram.name, ram.free) == (
            f"RAM (limit of this container or job: {limit}.0 MB)",
            (limit - 450 + 350) * 10**6,
        )


def test_what_a_server_holds_on_another_device_comes_back(
    config: ServerConfig, teller: Callable[..., Path], tmp_path: Path
) -> None:
    program = teller(GPU)
    layers = {"width": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 300}
    path = write_model(tmp_path / "held.gguf", **layers)
    config = config.replace(binary=program, models_dir=tmp_path, model=path, context_size=4096)
    running = Running(psutil.Process().pid, config.replace(n_gpu_layers=999))

    def place(before: Running) -> MemoryPool:
        wanted = (config, before, lambda _: None, 0.0)
        return anyio.run(Forecaster().preview, *wanted).allocations[-1].pool

    name = "ROCm0 (AMD Radeon RX 7900 XTX)"
    assert place(Running()) == MemoryPool(name, 9000 * MIB, 16000 * MIB)
    held = place(running)
    # All layers, with keys and values of 8 heads of 128 numbers, each of two bytes, in 8 layers.
    least = path.stat().st_size - 8 * MIB + 4096 * 8 * 2 * 8 * 128 * 2
    assert least < held.returned < least * 1.1
    assert held.free == 9000 * MIB + held.returned
    assert place(Running(running.pid, None)) == MemoryPool(name, 9000 * MIB, 16000 * MIB)


class FakeError(Exception):
    pass


def fake_nvml(**changes: object) -> types.SimpleNamespace:
    """NVIDIA's library with two GPUs, as no machine of the project has one."""
    held = types.SimpleNamespace(pid=psutil.Process().pid, usedGpuMemory=3000)
    stranger = types.SimpleNamespace(pid=1, usedGpuMemory=500)
    secret = types.SimpleNamespace(pid=held.pid, usedGpuMemory=None)
    functions: dict[str, object] = {
        "NVMLError": FakeError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda index: ("GPU A", b"GPU B")[index],
        "nvmlDeviceGetMemoryInfo": lambda _: types.SimpleNamespace(free=4000, total=10000),
        "nvmlDeviceGetComputeRunningProcesses": lambda index: ([held, stranger], [secret])[index],
    }
    return types.SimpleNamespace(**functions | changes)


def test_gpus_are_measured_by_nvidias_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert free_memory(psutil.Process().pid).gpus == (
        MemoryPool("GPU A", 7000, 10000, 3000),
        MemoryPool("GPU B", 4000, 10000, 0),
    )
    assert free_memory().gpus[0].free == 4000


def fail(*_: object) -> None:
    raise FakeError


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({"nvmlInit": fail}, 0),
        ({"nvmlDeviceGetMemoryInfo": fail}, 0),
        ({"nvmlShutdown": fail}, 2),
        ({"nvmlDeviceGetComputeRunningProcesses": fail}, 2),
    ],
)
def test_whatever_fails_in_it_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], gpus: int
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**changes))
    assert len(free_memory(psutil.Process().pid).gpus) == gpus


def test_without_it_there_is_ram_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert free_memory().gpus == ()


def test_a_gpu_that_the_engine_does_not_use_is_left_out(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = types.SimpleNamespace(free=1 << 40, total=1 << 40)
    nvml = fake_nvml(nvmlDeviceGetMemoryInfo=lambda _: large)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    seen: list[MemoryPreview] = []
    with ModelManager(config=config) as manager:
        manager.preview_memory(on_preview=seen.append).wait(30)
        assert [one.pool.name for one in seen[0].allocations] == ["RAM", "GPU A", "GPU B"]
        assert [one.pool.name for one in seen[-1].allocations] == ["RAM"]
        seen.clear()
        manager.preview_memory(on_preview=seen.append).wait(30)
        assert {one.pool.name for shown in seen for one in shown.allocations} == {"RAM"}


def test_on_a_mac_the_gpu_works_in_ram(
    config: ServerConfig, teller: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    program = teller("  Metal: Apple M4 (16000 MiB, 9000 MiB free)")
    shown = look(config.replace(binary=program))[-1]
    assert [one.pool.name for one in shown.allocations] == ["RAM"]
