"""Seconds and clicks from `kitty-nb lab` to the first answer in the panel's *Ask*.

A fresh folder contains only a model and a `.env` file, and a headless Chromium does what a newcomer
does. The browser's own start is measured beside it: `python -m benchmarks.first_minutes
[--engine PATH] [--model PATH]`. Needs Playwright and Chromium, as the browser tests do.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from playwright.sync_api import expect, sync_playwright

from benchmarks.subject import read_subject
from kitty_nb import write_demo_model
from kitty_nb.network import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Locator, Playwright

    from benchmarks.subject import Subject

_KITTY_NB = [sys.executable, "-m", "kitty_nb.cli"]
_RUNS = 3
_MOST_CLICKS, _MOST_SECONDS = 3, 20.0
_QUESTION = "Say hello."
_NOTEBOOK = "notebooks/control_panel.ipynb"


def main() -> None:
    """Print the table; exit with 1 if it takes more time or clicks than allowed."""
    subject = read_subject(__doc__)
    print(f"{subject}\n")
    figures: dict[str, list[float]] = {}
    clicks = 0
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        for _ in range(_RUNS):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                moments, clicks = _first_minutes(playwright, subject, Path(folder))
            for name, seconds in moments.items():
                figures.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in figures.items()}
    for name, median in medians.items():
        worst = max(figures[name])
        print(f"{name:<40}{median:7.1f} s (median of {_RUNS}, at most {worst:.1f} s)")
    print(f"{'clicks':<40}{clicks:5}")
    seconds = [*medians.values()][-1]
    sys.exit(clicks > _MOST_CLICKS or seconds > _MOST_SECONDS)


def _first_minutes(
    playwright: Playwright, subject: Subject, folder: Path
) -> tuple[dict[str, float], int]:
    """Return the seconds until each moment, and the number of clicks."""
    (folder / "models").mkdir()
    if subject.model:
        (folder / "models" / subject.model.name).symlink_to(subject.model)
    else:
        write_demo_model(folder / "models" / "demo.gguf")
    engine = f"LLAMACPP_BIN={subject.binary}\n" if subject.binary else ""
    (folder / ".env").write_text(
        "LLAMACPP_MODELS_DIR=models\n"
        "LLAMACPP_LOG_DIR=logs\n"
        "LLAMACPP_HISTORY=history.sqlite3\n"
        f"LLAMACPP_PORT={free_port()}\n{engine}"
    )
    began = time.monotonic()
    browser = playwright.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
    moments = {"the browser's own start": time.monotonic() - began}
    try:
        with _lab(folder) as (began, address):
            clicks = _newcomer(browser, address, began, moments)
    finally:
        browser.close()
    return moments, clicks


def _newcomer(browser: Browser, address: str, began: float, moments: dict[str, float]) -> int:
    """Ask a question, note each moment, and return the number of clicks."""
    clicks = 0

    def note(moment: str) -> None:
        moments[moment] = time.monotonic() - began

    def click(target: Locator) -> None:
        nonlocal clicks
        clicks += 1
        target.click()

    note("JupyterLab answers")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
    note("the notebook is open, its kernel idle")
    click(page.locator(".jp-CodeCell .cm-content").first)
    page.keyboard.press("Shift+Enter")
    panel = page.locator(".kitty-panel")
    start = panel.locator("button:visible", has_text=re.compile(r"^\s*Start$"))
    expect(start).to_be_enabled()
    note("the panel offers Start")
    click(start)
    expect(panel.locator(".kitty-badge")).to_have_text("Ready")
    note("the model is ready")
    click(panel.get_by_role("textbox", name="Question"))
    page.keyboard.type(_QUESTION)
    page.keyboard.press("Enter")
    expect(panel.get_by_role("group", name="Answer")).to_have_text(re.compile(r"\S"))
    note("the answer begins")
    return clicks


@contextmanager
def _lab(folder: Path) -> Iterator[tuple[float, str]]:
    """Run `kitty-nb lab` in a folder; yield the time of its start, and the notebook's address."""
    port, token = free_port(), secrets.token_hex(16)
    own = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    # The user's own model, port or engine would override the folder's.
    others = {name: text for name, text in os.environ.items() if not name.startswith("LLAMACPP_")}
    command = [*_KITTY_NB, "lab", "--no-browser", f"--port={port}"]
    address = f"http://127.0.0.1:{port}"
    with (folder / "lab.log").open("w") as log:
        began = time.monotonic()
        lab = subprocess.Popen(
            [*command, f"--IdentityProvider.token={token}"],
            cwd=folder,
            env=others | own,
            stdout=log,
            stderr=log,
        )
        try:
            while not _answers(f"{address}/api"):
                assert lab.poll() is None, (folder / "lab.log").read_text()
                time.sleep(0.05)
            yield began, f"{address}/lab/tree/{_NOTEBOOK}?token={token}"
        finally:
            lab.terminate()
            lab.wait()
            stop = [*_KITTY_NB, "stop", "--force"]  # a panel's server outlives its kernel
            subprocess.run(stop, cwd=folder, env=others, capture_output=True, check=False)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


def _chromium() -> str | None:
    """Return this machine's own browser; None for the one that Playwright has installed."""
    return shutil.which("chromium") or shutil.which("google-chrome")


if __name__ == "__main__":
    main()
