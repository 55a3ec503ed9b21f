"""The notebooks as a reader meets them: JupyterLab in a browser, without a screen. Skipped where there is no browser.

REALIGN_SCREENSHOTS=DIR keeps a picture of each thing that is looked at, in the light and in the dark theme.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; make test installs it")
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
PATIENCE = 180_000  # ms; the machine may be busy
pytestmark = [pytest.mark.seconds(60),
              pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)}; on Debian: apt-get install chromium")]

WRONG = "def questions(p, half):\n    return 1.96 * p * (1 - p) / half**2"
RIGHT = "def questions(p, half):\n    return math.ceil((1.96 / half) ** 2 * p * (1 - p))"


def smoke_copy(source: Path, target: Path) -> None:
    "The notebook as it is in the repository, without outputs, and with a budget of a few steps."
    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", ()):
            assert 'budget = "full"' in cell.source
            cell.source = cell.source.replace('budget = "full"', 'budget = "smoke"')
    target.parent.mkdir(parents=True)
    nbformat.write(notebook, target)


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab server on a copy of the quickstart: its address, and the folder of its runs."
    top = tmp_path
    smoke_copy(ROOT / "nbs/start/00_quickstart.ipynb", top / "nbs/start/00_quickstart.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = {name: str(top / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "REALIGN_RUNS")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={top / 'nbs'}",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | own  # figures appear in the page, as for readers
    with open(top / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, top / "log")
        yield f"http://127.0.0.1:{port}/lab/tree/start/00_quickstart.ipynb?reset&token={token}", top / "REALIGN_RUNS"
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    "Return when the server answers."
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture
def page(lab):
    "The quickstart, open in the browser, with every cell run from the menu."
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.goto(lab[0])
        _wait_for_the_kernel(page, lab[0])
        choose(page, "Run", "Run All Cells")
        cell(page, "asked = attempt(").get_by_text("[196, 784]").wait_for(state="attached")  # the last cell that is run
        yield page
        browser.close()


def _wait_for_the_kernel(page, address: str) -> None:
    "Return when the page is connected to an idle kernel: before that, the lab would ask for one."
    kernels = re.sub(r"/lab/tree/.*(?=token=)", "/api/kernels?", address)
    for _ in range(PATIENCE // 500):
        page.wait_for_timeout(500)
        found = json.load(urllib.request.urlopen(kernels, timeout=30))
        if any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in found):
            return
    pytest.fail("no kernel came up")


def choose(page, menu: str, *entries: str) -> None:
    "Click through the menu bar."
    page.get_by_role("menuitem", name=menu, exact=True).click()
    for name in entries:
        label = page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{name}$"))
        page.locator(".lm-Menu-item").filter(has=label).click()


def cell(page, source: str):
    "The code cell that contains `source`."
    return page.locator(".jp-CodeCell").filter(has=page.locator(".jp-InputArea", has_text=source)).first


def show(page, what) -> dict:
    "Scroll until `what` is in sight; its box. Cells get their height when they come into sight, so once is not enough."
    for _ in range(20):
        what.evaluate("element => element.scrollIntoView({block: 'center'})")
        page.wait_for_timeout(200)
        box = what.bounding_box()
        if box and 0 < box["y"] + box["height"] / 2 < 900:
            return box
    pytest.fail("does not come into sight")


def look(page, name: str) -> None:
    "Keep a picture, if somebody wants to see it."
    if folder := os.environ.get("REALIGN_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(500)
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_a_reader_runs_the_quickstart(page, lab):
    "One visit, since starting the lab and the page takes longest: the table, the curves, a wrong answer, the dark theme."
    table_and_curves_appear(page)
    a_wrong_answer_explains_itself_and_a_right_one_is_remembered(page, lab[1] / "progress.json")
    figures_can_be_read_in_the_dark_theme(page)


def table_and_curves_appear(page) -> None:
    assert page.locator(".jp-OutputArea-output").filter(has_text="Traceback").count() == 0
    table = cell(page, "table = Rows(").locator("table")
    show(page, table)
    assert {"held-out prompts", "base", "after SFT", "after DPO", "control"} <= set(table.locator("th").all_inner_texts())
    assert "right, word for word" in table.inner_text()
    look(page, "table")
    for source in ("taught = fit(", "figure, axis = plt.subplots"):
        box = show(page, cell(page, source).locator(".jp-OutputArea img, .jp-OutputArea-output svg").last)
        assert box["width"] > 200 and box["height"] > 100, source
        look(page, "curves" if "fit" in source else "chart")


def answer(page, source: str):
    "Replace the stub, run it and the two cells below it; returns the check's cell."
    stub, check = cell(page, "def questions(p, half)"), cell(page, "asked = attempt(")
    show(page, stub)
    stub.locator(".cm-content").click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(source)
    prompt = check.locator(".jp-InputPrompt")
    before = prompt.inner_text()
    for _ in range(3):
        page.keyboard.press("Shift+Enter")
    page.wait_for_function("([prompt, old]) => /\\d/.test(prompt.innerText) && prompt.innerText != old",
                           arg=[prompt.element_handle(), before])
    return check


def a_wrong_answer_explains_itself_and_a_right_one_is_remembered(page, kept: Path) -> None:
    error = answer(page, WRONG).locator(".jp-OutputArea-output", has_text="WrongAnswer")
    error.wait_for()
    show(page, error)
    said = " ".join(error.text_content().split())
    assert "Traceback" not in said
    assert "quickstart 1: questions(0.5, 0.07)" in said and "was wanted" in said and "Hint: solve the formula for n" in said
    assert "Explained in nbs/engine/18_exercises.ipynb" in said
    look(page, "wrong-answer")
    assert not kept.exists()
    answer(page, RIGHT).get_by_text("[196, 784]").wait_for()
    assert list(json.loads(kept.read_text())) == ["quickstart 1"]


def figures_can_be_read_in_the_dark_theme(page) -> None:
    choose(page, "Settings", "Theme", "JupyterLab Dark")
    page.locator("body[data-jp-theme-light='false']").wait_for(state="attached")
    chart = cell(page, "figure, axis = plt.subplots").locator(".jp-OutputArea img")
    show(page, chart)
    look(page, "chart-dark")
    # On a transparent ground the labels would be black on black: each figure brings its own ground.
    assert chart.evaluate("""picture => {
        const pen = new OffscreenCanvas(4, 4).getContext('2d')
        pen.drawImage(picture, 0, 0, 4, 4, 0, 0, 4, 4)
        return pen.getImageData(1, 1, 1, 1).data[3] }""") == 255
