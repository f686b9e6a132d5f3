from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import gguf
import pytest

from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.demo_model import write_demo_model
from kitty_nb.errors import DemoModelSizeError, KittyError, ModelFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ANSWER = (
    "Hello! I am the kitty_nb demo model, written on the spot without any training. "
    "I know only these few sentences, so every question gets this same answer. "
    "Choose a real GGUF file whenever you would like more conversation."
)
# Four questions at once to a server with two slots, one of them with sampling and none alike.
ASK = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import xllamacpp

params = xllamacpp.CommonParams()
params.hostnames, params.port = ["127.0.0.1"], 0
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 1024, 2
server = xllamacpp.Server(params)
asked = [
    {"messages": [{"role": "user", "content": "Hi!"}], "temperature": 0},
    {"messages": [{"role": "user", "content": "I am a real demo model, 你好"}], "temperature": 0},
    {"messages": [{"role": "user", "content": "x"}], "temperature": 0.8, "seed": 1},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "Hello! I am the"},
            {"role": "user", "content": "conversation."},
        ],
        "temperature": 0,
    },
]
with ThreadPoolExecutor(4) as pool:
    answers = list(pool.map(server.handle_chat_completions, asked))
print("ANSWERS", json.dumps([answer["choices"][0] for answer in answers]))
"""


@pytest.mark.parametrize("size", [None, 8_000_000])
def test_it_speaks_on_the_real_engine(tmp_path: Path, size: int | None) -> None:
    pytest.importorskip("xllamacpp")
    path = write_demo_model(tmp_path / "demo.gguf", size)
    ran = subprocess.run(
        [sys.executable, "-c", ASK, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    answered = [line for line in ran.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert answered, ran.stderr
    choices = json.loads(answered[0].removeprefix("ANSWERS "))
    assert [choice["message"]["content"] for choice in choices] == [ANSWER] * 4
    assert {choice["finish_reason"] for choice in choices} == {"stop"}


@pytest.mark.parametrize("size", [1_000_000, 1_234_567, 5_500_000, 33_000_000])
def test_the_size_is_met_with_weights_and_real_bytes(tmp_path: Path, size: int) -> None:
    path = write_demo_model(tmp_path / "demo.gguf", size)
    status = path.stat()
    assert status.st_size == pytest.approx(size, rel=0.01)
    assert status.st_blocks * 512 >= status.st_size
    weights = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    assert status.st_size - weights < 20_000


def test_the_catalog_knows_it(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "kitty-demo.gguf")
    (model,) = ModelCatalog(tmp_path).scan()
    assert (model.architecture, model.quantization, model.context_length) == ("llama", "F16", 4096)
    assert model.startable
    assert model.label == "kitty-demo · F16 · 1.0 MB"


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    one = write_demo_model(tmp_path / "one.gguf")
    two = write_demo_model(str(tmp_path / "new" / "folders" / "two.gguf"))
    assert two == tmp_path / "new" / "folders" / "two.gguf"
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("size", [999_999, 0, -1])
def test_too_small_a_size_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(DemoModelSizeError, match="Ask for 1000000 bytes or more") as caught:
        write_demo_model(tmp_path / "demo.gguf", size)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, KittyError)
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let every write beyond this many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [None, 8_000_000])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, size: int | None) -> None:
    path = tmp_path / "demo.gguf"
    path.write_bytes(b"precious")
    with files_of_at_most(500_000), pytest.raises(ModelFileError, match="Can't write"):
        write_demo_model(path, size)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"precious"


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo.gguf").mkdir()
    with pytest.raises(ModelFileError, match="Is a directory"):
        write_demo_model(tmp_path / "demo.gguf")
    with pytest.raises(ModelFileError, match="Can't write"):
        write_demo_model(write_demo_model(tmp_path / "file") / "demo.gguf")
