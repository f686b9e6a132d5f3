from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path

import anyio
import psutil
import pytest
from conftest import eventually
from model_files import MODELS, write_model
from other_kernel import runs

from kitty_nb import ModelManager, ServerConfig
from kitty_nb.catalog.gguf import write_outline
from kitty_nb.catalog.memory import Memory, MemoryPreview, Needs, Place, Verdict, estimate, plan
from kitty_nb.catalog.model_shape import read_layouts, read_shape
from kitty_nb.engine.locate import Engine, EngineKind, locate_engine, parse_help
from kitty_nb.supervisor import memory_preview
from kitty_nb.supervisor.free_memory import free_memory
from kitty_nb.supervisor.memory_preview import (
    Answer,
    AnswerReader,
    MemoryPreviewer,
    Running,
    ask_engine,
    probe_command,
    settings_of,
)

MIB = 1 << 20

# An engine that can tell, and notes in a file beside it how it was started.
TELLER = """\
#!/bin/sh
case " $* " in
*" --help "*) cat <<'END'
-m,    --model FNAME              model path to load
-a,    --alias STRING             set alias
       --host HOST                address to listen on
       --port PORT                port to listen on
-c,    --ctx-size N               size of the context
-t,    --threads N                threads
-np,   --parallel N               slots
-ngl,  --gpu-layers, --n-gpu-layers N   layers in VRAM
-mm,   --mmproj FILE              projector
       --log-file FNAME           log to a file
       --tools A,B                tools
       --log-jsonl, --no-log-jsonl  log as JSON
-fit,  --fit [on|off]             fit
       --list-devices             list what is in the file beside it
END
exit;;
*" --version "*) echo "version: 1 (teller)"; exit;;
*" --list-devices "*) cat "$0.devices"; exit;;
esac
echo "$*" >> "$0.calls"
{body}
"""


@pytest.fixture
def teller(tmp_path: Path) -> Callable[[str], Path]:
    def make(body: str) -> Path:
        (tmp_path / "teller").mkdir(exist_ok=True)
        program = tmp_path / "teller" / "llama-server"
        program.write_text(TELLER.replace("{body}", body))
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


@pytest.fixture(autouse=True)
def nothing_is_left_in_the_temporary_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.iterdir())


async def ask(config: ServerConfig) -> tuple[Engine, Answer | None]:
    engine = await locate_engine(config.binary)
    return engine, await ask_engine(engine, config)


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
    engine, answer = anyio.run(ask, config)
    assert answer
    if answer.gpus:
        pytest.skip("the formula is checked where the engine has the processor alone")
    shape = read_shape(models[name])
    settings = settings_of(config, engine)
    assert settings == settings_of(config)
    everywhere = Memory(Place("RAM", 1 << 60, 1 << 60))
    (formula,) = estimate(shape, plan(shape, settings, everywhere))
    told = answer.ram
    # The engine leaves out fractions of a MiB, once for each of two kinds of buffer.
    assert formula.weights == pytest.approx(told.weights, rel=0.005, abs=2 * MIB)
    assert formula.cache == pytest.approx(told.cache, rel=0.005, abs=MIB)
    assert formula.total == pytest.approx(told.total, rel=0.005)


def test_the_engine_is_ended_at_any_moment(config: ServerConfig) -> None:
    async def ask_for(seconds: float) -> None:
        engine = await locate_engine(None)
        with anyio.move_on_after(seconds):
            await ask_engine(engine, config)

    for step in range(20):
        anyio.run(ask_for, step * 0.008)
        children = psutil.Process().children(recursive=True)
        assert not [one for one in children if runs(one.pid)]


def test_an_engine_that_gives_no_answer_is_none(
    config: ServerConfig, teller: Callable[[str], Path]
) -> None:
    for body in ("exit 1", 'echo \'{"type":"log"}\'', "echo 'fit_memory_breakdown {'"):
        config = config.replace(binary=teller(body))
        assert anyio.run(ask, config)[1] is None


def test_an_engine_that_stays_silent_is_given_up(
    config: ServerConfig, teller: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitty_nb.supervisor.memory_preview._ANSWER_WITHIN", 0.2)
    config = config.replace(binary=teller("sleep 60 & sleep 60"))
    assert anyio.run(ask, config)[1] is None


def test_what_leaves_traces_is_not_handed_on(config: ServerConfig) -> None:
    engine = Engine(EngineKind.NATIVE, ("engine",), "1", parse_help(TELLER))
    words = "--log-file /a/b --threads 2 --mmproj c.gguf --fit off --tools all"
    config = config.replace(extra_args=words, context_size=None, threads=None, parallel=None)
    command = probe_command(engine, config, Path("outline.gguf"))
    assert command == (
        *("engine", "--model", "outline.gguf", "--alias", "demo"),
        *("--host", "127.0.0.1", "--port", "0"),
        *("--log-jsonl", "--threads", "2", "--fit", "on"),
    )


def test_an_engine_that_nobody_ends_ends_by_itself(config: ServerConfig, tmp_path: Path) -> None:
    assert config.model
    engine = anyio.run(locate_engine)
    outline = write_outline(read_layouts(config.model), tmp_path)
    done = subprocess.run(
        probe_command(engine, config, outline), capture_output=True, check=False, timeout=60
    )
    assert done.returncode > 0
    assert b"fit_memory_breakdown" in done.stdout


def breakdown(*rows: tuple[object, ...]) -> str:
    listed = [
        f'{{"kind":"{kind}","name":"{name}","model":{needs[0]},"context":{needs[1]},'
        f'"compute":{needs[2]}' + (f',"free":{free},"total":{total}}}' if total else "}")
        for kind, name, needs, free, total in rows
    ]
    rest = ",".join(listed)
    return f'{{"type":"fit_memory_breakdown","data":{{"unit":"MiB","rows":[{rest}]}}}}'


HOST = ("host", "Host", (10, 0, 5), 0, 0)
REPACKED = ("buffer_type", "CPU_REPACK", (20, 0, 0), 0, 0)
CUDA = ("device", "CUDA0", (100, 30, 5), 9000, 10000)


def test_rows_are_sorted_into_ram_and_devices() -> None:
    answer = AnswerReader().read(breakdown(CUDA, HOST, REPACKED))
    assert answer == Answer(
        Needs(30 * MIB, 0, 5 * MIB),
        ((Place("CUDA0", 9000 * MIB, 10000 * MIB), Needs(100 * MIB, 30 * MIB, 5 * MIB)),),
    )
    assert AnswerReader().read('{"type":"log","msg":"fit_memory_breakdown"}') is None
    assert AnswerReader().read("fit_memory_breakdown") is None
    assert AnswerReader().read('["fit_memory_breakdown"]') is None


# As b10434 logs it with `--verbosity 5`, on a machine with a GPU.
ROW = "0.04.1 I common_memory_breakdown_print: |"
TABLE = f"""\
{ROW} memory breakdown [MiB] | total   free    self   model   context   compute    unaccounted |
{ROW}   - Vulkan0 (llvmpipe (LLVM 15.0.6, 256 bits)) |  2048 = 1990 + ( 137 =    65 +      49 + \
     23) +         -79 |
{ROW}   - Host                                       |                  179 =   170 +       0 + \
      9                |
{ROW}   - CPU_REPACK                                 |                   12 =    12 +       0 + \
      0                |
0.05.4 I common_params_fit_impl: projected to use 137 MiB of device memory vs. 2048 MiB
"""


def test_a_table_is_read_to_its_end() -> None:
    reader = AnswerReader()
    *rows, after = TABLE.splitlines()
    assert [reader.read(row) for row in rows] == [None] * 4
    gpu = Place("Vulkan0 (llvmpipe (LLVM 15.0.6, 256 bits))", 1990 * MIB, 2048 * MIB)
    assert reader.read(after) == Answer(
        Needs(182 * MIB, 0, 9 * MIB), ((gpu, Needs(65 * MIB, 49 * MIB, 23 * MIB)),)
    )


def look(config: ServerConfig) -> list[MemoryPreview]:
    seen: list[MemoryPreview] = []
    with ModelManager(config=config) as manager:
        assert manager.preview_memory(on_preview=seen.append).wait(30) == seen[-1]
    return seen


def test_the_formula_comes_first_and_then_the_engine(config: ServerConfig) -> None:
    first, second = look(config)
    assert (first.exact, second.exact) == (False, True)
    assert first.context == second.context == 512
    assert first.verdict is second.verdict is Verdict.FITS
    assert first.largest_context == second.largest_context == 4096
    assert first.needs == second.needs


def test_an_engine_that_cannot_tell_is_not_asked(
    misbehaving: Callable[..., ServerConfig], tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.gguf", vocabulary=50_000)
    first, second = look(misbehaving(models_dir=tmp_path, model=path))
    assert not second.exact
    # An old build makes more room for work; all else is the same.
    assert first.needs.weights == second.needs.weights
    assert first.needs.cache == second.needs.cache
    assert first.needs.compute
    assert second.needs.compute
    assert second.needs.compute > 512 * 50_000 * 4 > first.needs.compute


def test_devices_that_only_the_engine_knows_are_taken_up(
    config: ServerConfig, teller: Callable[[str], Path]
) -> None:
    program = teller(f"echo '{breakdown(CUDA, HOST)}'; sleep 60")
    first, second = look(config.replace(binary=program))
    assert [part.place.name for part in first.parts] == ["RAM"]
    assert [part.place.name for part in second.parts] == ["RAM", "CUDA0"]
    assert second.parts[1].place.free == 9000 * MIB
    assert second.parts[1].needs.weights == 100 * MIB
    assert second.verdict is Verdict.FITS
    assert second.needs.total == pytest.approx(150 * MIB, abs=4 * MIB)
    # Asked again, now that there is a GPU to put layers on.
    calls = Path(f"{program}.calls").read_text().splitlines()
    assert ["--n-gpu-layers" in call for call in calls] == [False, True]


def test_a_setting_that_moves_on_never_reaches_the_engine(
    config: ServerConfig, teller: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # For the last setting too: by then the others, if they went on, would have asked.
    monkeypatch.setattr("kitty_nb.supervisor.supervisor._PREVIEW_PAUSE", 3)
    program = teller(f"echo '{breakdown(HOST)}'; sleep 60")
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


def test_closing_waits_for_no_preview(config: ServerConfig, teller: Callable[[str], Path]) -> None:
    program = teller("sleep 60")
    with ModelManager(config=config.replace(binary=program)) as manager:
        looking = manager.preview_memory()
        eventually(Path(f"{program}.calls").exists)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    with suppress(CancelledError):  # or it was called off with the rest
        assert not looking.wait(5).exact


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"extra_args": ["--no-such-flag"]}, Verdict.FITS),
        ({"binary": "/no/such/engine"}, Verdict.FITS),
        ({"context_size": 2_000_000_000}, Verdict.WILL_NOT_FIT),
    ],
)
def test_what_the_engine_cannot_answer_the_formula_does(
    config: ServerConfig, changes: dict[str, object], expected: Verdict
) -> None:
    (only,) = look(config.replace(**changes))
    assert not only.exact
    assert only.verdict is expected


def test_a_model_that_vanishes_or_is_none_is_said_in_words(
    config: ServerConfig, tmp_path: Path
) -> None:
    gone = Path(shutil.copy(str(config.model), tmp_path / "gone.gguf"))
    config = config.replace(models_dir=tmp_path, model=gone)
    gone.write_bytes(gone.read_bytes()[:5000])
    (damaged,) = look(config)
    gone.unlink()
    (absent,) = look(config)
    (none,) = look(config.model_copy(update={"model": None}))
    assert "damaged or incomplete" in (damaged.problem or "")
    assert "is not there" in (absent.problem or "")
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
    assert (settings.context, settings.sequences, settings.gpu_layers) == (4096, 1, 0)
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


def test_what_a_server_holds_on_another_device_comes_back(
    config: ServerConfig, teller: Callable[[str], Path], tmp_path: Path
) -> None:
    program = teller("exit 1")
    gpu = "  ROCm0: AMD Radeon RX 7900 XTX (16000 MiB, 9000 MiB free)"
    Path(f"{program}.devices").write_text(f"Available devices:\n{gpu}\n")
    layers = {"width": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 300}
    path = write_model(tmp_path / "held.gguf", **layers)
    config = config.replace(binary=program, models_dir=tmp_path, model=path, context_size=4096)
    running = Running(psutil.Process().pid, config.replace(n_gpu_layers=999))

    def place(before: Running | None) -> Place:
        wanted = (config, before, lambda _: None, 0.0)
        return anyio.run(MemoryPreviewer().preview, *wanted).parts[-1].place

    name = "ROCm0 (AMD Radeon RX 7900 XTX)"
    assert place(None) == Place(name, 9000 * MIB, 16000 * MIB)
    held = place(running)
    # All layers, with keys and values of 8 heads of 128 numbers, each of two bytes, in 8 layers.
    least = path.stat().st_size - 8 * MIB + 4096 * 8 * 2 * 8 * 128 * 2
    assert least < held.returned < least * 1.1
    assert held.free == 9000 * MIB + held.returned
    assert place(Running(running.pid, None)) == Place(name, 9000 * MIB, 16000 * MIB)


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
        Place("GPU A", 7000, 10000, 3000),
        Place("GPU B", 4000, 10000, 0),
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
        assert [part.place.name for part in seen[0].parts] == ["RAM", "GPU A", "GPU B"]
        assert [part.place.name for part in seen[-1].parts] == ["RAM"]
        assert seen[-1].exact
        seen.clear()
        manager.preview_memory(on_preview=seen.append).wait(30)
        assert {part.place.name for shown in seen for part in shown.parts} == {"RAM"}


def test_on_a_mac_the_gpu_works_in_ram(
    config: ServerConfig, teller: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_preview.sys, "platform", "darwin")
    program = teller(f"echo '{breakdown(CUDA, HOST)}'; sleep 60")
    shown = look(config.replace(binary=program))[-1]
    assert [part.place.name for part in shown.parts] == ["RAM"]
    assert shown.needs.total == pytest.approx(150 * MIB, abs=4 * MIB)
