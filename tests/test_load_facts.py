from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kitty_nb import ServerConfig, write_demo_model
from kitty_nb.supervisor.history import LoadFacts, gather_facts


def test_all_shards_and_the_projector_are_counted(config: ServerConfig, tmp_path: Path) -> None:
    assert config.model
    size = config.model.stat().st_size
    first = tmp_path / "m-00001-of-00002.gguf"
    elsewhere = tmp_path / "other disk"
    elsewhere.mkdir()
    shutil.copy(config.model, first)
    shutil.copy(config.model, elsewhere / "second")
    (tmp_path / "m-00002-of-00002.gguf").symlink_to(elsewhere / "second")
    projector = tmp_path / "mmproj.gguf"
    projector.write_bytes(b"x" * 1000)
    flags = ("--mmproj", str(projector), "--temp", "0")
    assert gather_facts(config.replace(model=first, extra_args=flags)).size == 2 * size + 1000
    assert gather_facts(config.replace(model=first, extra_args=("-mm", "gone"))).size == 2 * size


def test_files_that_vanish_count_for_nothing(config: ServerConfig, tmp_path: Path) -> None:
    model = write_demo_model(tmp_path / "gone.gguf")
    config = config.replace(model=model)
    model.unlink()
    facts = gather_facts(config)
    assert (facts.size, facts.digest, facts.cached) == (0, "", None)
    os.mkfifo(model)  # to open it would wait for ever
    assert gather_facts(config).size == 0


@pytest.mark.parametrize(
    "change",
    [
        {"context_size": 1024},
        {"n_gpu_layers": 3},
        {"parallel": 2},
        {"flash_attention": "on"},
        {"extra_args": ("--no-mmap",)},
    ],
)
def test_settings_that_matter_for_a_load_make_it_another(
    config: ServerConfig, change: dict[str, object]
) -> None:
    assert gather_facts(config.replace(**change)).settings != gather_facts(config).settings


def test_settings_that_do_not_matter_leave_it_the_same(config: ServerConfig) -> None:
    changed = config.replace(port=1, temperature=0.5, alias="x", stall_seconds=3)
    assert gather_facts(changed).settings == gather_facts(config).settings


def test_no_key_is_written_down(config: ServerConfig) -> None:
    facts = gather_facts(config.replace(extra_args=("--api-key", "sesame")))
    assert "sesame" not in str(facts)


def test_a_name_that_is_no_text_can_be_written_down(config: ServerConfig, tmp_path: Path) -> None:
    model = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    try:
        shutil.copy(str(config.model), model)
    except OSError:
        pytest.skip("this file system has only names that are text")
    facts = gather_facts(config.model_copy(update={"model": model}))
    assert facts.path.encode().endswith(rb"caf\xe9.gguf")


def test_a_touched_model_is_another(config: ServerConfig, tmp_path: Path) -> None:
    model = write_demo_model(tmp_path / "touched.gguf")

    def identity() -> LoadFacts:
        return gather_facts(config.replace(model=model))

    before = identity()
    os.utime(model, ns=(0, 0))
    assert identity().mtime_ns != before.mtime_ns
    assert identity().digest == before.digest
