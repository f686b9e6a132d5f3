from __future__ import annotations

from pathlib import Path

import anyio

from kitty_nb.supervisor.log import FileChanges


def test_a_wait_ends_with_each_write_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    woken: list[int] = []

    async def watch(changes: FileChanges) -> None:
        while True:
            await changes.wait()
            woken.append(path.stat().st_size)

    async def run() -> None:
        with FileChanges(path) as changes, path.open("ab", buffering=0) as file:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch, changes)
                await anyio.wait_all_tasks_blocked()
                assert woken == []
                for size in (1, 2, 3):
                    file.write(b"x")
                    with anyio.fail_after(5):
                        while woken[-1:] != [size]:
                            await anyio.sleep(0.001)
                tasks.cancel_scope.cancel()

    anyio.run(run)
    assert len(woken) == 3


def test_a_write_between_two_waits_is_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()

    async def run() -> None:
        with FileChanges(path) as changes:
            path.write_text("early")
            with anyio.fail_after(5):
                await changes.wait()

    anyio.run(run)
