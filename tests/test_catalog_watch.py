"""A list of models that stays current."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from model_files import write_header

from kitty_nb.catalog import catalog as watch
from kitty_nb.catalog.catalog import ModelCatalog

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from kitty_nb.catalog.model import Model


async def until(lists: AsyncGenerator[list[Model]], names: set[str]) -> None:
    async with asyncio.timeout(20):
        async for models in lists:
            if {model.name for model in models} == names:
                return


def test_a_list_stays_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LOOK_SECONDS", 0.1)
    folder = tmp_path / "models"
    write_header(folder / "a.gguf")

    async def scenario() -> None:
        catalog = ModelCatalog([folder, tmp_path / "absent"], tmp_path / "cache")
        async with aclosing(catalog.watch()) as lists:
            await until(lists, {"a.gguf"})
            next_list = asyncio.create_task(until(lists, {"a.gguf", "sub/b.gguf"}))
            write_header(tmp_path / "b.gguf")
            (folder / "sub").mkdir()
            (tmp_path / "b.gguf").replace(folder / "sub" / "b.gguf")
            await next_list
            (folder / "a.gguf").unlink()
            await until(lists, {"sub/b.gguf"})

    asyncio.run(scenario())


def test_a_folder_may_come_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LOOK_SECONDS", 0.1)
    folder = tmp_path / "models"

    async def scenario() -> None:
        async with aclosing(ModelCatalog(folder, tmp_path / "cache").watch()) as lists:
            await until(lists, set())
            write_header(folder / "a.gguf")
            await until(lists, {"a.gguf"})
            write_header(folder / "b.gguf")
            await until(lists, {"a.gguf", "b.gguf"})

    asyncio.run(scenario())


def test_watching_ends_when_it_is_cancelled(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with aclosing(ModelCatalog(tmp_path, tmp_path / "cache").watch()) as lists:
            await until(lists, set())
            waiting = asyncio.create_task(until(lists, {"never"}))
            for _ in range(100):  # until it waits for the system
                await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                async with asyncio.timeout(5):
                    await waiting

    asyncio.run(scenario())
