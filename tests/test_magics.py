from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil
import pytest
from conftest import LOCAL, eventually
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager
from other_kernel import runs
from traitlets.config import Config

from kitty_nb import ControlPanel, ModelManager, ServerConfig, ServerStatus
from kitty_nb.errors import KittyError, ServerError
from kitty_nb.supervisor.port_owner import owner_of
from kitty_nb.widgets import session


def write_env(folder: Path, config: ServerConfig, *lines: str) -> Path:
    settings = {
        "MODELS_DIR": config.models_dir,
        "PRIMARY_MODEL": config.model,
        "ALIAS": config.alias,
        "PORT": config.port,
        "LOG_DIR": config.log_dir,
        "HISTORY": config.history,
        "CTX": config.context_size,
        "THREADS": 1,
        "PARALLEL": 1,
        "API_KEY": "none",
    }
    text = "".join(f"LLAMACPP_{name}={value}\n" for name, value in settings.items())
    path = folder / ".env"
    path.write_text(text + "".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def env(tmp_path: Path, config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_env(tmp_path, config)


Run = Callable[[str], str]


@pytest.fixture
def run(env: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run a cell that goes well; return what it printed."""
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))

    def run_cell(code: str) -> str:
        capsys.readouterr()
        shell.run_cell(code).raise_error()
        return capsys.readouterr().out

    run_cell("%load_ext kitty_nb")
    yield run_cell
    shell.run_cell("%unload_ext kitty_nb")


def answered(printed: str) -> str:
    """The answer; the progress of its prompt may have been shown before."""
    return printed.rpartition("\r")[2]


def test_a_server_is_started_asked_and_stopped(run: Run) -> None:
    assert "No server is running for the profile 'primary'." in run("%kitty status")
    started = run("%kitty start")
    assert re.search(r"\r\w.* · .*\rREADY", started)
    last = started.rpartition("\r")[2]
    assert re.match(r"READY: demo at http://127\.0\.0\.1:\d+ \(PID \d+", last)
    assert "READY: demo" in run("%kitty")  # the verb is understood to be status
    answer = answered(run("%%kitty_chat --temperature 0\nWho are you?"))
    assert answer.startswith("Hello! I am")
    assert len(answered(run("%%kitty_chat --max-tokens 3\nWho are you?"))) < len(answer)
    as_cat = run("%%kitty_chat --system 'You are a cat.'\nWho are you?")
    assert answered(as_cat).startswith("Hello!")
    with pytest.raises(KittyError, match="runs without a projector"):
        run("%%kitty_chat --image cat.png\nWhat is this?")
    run("%%kitty_chat\nWho are you?")
    run("%%kitty_chat --go-on\nWho are you?")
    manager = session.get(".env", "primary")
    assert manager

    def both_messages_were_sent() -> bool:
        *_, alone, going_on = (0, 0, *(request.prompt_tokens or 0 for request in manager.requests))
        return going_on > 2 * alone > 0

    eventually(both_messages_were_sent)
    assert len(run("%kitty logs -n 2").splitlines()) == 2
    before = re.findall(r"PID (\d+)", last)
    assert run("%kitty start").startswith("\rREADY")  # without the progress of an earlier load
    again = re.findall(r"PID (\d+)", run("%kitty restart"))
    assert again != before
    assert f"The server (PID {again[-1]}) is stopped." in run("%kitty stop --force")


def test_another_model_is_switched_to(run: Run, env: Path, config: ServerConfig) -> None:
    assert config.model
    other = config.models_dir / "other.gguf"
    other.write_bytes(config.model.read_bytes())
    try:
        run("%kitty start")
        assert "READY" in run("%kitty switch other.gguf")
        with pytest.raises(KittyError, match="Name the model"):
            run("%kitty switch")
        spaced = other.rename(other.with_name("my other.gguf"))
        other.touch()
        try:
            switched = run("%kitty switch \"my other.gguf\" --env '.env' --profile 'primary'")
            assert "READY" in switched
            assert "No server" in run('%kitty status --profile "coder"')
        finally:
            spaced.unlink()
        with pytest.raises(KittyError, match="1 or more"):
            run("%kitty logs -n 0")
    finally:
        other.unlink()


def test_what_cannot_be_done_is_said_in_one_sentence(
    run: Run, env: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KittyError, match="The server is STOPPED"):
        run("%%kitty_chat\nWho are you?")
    shown = capsys.readouterr().out
    assert shown.startswith("KittyError: The server is STOPPED")
    assert "Traceback" not in shown
    with pytest.raises(KittyError, match="no server log yet"):
        run("%kitty logs")
    env.write_text(f"{env.read_text()}LLAMACPP_THREADS=none\n")
    with pytest.raises(KittyError, match="LLAMACPP_THREADS='none'"):
        run("%kitty start")
    assert "No server" in run("%kitty stop")


def test_what_will_not_fit_is_asked_for_twice(run: Run, env: Path, stand_in: Path) -> None:
    env.write_text(f"{env.read_text()}LLAMACPP_BIN={stand_in}\nLLAMACPP_PRIMARY_CTX=2000000000\n")
    with pytest.raises(KittyError, match=r"Not enough memory: needs .* GB .*Run this again"):
        run("%kitty start")
    assert "No server" in run("%kitty status")
    assert "READY" in run("%kitty start")


def test_a_panel_and_the_magics_have_one_server(run: Run, env: Path) -> None:
    run("%kitty start")
    panel = ControlPanel()
    try:
        assert panel.manager.state.status is ServerStatus.READY
        panel.manager.stop().wait(30)
        assert "No server" in run("%kitty status")
        run("%kitty start")
        assert panel.manager.state.status is ServerStatus.READY
        run("%unload_ext kitty_nb")
        assert panel.manager.state.status is ServerStatus.READY  # the panel has taken it over
        run("%load_ext kitty_nb")
        assert "READY" in run("%kitty status")
    finally:
        panel.close()
    assert "READY" in run("%kitty status")  # the magics use the manager still
    run("%kitty stop")


def test_unloading_stops_the_server_and_takes_the_magics_away(run: Run) -> None:
    pid = int(re.findall(r"PID (\d+)", run("%kitty start"))[-1])
    run("%unload_ext kitty_nb")
    assert not psutil.pid_exists(pid)
    run("get_ipython().find_line_magic('kitty') is None or 1 / 0")
    run("get_ipython().find_cell_magic('kitty_chat') is None or 1 / 0")


def test_a_chat_is_heard_piece_by_piece(config: ServerConfig) -> None:
    with ModelManager(config=config) as manager:
        manager.start().wait(30)
        pieces: list[str] = []
        answer = manager.chat("Who are you?", lambda piece: pieces.append(piece.text)).wait(30)
        assert len(pieces) > 5
        assert "".join(pieces) == answer.text
        assert answer.text.startswith("Hello! I am")
        too_long = [{"role": "user", "content": "word " * 5000}]
        with pytest.raises(ServerError, match="context"):
            manager.chat(too_long).wait(30)
        with pytest.raises(ServerError, match="refused"):
            manager.chat("Hello", temperature="hot").wait(30)


class Kernel:
    """A real kernel, as a notebook has it."""

    def __init__(self, client: BlockingKernelClient, manager: KernelManager) -> None:
        self.client, self.manager = client, manager
        self.printed: list[str] = []

    def run(self, code: str, on_print: Callable[[], None] = lambda: None) -> str:
        """Run a cell that goes well; return what it printed."""
        printed, error = self.try_(code, on_print)
        assert not error, error
        return printed

    def try_(self, code: str, on_print: Callable[[], None] = lambda: None) -> tuple[str, str]:
        """Run a cell; return what it printed, and the name of the error it ended with."""
        self.printed.clear()

        def hear(message: dict[str, dict[str, str]]) -> None:
            if text := message["content"].get("text"):
                self.printed.append(text)
                on_print()

        reply = self.client.execute_interactive(code, timeout=60, output_hook=hear)
        return "".join(self.printed), reply["content"].get("ename", "")

    def interrupt(self) -> None:
        """Do what the interrupt button does."""
        psutil.Process(self.manager.provisioner.pid).send_signal(signal.SIGINT)  # type: ignore[union-attr]


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    with TemporaryDirectory() as sockets:  # pytest's folder is too long for an address
        # Files in place of ports, which another program could take before the kernel does.
        manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
        manager.start_kernel(cwd=str(tmp_path))
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            yield Kernel(client, manager)
        finally:
            client.stop_channels()
            manager.shutdown_kernel()
            manager.context.destroy()


def test_the_kernels_own_tasks_go_on_while_a_model_loads(
    kernel: Kernel, misbehaving: Callable[..., ServerConfig], tmp_path: Path
) -> None:
    config = misbehaving()
    flags = "LLAMACPP_EXTRA_ARGS='--prepare-seconds 1.5'"
    end = "LLAMACPP_ON_KERNEL_EXIT=stop"
    write_env(tmp_path, config, f"LLAMACPP_BIN={config.binary}", flags, end)
    kernel.run(
        "import asyncio\nticks = []\n"
        "async def tick():\n"
        "    while True:\n"
        "        ticks.append(None)\n"
        "        await asyncio.sleep(0.05)\n"
        "ticking = asyncio.create_task(tick())\n"
        "%load_ext kitty_nb"
    )
    shown = kernel.run("before = len(ticks)\n%kitty start\nprint(len(ticks) - before)")
    assert len(re.findall(r" \d+ %", shown)) >= 3
    assert "READY" in shown
    assert int(shown.split()[-1]) >= 5


def test_an_interrupt_ends_the_answer_on_both_sides(
    kernel: Kernel, config: ServerConfig, tmp_path: Path
) -> None:
    endless = "LLAMACPP_EXTRA_ARGS='--ignore-eos --context-shift'"
    write_env(tmp_path, config, endless, "LLAMACPP_ON_KERNEL_EXIT=stop")
    kernel.run("%load_ext kitty_nb")
    pid = int(re.findall(r"PID (\d+)", kernel.run("%kitty start"))[-1])

    def busy() -> bool:
        slots = httpx.get(f"{config.endpoint}/slots", timeout=10, **LOCAL).json()
        return any(slot["is_processing"] for slot in slots)

    seen = []

    def interrupt() -> None:
        if not seen and "Hello!" in "".join(kernel.printed):
            seen.append(busy())
            kernel.interrupt()

    printed = kernel.run("%%kitty_chat\nWho are you?", interrupt)
    assert answered(printed).startswith("Hello!")
    assert seen == [True]
    eventually(lambda: not busy(), why="the server goes on answering")
    assert "READY" in kernel.run("%kitty status")
    kernel.client.shutdown()
    eventually(lambda: not runs(pid), why="it outlives its kernel")


def test_an_interrupt_calls_a_start_off(
    kernel: Kernel, misbehaving: Callable[..., ServerConfig], tmp_path: Path
) -> None:
    config = misbehaving()
    endless = "LLAMACPP_EXTRA_ARGS=--never-ready"
    write_env(tmp_path, config, f"LLAMACPP_BIN={config.binary}", endless)
    kernel.run("%load_ext kitty_nb")
    asked: list[bool] = []

    def interrupt() -> None:
        if not asked and "loading" in "".join(kernel.printed):
            asked.append(True)
            kernel.interrupt()

    _, error = kernel.try_("%kitty start", interrupt)
    assert error == "StartCancelledError"
    assert "stopped" in kernel.run("%kitty stop") or "No server" in kernel.run("%kitty status")


def test_a_router_that_a_panel_attached_to_is_switched(
    run: Run, env: Path, config: ServerConfig, native_engine: Path, demo_model: Path
) -> None:
    folder = env.parent / "router"
    folder.mkdir()
    (folder / "one.gguf").symlink_to(demo_model)
    command = [native_engine, "--models-dir", folder, "--port", str(config.port)]
    with subprocess.Popen([*command, "-c", "512", "-ngl", "0"]) as router:
        try:
            run("%kitty status")
            manager = session.get(".env", "primary")
            assert manager
            eventually(lambda: owner_of(config.host, config.port))
            manager.attach().wait(60)
            assert "READY: one at " in run("%kitty switch one")
            assert "Hello! I am" in run("%%kitty_chat\nWho are you?")  # after the prompt's progress
            assert "STOPPED" not in run("%kitty status")
            with pytest.raises(KittyError, match="doesn't have its log"):
                run("%kitty logs")
            assert re.match(r"Detached from .*; it keeps running\.", run("%kitty stop"))
            assert router.poll() is None
        finally:
            router.terminate()
