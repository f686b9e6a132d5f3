"""The organisation of the suite.

`pytest` runs what a change should be checked by, in several processes and some minutes; a named
file or test runs in one process, so that a debugger and `-s` work. Markers choose parts:
`pytest -m slow` what takes long (floods, killed sweeps, more browser journeys), `-m native` and
`-m real_model` what needs a compiled engine or a real model, `-m browser` JupyterLab. `.ci/run`
runs all of them. `--shuffle SEED` runs the tests in another order: none may depend on it.

Each process has folders, ports and a home of its own. One process has all tests of a module whose
fixtures or imports are costly (`TOGETHER`); those of the others go wherever there is time.
"""

from __future__ import annotations

import asyncio
import gc
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import comm
import platformdirs
import psutil
import pytest
import xdist
from comm.base_comm import BaseComm
from hub_server import Hub, usual_repositories
from other_kernel import runs
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from kitty_nb import ModelManager, ServerConfig, network, write_demo_model

# The suite starts hundreds of programs: each module is compiled once, not in each of them.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    del os.environ["PYTHONDONTWRITEBYTECODE"]
LIGHT = str(Path(__file__).parent / "light")
sys.path.insert(0, LIGHT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [LIGHT, os.environ.get("PYTHONPATH")]))

# Threads of engines that wait for each other by spinning would keep the other tests from running.
os.environ["OMP_WAIT_POLICY"] = "passive"

# Read when huggingface_hub is imported: nothing of the user's is used, and no test reaches the Hub.
_HUB_HOME = tempfile.TemporaryDirectory(prefix="kitty_nb-hub-")
os.environ |= {
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HOME": _HUB_HOME.name,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_XET": "1",
}
for _secret in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(_secret, None)
# A wish of whoever runs the tests; where a program finds it, it says that it has no effect.
_NATIVE_ENGINE = os.environ.pop("LLAMACPP_BIN", None) or os.environ.get("KITTY_NATIVE_ENGINE")
if _NATIVE_ENGINE:
    os.environ["KITTY_NATIVE_ENGINE"] = _NATIVE_ENGINE  # for the processes of xdist

TOGETHER = {
    *("test_browser", "test_chat", "test_dask_sweep"),
    *("test_embeddings", "test_fleet", "test_results"),
}
STAND_IN = Path(__file__).parent / "stand_in_server.py"
# How httpx asks loopback: without proxies, and without certificates, which take 20 ms to load.
LOCAL: dict[str, Any] = {"trust_env": False, "verify": False}
MARK = "KITTY_NB_TEST_RUN"


def eventually(condition: Callable[[], object], *, within: float = 60.0, why: str = "") -> None:
    """Wait until a condition holds, or fail.

    The deadline is for a busy machine; where time is what a test is about, it names its own. A look
    that costs much, such as one at all processes, is taken more rarely: others need the processor.
    """
    looked = time.monotonic()
    deadline = looked + within
    while not condition():
        now = time.monotonic()
        if now > deadline:
            pytest.fail(f"not within {within} s: {why or condition}")
        time.sleep(max(0.01, 2 * (now - looked)))
        looked = time.monotonic()


@contextmanager
def busy(manager: ModelManager) -> Iterator[None]:
    """Keep a manager's event loop from doing anything else in a block."""
    begun, done = threading.Event(), threading.Event()

    async def hold() -> None:
        begun.set()
        done.wait(60)

    holding = manager.run(hold)
    begun.wait(60)
    try:
        yield
    finally:
        done.set()
        holding.wait(60)


@pytest.fixture(scope="session", autouse=True)
def nobodys_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The models that a developer's other programs keep are none of the tests' business."""
    caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
    changes = pytest.MonkeyPatch()
    if "PLAYWRIGHT_BROWSERS_PATH" not in os.environ:
        changes.setenv("PLAYWRIGHT_BROWSERS_PATH", str(Path.home() / caches / "ms-playwright"))
    changes.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    for name in ("HF_HUB_CACHE", "HF_HOME", "LLAMA_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME"):
        changes.delenv(name, raising=False)
    yield
    changes.undo()


@pytest.fixture(scope="session", autouse=True)
def no_process_survives() -> Iterator[None]:
    """Every process that the suite starts inherits a mark; in the end none may be left."""
    whole = os.environ[MARK]
    os.environ[MARK] = mine = f"{whole}-{uuid.uuid4().hex}"
    yield
    os.environ[MARK] = whole
    eventually(lambda: not marked(mine), why=f"processes survive the suite: {marked(mine)}")


def words_of(process: psutil.Process) -> list[str]:
    """The command line of a process; empty once it has ended, which may be at any moment."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def marked(run: str) -> list[psutil.Process]:
    """The living processes that a run, or a part of it, started."""
    return [
        process
        for process in psutil.process_iter(["environ", "name", "cmdline", "status"])
        if (process.info["environ"] or {}).get(MARK, "").startswith(run)
        and process.info["status"] != psutil.STATUS_ZOMBIE
        and process.pid != os.getpid()
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "run the tests in a random order, the same for the same seed"
    parser.addoption("--shuffle", type=int, metavar="SEED", help=about)


def pytest_sessionstart(session: pytest.Session) -> None:
    # A shell turns Ctrl-C off for what it runs in the background, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not xdist.is_xdist_worker(session):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` leaves nothing either
        os.environ[MARK] = uuid.uuid4().hex


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what the processes of an interrupted suite could not."""
    if not xdist.is_xdist_worker(session):
        for process in marked(os.environ.pop(MARK)):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(autouse=True)
def no_cache_outside(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keep what the catalog remembers out of the user's cache folder."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: folder / name)


@pytest.fixture(autouse=True)
def databases_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's write to a slow disk may take longer than a user is to wait for."""
    monkeypatch.setattr("kitty_nb.safe_files._BUSY_SECONDS", 30)


def pending_tasks() -> set[object]:
    """All tasks of all loops; asyncio itself only lists those of one."""
    known = gc.get_objects() if sys.version_info >= (3, 14) else None
    if known is None:
        registry = "_scheduled_tasks" if sys.version_info >= (3, 12) else "_all_tasks"
        known = snapshot(getattr(asyncio.tasks, registry))
    return {task for task in known if isinstance(task, asyncio.Task) and not task.done()}


def snapshot(tasks: Iterable[object]) -> list[object]:
    """List what other threads may change meanwhile, as `asyncio.all_tasks` does."""
    while True:
        with suppress(RuntimeError):  # it has just changed
            return list(tasks)


class Children:
    """The processes that this one and its children started.

    Listing them reads the table of all processes; a test that starts none does not pay for it.
    """

    def __init__(self) -> None:
        self._started = True
        self._living: set[object] = set()
        sys.addaudithook(self._watch)

    def _watch(self, event: str, _: object) -> None:
        if event in {"subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty"}:
            self._started = True

    def living(self) -> set[object]:
        if self._started:
            found = psutil.Process().children(recursive=True)
            self._living = {child for child in found if runs(child.pid)}
            self._started = bool(self._living)
        return self._living


def inet_sockets() -> set[object]:
    found: set[object] = set()
    for number in map(int, os.listdir("/dev/fd")):  # noqa: PTH208 - numbers, not files
        with suppress(OSError):  # the listing's own, or one that another thread has closed
            status = os.fstat(number)
            if stat.S_ISSOCK(status.st_mode):
                one = socket.socket(fileno=number)
                if one.family in {socket.AF_INET, socket.AF_INET6}:
                    found.add((number, status.st_ino))
                one.detach()
    return found


@pytest.fixture(scope="session")
def children() -> Children:
    return Children()


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest, children: Children) -> Iterator[None]:
    """Fail the test that leaves a process, a thread, a task or a socket behind."""
    if request.node.get_closest_marker("browser"):
        yield  # the browser's own helpers come and go; processes are checked for the whole suite
        return

    def living() -> set[object]:
        threads = {t for t in threading.enumerate() if not t.name.startswith("AnyIO worker")}
        return threads | children.living() | inet_sockets() | pending_tasks()

    before = living()
    yield
    deadline = time.monotonic() + 60
    while left := living() - before:
        looked = time.monotonic()
        if looked > deadline:
            pytest.fail(f"left behind: {left}")
        gc.collect()
        # Collecting holds the interpreter: a thread that is about to end needs it more.
        time.sleep(max(0.02, 2 * (time.monotonic() - looked)))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    """All messages that widgets send to the page."""
    messages: list[tuple[str, dict[str, object]]] = []

    class RecordingComm(BaseComm):
        def publish_msg(self, msg_type: str, data: object = None, **_: object) -> None:
            messages.append((msg_type, data if isinstance(data, dict) else {}))

    monkeypatch.setattr(comm, "create_comm", RecordingComm)
    monkeypatch.setattr("ipywidgets.widgets.widget.comm.create_comm", RecordingComm)
    return messages


def _own_ports() -> Iterator[int]:
    """Ports of this process alone, each once: a fixture may not use its own for minutes.

    Programs under test choose theirs from 20,000 up. Some ask for the next one as well. The first
    is any of them: another run of the suite on this machine has the same ones.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = 9_000 // max(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), number + 1)
    first = 11_000 + number * share  # above 10080, which browsers refuse
    ports = [*range(first, first + share, 2)]
    begin = random.SystemRandom().randrange(len(ports))  # whatever seed orders the tests
    return iter(ports[begin:] + ports[:begin])


_PORTS = _own_ports()


def unused_port() -> int:
    """A port that no other test, and no program that a test starts, chooses."""
    for port in _PORTS:
        with socket.socket() as trial, suppress(OSError):
            trial.bind((network.LOOPBACK, port))
            return port
    pytest.fail("no port of this process is left")


@pytest.fixture
def free_port() -> int:
    return unused_port()


@pytest.fixture(scope="session")
def second_user() -> Iterator[pwd.struct_passwd]:
    """Another user of this machine, for as long as the suite runs; root alone can make one."""
    if os.getuid() != 0 or not (add := shutil.which("useradd")):
        pytest.skip("needs root and useradd, to make a second user")
    name = f"kitty-test-{os.getpid()}"
    subprocess.run([add, "--no-create-home", "--shell", "/bin/false", name], check=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", name], check=True, capture_output=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hugging Face Hub on loopback, which clients take for the real one."""
    from huggingface_hub import close_session, constants  # noqa: PLC0415 - its settings are set

    close_session()  # one that a test without this Hub has left was made in other surroundings
    with Hub(usual_repositories()).serving() as hub:
        files = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + files)
        yield hub
        close_session()


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_model(tmp_path_factory.mktemp("models") / "demo.gguf")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Gemma 3 270M, Q4_K_M, as `.ci/real-model` puts it together."""
    path = os.environ.get("KITTY_REAL_MODEL")
    if not path and os.environ.get("CI"):
        pytest.fail("KITTY_REAL_MODEL is not set; .ci/real-model prints its value")
    if not path:
        pytest.skip("no real model: export KITTY_REAL_MODEL=$(.ci/real-model)")
    return Path(path)


@pytest.fixture(scope="session")
def native_engine() -> Path:
    """A llama-server that somebody compiled, by LLAMACPP_BIN or on PATH."""
    program = _NATIVE_ENGINE or shutil.which("llama-server")
    if not program:
        pytest.skip("no native llama-server: set LLAMACPP_BIN")
    return Path(program)


@pytest.fixture
def software_gpu(native_engine: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Vulkan's software renderer as the native engine's only device; return its name."""
    driver = next(Path("/usr/share/vulkan/icd.d").glob("lvp_icd.*.json"), None)
    if driver is None:
        pytest.skip("no software GPU: apt-get install mesa-vulkan-drivers")
    monkeypatch.setenv("VK_DRIVER_FILES", str(driver))
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0")
    command = [native_engine, "--list-devices"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if "Vulkan0" not in listed.stdout + listed.stderr:
        pytest.skip("this llama-server was built without Vulkan")
    return "Vulkan0"


@pytest.fixture(scope="module", params=["embedded", "native"])
def engine(request: pytest.FixtureRequest) -> Path | None:
    """Both engines, one after the other, as a value for `ServerConfig.binary`."""
    if request.param == "native":
        return Path(request.getfixturevalue("native_engine"))
    pytest.importorskip("xllamacpp")
    return None


@pytest.fixture
def real_config(config: ServerConfig, real_model: Path, engine: Path | None) -> ServerConfig:
    """The real model on both engines."""
    return config.replace(
        model=real_model, models_dir=real_model.parent, binary=engine, context_size=2048, threads=1
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The processes that share the tests: these wait more than they compute."""
    named = [arg for arg in config.args if Path(arg).resolve() != Path(__file__).parent]
    return 0 if named else min(2 * (os.cpu_count() or 1), 8)


class Scheduling(LoadScopeScheduling):
    """Each test goes where there is time, and the modules with costly fixtures come first."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return module if Path(module).stem in TOGETHER else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test by what it needs, so that `-m native` and `-m real_model` choose them all."""
    seed = config.getoption("shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)
        # One engine after the other: a module's server is started once for each.
        items.sort(key=lambda item: "[native" in item.name)
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        if "real_model" in names:
            item.add_marker("real_model")
        call = getattr(item, "callspec", None)
        if "native_engine" in names or (call and call.params.get("engine") == "native"):
            item.add_marker("native")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("engine") / "llama-server"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P "{STAND_IN}" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def demo_config(model: Path, folder: Path, port: int) -> ServerConfig:
    """The real engine on the demo model, with all that it writes in a folder."""
    return ServerConfig(
        models_dir=model.parent,
        allow_absolute_paths=True,
        model=model,
        alias="demo",
        port=port,
        log_dir=folder / "logs",
        history=folder / "history.sqlite3",
        context_size=512,
        threads=1,
        parallel=1,
    )


@pytest.fixture
def config(demo_model: Path, free_port: int, tmp_path: Path) -> ServerConfig:
    return demo_config(demo_model, tmp_path, free_port)


@pytest.fixture
def misbehaving(config: ServerConfig, stand_in: Path) -> Callable[..., ServerConfig]:
    """The stand-in server, told how to misbehave by its own flags."""

    def configure(*flags: str, **changes: object) -> ServerConfig:
        return config.replace(binary=stand_in, extra_args=flags, **changes)

    return configure
