"""The cost of listing models: a first scan against the `gguf` package's reader, and a second one.

And the cost of opening a panel when all of them are known.

All files are headers as long as real ones, without weights. Only some have a vocabulary of 152,000
tokens, 5 MB each; those give the time of a first scan per file. The rest have few tokens: a second
scan, which reads no file, takes as long with them, and they save 4 GB of disk.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import gguf
import numpy as np
import platformdirs

from benchmarks.subject import row, seconds_of
from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.catalog.gguf import read_header

if TYPE_CHECKING:
    from collections.abc import Iterator

_LARGE, _SMALL = 100, 900
_TOKENS = 152_000
_LAYERS = 28
_RUNS = 9
_TEMPLATE = (
    "{% if tools %}{{ tools }}{% endif %}{{ messages }}" + "{# as long as a real one #}" * 200
)
_NAME = b"the title of model 00000"


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copies(_write(folder / "large.gguf", _TOKENS), folder / "large", _LARGE)
        _copies(_write(folder / "small.gguf", 1_000), folder / "small", _SMALL)
        one = folder / "large.gguf"
        theirs = seconds_of(lambda: gguf.GGUFReader(one))
        ours = statistics.median(seconds_of(lambda: read_header(one)) for _ in range(_RUNS))
        cache = folder / "cache.sqlite3"
        first = seconds_of(ModelCatalog(folder / "large", cache).scan) / _LARGE
        catalog = ModelCatalog([folder / "large", folder / "small"], cache)
        catalog.scan()
        again = statistics.median(seconds_of(catalog.scan) for _ in range(_RUNS))
        models = catalog.scan()
        assert len(models) == _LARGE + _SMALL
        assert all(model.startable and model.facts.tools for model in models)
        row(f"gguf.GGUFReader, {_TOKENS:,} tokens", f"{theirs * 1000:9.1f} ms a file (1 file)")
        row("its header alone, here", f"{ours * 1000:9.1f} ms a file (median of {_RUNS})")
        row("first scan, tensors and cache too", f"{first * 1000:9.1f} ms a file ({_LARGE} files)")
        row("  that is faster than GGUFReader by", f"{theirs / first:9.0f} x")
        row(f"second scan of {len(models):,} models", f"{again * 1000:9.1f} ms (median of {_RUNS})")
        row("the cache", f"{cache.stat().st_size / 1e6:9.1f} MB")
        opened, listed = zip(*_openings(folder), strict=True)
        for what, seconds in (
            ("opening a panel on them", opened),
            ("  until all are listed", listed),
        ):
            middle, most = statistics.median(seconds) * 1000, max(seconds) * 1000
            row(what, f"{middle:9.1f} ms (median of {_RUNS}; longest {most:.1f})")


def _openings(folder: Path) -> Iterator[tuple[float, float]]:
    """Measure how long several panels take to open, and until all models can be chosen."""
    from kitty_nb import ControlPanel  # noqa: PLC0415 - not to be counted with the scans

    env = folder / ".env"
    names = {"MODELS_DIR": "models", "HISTORY": "history.sqlite3", "LOG_DIR": "logs"}
    names["OTHER_STORES"] = "0"
    env.write_text("".join(f"LLAMACPP_{name}={value}\n" for name, value in names.items()))
    (folder / "models").mkdir()
    for part in ("large", "small"):
        (folder / part).rename(folder / "models" / part)
    with patch.object(platformdirs, "user_cache_path", lambda _: folder):
        ModelCatalog(folder / "models").scan()
        for _ in range(_RUNS):
            began = time.perf_counter()
            panel = ControlPanel(env)
            opened = time.perf_counter() - began
            while len(panel.picker.models) < _LARGE + _SMALL:
                time.sleep(0.001)
            yield opened, time.perf_counter() - began
            panel.close()


def _write(path: Path, tokens: int) -> Path:
    chance = random.Random(1)  # noqa: S311 - words, not secrets
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(1, 12))) for _ in range(tokens)]
    with contextlib.closing(gguf.GGUFWriter(path, "qwen2")) as writer:
        writer.add_name(_NAME.decode())
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_context_length(32_768)
        writer.add_block_count(_LAYERS)
        writer.add_head_count(28)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)
        writer.add_token_types([gguf.TokenType.NORMAL] * tokens)
        writer.add_token_merges([f"{word} b" for word in words])
        writer.add_chat_template(_TEMPLATE)
        end = 0
        for layer in range(_LAYERS):
            for tensor in range(12):
                name = f"blk.{layer}.{tensor}.weight"
                writer.add_tensor_info(name, [64, 64], np.dtype(np.float16), 8192)
                end += 8192
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout
        begin = gguf.GGUFWriter.ggml_pad(writer.fout[0].tell(), writer.data_alignment)
    os.truncate(path, begin + end)
    return path


def _copies(original: Path, folder: Path, count: int) -> None:
    """Copy a model under other titles, with files that look an hour old."""
    folder.mkdir()
    title_at = original.read_bytes()[:4096].index(_NAME)
    before = time.time() - 3600
    for number in range(count):
        copy = Path(shutil.copy(original, folder / f"model-{number:04d}.gguf"))
        with copy.open("r+b") as file:
            file.seek(title_at)
            file.write(_NAME[:-5] + b"%05d" % number)
        os.utime(copy, (before, before))


if __name__ == "__main__":
    main()
