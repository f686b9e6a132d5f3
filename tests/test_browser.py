"""The view of a person: the control notebook in JupyterLab, in a real browser."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from conftest import LOCAL, eventually, unused_port
from model_files import write_header, write_projector
from test_vision import DEMO_WIDTH, png

from kitty_nb import write_demo_model
from kitty_nb.widgets import FleetPanel
from kitty_nb.widgets.ask import Ask, Turn
from kitty_nb.widgets.fleet_panel import FleetRow
from kitty_nb.widgets.server_view import Address
from kitty_nb.widgets.server_work import LINES_KEPT, ServerLog

if TYPE_CHECKING:  # else a second's import in processes that run other tests
    from playwright.sync_api import Browser, BrowserContext, Locator, Page, Response, Route

pytestmark = pytest.mark.browser

_CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP elsewhere.example 127.0.0.1",
]
_LOAD_SECONDS = 40  # unless a test is in a hurry


def expect(part: Locator | Page) -> Any:
    """Return Playwright's assertions about a part of a page."""
    from playwright.sync_api import expect as asserted  # noqa: PLC0415

    asserted.set_options(timeout=60_000)  # a machine that tests is a busy one
    return asserted(part)


# Playwright keeps an event loop running in this thread, so it must end with this module.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = ("chromium", "chromium-browser", "google-chrome")
        program = own if Path(own).exists() else next(filter(None, map(shutil.which, names)), None)
        if program is None:
            reason = "no browser: run `playwright install chromium` or `apt-get install chromium`"
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
        browser = playwright.chromium.launch(executable_path=program, args=_CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, stand_in: Path) -> Path:
    """A user's folder: a small model, and a profile whose engine takes its time."""
    folder = tmp_path_factory.mktemp("workspace")
    write_demo_model(folder / "models" / "small.gguf")
    write_demo_model(folder / "models" / "medium.gguf", size=20_000_000)
    ports = unused_port(), unused_port()
    (folder / ".env").write_text(
        "LLAMACPP_MODELS_DIR=models\n"
        "LLAMACPP_LOG_DIR=logs\n"
        "LLAMACPP_HISTORY=history.sqlite3\n"
        "LLAMACPP_CTX=512\n"
        f"LLAMACPP_PORT={ports[0]}\n"
        "LLAMACPP_MANY_MODELS_DIR=many\n"
        "LLAMACPP_SEEING_MODELS_DIR=seeing\n"
        f"LLAMACPP_SLOW_PORT={ports[1]}\n"
        "LLAMACPP_SLOW_HISTORY=slow.sqlite3\n"  # else the other engine's loads are expected
        f"LLAMACPP_SLOW_BIN={stand_in}\n"
        "LLAMACPP_SLOW_RESTART_DELAY_SECONDS=60\n"
        f"LLAMACPP_SLOW_EXTRA_ARGS='--load-seconds {_LOAD_SECONDS} --hurry {folder}/hurry'\n"
    )
    return folder


@pytest.fixture
def hurry(workspace: Path) -> Iterator[Path]:
    """A file that ends the slow profile's load when it is made: once enough of it was seen."""
    yield workspace / "hurry"
    (workspace / "hurry").unlink(missing_ok=True)


@contextmanager
def running_lab(workspace: Path, home: Path, *options: str) -> Iterator[str]:
    """`kitty-nb lab`, as a user starts it; yields its address, without a notebook's path.

    It is told of a base URL, as JupyterHub does.
    """
    port = unused_port()
    settings = home / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    token = secrets.token_hex(16)
    environment = os.environ | {
        f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")
    }
    with (home / "lab.log").open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kitty_nb.cli", "lab", "--no-browser"),
                *(f"--port={port}", f"--IdentityProvider.token={token}"),
                *("--ServerApp.base_url=/user/ann/", "--ServerApp.allow_remote_access=True"),
                *("--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"),
                *options,
            ],
            cwd=workspace,
            env=environment,
            stdout=log,
            stderr=log,
        )
        address = f"http://127.0.0.1:{port}/user/ann"
        headers = {"Authorization": f"token {token}"}

        def answers() -> bool:
            try:
                return httpx.get(f"{address}/api/status", headers=headers, **LOCAL).is_success
            except httpx.HTTPError:
                return False

        try:
            eventually(answers, within=90, why="JupyterLab does not start")
            lab = f"{address}/doc/tree/{{}}?token={token}&reset"
            yield lab
            end_kernels(lab)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()


def end_kernels(lab: str) -> None:
    """End all notebooks' kernels: a panel that is left open restarts what a later test crashes."""
    address, query = lab.partition("/doc/tree/")[0], lab.partition("?")[2]
    with httpx.Client(params=query, timeout=60) as client:
        for session in client.get(f"{address}/api/sessions").json():
            client.delete(f"{address}/api/sessions/{session['id']}")


@pytest.fixture(scope="module")
def lab(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_lab(workspace, tmp_path_factory.mktemp("jupyter")) as address:
        yield address


@pytest.fixture(scope="module")
def lab_without_proxy(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    off = "--ServerApp.jpserver_extensions=jupyter_server_proxy=False"
    with running_lab(workspace, tmp_path_factory.mktemp("jupyter"), off) as address:
        yield address


class Notebook:
    """One notebook in one page."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def cell(self, index: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(index)

    def run(self, index: int, *, wait: bool = True) -> None:
        self.cell(index).locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")
        prompt = self.cell(index).locator(".jp-InputPrompt")
        expect(prompt).to_have_text(re.compile(r"\[\d+\]:" if wait else r"\[\*\]:"), timeout=60_000)

    @property
    def panel(self) -> Locator:
        return self.page.locator(".kitty-panel").last

    def button(self, name: str) -> Locator:
        return self.panel.locator("button:visible", has_text=re.compile(rf"^\s*{name}$"))

    def unfold(self, name: str) -> None:
        head = self.panel.get_by_role("button", name=re.compile(f"^{name}"))
        if head.get_attribute("aria-expanded") == "false":
            head.click()
        expect(head).to_have_attribute("aria-expanded", "true")

    def pid(self) -> int:
        self.unfold("Details")
        facts = self.panel.locator(".kitty-server-facts")
        expect(facts).to_contain_text("PID")
        return int(re.findall(r"PID\s*(\d+)", facts.inner_text())[0])

    def expect_status(self, status: str) -> None:
        expect(self.panel.locator(".kitty-badge")).to_have_text(status, timeout=60_000)

    def height(self) -> float:
        box = self.panel.bounding_box()
        assert box
        return box["height"]

    def progress(self) -> float:
        return float(
            self.panel.locator(".kitty-load .progress-bar").evaluate(
                "bar => parseFloat(bar.style.width)"
            )
        )

    def set_theme(self, theme: str) -> None:
        change = "theme => jupyterapp.commands.execute('apputils:change-theme', { theme })"
        self.page.evaluate(change, theme)
        light = str(theme.endswith("Light")).lower()
        expect(self.page.locator("body")).to_have_attribute("data-jp-theme-light", light)

    def barriers(self) -> list[str]:
        """The faults that axe finds in the panel, by the WCAG's level AA."""
        from axe_playwright_python.sync_playwright import Axe  # noqa: PLC0415

        # JupyterLab's body has no height, so axe would take all that is in it for hidden.
        self.page.add_style_tag(content="body { height: 100vh !important }")
        rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
        found = Axe().run(self.page, ".kitty-panel", rules).response
        passed = {rule["id"] for rule in found["passes"]}
        assert "color-contrast" in passed  # it has seen something
        return [
            f"{rule['id']} {part['html']}" for rule in found["violations"] for part in rule["nodes"]
        ]

    def expect_no_barriers(self) -> None:
        for theme in ("JupyterLab Dark", "JupyterLab Light"):
            self.set_theme(theme)
            assert self.barriers() == []

    def save(self) -> None:
        def is_save(response: Response) -> bool:
            return response.request.method == "PUT" and "/api/contents/" in response.url

        with self.page.expect_response(is_save):
            self.page.keyboard.press("Control+s")

    def choose(self, model: str) -> None:
        option = self.panel.locator(".kitty-model option", has_text=model).first
        self.panel.locator(".kitty-model select").select_option(value=option.get_attribute("value"))


def write_notebook(workspace: Path, *cells: str) -> str:
    """Write a notebook beside the usual ones; return its name."""
    name = f"test-{secrets.token_hex(4)}.ipynb"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    body = {
        "cells": [
            {
                "cell_type": "code",
                "id": f"c{index}",
                "metadata": {},
                "source": source,
                "outputs": [],
                "execution_count": None,
            }
            for index, source in enumerate(cells)
        ],
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (workspace / "notebooks" / name).write_text(json.dumps(body))
    return name


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """One for all tests: JupyterLab's megabytes of scripts are fetched and compiled once."""
    context = browser.new_context(viewport={"width": 1280, "height": 1400})
    context.set_default_timeout(120_000)  # a cold machine reads those megabytes first
    yield context
    context.close()


@pytest.fixture
def open_notebook(
    context: BrowserContext, lab: str, workspace: Path
) -> Iterator[Callable[..., Notebook]]:
    def open_(*cells: str, host: str = "127.0.0.1", address: str = lab) -> Notebook:
        name = "control_panel.ipynb"
        if cells:
            name = write_notebook(workspace, *cells)
        page = context.new_page()
        page.goto(address.format(f"notebooks/{name}").replace("127.0.0.1", host))
        expect(page.locator(".jp-CodeCell").first).to_be_visible(timeout=60_000)
        # A cell that is run before its kernel is there is not run.
        expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
        return Notebook(page)

    yield open_
    for page in context.pages:
        page.close()
    end_kernels(lab)


_FRONT_END = """async ([code, state]) => {
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  const { default: front } = await import(url);
  const heard = [];
  const model = {
    get: (name) => state[name],
    on: (event, hear) => heard.push([event, hear]),
    off: () => {},
    send: (message) => sent.push(message),
  };
  const fire = (event, news) => heard.forEach(([name, hear]) => name === event && hear(news));
  window.sent = [];
  window.tell = (message) => fire("msg:custom", message);
  window.set = (news) => fire("change", Object.assign(state, news));
  const parts = typeof front === "function" ? front() : front;
  parts.initialize?.({ model });
  parts.render({ model, el: document.body });
}"""
_LAB_PAGE = """<script id="jupyter-config-data" type="application/json">{"baseUrl": "/"}</script>"""


@pytest.fixture
def front_end(context: BrowserContext) -> Iterator[Callable[..., Page]]:
    """A widget's front end alone, for what gets lost on the way and where servers are elsewhere."""

    def show(widget: type[Any], **state: object) -> Page:
        def answer(route: Route) -> None:
            if route.request.url.endswith("/health"):
                route.fulfill(json={"status": "ok"})
            else:
                route.fulfill(body=_LAB_PAGE, content_type="text/html")

        page = context.new_page()
        page.route("http://lab.example/**", answer)
        page.goto("http://lab.example/")
        page.evaluate(_FRONT_END, [widget._esm, state])
        return page

    yield show
    for page in context.pages:
        page.close()


def test_the_control_notebook_starts_a_model_and_stops_it(
    open_notebook: Callable[..., Notebook],
) -> None:
    notebook = open_notebook()
    expect(notebook.page.locator(".jp-OutputArea-output")).to_have_count(0)
    notebook.run(0)
    notebook.expect_status("Not running")
    notebook.save()
    notebook.page.reload()
    notebook.expect_status("Not running")
    expect(notebook.button("Stop")).to_be_hidden()
    assert notebook.height() < 130
    notebook.choose("small")
    notebook.button("Start").press("Enter")
    expect(notebook.button("Stop")).to_be_focused()
    notebook.expect_status("Ready")
    assert notebook.height() < 260
    expect(notebook.panel.locator(".kitty-ask")).not_to_contain_text("not ready")
    expect(notebook.panel.locator(".kitty-address")).to_contain_text("http://127.0.0.1:")
    notebook.unfold("Log")
    expect(notebook.panel.locator(".kitty-activity")).to_contain_text("Model loaded")
    expect(notebook.panel.locator(".kitty-log")).to_contain_text("model loaded")
    pid = notebook.pid()
    notebook.choose("medium")
    notebook.button("Switch").click()
    expect(notebook.panel.locator(".kitty-status")).to_contain_text("medium", timeout=60_000)
    notebook.expect_status("Ready")
    notebook.button("Stop").click()
    notebook.expect_status("Not running")
    assert not psutil.pid_exists(pid)


@pytest.mark.slow
def test_the_panel_answers_and_its_chat_outlives_the_page_but_not_the_notebook(
    open_notebook: Callable[..., Notebook], workspace: Path
) -> None:
    notebook = open_notebook(
        "from kitty_nb import ControlPanel\npanel = ControlPanel()\npanel", "import time", ""
    )
    page, panel = notebook.page, notebook.panel
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    notebook.run(0)
    notebook.choose("small")
    notebook.button("Start").click()
    notebook.expect_status("Ready")
    question = panel.get_by_role("textbox", name="Question")
    answer = panel.get_by_role("group", name="Answer")
    question.click()
    page.keyboard.type("Who are you, dd x a?")  # keys that would delete, cut and add cells
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Well?")
    page.keyboard.press("Enter")
    expect(answer).to_contain_text("Hello! I am")
    expect(panel.locator(".kitty-ask-turn")).to_contain_text("tok/s")
    expect(panel.get_by_role("log", name="Chat")).to_have_attribute("aria-busy", "false")
    expect(question).to_be_focused()
    expect(page.locator(".jp-CodeCell")).to_have_count(3)
    notebook.expect_no_barriers()
    copy = panel.get_by_role("button", name="Copy as code")
    copy.click()
    expect(panel.get_by_role("button", name="Copied")).to_be_visible()
    notebook.cell(2).locator(".cm-content").click()
    page.keyboard.press("Control+v")
    notebook.run(2)
    expect(notebook.cell(2).locator(".jp-OutputArea-output")).to_contain_text("Hello! I am")
    notebook.cell(2).locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.evaluate("jupyterapp.commands.execute('notebook:clear-cell-output')")
    notebook.save()
    saved = max((workspace / "notebooks").glob("test-*.ipynb"), key=lambda one: one.stat().st_mtime)
    assert "Hello! I am" not in saved.read_text()
    page.reload()
    expect(answer).to_contain_text("Hello! I am")
    expect(question).to_be_visible()
    panel.get_by_role("button", name="New chat").click()
    expect(answer).to_have_count(0)
    notebook.button("Stop").click()
    notebook.expect_status("Not running")
    expect(question).to_be_hidden()


@pytest.mark.slow
@pytest.mark.parametrize("front_end", ["notebooks", "voila/render"])
def test_a_panel_works_in_other_front_ends(
    browser: Browser, lab: str, workspace: Path, front_end: str
) -> None:
    name = write_notebook(workspace, "from kitty_nb import ControlPanel\nControlPanel()")
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    page.set_default_timeout(120_000)
    page.goto(lab.replace("doc/tree", front_end).format(f"notebooks/{name}"))
    notebook = Notebook(page)
    if front_end == "notebooks":  # Voilà runs all cells by itself
        busy = ".jp-NotebookKernelStatus-info"  # it says nothing of one that is idle
        idle = page.locator(f".jp-NotebookKernelStatus-fade:not({busy})")
        expect(idle).to_be_attached(timeout=60_000)
        notebook.run(0)
    notebook.expect_status("Not running")
    notebook.choose("medium")
    notebook.button("Start").click()
    notebook.expect_status("Ready")
    notebook.panel.get_by_role("textbox", name="Question").fill("Who are you?")
    page.keyboard.press("Enter")
    answer = notebook.panel.get_by_role("group", name="Answer")
    expect(answer).to_contain_text("Hello! I am")
    notebook.button("Stop").click()
    notebook.expect_status("Not running")
    page.close()
    end_kernels(lab)


@pytest.mark.parametrize(
    "busy",
    [
        pytest.param(False, id="idle kernel", marks=pytest.mark.slow),
        pytest.param(True, id="kernel in time.sleep"),
    ],
)
def test_a_slow_load_is_seen_to_move_and_can_be_stopped(
    open_notebook: Callable[..., Notebook], hurry: Path, busy: bool
) -> None:
    notebook = open_notebook(
        "from kitty_nb import ControlPanel\nControlPanel(profile='slow')",
        "import time\ntime.sleep(120)",
    )
    notebook.run(0)
    notebook.expect_status("Not running")
    notebook.choose("medium")
    if busy:
        notebook.run(1, wait=False)
    notebook.button("Start").click()
    notebook.expect_status("Loading")
    expect(notebook.panel.locator(".kitty-load .kitty-bar-text")).to_contain_text("%")
    seen: list[float] = []

    def moved() -> bool:
        now = notebook.progress()
        if max(seen, default=-1) < now < 100:
            seen.append(now)
        return len(seen) >= 5

    eventually(moved, within=30, why="the bar stands still")
    hurry.touch()
    notebook.expect_status("Ready")
    expect(notebook.panel.locator(".kitty-load")).to_be_hidden()
    hurry.unlink()
    notebook.button("Stop").click()
    notebook.expect_status("Not running")
    notebook.button("Start").click()
    notebook.expect_status("Loading")
    notebook.button("Stop").click()
    notebook.expect_status("Not running")
    if busy:
        expect(notebook.cell(1).locator(".jp-InputPrompt")).to_have_text("[*]:")


@pytest.mark.slow
def test_the_panel_serves_keyboards_screen_readers_and_weak_eyes(
    open_notebook: Callable[..., Notebook], hurry: Path
) -> None:
    notebook = open_notebook("from kitty_nb import ControlPanel\nControlPanel(profile='slow')")
    notebook.run(0)
    notebook.expect_status("Not running")
    panel, page = notebook.panel, notebook.page
    region = page.get_by_role("region", name="kitty_nb control panel of the profile slow")
    expect(region).to_be_visible()
    fold = panel.get_by_role("button", name="Get a model")
    fold.focus()
    page.keyboard.press("Enter")
    expect(panel.get_by_label("Repository")).to_be_visible()
    expect(fold).to_have_attribute("aria-expanded", "true")
    page.keyboard.press(" ")
    expect(panel.get_by_label("Repository")).to_be_hidden()
    notebook.unfold("Settings")
    expect(panel.get_by_label("Context")).to_have_attribute(
        "title", re.compile("Context size in tokens")
    )
    panel.locator(".kitty-tip").focus()
    expect(panel.get_by_role("tooltip")).to_contain_text("KV cache")
    expect(notebook.cell(0).locator(".jp-InputPrompt")).to_have_text("[1]:")
    notebook.expect_no_barriers()
    notebook.choose("medium")
    page.evaluate("document.hasFocus = () => false")  # somebody looks elsewhere meanwhile
    notebook.button("Start").click()
    bar = panel.get_by_role("progressbar").first
    expect(bar).to_have_attribute("aria-valuenow", re.compile(r"^[1-9]\d$"))
    expect(bar).to_have_attribute("aria-valuetext", re.compile("loading weights"))
    expect(panel.locator(".kitty-accessible [role=status]")).to_have_text("Loading")
    page.evaluate("const now = performance.now(); performance.now = () => now + 20_000")
    hurry.touch()
    notebook.expect_status("Ready")
    expect(panel.locator(".kitty-accessible [role=status]")).to_have_text("Ready")
    expect(page).to_have_title("Ready: medium")
    page.evaluate("window.dispatchEvent(new Event('focus'))")
    expect(page).not_to_have_title("Ready: medium")
    notebook.expect_no_barriers()
    size = page.viewport_size
    page.set_viewport_size({"width": 640, "height": 700})  # as with a zoom of 200 %
    question = panel.get_by_role("textbox", name="Question")
    question.scroll_into_view_if_needed()
    question.fill("Who are you?")
    expect(panel.get_by_role("button", name="Ask", exact=True)).to_be_enabled()
    notebook.expect_no_barriers()
    page.set_viewport_size(size)
    psutil.Process(notebook.pid()).send_signal(signal.SIGSEGV)
    notebook.expect_status("Restarting")
    expect(panel.get_by_role("alert").first).to_contain_text("SIGSEGV")
    expect(panel.locator(".kitty-activity .ansi-yellow-fg").last).to_contain_text("SIGSEGV")
    notebook.expect_no_barriers()
    notebook.button("Cancel").press("Enter")
    notebook.expect_status("Not running")
    expect(notebook.button("Start")).to_be_focused()


@pytest.mark.slow
def test_a_panel_without_its_kernel_says_what_to_run(
    open_notebook: Callable[..., Notebook],
) -> None:
    notebook = open_notebook("from kitty_nb import ControlPanel\nControlPanel()")
    notebook.run(0)
    notebook.expect_status("Not running")
    restart = "jupyterapp.shell.currentWidget.sessionContext.restartKernel()"
    notebook.page.evaluate(f"() => {restart}")
    expect(notebook.panel.get_by_role("alert").first).to_contain_text("Run the cell again")
    notebook.run(0)
    notebook.expect_status("Not running")
    expect(notebook.panel.locator(".kitty-gone")).to_have_count(0)


@pytest.mark.slow
def test_a_narrow_panel_shows_what_is_chosen_and_no_idle_scrollbar(
    open_notebook: Callable[..., Notebook],
) -> None:
    notebook = open_notebook("from kitty_nb import ControlPanel\nControlPanel()")
    notebook.run(0)
    notebook.expect_status("Not running")
    row = notebook.panel.locator(".kitty-picker")
    for width in (1280, 350):  # the latter is 700 at 200 %
        notebook.page.set_viewport_size({"width": width, "height": 1400})
        select = row.locator("select").bounding_box()
        panel = notebook.panel.bounding_box()
        assert select
        assert panel
        assert select["width"] > min(panel["width"] * 0.6, 600)
        assert row.evaluate("row => getComputedStyle(row).overflowY") == "visible"


@pytest.mark.slow
def test_a_failure_is_explained_in_the_panel(
    open_notebook: Callable[..., Notebook], workspace: Path
) -> None:
    broken = workspace / "models" / "broken.gguf"
    whole = (workspace / "models" / "small.gguf").read_bytes()
    head, key, rest = whole.partition(b"tokenizer.ggml.model")
    broken.write_bytes(head + key + rest.replace(b"llama", b"lemur", 1))  # only an engine minds
    try:
        notebook = open_notebook("from kitty_nb import ControlPanel\nControlPanel()")
        notebook.run(0)
        notebook.choose("broken")
        notebook.button("Start").click()
        notebook.expect_status("Crashed")
        expect(notebook.panel.locator(".kitty-notice-row")).to_contain_text("lemur")
        expect(notebook.panel.locator(".kitty-log-error").first).to_be_visible()
        notebook.expect_no_barriers()
    finally:
        broken.unlink()


@pytest.mark.slow
def test_the_log_filters_pauses_and_survives_a_reload(
    open_notebook: Callable[..., Notebook],
) -> None:
    notebook = open_notebook("from kitty_nb import ControlPanel\nControlPanel()")
    notebook.run(0)
    notebook.choose("small")
    notebook.button("Start").click()
    notebook.expect_status("Ready")
    notebook.unfold("Log")
    lines = notebook.panel.locator(".kitty-log-line:visible")
    others = lines.filter(has_not_text="listening")
    expect(others.first).to_be_visible()
    notebook.panel.get_by_placeholder("Filter").fill("listening")
    expect(others).to_have_count(0)
    expect(lines.first).to_be_visible()
    notebook.panel.get_by_placeholder("Filter").fill("")
    notebook.button("Pause").click()
    expect(notebook.button("Follow")).to_be_visible()
    notebook.save()
    notebook.page.reload()
    expect(notebook.panel.locator(".kitty-badge")).to_have_text("Ready", timeout=60_000)
    expect(notebook.panel.locator(".kitty-log")).to_contain_text("listening on")
    notebook.button("Stop").click()
    notebook.expect_status("Not running")


@pytest.mark.slow
def test_a_fleet_is_started_and_stopped_while_a_cell_keeps_the_kernel_busy(
    open_notebook: Callable[..., Notebook], workspace: Path
) -> None:
    port = unused_port()
    (workspace / "fleet.env").write_text(
        f"{(workspace / '.env').read_text()}LLAMACPP_PRIMARY_MODEL=small.gguf\n"
        f"LLAMACPP_CODER_MODEL=medium.gguf\nLLAMACPP_CODER_PORT={port}\n"
    )
    notebook = open_notebook(
        "from kitty_nb.widgets import FleetPanel\nFleetPanel('../fleet.env')",
        "import time\ntime.sleep(120)",
    )
    notebook.run(0)
    fleet = notebook.page.locator(".kitty-fleet")
    rows = fleet.locator(".kitty-fleet-row")
    expect(rows.locator(".kitty-badge")).to_have_text(["Not running", "Not running"])
    notebook.run(1, wait=False)
    for profile in ("primary", "coder"):
        fleet.get_by_title(f"Start {profile}", exact=True).click()
    expect(rows.locator(".kitty-badge")).to_have_text(["Ready", "Ready"], timeout=60_000)
    expect(rows.locator(".kitty-fleet-memory").first).to_contain_text("MB")
    expect(fleet.get_by_title("Start primary", exact=True)).to_be_disabled()
    fleet.get_by_role("button", name="Stop all").click()
    expect(rows.locator(".kitty-badge")).to_have_text(
        ["Not running", "Not running"], timeout=60_000
    )
    expect(notebook.cell(1).locator(".jp-InputPrompt")).to_have_text("[*]:")


# As Safari does.
_ONLY_WITHIN_THE_CLICK = """() => {
  for (const name of ["write", "writeText"]) {
    const usual = navigator.clipboard[name].bind(navigator.clipboard);
    navigator.clipboard[name] = async (what) => {
      if (window.event?.type !== "click") throw new DOMException("", "NotAllowedError");
      await usual(what);
    };
  }
  document.execCommand = () => false;
}"""


@pytest.mark.slow
def test_what_is_offered_for_copying_runs_and_the_key_is_copied(
    open_notebook: Callable[..., Notebook], workspace: Path
) -> None:
    notebook = open_notebook("from kitty_nb import ControlPanel\nControlPanel()", "")
    panel, page = notebook.panel, notebook.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    notebook.run(0)
    notebook.choose("small")
    notebook.button("Start").click()
    notebook.expect_status("Ready")
    panel.get_by_role("button", name="Copy code").click()
    expect(panel.get_by_role("button", name="Copied")).to_be_visible()
    code = page.evaluate("navigator.clipboard.readText()")
    notebook.cell(1).locator(".cm-content").click()
    page.keyboard.insert_text(f"{code}\nkey")
    page.keyboard.press("Control+Enter")
    result = notebook.cell(1).locator(".jp-OutputArea-executeResult pre")
    expect(result).to_have_text(re.compile("'.+'"))
    key = result.inner_text().strip("'\n")
    answers = notebook.cell(1).locator(".jp-OutputArea-output pre").first
    assert answers.inner_text().count("Hello! I am the kitty_nb demo model") >= 2
    page.evaluate(_ONLY_WITHIN_THE_CLICK)
    panel.get_by_role("button", name="Copy key").click()
    eventually(lambda: page.evaluate("navigator.clipboard.readText()") == key)
    panel.get_by_text("Copy for…").click()
    panel.get_by_role("button", name="OpenAI's Python client", exact=True).click()
    eventually(lambda: "import OpenAI" in page.evaluate("navigator.clipboard.readText()"))
    assert key not in panel.inner_html()
    notebook.button("Stop").click()
    notebook.expect_status("Not running")


@pytest.mark.slow
def test_the_servers_own_web_page_opens_through_jupyterlab(
    open_notebook: Callable[..., Notebook],
) -> None:
    """Seen from another machine, where only JupyterLab's own address can be reached."""
    notebook = open_notebook(
        "from kitty_nb import ControlPanel\npanel = ControlPanel()\npanel",
        "print(panel.manager.reveal_api_key())",
        host="elsewhere.example",
    )
    notebook.run(0)
    notebook.choose("small")
    notebook.button("Start").click()
    notebook.expect_status("Ready")
    notebook.run(1)
    key = notebook.cell(1).locator(".jp-OutputArea-output pre").inner_text().strip()
    link = notebook.panel.locator(".kitty-address a")
    at = r"http://elsewhere\.example:\d+/user/ann/proxy/\d+/"
    expect(link).to_have_attribute("href", re.compile(f"^{at}$"))
    with notebook.page.expect_popup() as opened:
        link.click()
    page = opened.value
    page.get_by_text("Enter API Key").click()
    page.locator("input[type=password]").fill(key)
    page.keyboard.press("Enter")
    page.locator("textarea").first.fill("Who are you?")
    page.keyboard.press("Enter")
    expect(page.locator("body")).to_contain_text("Hello! I am the kitty_nb demo model")
    page.close()
    notebook.button("Stop").click()
    notebook.expect_status("Not running")
    expect(link).to_be_hidden()


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "elsewhere.example"])
def test_without_a_proxy_the_link_is_shown_where_it_can_work(
    open_notebook: Callable[..., Notebook], lab_without_proxy: str, host: str
) -> None:
    cell = "from kitty_nb import ControlPanel\nControlPanel()"
    notebook = open_notebook(cell, host=host, address=lab_without_proxy)
    notebook.run(0)
    notebook.choose("small")
    notebook.button("Start").click()
    notebook.expect_status("Ready")
    line = notebook.panel.locator(".kitty-address")
    expect(line).to_be_visible()
    if host == "127.0.0.1":
        expect(line.locator("a")).to_have_attribute("href", re.compile(r"^http://127.0.0.1:\d+/$"))
    else:
        expect(line).to_contain_text("pip install jupyter-server-proxy")
        expect(line.locator("a")).to_have_count(0)
    notebook.button("Stop").click()
    notebook.expect_status("Not running")


_GIVE_PICTURE = """async (area, [kind, url, words]) => {
  const data = new DataTransfer();
  const blob = await (await fetch(url)).blob();
  data.items.add(new File([blob], "red.png", { type: blob.type }));
  if (words) data.setData("text/plain", words);
  const event =
    kind === "paste"
      ? new ClipboardEvent(kind, { clipboardData: data, bubbles: true, cancelable: true })
      : new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
  return !area.dispatchEvent(event);
}"""


@pytest.mark.slow
def test_pictures_are_dropped_and_pasted_into_the_question(
    open_notebook: Callable[..., Notebook], workspace: Path
) -> None:
    model = write_demo_model(workspace / "seeing" / "demo.gguf")
    write_projector(model.with_name("mmproj-F16.gguf"), DEMO_WIDTH)
    notebook = open_notebook('from kitty_nb import ControlPanel\nControlPanel(profile="seeing")')
    notebook.run(0)
    notebook.choose("demo")
    notebook.button("Start").click()
    notebook.expect_status("Ready")
    panel = notebook.panel
    question = panel.get_by_role("textbox", name="Question")
    expect(panel.get_by_role("button", name="Add picture")).to_be_visible()
    for count, (kind, words) in enumerate([("drop", ""), ("paste", ""), ("paste", "red.png")], 1):
        assert question.evaluate(_GIVE_PICTURE, [kind, png(), words])
        expect(panel.get_by_role("img", name="red.png")).to_have_count(count)
    assert not question.evaluate(_GIVE_PICTURE, ["paste", png(), "A table"])  # the browser's turn
    question.fill("What are these?")
    question.press("Enter")
    expect(panel.get_by_role("group", name="Answer")).to_contain_text("Hello! I am")
    expect(panel.get_by_role("img", name="Picture of the question")).to_have_count(3)
    expect(panel.get_by_role("log", name="Chat")).to_have_attribute("aria-busy", "false")
    notebook.button("Stop").click()
    notebook.expect_status("Not running")


@pytest.mark.slow
def test_one_of_five_hundred_models_is_found(
    open_notebook: Callable[..., Notebook], workspace: Path
) -> None:
    for number in range(500):
        write_header(
            workspace / "many" / f"m-{number:03}.gguf",
            general__name=f"Model {number:03}",
            general__base_model__count=1,
            general__base_model__0__name=f"Base {number % 50}",
        )
    notebook = open_notebook("from kitty_nb import ControlPanel\nControlPanel(profile='many')")
    notebook.run(0)
    panel = notebook.panel
    expect(panel.locator(".kitty-model option")).to_have_count(500)
    notebook.unfold("All models")
    rows = panel.locator(".kitty-row:visible")
    expect(rows).to_have_count(500)
    filter_box = panel.get_by_placeholder("Search by name")
    filter_box.press_sequentially("base 7")
    expect(rows).to_have_count(sum("7" in f"{number % 50} {number:03}" for number in range(500)))
    filter_box.press_sequentially(" 457")
    expect(rows).to_have_count(1)
    rows.click()
    expect(panel.locator(".kitty-model option:checked")).to_contain_text("m-457")


@pytest.mark.slow
def test_a_model_is_found_by_typing_and_chosen_by_keys(
    open_notebook: Callable[..., Notebook], workspace: Path
) -> None:
    evil = [workspace / "models" / f"evil-{size}.gguf" for size in ("7B", "32B")]
    for path in evil:
        write_header(
            path,
            general__name=f"<b>Evil</b> {path.stem}",
            general__base_model__count=1,
            general__base_model__0__name="<i>Evil</i>",
            tokenizer__chat_template="{{ messages }}<script>document.title = 'evil'</script>",
        )
    notebook = open_notebook("from kitty_nb import ControlPanel\nControlPanel()")
    notebook.run(0)
    panel, page = notebook.panel, notebook.page
    notebook.unfold("All models")
    rows = panel.locator(".kitty-row:visible")
    expect(rows).to_have_count(4)
    expect(panel.locator(".kitty-family:visible", has_text="<i>Evil</i>")).to_be_visible()
    expect(panel.locator(".kitty-row", has_text="small")).to_contain_text("fits")
    filter_box = panel.get_by_placeholder("Search by name")
    filter_box.press_sequentially("evil 32b")
    expect(rows).to_have_count(1)
    filter_box.press("ArrowDown")
    page.keyboard.press("Enter")
    chosen = panel.locator(".kitty-row[aria-selected='true']")
    expect(chosen).to_contain_text("evil-32B")
    expect(panel.locator(".kitty-model option:checked")).to_contain_text("evil-32B")
    notebook.unfold("Details")
    expect(panel.locator(".kitty-model-facts")).to_contain_text("<b>Evil</b> evil-32B")
    expect(panel.locator(".kitty-template")).to_contain_text("<script>document.title")
    assert page.title() != "evil"
    notebook.save()
    filter_box.fill("nothing like it")
    expect(panel.locator(".kitty-table-empty")).to_be_visible()
    filter_box.fill("")
    panel.locator(".kitty-row", has_text="medium").locator(".kitty-star").click()
    expect(rows.first).to_contain_text("medium")
    expect(chosen).to_contain_text("evil-32B")
    rows.filter(has_text="small").click()
    expect(panel.locator(".kitty-model-facts")).to_contain_text("small.gguf")
    page.reload()
    expect(panel.locator(".kitty-badge")).to_have_text("Not running", timeout=60_000)
    notebook.unfold("All models")
    expect(chosen).to_contain_text("small")
    for path in evil:
        path.unlink()
    saved = (workspace / "notebooks").glob("test-*.ipynb")
    assert all("document.title" not in notebook.read_text() for notebook in saved)


@pytest.mark.slow
def test_a_sweep_fills_its_table_and_can_be_paused_while_a_cell_runs(
    open_notebook: Callable[..., Notebook],
) -> None:
    notebook = open_notebook(
        "import anyio\nfrom kitty_nb.experiments import Sweep\n"
        "sweep = Sweep(['small.gguf'], {'threads': [1, 2, 3]}, repeats=2, max_tokens=8)\n"
        "measure = sweep._measure\n"
        "async def the_second_waits_for_the_pause(*args):\n"
        "    while len(sweep._rows) == 1 and not sweep.progress.paused:\n"
        "        await anyio.sleep(0.01)\n"
        "    return await measure(*args)\n"
        "sweep._measure = the_second_waits_for_the_pause\n"
        "sweep",
        "import time\ntime.sleep(120)",
    )
    notebook.run(0)
    notebook.expect_status("Not started")
    rows = notebook.panel.locator(".kitty-sweep-table tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.filter(has_text="waiting")).to_have_count(3)
    notebook.run(1, wait=False)
    notebook.button("Start").click()
    expect(rows.filter(has_text="MB").first).to_be_visible(timeout=60_000)
    expect(notebook.panel.locator(".kitty-now")).to_contain_text("small.gguf")
    notebook.button("Pause").click()
    notebook.expect_status("Paused")
    expect(notebook.panel.get_by_text("2 of 6 trials")).to_be_visible()
    expect(notebook.cell(1).locator(".jp-InputPrompt")).to_have_text("[*]:")
    notebook.button("Resume").click()
    notebook.expect_status("Done")
    expect(notebook.panel.get_by_text("6 of 6 trials")).to_be_visible()
    expect(rows.filter(has_text="done")).to_have_count(3)
    expect(rows.filter(has_text="★")).to_have_count(1)
    notebook.page.set_viewport_size({"width": 700, "height": 1400})
    assert notebook.barriers() == []
    notebook.button("Use the best").click()
    expect(notebook.panel.locator(".kitty-lines")).to_contain_text("LLAMACPP_PRIMARY_THREADS=")


def test_a_page_without_a_clipboard_copies_or_says_that_it_did_not(
    front_end: Callable[..., Page],
) -> None:
    page = front_end(
        Address, endpoint="http://127.0.0.1:8080", asks_key=True, programs=[["curl", "curl"]]
    )
    page.evaluate("window.setTimeout = () => {}")  # the buttons keep saying what happened
    page.get_by_role("button", name="Copy address").press("Enter")
    expect(page.get_by_role("button", name="Copied")).to_be_focused()
    page.evaluate("document.execCommand = () => false")
    page.get_by_role("button", name="Copy code").click()
    (asked,) = page.evaluate("sent")
    page.evaluate("message => tell(message)", {**asked, "text": "print()"})
    refused = page.get_by_role("button", name="Not copied")
    expect(refused).to_have_attribute("title", re.compile("https or from localhost"))
    page.get_by_role("button", name="Copy key").click()
    asked = page.evaluate("sent")[-1]
    page.evaluate("message => tell(message)", {**asked, "problem": "The server is STOPPED."})
    expect(refused.first).to_have_attribute("title", "The server is STOPPED.")


def test_the_link_leads_to_no_other_server_with_the_same_port(
    front_end: Callable[..., Page],
) -> None:
    page = front_end(Address, endpoint="http://gpu.example:8080", asks_key=False, programs=[])
    link = page.get_by_role("link", name="Web page")
    expect(link).to_have_attribute("href", "http://gpu.example:8080/")
    expect(link).to_have_attribute("title", "The server's own page")
    page.evaluate("set({ endpoint: 'http://127.0.0.1:8080/llm' })")
    expect(link).to_have_attribute("href", "http://lab.example/proxy/8080/llm/")


_TELL = "message => tell(message)"
_READY = {"kind": "facts", "ready": True, "hint": "", "prompt": "Ask demo", "sees": False}


@pytest.fixture
def ask_box(front_end: Callable[..., Page]) -> Page:
    """The front end of *Ask*, with a model that is ready."""
    page = front_end(Ask)
    page.evaluate(_TELL, _READY)
    page.evaluate("sent.splice(0)")
    return page


def test_pictures_are_refused_until_another_model_takes_them(ask_box: Page) -> None:
    page = ask_box
    question = page.get_by_role("textbox", name="Question")
    assert question.evaluate(_GIVE_PICTURE, ["drop", png(), ""])
    hint = page.get_by_text("This model takes no pictures")
    expect(hint).to_be_visible()
    page.evaluate(_TELL, {**_READY, "sees": True})
    expect(hint).to_have_count(0)


def test_a_question_stays_in_its_box_until_the_kernel_has_the_one_before(ask_box: Page) -> None:
    page = ask_box
    question, asking = page.get_by_role("textbox", name="Question"), page.get_by_text("Asking…")
    for place, text in enumerate(("One?", "Two?")):
        question.fill(text)
        question.press("Enter")
        expect(question).to_have_value("")
        question.fill("Next?")
        question.press("Enter")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(question).to_have_value("Next?")
        expect(asking).to_be_visible()
        assert page.evaluate("sent.splice(0)") == [{"kind": "ask", "text": text, "pictures": []}]
        turn = Turn(text)
        for told in (turn.whole, turn.news):
            turns = [{"turn": place, **told()}]
            page.evaluate(_TELL, {"kind": "turns", "chat": 0, "turns": turns})
            expect(asking).to_have_count(0)
            turn.end()


def test_a_question_that_never_arrives_returns_to_its_box(ask_box: Page) -> None:
    page = ask_box
    page.clock.install()
    question = page.get_by_role("textbox", name="Question")
    lost = page.get_by_text("has not answered")
    for _ in range(2):
        question.fill("One?")
        question.press("Enter")
        expect(question).to_have_value("")
        assert page.evaluate("sent.splice(0).length") == 1
        page.clock.fast_forward(11_000)
        expect(lost).to_be_visible()
        expect(question).to_have_value("One?")
    turns = [{"turn": 0, **Turn("One?").whole()}]
    page.evaluate(_TELL, {"kind": "turns", "chat": 0, "turns": turns})
    expect(lost).to_have_count(0)


def test_the_rows_of_a_fleet_have_their_order_and_keep_the_focus(
    front_end: Callable[..., Page],
) -> None:
    def rows(*names: str) -> list[dict[str, Any]]:
        words = {"status": "Ready", "tone": "good", "model": "demo", "port": 8080}
        return [asdict(FleetRow(profile=name, stop=True, **words)) for name in names]

    words = {"notice": "", "each": "Replica", "rescans": "Ask all workers again"}
    page = front_end(FleetPanel, rows=rows("router", "coder"), **words)
    expect(page.get_by_role("columnheader").first).to_have_text("Replica")
    expect(page.get_by_title("Ask all workers again")).to_be_visible()
    stop = page.get_by_title("Stop coder", exact=True)
    stop.focus()
    for names in (
        ("router", "router: one", "router: two", "coder"),
        ("coder", "router", "router: two"),
        ("router", "coder"),
    ):
        page.evaluate("rows => set({ rows })", rows(*names))
        expect(page.locator(".kitty-fleet-profile")).to_have_text([*names])
        expect(stop).to_be_focused()


def test_a_page_that_missed_lines_of_the_log_asks_for_them(
    front_end: Callable[..., Page], sent: list[tuple[str, dict[str, Any]]]
) -> None:
    log, page = ServerLog(lambda: None), front_end(ServerLog)

    def flush(*lines: str, lost: bool = False) -> None:
        sent.clear()
        log.append(lines)
        log.flush()
        for _, data in sent:
            if not lost:
                page.evaluate("message => tell(message)", data["content"])

    def expect_asked(*messages: dict[str, str]) -> None:
        assert page.evaluate("sent.splice(0)") == [*messages]
        for message in messages:
            log.receive(message)

    expect_asked({"kind": "replay", "part": "lines"})
    shown = page.locator(".kitty-log-line")
    flush("one", "two")
    flush("three", lost=True)
    flush("four")
    expect(shown).to_have_text(["one", "two"])
    expect_asked({"kind": "replay"})
    flush("five")
    expect(shown).to_have_text(["one", "two", "three", "four", "five"])
    flush(*map(str, range(LINES_KEPT + 5)))
    expect(shown).to_have_count(LINES_KEPT)
    expect(shown.first).to_have_text("5")
    expect_asked()
