"""A model with a projector: found, passed on, counted, left out, and asked about an image."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path

import anyio
import pytest
from model_files import write_header, write_projector

from kitty_nb import ModelCatalog, ModelManager, ServerConfig, ServerStatus, write_demo_model
from kitty_nb.catalog.resolve import resolve_model
from kitty_nb.catalog.stores import Store, StoreKind
from kitty_nb.cli.commands import read_status
from kitty_nb.config.profiles import env_lines, save_settings
from kitty_nb.engine.command_line import build_command, leaves_out_projector
from kitty_nb.engine.locate import Engine, EngineKind, locate_engine, parse_help
from kitty_nb.errors import ConfigError, UnknownFlagError
from kitty_nb.experiments import record_run, replay
from kitty_nb.supervisor.events import ServerState
from kitty_nb.supervisor.forecast import settings_of
from kitty_nb.supervisor.history import gather_facts

DEMO_WIDTH = 320  # of the demo model's vectors


def png(side: int = 8) -> str:
    """Draw a red square; return its address."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    pixels = (b"\0" + b"\xff\0\0" * side) * side
    image = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    )
    image += chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


@pytest.fixture
def seeing(config: ServerConfig, tmp_path: Path) -> ServerConfig:
    """The demo model in a folder of its own, with a projector."""
    folder = tmp_path / "models"
    model = write_demo_model(folder / "demo" / "demo.gguf")
    write_projector(folder / "demo" / "mmproj-F16.gguf", DEMO_WIDTH)
    return resolve_model(config.replace(models_dir=folder, model=model))


def paired(model: Path, root: Path) -> Path | None:
    """The projector that a start would use; the catalog must say the same."""
    (row,) = [row for row in ModelCatalog(root).scan() if row.path == model]
    described = ModelCatalog(root).describe(model)
    config = resolve_model(ServerConfig(models_dir=root, model=model))
    assert described
    assert row.projector == described.projector == config.projector
    return row.projector


PIECES = 4  # tokens of the vectors that a picture becomes


def tokens_for_a_picture(manager: ModelManager, path: Path) -> int:
    """Ask with a picture and without; return how many tokens it adds to the prompt."""
    path.write_bytes(base64.b64decode(png().partition(",")[2]))
    options = {"max_tokens": 40, "temperature": 0, "cache_prompt": False}
    seen = manager.chat("What is this?", images=[path], **options).wait(120)
    told = manager.chat("What is this?", **options).wait(120)
    assert seen.text
    assert seen.usage.prompt
    assert told.usage.prompt
    return seen.usage.prompt - told.usage.prompt


def test_an_image_is_answered(seeing: ServerConfig, engine: Path | None, tmp_path: Path) -> None:
    with ModelManager(config=seeing.replace(binary=engine)) as manager:
        state = manager.start().wait(60)
        assert "with mmproj-F16.gguf" in state.sentence
        assert manager.http.get("/props").json()["modalities"]["vision"] is True
        assert tokens_for_a_picture(manager, tmp_path / "red.png") >= PIECES
        manager.restart(manager.state.config.replace(mmproj="off")).wait(60)
        assert manager.http.get("/props").json()["modalities"]["vision"] is False


@pytest.mark.slow
def test_the_real_model_sees_by_a_projector_of_its_width(
    real_config: ServerConfig, tmp_path: Path
) -> None:
    assert real_config.model
    link = tmp_path / "gemma" / real_config.model.name
    link.parent.mkdir()
    link.symlink_to(real_config.model)
    write_projector(link.with_name("mmproj-F16.gguf"), 640)
    write_projector(link.with_name("mmproj-another-F16.gguf"), 2048)
    with ModelManager(config=real_config.replace(models_dir=tmp_path, model=link)) as manager:
        manager.start().wait(120)
        assert manager.http.get("/props").json()["modalities"]["vision"] is True
        assert tokens_for_a_picture(manager, tmp_path / "red.png") >= PIECES


def test_a_projector_is_passed_on_unless_it_is_left_out(
    seeing: ServerConfig, engine: Path | None
) -> None:
    projector = seeing.models_dir / "demo" / "mmproj-F16.gguf"
    other = write_projector(seeing.models_dir / "other.gguf", DEMO_WIDTH)

    async def words(**changes: object) -> list[str]:
        config = resolve_model(seeing.replace(binary=engine, **changes))
        command = build_command(await locate_engine(config.binary), config)
        return [word for word in command if word.endswith(".gguf") or "mmproj" in word]

    def sees(**changes: object) -> bool:
        return ServerState(ServerStatus.READY, resolve_model(seeing.replace(**changes))).sees

    async def check() -> None:
        model = [str(seeing.model)]
        assert await words() == [*model, "--mmproj", str(projector)]
        assert await words(mmproj="off") == model
        assert await words(mmproj="other.gguf") == [*model, "--mmproj", str(other)]
        own = ("--mmproj", str(other))
        assert await words(extra_args=own) == [*model, *own]
        assert sees(extra_args=own)
        assert not sees(mmproj="off")
        assert await words(extra_args=("--no-mmproj",)) == [*model, "--no-mmproj"]

    anyio.run(check)


def test_a_build_that_takes_no_projector_serves_text(seeing: ServerConfig) -> None:
    old = Engine(
        EngineKind.NATIVE, ("llama-server",), "4000", parse_help("-m, --model FNAME  path")
    )
    bare = resolve_model(seeing.replace(context_size=None, threads=None, parallel=None))
    assert leaves_out_projector(old, bare)
    assert not any("mmproj" in word for word in build_command(old, bare))
    with pytest.raises(UnknownFlagError, match="no --mmproj, which LLAMACPP_MMPROJ needs"):
        build_command(old, resolve_model(bare.replace(mmproj="demo/mmproj-F16.gguf")))


def test_the_projector_is_in_the_preview_and_in_the_load(seeing: ServerConfig) -> None:
    assert seeing.projector
    blind, size = seeing.replace(mmproj="off"), seeing.projector.stat().st_size
    beside = [settings_of(config).extra_weights for config in (seeing, blind)]
    assert beside == [size, 0]
    assert gather_facts(seeing).size - gather_facts(blind).size == size


def test_a_run_s_record_names_the_projector_and_is_repeated_with_it(
    seeing: ServerConfig,
) -> None:
    with ModelManager(config=seeing) as manager:
        manager.start().wait(60)
        found, _ = read_status(seeing.replace(mmproj="off"))  # the server's record tells
        assert found.projector == seeing.projector
        record = record_run(manager, "Well?", max_tokens=4).wait(60)
    assert [one.name for one in record.model.companions] == ["mmproj-F16.gguf"]
    comparison = replay(record, config=seeing).wait(60)
    assert comparison.same_outputs
    assert not comparison.differences
    assert seeing.projector
    seeing.projector.unlink()
    without = replay(record, config=seeing.replace()).wait(60)
    assert {one.what.partition("[")[0] for one in without.differences} == {"model.companions"}


def test_another_model_has_its_own_projector_or_none(seeing: ServerConfig) -> None:
    blind = write_demo_model(seeing.models_dir / "text" / "blind.gguf")
    other = write_demo_model(seeing.models_dir / "other" / "other.gguf")
    eye = write_projector(seeing.models_dir / "other" / "mmproj-other.gguf", DEMO_WIDTH)
    for mmproj in (None, "demo/mmproj-F16.gguf"):
        config = seeing.replace(mmproj=mmproj)
        assert resolve_model(config.replace(context_size=1024)).projector == seeing.projector
        assert resolve_model(config.replace(model=blind)).projector is None
        assert resolve_model(config.replace(model=blind).replace(model=other)).projector == eye
        named = config.replace(model=other, mmproj="demo/mmproj-F16.gguf")
        assert resolve_model(named).projector != eye
        assert resolve_model(config.replace(model=other).replace(model=seeing.model)).projector


@pytest.mark.parametrize("value", ["nowhere.gguf", "demo", "demo/demo.txt"])
def test_a_projector_that_is_not_there_is_told(seeing: ServerConfig, value: str) -> None:
    with pytest.raises(ConfigError, match="mmproj"):
        resolve_model(seeing.replace(mmproj=value))


def test_the_setting_goes_into_the_file_and_back(seeing: ServerConfig, tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text(f"LLAMACPP_MODELS_DIR={seeing.models_dir}\nLLAMACPP_MMPROJ=off\n")
    named = seeing.replace(mmproj="demo/mmproj-F16.gguf")
    assert env_lines(named, {"mmproj"}) == ("LLAMACPP_PRIMARY_MMPROJ=demo/mmproj-F16.gguf",)
    for config in (named, seeing, seeing.replace(mmproj="off")):
        save_settings(config, env, {"model", "mmproj"})
        assert ServerConfig.from_env(env).mmproj == config.mmproj
    assert resolve_model(ServerConfig.from_env(env)).projector is None


def test_a_projector_in_the_folder_above_is_found(tmp_path: Path) -> None:
    """As each quantization has a folder of its own."""
    for kind in ("UD-Q4_K_XL", "Q8_0"):
        write_header(tmp_path / "repo" / kind / f"Some-VL-{kind}.gguf", some__embedding_length=64)
    for kind in ("F32", "BF16", "F16"):
        write_projector(tmp_path / "repo" / f"mmproj-{kind}.gguf", 64)
    write_header(tmp_path / "repo" / "Some-VL.imatrix.gguf", general__type="imatrix")
    model = tmp_path / "repo" / "UD-Q4_K_XL" / "Some-VL-UD-Q4_K_XL.gguf"
    assert paired(model, tmp_path) == tmp_path / "repo" / "mmproj-F16.gguf"
    (tmp_path / "repo" / "mmproj-F16.gguf").unlink()
    assert paired(model, tmp_path) == tmp_path / "repo" / "mmproj-BF16.gguf"
    beside = write_projector(model.with_name("mmproj-F32.gguf"), 64)
    assert paired(model, tmp_path) == beside
    write_header(tmp_path / "repo" / "Q8_0" / "Another-Q8_0.gguf")
    beside.unlink()
    assert paired(model, tmp_path) is None  # it could be either's


def test_a_projector_of_another_model_is_not_taken(tmp_path: Path) -> None:
    model = write_header(tmp_path / "m" / "Some-VL-Q4_K_M.gguf", qwen2__embedding_length=64)
    write_projector(tmp_path / "m" / "mmproj-F16.gguf", 128)
    assert paired(model, tmp_path) is None
    specific = write_projector(tmp_path / "m" / "mmproj-some-vl-F32.gguf", 64)
    assert paired(model, tmp_path) == specific
    write_projector(tmp_path / "m" / "mmproj-BF16.gguf", 64)
    assert paired(model, tmp_path) == specific  # what names the model goes before what does not


def test_above_the_models_folder_nothing_is_taken(tmp_path: Path) -> None:
    model = write_header(tmp_path / "models" / "m.gguf")
    write_projector(tmp_path / "mmproj-F16.gguf", 64)
    assert paired(model, tmp_path / "models") is None


def test_a_snapshot_of_the_hub_s_cache_has_its_projector(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--unsloth--Some-VL-GGUF"
    revision = repository / "snapshots" / "0123abcd"
    names = {"a": "UD-Q4_K_XL/Some-VL-UD-Q4_K_XL.gguf", "b": "mmproj-F16.gguf"}
    write_header(repository / "blobs" / "a")
    write_projector(repository / "blobs" / "b", 64)
    for blob, name in names.items():
        (revision / name).parent.mkdir(parents=True, exist_ok=True)
        (revision / name).symlink_to(repository / "blobs" / blob)
    (row,) = ModelCatalog(Store(tmp_path / "hub", StoreKind.HUGGING_FACE)).scan()
    assert row.projector == revision / "mmproj-F16.gguf"
    anywhere = resolve_model(ServerConfig(models_dir=tmp_path / "hub", model=row.path))
    assert anywhere.projector == row.projector
