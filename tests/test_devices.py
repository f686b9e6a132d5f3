"""Devices as the engine lists them, and one answer about memory from them. On real engines."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import psutil
import pytest
from conftest import eventually, unused_port
from engine_memory import breakdown
from model_files import write_model

from kitty_nb import ModelManager, ServerConfig
from kitty_nb.catalog.memory import Memory, MemoryPool, MemoryPreview, Verdict
from kitty_nb.cli.commands import read_status
from kitty_nb.cli.doctor import examine
from kitty_nb.engine.devices import Device, list_devices, parse_devices
from kitty_nb.engine.locate import locate_engine
from kitty_nb.errors import ServerCrashedError
from kitty_nb.experiments import Results, Sweep
from kitty_nb.experiments.metrics import metrics_of
from kitty_nb.experiments.study import read_space
from kitty_nb.supervisor.events import Event, LoadProgress, ProgressMade, Stage
from kitty_nb.supervisor.forecast import memory_use, with_devices
from kitty_nb.widgets.fleet_panel import Profile, fleet_rows

MIB = 1 << 20


@contextmanager
def worker(native_engine: Path, folder: Path, limit: str = "unlimited") -> Iterator[str]:
    """An RPC server on loopback, with so many KiB of memory; yields its address."""
    program = native_engine.with_name("ggml-rpc-server")
    if not program.exists():
        pytest.skip("no ggml-rpc-server beside llama-server")
    port = unused_port()
    limited = ["sh", "-c", f'ulimit -v {limit}; exec "$@"', "sh", program, "--port", str(port)]
    with (folder / f"{port}.log").open("wb") as log:
        process = subprocess.Popen(limited, stdout=log, stderr=log)
    try:
        eventually(lambda: listens(port), within=20)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def workers(native_engine: Path, tmp_path: Path) -> Iterator[str]:
    """Two RPC servers; their addresses as `--rpc` takes them."""
    with worker(native_engine, tmp_path) as one, worker(native_engine, tmp_path) as two:
        yield f"{one},{two}"


def listens(port: int) -> bool:
    return any(
        found.laddr.port == port and found.status == psutil.CONN_LISTEN
        for child in psutil.Process().children(recursive=True)
        for found in child.net_connections("tcp")
    )


def needed(refusal: str) -> str:
    """A refusal without the free memory, which changes by the second."""
    return re.sub(r" [\d.]+ GB free", "", refusal)


def devices(config: ServerConfig) -> tuple[Device, ...] | None:
    return anyio.run(list_devices, config)


def previews(config: ServerConfig) -> tuple[list[MemoryPreview], str]:
    seen: list[MemoryPreview] = []
    with ModelManager(config=config) as manager:
        manager.preview_memory(on_preview=seen.append).wait(60)
        return seen, seen[-1].why_not()


def test_the_list_is_read_whatever_the_names_hold() -> None:
    text = """\
ggml_vulkan: Found 1 Vulkan devices:
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24080 MiB, 23000 MiB free)
  Vulkan0: llvmpipe (LLVM 15.0.6, 256 bits) (2048 MiB, 2047 MiB free)
  RPC0: 10.0.0.7:50052 (1 MiB, 0 MiB free)
"""
    assert [*map(str, parse_devices(text))] == [
        "CUDA0 (NVIDIA GeForce RTX 4090)",
        "Vulkan0 (llvmpipe (LLVM 15.0.6, 256 bits))",
        "RPC0 (10.0.0.7:50052)",
    ]
    assert parse_devices(text)[1].free == 2047 * MIB
    assert parse_devices("Available devices:\n  (none)\n") == ()


def test_nvidias_library_adds_what_comes_back_and_no_device() -> None:
    ram = MemoryPool("RAM", 10, 20)
    nvidia = (MemoryPool("GPU A", 700, 1000, 300), MemoryPool("GPU B", 400, 1000, 10))
    listed = (Device("Vulkan0", "GPU C", 5, 9), Device("CUDA0", "GPU A", 450, 1000))
    assert with_devices(Memory(ram, nvidia), listed).gpus == (
        MemoryPool("Vulkan0 (GPU C)", 5, 9),
        MemoryPool("CUDA0 (GPU A)", 750, 1000, 300),
    )
    assert with_devices(Memory(ram, nvidia), None).gpus == nvidia


def test_an_engine_without_devices_lists_none(config: ServerConfig, engine: Path | None) -> None:
    # Whatever else this machine has is hidden from the compiled engine.
    words = ["-dev", "none"] if engine else []
    assert devices(config.replace(binary=engine, extra_args=words)) == ()


@pytest.mark.parametrize("words", ["", "-dev Vulkan0", "-dev none"])
def test_a_device_that_is_not_nvidias_has_its_row(
    config: ServerConfig, real_model: Path, native_engine: Path, software_gpu: str, words: str
) -> None:
    config = config.replace(
        models_dir=real_model.parent, model=real_model, binary=native_engine, context_size=4096,
        parallel=None, extra_args=words,
    )  # fmt: skip
    seen, refusal = previews(config)
    assert refusal == ""
    last = seen[-1]
    rows = {one.pool.name.partition(" (")[0]: one for one in last.allocations}
    if words == "-dev none":
        assert [*rows] == ["RAM"]
        return
    assert [*rows] == ["RAM", software_gpu]
    assert 0 < rows[software_gpu].pool.free <= rows[software_gpu].pool.total


@pytest.mark.parametrize("layers", [None, 10])
def test_formula_and_engine_agree_on_each_device(
    config: ServerConfig, real_model: Path, native_engine: Path, tmp_path: Path, layers: int | None
) -> None:
    with worker(native_engine, tmp_path) as address:
        config = config.replace(
            models_dir=real_model.parent, model=real_model, binary=native_engine,
            context_size=4096, parallel=None, n_gpu_layers=layers,
            extra_args=["--rpc", address, "-dev", "RPC0"],
        )  # fmt: skip
        engine = anyio.run(locate_engine, native_engine)
        told = [need.total for need in breakdown(engine, config).values()]
        seen, _ = previews(config)
    shares = [one.requirement.total for one in seen[-1].allocations]
    assert shares == pytest.approx(told, rel=0.03)


def test_what_the_device_cannot_hold_is_refused_and_named(
    config: ServerConfig, tmp_path: Path, native_engine: Path, software_gpu: str
) -> None:
    path = write_model(tmp_path / "big.gguf", width=4096, inner=14336, heads=32, kv_heads=8)
    config = config.replace(
        models_dir=tmp_path, model=path, binary=native_engine, context_size=4096
    )
    assert path.stat().st_size > 2 << 30  # more than that device has, less than there is RAM
    everything = config.replace(n_gpu_layers=999)
    seen, refusal = previews(everything)
    assert seen[-1].verdict is Verdict.WILL_NOT_FIT
    assert needed(refusal) == needed(seen[-1].why_not())
    assert f"GB of {software_gpu} (" in refusal
    assert "Lower the context or the GPU layers, or" in refusal
    assert previews(config)[1] == ""  # left to the engine, the rest stays in RAM


def test_start_and_memory_line_give_one_answer_about_other_machines(
    config: ServerConfig, tmp_path: Path, native_engine: Path, workers: str
) -> None:
    ram = psutil.virtual_memory().total
    layers = round(1.2 * ram / 436e6)  # each worker offers all the RAM of this machine
    path = write_model(
        tmp_path / "larger.gguf", layers=layers, width=4096, inner=14336, heads=32, kv_heads=8
    )
    assert path.stat().st_size > ram
    alone = config.replace(
        models_dir=tmp_path, model=path, binary=native_engine, context_size=4096, parallel=None
    )
    seen, refusal = previews(alone)
    assert seen[-1].verdict is Verdict.WILL_NOT_FIT
    assert needed(refusal) == needed(seen[-1].why_not())
    assert "GB of RAM" in refusal
    seen, refusal = previews(alone.replace(extra_args=["--rpc", workers]))
    assert refusal == ""
    assert seen[-1].verdict is not Verdict.WILL_NOT_FIT
    assert [one.pool.name for one in seen[-1].allocations][1:] == [
        f"RPC{number} ({address})" for number, address in enumerate(workers.split(","))
    ]


@pytest.mark.parametrize("chosen", ["RPC0", "none"])
def test_a_search_varies_the_layers_on_any_device(
    config: ServerConfig, native_engine: Path, workers: str, chosen: str
) -> None:
    words = ["--rpc", workers, "-dev", chosen]
    base = config.replace(binary=native_engine, extra_args=words)
    _, space = read_space([], base, None, (), ())
    assert ("n_gpu_layers" in space) == (chosen == "RPC0")


def test_a_server_says_which_devices_it_uses(
    config: ServerConfig, native_engine: Path, workers: str, tmp_path: Path
) -> None:
    config = config.replace(
        binary=native_engine, alias=None, extra_args=["--rpc", workers, "-dev", "RPC0,RPC1"]
    )
    names = tuple(f"RPC{n} ({at})" for n, at in enumerate(workers.split(",")))
    env = tmp_path / ".env"
    settings = {"MODEL": config.model, "MODELS_DIR": config.models_dir, "BIN": native_engine}
    settings |= {"PORT": config.port, "LOG_DIR": config.log_dir, "HISTORY": config.history}
    settings |= {"CTX": 512, "EXTRA_ARGS": f"--rpc {workers} -dev RPC0,RPC1"}
    env.write_text("".join(f"LLAMACPP_{key}={value}\n" for key, value in settings.items()))
    with ModelManager(env) as manager:
        manager.start().wait(60)
        eventually(lambda: manager.state.devices == names)
        assert " on " + ", ".join(names) in manager.state.sentence
        (row,) = fleet_rows([Profile(config, manager.state, memory=manager.memory_use().wait(5))])
        assert row.memory.endswith(" + RPC0, RPC1")
        # Another program has it from the record.
        eventually(lambda: read_status(manager.state.config)[0].devices == names)
        with ModelManager(env) as other:
            assert other.state.devices == names
            assert names[0] in other.state.sentence
            other.run(leave, other).wait(5)
        found = {finding.what: finding for finding in examine(env)}
        for name in names:
            assert f"{name}: " in found["GPU, memory"].found
    assert manager.state.devices == ()


@pytest.mark.parametrize("chosen", ["RPC0", "none"])
def test_a_trial_names_its_devices_and_claims_nothing_of_their_memory(
    config: ServerConfig, native_engine: Path, workers: str, tmp_path: Path, chosen: str
) -> None:
    base = config.replace(
        binary=native_engine, extra_args=["--rpc", workers, "-dev", chosen], n_gpu_layers=99
    )
    with Sweep(
        config=base, repeats=1, max_tokens=4, record=True, store=tmp_path / "s.journal"
    ) as sweep:
        (row,) = sweep.run().wait(120).rows
    assert row.record, row.reason
    names = (f"RPC0 ({workers.partition(',')[0]})",) if chosen == "RPC0" else ()
    assert row.record.engine.devices == names
    assert row.measurement
    held = None if names else 0
    assert row.measurement.gpu_memory == row.measurement.speeds[0].gpu_memory == held
    told = metrics_of(row)
    assert ("memory_gib" in told) == ("gpu_memory_gib" in told) == (not names)
    assert told["ram_gib"] == row.measurement.memory / (1 << 30) > 0
    assert Results(base, (row,)).best("ram_gib").done == 1


def test_the_bar_does_not_move_back_when_weights_leave_for_a_device(
    config: ServerConfig, real_model: Path, native_engine: Path, workers: str
) -> None:
    config = config.replace(
        models_dir=real_model.parent, model=real_model, binary=native_engine,
        extra_args=["--rpc", workers, "-dev", "RPC0"], n_gpu_layers=999,
    )  # fmt: skip
    seen: list[tuple[LoadProgress, int]] = []
    with ModelManager(config=config) as manager:

        def note(event: Event) -> None:
            if isinstance(event, ProgressMade):
                use = memory_use(manager.state.pid) if manager.state.pid else None
                seen.append((event.progress, use.resident if use else 0))

        manager.subscribe(note)
        manager.start().wait(120)
    resident = [held for _, held in seen]
    assert resident[-1] < max(resident) - 50 * MIB  # of 235 MiB, the embeddings stay here
    fractions = [progress.fraction for progress, _ in seen]
    assert fractions == sorted(fractions)
    assert {progress.stage for progress, _ in seen if progress.fraction == 1} == {Stage.READY}


def test_too_little_memory_on_a_device_is_named(
    config: ServerConfig, tmp_path: Path, native_engine: Path
) -> None:
    path = write_model(tmp_path / "big.gguf", width=4096, inner=14336, heads=32, kv_heads=8)
    with worker(native_engine, tmp_path, limit="1500000") as address:
        config = config.replace(
            models_dir=tmp_path, model=path, binary=native_engine, n_gpu_layers=999,
            extra_args=["--rpc", address, "-dev", "RPC0"], restart_max=0,
        )  # fmt: skip
        said = re.escape(f"RPC0[{address}] does not have enough free memory.")
        with ModelManager(config=config) as manager, pytest.raises(ServerCrashedError, match=said):
            manager.start().wait(60)


def test_machines_that_are_busy_are_not_taken_for_missing(
    config: ServerConfig, tmp_path: Path, native_engine: Path, workers: str
) -> None:
    path = write_model(
        tmp_path / "larger.gguf", layers=round(1.2 * psutil.virtual_memory().total / 436e6),
        width=4096, inner=14336, heads=32, kv_heads=8,
    )  # fmt: skip
    config = config.replace(
        binary=native_engine, alias=None, extra_args=["--rpc", workers, "-dev", "RPC0,RPC1"]
    )
    other = config.replace(models_dir=tmp_path, model=path, context_size=4096, parallel=None)
    with ModelManager(config=config) as manager:
        manager.start().wait(60)
        with ModelManager(config=config) as newcomer:  # it has never seen them free
            told = newcomer.preview_memory(other).wait(60)
            assert "serves one client at a time" in (told.problem or "")
            verdicts = newcomer.run(newcomer.stats.fits, [path], other).wait(60)
            assert verdicts == {path: Verdict.UNKNOWN}
            newcomer.run(leave, newcomer).wait(5)


async def leave(manager: ModelManager) -> None:
    manager._supervisor.detach()


CASES = {
    "4k": {"context_size": 4096},
    "32k": {"context_size": 32768},
    "32k, 4 apart": {"context_size": 32768, "parallel": 4},
    "8k, q8_0": {"context_size": 8192, "extra_args": "-ctk q8_0 -ctv q8_0"},
    "embeddings": {"context_size": 4096, "extra_args": "--embeddings"},
}


@pytest.mark.parametrize("case", CASES)
def test_formula_and_engine_agree_on_a_real_model(real_config: ServerConfig, case: str) -> None:
    config = real_config.replace(parallel=None, context_size=None).replace(**CASES[case])
    if config.binary:
        config = config.replace(extra_args=(*config.extra_args, "-dev", "none"))
    seen, refusal = previews(config)
    told = breakdown(anyio.run(locate_engine, config.binary), config)["RAM"]
    assert refusal == ""
    assert seen[-1].requirement.total == pytest.approx(told.total, rel=0.014)


def test_a_draft_model_is_counted_whole(
    config: ServerConfig, real_model: Path, native_engine: Path
) -> None:
    alone = config.replace(
        models_dir=real_model.parent, model=real_model, binary=native_engine, context_size=4096,
        parallel=None, extra_args=["-dev", "none", "-devd", "none"],
    )  # fmt: skip
    both = alone.replace(extra_args=(*alone.extra_args, "--model-draft", str(real_model)))
    (*_, one), _ = previews(alone)
    (*_, two), _ = previews(both)
    assert one.requirement.total
    # It is the same model, with a cache and buffers of its own.
    assert two.requirement.total == pytest.approx(2 * one.requirement.total, rel=0.01)
